package connector

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"strings"
	"time"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// lookTime is how long a plan looks at a server.
const lookTime = 10 * time.Second

// Plan is what a PUT would do, and what is missing for it. It holds no secret.
type Plan struct {
	// Missing is all that a PUT would be refused for, and what it would be accepted
	// with and then fail for. Empty: a PUT is accepted.
	Missing  []Missing                        `json:"missing,omitempty"`
	Previews []servicelinker.OperationPreview `json:"previews,omitempty"`
	Details  servicelinker.Plan               `json:"details"`
}

// Missing is one thing that is missing.
type Missing struct {
	Kind    fault.Kind `json:"kind"`
	Code    string     `json:"code"`
	Message string     `json:"message"`
	Target  string     `json:"target,omitempty"`
	Fix     string     `json:"fix,omitempty"`
	// Permission is one that the caller lacks over Scope; Role is the narrowest that has it.
	Permission string `json:"permission,omitempty"`
	Scope      string `json:"scope,omitempty"`
	Role       string `json:"role,omitempty"`
}

// Plan says what a PUT would do now. It touches nothing. unclear is why the request
// was not understood; empty: it was.
func (s *Service) Plan(ctx context.Context, want Put, unclear ...error) (Plan, error) {
	p, against := s.weigh(ctx, want, unclear...)
	for _, err := range against {
		if k := fault.KindOf(err); k == fault.Internal || k == fault.Unauthenticated {
			return Plan{}, err
		}
	}
	pl := planner{s: s, proposal: p, out: Plan{Details: servicelinker.Plan{
		Connection: p.ID, Change: servicelinker.Create,
		Cluster: servicelinker.PlannedCluster{Answers: p.state.State == "Succeeded", Managed: p.state.Managed, Reason: p.state.Reason, Busy: p.state.Busy},
	}}}
	for _, err := range against {
		pl.miss(err)
	}
	if p.env == nil { // nobody can say what would be made
		return pl.out, nil
	}
	if err := pl.steps(ctx); err != nil {
		return Plan{}, err
	}
	if !pl.denied {
		if err := pl.foresee(ctx); err != nil {
			return Plan{}, err
		}
	}
	return pl.out, nil
}

// planner fills a plan in.
type planner struct {
	s *Service
	proposal
	out    Plan
	denied bool // something is not allowed: nothing is looked at in the caller's name
	reach  Reach
	on     bool  // the target is on a registered server
	login  Login // that would be delivered
	known  bool  // its password is
	same   bool  // the credential that was given is kept already
}

func (p *planner) miss(err error) {
	e := fault.From(err)
	m := Missing{Kind: e.Kind, Code: e.Code, Message: e.Message, Target: e.Target, Fix: e.Fix}
	var told *problemError
	var perm *permissionError
	switch {
	case errors.As(err, &told):
		m = Missing{Kind: fault.Conflict, Code: told.Code, Message: told.Message, Target: told.Object, Fix: told.Fix}
	case errors.As(err, &perm):
		m.Permission, m.Scope, m.Role = perm.op.Action, perm.op.Resource, narrowest(perm.op.Action)
	}
	p.denied = p.denied || e.Kind == fault.Denied
	p.out.Missing = append(p.out.Missing, m)
}

// narrowest is the narrowest role that allows an action; empty: no role does, as
// with what the access policies of a vault allow.
func narrowest(action string) string {
	roles := access.Roles()
	if strings.Count(action, "/") < 2 {
		return ""
	}
	for i := range roles {
		if r := roles[len(roles)-1-i]; r.Allows(action) {
			return r.Name
		}
	}
	return ""
}

// steps says what would be made, in the order in which it is.
func (p *planner) steps(ctx context.Context) (err error) {
	if p.reach, p.on, err = p.s.reachTarget(ctx, p.Connection); err != nil {
		return err
	}
	tx := p.s.cfg.Store.View(ctx)
	for _, v := range p.env {
		k := servicelinker.PlannedKey{Name: v.Name, Secret: v.Secret}
		if !v.Secret && !p.denied { // what the target is like is for those who may read it
			k.Value = v.Value
		}
		p.out.Details.Environment = append(p.out.Details.Environment, k)
	}
	if g := p.Auth.Given; g != nil && g.Name == "" && p.old != nil && p.old.Spec.Auth.Given != nil {
		p.same = p.Secret == "" || !p.denied && p.s.sameGiven(ctx, p.proposal, p.vault)
	}
	p.out.Details.Change = p.changed(p.given())
	if err := p.extension(tx); err != nil {
		return err
	}
	p.credential(ctx)
	if err := p.planGrants(ctx); err != nil {
		return err
	}
	return p.objects(ctx, tx)
}

