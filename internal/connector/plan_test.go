package connector

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

const webVault = testGroup + "/providers/Microsoft.KeyVault/vaults/web"

// ourVaults is a world in which the vault web is this server's too.
type ourVaults struct{ vaultOf }

func (v ourVaults) Endpoint(_ context.Context, id string) (string, bool) {
	return "https://web.vault.example/", strings.EqualFold(id, webVault)
}

// toVault is a connection to it by the identity of the world.
func toVault(name string) Put {
	return Put{Connection: Connection{
		ID: LinkerID(must(arm.ParseID(testCluster)), name), Namespace: "shop", Target: TargetService{Word: "keyvault", ID: webVault},
		Auth: Authentication{Type: WorkloadIdentity, ClientID: "client"}, Client: "python",
	}}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// plan makes a plan as the tests' own principal.
func (w *world) plan(p Put, unclear ...error) Plan {
	w.t.Helper()
	out, err := w.Plan(w.system(), p, unclear...)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func codes(p Plan) []string {
	var out []string
	for _, m := range p.Missing {
		out = append(out, m.Code)
	}
	return out
}

// as is the context of a principal with a role at a scope; without a role for an empty one.
func (w *world) as(role access.Role, scope string) context.Context {
	w.t.Helper()
	const who = "6f8dd4cb-2b1f-4cbe-a2f5-0c55a1a5c1f0"
	if scope != "" {
		w.update(func(tx *store.Tx) error {
			return access.Grant(tx, access.Assignment{Name: "7d3b0c1e-9a0f-4f0e-8d6c-0f1d8c9a2b3c", Principal: who, RoleID: role.ID, Scope: scope})
		})
	}
	return access.With(w.t.Context(), access.Call{Principal: access.Principal{Kind: access.Application, ObjectID: who, ClientID: who}})
}

// TestPlanAndPutAgree: what a plan finds nothing missing for is accepted, and what is
// refused is among what the plan has found, in the same words.
func TestPlanAndPutAgree(t *testing.T) {
	accepted, refused := 0, map[string]int{}
	rapid.Check(t, func(rt *rapid.T) {
		// Most of a request is right, so that late refusals are met as often as early ones.
		yes := func(name string) bool { return rapid.IntRange(0, 7).Draw(rt, name) == 0 }
		pick := func(name, usual string, others ...string) string {
			if !yes(name) {
				return usual
			}
			return rapid.SampledFrom(others).Draw(rt, name+", another")
		}
		w := newWorld(t)
		w.register()
		w.cfg.Vaults = ourVaults{vaultOf{w}}
		if rapid.Bool().Draw(rt, "there is one") {
			w.put(database("db"))
			w.settle(key(must(arm.ParseID(testCluster)), "db"))
		}
		w.gone = yes("no cluster")
		if w.cluster.Issuer = pick("issuer", "https://issuer", ""); yes("busy") {
			w.cluster.Busy = "a rotation"
		}
		if unregistered := pick("unregistered", "", "Microsoft.ServiceLinker", "Microsoft.KubernetesConfiguration"); unregistered != "" {
			w.cfg.Place = func(_ *store.Tx, _, _, namespace string) error {
				if namespace == unregistered {
					return fault.New(fault.Conflict, "MissingSubscriptionRegistration", "The subscription is not registered to use namespace '%s'.", namespace)
				}
				return nil
			}
		}
		want := Put{Secret: pick("secret", "", "s3cret"), FailIfBusy: yes("fail if busy")}
		want.Connection = Connection{
			ID: LinkerID(must(arm.ParseID(testCluster)), pick("name", "db", "d-b", "d-b", "other", "DB")), Namespace: pick("namespace", "", "shop", "No"),
			Client: pick("client", "go", "python", "cobol"), Vault: pick("vault", "", testVault),
			Target: TargetService{Word: pick("word", "postgres-flexible", "keyvault", "sql", "nothing"), ID: pick("target", testServer+"/databases/shop", testServer, webVault, testGroup+"/providers/Microsoft.DBforPostgreSQL/flexibleServers/none/databases/x")},
			Auth:   Authentication{Type: AuthType(pick("auth", "secret", "workload-identity", "service-principal", "x")), User: pick("user", "", "app"), ClientID: pick("client id", "", "client", "6f8dd4cb-2b1f-4cbe-a2f5-0c55a1a5c1f0")},
		}
		if yes("given") {
			want.Auth.Given = &SecretRef{}
		}
		if yes("keys") {
			want.Keys = map[string]string{pick("key", "AZURE_POSTGRESQL_CONNECTIONSTRING", "NONE"): pick("new name", "MINE", "not a key")}
		}
		if yes("values") {
			want.Target.Values = map[string]string{pick("value", "password", "database", "colour"): "x"}
		}
		ctx := w.system()
		switch pick("caller", "system", "nobody", "reader", "contributor", "cluster only") {
		case "nobody":
			ctx = w.as(access.Reader, "")
		case "reader":
			ctx = w.as(access.Reader, testGroup)
		case "contributor":
			ctx = w.as(access.Contributor, testGroup)
		case "cluster only":
			ctx = w.as(access.Contributor, testCluster)
		}
		before, logins := w.effects, len(w.logins)
		p, err := w.Plan(ctx, want)
		if err != nil {
			rt.Fatalf("%v", err)
		}
		if w.effects != before || len(w.logins) != logins {
			rt.Fatal("a plan has changed the world")
		}
		if text := string(must(json.Marshal(p))); strings.Contains(text, "s3cret") || strings.Contains(text, "admin-password") {
			rt.Fatalf("a plan holds a secret: %s", text)
		}
		_, _, err = w.Put(ctx, want)
		if err == nil {
			accepted++
			return
		}
		e := fault.From(err)
		refused[e.Code]++
		if !slices.ContainsFunc(p.Missing, func(m Missing) bool { return m.Code == e.Code && m.Message == e.Message && m.Target == e.Target }) {
			rt.Fatalf("%v\nis not in the plan: %q", err, codes(p))
		}
	})
	t.Logf("%d accepted, refused: %v", accepted, refused)
	if !testing.Short() && (accepted == 0 || len(refused) < 2) { // of a hundred; in short there are too few to tell
		t.Error("these requests say little")
	}
}

// TestPlanNamesAll: everything that is missing is said at once.
func TestPlanNamesAll(t *testing.T) {
	w := newWorld(t)
	w.register()
	w.put(database("ab"))
	w.cluster.Busy = "a rotation of its certificates"
	w.cfg.Place = func(_ *store.Tx, _, _, namespace string) error {
		return fault.New(fault.Conflict, "MissingSubscriptionRegistration", "The subscription is not registered to use namespace '%s'.", namespace)
	}
	p := database("a-b")
	p.FailIfBusy, p.Client = true, "cobol"
	p.Target.Values = map[string]string{"colour": "red", "password": "p"}
	p.Keys = map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": "no key"}
	want := []string{"InvalidArgument", "InvalidArgument", "InvalidArgument", "Conflict", "MissingSubscriptionRegistration", "MissingSubscriptionRegistration", "SecretNameCollision"}
	if d := cmp.Diff(want, codes(w.plan(p))); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	p = database("a-b")
	p.Keys = map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": "no key"}
	p.Target.ID = testGroup + "/providers/Microsoft.DBforPostgreSQL/flexibleServers/none/databases/x"
	w.cfg.Place = nil
	if d := cmp.Diff([]string{"ResourceNotFound", "InvalidCustomizedKey", "SecretNameCollision"}, codes(w.plan(p))); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	// What could not be understood does not hide the rest.
	said := fault.New(fault.Invalid, "TargetTypeNotSupported", "what is this")
	if d := cmp.Diff([]string{"TargetTypeNotSupported", "SecretNameCollision"}, codes(w.plan(Put{Connection: Connection{ID: p.ID}}, said))); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// noVault is a world in which the vault of the cluster's connections is not there yet.
type noVault struct{ vaultOf }

func (noVault) Default(context.Context, arm.ID) (string, bool, error) { return testVault, false, nil }

// TestVaultThatCannotBeMade: a connection whose first credential would need a vault is
// refused where none can be made, and not accepted to fail.
func TestVaultThatCannotBeMade(t *testing.T) {
	w := newWorld(t)
	w.register()
	w.cfg.Vaults = noVault{vaultOf{w}}
	w.cfg.Place = func(_ *store.Tx, _, _, namespace string) error {
		if namespace == "Microsoft.KeyVault" {
			return fault.New(fault.Conflict, "MissingSubscriptionRegistration", "no vaults")
		}
		return nil
	}
	if d := cmp.Diff([]string{"MissingSubscriptionRegistration"}, codes(w.plan(database("db")))); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if _, _, err := w.Put(w.system(), database("db")); fault.From(err).Code != "MissingSubscriptionRegistration" {
		t.Errorf("%v", err)
	}
	w.cfg.Place = nil
	if p := w.plan(database("db")); len(p.Missing) > 0 || p.Details.Secret.VaultChange != servicelinker.Create {
		t.Errorf("%+v", p)
	}
}

// TestPlanOfPermissions: each missing permission is named with its scope and the
// narrowest role that has it.
func TestPlanOfPermissions(t *testing.T) {
	w := newWorld(t)
	w.register()
	w.cfg.Vaults = ourVaults{vaultOf{w}}
	p, err := w.Plan(w.as(access.Contributor, testCluster), toVault("kv"))
	if err != nil {
		t.Fatal(err)
	}
	want := []Missing{{
		Kind: fault.Denied, Code: "AuthorizationFailed", Target: webVault, Scope: webVault, Permission: "Microsoft.KeyVault/vaults/accessPolicies/write", Role: "Owner",
		Message: "You do not have permission to perform action 'Microsoft.KeyVault/vaults/accessPolicies/write' over scope '" + webVault + "'. If access was recently granted, please refresh your credentials.",
		Fix:     "keyfleet role assign --object-id 6f8dd4cb-2b1f-4cbe-a2f5-0c55a1a5c1f0 --role 'Owner' --scope " + webVault,
	}}
	if d := cmp.Diff(want, p.Missing); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	for _, k := range p.Details.Environment {
		if k.Value != "" {
			t.Errorf("somebody who may not read the target learns %+v", k)
		}
	}
}

// TestPlanOfADatabase: every thing that is made is named; afterwards it is all there.
func TestPlanOfADatabase(t *testing.T) {
	w := newWorld(t)
	w.register()
	p := w.plan(database("db"))
	role := database("db").roleName()
	if len(p.Missing) > 0 {
		t.Fatalf("%+v", p.Missing)
	}
	want := servicelinker.Plan{
		Connection: database("db").ID, Change: servicelinker.Create, Cluster: servicelinker.PlannedCluster{Answers: true}, Extension: "install",
		Objects: []servicelinker.PlannedObject{
			{Kind: "Secret", Namespace: "default", Name: "sc-db-secret", Change: servicelinker.Create},
			{Kind: "Secret", Namespace: "sc-system", Name: "connection-" + shortHash(strings.ToLower(database("db").ID)), Change: servicelinker.Create},
		},
		Environment: []servicelinker.PlannedKey{{Name: "AZURE_POSTGRESQL_CONNECTIONSTRING", Secret: true}},
		Login: &servicelinker.PlannedLogin{
			Server: testServer, Role: role, User: role + "_a", Change: servicelinker.Create,
			Privileges: "it connects to the database shop, makes what it likes in the schema public, and reads and writes the tables there that the administrator may hand on; it makes no databases and no roles",
		},
		Secret: &servicelinker.PlannedSecret{Vault: testVault, VaultChange: servicelinker.Unchanged, Name: database("db").secretName(), Change: servicelinker.Create},
	}
	if d := cmp.Diff(want, p.Details); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	w.put(database("db"))
	id := key(must(arm.ParseID(testCluster)), "db")
	if o := w.settle(id); o.Status.Credential.User != p.Details.Login.User {
		t.Errorf("the login is %s, and the plan said %s", o.Status.Credential.User, p.Details.Login.User)
	}
	same := w.plan(database("db"))
	for _, got := range []servicelinker.Change{same.Details.Change, same.Details.Objects[0].Change, same.Details.Objects[1].Change, same.Details.Login.Change, same.Details.Secret.Change} {
		if got != servicelinker.Unchanged {
			t.Errorf("nothing is different, and the plan says %s: %+v", got, same.Details)
		}
	}
	if same.Details.Restart.Needed || same.Details.Extension != "present" {
		t.Errorf("%+v", same.Details)
	}
	// Another name for a variable: the Secret changes, the login does not, workloads have to start anew.
	w.turn(id, wire.Consumer{Pod: "default/web-1"})
	renamed := database("db")
	renamed.Keys = map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": "DB"}
	p = w.plan(renamed)
	if p.Details.Change != servicelinker.Modify || p.Details.Objects[0].Change != servicelinker.Modify || p.Details.Login.Change != servicelinker.Unchanged || !p.Details.Restart.Needed {
		t.Errorf("%+v", p.Details)
	}
	if len(p.Details.Restart.Consumers) != 1 || p.Details.Restart.Consumers[0].Pod != "default/web-1" {
		t.Errorf("to be started anew: %+v", p.Details.Restart)
	}
}

// TestPlanOfAnIdentity: what connections of one identity share is said to be shared.
func TestPlanOfAnIdentity(t *testing.T) {
	w := newWorld(t)
	w.cfg.Vaults = ourVaults{vaultOf{w}}
	type line struct {
		What   string
		Change servicelinker.Change
		Shared bool
	}
	lines := func(p Plan) []line {
		var out []line
		for _, g := range p.Details.Grants {
			out = append(out, line{g.Kind, g.Change, g.Shared})
		}
		for _, o := range p.Details.Objects[:2] { // the last one is in sc-system
			out = append(out, line{o.Kind, o.Change, o.Shared})
		}
		return out
	}
	want := []line{
		{"federated credential", servicelinker.Create, false},
		{"access policy", servicelinker.Create, false},
		{"Secret", servicelinker.Create, false},
		{"ServiceAccount", servicelinker.Create, false},
	}
	if d := cmp.Diff(want, lines(w.plan(toVault("kv")))); d != "" {
		t.Errorf("the first (-want +got):\n%s", d)
	}
	w.granted[webVault+"object"] = true
	want[1].Change = servicelinker.Unchanged
	if d := cmp.Diff(want, lines(w.plan(toVault("kv")))); d != "" {
		t.Errorf("the policy was there before (-want +got):\n%s", d)
	}
	delete(w.granted, webVault+"object")
	o := w.put(toVault("kv"))
	w.settle(o.ID)
	err := w.Report(w.system(), o.Spec.ID, wire.ConnectionReport{Applied: &wire.Applied{Objects: []wire.AppliedObject{{Kind: "ServiceAccount", Namespace: "shop", Name: AccountName("client")}}}})
	if err != nil {
		t.Fatal(err)
	}
	want = []line{
		{"federated credential", servicelinker.Unchanged, true},
		{"access policy", servicelinker.Unchanged, true},
		{"Secret", servicelinker.Create, false},
		{"ServiceAccount", servicelinker.Unchanged, true},
	}
	if d := cmp.Diff(want, lines(w.plan(toVault("kv2")))); d != "" {
		t.Errorf("the second (-want +got):\n%s", d)
	}
}

// TestPlanForesees: what a PUT takes and what fails afterwards is missing too.
func TestPlanForesees(t *testing.T) {
	w := newWorld(t)
	w.register()
	w.logins["admin"] = "changed by somebody"
	if d := cmp.Diff([]string{"InvalidDbSecret"}, codes(w.plan(database("db")))); d != "" {
		t.Errorf("the administrator's password (-want +got):\n%s", d)
	}
	given := database("db")
	given.Auth.User, given.Auth.Given, given.Secret = "app", &SecretRef{}, "wrong"
	if d := cmp.Diff([]string{"InvalidDbSecret"}, codes(w.plan(given))); d != "" {
		t.Errorf("a wrong password that was given (-want +got):\n%s", d)
	}
	w.logins["app"] = "wrong"
	if p := w.plan(given); len(p.Missing) > 0 || p.Details.Login != nil || p.Details.Secret.Change != servicelinker.Create {
		t.Errorf("it is right now: %+v", p)
	}
	w.cluster.Issuer = ""
	if d := cmp.Diff([]string{"OIDCIssuerNotSeen"}, codes(w.plan(toVault("kv")))); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	w.cluster.State, w.cluster.Reason = "Failed", "no route to it"
	if p := w.plan(toVault("kv")); len(p.Missing) > 0 || p.Details.Cluster.Answers || p.Details.Cluster.Reason != "no route to it" {
		t.Errorf("a cluster that does not answer is waited for: %+v", p)
	}
}

// TestDryrunKeepsNoSecret: what is stored of a dry run is what was asked, but for
// secrets, wherever somebody has put one.
func TestDryrunKeepsNoSecret(t *testing.T) {
	const secret = "canary-0815"
	w := newWorld(t)
	w.register()
	asked := servicelinker.DryrunParameters{ActionName: "createOrUpdate", LinkerProperties: servicelinker.LinkerProperties{
		TargetService: servicelinker.TargetService{ID: testServer + "/databases/shop", Values: map[string]string{"password": secret, "database": "shop"}},
		AuthInfo:      servicelinker.AuthInfo{AuthType: "secret", Name: "app", Secret: secret, SecretInfo: &servicelinker.SecretInfo{SecretType: "rawValue", Value: secret}},
	}}
	want := database("db")
	want.Auth.User, want.Auth.Given, want.Secret = "app", &SecretRef{}, secret
	want.Target.Values = asked.TargetService.Values
	cluster := must(arm.ParseID(testCluster))
	for _, unclear := range [][]error{nil, {fault.New(fault.Invalid, "X", "x")}} {
		if _, _, err := w.PutDryrun(w.system(), cluster, "d", asked, want, unclear...); err != nil {
			t.Fatal(err)
		}
		o, err := w.Dryrun(w.system(), cluster, "d")
		if err != nil {
			t.Fatal(err)
		}
		if text := string(must(json.Marshal(o))); strings.Contains(text, secret) || !strings.Contains(text, `"database":"shop"`) || !strings.Contains(text, `"secretType":"rawValue"`) {
			t.Errorf("%s", text)
		}
	}
	if asked.AuthInfo.SecretInfo.Value != secret {
		t.Error("what the caller holds was changed")
	}
	if existed, err := w.DeleteDryrun(w.system(), cluster, "d"); !existed || err != nil {
		t.Errorf("%t, %v", existed, err)
	}
	if _, err := w.Dryrun(w.system(), cluster, "d"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a dry run that was deleted: %v", err)
	}
	if _, _, err := w.PutDryrun(w.as(access.Reader, testGroup), cluster, "d", asked, want); fault.KindOf(err) != fault.Denied {
		t.Errorf("a reader: %v", err)
	}
}
