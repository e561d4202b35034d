package identity

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

// seedClientID is the client id of a documented request body; it is not quite a GUID.
const seedClientID = "885b1a3d-f13c-4030-afcf-922f05044d78dc"

// as makes a context of an application with a role at a scope.
func (w *world) as(t *testing.T, role access.Role, scope string) context.Context {
	t.Helper()
	app, _ := w.app(t, role.Name)
	_, _, err := w.gate.Assign(system(t.Context()), access.Assignment{Name: newGUID(), Scope: scope, Principal: app.ObjectID, RoleID: role.ID})
	if err != nil {
		t.Fatal(err)
	}
	return access.With(t.Context(), access.Call{Principal: access.Principal{Kind: access.Application, Tenant: w.TenantID(), ObjectID: app.ObjectID, ClientID: app.ClientID}})
}

func TestPutIdentity(t *testing.T) {
	const scope = "/subscriptions/" + subID
	cases := []struct {
		reason string
		role   access.Role
		scope  string
		want   Identity
		code   string
	}{
		{"Contributor makes one", access.Contributor, scope, Identity{ID: idPath + "new1", Location: "westus2"}, ""},
		{"Reader does not", access.Reader, scope, Identity{ID: idPath + "new1", Location: "westus2"}, "AuthorizationFailed"},
		{"Owner chooses the client id of a documented body", access.Owner, "/", Identity{ID: idPath + "new1", Location: "westus2", ClientID: seedClientID}, ""},
		{"Contributor does not choose a client id", access.Contributor, scope, Identity{ID: idPath + "new1", Location: "westus2", ClientID: seedClientID}, "AuthorizationFailed"},
		{"a client id that is in use", access.Owner, "/", Identity{ID: idPath + "new1", Location: "westus2", ClientID: "11111111-taken"}, "ClientIdInUse"},
		{"a client id with a slash", access.Owner, "/", Identity{ID: idPath + "new1", Location: "westus2", ClientID: "a/b/c/d/e/f"}, "InvalidClientId"},
		{"the same again, in another casing", access.Contributor, scope, Identity{ID: strings.ToUpper(idPath) + "OLD", Location: "westus2"}, ""},
		{"with its own client id sent back", access.Contributor, scope, Identity{ID: idPath + "old", Location: "westus2", ClientID: "11111111-taken"}, ""},
		{"another location", access.Contributor, scope, Identity{ID: idPath + "old", Location: "eastus"}, "InvalidResourceLocation"},
		{"another client id", access.Owner, "/", Identity{ID: idPath + "old", Location: "westus2", ClientID: seedClientID}, "PropertyChangeNotAllowed"},
		{"a name that is too short", access.Contributor, scope, Identity{ID: idPath + "ab", Location: "westus2"}, "InvalidResourceName"},
		{"another type's id", access.Contributor, scope, Identity{ID: strings.Replace(idPath, "userAssigned", "system", 1) + "x12", Location: "westus2"}, "LinkedInvalidPropertyId"},
		{"an unknown subscription", access.Owner, "/", Identity{ID: strings.Replace(idPath, subID, newGUID(), 1) + "x12", Location: "westus2"}, "SubscriptionNotFound"},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			w := newWorld(t)
			if _, _, err := w.PutIdentity(system(t.Context()), Identity{ID: idPath + "old", Location: "westus2", ClientID: "11111111-taken"}); err != nil {
				t.Fatal(err)
			}
			o, _, err := w.PutIdentity(w.as(t, c.role, c.scope), c.want)
			code := ""
			if err != nil {
				code = fault.From(err).Code
			}
			if code != c.code {
				t.Fatalf("got %v, want %q", err, c.code)
			}
			if err == nil && c.want.ClientID != "" && o.Spec.ClientID != c.want.ClientID {
				t.Errorf("client id %s", o.Spec.ClientID)
			}
			if err == nil && strings.EqualFold(c.want.ID, idPath+"old") && o.Spec.ID != idPath+"old" {
				t.Errorf("the casing of the id changed: %s", o.Spec.ID)
			}
		})
	}
}

