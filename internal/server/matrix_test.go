package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/subscription"
	"keyfleet.dev/keyfleet/internal/vault"
)

// testServer is a server of this process, on a new directory.
func testServer(t *testing.T, change func(*Config)) *Server {
	t.Helper()
	cfg := Config{DataDir: t.TempDir(), Listen: "127.0.0.1:8443", Dev: true, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	s, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// callers is a Verifier for which the token is the name of a principal.
type callers struct{ tenant string }

func (c callers) Verify(_ context.Context, token string, _ []string) (access.Principal, error) {
	if token == "expired" {
		return access.Principal{}, fault.New(fault.Unauthenticated, "", "The token has expired.")
	}
	return access.Principal{Kind: access.Application, Tenant: c.tenant, ObjectID: objectID(token), ClientID: objectID("client of " + token), Name: token}, nil
}

// objectID is the object id of the principal of that name.
func objectID(name string) string {
	h := fmt.Sprintf("%x", sha256.Sum256([]byte(name)))
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:32]
}

// matrix is the authorisation matrix: every route of the table, every kind of caller.
type matrix struct {
	*testing.T
	api     *azureapi.API
	sub     string
	roles   map[string]access.Role // principal -> its only role, at "/"
	actions []string               // every data-plane action of the table
	cells   int
}

const (
	group     = "rg1"
	vaultName = "vault1"
)

// TestAuthorisationMatrix calls every route as every caller and compares the
// answer with what the route's declared action says. A route whose action
// cannot be understood fails: every route has a row.
func TestAuthorisationMatrix(t *testing.T) {
	s := testServer(t, nil)
	m := newMatrix(t, s)
	routes := slices.Clone(s.api.Routes())
	slices.SortStableFunc(routes, func(a, b azureapi.Route) int { return cmp.Compare(deletes(a), deletes(b)) })
	for _, rt := range routes {
		m.row(rt)
	}
	if len(routes) < 100 || m.cells < 5*len(routes) {
		t.Errorf("only %d routes and %d cells: is the table complete?", len(routes), m.cells)
	}
	t.Logf("%d routes, %d cells", len(routes), m.cells)
}

// deletes orders the rows: what deletes comes last, inner things before outer ones.
func deletes(rt azureapi.Route) int {
	switch {
	case rt.Method != http.MethodDelete:
		return 0
	case rt.Surface != azureapi.ARM:
		return 1
	}
	return 1000 - len(rt.Path)
}

func newMatrix(t *testing.T, s *Server) *matrix {
	t.Helper()
	m := &matrix{T: t, roles: map[string]access.Role{
		"owner": access.Owner, "contributor": access.Contributor, "reader": access.Reader, "operator": access.ManagedIdentityOperator,
	}}
	for _, rt := range s.api.Routes() {
		if azureapi.ByPolicy(rt.Action) && !slices.Contains(m.actions, rt.Action) {
			m.actions = append(m.actions, rt.Action)
		}
	}
	admin, err := readAdmin(s.cfg.DataDir + "/admin.json")
	if err != nil {
		t.Fatal(err)
	}
	m.sub = admin.Subscription
	ctx := access.AsSystem(context.Background(), "test")
	if _, _, err := s.subscriptions.PutGroup(ctx, subscription.Group{Subscription: m.sub, Name: group, Location: "westus2"}); err != nil {
		t.Fatal(err)
	}
	err = s.store.Update(ctx, func(tx *store.Tx) error {
		for name, role := range m.roles {
			a := access.Assignment{Name: role.ID, Scope: "/", Principal: objectID(name), RoleID: role.ID}
			if err := access.Grant(tx, a); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	m.makeVault(ctx, s, admin.Tenant)
	if _, _, err := s.fleet.PutAccount(ctx, m.id("Microsoft.Batch", "batchAccounts", "account1"), "westus2", nil); err != nil {
		t.Fatal(err)
	}
	m.api, err = azureapi.New(azureapi.Config{
		Endpoints: s.endpoints, Routes: s.api.Routes(), Verifier: callers{admin.Tenant}, Tenant: admin.Tenant, Log: s.log,
		Authorize: s.authorize,
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// makeVault makes a vault in which, for every action, one principal may do just
// that and another everything but that.
func (m *matrix) makeVault(ctx context.Context, s *Server, tenant string) {
	m.Helper()
	var policies []access.Policy
	for _, action := range m.actions {
		policies = append(policies, policyFor(tenant, "only:"+action, action), policyFor(tenant, "but:"+action, m.without(action)...))
	}
	id := m.id("Microsoft.KeyVault", "vaults", vaultName)
	location, sku := "westus2", "standard"
	if _, _, err := s.vaults.PutVault(ctx, id, vault.VaultSpec{Location: &location, SKU: &sku, Tenant: &tenant, Policies: &policies}); err != nil {
		m.Fatal(err)
	}
}

func (m *matrix) id(provider, typ, name string) arm.ID {
	return arm.ID{Subscription: m.sub, ResourceGroup: group, Provider: provider, Types: []string{typ}, Names: []string{name}}
}

func (m *matrix) without(action string) []string {
	return slices.DeleteFunc(slices.Clone(m.actions), func(a string) bool { return a == action })
}

func policyFor(tenant, name string, actions ...string) access.Policy {
	p := access.Policy{Tenant: tenant, ObjectID: objectID(name)}
	for _, a := range actions {
		kind, verb, _ := strings.Cut(a, "/")
		if kind == "secrets" {
			p.Secrets = append(p.Secrets, verb)
		} else {
			p.Certificates = append(p.Certificates, verb)
		}
	}
	return p
}

// row checks all cells of one route.
func (m *matrix) row(rt azureapi.Route) {
	switch {
	case rt.Action == azureapi.Public:
		m.cell(rt, "", func(status int) bool { return status != 401 && status != 403 }, "is open")
		return
	case rt.Action == azureapi.Authenticated:
		m.cell(rt, "stranger", allowed, "is for every caller")
	case azureapi.ByPolicy(rt.Action):
		m.cell(rt, "stranger", refused, "needs "+rt.Action)
		if rt.Surface == azureapi.Vault {
			m.cell(rt, "owner", refused, "goes by access policies, not by roles")
		}
		m.cell(rt, "but:"+rt.Action, refused, "needs "+rt.Action+", and every other permission is not it")
		m.cell(rt, "only:"+rt.Action, allowed, "needs "+rt.Action+" and nothing else")
	case strings.Contains(rt.Action, "/"):
		m.cell(rt, "stranger", refused, "needs "+rt.Action)
		for name, role := range m.roles {
			if role.Allows(rt.Action) {
				m.cell(rt, name, allowed, role.Name+" allows "+rt.Action)
			} else {
				m.cell(rt, name, refused, role.Name+" does not allow "+rt.Action)
			}
		}
	default:
		m.Errorf("%s %s %s: the action %q is none", rt.Surface, rt.Method, rt.Path, rt.Action)
	}
	for _, token := range []string{"", "expired"} {
		m.cell(rt, token, func(status int) bool { return status == http.StatusUnauthorized }, "needs a token that counts")
	}
}

func allowed(status int) bool {
	return status != http.StatusUnauthorized && status != http.StatusForbidden && status < 500
}

func refused(status int) bool { return status == http.StatusForbidden }

// cell makes one call. A refusal must not depend on whether the object exists,
// so refused cells call once for a vault's or group's existing item and once for a missing one.
func (m *matrix) cell(rt azureapi.Route, caller string, want func(int) bool, why string) {
	m.Helper()
	m.cells++
	r := httptest.NewRequest(rt.Method, m.url(rt), strings.NewReader("{}"))
	if caller != "" {
		r.Header.Set("Authorization", "Bearer "+caller)
	}
	w := httptest.NewRecorder()
	m.api.ServeHTTP(w, r)
	if !want(w.Code) {
		m.Errorf("%s %s %s as %q answered %d: it %s\n\t%s", rt.Surface, rt.Method, rt.Path, caller, w.Code, why, w.Body)
	}
}

func (m *matrix) url(rt azureapi.Route) string {
	host := map[azureapi.Surface]string{
		azureapi.ARM: "arm.keyfleet.internal:8443", azureapi.Login: "login.keyfleet.internal:8443",
		azureapi.Vault: vaultName + ".vault.keyfleet.internal:8443", azureapi.Batch: "account1.westus2.batch.keyfleet.internal:8443",
	}[rt.Surface]
	values := map[string]string{
		"subscription": m.sub, "group": group, "vault": vaultName, "account": "account1", "namespace": "Microsoft.Batch", "tenant": "common",
		"operation": "add", "node": strings.Repeat("0", 38), "publisher": "P", "type": "T", "location": "westus2",
	}
	path := rt.Path
	for {
		from, rest, found := strings.Cut(path, "{")
		if !found {
			break
		}
		param, to, _ := strings.Cut(rest, "}")
		value, ok := values[param]
		if !ok {
			value = "x1"
		}
		switch {
		case strings.HasSuffix(from, "/pooloperationresults/"):
			value = "delete-pool1-uid"
		case strings.HasSuffix(from, "/operationresults/"):
			value = base64.RawURLEncoding.EncodeToString([]byte("uid/" + group))
		}
		if param == "name" && strings.HasSuffix(from, "microsoft.keyvault/vaults/") {
			value = vaultName
		}
		path = from + value + to
	}
	if scope := "/-/providers/microsoft.authorization"; strings.HasPrefix(path, scope) {
		path = "/subscriptions/" + m.sub + path[2:]
	}
	version := ""
	if len(rt.Versions) > 0 {
		version = "?api-version=" + rt.Versions[len(rt.Versions)-1]
	}
	return fmt.Sprintf("https://%s%s%s", host, path, version)
}
