package rotatecerts

import (
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/test/stack"
)

// bundle is what a vault keeps of a certificate.
type bundle struct {
	key               crypto.Signer
	leaf, root, chain []byte // PEM
	keyPEM            []byte // PKCS#8
	pkcs1             []byte
	pfx               string
}

func newBundle(t *testing.T, kind pki.Kind) bundle {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	ca, err := pki.NewCA("root", now)
	must(err)
	b := bundle{}
	b.key, err = pki.NewKey(kind)
	must(err)
	b.chain, err = ca.IssueServer([]string{"a.example.org"}, b.key.Public(), now, time.Hour)
	must(err)
	certs, err := pki.ParseChain(b.chain)
	must(err)
	b.leaf, b.root = pki.EncodeChain(certs[0].Raw), pki.EncodeChain(certs[1].Raw)
	b.keyPEM, err = pki.EncodeKey(b.key)
	must(err)
	if k, ok := b.key.(*rsa.PrivateKey); ok {
		b.pkcs1 = pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)})
	}
	pfx, err := pki.EncodePFX(b.key, [][]byte{certs[0].Raw, certs[1].Raw})
	must(err)
	b.pfx = base64.StdEncoding.EncodeToString(pfx)
	return b
}

func TestPickTakesWhatTheEntryWants(t *testing.T) {
	b, ec := newBundle(t, pki.RSA2048), newBundle(t, pki.P256)
	text := func(parts ...[]byte) string { return string(slices.Concat(parts...)) }
	coded := base64.StdEncoding.EncodeToString([]byte(text(b.keyPEM, b.chain)))
	for _, tc := range []struct {
		reason, entry, value string
		want                 []byte
	}{
		{"the leaf of a bundle", "apiServerCertificate", text(b.keyPEM, b.chain), b.leaf},
		{"the key of a bundle", "apiServerPrivateKey", text(b.keyPEM, b.chain), b.pkcs1},
		{"a peer's key", "etcdPeerPrivateKeys/1", text(b.chain, b.keyPEM), b.pkcs1},
		{"a key that is as it must be", "caPrivateKey", string(b.pkcs1), b.pkcs1},
		{"the leaf stands last", "etcdPeerCertificates/0", text(b.root, b.leaf, b.keyPEM), b.leaf},
		{"a certificate alone", "clientCertificate", string(b.leaf), b.leaf},
		{"a root alone", "caCertificate", string(b.root), b.root},
		{"in base64, as aks-engine wants it", "apiServerCertificate", coded, b.leaf},
		{"in base64 of several lines", "apiServerPrivateKey", coded[:50] + "\r\n" + coded[50:] + "\n", b.pkcs1},
		{"the certificate of a PKCS#12", "apiServerCertificate", b.pfx, b.leaf},
		{"the key of a PKCS#12", "apiServerPrivateKey", b.pfx, b.pkcs1},
		{"an EC key is for the check to refuse", "apiServerPrivateKey", text(ec.keyPEM), ec.keyPEM},
		{"no key", "apiServerPrivateKey", string(b.chain), nil},
		{"no certificate", "apiServerCertificate", string(b.keyPEM), nil},
		{"a broken key", "apiServerPrivateKey", "-----BEGIN PRIVATE KEY-----\naHVudGVyMg==\n-----END PRIVATE KEY-----\n", nil},
		{"a password", "apiServerPrivateKey", "hunter2!", nil},
		{"base64 of nothing known", "apiServerPrivateKey", "aHVudGVyMg==", nil},
		{"nothing", "apiServerPrivateKey", " ", nil},
	} {
		got, err := pick(tc.entry, tc.value)
		if string(got) != string(tc.want) || (err != nil) != (tc.want == nil) {
			t.Errorf("%s: %s %v, want\n%s", tc.reason, got, err, tc.want)
		}
		if err != nil && (strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "aHVudGVyMg")) {
			t.Errorf("%s: the secret is shown: %v", tc.reason, err)
		}
	}
}

func TestEachSecretIsReadOnce(t *testing.T) {
	b := newBundle(t, pki.RSA2048)
	var asked []string
	get := func(url string) (string, error) {
		asked = append(asked, url)
		return string(b.chain) + string(b.keyPEM), nil
	}
	refs := apimodel.References{
		"apiServerCertificate":  {Host: "v.example", Kind: "certificates", Name: "web"},
		"apiServerPrivateKey":   {Host: "v.example", Kind: "secrets", Name: "web"},
		"etcdPeerPrivateKeys/0": {Vault: "kv1", Kind: "secrets", Name: "peer", Version: "v1"},
	}
	p, err := resolve(refs, "vault.example", get)
	if err != nil || len(p) != 3 || string(p["apiServerCertificate"]) != string(b.leaf) {
		t.Errorf("read %v: %v", p, err)
	}
	if want := "https://v.example/secrets/web https://kv1.vault.example/secrets/peer/v1"; strings.Join(asked, " ") != want {
		t.Errorf("asked for %s, want %s", asked, want)
	}
	if _, err := resolve(refs, "", get); err == nil || !strings.Contains(err.Error(), "in which cloud the vault kv1 is") {
		t.Errorf("in no cloud: %v", err)
	}
}

