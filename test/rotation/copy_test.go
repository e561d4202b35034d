//go:build linux

package rotation

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// published is the copy of a run's journal on a master.
func (c *cluster) published(run string) string {
	c.t.Helper()
	return c.sh("master-0", "cat /var/lib/keyfleet/rotate-certs/"+run+"/journal")
}

// brings puts a copy of a run's journal where this machine looks for it, as the
// error of "resume" says.
func (c *cluster) brings(run, text string) {
	c.t.Helper()
	path := filepath.Join(c.dir, run, "journal")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// loses deletes all that this machine knows of rotations, as a lost laptop does.
func (c *cluster) loses() {
	c.t.Helper()
	if err := os.RemoveAll(c.dir); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		c.t.Fatal(err)
	}
}

// isLockedOut checks that this machine, which has a copy of the journal, is refused
// while the lock of another is fresh, and told how to go on.
func (c *cluster) isLockedOut(t *testing.T, args ...string) {
	t.Helper()
	status, out := c.in(t).call(append([]string{"resume"}, args...)...)
	if status != 1 || !strings.Contains(out, "Error Locked: ") || !strings.Contains(out, "--take-over") {
		t.Errorf("exit status %d, want 1 with the error Locked and a way on:\n%s", status, out)
	}
}

// endsAs checks that a rotation has ended in the very CAs that it had made before
// it was interrupted: those that masters trusted beside the old ones.
func (c *cluster) endsAs(t *testing.T, before, between map[string]string) {
	t.Helper()
	for _, n := range c.Nodes {
		if n.Role != "master" {
			continue
		}
		for file, root := range c.authorities(t, n.Name) {
			if strings.Contains(root, " ") || !strings.Contains(between[file], root) || strings.Contains(before[file], root) {
				t.Errorf("%s of %s: CA %s at the end, %s in between, %s before", file, n.Name, root, between[file], before[file])
			}
		}
	}
	told := c.roots(t)
	for where, root := range told {
		if strings.Contains(root, " ") {
			t.Errorf("%s still names several CAs", where)
		}
	}
}

// kubeletStep is the step in the middle of the phase switch that restarts the kubelet of the worker.
func kubeletStep(t *testing.T, p rotation.Plan) rotation.Step {
	t.Helper()
	return first(t, p, func(s rotation.Step) bool {
		return s.Phase == rotation.Switch && s.Verb == rotation.Restart && s.Node == "worker-0"
	})
}

// TestCopyFromLongAgo: the copy that another machine goes on with is from the end of
// the phase prepare, and the lost one had got to the middle of the phase switch.
func TestCopyFromLongAgo(t *testing.T) {
	if !deep() {
		t.Skip("a copy that is a little behind is in TestWhatGoesWrong; this is in make test-deep")
	}
	c := up(t, 1, 1, "killpoints")
	before, old := c.authorities(t, "master-0"), c.admin()
	c.stopsAfter(rotation.Prepare)
	run := c.runName()
	ancient := c.published(run)
	c.diesAt("before:" + effect(kubeletStep(t, c.plan())))
	c.killed("--restart-pods")
	between := c.authorities(t, "master-0")
	if maps.Equal(before, between) {
		t.Fatal("nothing is trusted beside the old CAs: this tests nothing")
	}
	c.loses()

	b := c.elsewhere()
	status, out := b.call("resume")
	if status != 1 || !strings.Contains(out, "NothingUnfinished") || !strings.Contains(out, "/var/lib/keyfleet/rotate-certs/RUN/journal") {
		t.Fatalf("exit status %d, want 1 and where a copy is:\n%s", status, out)
	}
	b.brings(run, ancient)
	b.isLockedOut(t)
	if status, _ := b.call("resume", "--take-over", "--restart-pods"); status != 0 {
		t.Fatalf("exit status %d", status)
	}
	b.endsAs(t, before, between)
	b.adminChanged(old)
	b.leavesNothingAtWork(t)
	b.leavesNoSecret(t)
}
