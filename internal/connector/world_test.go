package connector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	testGroup   = "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/rg1"
	testCluster = testGroup + "/providers/Microsoft.ContainerService/managedClusters/prod"
	testServer  = testGroup + "/providers/Microsoft.DBforPostgreSQL/flexibleServers/main"
	testVault   = testGroup + "/providers/Microsoft.KeyVault/vaults/sc-prod"
)

// world is everything outside of a connection: a vault, a server with logins, a
// cluster. Each effect can fail before it happens, or happen and then be told as
// failed, as after a crash. What really does these things is tested elsewhere: here
// it misbehaves.
type world struct {
	*Service
	t       testing.TB
	store   *store.Store
	now     time.Time
	cluster ClusterState
	gone    bool                // the cluster is not registered any more
	vault   map[string][]string // secret -> versions
	logins  map[string]string   // user -> password
	roles   map[string]bool
	granted map[string]bool

	effects int    // so far
	fail    string // "before 3", "after 3": the third effect; once
}

func newWorld(t testing.TB) *world {
	t.Helper()
	backend := store.NewMemory()
	t.Cleanup(func() { backend.Close() })
	st, err := store.New(t.Context(), backend)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.jsonl"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Close)
	catalogue, err := LoadCatalogue()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		t: t, store: st, now: time.Now(), cluster: ClusterState{ID: testCluster, Location: "westus2", State: "Succeeded", Issuer: "https://issuer"},
		vault: map[string][]string{}, logins: map[string]string{"admin": "admin-password"}, roles: map[string]bool{}, granted: map[string]bool{},
	}
	w.Service = New(Config{
		Store: st, Gate: access.NewGate(access.Config{Store: st, Recorder: log}), Catalogue: catalogue, Clusters: w, Vaults: vaultOf{w}, Identities: identitiesOf{w}, Maker: makerOfWorld{w},
		Tenant: "tenant", Now: func() time.Time { return w.now }, Log: slog.New(slog.DiscardHandler),
	})
	return w
}

// effect does something to the world, unless it is the one that shall fail.
func (w *world) effect(do func()) error {
	w.effects++
	switch w.fail {
	case fmt.Sprint("before ", w.effects):
		w.fail = ""
		return errors.New("the connection was lost")
	case fmt.Sprint("after ", w.effects):
		w.fail = ""
		do()
		return errors.New("the answer was lost")
	}
	do()
	return nil
}

func (w *world) State(context.Context, arm.ID) (ClusterState, error) {
	if w.gone {
		return ClusterState{}, fault.New(fault.NotFound, "ResourceNotFound", "no cluster")
	}
	return w.cluster, nil
}

type vaultOf struct{ *world }

func (v vaultOf) Ensure(context.Context, arm.ID, string) (string, error) { return testVault, nil }
func (v vaultOf) Default(context.Context, arm.ID) (string, bool, error)  { return testVault, true, nil }
func (v vaultOf) MaySet(context.Context, SecretRef) error                { return nil }
func (v vaultOf) MayGet(context.Context, SecretRef) error                { return nil }
func (v vaultOf) Endpoint(context.Context, string) (string, bool)        { return "", false }
func (v vaultOf) Granted(_ context.Context, vault, who string) (bool, error) {
	return v.granted[vault+who], nil
}

func (v vaultOf) Grant(_ context.Context, vault, who string) error {
	return v.effect(func() { v.granted[vault+who] = true })
}

func (v vaultOf) Revoke(_ context.Context, vault, who string) error {
	return v.effect(func() { delete(v.granted, vault+who) })
}

func (v vaultOf) Set(_ context.Context, ref SecretRef, value string) (string, error) {
	err := v.effect(func() { v.vault[ref.Name] = append(v.vault[ref.Name], value) })
	return fmt.Sprint(len(v.vault[ref.Name])), err
}

func (v vaultOf) Get(_ context.Context, ref SecretRef) (string, error) {
	var n int
	if _, err := fmt.Sscan(ref.Version, &n); err != nil || n < 1 || n > len(v.vault[ref.Name]) {
		return "", fault.New(fault.NotFound, "SecretNotFound", "There is no version %q of %s.", ref.Version, ref.Name)
	}
	return v.vault[ref.Name][n-1], nil
}

func (v vaultOf) Delete(_ context.Context, ref SecretRef) error {
	return v.effect(func() { delete(v.vault, ref.Name) })
}

type identitiesOf struct{ *world }

func (i identitiesOf) Find(context.Context, string, string) (ManagedIdentity, error) {
	return ManagedIdentity{ID: testGroup + "/providers/Microsoft.ManagedIdentity/userAssignedIdentities/web", ClientID: "client", ObjectID: "object", TenantID: "tenant"}, nil
}
func (i identitiesOf) MayTrust(context.Context, string) error { return nil }
func (i identitiesOf) Trust(_ context.Context, _, name, _, _ string) error {
	return i.effect(func() { i.granted[name] = true })
}

func (i identitiesOf) Distrust(_ context.Context, _, name string) error {
	return i.effect(func() { delete(i.granted, name) })
}

type makerOfWorld struct{ *world }

func (m makerOfWorld) Check(_ context.Context, r Reach) ([]string, error) {
	_, err := m.Prove(context.Background(), r, r.Login)
	return nil, err
}

