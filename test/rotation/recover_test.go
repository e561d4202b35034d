//go:build linux

package rotation

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/test/bed"
)

// pkiDir is where kubeadm keeps keys and certificates.
const pkiDir = "/etc/kubernetes/pki/"

// write puts a file onto a machine, with the mode and owner of the one it replaces.
func (c *cluster) write(node, path string, text []byte) {
	c.t.Helper()
	c.sh(node, fmt.Sprintf("echo %s | base64 -d >%s", base64.StdEncoding.EncodeToString(text), path))
}

// ended certifies a key again, for a time that is over.
func (c *cluster) ended(node, ca string, like *x509.Certificate) []byte {
	c.t.Helper()
	chain, err := pki.ParseChain([]byte(c.sh(node, "cat "+pkiDir+ca+".crt")))
	if err != nil {
		c.t.Fatal(err)
	}
	key, err := pki.ParseKey([]byte(c.sh(node, "cat "+pkiDir+ca+".key")))
	if err != nil {
		c.t.Fatal(err)
	}
	der, err := pki.Reissue(like, like.PublicKey, chain[0], key, time.Now().Add(-366*24*time.Hour), 365*24*time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	return pki.EncodeChain(der)
}

// endLeaves makes every certificate of every node one that ended yesterday.
func (c *cluster) endLeaves() {
	c.t.Helper()
	for _, n := range c.Nodes {
		if n.Role == bed.RoleMaster {
			for file, ca := range map[string]string{
				"apiserver": "ca", "apiserver-kubelet-client": "ca", "apiserver-etcd-client": "etcd/ca", "front-proxy-client": "front-proxy-ca",
				"etcd/server": "etcd/ca", "etcd/peer": "etcd/ca", "etcd/healthcheck-client": "etcd/ca",
			} {
				path := pkiDir + file + ".crt"
				c.write(n.Name, path, c.ended(n.Name, ca, c.certificate(n.Name, "cat "+path)))
			}
			for _, config := range []string{"admin", "super-admin", "controller-manager", "scheduler"} {
				c.endKubeconfig(n.Name, "/etc/kubernetes/"+config+".conf")
			}
		}
		const pair = "/var/lib/kubelet/pki/kubelet-client-current.pem"
		cert := c.ended("master-0", "ca", c.certificate(n.Name, "cat "+pair))
		key := c.sh(n.Name, "openssl pkey -in "+pair)
		c.write(n.Name, "$(readlink -f "+pair+")", append(cert, key...))
	}
}

// certificate reads the first certificate that a command prints.
func (c *cluster) certificate(node, command string) *x509.Certificate {
	c.t.Helper()
	for rest := []byte(c.sh(node, command)); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			c.t.Fatalf("%s on %s prints no certificate", command, node)
		} else if b.Type == "CERTIFICATE" {
			cert, err := x509.ParseCertificate(b.Bytes)
			if err != nil {
				c.t.Fatal(err)
			}
			return cert
		}
	}
}

// endKubeconfig does so with the certificate in a kubeconfig.
func (c *cluster) endKubeconfig(node, path string) {
	c.t.Helper()
	old := strings.TrimSpace(c.sh(node, "grep -o 'client-certificate-data: .*' "+path+" | cut -d' ' -f2"))
	text, err := base64.StdEncoding.DecodeString(old)
	if err != nil {
		c.t.Fatal(err)
	}
	chain, err := pki.ParseChain(text)
	if err != nil {
		c.t.Fatal(err)
	}
	next := base64.StdEncoding.EncodeToString(c.ended(node, "ca", chain[0]))
	c.sh(node, fmt.Sprintf("sed -i 's|client-certificate-data: .*|client-certificate-data: %s|' %s", next, path))
}

// restartAll ends every program that holds a connection from before, as a reboot does.
func (c *cluster) restartAll() {
	c.t.Helper()
	for _, n := range c.Nodes {
		c.sh(n.Name, "systemctl stop kubelet; for name in kube-apiserver kube-controller-manager kube-scheduler etcd; do pkill -9 -x $(echo $name | cut -c1-15) || true; done; systemctl start --no-block kubelet")
	}
}

// dead waits until no API server answers, and rotate-certs says so.
func (c *cluster) dead() {
	c.t.Helper()
	var said string
	if status := exit(c.t, c.rotate(func(line string) { said += line + "\n" })); status != 1 || !strings.Contains(said, "NoAPIServer") || !strings.Contains(said, "--force") {
		c.t.Fatalf("without --force: exit status %d\n%s", status, said)
	}
}

// works checks that all nodes are ready and run what they are told, now.
func (c *cluster) works() {
	c.t.Helper()
	kubectl := "kubectl --kubeconfig /etc/kubernetes/admin.conf "
	c.sh("master-0", kubectl+"wait --for=condition=Ready nodes --all --timeout=50s")
	c.sh("master-0", kubectl+"delete pod --all --wait=false && "+kubectl+"rollout status deployment/probe --timeout=50s")
}

// TestCertificatesThatHaveEnded: everything is down, nothing can be asked, and
// one command brings it back with the CAs that it had.
func TestCertificatesThatHaveEnded(t *testing.T) {
	c := up(t, 1, 1, "killpoints")
	cas := func() string {
		return c.sh("master-0", "cd "+pkiDir+" && sha256sum ca.crt etcd/ca.crt front-proxy-ca.crt sa.pub")
	}
	before := cas()
	c.endLeaves()
	c.restartAll()
	c.dead()
	if status := exit(t, c.rotate(nil, "--force")); status != 0 {
		t.Fatalf("exit status %d; the kubelet says:\n%s", status, c.sh("master-0", "journalctl -u kubelet -n 120 --no-pager | cut -c1-400"))
	}
	c.works()
	if now := cas(); now != before {
		t.Errorf("CAs that had not ended were replaced:\n%s\n%s", before, now)
	}
}
