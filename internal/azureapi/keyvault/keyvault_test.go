package keyvault_test

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"flag"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/keyvault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/vault"
)

const (
	tenant = "72f988bf-86f1-41af-91ab-2d7cd011db47"
	group  = "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/Rg1/providers/Microsoft.KeyVault"
	arm    = "https://arm.keyfleet.internal:8443"
	prod1  = "https://prod1.vault.keyfleet.internal:8443"
)

var update = flag.Bool("update", false, "write the golden files anew")

// whoever makes the token's text the caller's object id.
type whoever struct{}

func (whoever) Verify(_ context.Context, token string, _ []string) (access.Principal, error) {
	return access.Principal{Kind: access.Application, Tenant: tenant, ObjectID: token, ClientID: "app-" + token}, nil
}

type noRecord struct{}

func (noRecord) Append(context.Context, access.Record) error { return nil }
func (noRecord) InTx(*store.Tx, access.Record) error         { return nil }

// env is the surface on a store in memory. "owner" is Owner of everything.
type env struct {
	t      *testing.T
	api    *azureapi.API
	store  *store.Store
	vaults *vault.Vaults
}

// bubble runs a test in a synctest bubble with the controllers running.
func bubble(t *testing.T, fn func(e *env)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		e := newEnv(t)
		done := make(chan struct{})
		for _, c := range e.vaults.Controllers(nil) {
			go func() {
				_ = c.Run(ctx, e.store)
				done <- struct{}{}
			}()
		}
		fn(e)
		cancel()
		for range e.vaults.Controllers(nil) {
			<-done
		}
	})
}

func newEnv(t *testing.T) *env {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	backend := store.NewMemory()
	t.Cleanup(func() { backend.Close() })
	s, err := store.New(context.Background(), backend)
	must(err)
	must(s.Update(context.Background(), func(tx *store.Tx) error {
		o := &store.Object[access.Assignment, struct{}]{Spec: access.Assignment{Name: "a1", Scope: "/", Principal: "owner", RoleID: access.Owner.ID}}
		o.ID = "owner/a1"
		return access.Assignments.Insert(tx, o)
	}))
	gate := access.NewGate(access.Config{Store: s, Recorder: noRecord{}})
	clock := vault.NewClock(vault.ClockConfig{Store: s, Gate: gate, Dev: true})
	ca, err := pki.NewCA("Test CA", time.Now())
	must(err)
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	vaults := vault.New(vault.Config{Store: s, Gate: gate, Clock: clock, Issuer: vault.FromCA(ca), Log: log, Tenant: tenant})
	api, err := azureapi.New(azureapi.Config{
		Endpoints: azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443", Aliases: []azureapi.Alias{{Suffix: "vault.azure.cn", Surface: azureapi.Vault}}},
		Routes:    keyvault.Routes(keyvault.Config{Vaults: vaults, Clock: clock}), Verifier: whoever{}, Tenant: tenant, Log: log,
	})
	must(err)
	e := &env{t: t, api: api, store: s, vaults: vaults}
	e.call("owner", "PUT", arm+group+"/vaults/Prod1?api-version=2023-07-01", `{"location":"eastus","properties":{"tenantId":"`+tenant+`","sku":{"family":"A","name":"standard"},
		"accessPolicies":[{"tenantId":"`+tenant+`","objectId":"owner","permissions":{"secrets":["all"],"certificates":["All"],"keys":["get"]}}]}}`, 201)
	return e
}

// call makes a request and checks its status; the answer is the body as it came.
func (e *env) call(who, method, url, body string, status int) string {
	e.t.Helper()
	r := httptest.NewRequest(method, url, strings.NewReader(body))
	if who != "" {
		r.Header.Set("Authorization", "Bearer "+who)
	}
	w := httptest.NewRecorder()
	e.api.ServeHTTP(w, r)
	if w.Code != status {
		e.t.Fatalf("%s %s: status %d, want %d: %s", method, url, w.Code, status, w.Body)
	}
	return w.Body.String()
}

