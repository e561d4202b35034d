package connector

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	actionRead     = Type + "/read"
	actionWrite    = Type + "/write"
	actionDelete   = Type + "/delete"
	actionRotate   = Type + "/rotate/action"
	actionValidate = Type + "/validateLinker/action"
	actionList     = Type + "/listConfigurations/action"
	actionGenerate = Type + "/generateConfigurations/action"
	actionManage   = "Keyfleet/clusters/manage/action"
)

// ClusterState is what connections need to know of a cluster, as it was last seen.
type ClusterState struct {
	ID       string
	Location string
	State    string // Succeeded: it answers
	Reason   string // why it is not
	// Busy says what changes the cluster at the moment, "a rotation of its certificates"; empty: nothing.
	Busy   string
	Issuer string // of service account tokens; empty: not seen
	Addon  bool   // the Secrets Store CSI driver was seen
	// Managed says that a manager looks after the cluster; its last look was not long ago.
	Managed bool
}

// Clusters tells about registered clusters. It decides nothing about access.
type Clusters interface {
	// State returns a cluster, fault.NotFound if there is none.
	State(ctx context.Context, cluster arm.ID) (ClusterState, error)
}

// Vaults keeps credentials. Its operations act as the context's caller.
type Vaults interface {
	// Ensure returns the vault for the credentials of a cluster's connections, and makes it if need be.
	Ensure(ctx context.Context, cluster arm.ID, location string) (vaultID string, err error)
	// Default is the vault that Ensure returns, and whether it is there already.
	Default(ctx context.Context, cluster arm.ID) (vaultID string, there bool, err error)
	// MaySet and MayGet fail unless the caller may, now.
	MaySet(ctx context.Context, ref SecretRef) error
	MayGet(ctx context.Context, ref SecretRef) error
	Set(ctx context.Context, ref SecretRef, value string) (version string, err error)
	Get(ctx context.Context, ref SecretRef) (string, error)
	// Delete deletes a secret softly; an absent one is no error.
	Delete(ctx context.Context, ref SecretRef) error
	// Endpoint is the URL of a vault, false if it is none of this server's.
	Endpoint(ctx context.Context, vaultID string) (url string, ok bool)
	// Granted reports whether an object may read secrets of a vault by a policy of
	// its own; Grant lets it; Revoke takes that back.
	Granted(ctx context.Context, vaultID, objectID string) (bool, error)
	Grant(ctx context.Context, vaultID, objectID string) error
	Revoke(ctx context.Context, vaultID, objectID string) error
}

// ManagedIdentity is a user-assigned identity.
type ManagedIdentity struct{ ID, ClientID, ObjectID, TenantID string }

// Identities finds managed identities and says whom they trust.
type Identities interface {
	// Find finds an identity by resource id, or by client id.
	Find(ctx context.Context, resourceID, clientID string) (ManagedIdentity, error)
	// MayTrust fails unless the caller may let others act as the identity.
	MayTrust(ctx context.Context, resourceID string) error
	// Trust lets the subject of a cluster's tokens act as the identity; Distrust takes it back.
	Trust(ctx context.Context, resourceID, name, cluster, subject string) error
	Distrust(ctx context.Context, resourceID, name string) error
}

// Reach is how to get at a server as its administrator. It prints as [redacted].
type Reach struct {
	Kind, Host string
	Port       int
	Database   string // of the connection; empty: none in particular
	Plain      bool   // no TLS
	CA         string // PEM; empty: the trust roots of this machine
	Name       string // in the server's certificate
	Management string // URL of RabbitMQ's management API
	Login
}

// Login is a user and a password. It prints as [redacted].
type Login struct{ User, Password string }

// Format implements fmt.Formatter.
func (Reach) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[redacted]") }

// Format implements fmt.Formatter.
func (Login) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[redacted]") }

// Maker makes logins on servers. Each call can be repeated, also after a crash in its middle.
type Maker interface {
	// Check fails unless the administrator can do what is needed, and returns what is doubtful.
	Check(ctx context.Context, r Reach) (warnings []string, err error)
	// Ensure makes a role, and a login with its privileges and nothing else.
	Ensure(ctx context.Context, r Reach, role string, login Login) error
	// Prove logs in as an application does.
	Prove(ctx context.Context, r Reach, login Login) (time.Duration, error)
	// Revoke ends a login with its sessions.
	Revoke(ctx context.Context, r Reach, role, user string) error
	// Refused fails unless the server refuses the login.
	Refused(ctx context.Context, r Reach, login Login) error
	// Remove removes the role and all its logins, and says what it removed. Data stays.
	Remove(ctx context.Context, r Reach, role string) (removed []string, err error)
}

