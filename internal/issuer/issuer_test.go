package issuer_test

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/issuer"
	"keyfleet.dev/keyfleet/internal/issuer/issuertest"
)

const payload = `{"sub":"system:serviceaccount:shop:web"}`

func TestVerify(t *testing.T) {
	mine, ec, stranger := issuertest.RSA(t, "k1"), issuertest.EC(t, "k2"), issuertest.RSA(t, "k1")
	unknown := mine
	unknown.KeyID = "k9"
	nameless := mine
	nameless.KeyID = ""
	genuine := issuertest.Sign(t, mine, payload)
	cases := []struct {
		reason string
		jws    string
		break_ func(*issuertest.Issuer)
		kind   error // nil: it is accepted
		says   string
	}{
		{"RSA", genuine, nil, nil, ""},
		{"elliptic curve", issuertest.Sign(t, ec, payload), nil, nil, ""},
		{"without a key id", issuertest.Sign(t, nameless, payload), nil, nil, ""},
		{"somebody else's key under a known id", issuertest.Sign(t, stranger, payload), nil, fault.Unauthenticated, "does not fit the issuer's key 'k1'"},
		{"a key id that is not published", issuertest.Sign(t, unknown, payload), nil, fault.Unauthenticated, "'k9' is not among the 2"},
		{"another payload under the signature", swap(genuine), nil, fault.Unauthenticated, "does not fit"},
		{"alg none", "eyJhbGciOiJub25lIn0." + strings.Split(genuine, ".")[1] + ".", nil, fault.Unauthenticated, "not a JWT"},
		{"the public key as the secret of an HMAC", hmacWith(t, mine), nil, fault.Unauthenticated, "not a JWT"},
		{"no JWT", "hello", nil, fault.Unauthenticated, "not a JWT"},
		{"the document is of another issuer", genuine, func(p *issuertest.Issuer) { p.Name = "https://other.example" }, fault.Unavailable, "of the issuer 'https://other.example'"},
		{"the document's issuer has one more slash", genuine, func(p *issuertest.Issuer) { p.Name = p.URL + "/" }, fault.Unavailable, "of the issuer"},
		{"keys over plain HTTP", genuine, func(p *issuertest.Issuer) { p.KeysURL = "http://127.0.0.1:1/keys" }, fault.Unavailable, "not an https URL"},
		{"a redirect", genuine, func(p *issuertest.Issuer) { p.Status = http.StatusFound }, fault.Unavailable, "302"},
		{"an error", genuine, func(p *issuertest.Issuer) { p.Status = http.StatusForbidden }, fault.Unavailable, "403"},
		{"keys that are none", genuine, func(p *issuertest.Issuer) { p.Body = "<html>" }, fault.Unavailable, "no JSON Web Key Set"},
		{"no keys", genuine, func(p *issuertest.Issuer) { p.Body = `{"keys":[]}` }, fault.Unavailable, "no usable key"},
		{"a document without end", genuine, func(p *issuertest.Issuer) { p.Body = strings.Repeat(" ", 2<<20) }, fault.Unavailable, "more than"},
		{"a key to sign with, published by mistake", genuine, func(p *issuertest.Issuer) { p.Body = private(t, mine) }, fault.Unavailable, "no usable key"},
	}
	for _, tc := range cases {
		t.Run(tc.reason, func(t *testing.T) {
			p := issuertest.New(t)
			p.Keys = []jose.JSONWebKey{mine, ec}
			if tc.break_ != nil {
				tc.break_(p)
			}
			got, err := issuer.New(issuer.Config{Roots: p.Roots()}).Verify(t.Context(), p.URL, "", tc.jws)
			if tc.kind == nil {
				if err != nil || string(got) != payload {
					t.Fatalf("%s, %v", got, err)
				}
				return
			}
			if !errors.Is(err, tc.kind) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%v, want %v that says %q", err, tc.kind, tc.says)
			}
		})
	}
}

// swap puts another payload under a signature.
func swap(jws string) string {
	parts := strings.Split(jws, ".")
	parts[1] = "eyJzdWIiOiJyb290In0"
	return strings.Join(parts, ".")
}

