package pool

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// Names of the test's world.
const (
	testSub      = "042998e4-36dc-4b7d-8ce3-a7a2c4877d33"
	testIdentity = "/subscriptions/" + testSub + "/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools"
	testClient   = "b9f6dd56-d2d6-4967-99d7-8062d56fd84c"
	testSecret   = "https://prod1.vault.example/secrets/web"
)

var (
	testAccount = arm.ID{Subscription: testSub, ResourceGroup: "ACR", Provider: "Microsoft.Batch", Types: []string{"batchAccounts"}, Names: []string{"acct1"}}
	testPool    = arm.ID{Subscription: testSub, ResourceGroup: "ACR", Provider: "Microsoft.Batch", Types: []string{"batchAccounts", "pools"}, Names: []string{"acct1", "test2"}}
)

// world is a Fleet with doubles around it.
type world struct {
	t        testing.TB
	ctx      context.Context // acts as an owner
	store    *store.Store
	fleet    *Fleet
	audit    *records
	secrets  *vaultDouble
	packages packagesDouble
	provider *providerDouble
	boot     string    // the boot id that reports carry
	started  time.Time // and their time of start
}

type records struct {
	mu  sync.Mutex
	all []access.Record
}

func (r *records) Append(_ context.Context, rec access.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, rec)
	return nil
}

func (r *records) InTx(tx *store.Tx, rec access.Record) error {
	tx.OnCommit(func(int64) { _ = r.Append(tx.Context(), rec) })
	return nil
}

type identitiesDouble map[string]Identity

func (d identitiesDouble) Resolve(_ context.Context, id string) (Identity, error) {
	if strings.Contains(id, "foreign") {
		return Identity{}, fault.New(fault.Denied, "IdentityOfAnotherTenant", "The identity belongs to another tenant.")
	}
	v, ok := d[strings.ToLower(id)]
	if !ok {
		return Identity{}, fault.New(fault.NotFound, "", "no such identity")
	}
	return v, nil
}

type packagesDouble map[string]string // "publisher/type" in lower case -> version

func (d packagesDouble) Find(publisher, typ, _ string, _ bool) (string, node.Package, error) {
	v, ok := d[strings.ToLower(publisher+"/"+typ)]
	if !ok {
		return "", node.Package{}, fault.New(fault.NotFound, "PackageNotFound", "There is no package for %s/%s.", publisher, typ)
	}
	return v, node.Package{SHA256: strings.Repeat("ab", 32), Size: 10}, nil
}

// vaultDouble is SecretAccess and SecretChanges.
type vaultDouble struct {
	mu       sync.Mutex
	verdicts map[string]Verdict // by URL; missing: yes
	revs     map[secretRef]int64
	follow   []func(string, string, int64)
}

func (v *vaultDouble) Check(_ context.Context, _ access.Principal, url string) (Verdict, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	out, ok := v.verdicts[url]
	if !ok {
		out = Verdict{Answer: "yes"}
	}
	_, _, version, _ := v.Resolve(url)
	out.Pinned = version != ""
	return out, nil
}

func (v *vaultDouble) set(url string, x Verdict) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.verdicts[url] = x
}

func (v *vaultDouble) Follow(ctx context.Context, fn func(string, string, int64)) error {
	v.mu.Lock()
	v.follow = append(v.follow, fn)
	v.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (v *vaultDouble) Revision(vault, secret string) int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.revs[secretRef{vault, secret}]
}

func (v *vaultDouble) Resolve(url string) (vault, secret, version string, ok bool) {
	rest, ok := strings.CutPrefix(url, "https://")
	if !ok {
		return "", "", "", false
	}
	parts := strings.Split(rest, "/")
	host, ok := strings.CutSuffix(parts[0], ".vault.example")
	if !ok || len(parts) < 3 || parts[1] != "secrets" {
		return "", "", "", false
	}
	if len(parts) == 4 {
		version = parts[3]
	}
	return host, parts[2], version, true
}

// change makes a new version of a secret at a store revision.
func (v *vaultDouble) change(vault, secret string, rev int64) {
	v.mu.Lock()
	v.revs[secretRef{vault, secret}] = rev
	fns := slices.Clone(v.follow)
	v.mu.Unlock()
	for _, fn := range fns {
		fn(vault, secret, rev)
	}
}

