package agent

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/nodeapi"
)

// TestLifeOfAnExtension follows one extension from installation over new
// settings, a restart of the agent and an update to its removal.
func TestLifeOfAnExtension(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	calls := filepath.Join(t.TempDir(), "calls")
	p1 := s.addPackage(script(calls, succeed, ""))
	p2 := s.addPackage(script(calls, succeed+"\n# newer", ""))
	x := ext("one", "Thing", "1.0.1", p1)
	x.ProtectedSettings = "TUlJQg=="
	s.goal.Extensions = []node.Extension{x}
	_, stop := startAgent(t, cfg)
	got := s.waitStatus("one", "success")
	if got.HandlerState != node.Enabled || got.Message != "ready" || got.Operation != "start" || got.Version != "1.0.1" {
		t.Errorf("reported %+v", got)
	}
	dir := filepath.Join(cfg.LibDir, "Test.Pub.Thing-1.0.1")
	checkFolders(t, cfg, dir)

	s.change(func(g *node.GoalState) {
		g.Extensions[0].Sequence, g.Extensions[0].Settings = 2, json.RawMessage(`{"a":2}`)
	})
	s.waitReport("sequence 2", func(r node.StatusReport) bool {
		return len(r.Extensions) == 1 && r.Extensions[0].Sequence == 2 && r.Extensions[0].Status == "success"
	})
	if err := stop(); err != nil {
		t.Fatalf("Run: %v", err)
	}
	cfg2 := s.config()
	cfg2.LibDir, cfg2.LogDir, cfg2.Token = cfg.LibDir, cfg.LogDir, ""
	_, stop = startAgent(t, cfg2)
	waitFor(t, "the extension is enabled again after a restart", func() bool { return len(readLines(t, calls)) == 4 })

	s.change(func(g *node.GoalState) { g.Extensions[0].Version, g.Extensions[0].Package = "1.0.2", p2 })
	s.waitReport("version 1.0.2", func(r node.StatusReport) bool {
		return len(r.Extensions) == 1 && r.Extensions[0].Version == "1.0.2" && r.Extensions[0].Status == "success"
	})
	s.change(func(g *node.GoalState) { g.Extensions = nil })
	waitFor(t, "the handler is removed", func() bool {
		left, _ := filepath.Glob(filepath.Join(cfg.LibDir, "Test.Pub.Thing*"))
		return len(left) == 0
	})
	_ = stop()
	want := []string{
		"1.0.1 install 1", "1.0.1 enable 1", "1.0.1 enable 2", // new settings: enable again
		"1.0.1 enable 2", // the agent was started again
		"1.0.1 disable 2", "1.0.2 update 2", "1.0.1 uninstall 0", "1.0.2 install 2", "1.0.2 enable 2",
		"1.0.2 disable 2", "1.0.2 uninstall 0",
	}
	if d := cmp.Diff(want, readLines(t, calls)); d != "" {
		t.Errorf("commands (-want +got):\n%s", d)
	}
}

