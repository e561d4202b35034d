// Package vault keeps secrets and certificates, and renews the certificates by
// itself: the capability behind the Key Vault surface.
//
// Idea: a vault is a resource with access policies. Inside it a secret or a
// certificate is a head (which version is the newest, is it deleted) and its
// versions, which never change their content. A certificate's version N/V is
// at the same time the secret N/V, which holds key and chain, so whoever reads
// secrets needs to know nothing of certificates. Creating a certificate only
// records what is wanted; a controller issues it. The same controller issues
// the next version when the policy's lifetime action is due.
//
//	/vaults/prod1                              the vault: policies, retention, deletion
//	/secrets/prod1/web                         head: newest version, managed, deletion
//	/secretversions/prod1/web/8f5f...          value, content type, tags, attributes
//	/certificates/prod1/web                    policy, wanted operation; status: operation, newest version, next renewal
//	/certificateversions/prod1/web/8f5f...     certificate, chain, private key, tags, attributes
//
// Invariant: a new version, its secret, both heads and the completed operation
// commit in one transaction that also checks which version it follows, so there
// is never a certificate without its secret, and exactly one new version for
// each time a renewal is due, whoever dies in between. A vault's name belongs
// to one vault until that is purged with everything in it. Values and keys are
// stored only through package store, which seals them, and print as [redacted].
//
// Consequence for the operator: what is stored can be read back by its version
// for as long as it is not purged; a renewal that fails is a state of the
// certificate with a reason and a next attempt; deleted things stay recoverable
// for the retention time of their vault, counted in real time.
package vault

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
)

// Names of the issuers that a policy may name.
const (
	SelfIssuer    = "Self"     // signed by its own key
	BuiltInIssuer = "Keyfleet" // signed by the server's CA, if Config.Issuer is set
)

// Issuer signs a certificate for a public key and returns the chain in DER,
// leaf first. A fault.Invalid means that trying again cannot help.
type Issuer func(ctx context.Context, t pki.Template, pub crypto.PublicKey) ([][]byte, error)

// FromCA makes an issuer of a CA.
func FromCA(ca *pki.CA) Issuer {
	return func(_ context.Context, t pki.Template, pub crypto.PublicKey) ([][]byte, error) {
		chain, err := ca.Issue(t, pub)
		if err != nil {
			return nil, fault.New(fault.Unavailable, "IssuerFailed", "The issuer could not sign: %s.", err)
		}
		return chain, nil
	}
}

// Config is what the capability needs.
type Config struct {
	Store  *store.Store     // required
	Gate   *access.Gate     // required
	Now    func() time.Time // real time; nil: time.Now
	Clock  *Clock           // policy time, for renewals; nil: real time
	Issuer Issuer           // the issuer named Keyfleet; nil: there is none
	Log    *slog.Logger     // nil: slog.Default()
	Tenant string           // tenant that vaults belong to; empty: the one their PUT names

	// Require fails if no vault can be made in the resource group now. It is
	// called in the transaction that makes the vault. Nil: nothing is checked.
	Require func(tx *store.Tx, subscription, group string) error
}

// Vaults is the capability. Make it with [New].
type Vaults struct {
	cfg   Config
	store *store.Store
	gate  *access.Gate
	feed  *Feed
}

// New returns the capability on a store.
func New(cfg Config) *Vaults {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Vaults{cfg: cfg, store: cfg.Store, gate: cfg.Gate, feed: &Feed{store: cfg.Store, known: map[string]seen{}}}
}

// Run keeps what the feed knows up to date until ctx ends. Every server runs it.
func (v *Vaults) Run(ctx context.Context) error {
	return v.feed.Follow(ctx, func(string, string, int64) error { return nil })
}

// Feed tells which secrets change.
func (v *Vaults) Feed() *Feed { return v.feed }

// now is the real time to the second, as Key Vault's attributes carry it.
func (v *Vaults) now() time.Time { return v.cfg.Now().UTC().Truncate(time.Second) }

// policyNow is the time that renewals go by.
func (v *Vaults) policyNow(ctx context.Context) (time.Time, error) {
	now := v.cfg.Now().UTC()
	if v.cfg.Clock == nil {
		return now, nil
	}
	offset, err := v.cfg.Clock.offset(ctx)
	return now.Add(offset), err
}

// errMoved restarts a change whose vault was changed after the decision.
var errMoved = errors.New("vault: the vault was changed meanwhile")

// open finds a vault that is in use, for an operation of the data plane.
func (v *Vaults) open(ctx context.Context, name, action, path string) (*vaultObject, error) {
	vt, err := vaults.Lookup(v.store.View(ctx), lower(name))
	if err != nil {
		return nil, err
	}
	if vt != nil && vt.Spec.Deleted == nil && vt.Deleting.IsZero() {
		return vt, nil
	}
	// Nobody holds a permission at a vault that is not there: the refusal is
	// recorded, and a known caller learns what is wrong.
	err = v.gate.Read(ctx, access.Op{Action: action, Resource: lower(name) + "/" + path, Policies: []access.Policy{}})
	if fault.KindOf(err) == fault.Unauthenticated {
		return nil, err
	}
	e := fault.New(fault.NotFound, "VaultNotFound", "The vault '%s' does not exist.", name).
		WithFix("keyfleet vault create %s", name)
	if vt != nil {
		e = fault.New(fault.NotFound, "VaultNotFound", "The vault '%s' is deleted.", name).
			WithFix("keyfleet vault recover %s", name)
	}
	return nil, e
}

// Authorize decides whether the caller may do an action on an item of a vault,
// before an edge looks at the rest of the request. Only a refusal is recorded:
// the operation itself decides and records again. path is "secrets/web".
func (v *Vaults) Authorize(ctx context.Context, vault, action, path string) error {
	vt, err := v.open(ctx, vault, action, path)
	if err != nil {
		return err
	}
	op := v.op(vt, action, path, "")
	if v.gate.Can(ctx, op) == nil {
		return nil
	}
	return v.gate.Read(ctx, op)
}

// read authorises and records a read of the data plane and returns the vault.
// path is what follows the vault's name: "secrets/web".
func (v *Vaults) read(ctx context.Context, vault, action, path string) (*vaultObject, error) {
	vt, err := v.open(ctx, vault, action, path)
	if err != nil {
		return nil, err
	}
	return vt, v.gate.Read(ctx, v.op(vt, action, path, ""))
}

// change authorises and records a change of the data plane, in the transaction
// that fn runs in. The vault is the one that was decided on: if it moves, all starts again.
func (v *Vaults) change(ctx context.Context, vault, action, path, detail string, fn func(tx *store.Tx, vt *vaultObject) error) error {
	for {
		vt, err := v.open(ctx, vault, action, path)
		if err != nil {
			return err
		}
		err = v.gate.Change(ctx, v.store, v.op(vt, action, path, detail), func(tx *store.Tx) error {
			fresh, err := vaults.Lookup(tx, vt.ID)
			if err != nil {
				return err
			}
			if fresh == nil || fresh.UID != vt.UID || fresh.Generation != vt.Generation {
				return errMoved
			}
			return fn(tx, fresh)
		})
		if !errors.Is(err, errMoved) {
			return err
		}
	}
}

func (v *Vaults) op(vt *vaultObject, action, path, detail string) access.Op {
	policies := vt.Spec.Policies
	if policies == nil {
		policies = []access.Policy{} // none, as opposed to "decide by roles"
	}
	return access.Op{Action: action, Resource: vt.ID + "/" + path, Policies: policies, Detail: detail}
}