type namesDouble struct{}

func (namesDouble) Hosts(urls []string) []string {
	out := []string{"node.example", "login.example"}
	for _, u := range urls {
		if h, _, ok := strings.Cut(strings.TrimPrefix(u, "https://"), "/"); ok && strings.HasSuffix(h, ".vault.example") {
			out = append(out, h)
		}
	}
	return out
}

// providerDouble is a provider that misbehaves as told.
type providerDouble struct {
	mu      sync.Mutex
	name    string
	offers  string
	nodes   map[string]bool // id -> running
	tokens  map[string]Token
	fail    func(verb, id string) error // nil: nothing fails
	after   func(verb, id string)       // called when a verb succeeded
	calls   []string
	refusal int // starts refused so far
}

func (p *providerDouble) Name() string          { return cmp.Or(p.name, "double") }
func (p *providerDouble) Offers(os string) bool { return os == p.offers }

func (p *providerDouble) do(verb, id string, fn func()) error {
	p.mu.Lock()
	p.calls = append(p.calls, verb+" "+id[max(0, len(id)-6):])
	if p.fail != nil {
		if err := p.fail(verb, id); err != nil {
			p.refusal++
			p.mu.Unlock()
			return err
		}
	}
	fn()
	after := p.after
	p.mu.Unlock()
	if after != nil {
		after(verb, id)
	}
	return nil
}

func (p *providerDouble) Start(_ context.Context, n NodeSpec) error {
	return p.do("start", n.ID, func() { p.nodes[n.ID] = true; p.tokens[n.ID] = n.Token })
}

func (p *providerDouble) Stop(_ context.Context, id string) error {
	return p.do("stop", id, func() { delete(p.nodes, id) })
}

func (p *providerDouble) Restart(_ context.Context, id string) error {
	return p.do("restart", id, func() {})
}

func (p *providerDouble) Reimage(_ context.Context, n NodeSpec) error {
	return p.do("reimage", n.ID, func() { p.tokens[n.ID] = n.Token })
}

func (p *providerDouble) List(context.Context) ([]ProviderNode, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []ProviderNode
	for id, running := range p.nodes {
		out = append(out, ProviderNode{ID: id, Running: running})
	}
	return out, nil
}

func (p *providerDouble) token(id string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tokens[id].Reveal()
}

// newWorld makes a world with an account and one identity.
func newWorld(t testing.TB) *world {
	t.Helper()
	m := store.NewMemory()
	t.Cleanup(func() { m.Close() })
	s, err := store.New(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		t: t, store: s, audit: &records{},
		secrets:  &vaultDouble{verdicts: map[string]Verdict{}, revs: map[secretRef]int64{}},
		packages: packagesDouble{"microsoft.azure.keyvault/keyvaultforlinux": "3.0.1"},
		provider: &providerDouble{offers: "linux", nodes: map[string]bool{}, tokens: map[string]Token{}},
	}
	w.ctx = w.as("owner", access.Owner.ID, "/")
	w.fleet = New(Config{
		Store: s, Gate: access.NewGate(access.Config{Store: s, Recorder: w.audit}),
		Identities: identitiesDouble{strings.ToLower(testIdentity): {ResourceID: testIdentity, Tenant: "t1", ClientID: testClient, ObjectID: "o1", Name: "testumaforpools"}},
		Packages:   w.packages, Secrets: w.secrets, Changes: w.secrets, Names: namesDouble{}, Providers: []Provider{w.provider},
	})
	if _, _, err := w.fleet.PutAccount(w.ctx, testAccount, "westus2", nil); err != nil {
		t.Fatal(err)
	}
	return w
}