// checkFolders checks what handlers in the field look for, byte for byte where they do.
func checkFolders(t *testing.T, cfg Config, dir string) {
	t.Helper()
	env, err := os.ReadFile(filepath.Join(dir, "HandlerEnvironment.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(env), `"logFolder": "`+filepath.Join(cfg.LogDir, "Test.Pub.Thing")+`", "`) {
		t.Errorf("shims find logFolder by this text, with something after it: %s", env)
	}
	settings, err := os.ReadFile(filepath.Join(dir, "config", "1.settings"))
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		RuntimeSettings []struct{ HandlerSettings map[string]any }
	}
	if err := json.Unmarshal(settings, &f); err != nil {
		t.Fatal(err)
	}
	hs := f.RuntimeSettings[0].HandlerSettings
	thumb, _ := hs["protectedSettingsCertThumbprint"].(string)
	if hs["protectedSettings"] != "TUlJQg==" || len(thumb) != 40 || thumb != strings.ToUpper(thumb) {
		t.Errorf("settings file: %s", settings)
	}
	for path, mode := range map[string]os.FileMode{
		dir: 0o700, filepath.Join(dir, "config"): 0o700, filepath.Join(dir, "status"): 0o700,
		filepath.Join(dir, "config", "1.settings"):              0o600,
		filepath.Join(dir, "config", "..", "..", thumb+".crt"):  0o600, // where handlers run openssl with
		filepath.Join(dir, "config", "..", "..", thumb+".prv"):  0o600,
		filepath.Join(dir, "bin", "h.sh"):                       0o700,
		filepath.Join(cfg.LibDir, "Test.Pub.Thing__1.0.1.zip"):  0o600,
		filepath.Join(cfg.LibDir, "keyfleet"):                   0o700,
		filepath.Join(cfg.LibDir, "keyfleet", "agent.pem"):      0o600,
		filepath.Join(dir, "keyfleet-hint.sock"):                0o600,
		filepath.Join(cfg.LogDir, "Test.Pub.Thing", "events"):   0o700,
		filepath.Join(dir, "manifest.xml"):                      0o700, // u+x for every file of a package
		filepath.Join(cfg.LibDir, "keyfleet-ca.pem"):            0o644,
		filepath.Join(cfg.LogDir, "Test.Pub.Thing", commandLog): 0o640,
	} {
		fi, err := os.Stat(path)
		if err != nil {
			t.Error(err)
		} else if fi.Mode().Perm()&^0o055 != mode&^0o055 || mode&0o077 == 0 && fi.Mode().Perm()&0o007 != 0 && !strings.Contains(path, "h.sh") && !strings.Contains(path, "manifest.xml") {
			t.Errorf("%s has mode %o, want %o", path, fi.Mode().Perm(), mode)
		}
	}
	if text, _ := os.ReadFile(filepath.Join(dir, "config", "HandlerState")); string(text) != node.Enabled {
		t.Errorf("HandlerState is %q", text)
	}
}

// TestCommandEnvironment checks the variables that handlers are promised.
func TestCommandEnvironment(t *testing.T) {
	t.Setenv("KEYFLEET_TOKEN", "secret")
	t.Setenv("NOTIFY_SOCKET", "/run/x")
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	dir := t.TempDir()
	p := s.addPackage(script(filepath.Join(dir, "calls"), `env > `+dir+`/env.$1; pwd >> `+dir+`/env.$1; `+succeed, ""))
	x := ext("one", "Thing", "1.0", p)
	x.Settings = nil
	s.goal.Extensions = []node.Extension{x}
	startAgent(t, cfg)
	s.waitStatus("one", "success")
	base := filepath.Join(cfg.LibDir, "Test.Pub.Thing-1.0")
	env := "\n" + strings.Join(readLines(t, filepath.Join(dir, "env.enable")), "\n") + "\n"
	for _, want := range []string{
		"AZURE_GUEST_AGENT_EXTENSION_PATH=" + base, "AZURE_GUEST_AGENT_EXTENSION_VERSION=1.0", "ConfigSequenceNumber=1",
		"AZURE_GUEST_AGENT_UNINSTALL_CMD_EXIT_CODE=NOT_RUN", "AZURE_GUEST_AGENT_DISABLE_CMD_EXIT_CODE=NOT_RUN",
		`AZURE_GUEST_AGENT_EXTENSION_SUPPORTED_FEATURES=[{"Key": "ExtensionTelemetryPipeline", "Value": "1.0"}]`,
		"AZURE_GUEST_AGENT_WIRE_PROTOCOL_ADDRESS=" + nodeHost, "SSL_CERT_FILE=" + filepath.Join(cfg.LibDir, trustName),
		"KEYFLEET_HINT_SOCKET=" + filepath.Join(base, "keyfleet-hint.sock"), base,
	} {
		if !strings.Contains(env, "\n"+want+"\n") {
			t.Errorf("enable runs without %s", want)
		}
	}
	for _, not := range []string{"KEYFLEET_TOKEN", "NOTIFY_SOCKET", "ConfigExtensionName"} {
		if strings.Contains(env, "\n"+not+"=") {
			t.Errorf("enable gets %s", not)
		}
	}
	fi, err := os.Stat(filepath.Join(base, "config", "1.settings"))
	if err != nil || fi.Size() != 0 {
		t.Errorf("an extension without settings has an empty settings file: %v, %v", fi, err)
	}
}

// TestFailures lists what can go wrong with an extension, and what is reported.
func TestFailures(t *testing.T) {
	big := strings.Repeat("x", 2000)
	cases := []struct {
		name, body, manifest string
		change               func(x *node.Extension, s *testServer)
		code                 int
		message, log         string
	}{
		{name: "enable fails", body: `[ $1 = enable ] && echo reading "the settings" && exit 7; true`, code: 1009, message: "exit status 7", log: "reading the settings"},
		{name: "install fails", body: `[ $1 = install ] && echo no disk >&2 && exit 1; true`, code: 1007, message: "exit status 1", log: "no disk"},
		{name: "enable never ends", body: `[ $1 = enable ] && { echo waiting; sleep 600 & wait; }; true`, code: 1009, message: "did not end within", log: "waiting"},
		{name: "enable is killed", body: `[ $1 = enable ] && kill -9 $$; true`, code: 1009, message: "exit status 137"},
		{name: "long lines are cut", body: `[ $1 = enable ] && echo ` + big + ` && exit 1; true`, code: 1009, message: "exit status 1", log: big[:1024]},
		{name: "no package on the server", body: succeed, code: 1001, message: "no version 9", change: func(x *node.Extension, _ *testServer) {
			x.Package, x.Problem = nil, "There is no version 9.0 of it."
		}},
		{name: "package with another hash", body: succeed, code: 1001, message: "SHA-256", change: func(x *node.Extension, s *testServer) {
			s.packages[x.Package.SHA256] = []byte(strings.Repeat("z", int(x.Package.Size)))
		}},
		{name: "package without manifest", body: succeed, code: 1002, message: "no HandlerManifest.json", change: func(x *node.Extension, s *testServer) {
			x.Package = s.addPackage(map[string]string{"a": "b"})
		}},
		{name: "manifest that is none", body: succeed, code: 1003, message: "manifest", change: func(x *node.Extension, s *testServer) {
			x.Package = s.addPackage(map[string]string{"HandlerManifest.json": "{}"})
		}},
		{name: "package that leaves its folder", body: succeed, code: 1005, message: "leads out", change: func(x *node.Extension, s *testServer) {
			x.Package = s.addPackage(map[string]string{"HandlerManifest.json": "[]", "../../evil": "x"})
		}},
		{name: "name that is a path", body: succeed, code: 1000, message: "cannot be the name", change: func(x *node.Extension, _ *testServer) {
			x.Version = "1/../../2"
		}},
		{name: "status says error", body: `echo "secret list: 403" >> LOGDIR/own.log; [ $1 = enable ] && status error "cannot read the vault" sync; true`, code: 0, message: "cannot read the vault", log: "secret list: 403"},
		{name: "status file is no JSON", body: `[ $1 = enable ] && echo oops > status/1.status; true`, code: 1000, message: "cannot be used"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newTestServer(t, nodeapi.Config{})
			cfg := s.config()
			cfg.Timeouts.Enable, cfg.Timeouts.Retry = 300*time.Millisecond, 10*time.Second
			if c.message != "did not end within" {
				cfg.Timeouts.Enable = 30 * time.Second
			}
			x := ext("one", "Thing", "1.0", s.addPackage(script(filepath.Join(t.TempDir(), "calls"), strings.ReplaceAll(c.body, "LOGDIR", filepath.Join(cfg.LogDir, "Test.Pub.Thing")), c.manifest)))
			if c.change != nil {
				c.change(&x, s)
			}
			s.goal.Extensions = []node.Extension{x}
			startAgent(t, cfg)
			got := s.waitStatus("one", "error")
			if got.Code != c.code || !strings.Contains(got.Message, c.message) {
				t.Errorf("reported code %d, %q; want %d, %q", got.Code, got.Message, c.code, c.message)
			}
			if c.log != "" && !strings.Contains(strings.Join(got.Log, "\n"), c.log) {
				t.Errorf("the kept log lines %q lack %q", got.Log, c.log)
			}
		})
	}
}

// TestFailureIsTriedAgain: an enable that fails twice and then works.
func TestFailureIsTriedAgain(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	calls := filepath.Join(t.TempDir(), "calls")
	s.goal.Extensions = []node.Extension{ext("one", "Thing", "1.0", s.addPackage(script(calls,
		`[ $1 = enable ] && { [ $(grep -c enable `+calls+`) -lt 3 ] && exit 1; status success ready start; }; true`, "")))}
	startAgent(t, cfg)
	s.waitStatus("one", "success")
	if got := strings.Join(readLines(t, calls), ","); got != "1.0 install 1,1.0 enable 1,1.0 enable 1,1.0 enable 1" {
		t.Errorf("commands: %s", got)
	}
	logs, err := s.logs.List(t.Context(), "node1", "one")
	if err != nil || len(logs) == 0 || logs[0].File != commandLog || !strings.Contains(logs[0].Tail, "enable") {
		t.Errorf("the failing command's log was not uploaded: %v, %v", logs, err)
	}
}

// TestBackgroundProcessLives: a command that starts a daemon ends at once, and
// the daemon, which holds the command's output open, lives on.
func TestBackgroundProcessLives(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	dir := t.TempDir()
	s.goal.Extensions = []node.Extension{ext("one", "Thing", "1.0", s.addPackage(script(filepath.Join(dir, "calls"), `
if [ $1 = enable ]; then
  exec &> >(tee -a `+dir+`/tee)
  (while [ -e `+dir+` ]; do echo alive > `+dir+`/alive; sleep 0.05; done) &
  echo $! > `+dir+`/pid; status success ready start
fi; true`, "")))}
	startAgent(t, cfg)
	began := time.Now()
	s.waitStatus("one", "success")
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("enable with a background process took %s", d)
	}
	alive := func() bool { return exists(filepath.Join(dir, "alive")) }
	waitFor(t, "the daemon begins", alive)
	if err := os.Remove(filepath.Join(dir, "alive")); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the daemon still runs after its command ended", alive)
}

// TestSeveralExtensionsOfOneHandler: files and variables carry the extension's name.
func TestSeveralExtensionsOfOneHandler(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	calls := filepath.Join(t.TempDir(), "calls")
	p := s.addPackage(script(calls, succeed, `,"supportsMultipleExtensions":"true"`)) // a string, as handlers ship it
	s.goal.Extensions = []node.Extension{ext("one", "Thing", "1.0", p), ext("two", "Thing", "1.0", p)}
	startAgent(t, cfg)
	s.waitStatus("one", "success")
	s.waitStatus("two", "success")
	dir := filepath.Join(cfg.LibDir, "Test.Pub.Thing-1.0")
	for _, f := range []string{"config/one.1.settings", "config/two.1.settings", "config/one.HandlerState", "status/two.1.status", "two.keyfleet-hint.sock"} {
		if !exists(filepath.Join(dir, f)) {
			t.Errorf("%s is missing", f)
		}
	}
	s.change(func(g *node.GoalState) { g.Extensions = g.Extensions[1:] })
	waitFor(t, "the removed extension's files are gone", func() bool { return !exists(filepath.Join(dir, "config/one.HandlerState")) })
	if left, _ := filepath.Glob(filepath.Join(dir, "*", "one.*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	want := []string{"1.0 install 1", "1.0 enable one 1", "1.0 enable two 1", "1.0 disable one 1"}
	if d := cmp.Diff(want, readLines(t, calls)); d != "" {
		t.Errorf("commands (-want +got):\n%s", d)
	}
}

// TestSecondExtensionOfASingleHandler is refused by name, and the first one works.
func TestSecondExtensionOfASingleHandler(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	p := s.addPackage(script(filepath.Join(t.TempDir(), "calls"), succeed, ""))
	s.goal.Extensions = []node.Extension{ext("one", "Thing", "1.0", p), ext("two", "Thing", "1.0", p)}
	startAgent(t, s.config())
	s.waitStatus("one", "success")
	if got := s.waitStatus("two", "error"); !strings.Contains(got.Message, `"one" uses it already`) {
		t.Errorf("reported %+v", got)
	}
}

// TestDependencies: the dependent waits for success, is skipped by name on an
// error, and starts when the error is mended.
func TestDependencies(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	first := s.addPackage(script(calls, `[ $1 = enable ] && status transitioning working start; true`, ""))
	a, b, c := ext("a", "Last", "1.0", s.addPackage(script(calls, succeed, ""))), ext("b", "Middle", "2.0", s.addPackage(script(calls, succeed+" ", ""))), ext("c", "First", "3.0", first)
	a.DependsOn, b.DependsOn = []string{"b"}, []string{"c"}
	s.goal.Extensions = []node.Extension{a, b, c}
	startAgent(t, cfg)
	got := s.waitReport("c transitioning and b waiting", func(r node.StatusReport) bool {
		return len(r.Extensions) == 3 && r.Extensions[2].Message == "working" && strings.Contains(r.Extensions[1].Message, `waits for the extension "c"`)
	})
	if got.Extensions[1].HandlerState != node.NotInstalled {
		t.Errorf("b was started before c succeeded: %+v", got.Extensions[1])
	}
	status := filepath.Join(cfg.LibDir, "Test.Pub.First-3.0", "status", "1.status")
	write := func(word string) {
		text := `[{"version":"1.0","timestampUTC":"2021-03-03T23:12:23Z","status":{"status":"` + word + `","operation":"x","code":1,"formattedMessage":{"lang":"en","message":"m"},"substatus":null}}]`
		if err := os.WriteFile(status+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(status+".new", status); err != nil {
			t.Fatal(err)
		}
	}
	write("error")
	s.waitReport("a and b skipped because of c", func(r node.StatusReport) bool {
		return r.Extensions[0].Skipped == "c" && r.Extensions[1].Skipped == "c" && r.Extensions[1].Status == "error"
	})
	write("success")
	s.waitStatus("a", "success")
	var enabled []string
	for _, l := range readLines(t, calls) {
		if strings.Contains(l, "enable") {
			enabled = append(enabled, l[:1])
		}
	}
	if got := strings.Join(enabled, ""); got != "321" {
		t.Errorf("order of enable commands %s, want c, b, a (321)", got)
	}
	s.change(func(g *node.GoalState) { g.Extensions = nil })
	waitFor(t, "all are removed", func() bool { return strings.Count(strings.Join(readLines(t, calls), "\n"), "uninstall") == 3 })
	var removed []string
	for _, l := range readLines(t, calls) {
		if strings.Contains(l, "uninstall") {
			removed = append(removed, l[:1])
		}
	}
	if got := strings.Join(removed, ""); got != "123" {
		t.Errorf("order of uninstall commands %s, want the reverse (123)", got)
	}
}

// TestDependencyTimeout: a dependency that never succeeds.
func TestDependencyTimeout(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	cfg.Timeouts.Dependency = 200 * time.Millisecond
	calls := filepath.Join(t.TempDir(), "calls")
	a, b := ext("a", "Last", "1.0", s.addPackage(script(calls, succeed, ""))), ext("b", "First", "1.0", s.addPackage(script(calls, "true", "")))
	a.DependsOn = []string{"b"}
	s.goal.Extensions = []node.Extension{a, b}
	startAgent(t, cfg)
	if got := s.waitStatus("a", "error"); got.Skipped != "b" {
		t.Errorf("reported %+v", got)
	}
}
