package login_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/login"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/store"
)

var now = time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)

type server struct {
	*azureapi.API
	identity *identity.Service
	endpoint azureapi.Endpoints
	app      identity.Application
	secret   string
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
	s := &server{endpoint: azureapi.Endpoints{
		Domain: "keyfleet.internal", Port: ":8443",
		Aliases: []azureapi.Alias{{Suffix: "login.microsoftonline.com", Surface: azureapi.Login}},
	}}
	gate := access.NewGate(access.Config{Store: st, Recorder: log})
	s.identity, err = identity.New(t.Context(), identity.Config{
		Store: st, Gate: gate, Login: s.endpoint.Login(), Now: func() time.Time { return now },
		Audiences: map[string]string{s.endpoint.ARM(): s.endpoint.ARM(), "https://" + s.endpoint.BatchSuffix(): "https://" + s.endpoint.BatchSuffix()},
	})
	if err != nil {
		t.Fatal(err)
	}
	o, secret, err := s.identity.CreateApplication(access.AsSystem(t.Context(), "test"), identity.NewApplication{Name: "test"})
	if err != nil {
		t.Fatal(err)
	}
	s.app, s.secret = o.Spec, secret.Reveal()
	s.API, err = azureapi.New(azureapi.Config{
		Endpoints: s.endpoint, Routes: login.Routes(login.Config{Identity: s.identity}), Verifier: s.identity, Tenant: s.identity.TenantID(),
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// call sends a request to the login host and decodes the answer.
func (s *server) call(t testing.TB, r *http.Request) (int, map[string]any, http.Header) {
	t.Helper()
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	var body map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatalf("%s %s: %d, the body is no JSON: %s", r.Method, r.URL, w.Code, w.Body)
	}
	return w.Code, body, w.Header()
}

func (s *server) get(t testing.TB, path string) (int, map[string]any, http.Header) {
	t.Helper()
	return s.call(t, httptest.NewRequest(http.MethodGet, s.endpoint.Login()+path, nil))
}

func (s *server) post(t testing.TB, path string, form url.Values) (int, map[string]any, http.Header) {
	t.Helper()
	r := httptest.NewRequest(http.MethodPost, s.endpoint.Login()+path, strings.NewReader(form.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return s.call(t, r)
}

// golden compares a body with a document in which TENANT stands for the tenant's id.
func (s *server) golden(t *testing.T, what string, body map[string]any, want string) {
	t.Helper()
	got, err := json.MarshalIndent(body, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	var w map[string]any
	if err := json.Unmarshal([]byte(strings.ReplaceAll(want, "TENANT", s.identity.TenantID())), &w); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(w, body); d != "" {
		t.Errorf("%s (-want +got):\n%s\n%s", what, d, got)
	}
}

const configurationV2 = `{
  "issuer": "https://login.keyfleet.internal:8443/TENANT/v2.0",
  "token_endpoint": "https://login.keyfleet.internal:8443/TENANT/oauth2/v2.0/token",
  "authorization_endpoint": "https://login.keyfleet.internal:8443/TENANT/oauth2/v2.0/authorize",
  "jwks_uri": "https://login.keyfleet.internal:8443/TENANT/discovery/v2.0/keys",
  "token_endpoint_auth_methods_supported": ["client_secret_post", "client_secret_basic", "private_key_jwt"],
  "grant_types_supported": ["client_credentials"],
  "response_types_supported": ["code"],
  "response_modes_supported": ["query", "fragment", "form_post"],
  "subject_types_supported": ["pairwise"],
  "id_token_signing_alg_values_supported": ["RS256"],
  "scopes_supported": ["openid", "profile", "offline_access"],
  "claims_supported": ["sub", "iss", "aud", "exp", "iat", "nbf", "oid", "tid", "ver", "appid", "azp", "uti"],
  "request_uri_parameter_supported": false,
  "http_logout_supported": false,
  "frontchannel_logout_supported": false,
  "tenant_region_scope": null,
  "cloud_instance_name": "login.keyfleet.internal:8443"
}`

func TestDiscoveryDocuments(t *testing.T) {
	s := newServer(t)
	ten := s.identity.TenantID()
	status, body, _ := s.get(t, "/"+ten+"/v2.0/.well-known/openid-configuration")
	if status != 200 {
		t.Fatal(status, body)
	}
	s.golden(t, "v2", body, configurationV2)

	_, body, _ = s.get(t, "/"+ten+"/.well-known/openid-configuration")
	v1 := strings.NewReplacer("oauth2/v2.0/", "oauth2/", "discovery/v2.0/", "discovery/", `/TENANT/v2.0"`, `/TENANT/"`).Replace(configurationV2)
	s.golden(t, "v1", body, v1)

	_, body, _ = s.get(t, "/common/v2.0/.well-known/openid-configuration")
	if body["issuer"] != "https://login.keyfleet.internal:8443/"+ten+"/v2.0" || body["token_endpoint"] != "https://login.keyfleet.internal:8443/common/oauth2/v2.0/token" {
		t.Errorf("common: %v", body)
	}

	// az asks a public host whether our authority is known; people point that host here.
	r := httptest.NewRequest(http.MethodGet, "https://login.microsoftonline.com/common/discovery/instance?api-version=1.1&authorization_endpoint="+
		url.QueryEscape("https://login.keyfleet.internal:8443/"+ten+"/oauth2/v2.0/authorize"), nil)
	status, body, _ = s.call(t, r)
	if status != 200 {
		t.Fatal(status, body)
	}
	s.golden(t, "instance discovery", body, `{
	  "tenant_discovery_endpoint": "https://login.keyfleet.internal:8443/TENANT/v2.0/.well-known/openid-configuration",
	  "api-version": "1.1",
	  "metadata": [{"preferred_network": "login.keyfleet.internal:8443", "preferred_cache": "login.keyfleet.internal:8443", "aliases": ["login.keyfleet.internal:8443"]}]
	}`)

	for _, path := range []string{"/discovery/v2.0/keys", "/discovery/keys"} {
		_, body, _ = s.get(t, "/"+ten+path)
		keys, _ := body["keys"].([]any)
		if len(keys) != 1 {
			t.Fatalf("%s: %v", path, body)
		}
		key := keys[0].(map[string]any)
		if key["kty"] != "RSA" || key["use"] != "sig" || key["alg"] != "RS256" || key["e"] != "AQAB" || key["kid"] == "" || len(key["n"].(string)) < 340 || len(key) != 6 {
			t.Errorf("%s: %v", path, key)
		}
	}

	status, body, _ = s.get(t, "/11111111-1111-1111-1111-111111111111/v2.0/.well-known/openid-configuration")
	if status != 400 || body["error"] != "invalid_tenant" {
		t.Errorf("an unknown tenant: %d %v", status, body)
	}
}

func TestTokenReplies(t *testing.T) {
	s := newServer(t)
	ten := s.identity.TenantID()
	form := func(kv ...string) url.Values {
		f := url.Values{"client_id": {s.app.ClientID}, "client_secret": {s.secret}, "grant_type": {"client_credentials"}, "client_info": {"1"}}
		for i := 0; i < len(kv); i += 2 {
			f.Set(kv[i], kv[i+1])
		}
		return f
	}
	// az sends claims as well, Go further scopes.
	status, body, h := s.post(t, "/"+ten+"/oauth2/v2.0/token", form("scope", s.endpoint.ARM()+"/.default openid offline_access profile",
		"claims", `{"access_token":{"xms_cc":{"values":["CP1"]}}}`))
	token, _ := body["access_token"].(string)
	if status != 200 || h.Get("Cache-Control") != "no-store" {
		t.Fatal(status, body, h)
	}
	body["access_token"] = "TOKEN"
	s.golden(t, "v2", body, `{"token_type":"Bearer","expires_in":3599,"ext_expires_in":3599,"access_token":"TOKEN"}`)
	if p, err := s.identity.Verify(t.Context(), token, []string{s.endpoint.ARM()}); err != nil || p.ClientID != s.app.ClientID {
		t.Errorf("the token: %+v, %v", p, err)
	}

	status, body, _ = s.post(t, "/"+ten+"/oauth2/token?api-version=1.0", form("resource", "https://"+s.endpoint.BatchSuffix()+"/"))
	if status != 200 {
		t.Fatal(status, body)
	}
	body["access_token"] = "TOKEN"
	s.golden(t, "v1", body, fmt.Sprintf(`{"token_type":"Bearer","expires_in":"3599","ext_expires_in":"3599","expires_on":"%d","not_before":"%d",
	  "resource":"https://batch.keyfleet.internal:8443/","access_token":"TOKEN"}`, now.Unix()+3600, now.Unix()))

	// AD FS: the v1 endpoint with a scope; az adds to the numbers.
	status, body, _ = s.post(t, "/adfs/oauth2/token", form("scope", s.endpoint.ARM()+"/.default"))
	if status != 200 {
		t.Fatal(status, body)
	}
	body["access_token"] = "TOKEN"
	s.golden(t, "adfs", body, `{"token_type":"Bearer","expires_in":3599,"ext_expires_in":3599,"access_token":"TOKEN"}`)

	// The secret in the header.
	r := httptest.NewRequest(http.MethodPost, s.endpoint.Login()+"/common/oauth2/v2.0/token",
		strings.NewReader(url.Values{"grant_type": {"client_credentials"}, "scope": {s.endpoint.ARM() + "/.default"}}.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	r.SetBasicAuth(url.QueryEscape(s.app.ClientID), url.QueryEscape(s.secret))
	if status, body, _ := s.call(t, r); status != 200 {
		t.Errorf("basic: %d %v", status, body)
	}
	// A double slash before .default.
	if status, body, _ := s.post(t, "/"+ten+"/oauth2/v2.0/token", form("scope", "https://"+s.endpoint.BatchSuffix()+"//.default")); status != 200 {
		t.Errorf("double slash: %d %v", status, body)
	}
}

func TestTokenRefusals(t *testing.T) {
	s := newServer(t)
	ten := s.identity.TenantID()
	good := url.Values{"client_id": {s.app.ClientID}, "client_secret": {s.secret}, "grant_type": {"client_credentials"}, "scope": {s.endpoint.ARM() + "/.default"}}
	with := func(k string, v ...string) url.Values {
		f := url.Values{}
		for n, vs := range good {
			f[n] = vs
		}
		f[k] = v
		return f
	}
	assert := func(kv ...string) url.Values { // with an assertion instead of the secret
		f := with("client_secret")
		f["client_assertion"], f["client_assertion_type"] = []string{"a.b.c"}, []string{"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}
		if len(kv) > 0 {
			f[kv[0]] = kv[1:]
		}
		return f
	}
	cases := []struct {
		reason string
		path   string
		form   url.Values
		status int
		code   string
		aadsts float64
	}{
		{"a wrong secret", ten, with("client_secret", "wrong"), 401, "invalid_client", 7000215},
		{"an unknown application", ten, with("client_id", "11111111-1111-1111-1111-111111111111"), 400, "unauthorized_client", 700016},
		{"an unknown tenant", "11111111-1111-1111-1111-111111111111", good, 400, "invalid_request", 90002},
		{"an unknown resource", ten, with("scope", "https://graph.microsoft.com/.default"), 400, "invalid_resource", 500011},
		{"a scope without .default", ten, with("scope", s.endpoint.ARM()+"/user_impersonation"), 400, "invalid_scope", 1002012},
		{"no scope", ten, with("scope"), 400, "invalid_request", 900144},
		{"no grant type", ten, with("grant_type"), 400, "invalid_request", 900144},
		{"another grant type", ten, with("grant_type", "password"), 400, "unsupported_grant_type", 70003},
		{"no client id", ten, with("client_id"), 400, "invalid_request", 900144},
		{"no secret", ten, with("client_secret"), 401, "invalid_client", 7000216},
		{"a secret and an assertion", ten, with("client_assertion", "x"), 400, "invalid_request", 900144},
		{"an assertion of an unknown type", ten, assert("client_assertion_type", "urn:saml2"), 400, "invalid_request", 900144},
		{"an assertion of no type", ten, assert("client_assertion_type"), 400, "invalid_request", 900144},
		{"an assertion for an application", ten, assert(), 401, "invalid_client", 70025},
		{"an assertion for nobody", ten, assert("client_id", "44444444-nobody"), 400, "unauthorized_client", 700016},
		{"a parameter twice", ten, with("scope", "a", "b"), 400, "invalid_request", 900144},
		{"too large", ten, with("claims", strings.Repeat("x", 70<<10)), 400, "invalid_request", 900144},
	}
	for _, c := range cases {
		status, body, _ := s.post(t, "/"+c.path+"/oauth2/v2.0/token", c.form)
		codes, _ := body["error_codes"].([]any)
		if status != c.status || body["error"] != c.code || len(codes) != 1 || codes[0] != c.aadsts {
			t.Errorf("%s: %d %v", c.reason, status, body)
			continue
		}
		text, _ := body["error_description"].(string)
		if !strings.HasPrefix(text, fmt.Sprintf("AADSTS%d: ", int(c.aadsts))) || strings.Contains(text, s.secret) {
			t.Errorf("%s: description %q", c.reason, text)
		}
		for _, k := range []string{"timestamp", "trace_id", "correlation_id"} {
			if body[k] == "" {
				t.Errorf("%s: no %s", c.reason, k)
			}
		}
	}
	r := httptest.NewRequest(http.MethodPost, s.endpoint.Login()+"/common/oauth2/v2.0/token", strings.NewReader(`{"grant_type":"client_credentials"}`))
	r.Header.Set("Content-Type", "application/json")
	if status, body, _ := s.call(t, r); status != 400 || body["error"] != "invalid_request" {
		t.Errorf("JSON: %d %v", status, body)
	}
}

// FuzzToken posts any body: never a token without the secret, never a crash.
func FuzzToken(f *testing.F) {
	s := newServer(f)
	good := url.Values{"client_id": {s.app.ClientID}, "client_secret": {"not-it"}, "grant_type": {"client_credentials"}, "scope": {s.endpoint.ARM() + "/.default"}}
	f.Add(good.Encode(), "")
	f.Add("grant_type=client_credentials&client_id=%zz", "")
	f.Add("a=b;c=d&&=&&", "Basic Og==")
	f.Add("scope=%00&scope=1", "Basic YTpi")
	f.Fuzz(func(t *testing.T, body, authorization string) {
		r := httptest.NewRequestWithContext(context.Background(), http.MethodPost, s.endpoint.Login()+"/common/oauth2/v2.0/token", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set("Authorization", authorization)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Code != 400 && w.Code != 401 {
			t.Errorf("status %d: %s", w.Code, w.Body)
		}
	})
}