// data is a call on the vault prod1.
func (e *env) data(method, path, body string, status int) string {
	e.t.Helper()
	sep := "?"
	if strings.Contains(path, "?") {
		sep = "&"
	}
	return e.call("owner", method, prod1+path+sep+"api-version=7.6", body, status)
}

// get decodes an answer.
func get[T any](t *testing.T, body string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	return v
}

type object = map[string]any

// errorOf takes code, inner code and target from an error body.
func errorOf(t *testing.T, body string) string {
	t.Helper()
	type inner struct{ Code string }
	got := get[struct {
		Error struct {
			Code, Target string
			InnerError   inner
		}
	}](t, body).Error
	return strings.TrimRight(got.Code+" "+got.InnerError.Code+" "+got.Target, " ")
}

// The body that azcertificates v1.4.0 sends for a policy that a program got
// from the service, changed and sends back: read-only members are in it.
const createBody = `{"attributes":{"enabled":true},"policy":{"attributes":{"created":1700000000,"enabled":true,"updated":1700000000},
"id":"https://prod1.vault.keyfleet.internal:8443/certificates/web/policy","issuer":{"cert_transparency":false,"name":"Keyfleet"},
"key_props":{"crv":"P-256","exportable":true,"key_size":256,"kty":"EC","reuse_key":false},
"lifetime_actions":[{"action":{"action_type":"AutoRenew"},"trigger":{"days_before_expiry":10}}],
"secret_props":{"contentType":"application/x-pem-file"},
"x509_props":{"ekus":["1.3.6.1.5.5.7.3.1"],"key_usage":["digitalSignature"],"sans":{"dns_names":["www.example.org"]},"subject":"CN=www.example.org","validity_months":12}},
"preserveCertOrder":false,"tags":{"team":"a"}}`

// The body that az 2.74 sends: members that are not set are null.
const azBody = `{"policy":{"id":null,"key_props":{"exportable":true,"kty":"RSA","key_size":2048,"reuse_key":false,"crv":null},
"secret_props":{"contentType":"application/x-pkcs12"},"x509_props":{"subject":"CN=CLIGetDefaultPolicy","sans":null,"ekus":null,
"key_usage":["cRLSign","dataEncipherment","digitalSignature","keyEncipherment","keyAgreement","keyCertSign"],"validity_months":12},
"lifetime_actions":[{"trigger":{"lifetime_percentage":null,"days_before_expiry":90},"action":{"action_type":"AutoRenew"}}],
"issuer":{"name":"Self","cty":null,"cert_transparency":null},"attributes":{"enabled":true,"nbf":null,"exp":null}},"attributes":{"enabled":true},"tags":null}`

var variable = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`[0-9a-f]{32}`), "VERSION"},
	{regexp.MustCompile(`"(cer|x5t|value)":"[^"]*"`), `"$1":"BYTES"`},
}

// golden compares answers with a file, with what differs from run to run replaced.
func golden(t *testing.T, name string, answers ...string) {
	t.Helper()
	var b strings.Builder
	for _, a := range answers {
		for _, v := range variable {
			a = v.re.ReplaceAllString(a, v.to)
		}
		var pretty any
		if err := json.Unmarshal([]byte(a), &pretty); err != nil {
			t.Fatalf("%v in %s", err, a)
		}
		out, err := json.MarshalIndent(pretty, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		b.Write(append(out, '\n'))
	}
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Errorf("%s (go test -update writes it anew):\n%s", name, d)
	}
}

