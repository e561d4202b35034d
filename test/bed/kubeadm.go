//go:build linux

package bed

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"time"
)

// bringKubeadm makes the cluster: kubeadm on the first master, then on the
// others. Masters join one after the other, because etcd takes one new member at
// a time; workers join meanwhile.
func (b *builder) bringKubeadm(ctx context.Context) error {
	s := b.scene(b.Nodes[0])
	s.Token, s.CertificateKey = randomHex(3)+"."+randomHex(8), randomHex(32)
	if err := b.kubeadmInit(ctx, s); err != nil {
		return err
	}
	b.logf("  kubeadm init on %s", s.Node.Name)
	ca, err := b.readCA(ctx, s.Node)
	if err != nil {
		return err
	}
	s.CA = ca
	if err := b.joinAll(ctx, s); err != nil {
		return err
	}
	if err := b.copyKubeconfig(ctx); err != nil {
		return err
	}
	return b.awaitCluster(ctx, s)
}

// randomHex returns n random bytes as text.
func randomHex(n int) string {
	buf := make([]byte, n)
	rand.Read(buf) // never fails
	return hex.EncodeToString(buf)
}

// auditPolicy is what the API servers write to their audit log.
const auditPolicy = "etc/kubernetes/audit/policy.yaml"

func (b *builder) kubeadmInit(ctx context.Context, s scene) error {
	for path, name := range map[string]string{"etc/kubeadm.yaml": "kubeadm-init.yaml", auditPolicy: "audit-policy.yaml"} {
		if err := b.place(s.Node, path, name, s); err != nil {
			return err
		}
	}
	skip := ""
	if !b.Services {
		skip = "--skip-phases=addon" // kube-proxy and CoreDNS, which have no part in a rotation
	}
	return b.run(ctx, s.Node.Name, "kubeadm init", "kubeadm init --config /etc/kubeadm.yaml --upload-certs -v=1 "+skip)
}

// readCA is how a machine that joins knows the cluster. A machine could also ask
// for the CA and compare its hash; the signature which that needs comes ten
// seconds after kubeadm init.
func (b *builder) readCA(ctx context.Context, n Node) (string, error) {
	text, err := b.Exec(ctx, n.Name, "cat /etc/kubernetes/pki/ca.crt")
	if err != nil {
		return "", fmt.Errorf("reading the cluster's CA: %w", err)
	}
	return base64.StdEncoding.EncodeToString([]byte(text)), nil
}

func (b *builder) joinAll(ctx context.Context, s scene) error {
	join := func(ctx context.Context, n Node) error {
		s := s
		s.Node, s.PodSubnet = n, podSubnet(n)
		for path, name := range map[string]string{"etc/kubeadm.yaml": "kubeadm-join.yaml", "etc/kubeadm-discovery.conf": "discovery.conf", auditPolicy: "audit-policy.yaml"} {
			if err := b.place(n, path, name, s); err != nil {
				return err
			}
		}
		if err := b.run(ctx, n.Name, "kubeadm join", "kubeadm join --config /etc/kubeadm.yaml -v=1"); err != nil {
			return err
		}
		b.logf("  kubeadm join on %s", n.Name)
		return nil
	}
	// The first of the rest stands for all masters, each worker for itself.
	groups := append([]Node{s.First}, b.workers()...)
	return each(ctx, groups, func(ctx context.Context, n Node) error {
		if n.Role == RoleWorker {
			return join(ctx, n)
		}
		for _, m := range b.masters()[1:] {
			if err := join(ctx, m); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *builder) copyKubeconfig(ctx context.Context) error {
	text, err := b.Exec(ctx, b.Nodes[0].Name, "cat "+b.adminKubeconfig())
	if err != nil {
		return fmt.Errorf("copying the kubeconfig: %w", err)
	}
	return writeFile(b.Kubeconfig, text, 0o600)
}

// awaitCluster waits until all nodes are ready, the control plane runs on every
// master and the probe pods run.
func (b *builder) awaitCluster(ctx context.Context, s scene) error {
	const within = 3 * time.Minute
	first := s.First.Name
	err := b.until(ctx, within, first, "nodes become ready", allReady("nodes", len(b.Nodes)))
	if err != nil {
		return err
	}
	b.logf("  all nodes ready")
	if err := b.place(s.First, "etc/kubernetes/probe.yaml", "probe.yaml", s); err != nil {
		return err
	}
	if err := b.until(ctx, within, first, "probe pods are made", "kubectl apply -f /etc/kubernetes/probe.yaml"); err != nil {
		return err
	}
	err = b.until(ctx, within, first, "control plane pods become ready", allReady("pods --namespace=kube-system", b.systemPods()))
	if err != nil {
		return err
	}
	b.logf("  control plane ready on every master")
	return b.until(ctx, within, first, "probe pods run", "kubectl rollout status deployment/probe --timeout=60s || { kubectl get pods -A -o wide; kubectl describe pods; exit 1; }")
}

// systemPods is how many pods kube-system has.
func (b *builder) systemPods() int {
	n := b.staticPods * len(b.masters())
	if b.Services {
		n += len(b.Nodes) + 2 // kube-proxy on every node, and kubeadm's two of CoreDNS
	}
	return n
}

// allReady is a script that waits until there are n objects and all of them are
// ready. It counts first: kubectl waits for those that it finds at the start.
func allReady(what string, n int) string {
	return fmt.Sprintf(`[ "$(kubectl get %s -o name | wc -l)" = %d ] && kubectl wait --for=condition=Ready %s --all --timeout=60s`, what, n, what)
}
