package keyvaultext

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
)

const testURL = "https://testkvwestus2.vault.azure.net/secrets/authsecreat"

// clientOf is a vault client that reaches the double under every name.
func clientOf(t *testing.T, d *keyvaulttest.Server, clientID string) (*vaultClient, extension.ObservedCertificate) {
	t.Helper()
	t.Setenv("SSL_CERT_FILE", "")
	raw := fmt.Sprintf(`{"secretsManagementSettings":{"observedCertificates":[%q]},"authenticationSettings":{"msiEndpoint":%q,"msiClientId":%q}}`, testURL, d.Identity(), clientID)
	s, err := extension.ParseKeyVaultSettings([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	timing := DefaultTiming().Scaled(0.001)
	timing.Request = 300 * time.Millisecond
	v := newVaultClient(s, timing)
	v.http = d.Client()
	v.http.CheckRedirect = noRedirect
	return v, s.Certificates[0]
}

func TestVaultAndIdentityMisbehave(t *testing.T) {
	type hook = func(w http.ResponseWriter, r *http.Request) bool
	answer := func(status int, code, inner string) hook {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Retry-After", "7")
			keyvaulttest.Error(w, status, code, inner, "the vault's\r\nown words")
			return true
		}
	}
	// It ends without a word: an empty answer could still reach a client that is about to hang up.
	hang := func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); panic(http.ErrAbortHandler) }
	cut := func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write([]byte(`{"value":`))
		return true
	}
	cases := []struct {
		name            string
		vault, identity hook
		resource        string
		clientID        string
		kind            fault.Kind
		says            []string
	}{
		{name: "no access", vault: answer(403, "Forbidden", "AccessDenied"), kind: fault.Denied, says: []string{"HTTP 403 (AccessDenied): the vault's own words", keyvaulttest.ClientID, "set-policy"}},
		{name: "disabled version", vault: answer(403, "Forbidden", "SecretDisabled"), kind: fault.Denied, says: []string{"enable this version"}},
		{name: "throttled", vault: answer(429, "Throttled", ""), kind: fault.TooMany, says: []string{"HTTP 429", "tries again"}},
		{name: "broken server", vault: answer(500, "", ""), kind: fault.Unavailable, says: []string{"VaultError", "HTTP 500"}},
		{name: "no such secret", kind: fault.NotFound, says: []string{"SecretNotFound", "create certificate authsecreat in vault testkvwestus2"}},
		{name: "hangs", vault: hang, kind: fault.Unavailable, says: []string{"no answer in time"}},
		{name: "cuts the answer off", vault: cut, kind: fault.Unavailable, says: []string{"unexpected EOF"}},
		{name: "redirects elsewhere", vault: func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "https://evil.example/", http.StatusFound)
			return true
		}, kind: fault.Invalid, says: []string{"HTTP 302"}},
		{name: "another secret", vault: func(w http.ResponseWriter, _ *http.Request) bool {
			fmt.Fprint(w, `{"id":"https://x/secrets/other/0123456789abcdef0123456789abcdef","value":"x"}`)
			return true
		}, kind: fault.Invalid, says: []string{"another secret"}},
		{name: "version that is a path", vault: func(w http.ResponseWriter, _ *http.Request) bool {
			fmt.Fprint(w, `{"id":"https://x/secrets/authsecreat/../../etc/passwd","value":"x"}`)
			return true
		}, kind: fault.Invalid, says: []string{"names no version"}},
		{name: "challenge for another domain", resource: "https://management.azure.com", kind: fault.Denied, says: []string{"not its domain", "no token was sent"}},
		{name: "challenge for the whole top-level suffix of another", resource: "https://t.azure.net", kind: fault.Denied, says: []string{"not its domain"}},
		{name: "unknown identity", clientID: "00000000-0000-0000-0000-000000000001", kind: fault.Denied, says: []string{"Identity not found", "put the identity on the pool"}},
		{name: "identity endpoint hangs", identity: hang, kind: fault.Unavailable, says: []string{"IdentityEndpointUnreachable", "no answer in time"}},
		{name: "identity endpoint speaks nonsense", identity: func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "<html>"); return true }, kind: fault.Unavailable, says: []string{"without a usable access_token"}},
		{name: "identity endpoint is going away", identity: answer(410, "", ""), kind: fault.Unavailable, says: []string{"HTTP 410"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			d := keyvaulttest.Start(t)
			d.OnVault(c.vault)
			d.OnIdentity(c.identity)
			d.ChallengeResource(c.resource)
			v, observed := clientOf(t, d, firstNonEmpty(c.clientID, keyvaulttest.ClientID))
			_, err := v.get(t.Context(), observed)
			f := fault.From(err)
			if err == nil || f.Kind != c.kind {
				t.Fatalf("got %v, want kind %v", err, c.kind)
			}
			if f.Fix == "" || strings.ContainsAny(f.Message, "\r\n") {
				t.Errorf("no fix, or more than one line: %q %q", f.Message, f.Fix)
			}
			for _, part := range c.says {
				if !strings.Contains(f.Error(), part) {
					t.Errorf("%q does not say %q", f.Error(), part)
				}
			}
			if regexp.MustCompile(`token\.[0-9a-f]`).MatchString(f.Error()) {
				t.Errorf("the error shows a token: %v", f)
			}
		})
	}
}

