package local_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/provider/local"
)

// Node ids in the form of Batch's host names.
const (
	node0 = "74773db5fe1b42ab9a4b6cf679d929da000000"
	node1 = "74773db5fe1b42ab9a4b6cf679d929da000001"
)

// againAsUser is set in the run as an ordinary user that root's run starts.
const againAsUser = "KEYFLEET_TEST_AGAIN_AS_USER"

// TestAsOrdinaryUser runs every test of this package as user 65534, who has
// nothing but user namespaces.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this run is as an ordinary user already")
	}
	// A place that the user can reach, with a copy of the test program.
	dir, err := os.MkdirTemp("", "keyfleet-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "local.test")
	for _, err := range []error{os.WriteFile(exe, program, 0o755), os.Chmod(dir, 0o755), os.Mkdir(dir+"/tmp", 0o700), os.Chown(dir+"/tmp", 65534, 65534)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(exe, "-test.v", "-test.count=1")
	if testing.Short() {
		cmd.Args = append(cmd.Args, "-test.short")
	}
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir + "/tmp", "TMPDIR=" + dir + "/tmp", againAsUser + "=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	t.Logf("as uid 65534:\n%s", out)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(out, []byte("--- PASS: TestNodeIsAMachine")) {
		t.Fatal("the tests were not run")
	}
}

// TestNodeIsAMachine: from inside, a node looks like the machine that the documents describe.
func TestNodeIsAMachine(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("host"), 0o666); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, t.TempDir())
	a := w.start(node0)
	for _, c := range []struct{ reason, command, want string }{
		{"the host name is the node's id", "hostname", node0},
		{"programs run as root of the node", "id -u", "0"},
		{"the documented folders are there", "cd /var/lib/waagent && cd /var/log/azure && pwd", "/var/log/azure"},
		{"the server's name leads to the forwarder", "grep node.keyfleet.internal /etc/hosts", "127.0.0.1 node.keyfleet.internal"},
		{"programs cannot be changed", "touch /usr/changed 2>/dev/null || echo refused", "refused"},
		{"certificate folders can be made under /etc", "mkdir -p /etc/ssl/keyvault && echo made", "made"},
		{"files can be replaced by renaming in /etc", "cp /etc/hosts /etc/hosts.new && mv /etc/hosts.new /etc/hosts && echo moved", "moved"},
		{"password hashes stay outside", "test -e /etc/shadow || echo none", "none"},
		{"home folders stay outside", "ls /home /root | grep -v : | tr -d '\\n'", ""},
		{"files of this machine's /tmp stay outside", "test -e " + outside + " || echo none", "none"},
		{"processes of this machine stay outside", "test -d /proc/" + fmt.Sprint(os.Getpid()) + " && readlink /proc/" + fmt.Sprint(os.Getpid()) + "/exe || echo none", "none"},
		{"the first process is the node's own", "tr '\\0' ' ' </proc/1/cmdline | cut -d' ' -f2", "local-init"},
		{"there is no network but lo", "ls /proc/sys/net/ipv4/conf | tr '\\n' ' '", "all default lo"},
		{"sockets of IPC namespaces are empty", "cat /proc/sysvipc/shm | wc -l", "1"},
		{"/tmp is for everybody", "stat -c %a /tmp", "1777"},
		{"/dev/null swallows", "echo x >/dev/null && echo ok", "ok"},
		{"the join token is the agent's alone", "stat -c %a /var/lib/waagent/keyfleet/join-token", "600"},
	} {
		if got := strings.TrimSpace(a.sh(c.command)); got != c.want {
			t.Errorf("%s: %s printed %q, want %q", c.reason, c.command, got, c.want)
		}
	}
	host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	if got := a.sh("cat /proc/sys/kernel/random/boot_id"); got == strings.TrimSpace(string(host)) || len(got) != 36 {
		t.Errorf("the boot id %q is not the node's own", got)
	}
	a.sh("echo seen >/var/lib/waagent/mark")
	if b, err := os.ReadFile(filepath.Join(w.Files(node0), "mark")); err != nil || string(b) != "seen\n" {
		t.Errorf("the node's file is not to be seen from outside: %q, %v", b, err)
	}
}

// TestAddressIsInsideOnly: 169.254.169.254 answers in each node as that node,
// and this machine's network is as it was.
func TestAddressIsInsideOnly(t *testing.T) {
	before := interfaces(t)
	w := newWorld(t, t.TempDir())
	agents := map[string]*remote{}
	for _, id := range []string{node0, node1} {
		agents[id] = w.start(id)
	}
	for id, a := range agents {
		got, err := a.ask(order{Get: "http://169.254.169.254/"})
		if err != nil || got.Fail || got.Out != id {
			t.Errorf("in node %s the address answered %+v, %v", id, got, err)
		}
	}
	c := http.Client{Timeout: 300 * time.Millisecond, Transport: &http.Transport{}} // no proxy
	if resp, err := c.Get("http://169.254.169.254/"); err == nil {
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(body) == node0 || string(body) == node1 {
			t.Error("the address of a node is reachable from outside")
		}
	}
	if after := interfaces(t); !slices.Equal(before, after) {
		t.Errorf("this machine's network changed from %v to %v", before, after)
	}
}

