package connector

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Type is the ARM type of connections.
const Type = "Microsoft.ServiceLinker/linkers"

// Connection is the spec of a connection: what was asked for. It holds no secret.
type Connection struct {
	ID        string            `json:"id"`      // ARM id, the creator's casing
	Cluster   string            `json:"cluster"` // ARM id
	Namespace string            `json:"namespace"`
	Target    TargetService     `json:"target"`
	Auth      Authentication    `json:"auth"`
	Client    string            `json:"client"`
	Keys      map[string]string `json:"keys,omitempty"`      // catalogue's name of a variable -> the user's
	Vault     string            `json:"vault,omitempty"`     // ARM id of the vault for the credential; empty: the cluster's own
	Keep      bool              `json:"keep,omitempty"`      // a deletion leaves the cluster's objects
	Rotations int64             `json:"rotations,omitempty"` // how many were asked for
}

// TargetService is the service that is connected to.
type TargetService struct {
	Word   string            `json:"word"`             // of the catalogue
	ID     string            `json:"id,omitempty"`     // ARM id; empty: Values say it all
	Values map[string]string `json:"values,omitempty"` // as given, over what the id and its server say
	// Objects are what the CSI driver brings: key of its Secret -> secret or certificate of the vault.
	Objects map[string]string `json:"objects,omitempty"`
}

// Authentication is how the workload proves itself.
type Authentication struct {
	Type     AuthType `json:"type"`
	User     string   `json:"user,omitempty"`
	ClientID string   `json:"clientId,omitempty"`
	TenantID string   `json:"tenantId,omitempty"`
	ObjectID string   `json:"objectId,omitempty"` // of the service principal
	Identity string   `json:"identity,omitempty"` // ARM id, for workload identity
	// Given is where the credential is that somebody gave; nil: Keyfleet makes it.
	Given *SecretRef `json:"given,omitempty"`
}

// SecretRef names a secret of a vault.
type SecretRef struct {
	Vault   string `json:"vault"` // ARM id
	Name    string `json:"name"`
	Version string `json:"version,omitempty"` // empty: the newest
}

// Status is what became of a connection.
type Status struct {
	// State is Accepted, Updating, Deleting, Succeeded or Failed.
	State   string        `json:"state,omitempty"`
	Problem *wire.Problem `json:"problem,omitempty"` // why it is not Succeeded
	Waiting string        `json:"waiting,omitempty"` // for what, in words
	// Looked is the generation that all this is of, Done the one that the last success was of.
	Looked int64 `json:"looked,omitempty"`
	Done   int64 `json:"done,omitempty"`

	Credential Credential `json:"credential,omitzero"`
	Rotated    int64      `json:"rotated,omitempty"` // of Connection.Rotations

	Grants  []Grant `json:"grants,omitempty"` // what it was given in Keyfleet itself
	Desired string  `json:"desired,omitempty"`
	Proof   Proof   `json:"proof,omitzero"`
}

// Credential is a login that was made or given, and where its secret is.
type Credential struct {
	User    string    `json:"user,omitempty"`
	Role    string    `json:"role,omitempty"` // on the server, over all rotations; empty: it was given
	Secret  SecretRef `json:"secret,omitzero"`
	Created time.Time `json:"created,omitzero"`
}

// Grant is something that a connection was given and its deletion takes back.
type Grant struct {
	Kind string `json:"kind"` // "federated credential", "access policy"
	On   string `json:"on"`   // ARM id
	To   string `json:"to"`   // subject, or object id
	Name string `json:"name,omitempty"`
}

// Proof is a login with what was delivered.
type Proof struct {
	Time    time.Time     `json:"time,omitzero"`
	Took    time.Duration `json:"took,omitempty"`
	Desired string        `json:"desired,omitempty"` // revision of the state that was proven
}

// Object is a stored connection.
type Object = store.Object[Connection, Status]

// Connections is the collection of connections; ids are those of their clusters
// with the name: "SUBSCRIPTION/GROUP/CLUSTER/NAME".
var Connections = store.NewCollection[Connection, Status]("connections")

// reports is what managers saw of connections, by the ids of those.
var reports = store.NewCollection[wire.ConnectionReport, struct{}]("connection-reports")

// Name is the connection's name.
func (c Connection) Name() string { return c.ID[strings.LastIndexByte(c.ID, '/')+1:] }

// secretName is the name of its secret in a vault: unique in a vault for all clusters.
func (c Connection) secretName() string {
	name := alphanumeric(c.Name())
	return "sc-" + name[:min(len(name), 60)] + "-" + shortHash(strings.ToLower(c.ID))
}

// roleName is the name of its role on a server: at most 30 characters, the
// shortest that all kinds of servers take for a login beside "_a" and "_b".
func (c Connection) roleName() string {
	name := strings.ToLower(alphanumeric(c.Name()))
	return "kf_" + name[:min(len(name), 14)] + "_" + shortHash(strings.ToLower(c.ID))[:10]
}