// TestCertificateOnTheWire is the sequence of real clients: create, poll, get, read the secret.
func TestCertificateOnTheWire(t *testing.T) {
	bubble(t, func(e *env) {
		created := e.data("POST", "/certificates/web/create", createBody, 202)
		synctest.Wait()
		pending := e.data("GET", "/certificates/web/pending", "", 200)
		cert := e.data("GET", "/certificates/web/", "", 200)
		version := get[struct{ Sid string }](t, cert).Sid
		version = version[strings.LastIndex(version, "/")+1:]
		secret := e.data("GET", "/secrets/web/", "", 200)
		if byVersion := e.data("GET", "/secrets/web/"+version, "", 200); byVersion != secret {
			t.Errorf("the secret by version differs: %s", byVersion)
		}
		golden(t, "certificate.json", created, pending, cert, secret,
			e.data("GET", "/certificates/web/"+version, "", 200),
			e.data("GET", "/certificates/web/policy", "", 200),
			e.data("GET", "/certificates", "", 200),
			e.data("GET", "/certificates/web/versions", "", 200),
			e.data("PATCH", "/certificates/web/"+version, `{"tags":{"team":"b"},"attributes":{"enabled":true}}`, 200),
			e.data("PATCH", "/certificates/web/policy", `{"lifetime_actions":[{"trigger":{"lifetime_percentage":50},"action":{"action_type":"AutoRenew"}}]}`, 200),
			e.data("DELETE", "/certificates/web", "", 200),
			e.data("GET", "/deletedcertificates", "", 200),
			e.data("GET", "/deletedcertificates/web", "", 200),
			e.data("POST", "/deletedcertificates/web/recover", "", 200),
		)
		e.data("DELETE", "/certificates/web/pending", "", 200)
		e.data("GET", "/certificates/web/pending", "", 404)
		e.data("DELETE", "/certificates/web", "", 200)
		e.data("DELETE", "/deletedcertificates/web", "", 204)
		e.data("GET", "/deletedcertificates/web", "", 404)
	})
}

func TestAzBodyIsUnderstood(t *testing.T) {
	bubble(t, func(e *env) {
		e.data("POST", "/certificates/az/create", azBody, 202)
		synctest.Wait()
		cert := get[object](t, e.data("GET", "/certificates/az/", "", 200))
		if cert["policy"].(object)["lifetime_actions"].([]any)[0].(object)["trigger"].(object)["days_before_expiry"] != 90.0 {
			t.Errorf("the policy is %v", cert["policy"])
		}
		der, err := base64.StdEncoding.DecodeString(cert["cer"].(string))
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if leaf.IsCA || leaf.KeyUsage&x509.KeyUsageCertSign != 0 || leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
			t.Errorf("key usage %b, CA %v", leaf.KeyUsage, leaf.IsCA)
		}
	})
}

func TestSecretOnTheWire(t *testing.T) {
	e := newEnv(t)
	set := e.data("PUT", "/secrets/Db/", `{"value":"s3cr3t","contentType":"text/plain","attributes":{"enabled":true,"exp":2000000000},"tags":{"file-encoding":"utf-8"}}`, 200)
	if v := get[object](t, set)["value"]; v != "s3cr3t" {
		t.Errorf("the answer to a PUT holds %v", v)
	}
	version := get[struct{ ID string }](t, set).ID
	version = version[strings.LastIndex(version, "/")+1:]
	alias := e.call("owner", "GET", "https://prod1.vault.azure.cn/secrets/db?api-version=7.4", "", 200)
	if id := get[struct{ ID string }](t, alias).ID; id != "https://prod1.vault.azure.cn/secrets/Db/"+version {
		t.Errorf("a client of an alias gets the id %s", id)
	}
	list := e.data("GET", "/secrets", "", 200)
	if strings.Contains(list, "s3cr3t") || strings.Contains(list, version) {
		t.Errorf("a list shows a value or a version: %s", list)
	}
	deleted := e.data("DELETE", "/secrets/db", "", 200)
	if strings.Contains(deleted, "s3cr3t") || !strings.Contains(deleted, `"recoveryId":"`+prod1+`/deletedsecrets/Db"`) {
		t.Errorf("the answer to a deletion: %s", deleted)
	}
	e.data("PUT", "/secrets/db", `{"value":"x"}`, 409)
	e.data("POST", "/deletedsecrets/db/recover", "", 200)
	e.data("PATCH", "/secrets/db/"+version, `{"attributes":{"enabled":false}}`, 200)
	if s := errorOf(t, e.data("GET", "/secrets/db", "", 403)); s != "Forbidden SecretDisabled" {
		t.Errorf("a disabled secret: %s", s)
	}
	e.data("DELETE", "/secrets/db", "", 200)
	e.data("DELETE", "/deletedsecrets/db", "", 204)
}

