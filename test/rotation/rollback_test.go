//go:build linux

package rotation

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// stopsAfter begins a rotation that is stopped right after the last step of a phase.
func (c *cluster) stopsAfter(phase rotation.Phase) {
	c.t.Helper()
	defer c.diesAt("")
	switch phase {
	case rotation.Prepare, rotation.Trust: // before the first thing that the next phase does to a machine
		p := c.plan()
		passed := false
		next := first(c.t, p, func(s rotation.Step) bool {
			passed = passed || s.Phase == phase
			return passed && s.Phase != phase && s.Node != "" // what touches no machine cannot be met
		})
		c.diesAt("before:" + effect(next))
		c.killed("--restart-pods")
	case rotation.Switch: // while the next phase, which changes no machine, begins
		r := c.start(nil, "--restart-pods")
		r.await("done   switch: copy the journal to the masters")
		r.kill()
	case rotation.Soak:
		if status, _ := c.call("--until", "soak"); status != 11 {
			c.t.Fatalf("exit status %d, want 11", status)
		}
		// Opened, the step begun, the step done: the next would be the point of no return.
		c.diesAt("after:3")
		c.killed("--restart-pods")
	}
	state := c.state()
	for _, s := range c.plan().Steps {
		switch before := order(s.Phase) <= order(phase); {
		case before && state.Steps[s.Name()] != journal.Done:
			c.t.Fatalf("%q is not done", s.Name())
		case s.NoReturn && state.Steps[s.Name()] != "":
			c.t.Fatal("the point of no return is passed")
		}
	}
}

// order is the place of a phase among all.
func order(p rotation.Phase) int {
	for i, q := range []rotation.Phase{rotation.Prepare, rotation.Trust, rotation.Switch, rotation.Soak, rotation.Retire} {
		if p == q {
			return i
		}
	}
	return -1
}

// killed calls rotate-certs, which must die at the point that was set.
func (c *cluster) killed(args ...string) {
	c.t.Helper()
	if status, _ := c.call(args...); status != -1 {
		c.t.Fatalf("it ended with status %d before it was killed", status)
	}
}

// rollsBackFrom rotates up to the end of a phase and rolls back: everything is as
// it was.
func (c *cluster) rollsBackFrom(t *testing.T, phase rotation.Phase) {
	c = c.in(t)
	before, told, old, began := c.disks(), c.roots(t), c.admin(), time.Now()
	c.stopsAfter(phase)
	if status, _ := c.call("rollback", "--restart-pods"); status != 0 {
		t.Fatalf("rollback ended with status %d", status)
	}
	if s := c.state(); !s.Back || !s.Finished {
		t.Errorf("the journal says %+v", s)
	}
	c.asBefore(t, before)
	c.runsWhatIsThere(t, began)
	c.worksFor(t, old)
	if now := c.roots(t); !maps.Equal(now, told) {
		t.Errorf("clients are told of other CAs than before:\n%v\n%v", told, now)
	}
	c.leavesNothingAtWork(t)
	c.leavesNoSecret(t)
}

// TestRollback: from the end of every phase before the point of no return there is
// a way back, and afterwards a rotation succeeds.
func TestRollback(t *testing.T) {
	if !deep() {
		t.Skip("from one phase in TestWhatGoesWrong; from every phase in make test-deep")
	}
	c := up(t, 1, 1, "killpoints")
	phases := []rotation.Phase{rotation.Prepare, rotation.Trust, rotation.Switch, rotation.Soak}
	for _, phase := range phases {
		if !t.Run("from the end of "+string(phase), func(t *testing.T) { c.rollsBackFrom(t, phase) }) {
			return
		}
	}
	t.Run("then a full rotation succeeds", func(t *testing.T) {
		c := c.in(t)
		old := c.admin()
		if status, _ := c.call("--restart-pods"); status != 0 {
			t.Fatalf("exit status %d", status)
		}
		c.adminChanged(old)
		c.leavesNothingAtWork(t)
		c.leavesNoSecret(t)
	})
	if !t.Failed() {
		fmt.Printf("a rotation was rolled back from %d points, the ends of its phases, and all files were as before\n", len(phases))
	}
}
