// Package stack runs a real Keyfleet server, as its own process, for tests and
// benchmarks of the whole system.
//
// Idea: a test of the whole system uses what a person uses: the programs that
// make build makes, a data directory, a port, the REST surface. The server can
// be killed with SIGKILL and started again on the same directory and port.
//
// Invariant: what a Stack starts ends with it, local nodes included; it ends
// only processes that it started.
package stack

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/client"
)

// Config says how to run the server. The zero value is a --dev server with all defaults.
type Config struct {
	Bin   string   // directory with the programs; empty: built by [Build] without tags
	Dir   string   // data directory; empty: a fresh one
	Args  []string // further arguments of the server
	Env   []string // further environment of the server, KEY=VALUE
	Quiet bool     // do not print the server's log when the test fails
	Child bool     // the server runs a manager of clusters; else a test that needs one runs it
	Dies  bool     // the server may die before it is ready; it is started once more, without being told to die
}

// Stack is a running server. Make it with [Start].
type Stack struct {
	T      testing.TB
	Dir    string
	Listen string
	Bin    string
	Client *client.Client

	cfg Config
	cmd *exec.Cmd
	log *logBuffer
	end chan struct{} // closed when the process has ended
}

var builds struct {
	sync.Mutex
	dirs map[string]string
}

// Build makes the programs and the extension package with the build tags and
// returns their directory. Each set of tags is built once per test process.
func Build(t testing.TB, tags string) string {
	t.Helper()
	builds.Lock()
	defer builds.Unlock()
	if dir, ok := builds.dirs[tags]; ok {
		return dir
	}
	root := Root(t)
	dir, err := os.MkdirTemp("", "keyfleet-bin-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // ordinary users run the programs too
		t.Fatal(err)
	}
	run := func(args ...string) {
		cmd := exec.Command("go", args...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	run("build", "-buildvcs=false", "-tags", tags, "-o", dir+"/", "./cmd/...")
	if err := os.MkdirAll(filepath.Join(dir, "packages"), 0o755); err != nil {
		t.Fatal(err)
	}
	run("run", "./build/package-extension", "-binary", filepath.Join(dir, "keyfleet-keyvault-extension"), "-version", "3.0.0",
		"-out", filepath.Join(dir, "packages", "Microsoft.Azure.KeyVault.KeyVaultForLinux-3.0.0.zip"))
	if builds.dirs == nil {
		builds.dirs = map[string]string{}
	}
	builds.dirs[tags] = dir
	return dir
}

// Clean removes what [Build] made; call it at the end of TestMain.
func Clean() {
	builds.Lock()
	defer builds.Unlock()
	for _, dir := range builds.dirs {
		os.RemoveAll(dir)
	}
	builds.dirs = nil
}

// Root is the directory of the project.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if b, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil && bytes.HasPrefix(b, []byte("module keyfleet.dev/keyfleet\n")) {
			return dir
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("the project's go.mod is not above the working directory")
		}
		dir = up
	}
}

// Start starts a server and waits until it is ready. It ends with the test.
func Start(t testing.TB, cfg Config) *Stack {
	t.Helper()
	s := &Stack{T: t, Dir: cfg.Dir, Bin: cfg.Bin, Listen: freeAddress(t), cfg: cfg, log: &logBuffer{}}
	if s.Bin == "" {
		s.Bin = Build(t, "")
	}
	if s.Dir == "" {
		dir, err := os.MkdirTemp("", "kf-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		s.Dir = dir
	}
	t.Cleanup(func() {
		if t.Failed() && !cfg.Quiet {
			s.printConsoles()
		}
		s.Stop()
		if t.Failed() && !cfg.Quiet {
			t.Logf("server log:\n%s", s.log.tail(16<<10))
		}
	})
	err := s.Run(cfg.Env...)
	if err != nil && cfg.Dies {
		err = s.Run("KEYFLEET_KILL_AT=")
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, s.log.tail(8<<10))
	}
	cc, err := client.FromAdmin(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if s.Client, err = client.New(cc); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Client.Close)
	return s
}

// printConsoles logs what the nodes' first processes and agents have said.
func (s *Stack) printConsoles() {
	files, _ := filepath.Glob(filepath.Join(s.Dir, "nodes", "*", "console.log"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			s.T.Logf("%s:\n%s", f, b[max(0, len(b)-8<<10):])
		}
	}
}

// Run starts the process (again) and waits for its ready line. It returns an
// error if the process ends before.
func (s *Stack) Run(env ...string) error {
	args := append([]string{"--data-dir", s.Dir, "--listen", s.Listen, "--dev", fmt.Sprintf("--manager=%t", s.cfg.Child)}, s.cfg.Args...)
	cmd := exec.Command(filepath.Join(s.Bin, "keyfleet-server"), args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = s.log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	s.cmd, s.end = cmd, make(chan struct{})
	ready := make(chan struct{})
	go func(end chan struct{}) { // ends with the process
		sc := bufio.NewScanner(out)
		told := false
		for sc.Scan() {
			fmt.Fprintln(s.log, sc.Text())
			if !told && strings.Contains(sc.Text(), "ready") {
				told = true
				close(ready)
			}
		}
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
		close(end)
	}(s.end)
	select {
	case <-ready:
		return nil
	case <-s.end:
		return fmt.Errorf("the server ended before it was ready: %v", cmd.ProcessState)
	case <-time.After(60 * time.Second):
		s.Kill()
		return fmt.Errorf("the server was not ready within 60 s")
	}
}

// PID is the server's process id.
func (s *Stack) PID() int { return s.cmd.Process.Pid }

// Kill ends the server with SIGKILL and waits. Local nodes go on.
func (s *Stack) Kill() {
	_ = s.cmd.Process.Kill()
	<-s.end
}

// Ended is closed when the server process has ended.
func (s *Stack) Ended() <-chan struct{} { return s.end }

// Stop ends the server with SIGTERM, which on a --dev server ends its local
// nodes too, and waits; after 30 s it kills.
func (s *Stack) Stop() {
	if s.cmd == nil {
		return
	}
	select {
	case <-s.end: // a dead server leaves its nodes; a short life cleans up
		if err := s.Run("KEYFLEET_KILL_AT="); err != nil {
			return
		}
	default:
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.end:
	case <-time.After(30 * time.Second):
		s.Kill()
	}
	s.cmd = nil
}

// Log returns what the server has printed so far.
func (s *Stack) Log() string { return s.log.tail(1 << 30) }

// Eventually polls look until it returns nil, and fails the test with its last
// error after the time.
func Eventually(t testing.TB, within time.Duration, what string, look func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	var err error
	for {
		if err = look(ctx); err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %v", what, within, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// freeAddress finds a port that stays free while a killed server is away: one
// below those that the kernel gives to outgoing connections and to port 0.
func freeAddress(t testing.TB) string {
	t.Helper()
	const from, below = 20_000, 32_768 // ip(7): ip_local_port_range begins at 32768
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", from+rand.IntN(below-from)))
		if err != nil {
			continue
		}
		defer l.Close()
		return l.Addr().String()
	}
	t.Fatal("no free port found in 100 tries")
	return ""
}

// logBuffer keeps what the server prints.
type logBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	return len(p), nil
}

func (l *logBuffer) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b[max(0, len(l.b)-n):])
}