// given is the credential that was given, as it would be stored: nil if there is
// none, without a version if it is a new one.
func (p *planner) given() *SecretRef {
	switch g := p.Auth.Given; {
	case g == nil || g.Name != "":
		return g
	case p.same:
		return p.old.Spec.Auth.Given
	}
	return &SecretRef{Vault: p.vault, Name: p.secretName()}
}

func (p *planner) changed(given *SecretRef) servicelinker.Change {
	if p.old == nil {
		return servicelinker.Create
	}
	want := p.Connection
	want.ID, want.Rotations, want.Auth.Given = p.old.Spec.ID, p.old.Spec.Rotations, given
	if reflect.DeepEqual(want, p.old.Spec) {
		return servicelinker.Unchanged
	}
	return servicelinker.Modify
}

func (p *planner) preview(name, kind, description, action, scope string) {
	p.out.Previews = append(p.out.Previews, servicelinker.OperationPreview{Name: name, OperationType: kind, Description: description, Action: action, Scope: scope})
}

const (
	configConnection = "configConnection"
	configAuth       = "configAuth"
)

func (p *planner) extension(tx *store.Tx) error {
	o, err := Extensions.Lookup(tx, key(p.cluster, ExtensionName))
	if p.out.Details.Extension = "present"; err != nil || o != nil {
		return err
	}
	p.out.Details.Extension = "install"
	p.preview("installExtension", configConnection, "Install the extension "+ExtensionName+" in the cluster.", actionExtensionWrite, p.cluster.String())
	return nil
}

// credential says which login is made, and where its secret is kept.
func (p *planner) credential(ctx context.Context) {
	g, change := p.Auth.Given, servicelinker.Create
	p.login = Login{User: p.user(), Password: "-"} // until it is known
	at := SecretRef{Vault: p.vault, Name: p.secretName()}
	switch {
	case g == nil && p.Auth.Type != Secret: // there is no secret
		p.known = true
		return
	case g != nil && g.Name != "":
		p.out.Details.Secret = &servicelinker.PlannedSecret{Vault: g.Vault, VaultChange: servicelinker.Unchanged, Name: g.Name, Change: servicelinker.Unchanged}
		p.read(ctx, *g)
		return
	case p.same:
		at, change = *p.old.Spec.Auth.Given, servicelinker.Unchanged
		p.read(ctx, at)
	case g != nil:
		if p.old != nil && p.old.Spec.Auth.Given != nil {
			change = servicelinker.Modify
		}
		if p.Secret != "" { // else it is missing, and that was said
			p.login.Password, p.known = p.Secret, !p.denied
		}
	case p.old != nil && p.old.Status.Credential.Role != "":
		at, change = p.old.Status.Credential.Secret, servicelinker.Unchanged
		p.read(ctx, at)
	}
	if g == nil {
		p.makes(change)
	}
	p.keeps(at, change)
}

// read reads the password that would be delivered, for somebody who may deliver it.
func (p *planner) read(ctx context.Context, ref SecretRef) {
	if p.denied {
		return
	}
	password, err := p.s.cfg.Vaults.Get(system(ctx), ref)
	if err != nil {
		p.miss(err)
		return
	}
	p.login.Password, p.known = password, true
}

// makes is the login that Keyfleet makes.
func (p *planner) makes(change servicelinker.Change) {
	id, _ := serverOf(p.Target.ID)
	l := servicelinker.PlannedLogin{Server: id.String(), Role: p.roleName(), User: p.login.User, Privileges: privileges(p.reach.Kind, p.reach.Database), Change: change}
	p.out.Details.Login = &l
	if change == servicelinker.Create {
		p.preview("createLogin", configAuth, "Make the login "+l.User+" of the role "+l.Role+": "+l.Privileges+".", id.Type()+"/write", l.Server)
	}
}

