package access_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

func TestAssign(t *testing.T) {
	base := access.Assignment{Name: oid(60), Scope: grp, Principal: oid(2), RoleID: access.Reader.ID}
	with := func(change func(*access.Assignment)) access.Assignment { a := base; change(&a); return a }
	cases := []struct {
		reason string
		by     int // 1: Owner at the subscription; 3: Contributor there; 4: Owner of the group; 5: nothing
		a      access.Assignment
		code   string // empty: made
	}{
		{"Owner of the subscription gives Reader of a group", 1, base, ""},
		{"and Owner too", 1, with(func(a *access.Assignment) { a.RoleID = access.Owner.ID }), ""},
		{"but not at the root", 1, with(func(a *access.Assignment) { a.Scope = "/" }), "AuthorizationFailed"},
		{"nor in another subscription", 1, with(func(a *access.Assignment) { a.Scope = "/subscriptions/" + oid(7) }), "AuthorizationFailed"},
		{"Contributor gives nothing, not even Reader", 3, base, "AuthorizationFailed"},
		{"Owner of the group gives within the group", 4, base, ""},
		{"and not above it", 4, with(func(a *access.Assignment) { a.Scope = sub }), "AuthorizationFailed"},
		{"who has nothing gives nothing", 5, base, "AuthorizationFailed"},
		{"the role's GUID counts in any casing", 1, with(func(a *access.Assignment) { a.RoleID = strings.ToUpper(a.RoleID) }), ""},
		{"an unknown role", 1, with(func(a *access.Assignment) { a.RoleID = oid(8) }), "RoleDefinitionDoesNotExist"},
		{"a name that is no GUID", 1, with(func(a *access.Assignment) { a.Name = "mine" }), "InvalidRoleAssignmentId"},
		{"a principal that is no GUID", 1, with(func(a *access.Assignment) { a.Principal = "me/x" }), "InvalidPrincipalId"},
		{"a scope that is no resource", 1, with(func(a *access.Assignment) { a.Scope = "everything" }), "InvalidScope"},
		{"a principal that does not exist", 1, with(func(a *access.Assignment) { a.Principal = oid(404) }), "PrincipalNotFound"},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			w := newWorld(t)
			w.grant(t, 1, access.Owner, sub, oid(51))
			w.grant(t, 3, access.Contributor, sub, oid(53))
			w.grant(t, 4, access.Owner, grp, oid(54))
			w.gate = access.NewGate(access.Config{Store: w.store, Recorder: w.rec, Principal: func(_ *store.Tx, id string) error {
				if id == oid(404) {
					return fault.New(fault.NotFound, "PrincipalNotFound", "no")
				}
				return nil
			}})
			_, created, err := w.gate.Assign(as(c.by), c.a)
			if c.code != "" {
				if fault.From(err) == nil || fault.From(err).Code != c.code {
					t.Fatalf("got %v, want %s", err, c.code)
				}
				return
			}
			if err != nil || !created {
				t.Fatalf("created %t, %v", created, err)
			}
			if _, created, err := w.gate.Assign(as(c.by), c.a); err != nil || created {
				t.Errorf("the same again: created %t, %v", created, err)
			}
		})
	}
}

func TestAssignConflicts(t *testing.T) {
	w := newWorld(t)
	w.grant(t, 1, access.Owner, "/", oid(50))
	a := access.Assignment{Name: oid(60), Scope: grp, Principal: oid(2), RoleID: access.Reader.ID}
	if _, _, err := w.gate.Assign(as(1), a); err != nil {
		t.Fatal(err)
	}
	other := a
	other.Name = oid(61)
	if _, _, err := w.gate.Assign(as(1), other); fault.From(err) == nil || fault.From(err).Code != "RoleAssignmentExists" {
		t.Errorf("the same grant under another name: %v", err)
	}
	other = a
	other.RoleID = access.Owner.ID
	if _, _, err := w.gate.Assign(as(1), other); !errors.Is(err, fault.Conflict) {
		t.Errorf("another grant under the same name: %v", err)
	}
	if o, err := w.gate.Unassign(as(1), grp, a.Name); err != nil || o == nil {
		t.Fatalf("removing: %v %v", o, err)
	}
	if o, err := w.gate.Unassign(as(1), grp, a.Name); err != nil || o != nil {
		t.Errorf("removing again: %v %v, want nothing and no error", o, err)
	}
	other = a
	other.Name = oid(61)
	if _, created, err := w.gate.Assign(as(1), other); err != nil || !created {
		t.Errorf("after removal: created %t, %v", created, err)
	}
}

