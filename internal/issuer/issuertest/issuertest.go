// Package issuertest is an issuer of tokens for tests: discovery document, keys and
// signatures are real, behind a real TLS connection, and it can be made to misbehave.
package issuertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

// Issuer publishes keys at its URL. Change its fields between requests only.
type Issuer struct {
	*httptest.Server
	Keys     []jose.JSONWebKey // with their private parts
	Name     string            // what the discovery document calls it; empty: its URL
	KeysURL  string            // what the discovery document says; empty: where they are
	Status   int               // of the discovery document; zero: 200
	Body     string            // instead of the key set
	Requests atomic.Int32      // for the discovery document
}

// New starts an issuer that ends with the test.
func New(t testing.TB, keys ...jose.JSONWebKey) *Issuer {
	t.Helper()
	i := &Issuer{Keys: keys}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", i.discovery)
	mux.HandleFunc("/keys", i.keys)
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	return i
}

func (i *Issuer) discovery(w http.ResponseWriter, _ *http.Request) {
	i.Requests.Add(1)
	if i.Status != 0 {
		w.Header().Set("Location", i.URL+"/elsewhere")
		w.WriteHeader(i.Status)
	}
	name, keys := i.Name, i.KeysURL
	if name == "" {
		name = i.URL
	}
	if keys == "" {
		keys = i.URL + "/keys"
	}
	_ = json.NewEncoder(w).Encode(map[string]string{"issuer": name, "jwks_uri": keys})
}

func (i *Issuer) keys(w http.ResponseWriter, _ *http.Request) {
	if i.Body != "" {
		_, _ = w.Write([]byte(i.Body))
		return
	}
	_, _ = w.Write(i.KeySet())
}

// Roots has the certificate of the issuer's server.
func (i *Issuer) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(i.Certificate())
	return pool
}

// KeySet is what the issuer publishes, without asking it.
func (i *Issuer) KeySet() []byte {
	set := jose.JSONWebKeySet{}
	for _, k := range i.Keys {
		set.Keys = append(set.Keys, k.Public())
	}
	text, err := json.Marshal(set)
	if err != nil {
		panic(err) // keys that were made here
	}
	return text
}

// RSA makes an RS256 key with an id.
func RSA(t testing.TB, id string) jose.JSONWebKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: k, KeyID: id, Use: "sig", Algorithm: string(jose.RS256)}
}

// EC makes an ES256 key with an id.
func EC(t testing.TB, id string) jose.JSONWebKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return jose.JSONWebKey{Key: k, KeyID: id, Use: "sig", Algorithm: string(jose.ES256)}
}

// Sign makes a compact JWS of a payload.
func Sign(t testing.TB, k jose.JSONWebKey, payload string) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(k.Algorithm), Key: k}, nil)
	if err != nil {
		t.Fatal(err)
	}
	o, err := s.Sign([]byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	text, err := o.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}