// shortHash tells texts apart in names: 16 hex digits.
func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}

// LinkerID is the resource id of a connection of a cluster.
func LinkerID(cluster arm.ID, name string) string {
	return cluster.String() + "/providers/" + Type + "/" + name
}

// key is the store id of a connection.
func key(cluster arm.ID, name string) string { return strings.ToLower(cluster.StoreKey() + "/" + name) }

// parseLinker splits the resource id of a connection.
func parseLinker(s string) (cluster arm.ID, name string, err error) {
	on, name, ok := cutType(s, Type)
	if ok {
		cluster, err = arm.ParseID(on)
	}
	if !ok || err != nil || !cluster.Is(wire.Type) || name == "" {
		return cluster, "", fault.New(fault.Invalid, "LinkedInvalidPropertyId", "'%.300s' is not the resource id of a connection.", s).
			WithFix("CLUSTER/providers/%s/NAME, with the resource id of a cluster", Type)
	}
	cluster.Provider, cluster.Types = "Microsoft.ContainerService", []string{"managedClusters"}
	return cluster, name, nil
}

// cutType splits RESOURCE/providers/TYPE/NAME, the type in any casing.
func cutType(s, typ string) (resource, name string, ok bool) {
	i, suffix := max(0, strings.LastIndexByte(s, '/')), "/providers/"+typ
	n := i - len(suffix)
	if n <= 0 || !strings.EqualFold(s[n:i], suffix) {
		return "", "", false
	}
	return s[:n], s[i+1:], true
}

// checkPlace looks at where a connection shall be, and fills in the default.
func (c *Connection) checkPlace() []error {
	c.Namespace = cmp.Or(c.Namespace, "default")
	return refusals(CheckName(c.Name()), CheckNamespace(c.Namespace))
}

// check looks at everything about what a connection is that does not need the
// world, and fills in defaults. It returns all that is wrong.
func (c *Connection) check(catalogue Catalogue) (wrong []error) {
	c.Client = cmp.Or(c.Client, "none")
	t, err := catalogue.Target(c.Target.Word)
	if err != nil {
		return []error{err}
	}
	c.Target.Word = t.Word
	for _, name := range slices.Sorted(maps.Keys(c.Target.Values)) {
		at := "properties.targetService.values." + name
		if slices.Contains(t.Secrets, name) {
			wrong = append(wrong, fault.New(fault.Invalid, "InvalidArgument", "The value %s is a credential and has its place in authInfo.", name).At(at))
		} else if _, known := t.Values[name]; !known {
			wrong = append(wrong, fault.New(fault.Invalid, "InvalidArgument", "The target %s has no value %.60s; it has %s.", t.Word, name, strings.Join(slices.Sorted(maps.Keys(t.Values)), ", ")).At(at))
		}
	}
	auth, err := t.auth(c.Auth.Type)
	if err != nil {
		return append(wrong, err)
	}
	c.Auth.Type = auth.Type
	_, err = auth.clients(t.Word, c.Client)
	return append(wrong, refusals(err, c.Auth.check(t), c.checkObjects())...)
}

// refusals are the errors that are some.
func refusals(all ...error) []error {
	return slices.DeleteFunc(all, func(err error) bool { return err == nil })
}

// check looks whether all is there that the type of authentication needs.
func (a Authentication) check(t Target) error {
	needs := func(ok bool, at, what string) error {
		if ok {
			return nil
		}
		return fault.New(fault.Invalid, "InvalidArgument", "Authentication by %s needs %s.", a.Type, what).At("properties.authInfo." + at)
	}
	switch a.Type {
	case Secret:
		if a.Given == nil && t.Makes == "" {
			return needs(false, "secretInfo", "the secret: only on PostgreSQL, MySQL, Redis and RabbitMQ Keyfleet makes it itself")
		}
	case ServicePrincipal:
		if err := needs(arm.IsGUID(a.ClientID), "clientId", "the client id of the service principal, a GUID"); err != nil {
			return err
		}
		return needs(a.Given != nil, "secret", "the client secret")
	case WorkloadIdentity:
		return needs(a.Identity != "" || a.ClientID != "", "clientId", "a user-assigned managed identity of this tenant")
	}
	return nil
}

// Objects are the names of what a connection makes in its namespace. With a
// ProviderClass the Secret is the CSI driver's.
type Objects struct{ Secret, ServiceAccount, ProviderClass string }

// Objects returns the names of what the connection makes.
func (c Connection) Objects() Objects {
	o := Objects{Secret: SecretName(c.Name())}
	if c.Auth.actsAs() {
		o.ServiceAccount = AccountName(c.Auth.ClientID)
	}
	if c.mounted() {
		o.ProviderClass = ProviderClassName(c.Name())
	}
	return o
}
