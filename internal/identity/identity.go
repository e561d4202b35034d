// Package identity knows who callers are: the tenant, applications with client
// secrets, user-assigned managed identities, and the tokens of both.
//
// Idea: a token is a claim about a principal, signed with a key that the store
// keeps and that rotates. Three things can get one: an application that proves
// its client secret; a node, for a managed identity of its pool; and the bearer of
// a token of another issuer (a pod, with the token of its service account) for a
// managed identity that trusts that issuer and subject by a federated credential.
// [Service.Verify] turns a token back into a principal; the principal must still exist.
//
//	application + secret ──ClientCredentials──┐                       ┌─ signature, issuer, audience, times
//	pod + assertion ──────ClientCredentials───┼──> RS256 token ──Verify──> access.Principal
//	node of a pool ───────TokenFor────────────┘                       └─ does the principal still exist
//
// Invariant: client secrets are made here, 256 random bits, and only their
// HMAC is stored; object ids are never used twice, so what was granted to a
// deleted principal is granted to nobody. A token is refused at the latest 5
// seconds after its principal was deleted, on every server.
//
//	time ────────────────────────────────────────────────────────────────>
//	key 1  published, signs ───────────────────────────┐ kept: its tokens live ┐ gone
//	key 2                       published ──(KeyLead)──┘ signs ────────────────────
//
// Consequence for the operator: a lost client secret is replaced, never shown
// again; signing keys need no care; a token that was given out lives up to an
// hour (24 hours for managed identities) unless its principal is deleted.
package identity

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Config is what a Service needs.
type Config struct {
	Store *store.Store // required
	Gate  *access.Gate // required; its Principal should be [RequirePrincipal]

	// Login is the base URL of the token surface, without a trailing slash; the
	// issuer of tokens is made from it. Required.
	Login string
	// Audiences are the resources that tokens can be asked for, and names that
	// mean the same: URL as clients write it -> canonical URL. "/.default",
	// trailing slashes and casing do not matter. Required.
	Audiences map[string]string
	// Place fails unless an identity can be made in the group now, with
	// fault.NotFound where subscription or group are missing; it decides by what
	// it reads through tx. An empty group asks for the subscription only. Nil: not
	// checked. Package subscription has it.
	Place func(tx *store.Tx, subscription, group string) error
	// Issuers checks the assertions that federated credentials trust. Nil: none is accepted.
	Issuers Issuers
	// ClusterIssuer returns the standard resource id and the issuer of a registered
	// cluster that the caller may read. Nil: there are no clusters.
	ClusterIssuer func(ctx context.Context, resourceID string) (cluster, issuer string, err error)

	TokenLifetime    time.Duration    // of applications; zero: 1 h
	IdentityLifetime time.Duration    // of managed identities; zero: 24 h, as the metadata service does
	KeyLifetime      time.Duration    // how long a key signs; zero: 30 days
	KeyLead          time.Duration    // how long a key is published before it signs; zero: 24 h
	Now              func() time.Time // nil: time.Now
}

// Service has the operations. Make it with [New].
type Service struct {
	cfg    Config
	tenant string

	mu       sync.RWMutex // guards what follows; all of it is a cache
	keys     cachedKeys
	tokens   map[[32]byte]verified
	existing map[string]existence // by object id
}