func TestRemovalIsDecidedAtTheAssignmentsScope(t *testing.T) {
	w := newWorld(t)
	w.grant(t, 1, access.Owner, "/", oid(50))
	w.grant(t, 2, access.Owner, grp, oid(51))
	w.grant(t, 3, access.Reader, sub, oid(52))
	if o, err := w.gate.Unassign(as(2), grp, oid(52)); err != nil || o != nil {
		t.Errorf("an Owner of the group named its own scope for an assignment of the subscription: removed %v, %v", o, err)
	}
	if _, err := w.gate.Unassign(as(2), sub, oid(52)); !errors.Is(err, fault.Denied) {
		t.Errorf("an Owner of the group removed an assignment of the subscription: %v", err)
	}
	if err := w.gate.Can(as(3), access.Op{Action: "x/read", Resource: sub}); err != nil {
		t.Errorf("the assignment is gone: %v", err)
	}
}

func TestLastOwnerStays(t *testing.T) {
	w := newWorld(t)
	w.grant(t, 1, access.Owner, "/", oid(50))
	w.grant(t, 2, access.Owner, "/", oid(51))
	w.grant(t, 3, access.Owner, sub, oid(52))

	// Both remove the other one at the same time: one of them must fail.
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, pair := range [][2]string{{"1", oid(51)}, {"2", oid(50)}} {
		wg.Go(func() {
			_, errs[i] = w.gate.Unassign(as(i+1), "/", pair[1])
		})
	}
	wg.Wait()
	if (errs[0] == nil) == (errs[1] == nil) {
		t.Errorf("errors %v: exactly one removal must succeed", errs)
	}
	for _, p := range []int{1, 2} {
		err := w.store.Update(t.Context(), func(tx *store.Tx) error { return access.RemovePrincipal(tx, oid(p)) })
		held, _ := access.Assignments.List(w.store.View(t.Context()), oid(p)+"/")
		if len(held) > 0 && (fault.From(err) == nil || fault.From(err).Code != "LastOwner") {
			t.Errorf("removing the principal of the last Owner: %v", err)
		}
	}
}

func TestRemoveScopeLeavesNoGrants(t *testing.T) {
	w := newWorld(t)
	w.grant(t, 1, access.Reader, grp, oid(50))
	w.grant(t, 1, access.Reader, pool, oid(51))
	w.grant(t, 1, access.Reader, grp+"2", oid(52))
	if err := w.store.Update(t.Context(), func(tx *store.Tx) error { return access.RemoveScope(tx, strings.ToUpper(grp)) }); err != nil {
		t.Fatal(err)
	}
	left, err := access.Assignments.List(w.store.View(t.Context()), "")
	if err != nil || len(left) != 1 || left[0].Spec.Name != oid(52) {
		t.Errorf("left %+v, %v", left, err)
	}
}

func TestListAssignments(t *testing.T) {
	w := newWorld(t)
	w.grant(t, 1, access.Owner, "/", oid(50))
	w.grant(t, 2, access.Reader, grp, oid(51))
	w.grant(t, 3, access.Reader, pool, oid(52))
	w.grant(t, 3, access.Reader, "/subscriptions/"+oid(7), oid(53))
	names := func(scope string, f access.AssignmentFilter) string {
		list, err := w.gate.ListAssignments(as(1), scope, f)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, o := range list {
			out = append(out, o.Spec.Name[34:])
		}
		return strings.Join(out, " ")
	}
	cases := []struct {
		reason, scope string
		f             access.AssignmentFilter
		want          string
	}{
		{"at, above and below", grp, access.AssignmentFilter{}, "50 51 52"},
		{"at and above only", grp, access.AssignmentFilter{AtScope: true}, "50 51"},
		{"of one principal", sub, access.AssignmentFilter{Principal: oid(3)}, "52"},
		{"everything", "/", access.AssignmentFilter{}, "50 51 52 53"},
	}
	for _, c := range cases {
		if got := names(c.scope, c.f); got != c.want {
			t.Errorf("%s: got %s, want %s", c.reason, got, c.want)
		}
	}
	if _, err := w.gate.ListAssignments(as(2), sub, access.AssignmentFilter{}); !errors.Is(err, fault.Denied) {
		t.Errorf("a Reader of the group listed the subscription: %v", err)
	}
}

