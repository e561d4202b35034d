package agent

import (
	"bufio"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/nodeapi"
)

// TestHints: a new connection gets the present value at once, a change reaches
// it without an enable, and what it says it delivered is reported.
func TestHints(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	calls := filepath.Join(t.TempDir(), "calls")
	x := ext("one", "Thing", "1.0", s.addPackage(script(calls, succeed, "")))
	x.Hint = "41"
	s.goal.Extensions = []node.Extension{x}
	_, stop := startAgent(t, cfg)
	s.waitStatus("one", "success")
	sock := filepath.Join(cfg.LibDir, "Test.Pub.Thing-1.0", hintSocket)
	conn, lines := dialHints(t, sock)
	if got := nextLine(t, lines); got != "hint 41" {
		t.Errorf("first line %q", got)
	}
	began := time.Now()
	s.change(func(g *node.GoalState) { g.Extensions[0].Hint = "42" })
	if got := nextLine(t, lines); got != "hint 42" {
		t.Errorf("after the change %q", got)
	}
	t.Logf("from the changed goal state to the hint: %s", time.Since(began))
	d := extension.Delivery{Secret: "https://v/secrets/web", Version: "8f5f3f491afd48cb99286ba2aacd39af", Path: filepath.Join(cfg.LibDir, "store", "v.web"), Since: time.Unix(1700000000, 0).UTC()}
	if _, err := conn.Write(append([]byte("not json\n"), extension.EncodeDelivery(d)...)); err != nil {
		t.Fatal(err)
	}
	got := s.waitReport("the delivered certificate", func(r node.StatusReport) bool {
		return len(r.Extensions) == 1 && len(r.Extensions[0].Certificates) == 1
	})
	if c := got.Extensions[0].Certificates[0]; c.Secret != d.Secret || c.Version != d.Version || c.Path != d.Path || !c.Since.Equal(d.Since) {
		t.Errorf("reported %+v", c)
	}
	if n := len(readLines(t, calls)); n != 2 {
		t.Errorf("a hint ran commands: %v", readLines(t, calls))
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if exists(sock) {
		t.Error("the socket is left when the agent ended")
	}
}

func dialHints(t *testing.T, sock string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, bufio.NewReader(conn)
}

func nextLine(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return line[:len(line)-1]
}

// TestHintValueIsOneLine: a value from the server cannot add lines.
func TestHintValueIsOneLine(t *testing.T) {
	dir, err := os.MkdirTemp("", "kf")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	h := newHints(func(string, extension.Delivery) {}, func(string) {})
	defer h.closeAll()
	if err := h.open("x", dir, "", "a\nhint b"); err != nil {
		t.Fatal(err)
	}
	_, lines := dialHints(t, filepath.Join(dir, hintSocket))
	if got := nextLine(t, lines); got != "hint a_hint_b" {
		t.Errorf("got %q", got)
	}
	if fi, err := os.Stat(filepath.Join(dir, hintSocket)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi.Mode(), err)
	}
}

// TestReleaseWipes: a host that is released keeps nothing it was given, stays
// enrolled, and says so.
func TestReleaseWipes(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	calls := filepath.Join(t.TempDir(), "calls")
	s.goal.Extensions = []node.Extension{ext("one", "Thing", "1.0", s.addPackage(script(calls, succeed, "")))}
	startAgent(t, cfg)
	s.waitStatus("one", "success")
	store := filepath.Join(cfg.LibDir, "store")
	if err := os.Mkdir(store, 0o700); err != nil {
		t.Fatal(err)
	}
	const v1, v2 = "8f5f3f491afd48cb99286ba2aacd39af", "00000000000000000000000000000002"
	for _, f := range []string{"v.web." + v1 + ".1.2.PEM", "v.web." + v2, "v.website." + v1, "mine"} {
		if err := os.WriteFile(filepath.Join(store, f), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(store, "web")
	if err := os.Symlink(filepath.Join(store, "v.web."+v2), link); err != nil {
		t.Fatal(err)
	}
	conn, _ := dialHints(t, filepath.Join(cfg.LibDir, "Test.Pub.Thing-1.0", hintSocket))
	if _, err := conn.Write(extension.EncodeDelivery(extension.Delivery{Secret: "https://v/secrets/web", Version: v2, Path: link})); err != nil {
		t.Fatal(err)
	}
	s.waitReport("the delivered certificate", func(r node.StatusReport) bool {
		return len(r.Extensions) == 1 && len(r.Extensions[0].Certificates) == 1
	})
	s.change(func(g *node.GoalState) { g.Extensions, g.Action = nil, &node.Action{ID: "r1", Kind: "release"} })
	s.waitReport("the release done", func(r node.StatusReport) bool { return r.Done == "r1" })
	left, err := os.ReadDir(store)
	if err != nil || len(left) != 2 || left[0].Name() != "mine" || left[1].Name() != "v.website."+v1 {
		t.Errorf("left in the store: %v, %v (only what was not delivered may be)", left, err)
	}
	if p, _ := filepath.Glob(filepath.Join(cfg.LibDir, "Test.Pub*")); len(p) != 0 {
		t.Errorf("left of the handler: %v", p)
	}
	if !exists(filepath.Join(cfg.LibDir, "keyfleet", agentFile)) {
		t.Error("a released host is still a registered one")
	}
}

// TestReboot: without a reboot command Run ends, and after the boot id changed the action is done.
func TestReboot(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	s.goal.Action = &node.Action{ID: "b1", Kind: "reboot"}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err != ErrReboot {
		t.Fatalf("Run = %v, want ErrReboot", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	again := s.config()
	again.LibDir, again.LogDir = cfg.LibDir, cfg.LogDir
	b, err := New(again)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	b.bootID = "another boot"
	if err := b.act(t.Context(), &node.GoalState{Action: s.goal.Action}); err != nil {
		t.Fatal(err)
	}
	if b.action.ID != "b1" || !b.action.Done {
		t.Errorf("after the reboot: %+v", b.action)
	}
}
