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
	Secret     string // the credential itself, where one was given; it goes into the vault
	FailIfBusy bool   // refuse while something else changes the cluster, instead of waiting
}

// Put makes a connection, or changes one. The world follows later: see [Object].
func (s *Service) Put(ctx context.Context, want Put) (out *Object, created bool, err error) {
	cluster, name, err := s.complete(ctx, &want.Connection)
	if err != nil {
		return nil, false, err
	}
	op := access.Op{Action: actionWrite, Resource: want.ID, Detail: string(want.Auth.Type) + " to " + want.Target.Word + " " + want.Target.ID}
	if err := s.allowed(ctx, op, want.Connection); err != nil {
		return nil, false, err
	}
	state, err := s.cfg.Clusters.State(ctx, cluster)
	if err != nil {
		return nil, false, err
	}
	if want.FailIfBusy && state.Busy != "" {
		return nil, false, busy(state)
	}
	old, err := Connections.Lookup(s.cfg.Store.View(ctx), key(cluster, name))
	if err != nil {
		return nil, false, err
	}
	if err := s.keepGiven(ctx, cluster, state, &want, old); err != nil {
		return nil, false, err
	}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if err := s.place(tx, cluster); err != nil {
			return err
		}
		if err := s.collides(tx, cluster, want.Connection); err != nil {
			return err
		}
		if out, err = Connections.Lookup(tx, key(cluster, name)); err != nil {
			return err
		}
		if created = out == nil; created {
			out = &Object{Meta: store.Meta{ID: key(cluster, name), Finalizers: []string{controllerName}}, Spec: want.Connection, Status: Status{State: "Accepted"}}
			if err := wantExtension(tx, cluster); err != nil {
				return err
			}
			return Connections.Insert(tx, out)
		}
		return s.change(tx, out, want.Connection)
	})
	return out, created, err
}

// complete checks a connection and fills in what follows from it.
func (s *Service) complete(ctx context.Context, c *Connection) (cluster arm.ID, name string, err error) {
	cluster, name, err = parseLinker(c.ID)
	if err != nil {
		return cluster, "", err
	}
	c.ID, c.Cluster = LinkerID(cluster, name), cluster.String()
	if err := c.check(s.cfg.Catalogue); err != nil {
		return cluster, "", err
	}
	switch c.Auth.Type {
	case WorkloadIdentity:
		i, err := s.cfg.Identities.Find(ctx, c.Auth.Identity, c.Auth.ClientID)
		if err != nil {
			return cluster, "", err
		}
		c.Auth.Identity, c.Auth.ClientID, c.Auth.TenantID, c.Auth.ObjectID = i.ID, i.ClientID, i.TenantID, i.ObjectID
	case ServicePrincipal:
		if c.Auth.TenantID == "" {
			c.Auth.TenantID = s.cfg.Tenant
		}
	}
	if c.Auth.Type == Secret && c.Auth.Given == nil {
		id, ok := serverOf(c.Target.ID)
		if !ok {
			return cluster, "", fault.New(fault.Invalid, "InvalidArgument", "The credential can be made only on a registered server, and '%.200s' is none.", c.Target.ID).
				At("properties.targetService.id").WithFix("give the id of a server that \"keyfleet server register\" made, or give the secret")
		}
		if _, err := lookupServer(s.cfg.Store.View(ctx), id); err != nil {
			return cluster, "", err
		}
	}
	_, err = s.values(ctx, *c, Login{User: "check", Password: "check"})
	return cluster, name, err
}

// allowed decides about the connection and about all that it will do in the caller's name.
func (s *Service) allowed(ctx context.Context, op access.Op, c Connection) error {
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	if id, err := arm.ParseID(c.Target.ID); err == nil && len(id.Types) > 0 {
		need := access.Op{Action: id.Provider + "/" + strings.Join(id.Types[:1], "/") + "/read", Resource: id.String()}
		if c.Auth.Type == Secret && c.Auth.Given == nil {
			need.Action = id.Provider + "/" + strings.Join(id.Types[:1], "/") + "/write" // a login is made there
		}
		if id.Is("Microsoft.KeyVault/vaults") && c.Auth.Type == WorkloadIdentity {
			need.Action = "Microsoft.KeyVault/vaults/accessPolicies/write"
		}
		if err := s.may(ctx, need); err != nil {
			return err
		}
	}
	if c.Auth.Type == WorkloadIdentity {
		if err := s.cfg.Identities.MayTrust(ctx, c.Auth.Identity); err != nil {
			return err
		}
	}
	if c.Vault != "" {
		return s.cfg.Vaults.MaySet(ctx, SecretRef{Vault: c.Vault, Name: c.secretName()})
	}
	return nil
}

// may refuses, in the words of the documentation, what the caller may not do.
func (s *Service) may(ctx context.Context, op access.Op) error {
	if s.cfg.Gate.Can(ctx, op) == nil {
		return nil
	}
	err := s.cfg.Gate.Read(ctx, op) // records the refusal
	if fault.KindOf(err) != fault.Denied {
		return err
	}
	who, _ := access.From(ctx)
	return fault.New(fault.Denied, "AuthorizationFailed", "You do not have permission to perform action '%s' over scope '%s'. If access was recently granted, please refresh your credentials.", op.Action, op.Resource).
		At(op.Resource).WithFix("keyfleet role assign --object-id %s --role Contributor --scope %s", who.Principal.ObjectID, op.Resource).Because(err)
}

