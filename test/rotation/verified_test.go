//go:build linux

package rotation

import (
	"fmt"
	"testing"

	"keyfleet.dev/keyfleet/test/bed"
)

// verifyKubelets makes the API servers verify the certificates of kubelets, and
// every kubelet ask for one: as clusters are that somebody has hardened.
func (c *cluster) verifyKubelets() {
	c.t.Helper()
	for _, n := range c.Nodes {
		c.sh(n.Name, `grep -q serverTLSBootstrap /var/lib/kubelet/config.yaml || echo 'serverTLSBootstrap: true' >>/var/lib/kubelet/config.yaml
systemctl restart kubelet`)
	}
	for _, n := range c.Nodes {
		c.sh("master-0", fmt.Sprintf(`i=0
until kubectl get csr -o 'jsonpath={range .items[?(@.spec.signerName=="kubernetes.io/kubelet-serving")]}{.spec.username} {.metadata.name}{"\n"}{end}' | grep -F 'system:node:%s ' >/tmp/csr; do
  i=$((i+1)); [ $i -lt 100 ]; sleep 0.5
done
cut -d' ' -f2 /tmp/csr | xargs kubectl certificate approve`, n.Name))
		c.sh(n.Name, `i=0; until [ -e /var/lib/kubelet/pki/kubelet-server-current.pem ]; do i=$((i+1)); [ $i -lt 100 ]; sleep 0.5; done`)
	}
	for _, n := range c.Nodes {
		if n.Role != bed.RoleMaster {
			continue
		}
		c.sh(n.Name, `m=/etc/kubernetes/manifests/kube-apiserver.yaml
sed 's|^    - --kubelet-client-certificate=|    - --kubelet-certificate-authority=/etc/kubernetes/pki/ca.crt\n&|' $m >/etc/kubernetes/apiserver.part && mv /etc/kubernetes/apiserver.part $m`)
	}
	c.sh("master-0", `i=0; until kubectl get --raw /api/v1/nodes/master-0/proxy/healthz >/dev/null 2>&1 && pgrep -f kubelet-certificate-authority >/dev/null; do i=$((i+1)); [ $i -lt 100 ]; sleep 0.5; done`)
}

// TestKubeletsThatAreVerified: where API servers verify the kubelets, logs and exec
// work after the old CA has gone.
func TestKubeletsThatAreVerified(t *testing.T) {
	if !deep() {
		t.Skip("the files are looked at in internal/rotation; on a cluster in make test-deep")
	}
	c := up(t, 1, 1, "")
	c.verifyKubelets()
	old := c.admin()
	if status, _ := c.call("--restart-pods"); status != 0 {
		t.Fatalf("exit status %d", status)
	}
	c.adminChanged(old)
	c.worksFor(t, c.admin())
	for _, n := range c.Nodes {
		if out := c.sh(n.Name, "openssl verify -CAfile /etc/kubernetes/pki/ca.crt /var/lib/kubelet/pki/kubelet-server-current.pem"); out == "" {
			t.Errorf("the certificate of the kubelet of %s is not of the new CA", n.Name)
		}
	}
	c.leavesNothingAtWork(t)
}
