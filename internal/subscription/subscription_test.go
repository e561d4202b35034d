package subscription

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

const sub1 = "042998e4-36dc-4b7d-8ce3-a7a2c4877d33"

// noRecords accepts every record; what is recorded is tested in package access.
type noRecords struct{}

func (noRecords) Append(context.Context, access.Record) error { return nil }
func (noRecords) InTx(*store.Tx, access.Record) error         { return nil }

// shelf is a Contents of which each resource goes some looks after it was asked to.
type shelf struct {
	mu    sync.Mutex
	items []Resource
	going map[string]int // looks until it is gone
}

func (s *shelf) List(_ context.Context, subscription, group string) ([]Resource, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.items = slices.DeleteFunc(s.items, func(r Resource) bool {
		left, asked := s.going[r.ID]
		if asked {
			s.going[r.ID] = left - 1
		}
		return asked && left <= 0
	})
	var out []Resource
	for _, r := range s.items {
		if strings.HasPrefix(r.ID, Scope(subscription)+"/") && (group == "" || strings.EqualFold(r.Group, group)) {
			out = append(out, r)
		}
	}
	return out, nil
}

func (s *shelf) Delete(_ context.Context, r Resource) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.going[r.ID]; !ok {
		s.going[r.ID] = 3
	}
	return nil
}

type world struct {
	*Service
	store *store.Store
	gate  *access.Gate
	shelf *shelf
}