// privileges are what package target gives a login, in words.
func privileges(kind, database string) string {
	switch kind {
	case "postgres":
		return "it connects to the database " + database + ", makes what it likes in the schema public, and reads and writes the tables there that the administrator may hand on; it makes no databases and no roles"
	case "mysql":
		return "it reads, writes, makes and drops what is in the database " + database + ", and has nothing in any other"
	case "redis":
		return "it uses all keys and channels, by all commands but the dangerous and administrative ones"
	case "rabbitmq":
		return "it configures, writes and reads everything in the virtual host " + database + ", and administers nothing"
	}
	return ""
}

// keeps is where Keyfleet keeps the credential.
func (p *planner) keeps(at SecretRef, change servicelinker.Change) {
	secret := servicelinker.PlannedSecret{Vault: at.Vault, VaultChange: servicelinker.Unchanged, Name: at.Name, Change: change}
	if change != servicelinker.Unchanged && !p.vaultIs {
		secret.VaultChange = servicelinker.Create
		p.preview("createKeyVault", configConnection, "Make the vault for the credentials of the cluster's connections.", "Microsoft.KeyVault/vaults/write", p.vault)
	}
	p.out.Details.Secret = &secret
	if change != servicelinker.Unchanged {
		p.preview("configKeyVaultSecret", configConnection, "Keep the credential in the vault as "+secret.Name+".", "secrets/set", p.vault)
	}
}

// planGrants says what the connection is given in Keyfleet itself.
func (p *planner) planGrants(ctx context.Context) error {
	if !p.Auth.actsAs() {
		return nil
	}
	o := &Object{Meta: store.Meta{ID: key(p.cluster, p.Name())}, Spec: p.Connection}
	if p.old != nil {
		o.Status.Grants = p.old.Status.Grants
	}
	all, err := controller{p.s}.grants(ctx, o, p.cluster)
	if err != nil {
		return err
	}
	policy := false
	for _, g := range all {
		shared, err := sharedGrant(p.s.cfg.Store.View(ctx), o.ID, g)
		if err != nil {
			return err
		}
		policy = policy || g.Kind == accessPolicy
		p.planGrant(g, shared, shared || slices.Contains(o.Status.Grants, g))
	}
	if _, ours := p.s.cfg.Vaults.Endpoint(ctx, p.Target.ID); ours && !policy { // somebody else has given it
		p.planGrant(Grant{Kind: accessPolicy, On: p.Target.ID, To: p.Auth.ObjectID}, false, true)
	}
	return nil
}

func (p *planner) planGrant(g Grant, shared, there bool) {
	out := servicelinker.PlannedGrant{Kind: g.Kind, On: g.On, To: g.To, Change: servicelinker.Create, Shared: shared}
	switch {
	case there:
		out.Change = servicelinker.Unchanged
	case g.Kind == federatedCredential:
		p.preview("createFederatedCredential", configAuth, "Let tokens of "+g.To+" act as the identity.", actionAssign, g.On)
	default:
		p.preview("createAccessPolicy", configAuth, "Let the identity read the secrets of the vault.", actionPolicies, g.On)
	}
	p.out.Details.Grants = append(p.out.Details.Grants, out)
}

