//go:build linux

package rotation

import (
	"fmt"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// TestWhatGoesWrong is a sample of the faults of which make test-deep has all:
// one rotation is rolled back, and another gets to its end although everything goes
// wrong on the way.
func TestWhatGoesWrong(t *testing.T) {
	c := up(t, 1, 1, "killpoints")
	watch := c.watchProcesses(t)
	watch.findsSecrets(t, c)
	if !t.Run("rolled back from the end of the phase trust", func(t *testing.T) { c.rollsBackFrom(t, rotation.Trust) }) {
		return
	}
	c.loosen("master-0")
	before, cas, old := c.disks(), c.authorities(t, "master-0"), c.admin()

	c.narrow(t, "master-0", "300k")
	writable := c.readOnly("master-0", "/etc/kubernetes/pki/etcd")
	points := 0
	part := func(name string, f func(t *testing.T)) bool { return !t.Failed() && t.Run(name, f) }
	part("a full disk stops it", func(t *testing.T) {
		c.stops(t, "master-0", "prepare: snapshot etcd", "No space left on device", "--restart-pods")
	})
	c.widen("master-0", "200m")
	part("with room the same command goes on, over a line that is cut, until it meets a read-only folder", func(t *testing.T) {
		readOnly := func(_ int, out string) bool { return strings.Contains(out, "Read-only file system") }
		points, _ = c.in(t).throughCuts(t, gnaw, readOnly, "--restart-pods")
		c.stops(t, "master-0", "trust: place", "Read-only file system", "--restart-pods")
	})
	writable()
	b := c.elsewhere()
	part("another runner is refused, and takes over when it is told to", func(t *testing.T) {
		c.takenOver(t, b, func() string { return "before:" + effect(kubeletStep(t, b.in(t).plan())) })
	})
	between := c.authorities(t, "master-0")
	d := c.elsewhere()
	part("both machines are lost, and a third goes on with the copy that is on a master", func(t *testing.T) {
		run := b.in(t).runName()
		if state := b.in(t).state(); state.Finished {
			t.Fatal("it is finished already")
		}
		b.in(t).loses()
		c.in(t).loses()
		d.in(t).brings(run, c.in(t).published(run))
		d.isLockedOut(t)
		cuts, _ := d.in(t).throughCuts(t, gnaw, func(status int, _ string) bool { return status == 0 || d.finished() }, "--take-over", "--restart-pods")
		points += cuts
		d.endsAs(t, cas, between)
		d.in(t).adminChanged(old)
	})
	part("modes and owners are as before", func(t *testing.T) { c.modesAsBefore(t, before) })
	part("it leaves nothing at work", func(t *testing.T) { d.leavesNothingAtWork(t) })
	part("it leaves no secret behind", d.leavesNoSecret)
	part("no process showed a secret", watch.showNone)
	if !t.Failed() {
		fmt.Printf("the line was cut at %d points of a rotation with three runners, and it ended with the same keys\n", points)
	}
}
