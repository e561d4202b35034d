package pki

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"
)

// oldCA is a CA as kubeadm makes it, with a leaf.
func oldCA(t *testing.T, notAfter time.Time) (*x509.Certificate, *x509.Certificate, *Successor, time.Time) {
	t.Helper()
	now := time.Now()
	key, err := NewKey(P256)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"}, DNSNames: []string{"kubernetes"}, NotBefore: now.Add(-time.Hour), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	parse := func(der []byte, err error) *x509.Certificate {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	ca := parse(create(tmpl, tmpl, key.Public(), key))
	leaf := parse(create(&x509.Certificate{
		Subject: pkix.Name{CommonName: "kube-apiserver", Organization: []string{"o"}}, DNSNames: []string{"kubernetes.default"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)},
		NotBefore: now.Add(-time.Hour), NotAfter: notAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ca, key.Public(), key))
	s, err := Succeed(ca, key, now, 10*365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca, leaf, s, now
}

func TestSuccessorIsAcceptedByWhoKnowsEitherCA(t *testing.T) {
	ca, leaf, s, now := oldCA(t, time.Now().Add(24*time.Hour))
	root, err := x509.ParseCertificate(s.Root)
	if err != nil {
		t.Fatal(err)
	}
	cross, err := x509.ParseCertificate(s.Cross)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(root.Subject.CommonName, "kubernetes-") || root.Subject.String() != cross.Subject.String() || cross.NotAfter.After(ca.NotAfter) {
		t.Errorf("successor %s, cross %s until %s", root.Subject, cross.Subject, cross.NotAfter)
	}
	key, err := NewKey(P256)
	if err != nil {
		t.Fatal(err)
	}
	der, err := Reissue(leaf, key.Public(), root, s.Key, now, 365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if fresh.Subject.String() != leaf.Subject.String() || fresh.VerifyHostname("kubernetes.default") != nil || fresh.VerifyHostname("10.0.0.1") != nil {
		t.Errorf("reissued for %s, %v, %v", fresh.Subject, fresh.DNSNames, fresh.IPAddresses)
	}
	for name, tc := range map[string]struct {
		roots *x509.Certificate
		chain []*x509.Certificate
		want  bool
	}{
		"the old CA, with the cross certificate": {ca, []*x509.Certificate{cross}, true},
		"the old CA alone":                       {ca, nil, false},
		"the new CA alone":                       {root, nil, true},
		"the new CA, with the cross certificate": {root, []*x509.Certificate{cross}, true},
	} {
		roots, chain := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(tc.roots)
		for _, c := range tc.chain {
			chain.AddCert(c)
		}
		if _, err := fresh.Verify(x509.VerifyOptions{Roots: roots, Intermediates: chain}); (err == nil) != tc.want {
			t.Errorf("who knows %s: %v, want accepted %t", name, err, tc.want)
		}
	}
}

func TestSuccessorOfASuccessorHasOneDate(t *testing.T) {
	_, _, s, now := oldCA(t, time.Now().Add(24*time.Hour))
	root, err := x509.ParseCertificate(s.Root)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Succeed(root, s.Key, now, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(again.Root)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(c.Subject.CommonName, "-"); n != 2 || c.Subject.CommonName == root.Subject.CommonName {
		t.Errorf("the successor of %s is called %s", root.Subject.CommonName, c.Subject.CommonName)
	}
}

func TestCAThatHasEndedCertifiesNobody(t *testing.T) {
	if _, _, s, _ := oldCA(t, time.Now().Add(-time.Minute)); s.Cross != nil {
		t.Error("an ended CA has certified its successor")
	}
}
