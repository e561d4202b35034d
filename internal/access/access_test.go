package access_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// recorder keeps records in memory, and fails when told to.
type recorder struct {
	mu      sync.Mutex
	records []access.Record
	fail    error
}

func (r *recorder) Append(_ context.Context, rec access.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return r.fail
	}
	r.records = append(r.records, rec)
	return nil
}

func (r *recorder) InTx(tx *store.Tx, rec access.Record) error {
	if r.fail != nil {
		return r.fail
	}
	tx.OnCommit(func(int64) { _ = r.Append(context.Background(), rec) })
	return nil
}

type world struct {
	store *store.Store
	back  store.Backend
	gate  *access.Gate
	rec   *recorder
}

func newWorld(t interface{ Fatal(...any) }) *world {
	back := store.NewMemory()
	s, err := store.New(context.Background(), back)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{store: s, back: back, rec: &recorder{}}
	w.gate = access.NewGate(access.Config{Store: s, Recorder: w.rec})
	return w
}

// oid makes a readable object id.
func oid(n int) string { return fmt.Sprintf("00000000-0000-0000-0000-%012d", n) }

func as(n int) context.Context {
	return access.With(context.Background(), access.Call{
		Principal: access.Principal{Kind: access.Application, Tenant: "t", ObjectID: oid(n), ClientID: oid(1000 + n)}, RequestID: "r1",
	})
}

func (w *world) grant(t interface{ Fatal(...any) }, principal int, role access.Role, scope, name string) {
	_, _, err := w.gate.Assign(access.AsSystem(context.Background(), "test"), access.Assignment{Name: name, Scope: scope, Principal: oid(principal), RoleID: role.ID})
	if err != nil {
		t.Fatal(err)
	}
}

const (
	sub  = "/subscriptions/11111111-1111-1111-1111-111111111111"
	grp  = sub + "/resourceGroups/Web"
	pool = grp + "/providers/Microsoft.Batch/batchAccounts/acct/pools/p1"
	mi   = grp + "/providers/Microsoft.ManagedIdentity/userAssignedIdentities/id1"
)

func TestRoleDecisions(t *testing.T) {
	cases := []struct {
		reason  string
		role    access.Role
		scope   string
		action  string
		on      string
		allowed bool
	}{
		{"Owner at the root may do everything", access.Owner, "/", "Keyfleet/applications/write", "/", true},
		{"Owner of a subscription is not Owner of the server", access.Owner, sub, "Keyfleet/applications/write", "/", false},
		{"Owner below the root assigns there", access.Owner, sub, "Microsoft.Authorization/roleAssignments/write", grp, true},
		{"Contributor writes resources", access.Contributor, sub, "Microsoft.Batch/batchAccounts/pools/write", pool, true},
		{"Contributor does not assign roles", access.Contributor, "/", "Microsoft.Authorization/roleAssignments/write", grp, false},
		{"the exception holds in any casing", access.Contributor, "/", "microsoft.authorization/roleassignments/WRITE", grp, false},
		{"Contributor does not change access policies by their own call", access.Contributor, "/", "Microsoft.KeyVault/vaults/accessPolicies/write", grp, false},
		{"Contributor at the root does not administer the server", access.Contributor, "/", "Keyfleet/applications/write", "/", false},
		{"Contributor chooses no client ids", access.Contributor, "/", "Keyfleet/identities/setClientId", mi, false},
		{"Contributor puts identities on pools", access.Contributor, sub, "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action", mi, true},
		{"Reader reads", access.Reader, sub, "Microsoft.Batch/batchAccounts/pools/read", pool, true},
		{"Reader does not write", access.Reader, sub, "Microsoft.Batch/batchAccounts/pools/write", pool, false},
		{"Reader assigns no identity", access.Reader, sub, "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action", mi, false},
		{"Reader at the root does not read the audit file", access.Reader, "/", "Keyfleet/audit/read", "/", false},
		{"Managed Identity Operator assigns", access.ManagedIdentityOperator, mi, "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action", mi, true},
		{"Managed Identity Operator reads identities", access.ManagedIdentityOperator, mi, "Microsoft.ManagedIdentity/userAssignedIdentities/read", mi, true},
		{"Managed Identity Operator does not write them", access.ManagedIdentityOperator, mi, "Microsoft.ManagedIdentity/userAssignedIdentities/write", mi, false},
		{"a scope counts in any casing", access.Reader, strings.ToUpper(grp), "Microsoft.Batch/batchAccounts/pools/read", pool, true},
		{"a scope does not cover its neighbour with a longer name", access.Reader, grp, "Microsoft.Batch/batchAccounts/read", grp + "2/providers/Microsoft.Batch/batchAccounts/a", false},
		{"a scope does not cover what is above it", access.Owner, grp, "Microsoft.Resources/subscriptions/read", sub, false},
		{"a resource's own scope covers what is below", access.Reader, grp + "/providers/Microsoft.Batch/batchAccounts/acct", "Microsoft.Batch/batchAccounts/pools/read", pool, true},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			w := newWorld(t)
			w.grant(t, 1, c.role, c.scope, oid(50))
			err := w.gate.Can(as(1), access.Op{Action: c.action, Resource: c.on})
			if got := err == nil; got != c.allowed {
				t.Errorf("allowed %t, want %t (%v)", got, c.allowed, err)
			}
			if !c.allowed && fault.KindOf(err) != fault.Denied {
				t.Errorf("refused with %v, want Denied", err)
			}
			if err := w.gate.Can(as(2), access.Op{Action: c.action, Resource: c.on}); fault.KindOf(err) != fault.Denied {
				t.Errorf("a principal without a role: %v, want Denied", err)
			}
		})
	}
}