func interfaces(t *testing.T) []string {
	t.Helper()
	ifs, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprint(i.Name, i.Flags, addrs))
	}
	return out
}

// TestNodesAreApart: two nodes have neither files nor processes in common.
func TestNodesAreApart(t *testing.T) {
	w := newWorld(t, t.TempDir())
	a, b := w.start(node0), w.start(node1)
	a.sh("echo secret >/var/lib/waagent/own; echo secret >/tmp/own; echo secret >/etc/own; sleep 600 >/dev/null 2>&1 &")
	for _, path := range []string{"/var/lib/waagent/own", "/tmp/own", "/etc/own"} {
		if got := b.sh("test -e " + path + " || echo none"); got != "none" {
			t.Errorf("a node sees the other's %s", path)
		}
	}
	if got := b.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '"); strings.Contains(got, "sleep 600") {
		t.Error("a node sees the other's processes")
	}
}

// TestStartTwice: starting a node that runs changes nothing.
func TestStartTwice(t *testing.T) {
	w := newWorld(t, t.TempDir())
	begin := time.Now()
	if err := operate(t.Context(), w.Provider, "start", node0); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begin)
	t.Logf("a node was up after %s", took)
	if took > time.Minute {
		t.Errorf("a start took %s", took)
	}
	w.agent(node0)
	pid := w.initPID(node0)
	if err := operate(t.Context(), w.Provider, "start", node0); err != nil {
		t.Fatal(err)
	}
	if now := w.initPID(node0); now != pid {
		t.Errorf("the first process was %d and is %d", pid, now)
	}
}

// TestStopRemovesEverything: when Stop returns, processes, mounts and files are gone.
func TestStopRemovesEverything(t *testing.T) {
	w := newWorld(t, t.TempDir())
	a := w.start(node0)
	a.sh("nohup sleep 600 >/dev/null 2>&1 & mkdir -p /var/lib/waagent/locked/in && touch /var/lib/waagent/locked/in/f && chmod 500 /var/lib/waagent/locked/in /var/lib/waagent/locked")
	pid := w.initPID(node0)
	if err := w.Stop(t.Context(), node0); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, w.dir)
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(b) > 0 {
		t.Errorf("the first process is still there: %q", b)
	}
	if err := w.Stop(t.Context(), node0); err != nil {
		t.Errorf("stopping a node that is gone: %v", err)
	}
	if nodes, err := w.List(t.Context()); err != nil || len(nodes) != 0 {
		t.Errorf("listed: %v, %v", nodes, err)
	}
}

// TestAgentIsStartedAgain: an agent that dies comes back, without anybody's help.
func TestAgentIsStartedAgain(t *testing.T) {
	w := newWorld(t, t.TempDir())
	a := w.start(node0)
	boot := a.sh("cat /proc/sys/kernel/random/boot_id")
	if _, err := a.ask(order{Shell: "kill -9 $PPID"}); err == nil {
		t.Fatal("the agent survived")
	}
	again := w.agent(node0)
	if got := again.sh("cat /proc/sys/kernel/random/boot_id"); got != boot {
		t.Error("the agent's end restarted the node")
	}
	again.sh("nohup sleep 600 >/dev/null 2>&1 & echo kept >/var/lib/waagent/mark")
	if _, err := again.ask(order{Exit: 75}); err == nil {
		t.Fatal("the agent did not end")
	}
	rebooted := w.agent(node0)
	if got := rebooted.sh("cat /proc/sys/kernel/random/boot_id"); got == boot {
		t.Error("exit status 75 did not restart the node: the boot id is the same")
	}
	if got := rebooted.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '"); strings.Contains(got, "sleep 600") {
		t.Error("exit status 75 did not restart the node: its processes live")
	}
	if got := rebooted.sh("cat /var/lib/waagent/mark"); got != "kept" {
		t.Errorf("the restart lost files: %q", got)
	}
}

// TestFirstProcessDies: a node whose first process was killed is seen as such and started again with its files.
func TestFirstProcessDies(t *testing.T) {
	w := newWorld(t, t.TempDir())
	a := w.start(node0)
	a.sh("echo kept >/var/lib/waagent/mark")
	pid := w.initPID(node0)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); ; {
		nodes, err := w.List(t.Context())
		if err != nil || len(nodes) != 1 {
			t.Fatalf("listed: %v, %v", nodes, err)
		}
		if !nodes[0].Running {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the node is still said to run")
		}
	}
	if got := w.start(node0).sh("cat /var/lib/waagent/mark"); got != "kept" {
		t.Errorf("the new start lost files: %q", got)
	}
}

