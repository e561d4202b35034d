//go:build linux && bench

package rotation

import (
	"encoding/base64"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/rotation"
	"keyfleet.dev/keyfleet/test/bed"
)

// table is what is printed.
type table struct{ rows [][3]string }

func (t *table) add(what, value, goal string) {
	t.rows = append(t.rows, [3]string{what, value, goal})
	fmt.Printf("%-72s %s\n", what, value)
}

// TestRotationFigures measures rotations of a real cluster; `make bench` runs it.
func TestRotationFigures(t *testing.T) {
	var out table
	t.Run("three masters", func(t *testing.T) {
		c := up(t, 3, 1, "")
		t.Run("rotated", func(t *testing.T) { rotated(t, c, &out) })
		t.Run("cut over", func(t *testing.T) { baseline(t, c, &out) })
	})
	t.Run("one master", func(t *testing.T) { alone(t, up(t, 1, 1, ""), &out) })
	if len(out.rows) == 0 {
		return // the reason was printed
	}
	fmt.Printf("\nMasters, worker, load balancer and probes on the machine above. Each request over a fresh connection, never twice.\n\n| figure | measured | goal |\n|---|---|---|\n")
	for _, r := range out.rows {
		fmt.Printf("| %s | %s | %s |\n", r[0], r[1], r[2])
	}
}

// rotated measures a full rotation of three masters.
func rotated(t *testing.T, c *cluster, out *table) {
	f, err := c.in(t).measure()
	if err != nil {
		t.Fatal(err)
	}
	const what = "rotate-certs, 3 masters, all CAs and keys: "
	out.requests(what, f.probes, f.took, "0 failed")
	out.add(what+"writes that a watch never showed (opened again)", fmt.Sprintf("%d of %d (%d times)", f.missed(), f.written, f.rewatch), "0")
	out.add(what+"total time", seconds(f.took), "")
	var parts []string
	for _, p := range []rotation.Phase{rotation.Prepare, rotation.Trust, rotation.Switch, rotation.Soak, rotation.Retire} {
		parts = append(parts, fmt.Sprintf("%s %.0f", p, f.phases[p].Seconds()))
	}
	out.add(what+"seconds of each phase", strings.Join(parts, ", "), "")
}