// New returns a Service. On a new store it makes the tenant and the first
// signing key.
func New(ctx context.Context, cfg Config) (*Service, error) {
	setDefault(&cfg.TokenLifetime, time.Hour)
	setDefault(&cfg.IdentityLifetime, 24*time.Hour)
	setDefault(&cfg.KeyLifetime, 30*24*time.Hour)
	setDefault(&cfg.KeyLead, 24*time.Hour)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Issuers == nil {
		cfg.Issuers = noIssuers{}
	}
	audiences := make(map[string]string, len(cfg.Audiences))
	for alias, canonical := range cfg.Audiences {
		audiences[normalize(alias)] = normalize(canonical)
		audiences[normalize(canonical)] = normalize(canonical)
	}
	cfg.Audiences = audiences
	s := &Service{cfg: cfg, tokens: map[[32]byte]verified{}, existing: map[string]existence{}}
	ctx = access.AsSystem(ctx, "identity")
	if err := s.ensureTenant(ctx); err != nil {
		return nil, fmt.Errorf("making the tenant: %w", err)
	}
	if err := s.ensureKey(ctx); err != nil {
		return nil, fmt.Errorf("making the first signing key: %w", err)
	}
	return s, nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

// Tenant is the spec of the tenant. There is one.
type Tenant struct {
	ID          string `json:"tenantId"`
	DisplayName string `json:"displayName"`
}

// Tenants is the collection with the tenant; its id is "default".
var Tenants = store.NewCollection[Tenant, struct{}]("tenants")

// TenantID is the id of the tenant.
func (s *Service) TenantID() string { return s.tenant }

func (s *Service) ensureTenant(ctx context.Context) error {
	const id = "default"
	o, err := Tenants.Lookup(s.cfg.Store.View(ctx), id)
	if err != nil {
		return err
	}
	if o == nil {
		op := access.Op{Action: "Keyfleet/tenants/write", Resource: "/"}
		err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
			if o, err = Tenants.Lookup(tx, id); err != nil || o != nil {
				return err
			}
			o = &store.Object[Tenant, struct{}]{Meta: store.Meta{ID: id}, Spec: Tenant{ID: newGUID(), DisplayName: "Keyfleet"}}
			return Tenants.Insert(tx, o)
		})
		if err != nil {
			return err
		}
	}
	s.tenant = o.Spec.ID
	return nil
}

// Principal is the spec of an index entry: what an object id stands for.
type Principal struct {
	Kind     access.PrincipalKind `json:"kind"` // Application or ManagedIdentity
	ClientID string               `json:"clientId"`
	Name     string               `json:"name"`
	Ref      string               `json:"ref"` // id in Applications or Identities
}

// Client is the spec of an index entry: whose a client id is.
type Client struct {
	ObjectID string `json:"objectId"`
}

// Principals and Clients are indexes, written with what they point at: by
// object id, and by client id, which is unique over both kinds.
var (
	Principals = store.NewCollection[Principal, struct{}]("principals")
	Clients    = store.NewCollection[Client, struct{}]("clients")
)

// RequirePrincipal fails with fault.NotFound if no principal has the object id.
// It is the Principal function for access.Config.
func RequirePrincipal(tx *store.Tx, objectID string) error {
	o, err := Principals.Lookup(tx, strings.ToLower(objectID))
	if err != nil {
		return err
	}
	if o == nil {
		return fault.New(fault.NotFound, "PrincipalNotFound", "Principal %s does not exist in the directory.", objectID).
			WithFix("use the object id (principalId) of an application or a managed identity, not its client id")
	}
	return nil
}

func insertPrincipal(tx *store.Tx, objectID string, p Principal) error {
	taken, err := Clients.Lookup(tx, strings.ToLower(p.ClientID))
	if err != nil {
		return err
	}
	if taken != nil {
		return fault.New(fault.Conflict, "ClientIdInUse", "The client id '%s' belongs to another application or identity.", p.ClientID).
			At("properties.clientId").WithFix("leave the client id out, or choose another one")
	}
	err = Clients.Insert(tx, &store.Object[Client, struct{}]{Meta: store.Meta{ID: strings.ToLower(p.ClientID)}, Spec: Client{ObjectID: objectID}})
	if err != nil {
		return err
	}
	return Principals.Insert(tx, &store.Object[Principal, struct{}]{Meta: store.Meta{ID: strings.ToLower(objectID)}, Spec: p})
}

// removePrincipal removes the indexes and all role assignments of a principal.
func (s *Service) removePrincipal(tx *store.Tx, objectID, clientID string) error {
	if err := access.RemovePrincipal(tx, objectID); err != nil {
		return err
	}
	if err := Clients.Delete(tx, strings.ToLower(clientID)); err != nil {
		return err
	}
	tx.OnCommit(func(int64) { s.forget(objectID) })
	return Principals.Delete(tx, strings.ToLower(objectID))
}

// Secret is a client secret or a token: a value that must not be printed.
type Secret struct{ value string }

// Reveal returns the value. Every use of it is a place where a secret leaves.
func (s Secret) Reveal() string { return s.value }

// String, GoString, Format, LogValue and MarshalJSON hide the value.
func (Secret) String() string               { return "[redacted]" }
func (Secret) GoString() string             { return "[redacted]" }
func (Secret) Format(f fmt.State, _ rune)   { fmt.Fprint(f, "[redacted]") }
func (Secret) LogValue() slog.Value         { return slog.StringValue("[redacted]") }
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"[redacted]"`), nil }

// newGUID returns a random GUID (version 4, RFC 9562).
func newGUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
