package connector

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// What else a connection needs to be allowed.
const (
	actionAssign   = "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action"
	actionPolicies = "Microsoft.KeyVault/vaults/accessPolicies/write"
)

// proposal is a connection that somebody asks for, and what was found about it.
type proposal struct {
	Put
	cluster arm.ID
	state   ClusterState // the zero value: there is no such cluster
	old     *Object      // the connection as it is; nil: there is none
	env     []Variable   // credentials are stand-ins; nil: something is wrong with what is asked for
	vault   string       // ARM id of the vault for a credential that is made or was given; empty: none is needed
	vaultIs bool         // it is there
	unclear bool         // not all of the request was understood
}

// weigh looks at everything about a connection before anything is touched, and
// fills in what follows from what was said. against is all that a PUT is refused
// for: a PUT says the first of it, a plan all. A request that could not be understood,
// for the reasons in unclear, is looked at as far as it was.
func (s *Service) weigh(ctx context.Context, want Put, unclear ...error) (p proposal, against []error) {
	p = proposal{Put: want, unclear: len(unclear) > 0}
	cluster, name, err := parseLinker(want.ID)
	if err != nil {
		return p, []error{err}
	}
	p.cluster, p.ID, p.Cluster = cluster, LinkerID(cluster, name), cluster.String()
	if p.old, err = Connections.Lookup(s.cfg.Store.View(ctx), key(cluster, name)); err != nil {
		return p, []error{err}
	}
	against = append(p.checkPlace(), unclear...)
	if !p.unclear {
		against = append(against, s.complete(ctx, &p)...)
	}
	against = append(against, s.allowed(ctx, p)...)
	against = append(against, s.around(ctx, &p)...)
	seen := map[string]bool{}
	return p, slices.DeleteFunc(against, func(err error) bool { // what two ways of looking find is said once
		twice := seen[err.Error()]
		seen[err.Error()] = true
		return twice
	})
}

// complete checks what a connection is, and fills in what follows from it.
func (s *Service) complete(ctx context.Context, p *proposal) (wrong []error) {
	c := &p.Connection
	wrong = c.check(s.cfg.Catalogue)
	t, err := s.cfg.Catalogue.Target(c.Target.Word)
	if err != nil {
		return wrong // it says so
	}
	switch {
	case c.Auth.actsAs() && (c.Auth.Identity != "" || c.Auth.ClientID != ""):
		i, err := s.cfg.Identities.Find(ctx, c.Auth.Identity, c.Auth.ClientID)
		if err != nil {
			wrong = append(wrong, err)
			break
		}
		c.Auth.Identity, c.Auth.ClientID, c.Auth.TenantID, c.Auth.ObjectID = i.ID, i.ClientID, i.TenantID, i.ObjectID
	case (c.Auth.Type == ServicePrincipal || c.Auth.Type == CSIAddOn) && c.Auth.TenantID == "":
		c.Auth.TenantID = s.cfg.Tenant
	case c.Auth.Type == Secret && c.Auth.Given == nil && t.Makes != "":
		wrong = append(wrong, refusals(s.makeable(ctx, c.Target.ID))...)
	}
	filled := *c
	if len(wrong) > 0 { // what is missing was said; names can be wrong nevertheless
		filled.Target.Values = map[string]string{}
		for name := range t.Values {
			filled.Target.Values[name] = "-"
		}
		maps.Copy(filled.Target.Values, c.Target.Values)
	}
	env, err := s.values(ctx, filled, Login{User: p.user(), Password: "-"})
	if err != nil && p.user() == "" {
		if _, named := s.values(ctx, filled, Login{User: "-", Password: "-"}); named == nil {
			err = fault.New(fault.Invalid, "InvalidArgument", "The variables hold the name of a user, and none was given.").At("properties.authInfo.name").WithFix("--secret name=USER")
			return append(wrong, err)
		}
	}
	if err != nil && (len(wrong) == 0 || fault.From(err).Code == "InvalidCustomizedKey") {
		return append(wrong, err)
	}
	if len(wrong) == 0 {
		p.env = env
	}
	return wrong
}

