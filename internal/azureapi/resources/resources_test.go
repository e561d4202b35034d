package resources

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/login"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/subscription"
)

const (
	subID = "042998e4-36dc-4b7d-8ce3-a7a2c4877d33"
	sub   = "/subscriptions/" + subID
	idURL = sub + "/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/"
)

// identityContents makes identities the content of groups, as the server does.
type identityContents struct{ *identity.Service }

func (c identityContents) List(ctx context.Context, sub, group string) ([]subscription.Resource, error) {
	all, err := c.IdentitiesIn(ctx, sub, group)
	var out []subscription.Resource
	for _, o := range all {
		out = append(out, subscription.Resource{ID: o.Spec.ID, Name: o.Spec.Principal().Name, Type: identity.IdentityType, Group: "ACR", Location: o.Spec.Location})
	}
	return out, err
}

func (c identityContents) Delete(ctx context.Context, r subscription.Resource) error {
	_, err := c.DeleteIdentity(access.AsSystem(ctx, "resource-groups"), r.ID)
	return err
}

type server struct {
	*azureapi.API
	store     *store.Store
	gate      *access.Gate
	identity  *identity.Service
	subs      *subscription.Service
	endpoints azureapi.Endpoints
	admin     string // token of an Owner at /
}

func newServer(t testing.TB) *server {
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
	s := &server{store: st, endpoints: azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443"}}
	s.gate = access.NewGate(access.Config{Store: st, Recorder: log, Principal: identity.RequirePrincipal})
	s.identity, err = identity.New(t.Context(), identity.Config{
		Store: st, Gate: s.gate, Login: s.endpoints.Login(), Audiences: map[string]string{s.endpoints.ARM(): s.endpoints.ARM()},
		Place: func(tx *store.Tx, sub, group string) error {
			return subscription.Require(tx, sub, group, "Microsoft.ManagedIdentity")
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.subs = subscription.New(subscription.Config{Store: st, Gate: s.gate, Tenant: s.identity.TenantID(), Contents: []subscription.Contents{identityContents{s.identity}}})
	var admin identity.Admin
	_, err = s.identity.Bootstrap(t.Context(), identity.Bootstrap{
		Keep: func(a identity.Admin) (identity.Admin, error) { admin = a; return a, nil },
		Subscribe: func(tx *store.Tx, tenant, id string) error {
			_, _, err := subscription.Insert(tx, subscription.Subscription{ID: id, Tenant: tenant})
			return err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	var routes []azureapi.Route
	routes = append(routes, login.Routes(login.Config{Identity: s.identity})...)
	routes = append(routes, Routes(Config{
		Gate: s.gate, Identity: s.identity, Subscriptions: s.subs, Audit: audit.Reader{Log: log, Gate: s.gate},
		Table: func() []azureapi.Route { return routes },
	})...)
	s.API, err = azureapi.New(azureapi.Config{
		Endpoints: s.endpoints, Routes: routes, Verifier: s.identity, Tenant: s.identity.TenantID(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.admin = s.token(t, admin.ClientID, admin.Secret)
	return s
}

func (s *server) token(t testing.TB, clientID string, secret identity.Secret) string {
	t.Helper()
	tok, err := s.identity.ClientCredentials(t.Context(), identity.Credentials{Tenant: "common", ClientID: clientID, Secret: secret.Reveal(), Resource: s.endpoints.ARM(), Version: identity.V2})
	if err != nil {
		t.Fatal(err)
	}
	return tok.Value.Reveal()
}

// someone makes an application with a role and returns its token and object id.
func (s *server) someone(t testing.TB, role access.Role, scope, name string) (token, oid string) {
	t.Helper()
	o, secret, err := s.identity.CreateApplication(access.AsSystem(t.Context(), "test"), identity.NewApplication{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	if role.ID != "" {
		a := access.Assignment{Name: o.Spec.ClientID, Scope: scope, Principal: o.Spec.ObjectID, RoleID: role.ID}
		if _, _, err := s.gate.Assign(access.AsSystem(t.Context(), "test"), a); err != nil {
			t.Fatal(err)
		}
	}
	return s.token(t, o.Spec.ClientID, secret), o.Spec.ObjectID
}

// do sends a request as the holder of a token. JSON bodies come back decoded.
func (s *server) do(t testing.TB, token, method, path, body string) (int, map[string]any, http.Header) {
	t.Helper()
	r := httptest.NewRequest(method, s.endpoints.ARM()+path, strings.NewReader(body))
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	var out map[string]any
	if w.Body.Len() > 0 {
		if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil {
			var list []any
			if json.Unmarshal(w.Body.Bytes(), &list) != nil {
				t.Fatalf("%s %s: %d, no JSON: %s", method, path, w.Code, w.Body)
			}
			out = map[string]any{"array": list}
		}
	}
	return w.Code, out, w.Header()
}

// must is do with an expected status.
func (s *server) must(t testing.TB, status int, method, path, body string) map[string]any {
	t.Helper()
	got, out, _ := s.do(t, s.admin, method, path, body)
	if got != status {
		t.Fatalf("%s %s: %d, want %d: %v", method, path, got, status, out)
	}
	return out
}

func codeOf(body map[string]any) string {
	e, _ := body["error"].(map[string]any)
	c, _ := e["code"].(string)
	return c
}

func (s *server) prepare(t testing.TB) {
	t.Helper()
	s.must(t, 201, "POST", "/keyfleet/v1/subscriptions", `{"subscriptionId":"`+subID+`","displayName":"Documented"}`)
	s.must(t, 201, "PUT", sub+"/resourcegroups/ACR?api-version=2021-04-01", `{"location":"westus2"}`)
}

// TestClientsSequences sends what real clients send, with their api-versions.
func TestClientsSequences(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	steps := []struct {
		client, method, path, body string
		status                     int
	}{
		{"az login 2.45", "GET", "/subscriptions?api-version=2019-11-01", "", 200},
		{"az login 2.74", "GET", "/subscriptions?api-version=2022-12-01", "", 200},
		{"az account list-locations", "GET", sub + "/locations?api-version=2022-12-01", "", 200},
		{"az group create 2.45", "PUT", sub + "/resourcegroups/rg1?api-version=2021-04-01", `{"location":"westus2"}`, 201},
		{"az group create 2.74", "PUT", sub + "/resourcegroups/rg1?api-version=2024-11-01", `{"location":"westus2","tags":{"a":"b"}}`, 200},
		{"az group exists", "HEAD", sub + "/resourcegroups/RG1?api-version=2021-04-01", "", 204},
		{"az group exists", "HEAD", sub + "/resourcegroups/rg2?api-version=2021-04-01", "", 404},
		{"az group list", "GET", sub + "/resourcegroups?api-version=2021-04-01", "", 200},
		{"armresources 1.2.0", "PATCH", sub + "/resourcegroups/rg1?api-version=2021-04-01", `{"tags":{"x":"y"}}`, 200},
		{"az provider register", "POST", sub + "/providers/Microsoft.Batch/register?api-version=2021-04-01", "", 200},
		{"az provider show", "GET", sub + "/providers/Microsoft.Batch?api-version=2021-04-01", "", 200},
		{"az provider list", "GET", sub + "/providers?api-version=2021-04-01", "", 200},
		{"az provider register", "POST", sub + "/providers/Microsoft.Authorization/register?api-version=2021-04-01", "", 200},
		{"az keyvault show", "GET", sub + "/resources?$filter=resourceType%20eq%20'Microsoft.KeyVault/vaults'&api-version=2015-11-01", "", 200},
		{"az identity create 2.45", "PUT", idURL + "id1?api-version=2022-01-31-preview", `{"location":"westus2"}`, 201},
		{"az identity create 2.74", "PUT", idURL + "id1?api-version=2023-01-31", `{"location":"westus2","tags":{}}`, 200},
		{"armmsi 1.3.0", "GET", idURL + "id1?api-version=2024-11-30", "", 200},
		{"armmsi 1.3.0", "GET", sub + "/providers/Microsoft.ManagedIdentity/userAssignedIdentities?api-version=2024-11-30", "", 200},
		{
			"az identity federated-credential create 2.74", "PUT", idURL + "id1/federatedIdentityCredentials/web?api-version=2023-01-31",
			`{"properties":{"audiences":["api://AzureADTokenExchange"],"issuer":"https://issuer.example/","subject":"system:serviceaccount:shop:web"}}`, 201,
		},
		{
			"armmsi 1.3.0", "PUT", idURL + "id1/federatedIdentityCredentials/WEB?api-version=2024-11-30",
			`{"properties":{"audiences":["api://AzureADTokenExchange"],"issuer":"https://issuer.example/","subject":"system:serviceaccount:shop:web"}}`, 200,
		},
		{"armmsi 1.3.0", "GET", idURL + "id1/federatedIdentityCredentials?api-version=2024-11-30&$top=10", "", 200},
		{"az identity federated-credential delete 2.74", "DELETE", idURL + "id1/federatedIdentityCredentials/web?api-version=2023-01-31", "", 200},
		{"az identity federated-credential show 2.74", "GET", idURL + "id1/federatedIdentityCredentials/web?api-version=2023-01-31", "", 404},
		{"az role definition list", "GET", sub + "/providers/Microsoft.Authorization/roleDefinitions?$filter=roleName%20eq%20'Contributor'&api-version=2022-04-01", "", 200},
		{"az role assignment list", "GET", sub + "/providers/Microsoft.Authorization/roleAssignments?$filter=atScope()&api-version=2022-04-01", "", 200},
		{"az account tenant list", "GET", "/tenants?api-version=2022-12-01", "", 200},
		{"a made-up version", "GET", "/subscriptions?api-version=1999-01-01", "", 400},
		{"no version", "GET", "/subscriptions", "", 400},
	}
	for _, c := range steps {
		if status, body, _ := s.do(t, s.admin, c.method, c.path, c.body); status != c.status {
			t.Errorf("%s: %s %s: %d, want %d: %v", c.client, c.method, c.path, status, c.status, body)
		}
	}
}

func TestGroupBodies(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	got := s.must(t, 200, "GET", strings.ToLower(sub)+"/RESOURCEGROUPS/acr/?api-version=2021-04-01", "")
	want := map[string]any{
		"id": sub + "/resourceGroups/ACR", "name": "ACR", "type": "Microsoft.Resources/resourceGroups", "location": "westus2",
		"properties": map[string]any{"provisioningState": "Succeeded"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("group (-want +got):\n%s", d)
	}
	subs := s.must(t, 200, "GET", "/subscriptions?api-version=2022-12-01", "")["value"].([]any)
	found := false
	for _, v := range subs {
		m := v.(map[string]any)
		if m["subscriptionId"] != subID {
			continue
		}
		found = true
		want := map[string]any{
			"id": sub, "subscriptionId": subID, "tenantId": s.identity.TenantID(), "displayName": "Documented", "state": "Enabled",
			"subscriptionPolicies": map[string]any{"locationPlacementId": "Public_2014-09-01", "quotaId": "PayAsYouGo_2014-09-01", "spendingLimit": "Off"},
			"authorizationSource":  "RoleBased", "managedByTenants": []any{},
		}
		if d := cmp.Diff(want, m); d != "" {
			t.Errorf("subscription (-want +got):\n%s", d)
		}
	}
	if !found {
		t.Errorf("the subscription is not listed: %v", subs)
	}
	p := s.must(t, 200, "GET", sub+"/providers/microsoft.managedidentity?api-version=2021-04-01", "")
	types := p["resourceTypes"].([]any)[0].(map[string]any)
	if versions := types["apiVersions"].([]any); p["namespace"] != "Microsoft.ManagedIdentity" || p["registrationState"] != "Registered" || len(versions) != len(identityVersions) || versions[0] != "2025-01-31-preview" {
		t.Errorf("provider: %v", p)
	}
}

// TestFederatedBodies: a federated credential comes back as it was sent, with subject or expression.
func TestFederatedBodies(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	s.must(t, 201, "PUT", idURL+"id1?api-version=2023-01-31", `{"location":"westus2"}`)
	const one, two = "id1/federatedIdentityCredentials/web", "id1/federatedIdentityCredentials/teams"
	subject := map[string]any{"issuer": "https://issuer.example", "subject": "system:serviceaccount:shop:web", "audiences": []any{"api://AzureADTokenExchange"}}
	matching := map[string]any{
		"issuer": "https://issuer.example", "audiences": []any{"api://AzureADTokenExchange"},
		"claimsMatchingExpression": map[string]any{"value": "claims['sub'] matches 'system:serviceaccount:team-*:web'", "languageVersion": 1.0},
	}
	var all []any
	for name, properties := range map[string]any{two: matching, one: subject} {
		body, err := json.Marshal(map[string]any{"properties": properties})
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]any{
			"id": idURL + name, "name": name[strings.LastIndexByte(name, '/')+1:], "type": "Microsoft.ManagedIdentity/userAssignedIdentities/federatedIdentityCredentials", "properties": properties,
		}
		got := s.must(t, 201, "PUT", idURL+name+"?api-version=2025-01-31-preview", string(body))
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		all = append(all, want)
	}
	got := s.must(t, 200, "GET", idURL+"id1/federatedIdentityCredentials?api-version=2023-01-31", "")["value"].([]any)
	if len(got) != len(all) {
		t.Errorf("%d are listed", len(got))
	}
	status, body, _ := s.do(t, s.admin, "PUT", idURL+two+"?api-version=2025-01-31-preview",
		`{"properties":{"issuer":"https://issuer.example","audiences":["a"],"claimsMatchingExpression":{"value":"claims['sub'] eq 'a'","languageVersion":2}}}`)
	if status != 400 || codeOf(body) != "InvalidClaimsMatchingExpression" {
		t.Errorf("another language version: %d %v", status, body)
	}
}

func TestDeleteGroup(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	s.must(t, 201, "PUT", idURL+"id1?api-version=2023-01-31", `{"location":"westus2"}`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	status, _, h := s.do(t, s.admin, "DELETE", sub+"/resourcegroups/acr?api-version=2021-04-01", "")
	if status != 202 || h.Get("Retry-After") == "" {
		t.Fatal(status, h)
	}
	poll := strings.TrimPrefix(h.Get("Location"), s.endpoints.ARM())
	if status, _, h = s.do(t, s.admin, "GET", poll, ""); status != 202 || h.Get("Location") == "" {
		t.Fatalf("polling before the controller runs: %d %v", status, h)
	}
	if status, body, _ := s.do(t, s.admin, "PUT", idURL+"id2?api-version=2023-01-31", `{"location":"westus2"}`); status != 409 || codeOf(body) != "ResourceGroupBeingDeleted" {
		t.Errorf("making something in it: %d %v", status, body)
	}
	done := make(chan error, 1)
	go func() { done <- s.subs.Controller().Run(ctx, s.store) }()
	deadline := time.Now().Add(20 * time.Second)
	for status = 202; status == 202 && time.Now().Before(deadline); {
		status, _, _ = s.do(t, s.admin, "GET", poll, "")
	}
	if status != 200 {
		t.Fatalf("polling ended with %d", status)
	}
	s.must(t, 404, "GET", sub+"/resourcegroups/acr?api-version=2021-04-01", "")
	s.must(t, 404, "DELETE", sub+"/resourcegroups/acr?api-version=2021-04-01", "")
	s.must(t, 404, "GET", idURL+"id1?api-version=2023-01-31", "")
	s.must(t, 404, "GET", sub+"/operationresults/nonsense?api-version=2021-04-01", "")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestIdentityBodies(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	const seedClientID = "885b1a3d-f13c-4030-afcf-922f05044d78dc" // of a documented body
	got := s.must(t, 201, "PUT", idURL+"testumaforpools?api-version=2023-01-31", `{"location":"West US 2","properties":{"clientId":"`+seedClientID+`"}}`)
	props := got["properties"].(map[string]any)
	want := map[string]any{
		"id": idURL + "testumaforpools", "name": "testumaforpools", "type": "Microsoft.ManagedIdentity/userAssignedIdentities", "location": "westus2",
		"properties": map[string]any{"tenantId": s.identity.TenantID(), "clientId": seedClientID, "principalId": props["principalId"]},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("identity (-want +got):\n%s", d)
	}
	back, err := json.Marshal(got) // clients send the whole resource back
	if err != nil {
		t.Fatal(err)
	}
	s.must(t, 200, "PUT", idURL+"testumaforpools?api-version=2023-01-31", string(back))
	contributor, _ := s.someone(t, access.Contributor, sub, "c")
	status, body, _ := s.do(t, contributor, "PUT", idURL+"other1?api-version=2023-01-31", `{"location":"westus2","properties":{"clientId":"11111111-1111-1111-1111-111111111111"}}`)
	if status != 403 || codeOf(body) != "AuthorizationFailed" {
		t.Errorf("Contributor chose a client id: %d %v", status, body)
	}
	s.must(t, 200, "DELETE", idURL+"testumaforpools?api-version=2023-01-31", "")
	s.must(t, 204, "DELETE", idURL+"testumaforpools?api-version=2023-01-31", "")
}

func TestRoleAssignments(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	_, oid := s.someone(t, access.Role{}, "", "deployer")
	const name = "22222222-2222-2222-2222-222222222222"
	path := sub + "/resourceGroups/ACR/providers/Microsoft.Authorization/roleAssignments/" + name + "?api-version=2022-04-01"
	body := `{"properties":{"roleDefinitionId":"` + sub + `/providers/Microsoft.Authorization/roleDefinitions/` + access.Reader.ID + `","principalId":"` + oid + `","principalType":"ServicePrincipal"}}`
	got := s.must(t, 201, "PUT", path, body)
	props := got["properties"].(map[string]any)
	want := map[string]any{
		"id": sub + "/resourceGroups/ACR/providers/Microsoft.Authorization/roleAssignments/" + name, "name": name, "type": "Microsoft.Authorization/roleAssignments",
		"properties": map[string]any{
			"roleDefinitionId": sub + "/providers/Microsoft.Authorization/roleDefinitions/" + access.Reader.ID, "principalId": oid, "principalType": "ServicePrincipal",
			"scope": sub + "/resourceGroups/ACR", "createdOn": props["createdOn"], "updatedOn": props["updatedOn"], "createdBy": props["createdBy"], "updatedBy": props["updatedBy"],
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("assignment (-want +got):\n%s", d)
	}
	s.must(t, 200, "PUT", path, body)
	s.must(t, 200, "GET", path, "")
	s.must(t, 409, "PUT", strings.Replace(path, name, "33333333-3333-3333-3333-333333333333", 1), body)
	s.must(t, 400, "PUT", path, strings.Replace(body, `"principalType"`, `"condition":"x","principalType"`, 1))
	s.must(t, 404, "PUT", path, strings.Replace(body, oid, "44444444-4444-4444-4444-444444444444", 1))
	all := s.must(t, 200, "GET", sub+"/providers/Microsoft.Authorization/roleAssignments?$filter=principalId%20eq%20'"+oid+"'&api-version=2022-04-01", "")
	if n := len(all["value"].([]any)); n != 1 {
		t.Errorf("%d assignments of the principal", n)
	}
	s.must(t, 200, "DELETE", path, "")
	s.must(t, 204, "DELETE", path, "")
	s.must(t, 404, "GET", path, "")

	roles := s.must(t, 200, "GET", "/providers/Microsoft.Authorization/roleDefinitions?$filter=roleName%20eq%20'owner'&api-version=2022-04-01", "")["value"].([]any)
	if len(roles) != 1 || roles[0].(map[string]any)["name"] != access.Owner.ID || roles[0].(map[string]any)["id"] != "/providers/Microsoft.Authorization/roleDefinitions/"+access.Owner.ID {
		t.Errorf("role definitions: %v", roles)
	}
	s.must(t, 200, "GET", sub+"/providers/Microsoft.Authorization/roleDefinitions/"+access.Owner.ID+"?api-version=2022-04-01", "")
}

func TestMetadataShapes(t *testing.T) {
	s := newServer(t)
	get := func(version string) map[string]any {
		status, body, _ := s.do(t, "", "GET", "/metadata/endpoints?api-version="+version, "")
		if status != 200 {
			t.Fatalf("%s: %d %v", version, status, body)
		}
		return body
	}
	cloud := map[string]any{
		"name": "Keyfleet", "portal": "https://portal.keyfleet.internal:8443/", "resourceManager": "https://arm.keyfleet.internal:8443",
		"authentication": map[string]any{
			"loginEndpoint": "https://login.keyfleet.internal:8443", "audiences": []any{"https://arm.keyfleet.internal:8443"},
			"tenant": "common", "identityProvider": "AAD",
		},
		"batch": "https://batch.keyfleet.internal:8443/", "gallery": "https://gallery.keyfleet.internal:8443/", "graph": "https://graph.keyfleet.internal:8443/",
		"graphAudience": "https://graph.keyfleet.internal:8443/", "microsoftGraphResourceId": "https://graph.keyfleet.internal:8443/",
		"media": "https://media.keyfleet.internal:8443/", "sqlManagement": "https://sql.keyfleet.internal:8443/", "vmImageAliasDoc": "https://images.keyfleet.internal:8443/",
		"suffixes": map[string]any{
			"storage": "core.keyfleet.internal", "keyVaultDns": "vault.keyfleet.internal:8443", "sqlServerHostname": "database.keyfleet.internal", "acrLoginServer": "registry.keyfleet.internal",
		},
	}
	if d := cmp.Diff(map[string]any{"array": []any{cloud}}, get("2019-05-01")); d != "" {
		t.Errorf("2019-05-01 (-want +got):\n%s", d)
	}
	if d := cmp.Diff(cloud, get("2022-09-01")); d != "" {
		t.Errorf("2022-09-01 (-want +got):\n%s", d)
	}
	if d := cmp.Diff(cloud, get("")); d != "" {
		t.Errorf("without a version (-want +got):\n%s", d)
	}
	old := map[string]any{
		"galleryEndpoint": "https://gallery.keyfleet.internal:8443/", "graphEndpoint": "https://graph.keyfleet.internal:8443/", "portalEndpoint": "https://portal.keyfleet.internal:8443/",
		"authentication": map[string]any{"loginEndpoint": "https://login.keyfleet.internal:8443", "audiences": []any{"https://arm.keyfleet.internal:8443"}},
	}
	if d := cmp.Diff(old, get("2015-01-01")); d != "" {
		t.Errorf("2015-01-01 (-want +got):\n%s", d)
	}
}

func TestApplications(t *testing.T) {
	s := newServer(t)
	app := s.must(t, 201, "POST", "/keyfleet/v1/applications", `{"displayName":"deployer"}`)
	id, secret := app["appId"].(string), app["secretText"].(string)
	parsed, err := identity.ParseSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	s.token(t, id, parsed)
	more := s.must(t, 201, "POST", "/keyfleet/v1/applications/"+id+"/secrets", "")
	shown := s.must(t, 200, "GET", "/keyfleet/v1/applications/"+id, "")
	if b, _ := json.Marshal(shown); strings.Contains(string(b), secret) || strings.Contains(string(b), more["secretText"].(string)) || len(shown["secrets"].([]any)) != 2 {
		t.Errorf("shown: %s", b)
	}
	s.must(t, 204, "DELETE", "/keyfleet/v1/applications/"+id+"/secrets/"+more["keyId"].(string), "")
	s.must(t, 400, "POST", "/keyfleet/v1/applications", `{"displayName":"x","endDateTime":"2001-01-01T00:00:00Z"}`)
	s.must(t, 400, "POST", "/keyfleet/v1/applications", `{"displayName":"x","secretText":"mine"}`)
	s.must(t, 409, "POST", "/keyfleet/v1/applications", `{"displayName":"x","appId":"`+id+`"}`)
	s.must(t, 200, "DELETE", "/keyfleet/v1/applications/"+id, "")
	s.must(t, 204, "DELETE", "/keyfleet/v1/applications/"+id, "")
}

func TestAuditRoute(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	reader, oid := s.someone(t, access.Reader, "/", "reader")
	if status, body, _ := s.do(t, reader, "GET", "/keyfleet/v1/audit", ""); status != 403 {
		t.Errorf("Reader at /: %d %v", status, body)
	}
	found := s.must(t, 200, "GET", "/keyfleet/v1/audit?outcome=denied&limit=5&principal="+oid, "")["value"].([]any)
	if len(found) != 1 || found[0].(map[string]any)["action"] != "Keyfleet/audit/read" || found[0].(map[string]any)["requestId"] == "" {
		t.Errorf("found %v", found)
	}
	s.must(t, 400, "GET", "/keyfleet/v1/audit?limit=0", "")
	s.must(t, 400, "GET", "/keyfleet/v1/audit?since=yesterday", "")
}

// TestMatrix calls every route as nobody, as somebody without a role, and as
// the roles: each is let in exactly where its role allows the route's action.
func TestMatrix(t *testing.T) {
	s := newServer(t)
	s.prepare(t)
	nobody, _ := s.someone(t, access.Role{}, "", "nobody")
	callers := map[string]string{"no token": "", "no role": nobody}
	roles := map[string]access.Role{}
	for _, r := range access.Roles() {
		callers[r.Name], _ = s.someone(t, r, "/", r.Name)
		roles[r.Name] = r
	}
	fill := strings.NewReplacer("{subscription}", subID, "{group}", "ACR", "{name}", "55555555-5555-5555-5555-555555555555", "{namespace}", "Microsoft.Batch",
		"{operation}", "YS9i", "{application}", "66666666-6666-6666-6666-666666666666", "{key}", "k", "{credential}", "web", "/-/", sub+"/")
	bodies := map[string]string{
		"PUT /-/providers/microsoft.authorization/roleassignments/{name}": `{"properties":{"roleDefinitionId":"` + access.Reader.ID + `","principalId":"77777777-7777-7777-7777-777777777777"}}`,
		"PUT /subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.managedidentity/userassignedidentities/{name}/federatedidentitycredentials/{credential}": `{"properties":{"issuer":"https://issuer.example","subject":"s","audiences":["a"]}}`,
		"POST /keyfleet/v1/applications":                       `{"displayName":"x","appId":"66666666-6666-6666-6666-666666666666"}`,
		"POST /keyfleet/v1/applications/{application}/secrets": `{}`,
		"POST /keyfleet/v1/subscriptions":                      `{"subscriptionId":"` + subID + `"}`,
	}
	cells := 0
	for _, rt := range s.Routes() {
		if rt.Surface != azureapi.ARM {
			continue
		}
		// Deletion of what later rows need is only tried by those who may not.
		destroys := rt.Method == http.MethodDelete
		for who, token := range callers {
			want := rt.Action == azureapi.Public || token != "" && rt.Action == azureapi.Authenticated || roles[who].ID != "" && roles[who].Allows(rt.Action)
			if want && destroys {
				continue
			}
			path := fill.Replace(rt.Path)
			if rt.Versions != nil {
				path += "?api-version=" + rt.Versions[len(rt.Versions)-1]
			}
			body := bodies[rt.Method+" "+rt.Path]
			if body == "" {
				body = `{"location":"westus2"}`
			}
			status, _, _ := s.do(t, token, rt.Method, path, body)
			cells++
			if refused := status == 401 || status == 403; refused == want {
				t.Errorf("%s %s (%s) as %s: %d, want allowed %t", rt.Method, rt.Path, rt.Action, who, status, want)
			}
			if token == "" && !want && status != 401 {
				t.Errorf("%s %s without a token: %d, want 401", rt.Method, rt.Path, status)
			}
		}
	}
	t.Logf("%d cells", cells)
}

func FuzzFilters(f *testing.F) {
	f.Add("atScope() and assignedTo('042998e4-36dc-4b7d-8ce3-a7a2c4877d33')")
	f.Add("principalId eq '042998e4-36dc-4b7d-8ce3-a7a2c4877d33'")
	f.Add("roleName eq 'Owner' and type eq 'BuiltInRole'")
	f.Add("YS9i")
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := assignmentFilter(s); err != nil && !errors.Is(err, fault.Invalid) {
			t.Error(err)
		}
		if _, err := definitionFilter(s); err != nil && !errors.Is(err, fault.Invalid) {
			t.Error(err)
		}
		if d, ok := parseDeletion(s); ok && (d.uid == "" || d.group == "") {
			t.Errorf("%q: %+v", s, d)
		}
	})
}
