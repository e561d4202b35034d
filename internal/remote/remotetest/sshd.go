// Package remotetest is a real sshd for tests, and a line to it that can be cut.
//
// Idea: what is to be tested is how a program gets on with OpenSSH, so OpenSSH it
// is: each server is an sshd of its own on a loopback port, with its own host key
// and its own list of keys that may log in, and ends with the test.
//
// Invariant: nothing of the machine is changed, but for the empty folder /run/sshd.
// Users other than root exist only in the mount namespace of the sshd that has them;
// so does OpenSSH itself where it is not installed but unpacked into a folder.
//
// Consequence: whoever logs in as root acts on the machine that runs the tests.
package remotetest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// Key is a key pair for logging in or for a host.
type Key struct {
	PEM    []byte // of the private key, as ssh-keygen writes it
	Public ssh.PublicKey

	private crypto.PrivateKey
}

// NewKey makes a key: "ed25519", "rsa" or "ecdsa".
func NewKey(t testing.TB, kind string) Key {
	t.Helper()
	var private crypto.Signer
	var err error
	switch kind {
	case "ed25519":
		_, private, err = ed25519.GenerateKey(rand.Reader)
	case "rsa":
		private, err = rsa.GenerateKey(rand.Reader, 2048)
	case "ecdsa":
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	default:
		t.Fatalf("a key of type %q is not made here", kind)
	}
	must(t, err)
	block, err := ssh.MarshalPrivateKey(private, "")
	must(t, err)
	public, err := ssh.NewPublicKey(private.Public())
	must(t, err)
	return Key{PEM: pem.EncodeToMemory(block), Public: public, private: private}
}

// Encrypted is the PEM of the key under a passphrase.
func (k Key) Encrypted(t testing.TB, passphrase string) []byte {
	t.Helper()
	block, err := ssh.MarshalPrivateKeyWithPassphrase(k.private, "", []byte(passphrase))
	must(t, err)
	return pem.EncodeToMemory(block)
}

// User is a user that only one server knows.
type User struct {
	Name  string
	Sudo  string // right hand side of a line of sudoers: "ALL=(ALL) NOPASSWD:ALL"; empty: none
	Shell string // empty: /bin/sh
}

// Options of a server. The zero value is an sshd on 127.0.0.1 that nobody can log
// in to.
type Options struct {
	IP         string          // empty: 127.0.0.1
	Authorized []ssh.PublicKey // who may log in, as any user
	HostKey    string          // type of the host key; empty: ed25519
	Users      []User          // besides root
	Config     []string        // further lines of sshd_config
}

// Server is a running sshd.
type Server struct {
	Address string // 127.0.0.1:12345
	HostKey ssh.PublicKey

	t    testing.TB
	dir  string
	argv []string
	cmd  *exec.Cmd
	log  lockedBuffer
}

// lockedBuffer is what sshd says.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

const sshd = "/usr/sbin/sshd"

// unpacked is the folder with what the machine lacks of OpenSSH's server and sudo, laid
// out by build/unpack-sshd; empty: there is none.
func unpacked() string { return os.Getenv("KEYFLEET_TEST_SSHD") }

// Has reports whether whoever logs in finds a program there: "/usr/bin/sudo".
func Has(program string) bool {
	_, installed := os.Stat(program)
	_, beside := os.Stat(filepath.Join(unpacked(), program))
	return installed == nil || beside == nil
}

// Need skips the test where no sshd can run.
func Need(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can run an sshd that lets root in")
	}
	if !Has(sshd) {
		t.Skipf("there is no %s here, nor in a folder that KEYFLEET_TEST_SSHD names (Debian: apt-get install openssh-server, or build/unpack-sshd FOLDER)", sshd)
	}
}

// Start starts an sshd that ends with the test.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	Need(t)
	if o.IP == "" {
		o.IP = "127.0.0.1"
	}
	if o.HostKey == "" {
		o.HostKey = "ed25519"
	}
	key := NewKey(t, o.HostKey)
	// Not t.TempDir, where only root can go: sshd reads the list of keys as the user who logs in.
	dir, err := os.MkdirTemp("", "sshd-")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	s := &Server{HostKey: key.Public, t: t, dir: dir}
	s.write("host_key", 0o600, string(key.PEM))
	var authorized strings.Builder
	for _, k := range o.Authorized {
		authorized.Write(ssh.MarshalAuthorizedKey(k))
	}
	s.write("authorized_keys", 0o644, authorized.String())
	must(t, os.MkdirAll("/run/sshd", 0o755)) // where sshd puts its unprivileged half
	for range 5 {
		s.Address = freePort(t, o.IP)
		s.configure(o)
		if s.run() {
			t.Cleanup(s.end)
			return s
		}
	}
	t.Fatalf("sshd does not start:\n%s", s.log.String())
	return nil
}