// TestAVaultThatMisbehaves: a cloud of one server, which is not as it should be.
func TestAVaultThatMisbehaves(t *testing.T) {
	b := newBundle(t, pki.RSA2048)
	secret := func(value string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer token-of-kv" {
				t.Errorf("a request for a secret with %q", r.Header.Get("Authorization"))
			}
			_ = json.NewEncoder(w).Encode(map[string]string{"value": value})
		}
	}
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			fmt.Fprint(w, body)
		}
	}
	const login = `{"access_token":"token-of-kv","expires_in":3600}`
	for _, tc := range []struct {
		reason string
		login  http.HandlerFunc
		vault  http.HandlerFunc
		kind   fault.Kind
		want   string // of the error; empty: all is well
	}{
		{"all is well", answer(200, login), secret(string(b.pkcs1)), 0, ""},
		{"not found", answer(200, login), answer(404, `{"error":{"code":"SecretNotFound","message":"There is none."}}`), fault.NotFound, "SecretNotFound: There is none."},
		{"denied", answer(200, login), answer(403, `{"error":{"code":"Forbidden","message":"Not you."}}`), fault.Denied, "Not you."},
		{"broken", answer(200, login), answer(500, `oh`), fault.Unavailable, "https://kv.example.com/secrets/ca"},
		{"not JSON", answer(200, login), answer(200, `<html>`), fault.Unavailable, "cannot be read"},
		{"no value", answer(200, login), answer(200, `{}`), fault.Invalid, "neither PEM nor base64"},
		{"something else", answer(200, login), secret("hunter2"), fault.Invalid, "cannot be used"},
		{"the login is refused", answer(401, `{"error":"invalid_client","error_description":"Wrong."}`), secret("x"), fault.Denied, "invalid_client"},
		{"a login without a token", answer(200, `{}`), secret("x"), fault.Unavailable, "cannot be read"},
		{"it leads elsewhere", answer(200, login), func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://evil.example.com/secrets/ca", http.StatusFound)
		}, fault.Invalid, "cannot be read"},
	} {
		server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.Host {
			case "login.example.com":
				tc.login(w, r)
			case "kv.example.com":
				tc.vault(w, r)
			case "arm.example.com":
				w.Header().Set("WWW-Authenticate", `Bearer authorization_uri="https://login.example.com/tenant1"`)
				w.WriteHeader(http.StatusUnauthorized)
			default:
				t.Errorf("%s: %s was asked", tc.reason, r.Host)
			}
		}))
		c := &command{Streams: Streams{Env: aCloud(t, server)}, o: options{
			azureEnv: "AzureStackCloud", authMethod: "client_secret", identitySystem: "azure_ad", clientID: "id", clientSecret: "s3cr3t",
		}}
		p, err := c.secrets(t.Context(), apimodel.References{"caPrivateKey": {Vault: "kv", Kind: "secrets", Name: "ca"}})
		server.Close()
		if tc.want == "" {
			if err != nil || string(p["caPrivateKey"]) != string(b.pkcs1) {
				t.Errorf("%s: %v %v", tc.reason, p, err)
			}
			continue
		}
		var e *fault.Error
		if !errors.As(err, &e) || e.Kind != tc.kind || e.Target != "caPrivateKey" || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s with %q", tc.reason, err, tc.kind, tc.want)
		}
		for _, never := range []string{"hunter2", "s3cr3t", "token-of-kv"} {
			if err != nil && strings.Contains(err.Error(), never) {
				t.Errorf("%s: %s is shown: %v", tc.reason, never, err)
			}
		}
	}
}

// aCloud describes a cloud as Azure Stack's users do, all of it at one server.
func aCloud(t *testing.T, server *httptest.Server) func(string) string {
	t.Helper()
	dir := t.TempDir()
	file, ca := filepath.Join(dir, "environment.json"), filepath.Join(dir, "ca.pem")
	text := "\xef\xbb\xbf" + `{"name":"AzureStackCloud","resourceManagerEndpoint":"https://arm.example.com/","activeDirectoryEndpoint":"https://login.example.com/","keyVaultDNSSuffix":"example.com"}`
	for path, content := range map[string][]byte{file: []byte(text), ca: pki.EncodeChain(server.Certificate().Raw)} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return environment(map[string]string{"AZURE_ENVIRONMENT_FILEPATH": file, "KEYFLEET_CA": ca, "KEYFLEET_ADDRESS": server.Listener.Addr().String()})
}

