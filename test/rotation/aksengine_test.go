//go:build linux

package rotation

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/test/bed"
)

// TestAKSEngine rotates a cluster of the layout aks-engine, whose machines share
// their keys: nobody notices, and the API model and etcd follow.
func TestAKSEngine(t *testing.T) {
	if !deep() {
		t.Skip("its plan and files are looked at in internal/rotation; on a cluster in make test-deep")
	}
	c := upAs(t, bed.LayoutAKSEngine, 3, 1, "")
	before := c.modelText()
	if !t.Run("a rotation", c.losesNoRequest) {
		return
	}
	t.Run("the API model follows", func(t *testing.T) { c.in(t).modelFollows(before) })
	t.Run("the copies in etcd follow", func(t *testing.T) { c.in(t).copiesFollow() })
	t.Run("it works", func(t *testing.T) { c.in(t).worksFor(t, c.admin()) })
	t.Run("it leaves nothing at work", c.leavesNothingAtWork)
	t.Run("a profile that cannot be used changes nothing", func(t *testing.T) { c.in(t).refusesProfile() })
	if t.Failed() {
		return
	}
	t.Run("a profile of the operator's is what the cluster gets", func(t *testing.T) { c.in(t).takesProfile() })
}

// ownProfile is a new CA and certificates of it, as an operator may make them: as
// aks-engine does, with the name of the old CA.
func (c *cluster) ownProfile() apimodel.Profile {
	c.t.Helper()
	m, err := apimodel.Parse(c.modelText())
	if err != nil {
		c.t.Fatal(err)
	}
	newKey := func() *rsa.PrivateKey {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			c.t.Fatal(err)
		}
		return key
	}
	encode := func(key *rsa.PrivateKey) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	}
	old, err := pki.ParseChain(m.Profile["caCertificate"])
	if err != nil {
		c.t.Fatal(err)
	}
	caKey := newKey()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), RawSubject: old[0].RawSubject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, SubjectKeyId: []byte("the new one"),
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		c.t.Fatal(err)
	}
	if ca, err = x509.ParseCertificate(der); err != nil {
		c.t.Fatal(err)
	}
	p := apimodel.Profile{"caCertificate": pki.EncodeChain(der), "caPrivateKey": encode(caKey)}
	for _, entry := range apimodel.Names(m.Masters) {
		if p[entry] != nil || !strings.Contains(entry, "Certificate") {
			continue
		}
		like, err := pki.ParseChain(m.Profile[entry])
		if err != nil {
			c.t.Fatal(err)
		}
		key := newKey()
		leaf, err := pki.Reissue(like[0], key.Public(), ca, caKey, time.Now(), 900*time.Hour)
		if err != nil {
			c.t.Fatal(err)
		}
		p[entry], p[strings.Replace(entry, "Certificate", "PrivateKey", 1)] = pki.EncodeChain(leaf), encode(key)
	}
	return p
}

// profileFile writes a profile as the flag takes it; wrapped is the shape of
// aks-engine's guide, the other that of its loader.
func (c *cluster) profileFile(p apimodel.Profile, wrapped bool) string {
	c.t.Helper()
	doc := map[string]any{}
	lists := map[string][]string{}
	for _, entry := range slices.Sorted(maps.Keys(p)) { // peers in their order
		if list, _, is := strings.Cut(entry, "/"); is {
			lists[list] = append(lists[list], string(p[entry]))
			doc[list] = lists[list]
		} else {
			doc[entry] = string(p[entry])
		}
	}
	var whole any = doc
	if wrapped {
		whole = map[string]any{"certificateProfile": doc}
	}
	text, err := json.Marshal(whole)
	if err != nil {
		c.t.Fatal(err)
	}
	path := filepath.Join(c.t.TempDir(), "profile.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// refusesProfile: what is wrong is said, all of it, and there is not even a journal.
func (c *cluster) refusesProfile() {
	c.t.Helper()
	p := c.ownProfile()
	p["clientPrivateKey"] = p["etcdClientPrivateKey"]
	delete(p, "kubeConfigCertificate")
	before, model := c.keys("master-0"), c.modelText()
	runs := c.newest()
	status, said := c.call("--certificate-profile", c.profileFile(p, true))
	if status != 1 || !strings.Contains(said, "clientPrivateKey") && !strings.Contains(said, "clientCertificate") || !strings.Contains(said, "kubeConfigCertificate") {
		c.t.Errorf("exit status %d:\n%s", status, said)
	}
	if strings.Contains(said, "PRIVATE KEY") {
		c.t.Error("it shows a key")
	}
	if !maps.Equal(before, c.keys("master-0")) || !bytes.Equal(model, c.modelText()) || c.newest() != runs {
		c.t.Error("something was changed")
	}
}

// takesProfile rotates to a profile, without its wrapping.
func (c *cluster) takesProfile() {
	c.t.Helper()
	p := c.ownProfile()
	if status, said := c.call("--restart-pods", "--certificate-profile", c.profileFile(p, false)); status != 0 || !strings.Contains(said, "has the name of the old one") {
		c.t.Fatalf("exit status %d", status)
	}
	m, err := apimodel.Parse(c.modelText())
	if err != nil {
		c.t.Fatal(err)
	}
	for entry, text := range p {
		if !bytes.Equal(bytes.TrimSpace(m.Profile[entry]), bytes.TrimSpace(text)) {
			c.t.Errorf("%s of the API model is not what was given", entry)
		}
	}
	if got := c.sh("master-0", "cat /etc/kubernetes/certs/apiserver.crt"); strings.TrimSpace(got) != strings.TrimSpace(string(p["apiServerCertificate"])) {
		c.t.Error("apiserver.crt is not what was given")
	}
	c.worksFor(c.t, c.admin())
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
