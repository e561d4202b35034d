package identity

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// SigningKey is a key that signs, will sign or has signed tokens.
type SigningKey struct {
	ID       string    `json:"kid"`      // RFC 7638 thumbprint
	Private  []byte    `json:"private"`  // PKCS #8; sealed with the rest of the object
	SignFrom time.Time `json:"signFrom"` // published before; signs until the next key's SignFrom
}

// Format and LogValue hide the private key.
func (k SigningKey) Format(f fmt.State, _ rune) { fmt.Fprint(f, "signing key "+k.ID) }
func (k SigningKey) LogValue() slog.Value       { return slog.StringValue("signing key " + k.ID) }

// Keyring is the spec of the one object that holds all signing keys, so that two
// servers that would each add one meet in it. Keys are in the order of SignFrom.
type Keyring struct {
	Keys []SigningKey `json:"keys"`
}

// Keyrings is the collection with the keyring; its id is "default".
var Keyrings = store.NewCollection[Keyring, struct{}]("keyrings")

const keyringID = "default"

// clockSkew is how far clocks may differ where a token's start is checked.
const clockSkew = time.Minute

// keyPlan says how the keyring has to change now. The zero plan: not at all.
type keyPlan struct {
	add  bool      // a new key is needed
	from time.Time // its SignFrom
	drop []string  // keys whose last token has expired
	next time.Time // when to look again
}

// plan decides about the keyring. longest is the longest life of a token.
func (k Keyring) plan(now time.Time, lifetime, lead, longest time.Duration) keyPlan {
	if len(k.Keys) == 0 {
		return keyPlan{add: true, from: now}
	}
	var p keyPlan
	last := k.Keys[len(k.Keys)-1]
	due := last.SignFrom.Add(lifetime - lead)
	if p.add = !now.Before(due); p.add {
		p.from = now.Add(lead)
		due = p.from.Add(lifetime - lead)
	}
	p.next = due
	for i, key := range k.Keys {
		until := p.from // when key stopped signing
		if i+1 < len(k.Keys) {
			until = k.Keys[i+1].SignFrom
		} else if !p.add {
			break
		}
		end := until.Add(longest + clockSkew)
		if now.After(end) {
			p.drop = append(p.drop, key.ID)
		} else if end.Before(p.next) {
			p.next = end
		}
	}
	return p
}

// signer is the key that signs now: the last whose time has come. The first
// key of all signs even if the clock went back before its time.
func (k Keyring) signer(now time.Time) SigningKey {
	key := k.Keys[0]
	for _, c := range k.Keys[1:] {
		if !c.SignFrom.After(now) {
			key = c
		}
	}
	return key
}

// KeyRotation publishes new signing keys in time and drops old ones. It runs on
// the server that leads (it has the shape of reconcile.Runnable).
type KeyRotation struct {
	Service *Service
	Log     *slog.Logger // nil: slog.Default()
}

// Describe names it for logs.
func (KeyRotation) Describe() string { return "signing key rotation" }

