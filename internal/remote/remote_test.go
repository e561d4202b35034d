package remote

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote/remotetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// These tests wait for other processes most of the time, so more of them run at
// once than there are processors. -parallel on the command line counts more.
func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// bed is a jump host and a machine behind it, both real.
type bed struct {
	t            *testing.T
	jump, target *remotetest.Server
	toTarget     *remotetest.Proxy // between jump host and machine
	toJump       *remotetest.Proxy // between us and the jump host
	cfg          Config
	dir          string // of the machine's log and work
}

func newBed(t *testing.T) *bed {
	t.Helper()
	remotetest.Need(t)
	t.Parallel()
	key := remotetest.NewKey(t, "ed25519")
	o := remotetest.Options{Authorized: []ssh.PublicKey{key.Public}}
	b := &bed{t: t, dir: t.TempDir(), jump: remotetest.Start(t, o)}
	o.IP = "127.0.0.2"
	b.target = remotetest.Start(t, o)
	b.toTarget = remotetest.NewProxy(t, b.target.Address)
	b.toJump = remotetest.NewProxy(t, b.jump.Address)
	known := filepath.Join(t.TempDir(), "known_hosts")
	writeFile(t, known, b.jump.KnownHostsLine(b.toJump.Address)+b.target.KnownHostsLine(b.toTarget.Address))
	b.cfg = Config{
		Address: b.toJump.Address, User: "root", Key: key.PEM, KnownHosts: []string{known},
		Log: filepath.Join(b.dir, "log", "rotate-certs.log"), WorkDir: filepath.Join(b.dir, "work"),
		Timeout: time.Minute, // the machine may have much else to do
	}
	return b
}

func (b *bed) dial() *Jump {
	b.t.Helper()
	j, err := Dial(b.t.Context(), b.cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = j.Close() })
	return j
}

func (b *bed) host() *Host {
	b.t.Helper()
	hosts, err := b.dial().Hosts(b.t.Context(), []Target{{Name: "master-1", Address: b.toTarget.Address}})
	if err != nil {
		b.t.Fatal(err)
	}
	return hosts[0]
}

// log is the log of the machine.
func (b *bed) log() string { return readFile(b.t, b.cfg.Log) }

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// want fails the test unless the error is of a kind and says all of these.
func want(t *testing.T, err error, kind fault.Kind, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("the error is %v, and not of the kind %q", err, kind)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q: %v", w, err)
		}
	}
}

func TestAScriptRunsAsRootInItsOwnPlace(t *testing.T) {
	h := newBed(t).host()
	out, err := h.Run(t.Context(), rotation.Script{Name: "look around", Quiet: true, Text: `id -u; pwd; umask; locale charmap 2>/dev/null || :; echo "$HOME $LC_ALL"; env | sort | cut -d= -f1 | tr '\n' ' '`})
	if err != nil {
		t.Fatal(err)
	}
	wantOut := "0\n/\n0077\nANSI_X3.4-1968\n/root C\nHOME LC_ALL OLDPWD PATH PWD "
	if string(out) != wantOut {
		t.Errorf("it saw %q, want %q", out, wantOut)
	}
	if h.Name() != "master-1" {
		t.Errorf("the machine is called %q", h.Name())
	}
}

func TestArgumentsAndInputArriveAsTheyAre(t *testing.T) {
	h := newBed(t).host()
	args := []string{"", "it's", `"double"`, "two\nlines\n", "$HOME `id` $(id) \\", "-n", "ünï \x80", strings.Repeat("long", 10_000)}
	input := bytes.Repeat([]byte("secret\x00\xff\n'"), 60_000)
	out, err := h.Run(t.Context(), rotation.Script{
		Name: "echo", Quiet: true, Args: args, Input: input,
		Text: `for a in "$@"; do printf '%s|' "$a"; done; cat`,
	})
	if err != nil {
		t.Fatal(err)
	}
	if wantOut := strings.Join(args, "|") + "|" + string(input); string(out) != wantOut {
		t.Errorf("%d bytes came back, want %d that are the same", len(out), len(wantOut))
	}
}

func TestAFailureNamesMachineScriptAndReason(t *testing.T) {
	b := newBed(t)
	h := b.host()
	for _, quiet := range []bool{true, false} {
		_, err := h.Run(t.Context(), rotation.Script{Name: "restart etcd", Quiet: quiet, Text: `
			i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo "line $i" >&2; done
			false
			echo not reached`})
		var failed *rotation.ScriptError
		if !errors.As(err, &failed) {
			t.Fatal(err)
		}
		if failed.Host != "master-1" || failed.Script != "restart etcd" || failed.Status != 1 ||
			!strings.HasPrefix(failed.Output, "line 11\n") || !strings.HasSuffix(failed.Output, "\nline 30") {
			t.Errorf("the error is %+v", failed)
		}
	}
	// An unset variable is a mistake, too, and statuses come as they are.
	_, err := h.Run(t.Context(), rotation.Script{Name: "x", Quiet: true, Text: `echo $unset`})
	if err == nil {
		t.Error("an unset variable is empty")
	}
	_, err = h.Run(t.Context(), rotation.Script{Name: "x", Quiet: true, Text: `exit 124`})
	if failed := (*rotation.ScriptError)(nil); !errors.As(err, &failed) || failed.Status != 124 {
		t.Errorf("exit 124 is %v", err)
	}
}