func TestDefaultDeny(t *testing.T) {
	w := newWorld(t)
	w.grant(t, 1, access.Owner, "/", oid(50))
	policies := []access.Policy{{Tenant: "t", ObjectID: oid(1), Secrets: []string{"get"}, Certificates: []string{"all"}}}
	node := access.With(context.Background(), access.Call{Principal: access.Principal{Kind: access.Node, ObjectID: oid(1)}})
	secret := access.Op{Action: "secrets/get", Resource: "v/secrets/s", Policies: policies}
	cases := []struct {
		reason string
		ctx    context.Context
		op     access.Op
		want   error // a kind; nil: allowed
	}{
		{"no caller", context.Background(), access.Op{Action: "x/read", Resource: "/"}, fault.Unauthenticated},
		{"a node has no roles, even with an Owner's object id", node, access.Op{Action: "x/read", Resource: "/"}, fault.Denied},
		{"a system principal acts", access.AsSystem(context.Background(), "c"), access.Op{Action: "x/write", Resource: "/"}, nil},
		{"a policy allows what it names", as(1), secret, nil},
		{"a policy does not allow another verb", as(1), access.Op{Action: "secrets/set", Resource: "v/secrets/s", Policies: policies}, fault.Denied},
		{"all is every verb of its kind", as(1), access.Op{Action: "certificates/purge", Resource: "v/certificates/s", Policies: policies}, nil},
		{"and of no other kind", as(1), access.Op{Action: "keys/get", Resource: "v/keys/s", Policies: policies}, fault.Denied},
		{"an unknown kind", as(1), access.Op{Action: "widgets/get", Resource: "v/widgets/s", Policies: policies}, fault.Denied},
		{"an empty verb", as(1), access.Op{Action: "secrets", Resource: "v/secrets/s", Policies: policies}, fault.Denied},
		{"no policies is not no decision: Owner at / has none in the vault", as(1), access.Op{Action: "secrets/get", Resource: "v/secrets/s", Policies: []access.Policy{}}, fault.Denied},
		{"somebody else's policy", as(2), secret, fault.Denied},
		{
			"a policy of another tenant", as(1),
			access.Op{Action: "secrets/get", Resource: "v/secrets/s", Policies: []access.Policy{{Tenant: "u", ObjectID: oid(1), Secrets: []string{"get"}}}},
			fault.Denied,
		},
		{
			"a policy for another application of the principal", as(1),
			access.Op{Action: "secrets/get", Resource: "v/secrets/s", Policies: []access.Policy{{Tenant: "t", ObjectID: oid(1), ClientID: oid(9), Secrets: []string{"get"}}}},
			fault.Denied,
		},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			err := w.gate.Read(c.ctx, c.op)
			if c.want == nil && err != nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			last := w.rec.records[len(w.rec.records)-1]
			if want := map[bool]string{true: "allowed", false: "denied"}[c.want == nil]; last.Outcome != want || last.Action != c.op.Action {
				t.Errorf("recorded %+v, want outcome %s", last, want)
			}
		})
	}
}

func TestFailsClosed(t *testing.T) {
	t.Run("a read that cannot be recorded is refused", func(t *testing.T) {
		w := newWorld(t)
		w.grant(t, 1, access.Owner, "/", oid(50))
		w.rec.fail = fault.New(fault.Unavailable, "AuditUnavailable", "no")
		if err := w.gate.Read(as(1), access.Op{Action: "x/read", Resource: "/"}); !errors.Is(err, fault.Unavailable) {
			t.Errorf("got %v", err)
		}
		if err := w.gate.Record(as(1), access.Principal{}, access.Op{}, nil); !errors.Is(err, fault.Unavailable) {
			t.Errorf("Record: got %v", err)
		}
	})
	t.Run("a change that cannot be recorded is not made", func(t *testing.T) {
		w := newWorld(t)
		w.grant(t, 1, access.Owner, "/", oid(50))
		w.rec.fail = errors.New("no")
		_, _, err := w.gate.Assign(as(1), access.Assignment{Name: oid(60), Scope: "/", Principal: oid(2), RoleID: access.Reader.ID})
		if err == nil {
			t.Fatal("the change was made")
		}
		if n, _ := access.Assignments.List(w.store.View(t.Context()), oid(2)); len(n) != 0 {
			t.Error("the change was committed")
		}
	})
	t.Run("without the store nobody is allowed", func(t *testing.T) {
		w := newWorld(t)
		w.grant(t, 1, access.Owner, "/", oid(50))
		if err := w.back.Close(); err != nil {
			t.Fatal(err)
		}
		if err := w.gate.Can(as(1), access.Op{Action: "x/read", Resource: "/"}); !errors.Is(err, fault.Unavailable) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a refused change runs nothing", func(t *testing.T) {
		w := newWorld(t)
		err := w.gate.Change(as(1), w.store, access.Op{Action: "x/write", Resource: "/"}, func(*store.Tx) error {
			t.Error("the function was run")
			return nil
		})
		if !errors.Is(err, fault.Denied) || len(w.rec.records) != 1 || w.rec.records[0].Outcome != "denied" {
			t.Errorf("got %v, records %+v", err, w.rec.records)
		}
	})
}
