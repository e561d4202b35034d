package remote

import (
	"encoding/base64"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote/remotetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

var update = flag.Bool("update", false, "write the golden files anew")

const windowsSecret = "the secret of winuser"

// windowsJump is a jump host that needs no sshd here, and how to go through it.
func windowsJump(t *testing.T) Config {
	t.Helper()
	key := remotetest.NewKey(t, "ed25519")
	s := remotetest.StartWindows(t, key.Public, "root", "", func(int, remotetest.WindowsCall) remotetest.WindowsAnswer {
		return remotetest.WindowsAnswer{Silent: true, Status: 1} // made for nothing but passing through
	})
	known := filepath.Join(t.TempDir(), "known_hosts")
	writeFile(t, known, "")
	s.KnownHosts(known)
	return Config{Address: s.Address, User: "root", Key: key.PEM, KnownHosts: []string{known}, WindowsUser: "winuser", WindowsPassword: windowsSecret}
}

// windowsHost dials a machine with Windows through a jump host.
func windowsHost(t *testing.T, cfg Config, s *remotetest.WindowsServer) (*Host, error) {
	t.Helper()
	j, err := Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	hosts, err := j.Hosts(t.Context(), []Target{{Name: "win-0", Address: s.Address, Windows: true}})
	if err != nil {
		return nil, err
	}
	return hosts[0], nil
}

// windowsBed is a jump host, and a machine behind it that stands for one with Windows
// and lets in by password.
func windowsBed(t *testing.T, answer func(n int, c remotetest.WindowsCall) remotetest.WindowsAnswer) (*Host, *remotetest.WindowsServer) {
	t.Helper()
	cfg := windowsJump(t)
	s := remotetest.StartWindows(t, nil, "winuser", windowsSecret, answer)
	s.KnownHosts(cfg.KnownHosts[0])
	h, err := windowsHost(t, cfg, s)
	if err != nil {
		t.Fatal(err)
	}
	return h, s
}

func TestAScriptRunsOnWindows(t *testing.T) {
	h, s := windowsBed(t, func(int, remotetest.WindowsCall) remotetest.WindowsAnswer {
		return remotetest.WindowsAnswer{Stdout: "placed\r\nyes\n"}
	})
	script := rotation.Script{Name: "place a\nfile", Text: "'placed'", Args: []string{`c:\k`, "it's; exit 0"}, Input: []byte("PRIVATE KEY of a client")}
	out, err := h.Run(t.Context(), script)
	if err != nil || string(out) != "placed\nyes\n" {
		t.Fatalf("%q, %v", out, err)
	}
	calls := s.Calls()
	if len(calls) != 1 || calls[0].User != "winuser" || calls[0].How != "password" {
		t.Fatalf("the calls: %+v", calls)
	}
	c := calls[0]
	if !strings.HasPrefix(c.Line, "powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass -EncodedCommand ") || len(c.Line) > 8000 || strings.ContainsAny(c.Line, "'\"|&<>^%$;") {
		t.Errorf("cmd.exe or PowerShell would read this in ways of its own: %s", c.Line)
	}
	if c.Bootstrap() != windowsBootstrap {
		t.Errorf("the command line says %q", c.Bootstrap())
	}
	input := base64.StdEncoding.EncodeToString(script.Input)
	lines := strings.Split(string(c.Stdin), "\n")
	if len(lines) != 4 || lines[2] != "."+input || lines[3] != "" {
		t.Errorf("standard input has %d lines", len(lines))
	}
	for where, text := range map[string]string{"the command line": c.Bootstrap(), "the program": c.Program()} {
		for _, secret := range []string{"PRIVATE KEY", input, windowsSecret, "it's"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s holds %q", where, secret)
			}
		}
	}
	for _, value := range []string{`c:\k\rotate-certs.log`, "place a file", "it's; exit 0", script.Text} {
		if !strings.Contains(c.Program(), windowsValue(value)) {
			t.Errorf("the program has no %q", value)
		}
	}
}