// Config is what a Service needs.
type Config struct {
	Store      *store.Store
	Gate       *access.Gate
	Catalogue  Catalogue
	Clusters   Clusters
	Vaults     Vaults
	Identities Identities
	Maker      Maker
	Tenant     string // of service principals that name none
	// Place fails unless a resource of the namespace can be made in the group now. Nil: not checked.
	Place func(tx *store.Tx, subscription, group, namespace string) error
	Now   func() time.Time // nil: time.Now
	Log   *slog.Logger     // nil: slog.Default()
}

// Service has the operations. Make it with [New].
type Service struct{ cfg Config }

// New returns a Service.
func New(cfg Config) *Service {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Service{cfg}
}

// Put is what a PUT asks for.
type Put struct {
	Connection
	Secret     string  // the credential itself, where one was given; it goes into the vault
	FailIfBusy bool    // refuse while something else changes the cluster, instead of waiting
	Of         *Object // refuse unless the connection is still this one; nil: whatever there is
}

// Put makes a connection, or changes one. The world follows later: see [Object].
// What [Service.Plan] finds nothing missing for is accepted.
func (s *Service) Put(ctx context.Context, want Put) (out *Object, created bool, err error) {
	p, against := s.weigh(ctx, want)
	if len(against) > 0 {
		return nil, false, against[0]
	}
	if err := s.keepGiven(ctx, &p); err != nil {
		return nil, false, err
	}
	op := access.Op{Action: actionWrite, Resource: p.ID, Detail: p.detail()}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if against := s.standing(tx, p); len(against) > 0 {
			return against[0]
		}
		id := key(p.cluster, p.Name())
		if out, err = Connections.Lookup(tx, id); err != nil {
			return err
		}
		if created = out == nil; created {
			out = &Object{Meta: store.Meta{ID: id, Finalizers: []string{controllerName}}, Spec: p.Connection, Status: Status{State: "Accepted"}}
			if err := wantExtension(tx, p.cluster); err != nil {
				return err
			}
			return Connections.Insert(tx, out)
		}
		p.ID, p.Rotations = out.Spec.ID, out.Spec.Rotations
		out.Spec = p.Connection
		return Connections.Put(tx, out)
	})
	return out, created, err
}

func busy(c ClusterState) error {
	return fault.New(fault.Conflict, "Conflict", "The cluster '%s' is being updated: %s is running.", c.ID, c.Busy).
		WithFix("wait for its end (keyfleet cluster show), or leave out --if-busy=fail: the connection is then made afterwards").After(30 * time.Second)
}

// keepGiven puts a credential that was given into the vault. A crash after it
// leaves a version that nobody names.
func (s *Service) keepGiven(ctx context.Context, p *proposal) error {
	g := p.Auth.Given
	switch {
	case g == nil || g.Name != "": // Keyfleet makes it, or it is in a vault already
		return nil
	case p.Secret == "":
		p.Auth.Given = p.old.Spec.Auth.Given // as it was; weigh has seen that there is one
		return nil
	}
	system := access.AsSystem(ctx, controllerName)
	vaultID := p.Vault
	if vaultID == "" {
		var err error
		if vaultID, err = s.cfg.Vaults.Ensure(system, p.cluster, p.state.Location); err != nil {
			return err
		}
	}
	if s.sameGiven(ctx, *p, vaultID) {
		p.Auth.Given = p.old.Spec.Auth.Given
		return nil
	}
	ref := SecretRef{Vault: vaultID, Name: p.secretName()}
	var err error
	ref.Version, err = s.cfg.Vaults.Set(system, ref, p.Secret)
	p.Auth.Given = &ref
	return err
}

// sameGiven reports whether a credential that was given is the one that is kept already.
func (s *Service) sameGiven(ctx context.Context, p proposal, vaultID string) bool {
	if p.old == nil || p.old.Spec.Auth.Given == nil {
		return false
	}
	g := *p.old.Spec.Auth.Given
	if g.Name != p.secretName() || !strings.EqualFold(g.Vault, vaultID) {
		return false
	}
	kept, err := s.cfg.Vaults.Get(system(ctx), g)
	return err == nil && kept == p.Secret
}

// place fails unless something can be made in the cluster's group.
func (s *Service) place(tx *store.Tx, cluster arm.ID) error {
	if against := s.places(tx, cluster); len(against) > 0 {
		return against[0]
	}
	return nil
}

