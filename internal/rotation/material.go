package rotation

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"keyfleet.dev/keyfleet/internal/pki"
)

// Material is what a rotation brings: new CAs and keys of tokens. It is made once,
// sealed into the journal before anything is touched, and never made again for
// the same run. It is secret.
type Material struct {
	Made        time.Time                 `json:"made"`
	Authorities map[Authority]*Succession `json:"authorities"`
	Tokens      *TokenKeys                `json:"tokens,omitempty"`
}

// Succession is an authority before and after. Where it is not renewed, New is Old.
type Succession struct {
	Old    []byte `json:"old"`    // PEM
	OldKey []byte `json:"oldKey"` // PEM
	New    []byte `json:"new"`
	NewKey []byte `json:"newKey"`
	Cross  []byte `json:"cross,omitempty"` // the new CA certified by the old, PEM
}

// TokenKeys are the keys of service account tokens.
type TokenKeys struct {
	OldPublic []byte `json:"oldPublic"` // PEM; all that verify now
	OldKey    []byte `json:"oldKey"`    // what signs now
	NewKey    []byte `json:"newKey"`
	NewPublic []byte `json:"newPublic"`
}

// rootLife is how long a new CA lives.
const rootLife = 10 * 365 * 24 * time.Hour

// makeMaterial makes what the scope asks for. roots and keys are the PEM texts of
// the present CAs, public the keys that verify tokens.
func makeMaterial(s Scope, roots, keys map[Authority][]byte, public []byte, now time.Time) (*Material, error) {
	m := &Material{Made: now, Authorities: map[Authority]*Succession{}}
	for a := range roots {
		next, err := succeed(s.renews(a), roots[a], keys[a], now)
		if err != nil {
			return nil, fmt.Errorf("the CA of %s: %w", a, err)
		}
		m.Authorities[a] = next
	}
	if !s.Tokens {
		return m, nil
	}
	key, err := pki.NewKey(pki.RSA2048) // RS256, which every verifier of such tokens knows
	if err != nil {
		return nil, err
	}
	m.Tokens = &TokenKeys{OldPublic: public}
	if m.Tokens.NewKey, err = pki.EncodeKey(key); err != nil {
		return nil, err
	}
	m.Tokens.NewPublic, err = encodePublic(key.Public())
	return m, err
}

func succeed(renew bool, root, key []byte, now time.Time) (*Succession, error) {
	chain, err := pki.ParseChain(root)
	if err != nil {
		return nil, err
	}
	if len(chain) != 1 {
		return nil, fmt.Errorf("the file holds %d certificates, which an unfinished rotation may have left", len(chain))
	}
	signer, err := pki.ParseKey(key)
	if err != nil {
		return nil, err
	}
	out := &Succession{Old: root, OldKey: key, New: root, NewKey: key}
	if !renew {
		if !pki.Matches(chain[0], signer) {
			return nil, fmt.Errorf("the private key does not belong to the certificate")
		}
		return out, nil
	}
	next, err := pki.Succeed(chain[0], signer, now, rootLife)
	if err != nil {
		return nil, err
	}
	out.New = pki.EncodeChain(next.Root)
	if next.Cross == nil { // who knows only the old CA would refuse what the new one issues
		return nil, fmt.Errorf("it has ended, or may certify no other CA, so old and new cannot overlap")
	}
	out.Cross = pki.EncodeChain(next.Cross)
	out.NewKey, err = pki.EncodeKey(next.Key)
	return out, err
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
