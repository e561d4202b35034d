//go:build linux

package rotation

import (
	"fmt"
	"strings"
	"testing"
)

// gnaw cuts connections after 2 to 22 KiB; every fifth goes on to 64 MiB, so that
// the largest file, a snapshot of etcd, gets through. An SSH connection takes 3 KiB to be made.
func gnaw(n int) int64 {
	if n%5 == 4 {
		return 64 << 20
	}
	return 2<<10 + int64(n)*3571%(20<<10)
}

// everywhere cuts connections ever later, from 4 KiB on, until a step is on record;
// then it begins anew. So every step is cut in several places, its uploads and its
// commands, and gets through in the end.
func (c *cluster) everywhere() func(n int) int64 {
	recorded, size := -1, int64(0)
	return func(int) int64 {
		if now := c.recorded(); now != recorded {
			recorded, size = now, 4<<10
		} else {
			size += size / 2
		}
		return size
	}
}

// throughCuts calls the same command again and again over a line that is cut,
// until enough says that it has come far enough. The cuts and calls are returned.
func (c *cluster) throughCuts(t *testing.T, budget func(n int) int64, enough func(status int, out string) bool, args ...string) (cuts, calls int) {
	t.Helper()
	d, l := c.over(t, budget)
	for calls < 1000 {
		status, out := d.call(args...)
		calls++
		if enough(status, out) {
			return l.mend(), calls
		}
		if status != 1 || blames(out) {
			t.Fatalf("exit status %d over a line that is cut, want 1 and nothing else to blame:\n%s", status, out)
		}
	}
	t.Fatal("it makes no progress")
	return 0, 0
}

// blames reports whether the error of a call is about the cluster or the run, where
// only the line is broken. How a broken line looks depends on who notices it first.
func blames(out string) bool {
	_, problem, found := strings.Cut(out, "Error")
	for _, text := range []string{"panic", "Locked", "TakenOver", "BadCA", "UnfinishedRotation", "MissingFile", "OtherModel"} {
		if strings.Contains(problem, text) {
			return true
		}
	}
	return !found
}

// TestLineIsCutEverywhere: a whole rotation over a line on which no connection
// lives long, so that uploads and commands are cut at all places.
func TestLineIsCutEverywhere(t *testing.T) {
	if !deep() {
		t.Skip("a sample is in TestWhatGoesWrong; this is in make test-deep")
	}
	c := up(t, 1, 1, "")
	before, old := c.authorities(t, "master-0"), c.admin()
	cuts, calls := c.throughCuts(t, c.everywhere(), func(status int, _ string) bool { return status == 0 || c.finished() }, "--restart-pods")
	if n := c.materials(); n != 1 {
		t.Errorf("new CAs were made %d times", n)
	}
	for file, root := range c.authorities(t, "master-0") {
		if strings.Contains(root, " ") || root == before[file] {
			t.Errorf("%s: CA %s at the end, %s before", file, root, before[file])
		}
	}
	c.adminChanged(old)
	c.leavesNothingAtWork(t)
	c.leavesNoSecret(t)
	if !t.Failed() {
		fmt.Printf("the line was cut at %d points of a rotation, which took %d calls and ended with the same keys\n", cuts, calls)
	}
}