func busy(c ClusterState) error {
	return fault.New(fault.Conflict, "Conflict", "The cluster '%s' is being updated: %s is running.", c.ID, c.Busy).
		WithFix("wait for its end (keyfleet cluster show), or leave out --if-busy=fail: the connection is then made afterwards").After(30 * time.Second)
}

// keepGiven puts a credential that was given into the vault. A crash after it
// leaves a version that nobody names.
func (s *Service) keepGiven(ctx context.Context, cluster arm.ID, state ClusterState, want *Put, old *Object) error {
	g := want.Auth.Given
	switch {
	case g == nil:
		return nil
	case g.Name != "": // it is in a vault already
		return s.cfg.Vaults.MayGet(ctx, *g)
	case want.Secret == "" && old != nil && old.Spec.Auth.Given != nil:
		want.Auth.Given = old.Spec.Auth.Given // as it was
		return nil
	case want.Secret == "":
		return fault.New(fault.Invalid, "InvalidArgument", "Authentication by %s needs the secret.", want.Auth.Type).At("properties.authInfo.secretInfo.value")
	}
	system := access.AsSystem(ctx, controllerName)
	vaultID := want.Vault
	if vaultID == "" {
		var err error
		if vaultID, err = s.cfg.Vaults.Ensure(system, cluster, state.Location); err != nil {
			return err
		}
	}
	ref := SecretRef{Vault: vaultID, Name: want.secretName()}
	if old != nil && old.Spec.Auth.Given != nil && old.Spec.Auth.Given.Name == ref.Name {
		if same, err := s.cfg.Vaults.Get(system, *old.Spec.Auth.Given); err == nil && same == want.Secret {
			want.Auth.Given = old.Spec.Auth.Given
			return nil
		}
	}
	var err error
	ref.Version, err = s.cfg.Vaults.Set(system, ref, want.Secret)
	want.Auth.Given = &ref
	return err
}

func (s *Service) place(tx *store.Tx, cluster arm.ID) error {
	if s.cfg.Place == nil {
		return nil
	}
	for _, namespace := range []string{"Microsoft.ServiceLinker", "Microsoft.KubernetesConfiguration"} {
		if err := s.cfg.Place(tx, cluster.Subscription, cluster.ResourceGroup, namespace); err != nil {
			return err
		}
	}
	return nil
}

// collides refuses a connection whose Secret would be that of another one.
func (s *Service) collides(tx *store.Tx, cluster arm.ID, want Connection) error {
	all, err := Connections.List(tx, strings.ToLower(cluster.StoreKey())+"/")
	if err != nil {
		return err
	}
	var placed []Placed
	for _, o := range all {
		if !strings.EqualFold(o.Spec.ID, want.ID) {
			placed = append(placed, Placed{o.Spec.Name(), o.Spec.Namespace})
		}
	}
	return CheckCollision(Placed{want.Name(), want.Namespace}, placed)
}

// change takes over what can change about a connection.
func (s *Service) change(tx *store.Tx, o *Object, want Connection) error {
	for _, f := range []struct{ at, old, new string }{
		{"scope", o.Spec.Namespace, want.Namespace},
		{"targetService", o.Spec.Target.Word, want.Target.Word},
		{"targetService.id", strings.ToLower(o.Spec.Target.ID), strings.ToLower(want.Target.ID)},
		{"authInfo.authType", string(o.Spec.Auth.Type), string(want.Auth.Type)},
	} {
		if f.old != f.new {
			return fault.New(fault.Conflict, "PropertyChangeNotAllowed", "A connection cannot change from '%.200s' to '%.200s' here.", f.old, f.new).
				At("properties." + f.at).WithFix("delete the connection and make it anew, or make another one beside it and delete this one afterwards")
		}
	}
	if !o.Deleting.IsZero() {
		return fault.New(fault.Conflict, "ConnectionBeingDeleted", "The connection '%s' is being deleted.", o.Spec.ID).WithFix("wait until it is gone").After(5 * time.Second)
	}
	want.ID, want.Rotations = o.Spec.ID, o.Spec.Rotations
	o.Spec = want
	return Connections.Put(tx, o)
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

// Of counts the connections of a cluster, in a transaction that would forget it.
func Of(tx *store.Tx, cluster arm.ID) (int, error) {
	all, err := Connections.List(tx, strings.ToLower(cluster.StoreKey())+"/")
	return len(all), err
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
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionList, Resource: LinkerID(cluster, name)}); err != nil {
		return nil, err
	}
	o, err := lookup(s.cfg.Store.View(ctx), cluster, name)
	if err != nil {
		return nil, err
	}
	all, err := s.values(ctx, o.Spec, Login{User: o.Status.Credential.User, Password: "-"}) // something, so that nothing is missing
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