func (s *Server) configure(o Options) {
	_, port, err := net.SplitHostPort(s.Address)
	must(s.t, err)
	lines := append([]string{
		"ListenAddress " + o.IP, "Port " + port,
		"HostKey " + filepath.Join(s.dir, "host_key"),
		"AuthorizedKeysFile " + filepath.Join(s.dir, "authorized_keys"),
		"StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
		"UsePAM no", "UseDNS no", "PidFile none", "MaxStartups 100", "LogLevel VERBOSE",
	}, o.Config...)
	s.write("sshd_config", 0o644, strings.Join(lines, "\n")+"\n")
	s.argv = []string{sshd, "-D", "-e", "-f", filepath.Join(s.dir, "sshd_config")}
	if len(o.Users) > 0 || unpacked() != "" {
		s.argv = append([]string{"unshare", "--mount", "/bin/sh", s.inside(o.Users)}, s.argv...)
	}
}

// inside writes a script that begins a program in a mount namespace where there are
// these users, and what was unpacked. sshd also wants a user of its own, which a
// machine has only where it is installed.
func (s *Server) inside(users []User) string {
	passwd, shadow := s.read("/etc/passwd"), s.read("/etc/shadow")
	if !strings.Contains("\n"+passwd, "\nsshd:") {
		passwd += "sshd:x:54320:65534::/run/sshd:/usr/sbin/nologin\n"
	}
	sudoers := "Defaults use_pty, timestampdir=" + s.dir + "/sudo\nroot ALL=(ALL:ALL) ALL\n"
	for i, u := range users {
		if u.Shell == "" {
			u.Shell = "/bin/sh"
		}
		passwd += fmt.Sprintf("%s:x:%d:65534::/:%s\n", u.Name, 54321+i, u.Shell)
		shadow += u.Name + ":*:20000:0:99999:7:::\n"
		if u.Sudo != "" {
			sudoers += u.Name + " " + u.Sudo + "\n"
		}
	}
	must(s.t, os.MkdirAll(filepath.Join(s.dir, "etc"), 0o755))
	s.write("etc/passwd", 0o644, passwd)
	s.write("etc/shadow", 0o600, shadow)
	s.write("etc/sudoers", 0o440, sudoers)
	script, etc := "set -e\n", s.dir+"/etc"
	if dir := unpacked(); dir != "" {
		script += fmt.Sprintf("mount -t overlay -o 'lowerdir=%s/usr:/usr' none /usr\n", dir)
		etc += ":" + dir + "/etc"
	}
	script += fmt.Sprintf("mount -t overlay -o 'lowerdir=%s:/etc' none /etc\n", etc)
	return s.write("inside", 0o700, script+"exec \"$@\"\n")
}

func (s *Server) read(path string) string {
	data, err := os.ReadFile(path)
	must(s.t, err)
	return string(data)
}

func (s *Server) write(name string, mode os.FileMode, text string) string {
	path := filepath.Join(s.dir, name)
	_ = os.Remove(path)
	must(s.t, os.WriteFile(path, []byte(text), mode))
	must(s.t, os.Chmod(path, mode))
	return path
}

// run starts the process and reports whether it listens. That something answers there
// would not do: on a busy machine another process may have taken the port.
func (s *Server) run() bool {
	s.cmd = exec.Command(s.argv[0], s.argv[1:]...)
	s.cmd.Stderr = &s.log
	said := len(s.log.String())
	must(s.t, s.cmd.Start())
	exited := make(chan struct{})
	cmd := s.cmd
	go func() { _ = cmd.Wait(); close(exited) }()
	for range 2400 {
		if strings.Contains(s.log.String()[said:], "Server listening on ") {
			return true
		}
		select {
		case <-exited:
			return false
		case <-time.After(25 * time.Millisecond):
		}
	}
	_ = cmd.Process.Kill()
	return false
}

// Stop ends the sshd; connections that are open go on. Restart brings it back.
func (s *Server) Stop() { _ = s.cmd.Process.Kill() }

// Restart starts an sshd that was stopped again, at the same address.
func (s *Server) Restart() {
	s.t.Helper()
	if !s.run() {
		s.t.Fatalf("sshd does not come back:\n%s", s.log.String())
	}
}

func (s *Server) end() {
	s.Stop()
	if s.t.Failed() {
		s.t.Logf("sshd %s said:\n%s", s.Address, s.log.String())
	}
}

// KnownHosts writes a known_hosts file with the keys of servers under their addresses.
func KnownHosts(t testing.TB, servers ...*Server) string {
	t.Helper()
	var text strings.Builder
	for _, s := range servers {
		text.WriteString(s.KnownHostsLine(s.Address))
	}
	path := filepath.Join(t.TempDir(), "known_hosts")
	must(t, os.WriteFile(path, []byte(text.String()), 0o600))
	return path
}

// KnownHostsLine is the line by which the server is known at an address, host:port.
func (s *Server) KnownHostsLine(address string) string {
	host, port, err := net.SplitHostPort(address)
	must(s.t, err)
	if port != "22" {
		host = "[" + host + "]:" + port
	}
	return host + " " + string(ssh.MarshalAuthorizedKey(s.HostKey))
}

func freePort(t testing.TB, ip string) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
