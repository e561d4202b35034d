package rotation

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"keyfleet.dev/keyfleet/internal/pki"
)

// Material is what a rotation brings: new CAs, keys of tokens, and the pairs that
// all machines share. It is made once, sealed into the journal before anything is
// touched, and never made again for the same run. It is secret.
type Material struct {
	Made        time.Time                 `json:"made"`
	Authorities map[Authority]*Succession `json:"authorities"`
	Tokens      *TokenKeys                `json:"tokens,omitempty"`
	Shared      map[string]Pair           `json:"shared,omitempty"` // by the file that carries the key
	// What was, for the way back: the certificate profile of the API model by entry, and
	// the copies in etcd by key.
	Profile map[string][]byte `json:"profile,omitempty"`
	Copies  map[string][]byte `json:"copies,omitempty"`
}

// Pair is a certificate and its key, in PEM.
type Pair struct {
	Cert []byte `json:"cert"`
	Key  []byte `json:"key"`
}

// Succession is an authority before and after. Where it is not renewed, New is Old.
type Succession struct {
	Old    []byte `json:"old"`              // PEM
	OldKey []byte `json:"oldKey,omitempty"` // PEM; empty: it is kept nowhere
	New    []byte `json:"new"`
	NewKey []byte `json:"newKey,omitempty"`
	Cross  []byte `json:"cross,omitempty"` // the new CA certified by the old, PEM
	// Holder is a certificate of the old CA, where that has no key: what proves that
	// it is refused.
	Holder *Pair `json:"holder,omitempty"`
}

// TokenKeys are the keys of service account tokens.
type TokenKeys struct {
	OldPublic []byte `json:"oldPublic,omitempty"` // PEM; all that verify now
	OldKey    []byte `json:"oldKey"`              // what signs now
	NewKey    []byte `json:"newKey"`
	NewPublic []byte `json:"newPublic"`
}

// keys are those of a file that signs with its first and verifies with all.
func (t *TokenKeys) keys(at Stage) []byte {
	switch at {
	case Trusted:
		return join(t.OldKey, t.NewKey)
	case Switched:
		return join(t.NewKey, t.OldKey)
	}
	return t.NewKey
}

// rootLife is how long a new CA lives.
const rootLife = 10 * 365 * 24 * time.Hour

// present is what a cluster has before: PEM texts as they were read.
type present struct {
	roots, keys map[Authority][]byte // of a CA that has thrown its key away, no key
	holders     map[Authority]Pair   // a certificate of such a CA
	tokenKey    []byte
	tokenPublic []byte // empty: the key verifies too
	// shared are certificates that all machines have, by the file that carries the key,
	// and sharedKeys those keys that stay.
	shared     map[string]*x509.Certificate
	sharedKeys map[string][]byte
	// given are entries of the operator's certificate profile; nil: there is none.
	given map[string][]byte
	// apart says that old and new need not overlap: the old does not work any more.
	apart bool
}

// makeMaterial makes what the scope asks for.
func makeMaterial(l Layout, s Scope, was present, now time.Time) (*Material, error) {
	m := &Material{Made: now, Authorities: map[Authority]*Succession{}, Shared: map[string]Pair{}}
	for a := range was.roots {
		next, err := was.succeed(a, s.renews(a), now)
		if err != nil {
			return nil, fmt.Errorf("the CA of %s: %w", a, err)
		}
		m.Authorities[a] = next
	}
	if s.Tokens {
		if err := m.makeTokens(was); err != nil {
			return nil, err
		}
	}
	for path, like := range was.shared {
		if pair, ok := was.givenPair(l, path); ok {
			m.Shared[path] = pair
			continue
		}
		pair, err := m.share(l.file(path), like, was.sharedKeys[path], now)
		if err != nil {
			return nil, fmt.Errorf("the certificate of %s: %w", path, err)
		}
		m.Shared[path] = pair
	}
	return m, nil
}

func (m *Material) makeTokens(was present) error {
	m.Tokens = &TokenKeys{OldPublic: was.tokenPublic, OldKey: was.tokenKey}
	key, err := was.newTokenKey()
	if err != nil {
		return err
	}
	if m.Tokens.NewKey, err = encodeAs(was.tokenKey, key); err != nil {
		return err
	}
	m.Tokens.NewPublic, err = encodePublic(key.Public())
	return err
}

// newTokenKey is of the kind RS256 needs, which every verifier of such tokens knows.
// Where the key also serves, the profile gives it, or it is as large as the old.
func (was present) newTokenKey() (crypto.Signer, error) {
	if was.tokenPublic != nil {
		return pki.NewKey(pki.RSA2048)
	}
	if text := was.given["apiServerPrivateKey"]; text != nil {
		return pki.ParseKey(text)
	}
	old, err := pki.ParseKey(was.tokenKey)
	if err != nil {
		return nil, err
	}
	kind, err := pki.KindOf(old.Public())
	if err != nil {
		return nil, err
	}
	return pki.NewKey(kind)
}

// givenPair is what the operator's certificate profile has for a shared pair.
func (was present) givenPair(l Layout, path string) (Pair, bool) {
	f := l.file(path)
	cert, key := l.file(f.Pair).Entry, f.Entry
	if f.Holds == Kubeconfig {
		cert, key = f.Entry, f.KeyEntry
	}
	if was.given[cert] == nil || was.given[key] == nil {
		return Pair{}, false
	}
	return Pair{was.given[cert], was.given[key]}, true
}

