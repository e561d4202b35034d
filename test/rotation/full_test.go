//go:build linux

package rotation

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// figures are what was measured of one rotation.
type figures struct {
	*probes
	took   time.Duration
	phases map[rotation.Phase]time.Duration
	impact string // what the plan said before
}

// measure rotates everything under probes, which follow the administrator to the
// new kubeconfig after the switch.
func (c *cluster) measure() (figures, error) {
	c.t.Helper()
	f := figures{phases: map[rotation.Phase]time.Duration{}}
	f.probes = c.begin()
	began := time.Now()
	last := began
	err := c.rotate(func(line string) {
		switch {
		case strings.HasPrefix(line, "Expected unavailability of the API: "):
			f.impact = strings.TrimPrefix(line, "Expected unavailability of the API: ")
		case strings.Contains(line, "kubernetes-admin (a client certificate)"): // that is us
			f.login.Store(c.admin())
		case strings.Contains(line, "point of no return ----") && !strings.Contains(line, "until here"):
			f.login.Store(c.admin())
		}
		if _, step, ok := strings.Cut(line, "  done   "); ok {
			phase, _, _ := strings.Cut(step, ":")
			f.phases[rotation.Phase(phase)] += time.Since(last)
			last = time.Now()
		}
	}, "--restart-pods")
	f.took = time.Since(began)
	f.end()
	c.t.Logf("rotated in %s from %s on\n%s", f.took.Round(time.Second), began.Format("15:04:05.0"), f)
	return f, err
}

// balancer is what became of the requests through the load balancer.
func (p *probes) balancer() *outcome { return p.outcomes["load balancer"] }

// losesNoRequest rotates everything while clients ask: none of them notices, and
// every certificate and key of every machine is another afterwards.
func (c *cluster) losesNoRequest(t *testing.T) {
	c = c.in(t)
	before := map[string]map[string]string{}
	for _, n := range c.Nodes {
		before[n.Name] = c.keys(n.Name)
	}
	old := c.admin()
	f, err := c.measure()
	if err != nil {
		t.Fatal(err)
	}
	if o := f.balancer(); o.failed != 0 || o.total < 100 {
		t.Errorf("%d of %d requests through the load balancer failed: %v", o.failed, o.total, o.reasons)
	}
	if n := f.missed(); n != 0 {
		t.Errorf("the watch missed %d of %d writes", n, f.written)
	}
	for _, n := range c.Nodes {
		for file, sum := range c.keys(n.Name) {
			if sum == before[n.Name][file] {
				t.Errorf("%s on %s is as it was", file, n.Name)
			}
		}
	}
	c.adminChanged(old)
	c.leavesNothingAtWork(t)
	if t.Failed() {
		return
	}
	fmt.Printf("a full rotation of %d nodes took %s: %d requests through the load balancer, %d failed, longest gap %.2f s\n",
		len(c.Nodes), f.took.Round(time.Second), f.balancer().total, f.balancer().failed, f.balancer().longest.Seconds())
}

// TestFullRotationLosesNoRequest: nobody notices that everything is replaced on a
// cluster of three masters; nor when it is done again right afterwards, nor that
// a member of etcd is down meanwhile.
func TestFullRotationLosesNoRequest(t *testing.T) {
	c := up(t, 3, 1, "")
	if !t.Run("a rotation", c.losesNoRequest) || !deep() {
		return
	}
	if !t.Run("a second one in a row", c.losesNoRequest) {
		return
	}
	t.Run("etcd keeps its majority", c.keepsMajority)
}

// keepsMajority rotates the CA of etcd while one member is down, when the first of
// the others is to restart: it does not, says why, and goes on when that member is back.
func (c *cluster) keepsMajority(t *testing.T) {
	c = c.in(t)
	if status, _ := c.call("--only", "etcd-ca", "--until", "soak"); status != 11 {
		t.Fatalf("exit status %d, want 11", status)
	}
	pids := func() string {
		return c.sh("master-0", pidOf("etcd")) + c.sh("master-2", pidOf("etcd"))
	}
	before := pids()
	// As if it had crashed and did not come up: the kubelet, which would start it again, waits.
	c.sh("master-1", "systemctl stop kubelet && kill -STOP "+strings.TrimSpace(c.sh("master-1", pidOf("etcd"))))
	c.stops(t, "master-1", "retire: restart etcd", "EtcdMemberDown", "--only", "etcd-ca")
	if now := pids(); now != before {
		t.Errorf("etcd was restarted while a member was down: processes %q, now %q", before, now)
	}
	c.sh("master-1", "kill -CONT "+strings.TrimSpace(c.sh("master-1", pidOf("etcd")))+" && systemctl start kubelet")
	if status, _ := c.call("--only", "etcd-ca"); status != 0 {
		t.Errorf("with all members: exit status %d", status)
	}
	c.worksFor(t, c.admin())
	c.leavesNothingAtWork(t)
}

// pidOf is a script that prints the process ids of a program.
func pidOf(name string) string {
	return `for p in /proc/[0-9]*; do if [ "$(basename "$(readlink $p/exe 2>/dev/null)" 2>/dev/null)" = ` + name + ` ]; then echo ${p#/proc/}; fi; done`
}