func TestTokenFor(t *testing.T) {
	w := newWorld(t)
	ctx := access.With(t.Context(), access.Call{Principal: access.Principal{Kind: access.Node, ObjectID: "node:n1", Node: "n1", Name: "n1"}})
	app, _ := w.app(t, "deployer")
	o, _, err := w.PutIdentity(system(t.Context()), Identity{ID: idPath + "testumaforpools", Location: "westus2", ClientID: seedClientID})
	if err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		reason   string
		sel      Selector
		resource string
		ok       bool
	}{
		{"by resource id", Selector{ResourceID: o.Spec.ID}, vaultURL, true},
		{"by resource id in another casing", Selector{ResourceID: strings.ToLower(o.Spec.ID)}, vaultURL, true},
		{"by client id", Selector{ClientID: strings.ToUpper(seedClientID)}, vaultURL + "/", true},
		{"by object id", Selector{ObjectID: o.Spec.PrincipalID}, "https://vault.azure.cn", true},
		{"nothing named", Selector{}, vaultURL, false},
		{"an unknown client id", Selector{ClientID: newGUID()}, vaultURL, false},
		{"an application is no managed identity", Selector{ClientID: app.ClientID}, vaultURL, false},
		{"an unknown resource", Selector{ClientID: seedClientID}, "https://storage.azure.com", false},
	}
	for _, c := range cases {
		tok, err := w.TokenFor(ctx, c.sel, c.resource)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.reason, err)
			continue
		}
		if err != nil {
			continue
		}
		p, err := w.Verify(ctx, tok.Value.Reveal(), []string{vaultURL})
		if err != nil || p != o.Spec.Principal() {
			t.Errorf("%s: principal %+v, %v", c.reason, p, err)
		}
		if tok.Lifetime != 24*time.Hour || tok.ClientID != seedClientID {
			t.Errorf("%s: %+v", c.reason, tok)
		}
	}
}

func TestDeletingAnIdentity(t *testing.T) {
	w := newWorld(t)
	ctx := system(t.Context())
	put := func() Identity {
		o, _, err := w.PutIdentity(ctx, Identity{ID: idPath + "id1", Location: "westus2", ClientID: seedClientID})
		if err != nil {
			t.Fatal(err)
		}
		return o.Spec
	}
	old := put()
	_, _, err := w.gate.Assign(ctx, access.Assignment{Name: newGUID(), Scope: "/", Principal: old.PrincipalID, RoleID: access.Reader.ID})
	if err != nil {
		t.Fatal(err)
	}
	tok, err := w.TokenFor(ctx, Selector{ResourceID: old.ID}, armURL)
	if err != nil {
		t.Fatal(err)
	}
	if existed, err := w.DeleteIdentity(ctx, old.ID); err != nil || !existed {
		t.Fatal(existed, err)
	}
	again := put() // the same name and client id
	if again.PrincipalID == old.PrincipalID {
		t.Error("an object id was used twice")
	}
	if _, err := w.Verify(ctx, tok.Value.Reveal(), []string{armURL}); !errors.Is(err, fault.Unauthenticated) {
		t.Errorf("the old token counts for the new identity: %v", err)
	}
	if left, _ := access.Assignments.List(w.store.View(ctx), old.PrincipalID); len(left) != 0 {
		t.Errorf("grants of the deleted identity are left: %d", len(left))
	}
	if existed, err := w.DeleteIdentity(ctx, idPath+"none"); err != nil || existed {
		t.Errorf("deleting what is not there: %t, %v", existed, err)
	}
}

func TestResolve(t *testing.T) {
	w := newWorld(t)
	cases := []struct{ reason, id, code string }{
		{"an absent identity", idPath + "none", "ResourceNotFound"},
		{"of another tenant", strings.Replace(idPath, subID, newGUID(), 1) + "id1", "IdentityOfAnotherTenant"},
		{"a client id instead of a resource id", seedClientID, "LinkedInvalidPropertyId"},
	}
	for _, c := range cases {
		_, err := w.Resolve(t.Context(), c.id)
		if e := fault.From(err); e == nil || e.Code != c.code || e.Fix == "" {
			t.Errorf("%s: %v, want %s with a fix", c.reason, err, c.code)
		}
	}
}

func TestRequireAssign(t *testing.T) {
	w := newWorld(t)
	a, b := idPath+"id1", idPath+"id2"
	operator := w.as(t, access.ManagedIdentityOperator, a)
	if err := w.RequireAssign(operator, a); err != nil {
		t.Errorf("Managed Identity Operator at the identity: %v", err)
	}
	if err := w.RequireAssign(operator, a, b); !errors.Is(err, fault.Denied) {
		t.Errorf("two identities, a role at one: %v", err)
	}
	if err := w.RequireAssign(w.as(t, access.Reader, "/"), a); !errors.Is(err, fault.Denied) {
		t.Errorf("Reader: %v", err)
	}
}