// TestTheWindowsProgramIsAsReviewed: nobody here can run it.
func TestTheWindowsProgramIsAsReviewed(t *testing.T) {
	got := windowsProgram(rotation.Script{Name: "place a file", Text: "'placed'", Args: []string{"a", "b"}, Input: []byte("x")}, windowsLog)
	for name, text := range map[string]string{"program.ps1": got, "bootstrap.ps1": windowsBootstrap} {
		path := filepath.Join("testdata", "windows", name)
		if *update {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(want) != text {
			t.Errorf("it is another than %s: read both, then go test -update", path)
		}
	}
	if !strings.Contains(windowsProgram(rotation.Script{Quiet: true}, windowsLog), "$argv = @()\n") {
		t.Error("no arguments are not an empty array")
	}
}

func TestFailuresOnWindows(t *testing.T) {
	answers := []remotetest.WindowsAnswer{
		{Stderr: "there is no c:\\k\\config\n", Status: 1},
		{Stderr: "another runner has taken over this rotation\n", Status: 75},
		{Stderr: "'powershell.exe' is not recognized\r\n", Status: 1, Silent: true},
		{Stderr: "keyfleet: the program did not arrive whole\r\n", Status: 74, Silent: true},
	}
	h, _ := windowsBed(t, func(n int, _ remotetest.WindowsCall) remotetest.WindowsAnswer { return answers[n] })
	for _, want := range []struct {
		status int
		output string
	}{{1, `there is no c:\k\config`}, {75, "taken over"}} {
		_, err := h.Run(t.Context(), rotation.Script{Name: "place"})
		var failed *rotation.ScriptError
		if !errors.As(err, &failed) || failed.Status != want.status || !strings.Contains(failed.Output, want.output) || failed.Host != "win-0" {
			t.Errorf("want status %d: %v", want.status, err)
		}
	}
	for _, words := range []string{"not recognized", "did not arrive whole"} {
		_, err := h.Run(t.Context(), rotation.Script{Name: "place"})
		want(t, err, fault.Denied, "does not run PowerShell", words)
	}
}

// TestACutConnectionToWindows: what only looks is asked again; of what changes
// something it is said that nobody knows.
func TestACutConnectionToWindows(t *testing.T) {
	h, s := windowsBed(t, func(n int, _ remotetest.WindowsCall) remotetest.WindowsAnswer {
		return remotetest.WindowsAnswer{Stdout: "yes\n", Cut: n != 1}
	})
	out, err := h.Run(t.Context(), rotation.Script{Name: "look", Quiet: true})
	if err != nil || string(out) != "yes\n" || len(s.Calls()) != 2 {
		t.Errorf("%q after %d calls, %v", out, len(s.Calls()), err)
	}
	_, err = h.Run(t.Context(), rotation.Script{Name: "restart kubelet"})
	want(t, err, fault.Unavailable, "restart kubelet", "outcome is not known")
	if fix := fault.From(err).Fix; !strings.Contains(fix, windowsLog) {
		t.Errorf("the fix does not name the log there: %s", fix)
	}
	if n := len(s.Calls()); n != 3 {
		t.Errorf("what changes something was begun again: %d calls", n)
	}
}

func TestLoggingInToWindows(t *testing.T) {
	cfg := windowsJump(t)
	j, err := newJump(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if windows, linux := len(j.auth(machine{windows: true})), len(j.auth(machine{})); windows != 2 || linux != 1 {
		t.Errorf("%d ways to log in to Windows, and %d to Linux, where the password is not for", windows, linux)
	}
	s := remotetest.StartWindows(t, nil, "winuser", "another", nil)
	s.KnownHosts(cfg.KnownHosts[0])
	_, err = windowsHost(t, cfg, s)
	want(t, err, fault.Unauthenticated, "winuser", "password of the API model")
	if text := err.Error() + fault.From(err).Fix; strings.Contains(text, windowsSecret) || !strings.Contains(text, "administrators_authorized_keys") {
		t.Errorf("the error: %s", text)
	}
}

// TestTheKeyComesBeforeThePassword, and an unknown host gets neither.
func TestTheKeyComesBeforeThePassword(t *testing.T) {
	cfg := windowsJump(t)
	j, err := newJump(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := remotetest.StartWindows(t, j.signer.PublicKey(), "winuser", windowsSecret, func(int, remotetest.WindowsCall) remotetest.WindowsAnswer {
		return remotetest.WindowsAnswer{}
	})
	if _, err := windowsHost(t, cfg, s); err == nil {
		t.Fatal("a host with an unknown key was taken")
	}
	s.KnownHosts(cfg.KnownHosts[0])
	h, err := windowsHost(t, cfg, s)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Run(t.Context(), rotation.Script{Name: "look", Quiet: true}); err != nil {
		t.Fatal(err)
	}
	if calls := s.Calls(); len(calls) != 1 || calls[0].How != "publickey" {
		t.Errorf("the calls: %+v", calls)
	}
	if err := h.Put(t.Context(), "/k/config", strings.NewReader("x"), 0o600); !errors.Is(err, fault.Invalid) {
		t.Errorf("a file was put: %v", err)
	}
}
