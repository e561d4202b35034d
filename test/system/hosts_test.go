//go:build linux

package system

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

// machine is a Linux machine as the agent sees one: a network of its own, where
// only the server's port is reachable, and folders of its own under /var.
type machine struct {
	t    *testing.T
	dir  string
	work chan func()   // what is run on the thread that is in the machine's network
	over chan struct{} // closed when that thread is gone
	net  string        // the network's name in /proc
}

// newMachine makes a machine whose 127.0.0.1:PORT leads to the server at address.
func newMachine(t *testing.T, address string) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("LEFT OUT: a machine that joins has a network of its own with a way to the server, and only root can make one from outside")
	}
	m := &machine{t: t, dir: t.TempDir(), work: make(chan func()), over: make(chan struct{})}
	for _, d := range []string{"lib/waagent", "log"} {
		if err := os.MkdirAll(filepath.Join(m.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(m.dir, "hosts"), []byte("127.0.0.1 localhost\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ready := make(chan error)
	var l net.Listener
	go func() { // ends with finish; the thread, which is in another network, ends with it
		defer close(m.over)
		runtime.LockOSThread()
		var err error
		l, err = m.enter(address)
		ready <- err
		for f := range m.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("making the machine's network: %v", err)
	}
	var forwards sync.WaitGroup
	forwards.Add(1)
	go func() { // ends with l
		defer forwards.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go forward(c, address) // ends with the connection
		}
	}()
	t.Cleanup(func() {
		m.killAll()
		l.Close()
		forwards.Wait()
		close(m.work)
		<-m.over
	})
	return m
}

// enter moves the thread into a new network and listens there.
func (m *machine) enter(address string) (net.Listener, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	up, err := unix.NewIfreq("lo")
	if err != nil {
		return nil, err
	}
	up.SetUint16(unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOOPBACK)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, up); err != nil {
		return nil, fmt.Errorf("raising the loopback device: %w", err)
	}
	if m.net, err = os.Readlink("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	return net.Listen("tcp4", address)
}

func forward(c net.Conn, address string) {
	defer c.Close()
	s, err := net.Dial("tcp4", address)
	if err != nil {
		return // the server is away
	}
	defer s.Close()
	done := make(chan struct{})
	go func() { // ends with either connection
		defer close(done)
		_, _ = io.Copy(s, c)
		_ = s.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(c, s)
	c.Close()
	<-done
}

// start starts a program on the machine.
func (m *machine) start(env []string, args ...string) *exec.Cmd {
	m.t.Helper()
	const inside = `mount --make-rprivate / && mount --bind "$0/lib" /var/lib && mount --bind "$0/log" /var/log && mount --bind "$0/hosts" /etc/hosts && exec "$@"`
	cmd := exec.Command("sh", append([]string{"-c", inside, m.dir}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	log, err := os.OpenFile(filepath.Join(m.dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		m.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	started := make(chan error)
	m.work <- func() { started <- cmd.Start() } // on the thread, whose network the child gets
	if err := <-started; err != nil {
		m.t.Fatalf("starting %s: %v", args[0], err)
	}
	return cmd
}

// kill ends one process as a crash does.
func (m *machine) kill(cmd *exec.Cmd) {
	m.t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		m.t.Fatalf("the process had ended by itself: %v\n%s", err, m.log())
	}
	_ = cmd.Wait()
}

// killAll ends every process of the machine's network; nobody else is in it.
func (m *machine) killAll() {
	entries, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, e := range entries {
		var pid int
		if where, err := os.Readlink(e); err == nil && where == m.net {
			if _, err := fmt.Sscanf(e, "/proc/%d/", &pid); err == nil && pid != os.Getpid() {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

func (m *machine) log() string {
	b, _ := os.ReadFile(filepath.Join(m.dir, "agent.log"))
	return string(b[max(0, len(b)-8<<10):])
}

// host waits until the only host is in the state.
func (f *fleet) host(state string) {
	f.T.Helper()
	stack.Eventually(f.T, time.Minute, "the host is "+state, func(ctx context.Context) error {
		hosts, err := client.List[struct{ Hostname, State, Node string }](ctx, f.Client, client.Request{Method: http.MethodGet, URL: f.Client.ARM("/keyfleet/v1/hosts")})
		if err == nil && (len(hosts) != 1 || hosts[0].State != state) {
			err = fmt.Errorf("hosts: %+v", hosts)
		}
		return err
	})
}

// TestHostJoinsServesAndIsReleased: a machine joins with a one-use token, a
// resize picks it, certificate and renewal arrive, and a resize to 0 gives it
// back clean, while agent and server are killed in between.
func TestHostJoinsServesAndIsReleased(t *testing.T) {
	t.Parallel()
	f := startFleet(t, stack.Config{})
	f.certificate("vault1", "web", nil)
	m := newMachine(t, f.Listen)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent:\n%s", m.log())
		}
	})
	f.put(f.poolPath("hosts"), "2021-01-01", f.poolBody(0, f.extension(f.Client.Vault("vault1", "/secrets/web"))), nil)
	var tok struct{ Token, Server, CAHash string }
	f.call(http.MethodPost, f.Client.ARM("/keyfleet/v1/jointokens"), "", object{"pool": f.poolPath("hosts"), "expiresIn": "1h"}, &tok)

	agent := filepath.Join(f.Bin, "keyfleet-agent")
	config := filepath.Join(m.dir, "agent.json")
	again := func() *exec.Cmd { return m.start(nil, agent, "run", "--config", config) }
	a := m.start([]string{"KEYFLEET_TOKEN=" + tok.Token}, agent, "join", "--server", tok.Server, "--address", "127.0.0.1",
		"--ca-hash", tok.CAHash, "--pool", "hosts", "--config", config)
	f.host("free")
	stack.Eventually(t, 2*time.Minute, "the configuration is kept, without the token", func(context.Context) error {
		text, err := os.ReadFile(config)
		if strings.Contains(string(text), tok.Token) {
			t.Fatal("the configuration holds the token")
		}
		return err
	})
	f.usedToken(t, func(m *machine) *exec.Cmd {
		return m.start([]string{"KEYFLEET_TOKEN=" + tok.Token}, agent, "join", "--server", tok.Server, "--address", "127.0.0.1",
			"--ca-hash", tok.CAHash, "--config", filepath.Join(m.dir, "agent.json"))
	})

	f.resize("hosts", 1)
	id := f.idle(accountName, "westus2", "hosts", 1)[0]
	f.host("in use")
	link := filepath.Join(m.dir, "lib/waagent/Microsoft.Azure.KeyVault/vault1.web")
	first := m.target(link)
	if first == "" {
		t.Fatal("the node is idle and the certificate is not there")
	}

	m.kill(a)
	f.Kill()
	if err := f.Run(); err != nil {
		t.Fatal(err)
	}
	a = again()
	f.do(client.Request{Method: http.MethodPost, URL: f.Client.ARM("/keyfleet/v1/vaults/vault1/certificates/web/renew")})
	stack.Eventually(t, time.Minute, "the renewed certificate arrives", func(context.Context) error {
		if now := m.target(link); now == first || now == "" {
			return fmt.Errorf("the link leads to %q", now)
		}
		return nil
	})
	if got := f.idle(accountName, "westus2", "hosts", 1)[0]; got != id {
		t.Errorf("the node is %s now, and was %s", got, id)
	}

	f.resize("hosts", 0)
	m.kill(a) // somewhere in the release
	a = again()
	f.Kill()
	if err := f.Run(); err != nil {
		t.Fatal(err)
	}
	f.host("free")
	m.clean()

	f.resize("hosts", 1) // it can be used again
	f.idle(accountName, "westus2", "hosts", 1)
	f.host("in use")
	if m.target(link) == "" {
		t.Error("the certificate did not come back")
	}
	m.kill(a)
}

// usedToken: a second machine cannot join with a token that was used.
func (f *fleet) usedToken(t *testing.T, join func(*machine) *exec.Cmd) {
	t.Helper()
	m := newMachine(t, f.Listen)
	ended := make(chan error, 1)
	cmd := join(m)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(m.log(), "token") {
			t.Errorf("joining with a used token: %v\n%s", err, m.log())
		}
	case <-time.After(time.Minute):
		t.Errorf("joining with a used token goes on\n%s", m.log())
		_ = cmd.Process.Kill()
	}
	if _, err := os.Stat(filepath.Join(m.dir, "agent.json")); !os.IsNotExist(err) {
		t.Errorf("a machine that may not join has a configuration: %v", err)
	}
	f.host("free") // still the only one
}

func (m *machine) target(link string) string {
	to, _ := os.Readlink(link)
	return to
}

// clean fails if the machine holds anything of what the pool gave it: keys,
// packages, processes. The agent's own folder and the transport key that it
// enrolled with (.prv) are the machine's.
func (m *machine) clean() {
	m.t.Helper()
	own := filepath.Join(m.dir, "lib/waagent/keyfleet")
	err := filepath.WalkDir(filepath.Join(m.dir, "lib"), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == own {
			return fs.SkipDir
		}
		if strings.Contains(d.Name(), "KeyVault") {
			m.t.Errorf("left on the released host: %s", path)
		}
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), "PRIVATE KEY") && filepath.Ext(path) != ".prv" {
			m.t.Errorf("a private key is left on the released host: %s", path)
		}
		return nil
	})
	if err != nil {
		m.t.Error(err)
	}
	entries, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, e := range entries {
		if where, err := os.Readlink(e); err != nil || where != m.net {
			continue
		}
		line, _ := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(e)), "cmdline"))
		if strings.Contains(string(line), "keyvault") {
			m.t.Errorf("a process of the extension is left: %s", strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
}