// requests adds what the probes saw.
func (t *table) requests(what string, p *probes, took time.Duration, goal string) {
	o := p.balancer()
	t.add(what+"failed through the load balancer", fmt.Sprintf("%d of %d (%.0f a second)", o.failed, o.total, float64(o.total)/took.Seconds()), goal)
	t.add(what+"longest gap through the load balancer", seconds(o.longest), "")
	var each []string
	for i := 0; p.outcomes[fmt.Sprintf("master-%d", i)] != nil; i++ {
		each = append(each, seconds(p.outcomes[fmt.Sprintf("master-%d", i)].longest))
	}
	t.add(what+"longest gap of each API server", strings.Join(each, ", "), "")
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// alone measures a rotation where there is no other API server to lead clients to.
func alone(t *testing.T, c *cluster, out *table) {
	f, err := c.in(t).measure()
	if err != nil {
		t.Fatal(err)
	}
	const what = "rotate-certs, 1 master, all CAs and keys: "
	out.requests(what, f.probes, f.took, "")
	out.add(what+"longest gap, against what the plan announced", seconds(f.balancer().longest), f.impact)
	out.add(what+"total time", seconds(f.took), "")
}

// baseline replaces everything in the order of aks-engine's rotate-certs: new files
// on all masters at once, then each restarts, and the next one does not wait until
// it is healthy; then workers; then pods. It is kinder than that tool is: only the
// control plane restarts and not the machine, and the clients know the new
// kubeconfig from the moment of the cut.
func baseline(t *testing.T, c *cluster, out *table) {
	c = c.in(t)
	c.prepareCut()
	p := c.begin()
	began := time.Now()
	c.everyMaster(func(n bed.Node) { c.sh(n.Name, putAll) })
	p.login.Store(c.admin())
	for _, n := range c.masters() {
		c.shWithin(5*time.Minute, n.Name, restartAll)
	}
	c.heardAgain(len(c.masters()))
	for _, n := range c.Nodes[len(c.masters()):] {
		conf := base64.StdEncoding.EncodeToString([]byte(c.sh("master-0", "cat /root/new/"+n.Name+"/kubelet.conf")))
		ca := base64.StdEncoding.EncodeToString([]byte(c.sh("master-0", "cat /root/new/pki/ca.crt")))
		// kubeadm's leads to an API server of the machine's own, which a worker has not.
		c.sh(n.Name, "server=$(grep server: /etc/kubernetes/kubelet.conf); echo "+conf+" | base64 -d >/etc/kubernetes/kubelet.conf; sed -i \"s|.*server:.*|$server|\" /etc/kubernetes/kubelet.conf; echo "+ca+" | base64 -d >/etc/kubernetes/pki/ca.crt; rm -f /var/lib/kubelet/pki/kubelet-client-current.pem; systemctl restart kubelet")
	}
	c.heardAgain(len(c.Nodes))
	took := time.Since(began)
	const patience = 4 * time.Minute // that tool waits for pods too, and goes on when they do not come
	pods := c.shWithin(patience+time.Minute, "master-0", fmt.Sprintf("kubectl rollout restart deployment/probe; kubectl rollout status deployment/probe --timeout=%.0fs 2>&1 || kubectl get pods -A -o wide", patience.Seconds()))
	back := seconds(time.Since(began))
	if !strings.Contains(pods, "successfully rolled out") {
		back = "not within " + back
	}
	p.end()
	t.Logf("cut over in %s from %s on\n%s\n%s", took.Round(time.Second), began.Format("15:04:05.0"), p, pods)
	const what = "cut over and restart one by one (the order of aks-engine), 3 masters: "
	out.requests(what, p, time.Since(began), "the baseline")
	out.add(what+"writes that a watch never showed (opened again)", fmt.Sprintf("%d of %d (%d times)", p.missed(), p.written, p.rewatch), "the baseline")
	out.add(what+"time until all nodes are heard of", seconds(took), "the baseline")
	out.add(what+"time until pods are back", back, "the baseline")
}

// masters are the nodes with a control plane.
func (c *cluster) masters() []bed.Node {
	var out []bed.Node
	for _, n := range c.Nodes {
		if n.Role == bed.RoleMaster {
			out = append(out, n)
		}
	}
	return out
}

func (c *cluster) everyMaster(do func(bed.Node)) {
	var all sync.WaitGroup
	for _, n := range c.masters() {
		all.Go(func() { do(n) })
	}
	all.Wait()
}

// prepareCut makes new CAs and all that they certify, below /root/new on each
// master, with kubeadm.
func (c *cluster) prepareCut() {
	c.t.Helper()
	config := func(n bed.Node) string {
		return fmt.Sprintf(`mkdir -p /root/new/pki/etcd; cat >/root/new/%[1]s.yaml <<END
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: %[2]s, bindPort: 6443}
nodeRegistration: {name: %[1]s, criSocket: "unix:///run/containerd/containerd.sock"}
---
$(kubectl -n kube-system get configmap kubeadm-config -o 'jsonpath={.data.ClusterConfiguration}' | sed 's|^certificatesDir:.*|certificatesDir: /root/new/pki|')
END
`, n.Name, n.IP)
	}
	cas := ""
	for i, n := range c.masters() {
		text := config(n)
		if i > 0 { // the CAs are those of the first
			text += "echo " + cas + " | base64 -d | tar -x -C /root/new/pki; "
		}
		c.sh(n.Name, text+fmt.Sprintf("kubeadm init phase certs all --config /root/new/%[1]s.yaml && kubeadm init phase kubeconfig all --config /root/new/%[1]s.yaml --kubeconfig-dir /root/new", n.Name))
		if i == 0 {
			cas = strings.TrimSpace(c.sh(n.Name, "tar -c -C /root/new/pki ca.crt ca.key etcd/ca.crt etcd/ca.key front-proxy-ca.crt front-proxy-ca.key sa.key sa.pub | base64 -w0"))
		}
	}
	for _, n := range c.Nodes[len(c.masters()):] {
		c.sh("master-0", config(n)+fmt.Sprintf("kubeadm init phase kubeconfig kubelet --config /root/new/%[1]s.yaml --kubeconfig-dir /root/new/%[1]s", n.Name))
	}
}

// putAll puts all new files in place.
const putAll = `cp -a /root/new/pki/. /etc/kubernetes/pki/
cp -a /root/new/*.conf /etc/kubernetes/
rm -f /var/lib/kubelet/pki/kubelet-client-current.pem`

// restartAll restarts kubelet and control plane of a machine and returns when their
// processes run, as the restart of a machine does; whether they are healthy nobody
// asks. What has not ended within ten seconds is killed.
const restartAll = `pid_of() { for p in /proc/[0-9]*; do if [ "$(basename "$(readlink $p/exe 2>/dev/null)" 2>/dev/null)" = $1 ]; then echo ${p#/proc/}; return; fi; done; }
olds=
for name in etcd kube-apiserver kube-controller-manager kube-scheduler; do
  old=$(pid_of $name)
  if [ -n "$old" ]; then kill $old; olds="$olds $old"; fi
done
i=0
for old in $olds; do
  while [ -d /proc/$old ] && [ $i -lt 50 ]; do i=$((i+1)); sleep 0.2; done
  kill -9 $old 2>/dev/null || true
done
systemctl restart kubelet
for name in etcd kube-apiserver kube-controller-manager kube-scheduler; do
  i=0
  while [ -z "$(pid_of $name)" ] && [ $i -lt 150 ]; do i=$((i+1)); sleep 0.2; done
done`
