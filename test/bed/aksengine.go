//go:build linux

package bed

import (
	"context"
	"fmt"
	"os"
	"path"
	"strings"
	"time"
)

// aksCertificateDir holds the certificates on every node of the layout aks-engine.
const aksCertificateDir = "/etc/kubernetes/certs"

// aksFacts is what the templates of the layout aks-engine speak of besides.
type aksFacts struct {
	AdminCertificate   string // as kubeconfigs hold them
	AdminKey           string
	PublicKey          string // opens the nodes
	CertificateProfile string // JSON
}

// bringAKSEngine makes the cluster as aks-engine's cloud-init does: nothing joins
// anything, every machine finds its files and starts. etcd comes first, because
// aks-engine keeps the front proxy's certificates there.
func (b *builder) bringAKSEngine(ctx context.Context) error {
	certificates, err := makeAKSCertificates(b)
	if err != nil {
		return err
	}
	s, err := b.aksScene(certificates)
	if err != nil {
		return err
	}
	b.logf("  certificates made")
	steps := []func(context.Context, Node) error{
		func(_ context.Context, n Node) error { return b.equip(n, s, certificates) },
		b.startEtcd,
		b.storeProxyCertificates,
		b.startKubelet,
	}
	for _, step := range steps {
		if err := each(ctx, b.Nodes, step); err != nil {
			return err
		}
	}
	b.logf("  etcd up, kubelets started")
	if err := b.writeAKSFiles(ctx, s); err != nil {
		return err
	}
	if err := b.labelMasters(ctx); err != nil {
		return err
	}
	if err := b.awaitCluster(ctx, s); err != nil {
		return err
	}
	return each(ctx, b.Nodes, b.awaitOwnCertificate)
}

func (b *builder) aksScene(c *aksCertificates) (scene, error) {
	s := b.scene(b.Nodes[0])
	profile, err := c.profile()
	if err != nil {
		return s, fmt.Errorf("encoding the certificate profile: %w", err)
	}
	public, err := os.ReadFile(b.SSHKey + ".pub")
	if err != nil {
		return s, err
	}
	s.CA = inKubeconfig(c.ca.cert)
	s.AKS = aksFacts{
		AdminCertificate: inKubeconfig(c.kubeConfig.cert), AdminKey: inKubeconfig(c.kubeConfig.key),
		PublicKey: strings.TrimSpace(string(public)), CertificateProfile: profile,
	}
	return s, nil
}

// placed is a file of a node and the template that it is made from.
type placed struct {
	path, template string
	mode           os.FileMode
}

// aksFiles are the files of a node besides certificates. Where a flag stands is
// as in aks-engine, because that is what a rotation may have to change.
func (b *builder) aksFiles(n Node) []placed {
	files := []placed{
		{"/var/lib/kubelet/kubeconfig", "aks-kubeconfig", 0o644},
		{"/var/lib/kubelet/config.yaml", "aks-kubelet.yaml", 0o644},
		{"/etc/default/kubelet", "aks-kubelet.default", 0o644},
		{"/etc/systemd/system/kubelet.service", "aks-kubelet.service", 0o644},
	}
	if n.Role != RoleMaster {
		return files
	}
	for _, name := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler"} {
		files = append(files, placed{"/etc/kubernetes/manifests/" + name + ".yaml", "aks-" + name + ".yaml", 0o644})
	}
	return append(files,
		placed{"/etc/default/etcd", "aks-etcd.default", 0o644},
		placed{"/etc/systemd/system/etcd.service", "aks-etcd.service", 0o644},
		placed{b.adminKubeconfig(), "aks-admin-kubeconfig", 0o600},
	)
}

// equip writes all files of a node.
func (b *builder) equip(n Node, s scene, c *aksCertificates) error {
	for name, text := range c.files(n) {
		mode := os.FileMode(0o644)
		if path.Ext(name) == ".key" {
			mode = 0o600
		}
		if err := b.put(n, path.Join(aksCertificateDir, name), text, mode); err != nil {
			return fmt.Errorf("writing the certificates of %s: %w", n.Name, err)
		}
	}
	s.Node, s.PodSubnet = n, podSubnet(n)
	for _, f := range b.aksFiles(n) {
		text, err := render(f.template, s)
		if err != nil {
			return err
		}
		if err := b.put(n, f.path, text, f.mode); err != nil {
			return fmt.Errorf("writing the files of %s: %w", n.Name, err)
		}
	}
	return nil
}

// startEtcd starts the member of a master, as a user of its own. The unit is up
// when the member is in a quorum: the masters must do it at the same time.
func (b *builder) startEtcd(ctx context.Context, n Node) error {
	if n.Role != RoleMaster {
		return nil
	}
	return b.run(ctx, n.Name, "start etcd", fmt.Sprintf(`set -e
useradd --system --user-group --no-create-home etcd
install --directory --owner=etcd --group=etcd --mode=0700 /var/lib/etcddisk
chown etcd:etcd %[1]s/etcdserver.key %[1]s/etcdpeer*.key
chown -R %[2]s:%[2]s $(dirname %[3]s)
ln -s %[4]s/etcd /usr/bin/etcd
systemctl daemon-reload
timeout 60 systemctl enable --now etcd || { journalctl --no-pager --lines=20 --unit=etcd; exit 1; }`,
		aksCertificateDir, b.SSHUser, b.adminKubeconfig(), programsDir))
}

// storeProxyCertificates keeps the front proxy's certificates in etcd, where the
// masters of aks-engine agree on them: the first that comes makes them, the
// others read. The blank in front keeps etcdctl from taking a PEM for a flag.
func (b *builder) storeProxyCertificates(ctx context.Context, n Node) error {
	if n != b.Nodes[0] {
		return nil
	}
	return b.run(ctx, n.Name, "store proxy certificates", fmt.Sprintf(`set -e
cd %s
store() { etcdctl --cacert=ca.crt --cert=etcdclient.crt --key=etcdclient.key put "/proxycerts/$1" " $(cat "$2")"; }
store requestheader-client-ca-file proxy-ca.crt
store proxy-client-cert-file proxy.crt
store proxy-client-key-file proxy.key`, aksCertificateDir))
}

func (b *builder) startKubelet(ctx context.Context, n Node) error {
	return b.run(ctx, n.Name, "start kubelet", "systemctl daemon-reload && systemctl restart kubelet")
}

// writeAKSFiles writes what aks-engine leaves on the user's own machine.
func (b *builder) writeAKSFiles(ctx context.Context, s scene) error {
	model, err := render("aks-apimodel.json", s)
	if err != nil {
		return err
	}
	if err := writeFile(b.APIModel, model, 0o600); err != nil {
		return err
	}
	return b.copyKubeconfig(ctx)
}

// labelMasters gives the masters the label that kubelets may not give themselves.
func (b *builder) labelMasters(ctx context.Context) error {
	names := ""
	for _, m := range b.masters() {
		names += " " + m.Name
	}
	return b.until(ctx, 3*time.Minute, b.Nodes[0].Name, "masters register", "kubectl label --overwrite nodes"+names+" node-role.kubernetes.io/control-plane=")
}

// awaitOwnCertificate waits until the kubelet is itself for the API: it starts
// with the certificate that all nodes share, which may do everything, and asks
// for its own at once. A rotation that began before would find some with it and
// some without.
func (b *builder) awaitOwnCertificate(ctx context.Context, n Node) error {
	const script = `openssl x509 -noout -subject -in /var/lib/kubelet/pki/kubelet-client-current.pem | grep "system:node:$(hostname)$"`
	return b.until(ctx, 3*time.Minute, n.Name, "kubelet gets a certificate", script)
}