// hmacWith signs with the public key as an HMAC secret, as in an attack that is
// as old as JWTs.
func hmacWith(t *testing.T, k jose.JSONWebKey) string {
	t.Helper()
	public, ok := k.Public().Key.(*rsa.PublicKey)
	if !ok {
		t.Fatal("no RSA key")
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: x509.MarshalPKCS1PublicKey(public)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o, err := s.Sign([]byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	text, _ := o.CompactSerialize()
	return text
}

func private(t *testing.T, k jose.JSONWebKey) string {
	t.Helper()
	text, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{k}})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestServersThatNobodyVouchesFor(t *testing.T) {
	p := issuertest.New(t)
	k := issuertest.RSA(t, "k1")
	p.Keys = []jose.JSONWebKey{k}
	_, err := issuer.New(issuer.Config{}).Verify(t.Context(), p.URL, "", issuertest.Sign(t, k, payload))
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("%v, want one about the certificate", err)
	}
}

// TestKeysChange follows an issuer through a rotation of its keys and an outage.
func TestKeysChange(t *testing.T) {
	p := issuertest.New(t)
	first, second := issuertest.RSA(t, "k1"), issuertest.RSA(t, "k2")
	p.Keys = []jose.JSONWebKey{first}
	now := time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)
	c := issuer.New(issuer.Config{Roots: p.Roots(), Now: func() time.Time { return now }})
	verify := func(k jose.JSONWebKey) error {
		_, err := c.Verify(t.Context(), p.URL, "", issuertest.Sign(t, k, payload))
		return err
	}
	requests := func(want int32) {
		t.Helper()
		if n := p.Requests.Swap(0); n != want {
			t.Errorf("%d requests, want %d", n, want)
		}
	}
	for range 3 {
		if err := verify(first); err != nil {
			t.Fatal(err)
		}
	}
	requests(1)

	now = now.Add(time.Minute)
	p.Keys = append(p.Keys, second)
	if err := verify(second); err != nil {
		t.Fatalf("a key that was just added: %v", err)
	}
	requests(1)
	for range 10 { // strangers cannot make us ask all the time
		if err := verify(issuertest.RSA(t, "k3")); !errors.Is(err, fault.Unauthenticated) {
			t.Fatal(err)
		}
	}
	requests(0)

	p.Keys = p.Keys[1:]
	now = now.Add(6 * time.Minute)
	if err := verify(first); !errors.Is(err, fault.Unauthenticated) {
		t.Errorf("a key that was taken away: %v", err)
	}
	requests(1)

	p.Status = http.StatusServiceUnavailable
	now = now.Add(30 * time.Minute)
	if err := verify(second); err != nil {
		t.Errorf("half an hour of outage: %v", err)
	}
	now = now.Add(40 * time.Minute)
	if err := verify(second); !errors.Is(err, fault.Unavailable) {
		t.Errorf("more than an hour of outage: %v", err)
	}
	p.Status = 0
	now = now.Add(10 * time.Second)
	if err := verify(second); err != nil {
		t.Errorf("it is back: %v", err)
	}
}

// TestPublished: two clusters that call their issuer the same have their own keys,
// and are not asked.
func TestPublished(t *testing.T) {
	const name = "https://kubernetes.default.svc"
	one, two := issuertest.New(t, issuertest.RSA(t, "k")), issuertest.New(t, issuertest.RSA(t, "k"))
	c := issuer.New(issuer.Config{Published: func(_ context.Context, issuer, cluster string) ([]byte, error) {
		switch {
		case issuer != name:
			return nil, errors.New("the issuer of the cluster is another one")
		case cluster == "one":
			return one.KeySet(), nil
		}
		return two.KeySet(), nil
	}})
	verify := func(cluster string, signer *issuertest.Issuer) error {
		_, err := c.Verify(t.Context(), name, cluster, issuertest.Sign(t, signer.Keys[0], payload))
		return err
	}
	if err := errors.Join(verify("one", one), verify("two", two)); err != nil {
		t.Error(err)
	}
	if err := verify("one", two); !errors.Is(err, fault.Unauthenticated) {
		t.Errorf("a token of the other cluster: %v", err)
	}
	if n := one.Requests.Load() + two.Requests.Load(); n != 0 {
		t.Errorf("they were asked %d times", n)
	}
	if _, err := c.Verify(t.Context(), "https://other.svc", "one", issuertest.Sign(t, one.Keys[0], payload)); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "another one") {
		t.Errorf("%v", err)
	}
}

// FuzzVerify: whatever text comes, only what the issuer signed is accepted.
func FuzzVerify(f *testing.F) {
	f.Add("a.b.c")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add(`{"payload":"e30","signatures":[]}`)
	c := issuer.New(issuer.Config{Published: func(context.Context, string, string) ([]byte, error) { return []byte(`{"keys":[]}`), nil }})
	f.Fuzz(func(t *testing.T, jws string) {
		if _, err := c.Verify(context.Background(), "https://issuer.example", "c1", jws); err == nil {
			t.Error("accepted")
		}
	})
}
