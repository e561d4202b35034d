//go:build linux

package rotation

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// exit is the exit status of a command that ended by itself, -1 if it was killed.
func exit(t *testing.T, err error) int {
	t.Helper()
	var e *exec.ExitError
	switch {
	case err == nil:
		return 0
	case !errors.As(err, &e):
		t.Fatal(err)
	}
	if s, ok := e.Sys().(syscall.WaitStatus); ok && s.Signaled() && s.Signal() != syscall.SIGKILL {
		t.Fatalf("the command was ended by %s", s.Signal())
	}
	return e.ExitCode()
}

// kill runs rotate-certs again and again, killed each time, until it ends by
// itself. point is where the n-th run dies.
func (c *cluster) kill(point func(n int) string, args ...string) (kills, status int) {
	c.t.Helper()
	former := "" // a run that is over already
	if c.finished() {
		former = c.newest()
	}
	for {
		c.env = []string{"KEYFLEET_KILL_AT=" + point(kills)}
		if kills > 2000 {
			c.t.Fatal("it makes no progress")
		}
		if status = exit(c.t, c.rotate(nil, args...)); status >= 0 {
			c.env = nil
			return kills, status
		}
		kills++
		if c.newest() != former && c.finished() { // it was killed when all was done
			c.env = nil
			return kills, 0
		}
	}
}

// somewhere says where runners die: a sample of points; or, deep, every one. A step
// is begun, done on one machine after another, and recorded. Runners die before the
// first effect of the step that is next, then after it, before the second, and so
// on, until one has recorded that the step is done.
func (c *cluster) somewhere() func(n int) string {
	when := []string{"before", "after"}
	if !deep() {
		return func(n int) string { return fmt.Sprintf("%s:%d", when[n%2], 8+n*5%13) }
	}
	recorded, tries := -1, 0
	return func(int) string {
		if now := c.recorded(); now != recorded {
			recorded, tries = now, 0
		}
		tries++
		return fmt.Sprintf("%s:%d", when[(tries-1)%2], 2+(tries-1)/2) // the first effect opens the journal
	}
}

// recorded counts the steps that the newest run has on record as done or taken back.
func (c *cluster) recorded() int {
	c.t.Helper()
	path := c.newest()
	if path == "" {
		return 0
	}
	text, err := os.ReadFile(path)
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.Count(string(text), `"event":"done"`) + strings.Count(string(text), `"event":"undone"`)
}

// materials counts how often new CAs were made, in all runs.
func (c *cluster) materials() int {
	c.t.Helper()
	paths, err := filepath.Glob(filepath.Join(c.dir, "*", "journal"))
	if err != nil {
		c.t.Fatal(err)
	}
	n := 0
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			c.t.Fatal(err)
		}
		n += strings.Count(string(text), `"event":"set","name":"material"`)
	}
	return n
}

// TestOneMaster walks through what goes wrong on a cluster of one master, which
// is quicker: rolled back from before the point of no return, then rotated by
// runners that are killed all the time.
func TestOneMaster(t *testing.T) {
	c := up(t, 1, 1, "killpoints")
	before := map[string]map[string]string{}
	for _, n := range c.Nodes {
		before[n.Name] = c.keys(n.Name)
	}
	old := c.admin()

	t.Run("stops where it was told to", func(t *testing.T) {
		if status := exit(t, c.rotate(nil, "--until", "soak")); status != 11 {
			t.Fatalf("exit status %d, want 11", status)
		}
	})
	t.Run("a second rotation is refused while one is unfinished", func(t *testing.T) {
		other := *c
		other.t, other.dir = t, t.TempDir()
		if status := exit(t, other.rotate(nil, "--only", "leaves")); status != 1 {
			t.Errorf("exit status %d, want 1", status)
		}
	})
	t.Run("is rolled back by runners that are killed", func(t *testing.T) {
		kills, status := c.kill(c.somewhere(), "rollback", "--restart-pods")
		if status != 0 {
			t.Fatalf("exit status %d", status)
		}
		t.Logf("killed %d times", kills)
		for _, n := range c.Nodes {
			if now := c.keys(n.Name); !maps.Equal(now, before[n.Name]) {
				t.Errorf("%s is not as it was:\n%v\n%v", n.Name, before[n.Name], now)
			}
		}
	})
	kills, made := 0, c.materials() // of the run that was rolled back
	t.Run("is rotated by runners that are killed", func(t *testing.T) {
		n, status := c.kill(c.somewhere(), "--restart-pods")
		if kills = n; status != 0 || kills == 0 {
			t.Fatalf("exit status %d after %d kills", status, kills)
		}
		if n := c.materials() - made; n != 1 {
			t.Errorf("new CAs were made %d times", n)
		}
		c.adminChanged(old)
	})
	t.Run("leaves no secret behind", c.leavesNoSecret)
	if t.Failed() {
		return
	}
	fmt.Printf("the runner was killed at %d points of a rotation, and it ended with the same keys\n", kills)
}

// leavesNoSecret looks for private keys and tokens where none may be.
func (c *cluster) leavesNoSecret(t *testing.T) {
	c = c.in(t)
	for _, n := range c.Nodes {
		if out := c.sh(n.Name, `grep -l -E 'PRIVATE KEY|eyJhbGciOi' -r /var/log/azure /var/lib/keyfleet 2>/dev/null || true`); strings.TrimSpace(out) != "" {
			t.Errorf("secrets on %s in %s", n.Name, out)
		}
		for _, line := range strings.Split(strings.TrimSpace(c.sh(n.Name, `cd /var/lib/keyfleet/rotate-certs && find . -type f`)), "\n") {
			if strings.HasSuffix(line, ".key") || strings.HasSuffix(line, ".pem") || strings.HasSuffix(line, ".age") {
				t.Errorf("%s is left on %s", line, n.Name)
			}
		}
	}
	paths, err := filepath.Glob(filepath.Join(c.dir, "*", "journal"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no journals: %v", err)
	}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{"PRIVATE KEY", "UFJJVkFURSBLRVk", "eyJhbGciOi"} {
			if strings.Contains(string(text), secret) {
				t.Errorf("%s holds %q", p, secret)
			}
		}
		j, err := journal.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		// A runner that died before its plan was on record has begun nothing.
		if _, _, began, err := rotation.Kept(j); err != nil || began && !j.State().Finished {
			t.Errorf("%s is not finished: %v", p, err)
		}
		_ = j.Close()
	}
}