func (m makerOfWorld) Ensure(_ context.Context, _ Reach, role string, l Login) error {
	return m.effect(func() { m.roles[role], m.logins[l.User] = true, l.Password })
}

func (m makerOfWorld) Prove(_ context.Context, _ Reach, l Login) (time.Duration, error) {
	if m.logins[l.User] != l.Password || l.Password == "" {
		return 0, fault.New(fault.Denied, "InvalidDbSecret", "Error in username or password.")
	}
	return time.Millisecond, nil
}

func (m makerOfWorld) Revoke(_ context.Context, _ Reach, _, user string) error {
	return m.effect(func() { delete(m.logins, user) })
}

func (m makerOfWorld) Refused(ctx context.Context, r Reach, l Login) error {
	if _, err := m.Prove(ctx, r, l); err != nil {
		return nil
	}
	return fault.New(fault.Conflict, "TargetLoginNotRefused", "it works")
}

func (m makerOfWorld) Remove(_ context.Context, _ Reach, role string) (removed []string, err error) {
	for _, user := range slices.Sorted(maps.Keys(m.logins)) {
		if strings.HasPrefix(user, role) {
			removed = append(removed, "login "+user)
		}
	}
	return removed, m.effect(func() {
		maps.DeleteFunc(m.logins, func(user, _ string) bool { return strings.HasPrefix(user, role) })
		delete(m.roles, role)
	})
}

// register registers the server.
func (w *world) register() {
	w.t.Helper()
	_, _, err := w.PutServer(w.system(), ServerRegistration{
		Server: Server{ID: testServer, Location: "westus2", Host: "db.example.org", Administrator: "admin"}, Password: "admin-password",
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) system() context.Context { return access.AsSystem(w.t.Context(), "test") }

// database is a connection to the server with a credential that Keyfleet makes.
func database(name string) Put {
	return Put{Connection: Connection{
		ID: testCluster + "/providers/Microsoft.ServiceLinker/linkers/" + name, Target: TargetService{Word: "postgres-flexible", ID: testServer + "/databases/shop"},
		Auth: Authentication{Type: Secret}, Client: "go",
	}}
}

// put makes a connection.
func (w *world) put(p Put) *Object {
	w.t.Helper()
	o, _, err := w.Put(w.system(), p)
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

// turn lets the controller look once, as the runtime does, and a manager report
// what it would have brought. It reports whether the object is gone.
func (w *world) turn(id string, consumers ...wire.Consumer) bool {
	w.t.Helper()
	ctx, c := w.system(), controller{w.Service}
	o, err := Connections.Lookup(w.store.View(ctx), id)
	if err != nil {
		w.t.Fatal(err)
	}
	if o == nil {
		return true
	}
	if !o.Deleting.IsZero() {
		if done, _, _ := c.Finalize(ctx, w.store, o); done {
			w.update(func(tx *store.Tx) error { return Connections.RemoveFinalizer(tx, id, controllerName) })
			return true
		}
	} else {
		_, _ = c.Reconcile(ctx, w.store, o)
	}
	w.update(func(tx *store.Tx) error { return Connections.PutStatus(tx, o) })
	work, _, err := w.Work(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, k := range work[strings.ToLower(testCluster)] {
		if !strings.EqualFold(k.ID, o.Spec.ID) {
			continue
		}
		report := wire.ConnectionReport{Gone: k.Remove != ""}
		if k.Remove == "" {
			d, err := w.Desired(ctx, k.ID)
			if err != nil {
				continue // its vault failed; the next turn brings it
			}
			report.Applied = &wire.Applied{Revision: d.Revision, Time: w.now, Consumers: consumers, Objects: applied(w.t, d)}
		}
		if err := w.Report(ctx, k.ID, report); err != nil {
			w.t.Fatal(err)
		}
	}
	return false
}

// applied is what an operator makes of a desired state.
func applied(t testing.TB, d wire.Desired) (all []wire.AppliedObject) {
	t.Helper()
	if d.Secret != nil {
		all = append(all, wire.AppliedObject{Kind: "Secret", Namespace: d.Namespace, Name: d.Secret.Name, Hash: wire.SecretHash(d.Secret.Data)})
	}
	if d.ProviderClass != nil {
		hash, err := d.ProviderClass.Hash()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, wire.AppliedObject{Kind: "SecretProviderClass", Namespace: d.Namespace, Name: d.ProviderClass.Name, Hash: hash})
	}
	return all
}

func (w *world) update(fn func(*store.Tx) error) {
	w.t.Helper()
	if err := w.store.Update(w.t.Context(), fn); err != nil {
		w.t.Fatal(err)
	}
}

// settle turns until the connection is as it shall be, or gone.
func (w *world) settle(id string) *Object {
	w.t.Helper()
	for range 30 {
		if w.turn(id) {
			return nil
		}
		o, err := Connections.Get(w.store.View(w.t.Context()), id)
		if err != nil {
			w.t.Fatal(err)
		}
		if o.Deleting.IsZero() && o.Status.State == "Succeeded" && o.Status.Done == o.Generation && o.Status.Rotated == o.Spec.Rotations {
			return o
		}
	}
	o, _ := Connections.Get(w.store.View(w.t.Context()), id)
	w.t.Fatalf("it does not settle: %+v, problem %+v", o.Status, o.Status.Problem)
	return nil
}
