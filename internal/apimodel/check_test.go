package apimodel

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"maps"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// authority makes the certificates of the tests.
type authority struct {
	t       *testing.T
	now     time.Time
	key     *rsa.PrivateKey
	cert    *x509.Certificate
	leafKey *rsa.PrivateKey // of all leaves: making one takes long
}

func newAuthority(t *testing.T, now time.Time) *authority {
	t.Helper()
	a := &authority{t: t, now: now, key: newRSA(t), leafKey: newRSA(t)}
	a.cert = a.issue(&x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, a.key.Public())
	return a
}

func newRSA(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// issue signs a certificate that is valid for a year around now unless it says otherwise.
func (a *authority) issue(c *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	a.t.Helper()
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = a.now.AddDate(0, -6, 0), a.now.AddDate(0, 6, 0)
	}
	parent := a.cert
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return out
}

// leaf is a certificate that is good for every entry.
func (a *authority) leaf(change func(*x509.Certificate)) []byte {
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: "leaf"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames: []string{"my-cluster.westus2.cloudapp.azure.com", "*.example.org"}, IPAddresses: []net.IP{net.IPv4(10, 240, 255, 5)},
	}
	if change != nil {
		change(c)
	}
	return certPEM(a.issue(c, a.leafKey.Public()))
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func keyPEM(k *rsa.PrivateKey) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)})
}

func (a *authority) profile(peers int) Profile {
	p := Profile{"caCertificate": certPEM(a.cert), "caPrivateKey": keyPEM(a.key)}
	leaf := a.leaf(nil)
	for _, name := range Names(peers) {
		if p[name] == nil && keyOf(name) != "" {
			p[name], p[keyOf(name)] = leaf, keyPEM(a.leafKey)
		}
	}
	return p
}

