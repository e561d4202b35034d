//go:build linux

package rotation

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/test/bed"
)

// TestAKSEngine rotates a cluster of the layout aks-engine, whose machines share
// their keys: nobody notices, and the API model and etcd follow.
func TestAKSEngine(t *testing.T) {
	masters, workers := 1, 1
	if deep() {
		masters = 3
	}
	c := upAs(t, bed.LayoutAKSEngine, masters, workers, "")
	before := c.modelText()
	if masters > 1 {
		if !t.Run("a rotation", c.losesNoRequest) {
			return
		}
	} else if status, _ := c.call("--restart-pods"); status != 0 {
		t.Fatalf("exit status %d", status)
	}
	t.Run("the API model follows", func(t *testing.T) { c.in(t).modelFollows(before) })
	t.Run("the copies in etcd follow", func(t *testing.T) { c.in(t).copiesFollow() })
	t.Run("it works", func(t *testing.T) { c.in(t).worksFor(t, c.admin()) })
	t.Run("it leaves nothing at work", c.leavesNothingAtWork)
}

func (c *cluster) modelText() []byte {
	c.t.Helper()
	text, err := os.ReadFile(c.APIModel)
	if err != nil {
		c.t.Fatal(err)
	}
	return text
}

// modelFollows: the file differs in the certificate profile only, and that is what
// is on the machines.
func (c *cluster) modelFollows(before []byte) {
	c.t.Helper()
	after := c.modelText()
	old, err := apimodel.Parse(before)
	if err != nil {
		c.t.Fatal(err)
	}
	now, err := apimodel.Parse(after)
	if err != nil {
		c.t.Fatal(err)
	}
	if same, err := old.With(now.Profile); err != nil || !bytes.Equal(same, after) {
		c.t.Errorf("more than the certificate profile changed (%v)", err)
	}
	for entry, file := range map[string]string{
		"caCertificate": "ca.crt", "caPrivateKey": "ca.key", "apiServerCertificate": "apiserver.crt", "apiServerPrivateKey": "apiserver.key",
		"clientCertificate": "client.crt", "etcdServerPrivateKey": "etcdserver.key", "etcdClientCertificate": "etcdclient.crt", "etcdPeerCertificates/0": "etcdpeer0.crt",
	} {
		if got := c.sh("master-0", "cat /etc/kubernetes/certs/"+file); strings.TrimSpace(got) != strings.TrimSpace(string(now.Profile[entry])) {
			c.t.Errorf("%s is not what is in %s", entry, file)
		}
		if bytes.Equal(old.Profile[entry], now.Profile[entry]) {
			c.t.Errorf("%s is as it was", entry)
		}
	}
}

// copiesFollow: a master that joins reads the front proxy's certificates in etcd.
func (c *cluster) copiesFollow() {
	c.t.Helper()
	for key, file := range map[string]string{"requestheader-client-ca-file": "proxy-ca.crt", "proxy-client-cert-file": "proxy.crt", "proxy-client-key-file": "proxy.key"} {
		get := fmt.Sprintf(`cd /etc/kubernetes/certs && etcdctl --endpoints https://127.0.0.1:2379 --cacert ca.crt --cert etcdclient.crt --key etcdclient.key get /proxycerts/%s --print-value-only`, key)
		if got, want := c.sh("master-0", get), c.sh("master-0", "cat /etc/kubernetes/certs/"+file); strings.TrimSpace(got) != strings.TrimSpace(want) {
			c.t.Errorf("/proxycerts/%s is not what is in %s", key, file)
		}
	}
}
