package pool

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Token is a join token in clear. It exists where it is made and where it is
// used, never in the store, and prints as [redacted].
type Token string

// Reveal returns the token itself, for the one who hands it to the node.
func (t Token) Reveal() string { return string(t) }

// String hides the token.
func (Token) String() string { return "[redacted]" }

// Format hides the token from every verb.
func (Token) Format(s fmt.State, _ rune) { fmt.Fprint(s, "[redacted]") }

// LogValue hides the token from slog.
func (Token) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// tokenLife is how long a node's own join token counts; a provider that needs
// longer is asked to start the node again with a new one.
const tokenLife = time.Hour

// JoinToken is the record of a join token; its id is the token's SHA-256.
type JoinToken struct {
	Node    string    `json:"node,omitempty"` // the node it is for
	Pool    string    `json:"pool,omitempty"` // or the store id of the pool that a host joins with it
	Expires time.Time `json:"expires"`
	Key     string    `json:"key,omitempty"`  // SHA-256 of the public key that used it; the same key may use it again, because its answer may have been lost
	Host    string    `json:"host,omitempty"` // the host that was registered with it
}

// joinTokens holds the tokens that count. They vanish by themselves a day after they were made.
var joinTokens = store.Collection[JoinToken, struct{}]{Kind: "jointokens", TTL: 24 * time.Hour}

func tokenID(t string) string {
	sum := sha256.Sum256([]byte(t))
	return hex.EncodeToString(sum[:])
}

// newToken makes a token of 256 random bits and stores its hash.
func newToken(tx *store.Tx, rec JoinToken) (Token, error) {
	var b [32]byte
	rand.Read(b[:])
	t := Token(base64.RawURLEncoding.EncodeToString(b[:]))
	o := &store.Object[JoinToken, struct{}]{Spec: rec}
	o.ID = tokenID(t.Reveal())
	return t, joinTokens.Insert(tx, o)
}

// CreateJoinToken makes a one-use token with which a machine registers as a
// host of the pool. It counts for life, at most a day (zero: one hour).
func (f *Fleet) CreateJoinToken(ctx context.Context, pool arm.ID, life time.Duration) (Token, time.Time, error) {
	switch {
	case life == 0:
		life = tokenLife
	case life < 0 || life > joinTokens.TTL:
		return "", time.Time{}, fault.New(fault.Invalid, "InvalidPropertyValue", "A join token may count for at most %s.", joinTokens.TTL).At("expiresIn")
	}
	var t Token
	expires := f.cfg.Now().UTC().Add(life)
	op := access.Op{Action: "Keyfleet/jointokens/write", Resource: "/keyfleet/v1/jointokens", Detail: "pool " + pool.String()}
	err := f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		p, err := f.get(tx, pool.StoreKey())
		if err != nil {
			return err
		}
		if !p.Deleting.IsZero() {
			return poolBeingDeleted(p)
		}
		t, err = newToken(tx, JoinToken{Pool: p.ID, Expires: expires})
		return err
	})
	return t, expires, err
}

// useToken checks the token for the key (the SHA-256 of a public key) and marks
// it used. The same token with the same key counts again until it expires:
// an agent that lost the answer asks once more.
func useToken(tx *store.Tx, token, key string, now time.Time) (*store.Object[JoinToken, struct{}], error) {
	if token == "" {
		return nil, tokenRefused()
	}
	o, err := joinTokens.Lookup(tx, tokenID(token))
	if err != nil {
		return nil, err
	}
	if o == nil || !now.Before(o.Spec.Expires) {
		return nil, tokenRefused()
	}
	if o.Spec.Key != "" && o.Spec.Key != key {
		return nil, fault.New(fault.Denied, "JoinTokenUsed", "The join token was used by another machine.").
			WithFix("make a new one: keyfleet node join-token --pool POOL")
	}
	return o, nil
}

func tokenRefused() error {
	return fault.New(fault.Unauthenticated, "JoinTokenRefused", "The join token is unknown or expired, or what it was for is gone.").
		WithFix("make a new one: keyfleet node join-token --pool POOL")
}
