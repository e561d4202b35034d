//go:build linux

package rotation

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// stops calls rotate-certs, which must fail and say where, why and how to go on.
func (c *cluster) stops(t *testing.T, node, step, why string, args ...string) {
	t.Helper()
	status, out := c.in(t).call(args...)
	_, problem, _ := strings.Cut(out, "Error")
	if status != 1 || !strings.Contains(problem, node) || !strings.Contains(problem, step) || !strings.Contains(problem, why) || !strings.Contains(problem, "same command again") {
		t.Errorf("exit status %d, want 1 and an error that names %q, %q, %q and the way on:\n%s", status, node, step, why, problem)
	}
}

// narrow gives the engine's folder on a node a disk of its own, of that size.
func (c *cluster) narrow(t *testing.T, node, size string) {
	c = c.in(t)
	c.sh(node, "mkdir -p /var/lib/keyfleet && mount -t tmpfs -o size="+size+" tmpfs /var/lib/keyfleet")
	t.Cleanup(func() { c.sh(node, "umount /var/lib/keyfleet") })
}

// widen makes room on that disk.
func (c *cluster) widen(node, size string) {
	c.sh(node, "mount -o remount,size="+size+" /var/lib/keyfleet")
}

// readOnly makes a folder of a node read-only until the function that it returns is called.
func (c *cluster) readOnly(node, folder string) (writable func()) {
	c.sh(node, fmt.Sprintf("mount --bind %[1]s %[1]s && mount -o remount,bind,ro %[1]s", folder))
	return func() { c.sh(node, "umount "+folder) }
}

// TestDiskIsFull: the engine's disk on a node is full at one point after another,
// and the same command goes on each time that there is a little more room.
func TestDiskIsFull(t *testing.T) {
	if !deep() {
		t.Skip("one point is in TestWhatGoesWrong; this is in make test-deep")
	}
	c := up(t, 1, 1, "")
	before, old := c.authorities(t, "master-0"), c.admin()
	for _, node := range []string{"master-0", "worker-0"} {
		c.narrow(t, node, "4k")
	}
	points := 0
	for size := 8; ; size += max(4, size/4) { // KiB
		status, out := c.call("--restart-pods")
		if status == 0 {
			break
		}
		_, problem, _ := strings.Cut(out, "Error")
		if status != 1 || !strings.Contains(problem, "No space left on device") || !strings.Contains(problem, "-0") {
			t.Fatalf("exit status %d, want 1 and an error that names the node and the full disk:\n%s", status, problem)
		}
		points++
		for _, node := range []string{"master-0", "worker-0"} {
			c.widen(node, fmt.Sprintf("%dk", size))
		}
	}
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
		fmt.Printf("the disk was full at %d points of a rotation, which went on each time\n", points)
	}
}

// loosen gives keys another mode and owner than kubeadm does, as people do: a
// rotation must not make them tighter, or looser.
func (c *cluster) loosen(node string) {
	const pki = "/etc/kubernetes/pki"
	c.sh(node, "chmod 644 "+filepath.Join(pki, "apiserver.key")+" && chown 1000:1000 "+filepath.Join(pki, "front-proxy-client.key")+
		" && chmod 640 /etc/kubernetes/scheduler.conf "+filepath.Join(pki, "sa.key"))
}
