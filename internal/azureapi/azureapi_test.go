package azureapi_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
)

const tenant = "72f988bf-86f1-41af-91ab-2d7cd011db47"

// tokens is a Verifier that knows one token for one audience.
type tokens struct{ audience string }

func (v tokens) Verify(_ context.Context, token string, audiences []string) (access.Principal, error) {
	for _, a := range audiences {
		if token == "good" && (v.audience == "" || a == v.audience) {
			return access.Principal{Kind: access.Application, Tenant: tenant, ObjectID: "o1", ClientID: "c1"}, nil
		}
	}
	return access.Principal{}, fault.New(fault.Unauthenticated, "", "The token is not valid.")
}

func echo(r *azureapi.Request) (*azureapi.Reply, error) {
	id, err := r.ResourceID()
	out := map[string]string{"name": r.Param("name"), "scope": r.Param("scope"), "vault": r.Host.Name, "version": r.Version}
	if err == nil {
		out["id"] = id.String()
	}
	return azureapi.OK(out), nil
}

func newAPI(t *testing.T, routes ...azureapi.Route) *azureapi.API {
	t.Helper()
	api, err := azureapi.New(azureapi.Config{
		Endpoints: azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443", Aliases: []azureapi.Alias{{Suffix: "vault.azure.cn", Surface: azureapi.Vault}}},
		Routes:    routes, Verifier: tokens{}, Tenant: tenant, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return api
}

func call(api http.Handler, method, url, token string) *http.Response {
	r := httptest.NewRequest(method, url, strings.NewReader("{}"))
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	api.ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, resp *http.Response) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil {
		t.Fatal(err)
	}
	return m
}

var vaultRoute = azureapi.Route{
	Surface: azureapi.ARM, Method: "GET", Versions: []string{"2023-07-01"}, Action: azureapi.Authenticated, Handle: echo,
	Path: "/subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.keyvault/vaults/{name}",
}

func TestRoutingIgnoresCaseAndKeepsIt(t *testing.T) {
	api := newAPI(t, vaultRoute)
	for _, path := range []string{
		"/subscriptions/S1/resourceGroups/Rg/providers/Microsoft.KeyVault/vaults/Prod",
		"/subscriptions/S1/resourcegroups/Rg/providers/microsoft.keyvault/VAULTS/Prod/",
	} {
		resp := call(api, "GET", "https://arm.keyfleet.internal:8443"+path+"?api-version=2023-07-01", "good")
		if resp.StatusCode != 200 {
			t.Fatalf("%s: status %d", path, resp.StatusCode)
		}
		got := body(t, resp)
		if got["name"] != "Prod" || !strings.HasPrefix(got["id"].(string), "/subscriptions/S1/resourceGroups/Rg/") {
			t.Errorf("%s: the caller's casing is lost: %v", path, got)
		}
	}
}

func TestExtensionResourceScope(t *testing.T) {
	api := newAPI(t, azureapi.Route{
		Surface: azureapi.ARM, Method: "PUT", Action: azureapi.Authenticated, Handle: echo,
		Path: "/{scope}/providers/microsoft.authorization/roleassignments/{name}",
	})
	for scope, want := range map[string]string{"/subscriptions/S1/resourceGroups/Rg": "/subscriptions/S1/resourceGroups/Rg", "": "/"} {
		resp := call(api, "PUT", "https://arm.keyfleet.internal:8443"+scope+"/providers/Microsoft.Authorization/roleAssignments/G1", "good")
		got := body(t, resp)
		if got["scope"] != want || got["name"] != "G1" {
			t.Errorf("scope %q: got %v", scope, got)
		}
	}
}

func TestErrorsBySurface(t *testing.T) {
	fails := func(*azureapi.Request) (*azureapi.Reply, error) {
		return nil, fault.New(fault.NotFound, "", "It is not there.").At("x.y").WithFix("make it").WithInner("Deeper")
	}
	api := newAPI(t, vaultRoute,
		azureapi.Route{Surface: azureapi.Vault, Method: "GET", Path: "/secrets/{name}", Action: "secrets/get", Handle: fails},
		azureapi.Route{Surface: azureapi.Batch, Method: "GET", Path: "/pools/{name}", Action: "x", Handle: fails},
		azureapi.Route{Surface: azureapi.ARM, Method: "GET", Path: "/broken", Action: "x", Handle: func(*azureapi.Request) (*azureapi.Reply, error) { panic("boom") }},
	)
	cases := []struct {
		why, url, token string
		status          int
		code            string
	}{
		{"a token is needed before anything else", "https://arm.keyfleet.internal:8443/nowhere", "", 401, "AuthenticationFailed"},
		{"a wrong token does not count", "https://arm.keyfleet.internal:8443/nowhere", "bad", 401, "AuthenticationFailed"},
		{"unknown path", "https://arm.keyfleet.internal:8443/nowhere", "good", 404, "NotFound"},
		{"no api-version", "https://arm.keyfleet.internal:8443/subscriptions/S/resourceGroups/G/providers/Microsoft.KeyVault/vaults/V", "good", 400, "MissingApiVersionParameter"},
		{"unknown api-version", "https://arm.keyfleet.internal:8443/subscriptions/S/resourceGroups/G/providers/Microsoft.KeyVault/vaults/V?api-version=1999-01-01", "good", 400, "InvalidApiVersionParameter"},
		{"a panic is one internal error", "https://arm.keyfleet.internal:8443/broken", "good", 500, "InternalServerError"},
		{"Key Vault's default code", "https://v1.vault.keyfleet.internal:8443/secrets/x", "good", 404, "NotFound"},
		{"a foreign host", "https://example.com/", "good", 404, "UnknownHost"},
	}
	for _, c := range cases {
		resp := call(api, "GET", c.url, c.token)
		got := body(t, resp)["error"].(map[string]any)
		if resp.StatusCode != c.status || got["code"] != c.code {
			t.Errorf("%s: got %d %v, want %d %s", c.why, resp.StatusCode, got["code"], c.status, c.code)
		}
	}

	got := body(t, call(api, "GET", "https://v1.vault.keyfleet.internal:8443/secrets/x", "good"))["error"]
	want := map[string]any{
		"code": "NotFound", "message": "It is not there.", "target": "x.y", "innererror": map[string]any{"code": "Deeper"},
		"details": []any{map[string]any{"code": "Fix", "message": "make it"}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("Key Vault error body:\n%s", d)
	}
	resp := call(api, "GET", "https://acct.eastus.batch.keyfleet.internal:8443/pools/p", "good")
	b := body(t, resp)
	if b["code"] != "ResourceNotFound" || b["message"].(map[string]any)["lang"] != "en-US" || resp.Header.Get("request-id") == "" {
		t.Errorf("Batch error body: %v", b)
	}
}

// TestKeyVaultChallenge: clients take the tenant from the fourth part of
// "authorization" and refuse a resource that is not a suffix of the host they
// called, port included.
func TestKeyVaultChallenge(t *testing.T) {
	api := newAPI(t, azureapi.Route{Surface: azureapi.Vault, Method: "PUT", Path: "/secrets/{name}", Action: "secrets/set", Handle: echo})
	for url, resource := range map[string]string{
		"https://v1.vault.keyfleet.internal:8443/secrets/a": "https://vault.keyfleet.internal:8443",
		"https://v1.vault.azure.cn/secrets/a/":              "https://vault.azure.cn",
	} {
		resp := call(api, "PUT", url, "")
		want := `Bearer authorization="https://login.keyfleet.internal:8443/` + tenant + `", resource="` + resource + `"`
		if resp.StatusCode != 401 || resp.Header.Get("WWW-Authenticate") != want {
			t.Errorf("%s: %d %s", url, resp.StatusCode, resp.Header.Get("WWW-Authenticate"))
		}
	}
}

func TestTwoRowsForOnePathAreRefused(t *testing.T) {
	if _, err := azureapi.New(azureapi.Config{Routes: []azureapi.Route{vaultRoute, vaultRoute}}); err == nil {
		t.Error("want an error")
	}
}

func FuzzHost(f *testing.F) {
	for _, s := range []string{"arm.keyfleet.internal:8443", "v.vault.azure.cn", "a.b.batch.keyfleet.internal", "[::1]:443", ""} {
		f.Add(s, "/secrets/x")
	}
	e := azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443", Aliases: []azureapi.Alias{{Suffix: "vault.azure.cn", Surface: azureapi.Vault}}}
	api, err := azureapi.New(azureapi.Config{Endpoints: e, Routes: []azureapi.Route{vaultRoute}, Verifier: tokens{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, host, path string) {
		r := httptest.NewRequest("GET", "https://x/", nil)
		r.Host, r.URL.Path = host, path
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		if w.Code == 200 {
			t.Errorf("host %q path %q answered without a token", host, path)
		}
	})
}