// Connection returns a connection, fault.NotFound if there is none.
func (s *Service) Connection(ctx context.Context, linkerID string) (*Object, error) {
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionRead, Resource: LinkerID(cluster, name)}); err != nil {
		return nil, err
	}
	return lookup(s.cfg.Store.View(ctx), cluster, name)
}

func lookup(tx *store.Tx, cluster arm.ID, name string) (*Object, error) {
	o, err := Connections.Lookup(tx, key(cluster, name))
	if err == nil && o == nil {
		err = fault.New(fault.NotFound, "ResourceNotFound", "The connection '%s' of the cluster '%s' was not found.", name, cluster.Name()).
			WithFix("keyfleet connection list --cluster %s", cluster.Name())
	}
	return o, err
}

// List returns the connections of a cluster.
func (s *Service) List(ctx context.Context, clusterID string) ([]*Object, error) {
	cluster, err := arm.ParseID(clusterID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionRead, Resource: cluster.String()}); err != nil {
		return nil, err
	}
	return Connections.List(s.cfg.Store.View(ctx), strings.ToLower(cluster.StoreKey())+"/")
}

// In returns all connections of a subscription, of one group only if group is not
// empty, without a decision: for listings over all providers and for the deletion
// of a group, which decide themselves.
func (s *Service) In(ctx context.Context, subscription, group string) ([]*Object, error) {
	prefix := subscription + "/"
	if group != "" {
		prefix += group + "/"
	}
	return Connections.List(s.cfg.Store.View(ctx), strings.ToLower(prefix))
}

// Delete asks for the deletion of a connection. keep leaves the cluster's objects.
// It reports whether there was one.
func (s *Service) Delete(ctx context.Context, linkerID string, keep bool) (o *Object, err error) {
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return nil, err
	}
	id := LinkerID(cluster, name)
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, access.Op{Action: actionDelete, Resource: id}, func(tx *store.Tx) error {
		if o, err = Connections.Lookup(tx, key(cluster, name)); err != nil || o == nil {
			return err
		}
		if keep && !o.Spec.Keep && o.Deleting.IsZero() {
			o.Spec.Keep = true
			if err := Connections.Put(tx, o); err != nil {
				return err
			}
		}
		return Connections.Delete(tx, o.ID)
	})
	return o, err
}

// Rotate asks for a new credential. While a rotation is under way it is joined.
func (s *Service) Rotate(ctx context.Context, linkerID string) (o *Object, err error) {
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return nil, err
	}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, access.Op{Action: actionRotate, Resource: LinkerID(cluster, name)}, func(tx *store.Tx) error {
		if o, err = lookup(tx, cluster, name); err != nil {
			return err
		}
		switch {
		case !o.Deleting.IsZero():
			return fault.New(fault.Conflict, "ConnectionBeingDeleted", "The connection '%s' is being deleted.", o.Spec.ID)
		case o.Status.Credential.Role == "":
			return fault.New(fault.Conflict, "NothingToRotate", "Keyfleet has made no credential for the connection '%s': it was given, or is not there yet.", o.Spec.ID).
				WithFix("give another one: keyfleet connection create, with --secret")
		case o.Spec.Rotations > o.Status.Rotated:
			return nil
		}
		o.Spec.Rotations++
		return Connections.Put(tx, o)
	})
	return o, err
}

// Environment returns the variables of a connection. Credentials have no value.
func (s *Service) Environment(ctx context.Context, linkerID string) ([]Variable, error) {
	return s.environment(ctx, actionList, linkerID, func(*Connection) {})
}

// Generate is Environment with other names: keys maps names of the catalogue to names
// that somebody wants; empty: as the connection has them.
func (s *Service) Generate(ctx context.Context, linkerID string, keys map[string]string) ([]Variable, error) {
	return s.environment(ctx, actionGenerate, linkerID, func(c *Connection) {
		if len(keys) > 0 {
			c.Keys = keys
		}
	})
}

func (s *Service) environment(ctx context.Context, action, linkerID string, change func(*Connection)) ([]Variable, error) {
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: action, Resource: LinkerID(cluster, name)}); err != nil {
		return nil, err
	}
	o, err := lookup(s.cfg.Store.View(ctx), cluster, name)
	if err != nil {
		return nil, err
	}
	change(&o.Spec)
	user := proposal{Put: Put{Connection: o.Spec}, old: o}.user()       // the login may not be made yet
	all, err := s.values(ctx, o.Spec, Login{User: user, Password: "-"}) // something, so that nothing is missing
	if err != nil {
		return nil, err
	}
	for i := range all {
		if all[i].Secret {
			all[i].Value = ""
		}
	}
	return all, nil
}