func TestPagesAreFollowedByTheirLinks(t *testing.T) {
	e := newEnv(t)
	for _, n := range []string{"a", "b", "c", "d", "e"} {
		e.data("PUT", "/secrets/"+n, `{"value":"x"}`, 200)
	}
	type page struct {
		Value    []struct{ ID string }
		NextLink string
	}
	link, names := prod1+"/secrets?api-version=7.6&maxresults=2", ""
	for link != "" {
		p := get[page](t, e.call("owner", "GET", link, "", 200))
		for _, v := range p.Value {
			names += strings.TrimPrefix(v.ID, prod1+"/secrets/")
		}
		if p.NextLink != "" && !strings.HasPrefix(p.NextLink, prod1+"/secrets?") {
			t.Fatalf("nextLink is %s", p.NextLink)
		}
		link = p.NextLink
	}
	if names != "abcde" {
		t.Errorf("the pages hold %q", names)
	}
	for _, q := range []string{"maxresults=0", "maxresults=26", "maxresults=x", "$skiptoken=!"} {
		e.data("GET", "/secrets?"+q, "", 400)
	}
}

func TestErrorsOnTheWire(t *testing.T) {
	e := newEnv(t)
	for _, c := range []struct {
		reason, who, method, url, body string
		status                         int
		want                           string
	}{
		{"no vault", "owner", "GET", "https://nowhere.vault.keyfleet.internal:8443/secrets/a?api-version=7.6", "", 404, "VaultNotFound"},
		{"no secret", "owner", "GET", prod1 + "/secrets/a?api-version=7.6", "", 404, "SecretNotFound"},
		{"no certificate", "owner", "GET", prod1 + "/certificates/a?api-version=7.6", "", 404, "CertificateNotFound"},
		{"no permission", "u", "GET", prod1 + "/secrets/a?api-version=7.6", "", 403, "Forbidden AccessDenied"},
		{"no token", "", "GET", prod1 + "/secrets/a?api-version=7.6", "", 401, "Unauthorized"},
		{"a version of the API that is none", "owner", "GET", prod1 + "/secrets/a?api-version=1.0", "", 400, "BadParameter  api-version"},
		{"a member that is none", "owner", "PUT", prod1 + "/secrets/a?api-version=7.6", `{"valu":"x"}`, 400, "BadParameter  valu"},
		{"no value", "owner", "PUT", prod1 + "/secrets/a?api-version=7.6", `{}`, 400, "BadParameter  value"},
		{"a time that is none", "owner", "PUT", prod1 + "/secrets/a?api-version=7.6", `{"value":"x","attributes":{"exp":-1}}`, 400, "BadParameter  attributes.exp"},
		{"another type", "owner", "POST", prod1 + "/certificates/a/create?api-version=7.6", `{"policy":{"key_props":{"key_size":"2048"}}}`, 400, "BadParameter  policy.key_props.key_size"},
		{"an HSM key", "owner", "POST", prod1 + "/certificates/a/create?api-version=7.6", `{"policy":{"key_props":{"kty":"RSA-HSM"},"x509_props":{"subject":"CN=a"},"issuer":{"name":"Self"}}}`, 400, "BadParameter  policy.key_props.kty"},
		{"an unknown issuer", "owner", "POST", prod1 + "/certificates/a/create?api-version=7.6", `{"policy":{"x509_props":{"subject":"CN=a"},"issuer":{"name":"Digicert"}}}`, 400, "BadParameter  policy.issuer.name"},
		{"no policy", "owner", "POST", prod1 + "/certificates/a/create?api-version=7.6", `{}`, 400, "BadParameter  policy"},
		{"an issuer that is none", "owner", "GET", prod1 + "/certificates/issuers/x?api-version=7.6", "", 404, "CertificateIssuerNotFound"},
		{"no contacts", "owner", "GET", prod1 + "/certificates/contacts?api-version=7.6", "", 404, "ContactsNotFound"},
		{"roles", "owner", "PUT", arm + group + "/vaults/v2?api-version=2023-02-01", `{"location":"eastus","properties":{"enableRbacAuthorization":true}}`, 400, "BadRequest  properties.enableRbacAuthorization"},
		{"a firewall", "owner", "PUT", arm + group + "/vaults/v2?api-version=2023-02-01", `{"location":"eastus","properties":{"networkAcls":{"defaultAction":"Deny"}}}`, 400, "BadRequest  properties.networkAcls"},
		{"no properties", "owner", "PUT", arm + group + "/vaults/v2?api-version=2023-02-01", `{"location":"eastus"}`, 400, "InvalidRequestContent  properties"},
		{"a stranger", "u", "GET", arm + group + "/vaults/prod1?api-version=2023-02-01", "", 403, "AuthorizationFailed"},
		{"no vault resource", "owner", "GET", arm + group + "/vaults/other?api-version=2023-02-01", "", 404, "ResourceNotFound"},
		{"a change of policies that is none", "owner", "PUT", arm + group + "/vaults/prod1/accessPolicies/set?api-version=2023-02-01", `{"properties":{"accessPolicies":[]}}`, 400, "BadRequest"},
		{"a duration that is none", "owner", "POST", arm + "/keyfleet/v1/dev/clock", `{"advance":"a month"}`, 400, "InvalidRequestContent  advance"},
	} {
		if got := errorOf(t, e.call(c.who, c.method, c.url, c.body, c.status)); got != c.want {
			t.Errorf("%s: %q, want %q", c.reason, got, c.want)
		}
	}
}

