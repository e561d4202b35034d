package keyvaultext

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
	pkcs12 "software.sslmate.com/src/go-pkcs12"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
)

// chainOf issues a chain of n certificates, leaf first, root last.
func chainOf(t *testing.T, n int) ([]*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	var parent *x509.Certificate
	var parentKey *ecdsa.PrivateKey
	out := make([]*x509.Certificate, n)
	for i := n - 1; i >= 0; i-- {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: fmt.Sprintf("certificate %d of %d", i, n)},
			NotBefore: time.Unix(1.7e9, 0), NotAfter: time.Unix(1.8e9, 0), IsCA: i > 0, BasicConstraintsValid: true,
		}
		if i > 0 {
			template.KeyUsage = x509.KeyUsageCertSign
		}
		if parent == nil {
			parent, parentKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
		if err != nil {
			t.Fatal(err)
		}
		if out[i], err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		parent, parentKey = out[i], key
	}
	return out, parentKey
}

func pemOf(blockType string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: blockType, Bytes: der}))
}

// TestAnyOrderGivesTheDocumentedOne: whatever the order and form of the
// secret, the file is leaf, issuers in issuing order, key.
func TestAnyOrderGivesTheDocumentedOne(t *testing.T) {
	chains := map[int][]*x509.Certificate{}
	keys := map[int]*ecdsa.PrivateKey{}
	for n := 1; n <= 5; n++ {
		chains[n], keys[n] = chainOf(t, n)
	}
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(1, 5).Draw(rt, "certificates")
		withRoot := n == 1 || rapid.Bool().Draw(rt, "root")
		want := chains[n]
		if !withRoot {
			want = want[:n-1]
		}
		pkcs8, _ := x509.MarshalPKCS8PrivateKey(keys[n])
		sec1, _ := x509.MarshalECPrivateKey(keys[n])
		var value, form string
		switch form = rapid.SampledFrom([]string{"pem", "pem-sec1", "pfx", "pfx-old"}).Draw(rt, "form"); form {
		case "pem", "pem-sec1":
			blocks := []string{pemOf("PRIVATE KEY", pkcs8)}
			if form == "pem-sec1" {
				blocks[0] = pemOf("EC PRIVATE KEY", sec1)
			}
			for _, c := range want {
				blocks = append(blocks, pemOf("CERTIFICATE", c.Raw))
			}
			value = strings.Join(rapid.Permutation(blocks).Draw(rt, "order"), rapid.SampledFrom([]string{"", "\r\n", "Bag Attributes\n"}).Draw(rt, "between"))
		default:
			encoder := pkcs12.Modern2023
			if form == "pfx-old" {
				encoder = pkcs12.LegacyDES
			}
			pfx, err := encoder.Encode(keys[n], want[0], rapid.Permutation(want[1:]).Draw(rt, "order"), "")
			if err != nil {
				rt.Fatal(err)
			}
			value = base64.StdEncoding.EncodeToString(pfx)
		}
		b, err := parseBundle("", newSecret(value))
		if err != nil {
			rt.Fatalf("%s: %v", form, err)
		}
		got := append([]*x509.Certificate{b.leaf}, b.chain...)
		if len(got) != len(want) {
			rt.Fatalf("%d certificates, want %d", len(got), len(want))
		}
		for i := range got {
			if !got[i].Equal(want[i]) {
				rt.Fatalf("certificate %d is %s", i, got[i].Subject)
			}
		}
		text, err := b.encode()
		if err != nil {
			rt.Fatal(err)
		}
		if _, err := tls.X509KeyPair([]byte(text.reveal()), []byte(text.reveal())); err != nil {
			rt.Fatalf("the file is not usable: %v", err)
		}
		if !strings.HasSuffix(strings.TrimSpace(text.reveal()), "-----END PRIVATE KEY-----") {
			rt.Fatal("the key is not last")
		}
	})
}

func TestBundlesThatAreRefused(t *testing.T) {
	certs, key := chainOf(t, 2)
	stranger, _ := rsa.GenerateKey(rand.Reader, 2048)
	der, _ := x509.MarshalPKCS8PrivateKey(key)
	leaf := pemOf("CERTIFICATE", certs[0].Raw)
	locked, _ := pkcs12.Modern2023.Encode(key, certs[0], nil, "a password")
	endless, _ := pkcs12.Modern2023.WithIterations(1<<16).Encode(key, certs[0], nil, "")
	endless = bytes.ReplaceAll(endless, []byte{2, 3, 1, 0, 0}, []byte{2, 3, 0x7f, 0xff, 0xff}) // 65,536 becomes 8,388,607
	cases := []struct{ why, value, code string }{
		{"a PFX that takes minutes to open", base64.StdEncoding.EncodeToString(endless), "NotACertificate"},
		{"an empty secret", " ", "NotACertificate"},
		{"a secret that is a password", "hunter2!", "NotACertificate"},
		{"base64 of something else", "aGVsbG8=", "NotACertificate"},
		{"a PFX with a password", base64.StdEncoding.EncodeToString(locked), "NotACertificate"},
		{"a key that was not exportable", leaf, "NoPrivateKey"},
		{"a key without certificate", pemOf("PRIVATE KEY", der), "NotACertificate"},
		{"another certificate's key", leaf + pemOf("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(stranger)), "KeyMismatch"},
		{"two keys", leaf + pemOf("PRIVATE KEY", der) + pemOf("PRIVATE KEY", der), "NotACertificate"},
		{"a broken certificate", pemOf("CERTIFICATE", []byte("x")) + pemOf("PRIVATE KEY", der), "NotACertificate"},
		{"a broken key", leaf + pemOf("PRIVATE KEY", []byte("x")), "NotACertificate"},
	}
	for _, c := range cases {
		_, err := parseBundle("", newSecret(c.value))
		f := fault.From(err)
		if err == nil || f.Code != c.code || f.Fix == "" {
			t.Errorf("%s: %v, want %s", c.why, err, c.code)
		}
		if strings.Contains(c.why, "minutes") && !strings.Contains(f.Error(), "8388607 iterations") {
			t.Errorf("%s: %v", c.why, err)
		}
		if len(c.value) > 20 && strings.Contains(f.Error(), c.value[:20]) {
			t.Errorf("%s: the error quotes the secret: %v", c.why, err)
		}
	}
}

func FuzzBundle(f *testing.F) {
	d := keyvaulttest.Start(f)
	for _, form := range []string{keyvaulttest.PEM, keyvaulttest.PKCS12} {
		f.Add(form, d.Renew("v", "x", form).Value)
	}
	f.Add("", "hunter2")
	f.Fuzz(func(t *testing.T, contentType, value string) {
		b, err := parseBundle(contentType, newSecret(value))
		if err != nil {
			if fault.From(err).Code == "" {
				t.Errorf("an unexplained error: %v", err)
			}
			return
		}
		text, err := b.encode()
		if err != nil {
			return
		}
		if _, err := tls.X509KeyPair([]byte(text.reveal()), []byte(text.reveal())); err != nil {
			t.Errorf("accepted, but not usable: %v", err)
		}
	})
}