func TestThrottlingIsPassedOn(t *testing.T) {
	d := keyvaulttest.Start(t)
	d.OnVault(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Retry-After", "42")
		keyvaulttest.Error(w, 429, "Throttled", "", "slow down")
		return true
	})
	v, c := clientOf(t, d, keyvaulttest.ClientID)
	if _, err := v.get(t.Context(), c); fault.From(err).RetryAfter != 42*time.Second {
		t.Errorf("Retry-After was lost: %v", err)
	}
}

func TestTokenIsAskedForOnceAndRenewedWhenRefused(t *testing.T) {
	d := keyvaulttest.Start(t)
	d.Renew("testkvwestus2.vault.azure.net", "authsecreat", keyvaulttest.PEM)
	v, c := clientOf(t, d, keyvaulttest.ClientID)
	tokens := func() int { return strings.Count(strings.Join(d.Requests(), "\n"), "identity ") }
	for range 3 {
		if _, err := v.get(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if tokens() != 1 {
		t.Errorf("3 fetches asked for %d tokens, want 1", tokens())
	}
	if got := len(d.Requests()); got != 5 {
		t.Errorf("3 fetches made %d requests, want the challenge, the token and 3: %v", got, d.Requests())
	}
	v.tokens.mu.Lock()
	for k, tok := range v.tokens.tokens { // the vault's signing keys have changed: it refuses what we have
		v.tokens.tokens[k] = token{value: newSecret("revoked"), refresh: tok.refresh}
	}
	v.tokens.mu.Unlock()
	if _, err := v.get(t.Context(), c); err != nil || tokens() != 2 {
		t.Errorf("a refused token was not replaced: %v, %d tokens", err, tokens())
	}
}

func TestTemporaryIdentityFaultsAreRetried(t *testing.T) {
	d := keyvaulttest.Start(t)
	d.Renew("testkvwestus2.vault.azure.net", "authsecreat", keyvaulttest.PEM)
	statuses := []int{404, 429, 503}
	d.OnIdentity(func(w http.ResponseWriter, _ *http.Request) bool {
		if len(statuses) == 0 {
			return false
		}
		w.WriteHeader(statuses[0])
		statuses = statuses[1:]
		return true
	})
	v, c := clientOf(t, d, keyvaulttest.ClientID)
	if _, err := v.get(context.Background(), c); err != nil {
		t.Error(err)
	}
}

func TestChallenge(t *testing.T) {
	cases := []struct {
		header, host, want string
		why                string
	}{
		{`Bearer authorization="https://login/t", resource="https://vault.azure.net"`, "kv.vault.azure.net", "https://vault.azure.net", "the documented form"},
		{`Bearer authorization="https://l/t", scope="https://vault.azure.net/.default"`, "kv.vault.azure.net", "https://vault.azure.net", "the form with a scope"},
		{`bearer resource="https://vault.x:8443"`, "kv.vault.x:8443", "https://vault.x:8443", "another port is part of the name"},
		{`Bearer resource="https://vault.x"`, "kv.vault.x:8443", "", "without the port it is another host"},
		{`Bearer resource="https://ault.x"`, "kv.vault.x", "", "a suffix of letters is no parent domain"},
		{`Bearer resource="http://vault.x"`, "kv.vault.x", "", "not over TLS"},
		{`Basic realm="x"`, "kv.vault.x", "", "another scheme"},
		{``, "kv.vault.x", "", "no challenge"},
	}
	for _, c := range cases {
		got, err := challengeResource(c.header, c.host)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v, want %q", c.why, got, err, c.want)
		}
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	s := newSecret("very private")
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "s", s, "in", struct{ S secret }{s})
	for _, text := range []string{fmt.Sprint(s), fmt.Sprintf("%s %v %q %x %#v %d", s, s, s, s, s, s), fmt.Sprintf("%+v %#v", fetched{value: s}, struct{ got fetched }{fetched{value: s}}), log.String()} {
		if strings.Contains(text, "private") || strings.Contains(text, "7072697661") {
			t.Errorf("a secret was printed: %s", text)
		}
	}
}

func FuzzVaultAnswers(f *testing.F) {
	f.Add([]byte(`{"value":"x","contentType":"application/x-pkcs12","id":"https://testkvwestus2.vault.azure.net/secrets/authsecreat/8f5f3f491afd48cb99286ba2aacd39af","attributes":{"enabled":true}}`),
		`Bearer authorization="https://login.windows.net/t", resource="https://vault.azure.net"`)
	f.Add([]byte(`{"access_token":"ey","expires_on":"1605000000","expires_in":3599,"resource":"https://vault.azure.net","token_type":"Bearer"}`), `Bearer resource="x"`)
	f.Fuzz(func(t *testing.T, body []byte, header string) {
		c := extension.ObservedCertificate{Host: "testkvwestus2.vault.azure.net", Secret: "authsecreat"}
		if got, err := parseSecret(body, c); err == nil && len(got.version) != 32 {
			t.Errorf("version %q", got.version)
		}
		if resource, err := challengeResource(header, c.Host); err == nil && !strings.HasPrefix(resource, "https://") {
			t.Errorf("resource %q", resource)
		}
		if tok, err := parseToken(body, time.Unix(1e9, 0)); err == nil && tok.value.reveal() == "" {
			t.Error("an empty token")
		}
	})
}