// other returns keys in the forms that aks-engine does not read.
func pkcs8(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func TestCheck(t *testing.T) {
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	a, b := newAuthority(t, now), newAuthority(t, now)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	served := map[string]ServedNames{"apiServerCertificate": {
		DNS: []string{"My-Cluster.westus2.cloudapp.azure.com", "a.example.org"},
		IPs: []net.IP{net.IPv4(10, 240, 255, 5).To4()},
	}}
	with := func(entry string, value []byte) func(Profile) { return func(p Profile) { p[entry] = value } }
	leaf := func(entry string, change func(*x509.Certificate)) func(Profile) { return with(entry, a.leaf(change)) }
	for _, tc := range []struct {
		reason string
		change func(Profile)
		want   []string // "entry: text", in order; none: it may be used
	}{
		{reason: "all is well", change: func(Profile) {}},
		{"nothing is there", func(p Profile) { clear(p) }, []string{"caCertificate: it is missing", "caPrivateKey: it is missing", "etcdPeerPrivateKeys/2: it is missing"}},
		{"a peer too few", func(p Profile) { delete(p, "etcdPeerCertificates/2"); delete(p, "etcdPeerPrivateKeys/2") }, []string{"etcdPeerCertificates/2: it is missing", "etcdPeerPrivateKeys/2: it is missing"}},
		{"a peer too many", with("etcdPeerCertificates/3", a.leaf(nil)), []string{"etcdPeerCertificates/3: there are only 3 members"}},
		{"an unknown entry", with("frontProxy", nil), []string{"frontProxy: it is not an entry"}},
		{"no certificate", with("clientCertificate", []byte("x")), []string{"clientCertificate: it is not a certificate in PEM"}},
		{"no key", with("clientPrivateKey", a.leaf(nil)), []string{"clientPrivateKey: it holds no private key"}},
		{"a broken key", with("clientPrivateKey", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: []byte("hunter2")})), []string{"clientPrivateKey: it is not a key"}},
		{"another's key", with("clientPrivateKey", keyPEM(a.key)), []string{"clientPrivateKey: it is not the key of clientCertificate"}},
		{"another CA's key", with("caPrivateKey", keyPEM(b.key)), []string{"caPrivateKey: it is not the key of caCertificate"}},
		{"a key in PKCS#8", with("apiServerPrivateKey", pkcs8(t, a.leafKey)), []string{"apiServerPrivateKey: it is in PKCS#8, which aks-engine does not read: convert it with openssl rsa -traditional"}},
		{"an EC key", with("apiServerPrivateKey", pkcs8(t, ec)), []string{"apiServerPrivateKey: it is not an RSA key"}},
		{"a key with a passphrase", with("apiServerPrivateKey", pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")})), []string{"apiServerPrivateKey: the key has a passphrase"}},
		{"a leaf as CA", func(p Profile) { p["caCertificate"], p["caPrivateKey"] = a.leaf(nil), keyPEM(a.leafKey) }, []string{"caCertificate: it is not the certificate of a CA"}},
		{"two CAs", with("caCertificate", append(certPEM(a.cert), certPEM(b.cert)...)), []string{"caCertificate: it holds 2 certificates"}},
		{"the CA as leaf", func(p Profile) { p["clientCertificate"], p["clientPrivateKey"] = certPEM(a.cert), keyPEM(a.key) }, []string{"clientCertificate: it is the certificate of the CA"}},
		{"a leaf of another CA", func(p Profile) {
			p["clientCertificate"], p["clientPrivateKey"] = b.leaf(nil), keyPEM(b.leafKey)
		}, []string{"clientCertificate: it does not come from the CA in caCertificate: x509: certificate signed by unknown authority"}},
		{"it has expired", leaf("clientCertificate", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.AddDate(-1, 0, 0), now.Add(-time.Hour) }), []string{"clientCertificate: CN=leaf has expired on 2026-11-28T11:00:00Z"}},
		{"it is not valid yet", leaf("clientCertificate", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(time.Hour), now.AddDate(1, 0, 0) }), []string{"clientCertificate: CN=leaf is not valid before 2026-11-28T13:00:00Z"}},
		{"a client as server", leaf("apiServerCertificate", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }), []string{"apiServerCertificate: its extended key usages are without serverAuth"}},
		{"a server as client", leaf("kubeConfigCertificate", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), []string{"kubeConfigCertificate: its extended key usages are without clientAuth"}},
		{"a peer that is a server only", leaf("etcdPeerCertificates/1", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), []string{"etcdPeerCertificates/1: its extended key usages are without clientAuth"}},
		{reason: "no usages: any", change: leaf("apiServerCertificate", func(c *x509.Certificate) { c.ExtKeyUsage = nil })},
		{"names are missing", leaf("apiServerCertificate", func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = c.DNSNames[1:], nil }), []string{"apiServerCertificate: it is without My-Cluster.westus2.cloudapp.azure.com, 10.240.255.5, which"}},
	} {
		p := a.profile(3)
		tc.change(p)
		err := Check(p, Requirements{Now: now, Peers: 3, Served: served})
		if len(tc.want) == 0 {
			if err != nil {
				t.Errorf("%s: %v", tc.reason, err)
			}
			continue
		}
		var e *fault.Error
		if !errors.As(err, &e) || e.Kind != fault.Invalid || e.Fix == "" {
			t.Errorf("%s: %v, want a fault with a fix", tc.reason, err)
			continue
		}
		var got []string
		for _, d := range e.Details {
			got = append(got, d.Target+": "+d.Message)
		}
		if len(got) != len(tc.want) && tc.reason != "nothing is there" {
			t.Errorf("%s: %d faults, want %d:\n%s", tc.reason, len(got), len(tc.want), strings.Join(got, "\n"))
		}
		for _, want := range tc.want {
			if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, want) }) || !strings.Contains(e.Message, want) {
				t.Errorf("%s: nothing begins with %q:\n%s\n%s", tc.reason, want, strings.Join(got, "\n"), e.Message)
			}
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: a key is shown", tc.reason)
		}
	}
}

// TestCheckSaysAllAtOnce: nobody corrects a file eighteen times.
func TestCheckSaysAllAtOnce(t *testing.T) {
	var e *fault.Error
	if err := Check(Profile{}, Requirements{Now: time.Now(), Peers: 3}); !errors.As(err, &e) || len(e.Details) != len(Names(3)) {
		t.Errorf("an empty profile: %v", err)
	}
}

func TestNamesAndTheirKeys(t *testing.T) {
	pairs := map[string]string{}
	for _, name := range Names(2) {
		if key := keyOf(name); key != "" {
			pairs[name] = key
		}
	}
	want := map[string]string{
		"caCertificate": "caPrivateKey", "apiServerCertificate": "apiServerPrivateKey", "clientCertificate": "clientPrivateKey",
		"kubeConfigCertificate": "kubeConfigPrivateKey", "etcdServerCertificate": "etcdServerPrivateKey", "etcdClientCertificate": "etcdClientPrivateKey",
		"etcdPeerCertificates/0": "etcdPeerPrivateKeys/0", "etcdPeerCertificates/1": "etcdPeerPrivateKeys/1",
	}
	if !maps.Equal(pairs, want) {
		t.Errorf("pairs are %v", pairs)
	}
}