// Run works until ctx ends.
func (k KeyRotation) Run(ctx context.Context, s *store.Store) error {
	log := k.Log
	if log == nil {
		log = slog.Default()
	}
	ctx = access.AsSystem(ctx, "signing-keys")
	for {
		next, err := k.Service.rotateKeys(ctx, s)
		if err != nil && ctx.Err() == nil {
			log.Error("rotating signing keys failed; trying again within a minute", "error", err)
			next = k.Service.cfg.Now().Add(time.Minute)
		}
		t := time.NewTimer(min(max(next.Sub(k.Service.cfg.Now()), time.Second), time.Hour))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

func (s *Service) ensureKey(ctx context.Context) error {
	o, err := Keyrings.Lookup(s.cfg.Store.View(ctx), keyringID)
	if err != nil || o != nil {
		return err
	}
	_, err = s.rotateKeys(ctx, s.cfg.Store)
	return err
}

// rotateKeys brings the keyring to its plan and returns when to look again.
func (s *Service) rotateKeys(ctx context.Context, st *store.Store) (time.Time, error) {
	longest := max(s.cfg.TokenLifetime, s.cfg.IdentityLifetime)
	plan := func(o *store.Object[Keyring, struct{}]) keyPlan {
		var ring Keyring
		if o != nil {
			ring = o.Spec
		}
		return ring.plan(s.cfg.Now().UTC(), s.cfg.KeyLifetime, s.cfg.KeyLead, longest)
	}
	o, err := Keyrings.Lookup(st.View(ctx), keyringID)
	if err != nil {
		return time.Time{}, err
	}
	p := plan(o)
	if !p.add && len(p.drop) == 0 {
		return p.next, nil
	}
	fresh, err := newSigningKey() // outside the transaction: it takes a while
	if err != nil {
		return time.Time{}, err
	}
	op := access.Op{Action: "Keyfleet/signingKeys/write", Resource: "/", Detail: fmt.Sprintf("add %t, drop %d", p.add, len(p.drop))}
	err = s.cfg.Gate.Change(ctx, st, op, func(tx *store.Tx) error {
		if o, err = Keyrings.Lookup(tx, keyringID); err != nil {
			return err
		}
		p = plan(o)
		create := o == nil
		if create {
			o = &store.Object[Keyring, struct{}]{Meta: store.Meta{ID: keyringID}}
		}
		o.Spec.Keys = slices.DeleteFunc(slices.Clone(o.Spec.Keys), func(k SigningKey) bool { return slices.Contains(p.drop, k.ID) })
		if p.add {
			fresh.SignFrom = p.from
			o.Spec.Keys = append(o.Spec.Keys, fresh)
		}
		if create {
			return Keyrings.Insert(tx, o)
		}
		return Keyrings.Put(tx, o)
	})
	if err != nil {
		return time.Time{}, err
	}
	s.mu.Lock()
	s.keys = cachedKeys{} // the next use reads it
	s.mu.Unlock()
	return plan(o).next, nil
}

func newSigningKey() (SigningKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return SigningKey{}, fmt.Errorf("making a signing key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return SigningKey{}, fmt.Errorf("encoding a signing key: %w", err)
	}
	return SigningKey{ID: thumbprint(&key.PublicKey), Private: der}, nil
}

// thumbprint is the key id of RFC 7638.
func thumbprint(k *rsa.PublicKey) string {
	j := toJWK("", k)
	h := sha256.Sum256([]byte(`{"e":"` + j.E + `","kty":"RSA","n":"` + j.N + `"}`))
	return base64.RawURLEncoding.EncodeToString(h[:])
}

// JWK is a public signing key as RFC 7517 writes it.
type JWK struct {
	Type      string `json:"kty"`
	Use       string `json:"use"`
	ID        string `json:"kid"`
	Algorithm string `json:"alg"`
	N         string `json:"n"`
	E         string `json:"e"`
	Issuer    string `json:"issuer,omitempty"`
}

func toJWK(kid string, k *rsa.PublicKey) JWK {
	enc := base64.RawURLEncoding
	return JWK{Type: "RSA", Use: "sig", ID: kid, Algorithm: "RS256", N: enc.EncodeToString(k.N.Bytes()), E: enc.EncodeToString(big.NewInt(int64(k.E)).Bytes())}
}

// PublicKeys lists all keys that a valid token may be signed with, the next
// one included. It is public, and not on record.
func (s *Service) PublicKeys(ctx context.Context) ([]JWK, error) {
	keys, err := s.signingKeys(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]JWK, 0, len(keys.ring.Keys))
	for _, k := range keys.ring.Keys {
		out = append(out, toJWK(k.ID, &keys.parsed[k.ID].PublicKey))
	}
	return out, nil
}

// cachedKeys is the keyring as read at a time, with its keys parsed.
type cachedKeys struct {
	read   time.Time
	ring   Keyring
	parsed map[string]*rsa.PrivateKey
}

// keysFresh is how long the keyring is used without reading it again. A new key
// is published KeyLead before it signs, so this may be long.
const keysFresh = time.Minute

func (s *Service) signingKeys(ctx context.Context) (cachedKeys, error) {
	now := s.cfg.Now()
	s.mu.RLock()
	c := s.keys
	s.mu.RUnlock()
	if c.parsed != nil && now.Sub(c.read) < keysFresh && !now.Before(c.read) {
		return c, nil
	}
	o, err := Keyrings.Get(s.cfg.Store.View(ctx), keyringID)
	if err != nil {
		return cachedKeys{}, fault.New(fault.Unavailable, "", "The signing keys cannot be read now.").After(time.Second).Because(err)
	}
	c = cachedKeys{read: now, ring: o.Spec, parsed: make(map[string]*rsa.PrivateKey, len(o.Spec.Keys))}
	for _, k := range o.Spec.Keys {
		key, err := x509.ParsePKCS8PrivateKey(k.Private)
		rk, ok := key.(*rsa.PrivateKey)
		if err != nil || !ok {
			return cachedKeys{}, fmt.Errorf("signing key %s is damaged", k.ID)
		}
		c.parsed[k.ID] = rk
	}
	s.mu.Lock()
	s.keys = c
	s.mu.Unlock()
	return c, nil
}