// as returns a context of a caller with a role at a scope.
func (w *world) as(oid, role, scope string) context.Context {
	w.t.Helper()
	err := w.store.Update(w.t.Context(), func(tx *store.Tx) error {
		o := &store.Object[access.Assignment, struct{}]{Spec: access.Assignment{Name: oid, Scope: scope, Principal: oid, RoleID: role}}
		o.ID = oid + "/" + oid
		return access.Assignments.Insert(tx, o)
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return access.With(w.t.Context(), access.Call{Principal: access.Principal{Kind: access.Application, Tenant: "t1", ObjectID: oid, ClientID: oid}})
}

// inBubble runs test in virtual time.
func inBubble(t *testing.T, test func(w *world)) {
	synctest.Test(t, func(t *testing.T) { test(newWorld(t)) })
}

// background runs fn until the test ends.
func (w *world) background(fn func(context.Context) error) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := fn(ctx); err != nil && !errors.Is(err, context.Canceled) {
			w.t.Error(err)
		}
	}()
	w.t.Cleanup(func() { cancel(); <-ended })
}

// control runs both controllers until the test ends.
func (w *world) control() {
	w.t.Helper()
	for _, r := range []reconcile.Runnable{w.fleet.PoolController(), w.fleet.NodeController()} {
		w.background(func(ctx context.Context) error { return r.Run(ctx, w.store) })
	}
}

// spec is a pool of count nodes with the Key Vault extension.
func (w *world) spec(count int) Spec {
	settings := `{"secretsManagementSettings":{"pollingIntervalInS":"300","requireInitialSync":true,"observedCertificates":["` + testSecret + `"]},` +
		`"authenticationSettings":{"msiClientId":"` + testClient + `"}}`
	yes := true
	s := Spec{
		Identity: Identified{Type: "UserAssigned", IDs: map[string]Identity{testIdentity: {}}},
		Properties: Properties{
			VMSize: "STANDARD_DS2_V2",
			Deployment: Deployment{VM: VirtualMachine{
				Image: Image{Publisher: "canonical", Offer: "ubuntuserver", SKU: "20.04-lts", Version: "latest"}, NodeAgentSKU: "batch.node.ubuntu 20.04",
				Extensions: []Extension{{
					Name: "KVExtensions", Publisher: "Microsoft.Azure.KeyVault", Type: "KeyVaultForLinux", TypeHandlerVersion: "3.0",
					AutoUpgradeMinor: &yes, Settings: json.RawMessage(settings),
				}},
			}},
			Scale: Scale{Fixed{Dedicated: count, ResizeTimeout: "PT15M"}},
		},
	}
	s.FillDefaults()
	return s
}

func write(s Spec) Write {
	return Write{ID: testPool, Change: func(*Spec) (Spec, []Problem, error) { return s, nil, nil }}
}

func (w *world) put(s Spec) *Written {
	w.t.Helper()
	out, err := w.fleet.Put(w.ctx, write(s))
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func (w *world) pool() *Pool {
	w.t.Helper()
	p, err := w.fleet.GetPool(w.ctx, testPool)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *world) nodes() []NodeView {
	w.t.Helper()
	all, err := w.fleet.ListNodes(w.ctx, testPool)
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

// states renders node states in id order: "idle idle starting".
func (w *world) states() string {
	var out []string
	for _, n := range w.nodes() {
		out = append(out, n.State)
	}
	return strings.Join(out, " ")
}

// enrol plays the agent's enrolment with the token that the provider was given.
func (w *world) enrol(id string) {
	w.t.Helper()
	got, err := w.fleet.Enrol(w.t.Context(), node.EnrolRequest{Token: w.provider.token(id), Hostname: id, OS: "linux", Agent: "1"}, "key-"+id)
	if err != nil || got != id {
		w.t.Fatalf("enrolling %s: %s, %v", id, got, err)
	}
}

// report plays the agent's report of one extension status.
func (w *world) report(id, status, message string) {
	w.t.Helper()
	g, err := w.fleet.Goal(w.t.Context(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	r := node.StatusReport{Revision: g.Revision, Agent: "1", BootID: "boot " + w.boot, Booted: w.started}
	for _, e := range g.Extensions {
		r.Extensions = append(r.Extensions, node.ExtensionStatus{Name: e.Name, Version: e.Version, Sequence: e.Sequence, HandlerState: node.Enabled, Status: status, Message: message, Log: []string{"line 1"}})
	}
	if err := w.fleet.Report(w.t.Context(), id, r); err != nil {
		w.t.Fatal(err)
	}
}

// wait lets virtual time pass until everything is quiet.
func (w *world) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}