func TestClouds(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "environment.json")
	if err := os.WriteFile(broken, []byte(`{"resourceManagerEndpoint":"http://arm"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ cloud, file, suffix, want string }{
		{"AzureCloud", "", "vault.azure.net", ""},
		{"AzurePublicCloud", "", "vault.azure.net", ""},
		{"AzureChinaCloud", "", "vault.azure.cn", ""},
		{"AzureUSGovernmentCloud", "", "vault.usgovcloudapi.net", ""},
		{"AzureStackCloud", "", "", "set AZURE_ENVIRONMENT_FILEPATH"},
		{"AzureStackCloud", "/nowhere", "", "no such file"},
		{"AzureStackCloud", broken, "", "does not begin with https://"},
	} {
		cfg, err := endpoints(tc.cloud, environment(map[string]string{"AZURE_ENVIRONMENT_FILEPATH": tc.file}))
		if cfg.Endpoints.VaultSuffix != tc.suffix || (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s (%s): %s %v, want %s %s", tc.cloud, tc.file, cfg.Endpoints.VaultSuffix, err, tc.suffix, tc.want)
		}
	}
	c := &command{Streams: Streams{Env: environment(nil)}, o: options{azureEnv: "AzureCloud", authMethod: "cli", identitySystem: "azure_ad"}}
	if _, err := c.secrets(t.Context(), apimodel.References{"caPrivateKey": {Host: "v.example"}}); err == nil || !strings.Contains(err.Error(), "--auth-method client_secret") {
		t.Errorf("logged in with az: %v", err)
	}
	if p, err := c.secrets(t.Context(), nil); err != nil || len(p) != 0 {
		t.Errorf("no references need no cloud: %v %v", p, err)
	}
}

// TestSecretsOfARealServer reads a certificate that Keyfleet made, and a secret
// as aks-engine wants it, with the credential of a service principal.
func TestSecretsOfARealServer(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds and starts a server")
	}
	t.Cleanup(stack.Clean)
	s := stack.Start(t, stack.Config{})
	ctx := t.Context()
	admin, err := client.ReadAdmin(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client.PutGroup(ctx, s.Client.Subscription(), "g", "westus2"); err != nil {
		t.Fatal(err)
	}
	me, err := s.Client.ObjectID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Client.Call(ctx, client.Request{
		Method: http.MethodPut, Version: client.VersionVaults,
		URL: s.Client.ARM(client.ResourceID(s.Client.Subscription(), "g", "Microsoft.KeyVault", "vaults", "kv1")),
		Body: map[string]any{"location": "westus2", "properties": map[string]any{
			"tenantId": admin.Tenant, "sku": map[string]any{"family": "A", "name": "standard"},
			"accessPolicies": []any{map[string]any{"tenantId": admin.Tenant, "objectId": me, "permissions": map[string]any{"secrets": []string{"all"}, "certificates": []string{"all"}}}},
		}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Client.Call(ctx, client.Request{
		Method: http.MethodPost, Version: client.VersionVaultData, URL: s.Client.Vault("kv1", "/certificates/web/create"),
		Body: map[string]any{"policy": map[string]any{
			"issuer": map[string]any{"name": "Keyfleet"}, "key_props": map[string]any{"kty": "RSA", "key_size": 2048, "exportable": true},
			"secret_props": map[string]any{"contentType": "application/x-pkcs12"}, "x509_props": map[string]any{"subject": "CN=web.example.org", "validity_months": 12},
		}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client.AwaitCertificate(ctx, "kv1", "web"); err != nil {
		t.Fatal(err)
	}
	b := newBundle(t, pki.RSA2048)
	if _, err := s.Client.SetSecret(ctx, "kv1", "ca-key", keyvault.SetSecret{Value: new(base64.StdEncoding.EncodeToString(b.pkcs1))}); err != nil {
		t.Fatal(err)
	}
	_, refs, err := apimodel.ParseProfile(fmt.Appendf(nil, `{
		"apiServerCertificate": %q, "apiServerPrivateKey": %q,
		"caPrivateKey": "/subscriptions/s/resourceGroups/g/providers/Microsoft.KeyVault/vaults/kv1/secrets/ca-key"}`,
		s.Client.Vault("kv1", "/certificates/web"), s.Client.Vault("kv1", "/secrets/web")))
	if err != nil {
		t.Fatal(err)
	}
	c := &command{Streams: Streams{Env: environment(map[string]string{"KEYFLEET_FROM": s.Dir})}, o: options{
		azureEnv: "AzurePublicCloud", authMethod: "client_secret", identitySystem: "azure_ad", clientID: admin.ClientID, clientSecret: admin.ClientSecret.Reveal(),
	}}
	p, err := c.secrets(ctx, refs)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseChain(p["apiServerCertificate"])
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.ParseKey(p["apiServerPrivateKey"])
	if err != nil || !pki.Matches(chain[0], key) || chain[0].Subject.CommonName != "web.example.org" || !strings.Contains(string(p["apiServerPrivateKey"]), "BEGIN RSA PRIVATE KEY") {
		t.Errorf("the key is not that of %s: %v", chain[0].Subject, err)
	}
	if string(p["caPrivateKey"]) != string(b.pkcs1) {
		t.Error("the key of the CA is another")
	}
	c.o.clientSecret = "wrong"
	if _, err := c.secrets(ctx, refs); !errors.Is(err, fault.Denied) && !errors.Is(err, fault.Invalid) {
		t.Errorf("with a wrong secret: %v", err)
	}
}