// makeable fails unless Keyfleet makes logins on the server that the target is on.
func (s *Service) makeable(ctx context.Context, target string) error {
	id, ok := serverOf(target)
	if !ok {
		return fault.New(fault.Invalid, "InvalidArgument", "The credential can be made only on a registered server, and '%.200s' is none.", target).
			At("properties.targetService.id").WithFix("give the id of a server that \"keyfleet server register\" made, or give the secret")
	}
	_, err := lookupServer(s.cfg.Store.View(ctx), id)
	return err
}

// user is the name that the workload will log in with, as far as that is known before.
func (p proposal) user() string {
	switch {
	case p.Auth.Type != Secret || p.Auth.Given != nil:
		return p.Auth.User
	case p.old != nil && p.old.Status.Credential.Role != "":
		return p.old.Status.Credential.User
	}
	return slots(p.roleName())[0]
}

// allowed decides about the connection and about all that it will do in the caller's
// name, and returns every refusal.
func (s *Service) allowed(ctx context.Context, p proposal) []error {
	c := p.Connection
	role := func(op access.Op) error {
		return s.may(ctx, op, func() error {
			if s.cfg.Gate.Can(ctx, op) == nil {
				return nil
			}
			return s.cfg.Gate.Read(ctx, op) // records the refusal
		})
	}
	out := refusals(role(access.Op{Action: actionWrite, Resource: c.ID, Detail: c.detail()}))
	if id, err := arm.ParseID(c.Target.ID); err == nil && len(id.Types) > 0 {
		typ := id.Provider + "/" + id.Types[0]
		need := access.Op{Action: typ + "/read", Resource: id.String()}
		if c.Auth.Type == Secret && c.Auth.Given == nil {
			need.Action = typ + "/write" // a login is made there
		}
		if id.Is("Microsoft.KeyVault/vaults") && c.Auth.actsAs() {
			need.Action = actionPolicies
		}
		out = append(out, refusals(role(need))...)
	}
	if c.Auth.actsAs() && c.Auth.Identity != "" && c.Auth.ObjectID != "" {
		op := access.Op{Action: actionAssign, Resource: c.Auth.Identity}
		out = append(out, refusals(s.may(ctx, op, func() error { return s.cfg.Identities.MayTrust(ctx, c.Auth.Identity) }))...)
	}
	if c.Vault != "" {
		ref := SecretRef{Vault: c.Vault, Name: c.secretName()}
		out = append(out, refusals(s.may(ctx, access.Op{Action: "secrets/set", Resource: c.Vault}, func() error { return s.cfg.Vaults.MaySet(ctx, ref) }))...)
	}
	if g := c.Auth.Given; g != nil && g.Name != "" {
		out = append(out, refusals(s.may(ctx, access.Op{Action: "secrets/get", Resource: g.Vault}, func() error { return s.cfg.Vaults.MayGet(ctx, *g) }))...)
	}
	return out
}

// detail is what the record of a change says beside the connection.
func (c Connection) detail() string {
	return string(c.Auth.Type) + " to " + c.Target.Word + " " + c.Target.ID
}

// permissionError is a refusal for want of a permission.
type permissionError struct {
	refusal *fault.Error
	op      access.Op
}

func (e *permissionError) Error() string { return e.refusal.Error() }

func (e *permissionError) Unwrap() error { return e.refusal }

// may says a refusal of decide, which is about op, in the words of the
// documentation; what mends it is what decide says.
func (s *Service) may(ctx context.Context, op access.Op, decide func() error) error {
	err := decide()
	if err == nil || fault.KindOf(err) != fault.Denied {
		return err
	}
	refusal := fault.New(fault.Denied, "AuthorizationFailed",
		"You do not have permission to perform action '%s' over scope '%s'. If access was recently granted, please refresh your credentials.", op.Action, op.Resource).
		At(op.Resource).WithFix("%s", fault.From(err).Fix).Because(err)
	return &permissionError{refusal, op}
}