// TestRestartAndReimage: a restart keeps files, a reimage does not.
func TestRestartAndReimage(t *testing.T) {
	w := newWorld(t, t.TempDir())
	a := w.start(node0)
	boot := a.sh("cat /proc/sys/kernel/random/boot_id")
	a.sh("echo kept >/var/lib/waagent/mark; echo kept >/var/log/azure/mark; rm /var/lib/waagent/keyfleet/join-token")
	if err := w.Restart(t.Context(), node0); err != nil {
		t.Fatal(err)
	}
	a = w.agent(node0)
	if got := a.sh("cat /var/lib/waagent/mark /var/log/azure/mark | tr '\\n' ' '; ls /var/lib/waagent/keyfleet/join-token 2>/dev/null || echo no token"); got != "kept kept no token" {
		t.Errorf("after a restart the node has %q", got)
	}
	if got := a.sh("cat /proc/sys/kernel/random/boot_id"); got == boot {
		t.Error("after a restart the boot id is the same")
	}
	if err := operate(t.Context(), w.Provider, "reimage", node0); err != nil {
		t.Fatal(err)
	}
	a = w.agent(node0)
	if got := a.sh("ls /var/lib/waagent /var/log/azure | tr '\\n' ' '"); got != "/var/lib/waagent: keyfleet  /var/log/azure:" {
		t.Errorf("after a reimage the node has %q", got)
	}
	if got := a.sh("cat /var/lib/waagent/keyfleet/join-token"); got != "token-"+node0 {
		t.Errorf("after a reimage the join token is %q", got)
	}
}

// TestServerComesBack: a node goes on without its server, and finds the next one at its new socket.
func TestServerComesBack(t *testing.T) {
	w := newWorld(t, t.TempDir())
	// A server process of its own starts the node, and is gone.
	out, err := exec.Command(executable(t), "test-server", w.dir, "start", node0).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	a := w.agent(node0)
	pid := w.initPID(node0)
	nodes, err := w.List(t.Context())
	if err != nil || len(nodes) != 1 || !nodes[0].Running || nodes[0].ID != node0 {
		t.Fatalf("the new server does not find the node: %v, %v", nodes, err)
	}
	a.conn.Close()
	stop := w.listenAgain()
	defer stop()
	w.agent(node0)
	if now := w.initPID(node0); now != pid {
		t.Errorf("the node was started again: its first process was %d and is %d", pid, now)
	}
	if err := w.Stop(t.Context(), node0); err != nil {
		t.Errorf("the new server cannot stop the node: %v", err)
	}
}

// listenAgain makes the server's socket anew, as a restarted server does.
func (w *world) listenAgain() (stop func()) {
	w.t.Helper()
	if err := os.Remove(filepath.Join(local.SocketDir(w.dir), "server.sock")); err != nil {
		w.t.Fatal(err)
	}
	return w.listen()
}

func executable(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return self
}

// TestDeepDirectory: the data directory may be deeper than a socket's address is long.
func TestDeepDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep/", 40), strings.Repeat("d", 120))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, dir)
	w.start(node0)
}

// TestListenUnix: one server a data directory; what a dead one left is no hindrance.
func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	l, err := local.ListenUnix(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := local.ListenUnix(dir); !errors.Is(err, fault.Conflict) {
		t.Errorf("a second server got %v, want a conflict", err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "run", "server.sock")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", fi, err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	stale := filepath.Join(dir, "run", "server.sock")
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("closing left the socket: %v", err)
	}
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err = local.ListenUnix(dir)
	if err != nil {
		t.Fatalf("after a dead server: %v", err)
	}
	l.Close()
}

// TestCheck: this machine can make nodes, or says exactly why not.
func TestCheck(t *testing.T) {
	p, err := newProvider(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	skipIfForbidden(t, p)
	if err := p.Check(t.Context()); err != nil {
		t.Errorf("the tests above need what the check misses: %v", err)
	}
	p, err = local.New(local.Config{Dir: t.TempDir(), Agent: "/nonexistent/keyfleet-agent", Server: "https://node.keyfleet.internal:8443"})
	if err != nil {
		t.Fatal(err)
	}
	if e := fault.From(p.Check(t.Context())); e == nil || e.Code != "AgentMissing" || e.Fix == "" {
		t.Errorf("without an agent the check says %v", e)
	}
}

// TestNames: a node id becomes a folder and a host name, so it must be able to.
func TestNames(t *testing.T) {
	p, err := newProvider(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", ".", "..", "a/b", "../x", "A", strings.Repeat("a", 64), "-a", "a b"} {
		if err := operate(context.Background(), p, "start", id); !errors.Is(err, fault.Invalid) {
			t.Errorf("starting node %q: %v", id, err)
		}
	}
}
