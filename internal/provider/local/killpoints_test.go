//go:build killpoints

package local_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"keyfleet.dev/keyfleet/internal/provider/local/namespace"
)

// initEnv tells the first processes of nodes where to die.
func initEnv() []string {
	if v := os.Getenv("KEYFLEET_TEST_INIT"); v != "" {
		return strings.Split(v, "\n")
	}
	return nil
}

// operations are the operations of the provider and what must be true after each.
var operations = []struct {
	name    string
	there   bool // the node runs before
	running bool // and after
	keeps   bool // its files stay
}{
	{name: "start", running: true, keeps: true},
	{name: "restart", there: true, running: true, keeps: true},
	{name: "reimage", there: true, running: true},
	{name: "stop", there: true},
}

// TestKilledAtEveryEffect kills the server process before and after every
// outside effect of every operation; the operation done again by the next
// server must end as if nothing had happened.
func TestKilledAtEveryEffect(t *testing.T) {
	points := 0
	for _, op := range operations {
		effects := effectsOf(t, op.name, op.there)
		for i, name := range effects {
			for _, when := range []string{"before", "after"} {
				points++
				t.Run(fmt.Sprintf("%s/%02d %s %s", op.name, i+1, when, name), func(t *testing.T) {
					t.Parallel()
					w := newWorld(t, t.TempDir())
					if op.there {
						w.start(node0).sh("echo kept >/var/lib/waagent/mark")
					}
					err := serverProcess(w.dir, op.name, fmt.Sprintf("KEYFLEET_KILL_AT=%s:%d", when, i+1))
					if !killed(err) {
						t.Fatalf("the server was not killed: %v", err)
					}
					again(t, w, op.name, op.running)
					if op.there && op.running {
						_, err := os.Stat(filepath.Join(w.Files(node0), "mark"))
						if kept := err == nil; kept != op.keeps {
							t.Errorf("files kept: %t, want %t", kept, op.keeps)
						}
					}
				})
			}
		}
	}
	t.Logf("server killed at %d points", points)
}

// TestFirstProcessKilledAtEveryEffect does the same to the node's first process while it starts.
func TestFirstProcessKilledAtEveryEffect(t *testing.T) {
	log := filepath.Join(t.TempDir(), "effects")
	w := newWorld(t, t.TempDir())
	if err := serverProcess(w.dir, "start", "KEYFLEET_TEST_INIT=KEYFLEET_EFFECT_LOG="+log); err != nil {
		t.Fatal(err)
	}
	w.agent(node0)
	// The first process leaves this machine's files behind with its first
	// mount; the one effect after that is the agent's start.
	effects := append(readEffects(t, log), "start agent")
	for i, name := range effects {
		for _, when := range []string{"before", "after"} {
			t.Run(fmt.Sprintf("%02d %s %s", i+1, when, name), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, t.TempDir())
				// The start fails, or the node dies just after it: both are fine.
				_ = serverProcess(w.dir, "start", fmt.Sprintf("KEYFLEET_TEST_INIT=KEYFLEET_KILL_AT=%s:%s", when, name))
				waitDead(t, w)
				again(t, w, "start", true)
			})
		}
	}
	t.Logf("first process killed at %d points", 2*len(effects))
}

// waitDead waits until the node's first process is gone.
func waitDead(t *testing.T, w *world) {
	t.Helper()
	lock, err := namespace.Kill(t.Context(), namespace.Folder(filepath.Join(w.dir, "nodes", node0)), false)
	if err != nil {
		t.Fatal(err)
	}
	lock.Release()
}

// again repeats the operation in a new server and checks the end state.
func again(t *testing.T, w *world, operation string, running bool) {
	t.Helper()
	next, err := newProvider(w.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := operate(t.Context(), next, operation, node0); err != nil {
		t.Fatalf("the next server: %v", err)
	}
	nodes, err := next.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !running {
		if len(nodes) != 0 {
			t.Errorf("the node is still there: %v", nodes)
		}
		nothingLeft(t, w.dir)
		return
	}
	if len(nodes) != 1 || nodes[0].ID != node0 || !nodes[0].Running {
		t.Fatalf("the node does not run: %v", nodes)
	}
	for { // a connection of an agent that has died meanwhile does not count
		a := w.agent(node0)
		if r, err := a.ask(order{Shell: "cat /var/lib/waagent/keyfleet/join-token"}); err == nil {
			if r.Out != "token-"+node0 {
				t.Errorf("the join token in the node is %q", r.Out)
			}
			return
		}
	}
}

// effectsOf lists the effects of an operation.
func effectsOf(t *testing.T, operation string, there bool) []string {
	t.Helper()
	log := filepath.Join(t.TempDir(), "effects")
	w := newWorld(t, t.TempDir())
	if there {
		w.start(node0)
	}
	if err := serverProcess(w.dir, operation, "KEYFLEET_EFFECT_LOG="+log); err != nil {
		t.Fatal(err)
	}
	return readEffects(t, log)
}

func readEffects(t *testing.T, log string) []string {
	t.Helper()
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		_, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		out = append(out, name)
	}
	return out
}

func serverProcess(dir, operation, env string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "test-server", dir, operation, node0)
	cmd.Env = append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

func killed(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	ws, ok := exit.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled() && ws.Signal() == syscall.SIGKILL
}