// objects says what becomes of the cluster's objects, by what was last seen there.
func (p *planner) objects(ctx context.Context, tx *store.Tx) error {
	d, err := p.s.desiredWith(ctx, p.Connection, p.login)
	if err != nil {
		return err
	}
	seen, err := p.seen(tx)
	if err != nil {
		return err
	}
	add := func(kind, namespace, name, hash string, known bool) {
		o := servicelinker.PlannedObject{Kind: kind, Namespace: namespace, Name: name, Change: servicelinker.Create}
		for _, there := range seen.own {
			if there.Kind == kind && there.Namespace == namespace && there.Name == name {
				o.Change = servicelinker.Modify
				if known && there.Hash == hash {
					o.Change = servicelinker.Unchanged
				}
			}
		}
		if kind == "ServiceAccount" && seen.accounts[namespace+"/"+name] {
			o.Shared = true
			if o.Change == servicelinker.Create {
				o.Change = servicelinker.Unchanged
			}
		}
		p.out.Details.Objects = append(p.out.Details.Objects, o)
	}
	if d.Secret != nil {
		add("Secret", d.Namespace, d.Secret.Name, wire.SecretHash(d.Secret.Data), p.known)
	}
	if d.ProviderClass != nil {
		hash, err := d.ProviderClass.Hash()
		if err != nil {
			return err
		}
		add("SecretProviderClass", d.Namespace, d.ProviderClass.Name, hash, true)
	}
	if d.ServiceAccount != nil {
		add("ServiceAccount", d.Namespace, d.ServiceAccount.Name, wire.SecretHash(d.ServiceAccount.Annotations), true)
	}
	r := &p.out.Details.Restart
	for _, o := range p.out.Details.Objects {
		r.Needed = r.Needed || o.Change == servicelinker.Modify && o.Kind != "ServiceAccount"
	}
	r.Consumers = seen.consumers
	p.out.Details.Objects = append(p.out.Details.Objects, p.desiredState(d.Revision))
	p.preview("configSourceProperties", configConnection, "Bring the objects into the namespace "+d.Namespace+".", actionWrite, p.cluster.String())
	return nil
}

// desiredState is the Secret in which the extension reads what the connection shall
// be. Package scextension names it.
func (p *planner) desiredState(revision string) servicelinker.PlannedObject {
	o := servicelinker.PlannedObject{Kind: "Secret", Namespace: "sc-system", Name: "connection-" + shortHash(strings.ToLower(p.ID)), Change: servicelinker.Create}
	switch {
	case p.old == nil || p.old.Status.Desired == "":
	case p.known && p.old.Status.Desired == revision:
		o.Change = servicelinker.Unchanged
	default:
		o.Change = servicelinker.Modify
	}
	return o
}

// inCluster is what was last seen in the cluster.
type inCluster struct {
	own       []wire.AppliedObject // of the connection
	consumers []wire.Consumer      // of the connection, with older values
	accounts  map[string]bool      // NAMESPACE/NAME of the accounts of other connections
}

func (p *planner) seen(tx *store.Tx) (inCluster, error) {
	out := inCluster{accounts: map[string]bool{}}
	all, err := reports.List(tx, strings.ToLower(p.cluster.StoreKey())+"/")
	for _, r := range all {
		a := r.Spec.Applied
		switch {
		case a == nil:
		case r.ID == key(p.cluster, p.Name()):
			out.own, out.consumers = a.Objects, a.Consumers
		default:
			for _, o := range a.Objects {
				if o.Kind == "ServiceAccount" {
					out.accounts[o.Namespace+"/"+o.Name] = true
				}
			}
		}
	}
	return out, err
}

// foresee finds what a PUT would be accepted with and then fail for.
func (p *planner) foresee(ctx context.Context) error {
	if p.state.State == "Succeeded" {
		if err := p.trusted(p.state); err != nil {
			p.miss(err)
		}
		var told *problemError
		o := &Object{Meta: store.Meta{ID: key(p.cluster, p.Name())}, Spec: p.Connection}
		if err := p.s.addon(ctx, o, p.cluster, p.state); errors.As(err, &told) {
			p.miss(err)
		}
	}
	if !p.on || p.Auth.Type != Secret {
		return nil
	}
	ctx, cancel := context.WithTimeout(system(ctx), lookTime)
	defer cancel()
	var err error
	switch {
	case p.Auth.Given == nil:
		_, err = p.s.cfg.Maker.Check(ctx, p.reach)
	case p.known:
		_, err = p.s.cfg.Maker.Prove(ctx, p.reach, p.login)
	}
	if err != nil {
		p.miss(foreseen(err))
	}
	return nil
}

// foreseen is a failure to look at a server, which says more than that something
// went wrong.
func foreseen(err error) error {
	if fault.KindOf(err) != fault.Internal {
		return err
	}
	return fault.New(fault.Unavailable, "TargetUnreachable", "The server of the target does not answer as it should.").WithFix("keyfleet server show says how it is reached").Because(err)
}