func TestVaultOnTheWire(t *testing.T) {
	bubble(t, func(e *env) {
		one := arm + group + "/vaults/prod1"
		const v = "?api-version=2023-07-01"
		golden(t, "vault.json",
			e.call("owner", "GET", one+v, "", 200),
			e.call("owner", "PATCH", one+v, `{"tags":{"a":"b"},"properties":{"enabledForDeployment":true}}`, 200),
			e.call("owner", "PUT", one+"/accessPolicies/add"+v, `{"properties":{"accessPolicies":[{"tenantId":"`+tenant+`","objectId":"pool","permissions":{"secrets":["get"]}}]}}`, 200),
			e.call("owner", "PUT", one+"/accessPolicies/remove"+v, `{"properties":{"accessPolicies":[{"tenantId":"`+tenant+`","objectId":"pool","permissions":{"secrets":["get"]}}]}}`, 200),
			e.call("owner", "GET", arm+group+"/vaults"+v, "", 200),
			e.call("owner", "GET", arm+group+"/managedHSMs"+v, "", 200),
		)
		// A client that sends back what it got changes nothing.
		got := e.call("owner", "GET", one+v, "", 200)
		if again := e.call("owner", "PUT", one+v, got, 200); again != got {
			t.Errorf("PUT of what GET gave:\n%s", cmp.Diff(got, again))
		}
		sub := arm + "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/providers/Microsoft.KeyVault"
		e.call("owner", "DELETE", one+v, "", 200)
		e.call("owner", "DELETE", one+v, "", 204)
		e.call("owner", "GET", sub+"/deletedManagedHSMs"+v, "", 200) // az keyvault list-deleted asks for both
		golden(t, "deletedvault.json",
			e.call("owner", "GET", sub+"/deletedVaults"+v, "", 200),
			e.call("owner", "GET", sub+"/locations/eastus/deletedVaults/prod1"+v, "", 200),
			e.call("owner", "POST", sub+"/checkNameAvailability"+v, `{"name":"prod1","type":"Microsoft.KeyVault/vaults"}`, 200),
			e.call("owner", "POST", sub+"/checkNameAvailability"+v, `{"name":"1","type":"Microsoft.KeyVault/vaults"}`, 200),
			e.call("owner", "POST", sub+"/checkNameAvailability"+v, `{"name":"prod2","type":"Microsoft.KeyVault/vaults"}`, 200),
		)
		e.call("owner", "POST", sub+"/locations/eastus/deletedVaults/prod1/purge"+v, "", 202)
		synctest.Wait()
		e.call("owner", "GET", sub+"/locations/eastus/operationResults/prod1"+v, "", 204)
		e.call("owner", "PUT", one+v, got, 201)
	})
}