func TestTimeoutEndsTheProcessesOnTheMachine(t *testing.T) {
	b := newBed(t)
	h := b.host()
	mark := filepath.Join(b.dir, "alive")
	start := time.Now()
	_, err := h.Run(t.Context(), rotation.Script{
		Name: "hang", Timeout: 5 * time.Second, Args: []string{mark},
		Text: `echo begun >&2; (while sleep 0.05; do date >>"$1"; done) & wait`,
	})
	var failed *rotation.ScriptError
	if !errors.As(err, &failed) || failed.Status != -1 || failed.Output != "begun" || !strings.Contains(err.Error(), "it took too long") {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	before := readFile(t, mark)
	time.Sleep(300 * time.Millisecond)
	if readFile(t, mark) != before {
		t.Error("what the script had started still runs")
	}
}

func TestTheLogTellsWhatRanAndNoSecret(t *testing.T) {
	b := newBed(t)
	h := b.host()
	out, err := h.Run(t.Context(), rotation.Script{
		Name: "install\nthe key", Input: []byte("hunter2-key"), Text: `cat >/dev/null; echo out; echo err >&2; printf unfinished`,
	})
	if err != nil || string(out) != "out\nunfinished" {
		t.Fatalf("%q, %v", out, err)
	}
	if _, err := h.Run(t.Context(), rotation.Script{Name: "look", Quiet: true, Text: "echo not logged"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Run(t.Context(), rotation.Script{Name: "fail", Text: "exit 3"}); err == nil {
		t.Fatal("no error")
	}
	pattern := `(?s)^=== 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ install the key\n.*\n=== \S+ install the key: exit status 0 after \d+ s\n` +
		`=== \S+ fail\n=== \S+ fail: exit status 3 after \d+ s\n$`
	log := b.log()
	if !regexp.MustCompile(pattern).MatchString(log) {
		t.Errorf("the log is\n%s", log)
	}
	for _, word := range []string{"out\n", "err\n", "unfinished"} {
		if !strings.Contains(log, word) {
			t.Errorf("the log lacks %q:\n%s", word, log)
		}
	}
	if strings.Contains(log, "hunter2") || strings.Contains(log, "not logged") {
		t.Errorf("the log tells too much:\n%s", log)
	}
	for path, mode := range map[string]os.FileMode{b.cfg.Log: 0o600, filepath.Dir(b.cfg.Log): 0o700 | os.ModeDir, b.cfg.WorkDir: 0o700 | os.ModeDir} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	if left, _ := filepath.Glob(b.cfg.WorkDir + "/run/*"); len(left) > 0 {
		t.Errorf("this was left behind: %v", left)
	}
}

func TestALogThatCannotBeWrittenStopsTheScript(t *testing.T) {
	b := newBed(t)
	b.cfg.Log = "/dev/null/x.log"
	ran := filepath.Join(b.dir, "ran")
	_, err := b.host().Run(t.Context(), rotation.Script{Name: "x", Text: `touch "$1"`, Args: []string{ran}})
	if err == nil || !strings.Contains(err.Error(), "nothing was run") {
		t.Errorf("the error is %v", err)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("the script ran")
	}
}

// While a script runs nothing secret can be seen in the list of processes.
func TestNoSecretInCommandLinesOrEnvironment(t *testing.T) {
	b := newBed(t)
	h := b.host()
	const secret = "canary-5fd1"
	look := `cat >/dev/null; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\0' ' '`
	for _, s := range []rotation.Script{
		{Name: "direct", Quiet: true}, {Name: "logged"}, {Name: "finishes", Finishes: true, Unit: "kf-test-canary"},
	} {
		s.Text, s.Input = look, []byte(secret)
		out, err := h.Run(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(out, []byte("timeout -k 5")) || bytes.Contains(out, []byte(secret)) || bytes.Contains(out, []byte("Y2FuYXJ5LTVmZDE")) {
			t.Errorf("%s: the processes show the secret, or not even the script", s.Name)
		}
	}
}

func TestScriptsThatCannotWorkAreRefused(t *testing.T) {
	h := newHost("m", nil, Config{})
	for _, tc := range []struct {
		kind fault.Kind
		s    rotation.Script
	}{
		{fault.Invalid, rotation.Script{Text: "a\x00b"}},
		{fault.Invalid, rotation.Script{Args: []string{"\x00"}}},
		{fault.TooLarge, rotation.Script{Text: strings.Repeat("x", maxText), Args: []string{"x"}}},
		{fault.TooLarge, rotation.Script{Input: make([]byte, maxInput+1)}},
		{fault.Invalid, rotation.Script{Finishes: true}},
		{fault.Invalid, rotation.Script{Finishes: true, Unit: "a/b"}},
		{fault.Invalid, rotation.Script{Finishes: true, Unit: "--scope"}},
	} {
		_, err := h.Run(t.Context(), tc.s)
		want(t, err, tc.kind)
	}
}

func TestTooMuchOutput(t *testing.T) {
	h := newBed(t).host()
	_, err := h.Run(t.Context(), rotation.Script{Name: "chatter", Quiet: true, Text: "yes"})
	want(t, err, fault.TooLarge, "master-1")
	_, err = h.Run(t.Context(), rotation.Script{Name: "chatter", Quiet: true, Text: fmt.Sprintf("head -c %d /dev/zero", maxOutput+2048)})
	want(t, err, fault.TooLarge, "master-1")
	_, err = h.Run(t.Context(), rotation.Script{Name: "chatter", Quiet: true, Finishes: true, Unit: "kf-test-chatter", Text: "head -c 9000000 /dev/zero"})
	want(t, err, fault.TooLarge, "master-1")
	out, err := h.Run(t.Context(), rotation.Script{Name: "much", Quiet: true, Text: fmt.Sprintf("head -c %d /dev/zero", maxOutput)})
	if err != nil || len(out) != maxOutput {
		t.Errorf("%d bytes, %v", len(out), err)
	}
}

func TestManyScriptsAtOnce(t *testing.T) {
	h := newBed(t).host()
	errs := make(chan error)
	const n = maxSessions + 4
	for i := range n {
		go func() {
			out, err := h.Run(t.Context(), rotation.Script{Name: "count", Text: `sleep 0.05; echo "$1"`, Args: []string{fmt.Sprint(i)}})
			if err == nil && string(out) != fmt.Sprintln(i) {
				err = fmt.Errorf("script %d printed %q", i, out)
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestContextEndsTheWaiting(t *testing.T) {
	b := newBed(t)
	h := b.host()
	goOn := filepath.Join(b.dir, "go")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := h.Run(ctx, rotation.Script{Name: "sleep", Quiet: true, Timeout: 5 * time.Minute, Args: []string{goOn}, Text: `until [ -e "$1" ]; do sleep 0.1; done`})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the error is %v", err)
	}
	writeFile(t, goOn, "")
	if out, err := h.Run(t.Context(), rotation.Script{Name: "again", Quiet: true, Text: "echo ok"}); err != nil || string(out) != "ok\n" {
		t.Errorf("the connection is of no use afterwards: %q, %v", out, err)
	}
}

func TestLoginUsersBecomeRootBySudo(t *testing.T) {
	remotetest.Need(t)
	if !remotetest.Has("/usr/bin/sudo") {
		t.Skip("there is no sudo here (Debian: apt-get install sudo, or build/unpack-sshd FOLDER); the clusters of test/rotation have it")
	}
	b := newBed(t)
	key := remotetest.NewKey(t, "rsa")
	s := remotetest.Start(t, remotetest.Options{Authorized: []ssh.PublicKey{key.Public}, Users: []remotetest.User{
		{Name: "azureuser", Sudo: "ALL=(ALL) NOPASSWD:ALL"}, {Name: "asked", Sudo: "ALL=(ALL) ALL"}, {Name: "closed", Shell: "/usr/sbin/nologin"},
	}})
	cfg := b.cfg
	cfg.Key, cfg.KnownHosts, cfg.User = key.PEM, []string{remotetest.KnownHosts(t, s)}, "root"
	run := func(user string) (string, error) {
		cfg.Address = "ssh://" + user + "@" + s.Address
		j, err := Dial(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		h := j.Host("jump")
		out, err := h.Run(t.Context(), rotation.Script{Name: "who", Text: `id -u; cat`, Input: []byte("input")})
		if err == nil {
			content := bytes.Repeat([]byte("x"), 100_000)
			path := filepath.Join(b.dir, "put")
			err = h.Put(t.Context(), path, bytes.NewReader(content), 0o600)
			wantFile(t, path, content, 0o600)
		}
		return string(out), err
	}
	if out, err := run("azureuser"); err != nil || out != "0\ninput" {
		t.Errorf("with sudo: %q, %v", out, err)
	}
	_, err := run("asked")
	want(t, err, fault.Denied, "asked may not act as root on", "NOPASSWD")
	_, err = run("closed")
	want(t, err, fault.Denied, "does not run commands", "login shell")
}

func TestThroughTheJumpHost(t *testing.T) {
	b := newBed(t)
	j := b.dial()
	out, err := j.Host("jump").Run(t.Context(), rotation.Script{Name: "where", Quiet: true, Text: "hostname -I"})
	if err != nil {
		t.Fatal(err)
	}
	// Under an address of its own and with its key the jump host needs no second hop.
	if own := strings.Fields(string(out)); len(own) > 0 {
		f, err := os.OpenFile(b.cfg.KnownHosts[0], os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = f.WriteString(b.jump.KnownHostsLine(net.JoinHostPort(own[0], "22")))
		_ = f.Close()
		hosts, err := j.Hosts(t.Context(), []Target{{Name: "master-0", Address: own[0]}, {Name: "master-1", Address: b.toTarget.Address}})
		if err != nil {
			t.Fatal(err)
		}
		if hosts[0].link != j.link || hosts[1].link == j.link || hosts[0].Name() != "master-0" {
			t.Error("the jump host was not recognised, or too much was")
		}
	}
	if b.toTarget.Accepted() > 1 {
		t.Errorf("%d connections to the machine", b.toTarget.Accepted())
	}
	// One that says that it has the address, but has another key than is known for it, is not believed.
	liar := machine{name: "m", address: "192.0.2.7:22", user: "root"}
	writeFile(t, b.cfg.KnownHosts[0], b.target.KnownHostsLine(liar.address))
	if self, err := j.isSelf(liar, []string{"192.0.2.7"}); self || err != nil {
		t.Errorf("believed: %v, %v", self, err)
	}
}

func TestUnreachableMachinesAreAllNamed(t *testing.T) {
	b := newBed(t)
	_, err := b.dial().Hosts(t.Context(), []Target{
		{Name: "master-1", Address: b.toTarget.Address}, {Name: "master-2", Address: "127.0.0.3:1"}, {Name: "master-3", Address: "127.0.0.3:2"},
	})
	want(t, err, fault.Unavailable, "master-2 (127.0.0.3:1)", "master-3 (127.0.0.3:2)", "onnection refused")
	b.cfg.Address = "127.0.0.3:3"
	_, err = Dial(t.Context(), b.cfg)
	want(t, err, fault.Unavailable, "127.0.0.3:3", "onnection refused")
}

func TestASilentServerIsGivenUp(t *testing.T) {
	b := newBed(t)
	b.cfg.Timeout = 300 * time.Millisecond
	b.toJump.Freeze(true)
	_, err := Dial(t.Context(), b.cfg)
	want(t, err, fault.Unavailable, "no answer within 300ms")
	b.cfg.Timeout = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, b.cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the error is %v", err)
	}
}

func TestKeys(t *testing.T) {
	b := newBed(t)
	ed, rsa := remotetest.NewKey(t, "ed25519"), remotetest.NewKey(t, "rsa")
	s := remotetest.Start(t, remotetest.Options{Authorized: []ssh.PublicKey{ed.Public, rsa.Public}, HostKey: "rsa"})
	cfg := b.cfg
	cfg.Address, cfg.KnownHosts = s.Address, []string{remotetest.KnownHosts(t, s)}
	dial := func(key []byte, passphrase string) error {
		cfg.Key, cfg.Passphrase = key, nil
		if passphrase != "" {
			cfg.Passphrase = func() ([]byte, error) { return []byte(passphrase), nil }
		}
		j, err := Dial(t.Context(), cfg)
		if err == nil {
			_ = j.Close()
		}
		return err
	}
	for _, k := range []remotetest.Key{ed, rsa} {
		if err := dial(k.PEM, ""); err != nil {
			t.Error(err)
		}
		encrypted := k.Encrypted(t, "open sesame")
		if err := dial(encrypted, "open sesame"); err != nil {
			t.Error(err)
		}
		want(t, dial(encrypted, "open barley"), fault.Denied, "passphrase")
		want(t, dial(encrypted, ""), fault.Invalid, "encrypted", "Fix:")
	}
	want(t, dial([]byte("ssh-ed25519 AAAA"), ""), fault.Invalid, ".pub")
	want(t, dial([]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\n"), ""), fault.Invalid, "ssh-keygen -p")
	want(t, dial(remotetest.NewKey(t, "ed25519").PEM, ""), fault.Unauthenticated, "does not let root in with this key", "authorized_keys", "ssh-ed25519 ")
	cfg.User = ""
	want(t, dial(ed.PEM, ""), fault.Invalid, "which user")
}
