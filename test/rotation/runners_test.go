//go:build linux

package rotation

import (
	"slices"
	"strings"
	"syscall"
	"testing"
)

// takenOver is a rotation by two runners. The first is at work, in the phase
// switch, when a second one comes: it is refused, and goes on in the first one's
// place when it is told to. The first then fails with its next step and changes
// nothing more. As it was about to restart the API server, both mostly wait for one
// restart. The second one dies at a point and leaves the rest to others.
func (c *cluster) takenOver(t *testing.T, by *cluster, dies func() string) {
	c, by = c.in(t), by.in(t)
	a := c.start(nil, "--restart-pods")
	a.await("done   switch: place admin.conf")
	a.signal(syscall.SIGSTOP) // its machine is slow: what it does next it does after it was replaced
	run := c.runName()

	status, out := by.call("resume")
	if status != 1 || !strings.Contains(out, "NothingUnfinished") || !strings.Contains(out, "/var/lib/keyfleet/rotate-certs/RUN/journal") {
		t.Errorf("without a journal: exit status %d, want 1 and where a copy is:\n%s", status, out)
	}
	by.brings(run, c.published(run))
	by.isLockedOut(t)

	by.diesAt(dies())
	b := by.start(nil, "resume", "--take-over", "--restart-pods")
	b.await(" done ")
	done := len(a.steps())
	a.signal(syscall.SIGCONT)
	if status := a.wait(); status != 1 || !strings.Contains(a.output(), "Error TakenOver: ") {
		t.Errorf("the first runner ended with status %d, want 1 with the error TakenOver", status)
	}
	if status := b.wait(); status != -1 {
		t.Errorf("the second runner ended with status %d before it was killed", status)
	}
	// It may find done what the second has done, wait for a restart of that one, and look
	// at proofs: that changes nothing.
	for _, step := range a.steps()[done:] {
		if !slices.Contains(b.steps(), step) {
			t.Errorf("the first runner did %q after it was replaced", step)
		}
	}
	c.isLockedOut(t) // the first runner's same command again, while the second one's lock is fresh
}