// TestIncludesIsSound: what Includes promises holds for every action.
func TestIncludesIsSound(t *testing.T) {
	pattern := rapid.StringMatching(`[ab*/]{0,5}`)
	role := rapid.Custom(func(t *rapid.T) access.Role {
		return access.Role{
			Actions:    rapid.SliceOfN(pattern, 0, 3).Draw(t, "actions"),
			NotActions: rapid.SliceOfN(pattern, 0, 2).Draw(t, "notActions"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		a, b := role.Draw(t, "a"), role.Draw(t, "b")
		if !a.Includes(b) {
			return
		}
		for range 20 {
			action := rapid.StringMatching(`[ab/]{0,6}`).Draw(t, "action")
			if b.Allows(action) && !a.Allows(action) {
				t.Fatalf("a includes b, but only b allows %q", action)
			}
		}
	})
	for _, c := range []struct {
		a, b access.Role
		want bool
	}{
		{access.Owner, access.Owner, true},
		{access.Owner, access.ManagedIdentityOperator, true},
		{access.Contributor, access.Contributor, true},
		{access.Contributor, access.Owner, false},
		{access.Contributor, access.Reader, true}, // Reader's own exception covers Contributor's; its other ones are no reads
		{access.Reader, access.Contributor, false},
		{access.Reader, access.ManagedIdentityOperator, false},
	} {
		if got := c.a.Includes(c.b); got != c.want {
			t.Errorf("%s includes %s: %t, want %t", c.a.Name, c.b.Name, got, c.want)
		}
	}
}

// TestOwnCallsGiveNoRights: however a principal calls, neither its own rights
// grow, nor does anybody get a right that the principal did not have.
func TestOwnCallsGiveNoRights(t *testing.T) {
	scopes := []string{"/", sub, grp, pool, "/subscriptions/" + oid(7)}
	actions := []string{
		"Microsoft.Batch/batchAccounts/pools/write", "Microsoft.Batch/batchAccounts/pools/read", "Microsoft.Authorization/roleAssignments/write",
		"Microsoft.Authorization/roleAssignments/delete", "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action",
		"Microsoft.KeyVault/vaults/accessPolicies/write", "Keyfleet/applications/write",
	}
	rights := func(w *world, p int) map[string]bool {
		out := map[string]bool{}
		for _, s := range scopes {
			for _, a := range actions {
				if w.gate.CanAs(context.Background(), access.Principal{Kind: access.Application, ObjectID: oid(p)}, access.Op{Action: a, Resource: s}) == nil {
					out[a+" at "+s] = true
				}
			}
		}
		return out
	}
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		w.grant(t, 9, access.Owner, "/", oid(900))
		for i := range rapid.IntRange(0, 3).Draw(t, "start") {
			role := rapid.SampledFrom(access.Roles()).Draw(t, "role")
			a := access.Assignment{Name: oid(100 + i), Scope: rapid.SampledFrom(scopes).Draw(t, "scope"), Principal: oid(rapid.IntRange(1, 2).Draw(t, "for")), RoleID: role.ID}
			_, _, _ = w.gate.Assign(access.AsSystem(context.Background(), "test"), a) // a doubled grant is refused, and no matter
		}
		mine, theirs := rights(w, 1), rights(w, 2)
		for range rapid.IntRange(1, 30).Draw(t, "calls") {
			scope := rapid.SampledFrom(scopes).Draw(t, "scope")
			name := oid(rapid.IntRange(100, 110).Draw(t, "name"))
			if rapid.Bool().Draw(t, "remove") {
				_, _ = w.gate.Unassign(as(1), scope, name)
				continue
			}
			role := rapid.SampledFrom(access.Roles()).Draw(t, "role")
			_, _, _ = w.gate.Assign(as(1), access.Assignment{Name: name, Scope: scope, Principal: oid(rapid.IntRange(1, 2).Draw(t, "for")), RoleID: role.ID})
		}
		for r := range rights(w, 1) {
			if !mine[r] {
				t.Fatalf("own calls gave: %s", r)
			}
		}
		for r := range rights(w, 2) {
			if !mine[r] && !theirs[r] {
				t.Fatalf("another principal was given what the caller did not have: %s", r)
			}
		}
	})
}