// around looks at what a connection needs beside itself: the cluster, the secret
// that was given, a vault, and room among the others.
func (s *Service) around(ctx context.Context, p *proposal) []error {
	var out []error
	state, err := s.cfg.Clusters.State(ctx, p.cluster)
	p.state = state
	out = append(out, refusals(err)...)
	if p.FailIfBusy && state.Busy != "" {
		out = append(out, busy(state))
	}
	had := p.old != nil && p.old.Spec.Auth.Given != nil
	if g := p.Auth.Given; g != nil && g.Name == "" && p.Secret == "" && !had {
		out = append(out, fault.New(fault.Invalid, "InvalidArgument", "Authentication by %s needs the secret.", p.Auth.Type).At("properties.authInfo.secretInfo.value"))
	}
	out = append(out, refusals(s.vaultFor(ctx, p))...)
	return append(out, s.standing(s.cfg.Store.View(ctx), *p)...)
}

// vaultFor finds the vault of a credential that is made, or was given by itself. That
// of a cluster's connections is made by the first one.
func (s *Service) vaultFor(ctx context.Context, p *proposal) error {
	made := p.Auth.Type == Secret && p.Auth.Given == nil
	if !made && (p.Auth.Given == nil || p.Auth.Given.Name != "") {
		return nil
	}
	if p.vault, p.vaultIs = p.Vault, true; p.vault != "" {
		return nil // allowed has looked whether it is there
	}
	var err error
	if p.vault, p.vaultIs, err = s.cfg.Vaults.Default(ctx, p.cluster); err != nil || p.vaultIs || s.cfg.Place == nil {
		return err
	}
	return s.cfg.Place(s.cfg.Store.View(ctx), p.cluster.Subscription, p.cluster.ResourceGroup, "Microsoft.KeyVault")
}

// standing is what the store has against a connection, in the transaction that
// would make it.
func (s *Service) standing(tx *store.Tx, p proposal) []error {
	out := s.places(tx, p.cluster)
	out = append(out, refusals(s.collides(tx, p.cluster, p.Connection))...)
	old, err := Connections.Lookup(tx, key(p.cluster, p.Name()))
	if err != nil {
		return append(out, err)
	}
	if p.Of != nil && (old == nil || old.UID != p.Of.UID || old.Generation != p.Of.Generation) {
		out = append(out, fault.New(fault.Precondition, "PreconditionFailed", "The connection '%s' was changed meanwhile.", p.ID).WithFix("look at it again, and repeat the change"))
	}
	if old != nil {
		return append(out, changeable(old, p)...)
	}
	o, err := Extensions.Lookup(tx, key(p.cluster, ExtensionName))
	if err == nil && o != nil && !o.Deleting.IsZero() {
		err = extensionGoing(o)
	}
	return append(out, refusals(err)...)
}

// places is what stands against making something in the cluster's group. Each
// namespace that is not registered is named.
func (s *Service) places(tx *store.Tx, cluster arm.ID) []error {
	if s.cfg.Place == nil {
		return nil
	}
	var out []error
	for _, namespace := range []string{"Microsoft.ServiceLinker", "Microsoft.KubernetesConfiguration"} {
		out = append(out, refusals(s.cfg.Place(tx, cluster.Subscription, cluster.ResourceGroup, namespace))...)
	}
	return out
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

// changeable says what about a connection cannot become what is wanted.
func changeable(old *Object, want proposal) []error {
	var out []error
	for _, f := range []struct{ at, old, new string }{
		{"scope", old.Spec.Namespace, want.Namespace},
		{"targetService", old.Spec.Target.Word, want.Target.Word},
		{"targetService.id", strings.ToLower(old.Spec.Target.ID), strings.ToLower(want.Target.ID)},
		{"authInfo.authType", string(old.Spec.Auth.Type), string(want.Auth.Type)},
	} {
		if f.old != f.new && !want.unclear {
			out = append(out, fault.New(fault.Conflict, "PropertyChangeNotAllowed", "A connection cannot change from '%.200s' to '%.200s' here.", f.old, f.new).
				At("properties."+f.at).WithFix("delete the connection and make it anew, or make another one beside it and delete this one afterwards"))
		}
	}
	if !old.Deleting.IsZero() {
		out = append(out, fault.New(fault.Conflict, "ConnectionBeingDeleted", "The connection '%s' is being deleted.", old.Spec.ID).WithFix("wait until it is gone").After(5*time.Second))
	}
	return out
}