func TestRenewAndClockOnTheWire(t *testing.T) {
	bubble(t, func(e *env) {
		e.data("POST", "/certificates/web/create", createBody, 202)
		synctest.Wait()
		first := get[object](t, e.call("owner", "GET", arm+"/keyfleet/v1/vaults/prod1/certificates/web", "", 200))
		op := get[object](t, e.call("owner", "POST", arm+"/keyfleet/v1/vaults/prod1/certificates/web/renew", "", 202))
		if op["status"] != "inProgress" || op["id"] != prod1+"/certificates/web/pending" {
			t.Errorf("the operation is %v", op)
		}
		synctest.Wait()
		second := get[object](t, e.call("owner", "GET", arm+"/keyfleet/v1/vaults/prod1/certificates/web", "", 200))
		if first["version"] == second["version"] || second["failing"] != false || second["nextRenewal"] == nil {
			t.Errorf("before %v, after %v", first, second)
		}
		clock := get[object](t, e.call("owner", "POST", arm+"/keyfleet/v1/dev/clock", `{"advance":"8640h"}`, 200))
		if clock["offset"] != "8640h0m0s" {
			t.Errorf("the clock is %v", clock)
		}
		synctest.Wait()
		third := get[object](t, e.call("owner", "GET", arm+"/keyfleet/v1/vaults/prod1/certificates/web", "", 200))
		if third["version"] == second["version"] {
			t.Error("policy time a year ahead renewed nothing")
		}
		e.call("u", "GET", arm+"/keyfleet/v1/dev/clock", "", 403)
	})
}

func TestContactsAndIssuers(t *testing.T) {
	e := newEnv(t)
	e.data("PUT", "/certificates/contacts", `{"contacts":[{"email":"a@example.org","name":"A"}]}`, 200)
	golden(t, "contacts.json", e.data("GET", "/certificates/contacts", "", 200), e.data("GET", "/certificates/issuers", "", 200), e.data("GET", "/certificates/issuers/keyfleet", "", 200))
	e.data("DELETE", "/certificates/contacts", "", 200)
	e.data("GET", "/certificates/contacts", "", 404)
}

// TestEveryRouteRefusesStrangers: default deny, from the route table itself.
func TestEveryRouteRefusesStrangers(t *testing.T) {
	e := newEnv(t)
	n := 0
	for _, rt := range e.api.Routes() {
		path := strings.NewReplacer("{subscription}", "042998e4-36dc-4b7d-8ce3-a7a2c4877d33", "{group}", "Rg1", "{location}", "eastus",
			"{vault}", "prod1", "{operation}", "add", "{version}", strings.Repeat("a", 32), "{name}", "prod1").Replace(rt.Path)
		url, body := arm+path+"?api-version=2023-07-01", `{}`
		if rt.Surface == azureapi.Vault {
			url = prod1 + path + "?api-version=7.6"
		}
		switch { // bodies that are valid, so that the answer is about access
		case strings.HasSuffix(rt.Path, "/secrets/{name}") && rt.Method == http.MethodPut:
			body = `{"value":"x"}`
		case strings.HasSuffix(rt.Path, "/create"):
			body = createBody
		case strings.HasSuffix(rt.Path, "/contacts") && rt.Method == http.MethodPut:
			body = `{"contacts":[{"email":"a@example.org"}]}`
		case strings.HasSuffix(rt.Path, "/pending") && rt.Method == http.MethodPatch:
			body = `{"cancellation_requested":true}`
		case strings.HasSuffix(rt.Path, "/vaults/{name}"):
			body = `{"location":"eastus","properties":{}}`
		case strings.HasSuffix(rt.Path, "/accesspolicies/{operation}"):
			body = `{"properties":{"accessPolicies":[]}}`
		case strings.HasSuffix(rt.Path, "/dev/clock") && rt.Method == http.MethodPost:
			body = `{"advance":"1h"}`
		case strings.HasSuffix(rt.Path, "/checknameavailability"):
			body = `{"name":"x"}`
		}
		e.call("stranger", rt.Method, url, body, 403)
		e.call("", rt.Method, url, body, 401)
		n++
	}
	if n < 45 {
		t.Errorf("only %d routes", n)
	}
}