// share makes a pair for all machines. keep is a key that stays.
func (m *Material) share(f File, like *x509.Certificate, keep []byte, now time.Time) (Pair, error) {
	text := keep
	if f.Holds == LeafTokenKey && m.Tokens != nil {
		text = m.Tokens.NewKey
	}
	if text == nil {
		kind, err := pki.KindOf(like.PublicKey)
		if err != nil {
			return Pair{}, err
		}
		key, err := pki.NewKey(kind)
		if err != nil {
			return Pair{}, err
		}
		if text, err = encodeAs([]byte(pkcs1), key); err != nil { // as readers of the API model want it
			return Pair{}, err
		}
	}
	key, err := pki.ParseKey(text)
	if err != nil {
		return Pair{}, err
	}
	cert, err := m.Authorities[f.Authority].reissue(like, key.Public(), now)
	return Pair{cert, text}, err
}

const pkcs1 = "-----BEGIN RSA PRIVATE KEY-----"

// encodeAs encodes a key in PEM in the form of another: PKCS#1 stays PKCS#1, which
// is all that some readers know.
func encodeAs(like []byte, key crypto.Signer) ([]byte, error) {
	if k, ok := key.(*rsa.PrivateKey); ok && bytes.Contains(like, []byte(pkcs1)) {
		return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)}), nil
	}
	return pki.EncodeKey(key)
}

// succeed makes the successor of one authority.
func (was present) succeed(a Authority, renew bool, now time.Time) (*Succession, error) {
	root, key := was.roots[a], was.keys[a]
	chain, err := pki.ParseChain(root)
	if err != nil {
		return nil, err
	}
	if len(chain) != 1 {
		return nil, fmt.Errorf("the file holds %d certificates, which an unfinished rotation may have left", len(chain))
	}
	var signer crypto.Signer
	if key != nil {
		if signer, err = pki.ParseKey(key); err != nil {
			return nil, err
		}
		if !pki.Matches(chain[0], signer) {
			return nil, fmt.Errorf("the private key does not belong to the certificate")
		}
	}
	out := &Succession{Old: root, OldKey: key, New: root, NewKey: key}
	if h, ok := was.holders[a]; ok {
		out.Holder = &h
	}
	if !renew {
		return out, nil
	}
	var cross []byte
	if out.New, out.NewKey = was.givenCA(a); out.New != nil {
		given, err := pki.ParseChain(out.New)
		if err != nil {
			return nil, fmt.Errorf("the certificate profile: %w", err)
		}
		if cross, err = pki.Cross(given[0], chain[0], signer, now); err != nil {
			return nil, err
		}
	} else {
		next, err := pki.Succeed(chain[0], signer, now, rootLife)
		if err != nil {
			return nil, err
		}
		if out.NewKey, err = encodeAs(key, next.Key); err != nil {
			return nil, err
		}
		out.New, cross = pki.EncodeChain(next.Root), next.Cross
	}
	switch {
	case cross != nil:
		out.Cross = pki.EncodeChain(cross)
	case key != nil && !was.apart: // who knows only the old CA would refuse what the new one issues
		return nil, fmt.Errorf("it has ended, or may certify no other CA, so old and new cannot overlap")
	}
	return out, nil
}

// givenCA is what the operator's certificate profile has for an authority.
func (was present) givenCA(a Authority) (cert, key []byte) {
	if a != ClusterCA || was.given == nil {
		return nil, nil
	}
	return was.given["caCertificate"], was.given["caPrivateKey"]
}

// renewed reports whether there is a new CA.
func (s *Succession) renewed() bool { return !bytes.Equal(s.Old, s.New) }

// both are the roots while old and new overlap.
func (s *Succession) both() []byte {
	if !s.renewed() {
		return s.New
	}
	return join(s.Old, s.New)
}

// issuer parses the CA that issues from now on.
func (s *Succession) issuer() (*x509.Certificate, crypto.Signer, error) {
	chain, err := pki.ParseChain(s.New)
	if err != nil {
		return nil, nil, err
	}
	key, err := pki.ParseKey(s.NewKey)
	return chain[0], key, err
}

// reissue makes the certificate that replaces another, in PEM.
func (s *Succession) reissue(like *x509.Certificate, pub crypto.PublicKey, now time.Time) ([]byte, error) {
	ca, key, err := s.issuer()
	if err != nil {
		return nil, err
	}
	der, err := pki.Reissue(like, pub, ca, key, now, like.NotAfter.Sub(like.NotBefore))
	if err != nil {
		return nil, err
	}
	return pki.EncodeChain(der), nil
}

func join(texts ...[]byte) []byte {
	var out []byte
	for _, t := range texts {
		t = bytes.TrimSpace(t)
		if len(t) > 0 {
			out = append(append(out, t...), '\n')
		}
	}
	return out
}

func encodePublic(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encoding a public key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

func parsePublic(text []byte) (crypto.PublicKey, error) {
	b, _ := pem.Decode(text)
	if b == nil {
		return nil, fmt.Errorf("reading a public key: there is no PEM block")
	}
	pub, err := x509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading a public key: %w", err)
	}
	return pub, nil
}
