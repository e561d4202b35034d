// Package pool keeps Batch accounts, pools and their nodes: what a pool should
// be, what its nodes are, and the goal state that leads each node there.
//
// Idea: a pool is one object. Its Spec is what callers asked for, in the shape
// of the pool resource, so that every path in an answer is a path of the
// caller's body. Its nodes are objects of their own, made and removed by the
// pool controller and brought to life by the node controller through a
// [Provider]. A node is told a revision and fetches its goal state, which is
// computed from the pool, the node and the secrets its extensions observe.
// What the node reports back is stored as it came; the node's state is a pure
// function of it.
//
//	Fleet.Put ──► pool ──► pool controller ──► nodes ──► node controller ──► Provider
//	               │                            ▲  │
//	               └────────── mark ─► FollowGoals ┼──┴► node.GoalState ──► agent
//	                    secret changes ──┘      └──────── node.StatusReport ◄─┘
//
// Invariant: a state that claims something about a node was reported by the
// node or by its provider. A request either stores the whole pool or nothing.
// The goal state of a node is the same, byte for byte, on every server that
// sees the same store; its revision is the newest store revision of what it
// was made from. Protected settings leave this package only encrypted to the
// certificate of the node they are for.
//
// Consequence for the operator: a pool that does not come up says why, in the
// pool's conditions, its resize errors, the node's errors, and as a chain of
// links with the first broken one on top ([Fleet.Explain]).
package pool

import (
	"context"
	"encoding/json"
	"log/slog"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/store"
)

// Config is what a Fleet needs. Store, Gate, Identities and Packages must be set.
type Config struct {
	Store      *store.Store
	Gate       *access.Gate
	Identities Identities
	Packages   Packages
	Groups     Groups        // nil: resource groups are not checked
	Secrets    SecretAccess  // nil: nothing is said about whether secrets can be read
	Changes    SecretChanges // nil: nodes get no hints and poll
	Names      Names         // nil: GoalState.Hosts is empty
	Settings   SettingsReader
	Providers  []Provider       // the first that offers a pool's operating system is used; none: pools stay empty and say so
	Now        func() time.Time // nil: time.Now
	Log        *slog.Logger     // nil: nothing is logged
}

// Fleet has the operations on Batch accounts, pools, nodes and hosts. Make it with [New].
type Fleet struct {
	cfg  Config
	seen *seen
}

// New returns the operations.
func New(cfg Config) *Fleet {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Settings == nil {
		cfg.Settings = ReadSettings
	}
	return &Fleet{cfg: cfg, seen: newSeen(cfg.Now())}
}

// Identities finds managed identities.
type Identities interface {
	// Resolve returns the identity. A fault.NotFound means there is none of
	// that id, a fault.Denied that it belongs to another tenant.
	Resolve(ctx context.Context, resourceID string) (Identity, error)
}

// Identity is a user-assigned managed identity.
type Identity struct {
	ResourceID string `json:"resourceId"` // the casing of the identity's own resource
	Tenant     string `json:"tenant"`
	ClientID   string `json:"clientId"`
	ObjectID   string `json:"objectId"`
	Name       string `json:"name"`
}

// Principal is the identity as a caller.
func (i Identity) Principal() access.Principal {
	return access.Principal{Kind: access.ManagedIdentity, Tenant: i.Tenant, ObjectID: i.ObjectID, ClientID: i.ClientID, Name: i.Name}
}

// SecretAccess answers whether an identity may read a secret now.
type SecretAccess interface {
	Check(ctx context.Context, identity access.Principal, secretURL string) (Verdict, error)
}

// Verdict is the answer of SecretAccess.
type Verdict struct {
	Answer  string // "yes", "no" or "unknown" (a vault that is not hosted here)
	Code    string // for "no" and "unknown": the vault's error code, for instance "SecretNotFound"
	Message string // why, safe to show
	Fix     string // what to do
	Pinned  bool   // the URL names a version, so it never rotates
}

// SecretChanges tells which secrets got a new version.
type SecretChanges interface {
	// Follow calls fn for every secret whose newest version changed, until ctx
	// ends. When fn is called, Revision answers at least that revision
	// already, and the caller holds no lock that Revision or Resolve takes.
	Follow(ctx context.Context, fn func(vault, secret string, revision int64)) error
	// Revision returns the store revision of the secret's newest version, 0 if unknown.
	Revision(vault, secret string) int64
	// Resolve takes a secret URL apart; ok is false for a vault not hosted here.
	Resolve(secretURL string) (vault, secret, version string, ok bool)
}

// Packages finds extension packages.
type Packages interface {
	// Find returns the package for what a pool asked for. A fault.NotFound says
	// which versions there are.
	Find(publisher, typ, typeHandlerVersion string, autoUpgrade bool) (version string, pkg node.Package, err error)
}

// Names tells which host names must lead to the server inside a node.
type Names interface {
	// Hosts returns the server's own names and, of the URLs, the host names
	// that this server answers as.
	Hosts(urls []string) []string
}

// SettingsReader reads what the server needs to know from the public settings
// of an extension type. It returns the problems it found, with paths relative
// to settings; types that it does not know have none.
type SettingsReader func(publisher, typ, version string, settings json.RawMessage) (Settings, []Problem)

// Settings is what the server understands of an extension's public settings.
type Settings struct {
	Observed           []Observed // the secrets that the extension delivers
	ClientID           string     // authenticationSettings.msiClientId
	RequireInitialSync bool       // the node must not be used before the first delivery
	NeedsIdentity      bool       // the extension reads secrets as an identity of the pool
}

// Observed is one observed secret and where in the settings it stands.
type Observed struct {
	URL  string
	Path string // relative to settings: "secretsManagementSettings.observedCertificates[0]"
}

// Provider is where nodes come from. Every method is idempotent, so that the
// answer to a crash is to call it again.
type Provider interface {
	Name() string
	// Offers reports whether nodes of the operating system can be had: "linux", "windows".
	Offers(os string) bool
	// Start brings the node up. A node that is there and running is no error.
	// A fault.Unavailable means "not now, try again" (for instance no free host).
	Start(ctx context.Context, n NodeSpec) error
	// Stop returns when the node is gone and its files are removed.
	Stop(ctx context.Context, nodeID string) error
	Restart(ctx context.Context, nodeID string) error
	// Reimage gives the node back its first state; it enrols again with the token of n.
	Reimage(ctx context.Context, n NodeSpec) error
	// List returns what is really there.
	List(ctx context.Context) ([]ProviderNode, error)
}

// NodeSpec is what a provider is told about a node.
type NodeSpec struct {
	ID     string   // node id, also the host name
	Pool   string   // resource id of the pool
	OS     string   // "linux", "windows"
	VMSize string   // as the pool says it
	Token  Token    // join token; of use only to a node that has not enrolled
	Hosts  []string // names that must lead to the server before the first goal state is there
}

// ProviderNode is a node as its provider sees it.
type ProviderNode struct {
	ID      string
	Running bool   // false: it is there, but its processes are not
	Detail  string // for people: "init exited with status 1"
}
