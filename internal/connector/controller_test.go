package connector

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// TestEveryEffectFails: create, rotate and delete, where each effect in turn fails
// before it happens or has happened when it is told as failed. Going on leads to the
// same end: one login that works, then another one, then nothing.
func TestEveryEffectFails(t *testing.T) {
	run := func(fail string) (effects int) {
		w := newWorld(t)
		w.register()
		w.effects, w.fail = 0, fail
		id := w.put(database("db")).ID
		o := w.settle(id)
		first := o.Status.Credential
		if len(w.logins) != 2 || w.logins[first.User] == "" || o.Status.Proof.Desired != o.Status.Desired {
			t.Errorf("%s: created: %d logins, %+v", fail, len(w.logins), o.Status)
		}
		if _, err := w.Rotate(w.system(), o.Spec.ID); err != nil {
			t.Fatal(err)
		}
		o = w.settle(id)
		if len(w.logins) != 2 || w.logins[o.Status.Credential.User] == "" || o.Status.Credential.User == first.User {
			t.Errorf("%s: rotated: %d logins, %+v", fail, len(w.logins), o.Status)
		}
		deleted, err := w.Delete(w.system(), o.Spec.ID, false)
		if err != nil {
			t.Fatal(err)
		}
		if w.settle(id) != nil || len(w.logins) != 1 || len(w.roles) != 0 || len(w.vault) != 0 {
			t.Errorf("%s: deleted: logins %d, roles %v, secrets %d", fail, len(w.logins), w.roles, len(w.vault))
		}
		op, err := w.Operation(w.system(), OpDelete, o.Spec.ID, deleted.UID, 0)
		if err != nil || op.Status != "Succeeded" || !slices.Contains(op.Removal.Removed, "Secret default/sc-db-secret") {
			t.Errorf("%s: the report of the deletion: %+v, %v", fail, op, err)
		}
		for _, leftover := range []func() (int, error){
			func() (int, error) { l, err := makings.List(w.store.View(t.Context()), ""); return len(l), err },
			func() (int, error) { l, err := reports.List(w.store.View(t.Context()), ""); return len(l), err },
		} {
			if n, err := leftover(); n != 0 || err != nil {
				t.Errorf("%s: %d records are left, %v", fail, n, err)
			}
		}
		return w.effects
	}
	n, points := run(""), 0
	for i := 1; i <= n; i++ {
		for _, when := range []string{"before", "after"} {
			points++
			if run(fmt.Sprint(when, " ", i)); t.Failed() {
				t.FailNow()
			}
		}
	}
	if points < 12 {
		t.Errorf("only %d points", points)
	}
	t.Logf("create, rotate and delete: %d points", points)
}

// TestOldCredentialStays: both logins work for as long as a pod uses the old one.
func TestOldCredentialStays(t *testing.T) {
	w := newWorld(t)
	w.register()
	id := w.put(database("db")).ID
	o := w.settle(id)
	if _, err := w.Rotate(w.system(), o.Spec.ID); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		w.turn(id, wire.Consumer{Pod: "default/web-1"})
	}
	o, err := w.Connection(w.system(), o.Spec.ID)
	if err != nil || len(w.logins) != 3 || !strings.Contains(o.Status.Waiting, "default/web-1") || o.Status.Rotated == o.Spec.Rotations {
		t.Errorf("a pod uses the old one: %d logins, waiting %q, %v", len(w.logins), o.Status.Waiting, err)
	}
	if op, err := w.Operation(w.system(), OpRotate, o.Spec.ID, o.UID, o.Spec.Rotations); err != nil || op.Status != "Updating" {
		t.Errorf("the operation: %+v, %v", op, err)
	}
	if o = w.settle(id); len(w.logins) != 2 {
		t.Errorf("the pod is gone: %d logins", len(w.logins))
	}
	if op, err := w.Operation(w.system(), OpRotate, o.Spec.ID, o.UID, o.Spec.Rotations); err != nil || op.Status != "Succeeded" {
		t.Errorf("the operation: %+v, %v", op, err)
	}
}