func newWorld(t *testing.T) *world {
	t.Helper()
	b := store.NewMemory()
	t.Cleanup(func() { b.Close() })
	s, err := store.New(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{store: s, gate: access.NewGate(access.Config{Store: s, Recorder: noRecords{}}), shelf: &shelf{going: map[string]int{}}}
	w.Service = New(Config{Store: s, Gate: w.gate, Tenant: "t", Contents: []Contents{w.shelf}})
	if _, _, err := w.Create(system(t), sub1, ""); err != nil {
		t.Fatal(err)
	}
	return w
}

func system(t *testing.T) context.Context { return access.AsSystem(t.Context(), "test") }

func (w *world) as(t *testing.T, oid string, role access.Role, scope string) context.Context {
	t.Helper()
	name := strings.Replace(oid, "0000-0000", "1111-1111", 1)
	if _, _, err := w.gate.Assign(system(t), access.Assignment{Name: name, Scope: scope, Principal: oid, RoleID: role.ID}); err != nil {
		t.Fatal(err)
	}
	return access.With(t.Context(), access.Call{Principal: access.Principal{Kind: access.Application, ObjectID: oid}})
}

func (w *world) group(t *testing.T, name string) *GroupObject {
	t.Helper()
	g, _, err := w.PutGroup(system(t), Group{Subscription: sub1, Name: name, Location: "West US 2"})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func code(err error) string {
	if err == nil {
		return ""
	}
	return fault.From(err).Code
}

func TestRequire(t *testing.T) {
	w := newWorld(t)
	w.group(t, "Web")
	w.group(t, "going")
	if _, err := w.DeleteGroup(system(t), sub1, "going"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Register(system(t), sub1, "microsoft.batch", false); err != nil {
		t.Fatal(err)
	}
	cases := []struct{ reason, sub, group, namespace, code string }{
		{"all is there", sub1, "Web", "Microsoft.KeyVault", ""},
		{"in any casing", strings.ToUpper(sub1), "wEB", "microsoft.keyvault", ""},
		{"the subscription only", sub1, "", "", ""},
		{"an unknown subscription", "11111111-1111-1111-1111-111111111111", "Web", "", "SubscriptionNotFound"},
		{"an unknown group", sub1, "web2", "", "ResourceGroupNotFound"},
		{"a group that is being deleted", sub1, "going", "", "ResourceGroupBeingDeleted"},
		{"a provider that was unregistered", sub1, "Web", "Microsoft.Batch", "MissingSubscriptionRegistration"},
	}
	for _, c := range cases {
		err := Require(w.store.View(t.Context()), c.sub, c.group, c.namespace)
		if got := code(err); got != c.code {
			t.Errorf("%s: %v, want %q", c.reason, err, c.code)
		}
		if err != nil && fault.From(err).Fix == "" {
			t.Errorf("%s: no fix", c.reason)
		}
	}
}

func TestPutGroup(t *testing.T) {
	cases := []struct {
		reason string
		g      Group
		code   string
		isNew  bool
	}{
		{"a new one", Group{Subscription: sub1, Name: "rg-1_(a).b", Location: "westus2"}, "", true},
		{"letters of any script", Group{Subscription: sub1, Name: "グループ", Location: "japaneast"}, "", true},
		{"the same again", Group{Subscription: sub1, Name: "OLD", Location: "West US 2", Tags: map[string]string{"a": "b"}}, "", false},
		{"another location", Group{Subscription: sub1, Name: "old", Location: "eastus"}, "InvalidResourceGroupLocation", false},
		{"no location", Group{Subscription: sub1, Name: "new"}, "LocationRequired", false},
		{"a location that is no label", Group{Subscription: sub1, Name: "new", Location: "west/us"}, "LocationNotAvailableForResourceType", false},
		{"a name ending in a period", Group{Subscription: sub1, Name: "new.", Location: "westus2"}, "InvalidResourceGroup", false},
		{"a name with a slash", Group{Subscription: sub1, Name: "a/b", Location: "westus2"}, "InvalidResourceGroup", false},
		{"a name of 91 characters", Group{Subscription: sub1, Name: strings.Repeat("a", 91), Location: "westus2"}, "InvalidResourceGroup", false},
		{"an unknown subscription", Group{Subscription: "s", Name: "new", Location: "westus2"}, "SubscriptionNotFound", false},
		{"a tag without a name", Group{Subscription: sub1, Name: "new", Location: "westus2", Tags: map[string]string{"": "x"}}, "InvalidTagNameCharacters", false},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			w := newWorld(t)
			w.group(t, "old")
			o, isNew, err := w.PutGroup(system(t), c.g)
			if code(err) != c.code || isNew != c.isNew && err == nil {
				t.Fatalf("new %t, %v, want %q", isNew, err, c.code)
			}
			if err == nil && !isNew && (o.Spec.Name != "old" || o.Spec.Tags["a"] != "b") {
				t.Errorf("got %+v: the casing stays, the tags are replaced", o.Spec)
			}
		})
	}
}

func TestDeleteGroupWaitsForWhatIsInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		old := w.group(t, "Web")
		for _, n := range []string{"a", "b"} {
			w.shelf.items = append(w.shelf.items, Resource{ID: GroupScope(sub1, "Web") + "/providers/x/y/" + n, Group: "Web"})
		}
		reader := w.as(t, "00000000-0000-0000-0000-000000000001", access.Reader, GroupScope(sub1, "web"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Controller().Run(ctx, w.store) }()

		if _, err := w.DeleteGroup(system(t), sub1, "WEB"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1500 * time.Millisecond)
		if gone, err := w.GroupGone(system(t), sub1, "web", old.UID); gone || err != nil {
			t.Errorf("gone %t, %v while resources are inside", gone, err)
		}
		if _, err := w.DeleteGroup(system(t), sub1, "web"); err != nil {
			t.Errorf("deleting again: %v", err)
		}
		g, err := w.Group(system(t), sub1, "web")
		if c := g.Condition("Deleting"); err != nil || !c.Status || !strings.Contains(c.Message, "2 resources") {
			t.Errorf("condition %+v, %v", c, err)
		}
		time.Sleep(time.Minute)
		if gone, err := w.GroupGone(system(t), sub1, "web", old.UID); !gone || err != nil {
			t.Errorf("gone %t, %v after a minute", gone, err)
		}
		w.group(t, "web")
		if gone, err := w.GroupGone(system(t), sub1, "web", old.UID); !gone || err != nil {
			t.Errorf("a new group of the name counts as the old one: %t, %v", gone, err)
		}
		if _, err := w.Group(reader, sub1, "web"); !errors.Is(err, fault.Denied) {
			t.Errorf("the new group inherits the grants of the old one: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestListingsShowWhatTheCallerMaySee(t *testing.T) {
	w := newWorld(t)
	other := "11111111-1111-1111-1111-111111111111"
	if _, _, err := w.Create(system(t), other, "Other"); err != nil {
		t.Fatal(err)
	}
	w.group(t, "web")
	w.group(t, "db")
	for _, g := range []string{"web", "db"} {
		w.shelf.items = append(w.shelf.items, Resource{ID: GroupScope(sub1, g) + "/providers/Microsoft.KeyVault/vaults/v-" + g, Type: "Microsoft.KeyVault/vaults", Group: g, Name: "v-" + g})
	}
	see := func(ctx context.Context) string {
		var out []string
		subs, err := w.List(ctx)
		if err != nil {
			return err.Error()
		}
		for _, s := range subs {
			out = append(out, s.Spec.ID[:4])
		}
		groups, err := w.ListGroups(ctx, sub1)
		out = append(out, code(err))
		for _, g := range groups {
			out = append(out, g.Spec.Name)
		}
		resources, err := w.Resources(ctx, sub1, "", Filter{})
		out = append(out, code(err))
		for _, r := range resources {
			out = append(out, r.Name)
		}
		return strings.Join(out, " ")
	}
	cases := []struct {
		reason string
		ctx    context.Context
		want   string
	}{
		{"Reader of everything", w.as(t, "00000000-0000-0000-0000-000000000001", access.Reader, "/"), "0429 1111  db web  v-db v-web"},
		{"Reader of the subscription", w.as(t, "00000000-0000-0000-0000-000000000002", access.Reader, Scope(sub1)), "0429  db web  v-db v-web"},
		{"Reader of one group", w.as(t, "00000000-0000-0000-0000-000000000003", access.Reader, GroupScope(sub1, "web")), "0429  web  v-web"},
		{"Reader of the other subscription", w.as(t, "00000000-0000-0000-0000-000000000004", access.Reader, Scope(other)), "1111 AuthorizationFailed AuthorizationFailed"},
		{"a caller without a role", access.With(t.Context(), access.Call{Principal: access.Principal{Kind: access.Application, ObjectID: "x"}}), "AuthorizationFailed AuthorizationFailed"},
	}
	for _, c := range cases {
		if got := see(c.ctx); got != c.want {
			t.Errorf("%s: sees %q, want %q", c.reason, got, c.want)
		}
	}
}

func TestProviders(t *testing.T) {
	w := newWorld(t)
	states := func() string {
		all, err := w.ListProviders(system(t), sub1)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, p := range all {
			if !p.Registered {
				out = append(out, p.Namespace)
			}
		}
		return strings.Join(out, " ")
	}
	if got := states(); got != "" {
		t.Errorf("not registered in a new subscription: %s", got)
	}
	for range 2 {
		if p, err := w.Register(system(t), sub1, "microsoft.keyvault", false); err != nil || p.Registered {
			t.Fatal(p, err)
		}
	}
	if got := states(); got != "Microsoft.KeyVault" {
		t.Errorf("not registered: %s", got)
	}
	if _, err := w.Register(system(t), sub1, "Microsoft.KeyVault", true); err != nil || states() != "" {
		t.Errorf("after registration: %v, %s", err, states())
	}
	if _, err := w.Register(system(t), sub1, "Microsoft.Resources", false); code(err) != "CannotUnregisterProvider" {
		t.Errorf("unregistering Microsoft.Resources: %v", err)
	}
	if _, err := w.Provider(system(t), sub1, "Microsoft.Compute"); code(err) != "InvalidResourceNamespace" {
		t.Errorf("an unknown provider: %v", err)
	}
	if _, err := w.Register(w.as(t, "00000000-0000-0000-0000-000000000001", access.Reader, "/"), sub1, "Microsoft.KeyVault", false); !errors.Is(err, fault.Denied) {
		t.Errorf("Reader unregistered a provider: %v", err)
	}
}

func TestCreateSubscription(t *testing.T) {
	w := newWorld(t)
	if _, _, err := w.Create(w.as(t, "00000000-0000-0000-0000-000000000001", access.Owner, Scope(sub1)), sub1, "mine"); !errors.Is(err, fault.Denied) {
		t.Errorf("an Owner of a subscription only: %v", err)
	}
	if o, created, err := w.Create(system(t), strings.ToUpper(sub1), "Renamed"); err != nil || created || o.Spec.ID != sub1 || o.Spec.DisplayName != "Renamed" {
		t.Errorf("the same id again: created %t, %v, %+v", created, err, o)
	}
	if _, _, err := w.Create(system(t), "my-subscription", ""); code(err) != "InvalidSubscriptionId" {
		t.Errorf("an id that is no GUID: %v", err)
	}
}

func TestParseFilter(t *testing.T) {
	cases := []struct {
		reason, in string
		want       Filter
		bad        bool
	}{
		{"none", "", Filter{}, false},
		{"az keyvault show", "resourceType eq 'Microsoft.KeyVault/vaults'", Filter{Type: "Microsoft.KeyVault/vaults"}, false},
		{"az resource list", "resourceType eq 'Microsoft.Batch/batchAccounts' and name eq 'acct1'", Filter{Type: "Microsoft.Batch/batchAccounts", Name: "acct1"}, false},
		{"tags", "tagName eq 'env' and tagValue eq 'it''s prod'", Filter{TagName: "env", TagValue: "it's prod"}, false},
		{"a part of the name", "substringof('web', name) and location eq 'westus2'", Filter{NamePart: "web", Location: "westus2"}, false},
		{"the group", "ResourceGroup EQ 'rg1'", Filter{Group: "rg1"}, false},
		{"and inside a value", "name eq 'a and b'", Filter{Name: "a and b"}, false},
		{"or", "name eq 'a' or name eq 'b'", Filter{}, true},
		{"not equal", "name ne 'a'", Filter{}, true},
		{"an unknown field", "kind eq 'a'", Filter{}, true},
		{"a field twice", "name eq 'a' and name eq 'b'", Filter{}, true},
		{"no quotes", "name eq a", Filter{}, true},
		{"an open quote", "name eq 'a", Filter{}, true},
		{"an empty value", "name eq ''", Filter{}, true},
		{"and at the end", "name eq 'a' and ", Filter{}, true},
		{"a tag value without its name", "tagValue eq 'a'", Filter{}, true},
	}
	for _, c := range cases {
		got, err := ParseFilter(c.in)
		if d := cmp.Diff(c.want, got); (err != nil) != c.bad || d != "" {
			t.Errorf("%s: %v\n%s", c.reason, err, d)
		}
	}
}

func FuzzParseFilter(f *testing.F) {
	f.Add("resourceType eq 'Microsoft.KeyVault/vaults'")
	f.Add("tagName eq 'env' and tagValue eq 'it''s prod'")
	f.Add("substringof('web', name)")
	f.Add("substringof('web")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseFilter(s)
		if err == nil && got == (Filter{}) && strings.TrimSpace(s) != "" {
			t.Errorf("%q was parsed to a filter that takes all", s)
		}
		if err != nil && !errors.Is(err, fault.Invalid) {
			t.Errorf("%v is not Invalid", err)
		}
	})
}

func TestNormalizeLocation(t *testing.T) {
	for in, want := range map[string]string{"West US 2": "westus2", "westus2": "westus2", " ChinaNorth2 ": "chinanorth2", "": "", "a.b": "", strings.Repeat("a", 33): ""} {
		if got, err := NormalizeLocation(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}
