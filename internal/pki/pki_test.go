package pki

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"strings"
	"testing"
	"time"
)

var testNow = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func TestIssueServerVerifiesForItsHostsOnly(t *testing.T) {
	ca := newCA(t)
	key, err := NewKey(P256)
	if err != nil {
		t.Fatal(err)
	}
	text, err := ca.IssueServer([]string{"arm.keyfleet.internal", "*.vault.keyfleet.internal", "127.0.0.1"}, key.Public(), testNow, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ParseChain(text)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 || !chain[1].Equal(ca.Certificate()) {
		t.Fatalf("the chain has %d certificates; want leaf and CA", len(chain))
	}
	for _, c := range []struct {
		host   string
		at     time.Time
		ok     bool
		reason string
	}{
		{"arm.keyfleet.internal", testNow, true, "a named host"},
		{"prod1.vault.keyfleet.internal", testNow, true, "under the wildcard"},
		{"127.0.0.1", testNow, true, "an address"},
		{"login.keyfleet.internal", testNow, false, "not named"},
		{"arm.keyfleet.internal", testNow.Add(-4 * time.Minute), true, "a client whose clock is four minutes slow"},
		{"arm.keyfleet.internal", testNow.Add(-6 * time.Minute), false, "before the backdated start"},
		{"arm.keyfleet.internal", testNow.Add(61 * time.Minute), false, "after its end"},
	} {
		_, err := chain[0].Verify(x509.VerifyOptions{DNSName: c.host, Roots: ca.Pool(), CurrentTime: c.at})
		if (err == nil) != c.ok {
			t.Errorf("%s: Verify(%s at %s) = %v", c.reason, c.host, c.at.Format(time.TimeOnly), err)
		}
	}
}

func TestIssueClientIgnoresTheNamesOfTheRequest(t *testing.T) {
	ca := newCA(t)
	key, _ := NewKey(P256)
	text, err := NewCSR(key, Template{Subject: "CN=admin", DNSNames: []string{"arm.keyfleet.internal"}})
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ParseCSR(text)
	if err != nil {
		t.Fatal(err)
	}
	uri, _ := url.Parse("keyfleet://node/pool1/n1")
	out, err := ca.IssueClient("n1", []*url.URL{uri}, csr, testNow, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ParseChain(out)
	if err != nil {
		t.Fatal(err)
	}
	leaf := chain[0]
	if leaf.Subject.CommonName != "n1" || len(leaf.DNSNames) != 0 || len(leaf.URIs) != 1 || leaf.URIs[0].String() != uri.String() {
		t.Errorf("subject %v, DNS %v, URIs %v: want only what the issuer said", leaf.Subject, leaf.DNSNames, leaf.URIs)
	}
	if !Matches(leaf, key) {
		t.Error("the certificate is not for the key of the request")
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: ca.Pool(), CurrentTime: testNow, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("a client certificate verifies as a server's")
	}
}

func TestParseCSRRefuses(t *testing.T) {
	key, _ := NewKey(P256)
	good, err := NewCSR(key, Template{Subject: "CN=x"})
	if err != nil {
		t.Fatal(err)
	}
	tampered := []byte(strings.Replace(string(good), string(good[120:124]), "AAAA", 1))
	for name, in := range map[string][]byte{
		"nothing":              nil,
		"a certificate":        newCA(t).PEM(),
		"a changed request":    tampered,
		"more than the limit":  append(make([]byte, maxCSR), good...),
		"a block without DER":  []byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"),
		"text that is not PEM": []byte("hello"),
	} {
		if _, err := ParseCSR(in); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestCASurvivesPEM(t *testing.T) {
	ca := newCA(t)
	key, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	again, err := LoadCA(ca.PEM(), key)
	if err != nil {
		t.Fatal(err)
	}
	if again.Hash() != ca.Hash() || !strings.HasPrefix(ca.Hash(), "sha256:") {
		t.Errorf("hashes %s and %s", ca.Hash(), again.Hash())
	}
	other, _ := newCA(t).KeyPEM()
	if _, err := LoadCA(ca.PEM(), other); err == nil {
		t.Error("a CA with another CA's key is loaded")
	}
	k, _ := NewKey(P256)
	leaf, err := ca.IssueServer([]string{"x.example"}, k.Public(), testNow, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	leafKey, _ := EncodeKey(k)
	if _, err := LoadCA(leaf, leafKey); err == nil {
		t.Error("an end-entity certificate is loaded as a CA")
	}
}

func TestIssueNeverOutlivesTheCA(t *testing.T) {
	ca := newCA(t)
	end := ca.Certificate().NotAfter
	key, _ := NewKey(P256)
	chain, err := ca.Issue(Template{Subject: "CN=x", NotBefore: end.Add(-time.Hour), NotAfter: end.Add(time.Hour)}, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(chain[0])
	if !leaf.NotAfter.Equal(end) {
		t.Errorf("NotAfter is %s; the CA ends at %s", leaf.NotAfter, end)
	}
	if _, err := ca.Issue(Template{Subject: "CN=x", NotBefore: end, NotAfter: end.Add(time.Hour)}, key.Public()); err == nil {
		t.Error("a CA that has ended still issues")
	}
}

func TestSelfSignCarriesEveryName(t *testing.T) {
	uri, _ := url.Parse("spiffe://example/x")
	for _, kind := range []Kind{RSA2048, P256, P384, P521} {
		key, err := NewKey(kind)
		if err != nil {
			t.Fatal(err)
		}
		der, err := SelfSign(Template{
			Subject: `CN=www.example.org,O="Example, Inc"`, DNSNames: []string{"www.example.org"}, Emails: []string{"a@example.org"},
			UPNs: []string{"b@example.org"}, URIs: []*url.URL{uri}, EKUs: []string{ServerAuth, "1.2.3.4"},
			KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: testNow, NotAfter: testNow.AddDate(0, 1, 0),
		}, key)
		if err != nil {
			t.Fatal(kind, err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(kind, err)
		}
		if got := c.Subject.String(); got != `CN=www.example.org,O=Example\, Inc` {
			t.Errorf("%s: subject %s", kind, got)
		}
		if len(c.DNSNames) != 1 || len(c.EmailAddresses) != 1 || len(c.URIs) != 1 || len(c.UnknownExtKeyUsage) != 1 {
			t.Errorf("%s: names are missing: %v %v %v %v", kind, c.DNSNames, c.EmailAddresses, c.URIs, c.UnknownExtKeyUsage)
		}
		if err := c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		if c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() < 64 {
			t.Errorf("%s: serial %v is not random", kind, c.SerialNumber)
		}
		if !strings.Contains(altNameBytes(c), "b@example.org") {
			t.Errorf("%s: the user principal name is missing", kind)
		}
		if got, _ := KindOf(c.PublicKey); got != kind {
			t.Errorf("KindOf = %s, want %s", got, kind)
		}
	}
}

func altNameBytes(c *x509.Certificate) string {
	for _, e := range c.Extensions {
		if e.Id.Equal(oidAltName) {
			return string(e.Value)
		}
	}
	return ""
}

func TestParseSubject(t *testing.T) {
	for _, c := range []struct {
		in, want, reason string // want as crypto/x509 prints it; empty: refused
	}{
		{"CN=www.contoso.com", "CN=www.contoso.com", "the usual one"},
		{"CN=www, O=Contoso, C=US", "CN=www,O=Contoso,C=US", "spaces after commas are no part of it"},
		{`cn=a\,b`, `CN=a\,b`, "an escaped comma; types are case-insensitive"},
		{`O="a, b"`, `O=a\, b`, "a quoted value"},
		{`CN=a\20`, `CN=a\ `, "an escaped last space stays"},
		{"CN=a b ", "CN=a b", "an unescaped last space goes"},
		{"2.5.4.3=x", "CN=x", "a dotted type"},
		{"CN=a+OU=b", "CN=a+OU=b", "two types in one part"},
		{"CN=Jürgen", "CN=Jürgen", "UTF-8"},
		{"", "", "empty"},
		{"www.contoso.com", "", "no type"},
		{"CN=", "", "no value"},
		{"XX=a", "", "an unknown type"},
		{`CN="a`, "", "an open quote"},
		{`CN=a\`, "", "a backslash at the end"},
		{"CN=a,", "", "a comma at the end"},
		{`CN=\ff`, "", "not UTF-8 after unescaping"},
	} {
		der, err := ParseSubject(c.in)
		if c.want == "" {
			if err == nil {
				t.Errorf("%s: ParseSubject(%q) is accepted", c.reason, c.in)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: ParseSubject(%q): %v", c.reason, c.in, err)
			continue
		}
		var rdns pkix.RDNSequence
		if _, err := asn1.Unmarshal(der, &rdns); err != nil {
			t.Errorf("%s: %v", c.reason, err)
			continue
		}
		var n pkix.Name
		n.FillFromRDNSequence(&rdns)
		if got := rdns.String(); got != c.want {
			t.Errorf("%s: ParseSubject(%q) = %s, want %s", c.reason, c.in, got, c.want)
		}
	}
}

func TestBundlesRoundTrip(t *testing.T) {
	ca := newCA(t)
	for _, kind := range []Kind{RSA2048, P256} {
		key, _ := NewKey(kind)
		chain, err := ca.Issue(Template{Subject: "CN=x", NotBefore: testNow, NotAfter: testNow.Add(time.Hour)}, key.Public())
		if err != nil {
			t.Fatal(err)
		}
		pfx, err := EncodePFX(key, chain)
		if err != nil {
			t.Fatal(err)
		}
		k, certs, err := DecodePFX(pfx, "")
		if err != nil {
			t.Fatal(err)
		}
		if len(certs) != 2 || !Matches(certs[0], k) {
			t.Errorf("%s: the PKCS#12 file has %d certificates, or another key", kind, len(certs))
		}
		if _, _, err := DecodePFX(pfx, "wrong"); err == nil {
			t.Error("a wrong password opens the file")
		}
		text, err := EncodeKey(key)
		if err != nil {
			t.Fatal(err)
		}
		both := append(text, EncodeChain(chain...)...)
		if k, err := ParseKey(both); err != nil || !Matches(certs[0], k) {
			t.Errorf("%s: reading the key back: %v", kind, err)
		}
		if c, err := ParseChain(both); err != nil || len(c) != 2 {
			t.Errorf("%s: reading the chain back: %v", kind, err)
		}
	}
}

func TestEncodePFXWithoutKeyHoldsOnlyCertificates(t *testing.T) {
	ca := newCA(t)
	pfx, err := EncodePFX(nil, [][]byte{ca.Certificate().Raw})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := DecodePFX(pfx, ""); err == nil {
		t.Error("a key was found in a file that has none")
	}
}

func TestRenewAt(t *testing.T) {
	day := 24 * time.Hour
	end := testNow.Add(100 * day)
	for _, c := range []struct {
		trigger Trigger
		want    time.Time
		reason  string
	}{
		{Trigger{DaysBeforeExpiry: 30}, testNow.Add(70 * day), "days count back from the end"},
		{Trigger{LifetimePercentage: 80}, testNow.Add(80 * day), "percent count from the start"},
		{Trigger{LifetimePercentage: 1}, testNow.Add(day), "the documented way to see a renewal soon"},
		{Trigger{DaysBeforeExpiry: 100}, testNow, "as long as the life: at once"},
		{Trigger{DaysBeforeExpiry: 500}, testNow, "longer than the life: at once, not in the past"},
		{Trigger{}, time.Time{}, "no trigger: never"},
	} {
		if got := RenewAt(testNow, end, c.trigger); !got.Equal(c.want) {
			t.Errorf("%s: RenewAt(%+v) = %s, want %s", c.reason, c.trigger, got, c.want)
		}
	}
}

func TestErrorsNeverShowTheKey(t *testing.T) {
	key, _ := NewKey(P256)
	text, _ := EncodeKey(key)
	body := strings.Split(string(text), "\n")[1]
	broken := strings.Replace(string(text), "MIG", "XIG", 1)
	if _, err := ParseKey([]byte(broken)); err == nil || strings.Contains(err.Error(), body[10:30]) {
		t.Errorf("the error is %v", err)
	}
}

func newCA(t testing.TB) *CA {
	t.Helper()
	ca, err := NewCA("Keyfleet test CA", testNow)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func FuzzParseSubject(f *testing.F) {
	for _, s := range []string{"CN=www.contoso.com", `CN=a\,b, O="c, d", C=US`, "2.5.4.3=x", "CN=a+OU=b", `CN=\41\ `} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		der, err := ParseSubject(s)
		if err != nil {
			return
		}
		var rdns pkix.RDNSequence
		if rest, err := asn1.Unmarshal(der, &rdns); err != nil || len(rest) != 0 || len(rdns) == 0 {
			t.Errorf("ParseSubject(%q) is no name: %v", s, err)
		}
	})
}

func FuzzParsePEM(f *testing.F) {
	ca := newCA(f)
	key, _ := ca.KeyPEM()
	csr, _ := NewCSR(ca.key, Template{Subject: "CN=x"})
	f.Add(ca.PEM())
	f.Add(key)
	f.Add(csr)
	f.Add(append(key, ca.PEM()...))
	f.Fuzz(func(t *testing.T, in []byte) {
		if c, err := ParseChain(in); err == nil && len(c) == 0 {
			t.Error("an empty chain without an error")
		}
		if k, err := ParseKey(in); err == nil && k == nil {
			t.Error("no key and no error")
		}
		if r, err := ParseCSR(in); err == nil && r.CheckSignature() != nil {
			t.Error("a request with a wrong signature is accepted")
		}
	})
}