// TestWhatKeepsAConnectionWaiting: the reason shows, and the connection goes on when it is gone.
func TestWhatKeepsAConnectionWaiting(t *testing.T) {
	cases := []struct {
		reason string
		change func(*world)
		undo   func(*world)
		shows  string
	}{
		{"the cluster is being updated", func(w *world) { w.cluster.Busy = "a rotation of its certificates" }, func(w *world) { w.cluster.Busy = "" }, "a rotation of its certificates is running"},
		{"the server does not answer", func(w *world) { w.fail = fmt.Sprint("before ", w.effects+2) }, func(*world) {}, ""},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			w := newWorld(t)
			w.register()
			id := w.put(database("db")).ID
			c.change(w)
			w.turn(id)
			o, err := Connections.Get(w.store.View(t.Context()), id)
			if err != nil || o.Status.State != "Accepted" || !strings.Contains(o.Status.Waiting, c.shows) || c.shows == "" && o.Status.Problem == nil {
				t.Errorf("%+v, %v", o.Status, err)
			}
			c.undo(w)
			w.settle(id)
		})
	}
}

// TestValidateBeforeDelivery: what is under way is a failure, for now, that says what is waited for.
func TestValidateBeforeDelivery(t *testing.T) {
	w := newWorld(t)
	w.register()
	o := w.put(database("db"))
	if _, err := (controller{w.Service}).Reconcile(w.system(), w.store, o); err != nil || o.Status.Waiting == "" {
		t.Fatalf("%+v, %v", o.Status, err)
	}
	w.update(func(tx *store.Tx) error { return Connections.PutStatus(tx, o) })
	v, err := w.Validate(w.system(), o.Spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(v.Findings, func(f Finding) bool { return f.Name == "Delivery" })
	if i < 0 || v.Available() || v.Findings[i].Code != "Waiting" || !strings.Contains(v.Findings[i].Message, "waits for the cluster to have it") {
		t.Errorf("%+v", v.Findings)
	}
}

// TestFailIfBusy: the refusal says what is running.
func TestFailIfBusy(t *testing.T) {
	w := newWorld(t)
	w.register()
	w.cluster.Busy = "a rotation of its certificates"
	p := database("db")
	p.FailIfBusy = true
	_, _, err := w.Put(w.system(), p)
	if e := fault.From(err); e == nil || e.Code != "Conflict" || !strings.Contains(e.Message, "a rotation of its certificates is running") || e.Fix == "" {
		t.Errorf("%v", err)
	}
}

// TestReportedProblems: what the cluster's side reports is what the connection says.
func TestReportedProblems(t *testing.T) {
	w := newWorld(t)
	w.register()
	o := w.put(database("db"))
	problem := wire.Problem{Code: "NamespaceNotFound", Layer: "kubernetes", Object: "Namespace shop", Message: "There is no namespace.", Fix: "kubectl create namespace shop"}
	c := controller{w.Service}
	for range 2 {
		_, _ = c.Reconcile(w.system(), w.store, o)
		w.update(func(tx *store.Tx) error { return Connections.PutStatus(tx, o) })
		if err := w.Report(w.system(), o.Spec.ID, wire.ConnectionReport{Applied: &wire.Applied{Revision: o.Status.Desired, Problem: &problem}}); err != nil {
			t.Fatal(err)
		}
		var err error
		if o, err = Connections.Get(w.store.View(t.Context()), o.ID); err != nil {
			t.Fatal(err)
		}
	}
	if o.Status.Problem == nil || *o.Status.Problem != problem {
		t.Errorf("it says %+v", o.Status.Problem)
	}
	if o.Status.State != "Failed" {
		t.Errorf("somebody has to do something, and it is %s", o.Status.State)
	}
	passes := wire.Problem{Code: "APIServerBusy", Layer: "kubernetes", Message: "The API server is busy."}
	if err := w.Report(w.system(), o.Spec.ID, wire.ConnectionReport{Applied: &wire.Applied{Revision: o.Status.Desired, Problem: &passes}}); err != nil {
		t.Fatal(err)
	}
	if _, _ = c.Reconcile(w.system(), w.store, o); o.Status.State != "Accepted" {
		t.Errorf("it passes by itself, and it is %s", o.Status.State)
	}
	w.now = w.now.Add(time.Hour)
	if _, _ = c.Reconcile(w.system(), w.store, o); o.Status.State != "Failed" {
		t.Errorf("after an hour it is %s", o.Status.State)
	}
}

// TestClusterIsGone: a connection of a cluster that was forgotten can be deleted;
// the report says what stays in the cluster.
func TestClusterIsGone(t *testing.T) {
	w := newWorld(t)
	w.register()
	o := w.settle(w.put(database("db")).ID)
	w.gone = true
	if _, err := w.Delete(w.system(), o.Spec.ID, false); err != nil {
		t.Fatal(err)
	}
	w.settle(o.ID)
	op, err := w.Operation(w.system(), OpDelete, o.Spec.ID, o.UID, 0)
	if err != nil || !slices.Contains(op.Removal.Kept, "Secret default/sc-db-secret") || len(w.logins) != 1 {
		t.Errorf("%+v, %v", op.Removal, err)
	}
}

// TestServersInUse: a server with a login of a connection is not forgotten.
func TestServersInUse(t *testing.T) {
	w := newWorld(t)
	w.register()
	o := w.settle(w.put(database("db")).ID)
	if _, err := w.DeleteServer(w.system(), testServer); fault.From(err) == nil || fault.From(err).Code != "ServerInUse" {
		t.Errorf("while it is in use: %v", err)
	}
	if _, err := w.Delete(w.system(), o.Spec.ID, false); err != nil {
		t.Fatal(err)
	}
	w.settle(o.ID)
	if existed, err := w.DeleteServer(w.system(), testServer); err != nil || !existed {
		t.Errorf("afterwards: %v, %v", existed, err)
	}
}

// TestWhatIsRefused: a connection that cannot be is refused before anything is made.
func TestWhatIsRefused(t *testing.T) {
	cases := []struct {
		reason string
		change func(*Put)
		code   string
	}{
		{"a server that is not registered", func(p *Put) { p.Target.ID = strings.Replace(testServer, "main", "x", 1) + "/databases/d" }, "ResourceNotFound"},
		{"no target", func(p *Put) { p.Target = TargetService{} }, "TargetTypeNotSupported"},
		{"an authentication that the target has not", func(p *Put) { p.Auth.Type = ServicePrincipal }, "InvalidArgument"},
		{"a client type that it has not", func(p *Put) { p.Client = "cobol" }, "InvalidArgument"},
		{"a credential among the values", func(p *Put) { p.Target.Values = map[string]string{"password": "x"} }, "InvalidArgument"},
		{"a value that it has not", func(p *Put) { p.Target.Values = map[string]string{"colour": "x"} }, "InvalidArgument"},
		{"a namespace that cannot be", func(p *Put) { p.Namespace = "A" }, "InvalidArgument"},
		{"a name that cannot be", func(p *Put) { p.ID = strings.Replace(p.ID, "/db", "/DB", 1) }, "InvalidResourceName"},
		{"an id of something else", func(p *Put) { p.ID = testCluster }, "LinkedInvalidPropertyId"},
		{"names that Kubernetes refuses", func(p *Put) { p.Keys = map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": "a b"} }, "InvalidCustomizedKey"},
	}
	for _, c := range cases {
		w := newWorld(t)
		w.register()
		w.effects = 0
		p := database("db")
		c.change(&p)
		_, _, err := w.Put(w.system(), p)
		if e := fault.From(err); e == nil || e.Code != c.code {
			t.Errorf("%s: %v", c.reason, err)
		}
		if all, err := w.List(w.system(), testCluster); w.effects != 0 || len(all) != 0 || err != nil {
			t.Errorf("%s: %d effects, %d connections, %v", c.reason, w.effects, len(all), err)
		}
	}
}

func FuzzParseLinker(f *testing.F) {
	f.Add(database("db").ID)
	f.Add("/subscriptions/x/providers/microsoft.servicelinker/linkers/")
	f.Fuzz(func(t *testing.T, s string) {
		cluster, name, err := parseLinker(s)
		if err != nil {
			return
		}
		again, same, err := parseLinker(LinkerID(cluster, name))
		if err != nil || same != name || again.Key() != cluster.Key() {
			t.Errorf("%q became %q of %q", s, same, again)
		}
	})
}
