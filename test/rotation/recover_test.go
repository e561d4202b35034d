//go:build linux

package rotation

import (
	"crypto/rand"
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
			for _, path := range strings.Fields(c.sh(n.Name, "grep -l client-certificate-data /etc/kubernetes/*.conf")) {
				c.endKubeconfig(n.Name, path)
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

// endCAs makes every CA of every node one that ended yesterday, with the key that
// it has, and tells all kubeconfigs of it.
func (c *cluster) endCAs() {
	c.t.Helper()
	for _, ca := range []string{"ca", "etcd/ca", "front-proxy-ca"} {
		old := c.certificate("master-0", "cat "+pkiDir+ca+".crt")
		key, err := pki.ParseKey([]byte(c.sh("master-0", "cat "+pkiDir+ca+".key")))
		if err != nil {
			c.t.Fatal(err)
		}
		next := *old
		next.NotBefore, next.NotAfter = time.Now().Add(-11*365*24*time.Hour), time.Now().Add(-24*time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, &next, &next, key.Public(), key)
		if err != nil {
			c.t.Fatal(err)
		}
		text := pki.EncodeChain(der)
		for _, n := range c.Nodes {
			if n.Role == bed.RoleMaster || ca == "ca" {
				c.write(n.Name, pkiDir+ca+".crt", text)
			}
			if ca == "ca" {
				c.sh(n.Name, "sed -i 's|certificate-authority-data: .*|certificate-authority-data: "+base64.StdEncoding.EncodeToString(text)+"|' /etc/kubernetes/*.conf")
			}
		}
	}
}

// TestRecovery: everything is down and nothing can be asked, and one command
// brings it back. What had not ended stays.
func TestRecovery(t *testing.T) {
	masters := 1
	if deep() {
		masters = 3
	}
	c := up(t, masters, 1, "killpoints")
	cas := func() string {
		return c.sh("master-0", "cd "+pkiDir+" && sha256sum ca.crt etcd/ca.crt front-proxy-ca.crt sa.pub")
	}
	recovers := func(t *testing.T, sameCAs bool) {
		c := c.in(t)
		before := cas()
		c.dead()
		if status, _ := c.call("--force"); status != 0 {
			t.Fatalf("exit status %d; the kubelet says:\n%s", status, c.sh("master-0", "journalctl -u kubelet -n 120 --no-pager | cut -c1-400"))
		}
		c.works()
		if now := cas(); sameCAs && now != before {
			t.Errorf("CAs that had not ended were replaced:\n%s\n%s", before, now)
		}
		c.leavesNothingAtWork(t)
		c.leavesNoSecret(t)
	}
	t.Run("every certificate has ended", func(t *testing.T) {
		c.in(t).endLeaves()
		c.in(t).restartAll()
		recovers(t, true)
	})
	if !deep() || t.Failed() {
		return
	}
	t.Run("every CA has ended", func(t *testing.T) {
		old := c.admin()
		c.in(t).endCAs()
		c.in(t).endLeaves()
		c.in(t).restartAll()
		recovers(t, false)
		c.in(t).adminChanged(old)
	})
	t.Run("no API server starts", func(t *testing.T) {
		for _, n := range c.Nodes {
			if n.Role == bed.RoleMaster { // a key that is not that of its certificate
				c.in(t).sh(n.Name, "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 >"+pkiDir+"apiserver.key")
			}
		}
		c.in(t).restartAll()
		recovers(t, true)
	})
}
