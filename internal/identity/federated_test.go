package identity

import (
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/issuer"
	"keyfleet.dev/keyfleet/internal/issuer/issuertest"
)

const (
	shopAccount = "system:serviceaccount:shop:web"
	shopID      = idPath + "shop"
	shopClient  = "33333333-shop"
)

// federation is a world with an issuer and an identity that trusts a subject of it.
type federation struct {
	*world
	issuer *issuertest.Issuer
}

func newFederation(t *testing.T) *federation {
	t.Helper()
	w := newWorld(t)
	f := &federation{w, issuertest.New(t, issuertest.RSA(t, "k1"))}
	w.cfg.Issuers = issuer.New(issuer.Config{Roots: f.issuer.Roots(), Now: w.clock.now})
	if _, _, err := w.PutIdentity(system(t.Context()), Identity{ID: shopID, Location: "westus2", ClientID: shopClient}); err != nil {
		t.Fatal(err)
	}
	f.trust(t, "web", Federated{Subject: shopAccount})
	return f
}

// trust adds a federated credential of the issuer.
func (f *federation) trust(t *testing.T, name string, want Federated) {
	t.Helper()
	want.ID, want.Issuer = shopID+"/federatedIdentityCredentials/"+name, f.issuer.URL
	if want.Audiences == nil {
		want.Audiences = []string{DefaultAudience}
	}
	if _, _, err := f.PutFederated(system(t.Context()), want); err != nil {
		t.Fatal(err)
	}
}

// token makes a token of the issuer as a cluster does; change may alter its claims.
func (f *federation) token(t *testing.T, change func(claims map[string]any)) string {
	t.Helper()
	now := f.clock.now()
	claims := map[string]any{
		"iss": f.issuer.URL, "sub": shopAccount, "aud": []string{DefaultAudience}, "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{"namespace": "shop"},
	}
	if change != nil {
		change(claims)
	}
	text, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return issuertest.Sign(t, f.issuer.Keys[0], string(text))
}

func (f *federation) exchange(t *testing.T, clientID, assertion string) (Token, error) {
	t.Helper()
	return f.ClientCredentials(t.Context(), Credentials{Tenant: f.TenantID(), ClientID: clientID, Assertion: assertion, Resource: vaultURL, Version: V2})
}

func TestFederation(t *testing.T) {
	set := func(claim string, v any) func(map[string]any) {
		return func(c map[string]any) { c[claim] = v }
	}
	cases := []struct {
		reason string
		client string // empty: the identity's
		change func(map[string]any)
		break_ func(*testing.T, *federation)
		aadsts string // empty: a token comes
		says   []string
	}{
		{reason: "the subject that is trusted"},
		{reason: "the client id in another casing", client: strings.ToUpper(shopClient)},
		{reason: "an audience as a text", change: set("aud", DefaultAudience)},
		{reason: "one of several audiences", change: set("aud", []string{"https://kubernetes.default.svc", DefaultAudience})},
		{reason: "without nbf", change: func(c map[string]any) { delete(c, "nbf") }},
		{
			reason: "another service account", change: set("sub", "system:serviceaccount:shop:db"), aadsts: "AADSTS700213",
			says: []string{"the subject differs", "expected is '" + shopAccount + "'", "Assertion Subject: 'system:serviceaccount:shop:db'", DefaultAudience},
		},
		{reason: "the subject in another casing", change: set("sub", "system:serviceaccount:Shop:web"), aadsts: "AADSTS700213"},
		{
			reason: "another audience", change: set("aud", []string{"https://kubernetes.default.svc"}), aadsts: "AADSTS700212",
			says: []string{"the audience differs", "expected is '" + DefaultAudience + "'", "Assertion Audience: 'https://kubernetes.default.svc'"},
		},
		{
			reason: "another issuer", change: set("iss", "https://other.example"), aadsts: "AADSTS700211",
			says: []string{"the issuer differs", "Assertion Issuer: 'https://other.example'", shopAccount},
		},
		{reason: "an issuer with one more slash", change: func(c map[string]any) { c["iss"] = c["iss"].(string) + "/" }, aadsts: "AADSTS700211"},
		{reason: "it has ended", change: set("exp", start.Add(-time.Second).Unix()), aadsts: "AADSTS700024", says: []string{"2026-11-21T07:59:59Z"}},
		{reason: "it has not begun", change: set("nbf", start.Add(time.Hour).Unix()), aadsts: "AADSTS700024"},
		{reason: "without exp", change: func(c map[string]any) { delete(c, "exp") }, aadsts: "AADSTS50027", says: []string{"'exp'"}},
		{reason: "without sub", change: func(c map[string]any) { delete(c, "sub") }, aadsts: "AADSTS50027", says: []string{"'sub'"}},
		{
			reason: "signed by somebody else", aadsts: "AADSTS700027", says: []string{"does not fit the issuer's key 'k1'"},
			break_: func(t *testing.T, f *federation) { f.issuer.Keys[0] = issuertest.RSA(t, "k1") },
		},
		{
			reason: "the issuer cannot be asked", aadsts: "AADSTS90061", says: []string{"Request to External OIDC endpoint failed", "503"},
			break_: func(_ *testing.T, f *federation) { f.issuer.Status = http.StatusServiceUnavailable },
		},
		{reason: "no such client", client: "44444444-nobody", aadsts: "AADSTS700016"},
		{
			reason: "an identity that trusts nobody", client: "55555555-lonely", aadsts: "AADSTS70025", says: []string{"no configured federated identity credentials", "federated-credential create"},
			break_: func(t *testing.T, f *federation) {
				if _, _, err := f.PutIdentity(system(t.Context()), Identity{ID: idPath + "lonely", Location: "westus2", ClientID: "55555555-lonely"}); err != nil {
					t.Fatal(err)
				}
			},
		},
		{
			reason: "the credential was deleted", aadsts: "AADSTS70025",
			break_: func(t *testing.T, f *federation) {
				if existed, err := f.DeleteFederated(system(t.Context()), shopID+"/federatedIdentityCredentials/WEB"); err != nil || !existed {
					t.Fatal(existed, err)
				}
			},
		},
		{
			reason: "the identity was deleted", aadsts: "AADSTS700016",
			break_: func(t *testing.T, f *federation) {
				if _, err := f.DeleteIdentity(system(t.Context()), shopID); err != nil {
					t.Fatal(err)
				}
			},
		},
	}
	for _, tc := range cases {
		t.Run(tc.reason, func(t *testing.T) {
			f := newFederation(t)
			assertion := f.token(t, tc.change)
			if tc.break_ != nil {
				key := f.issuer.Keys[0]
				tc.break_(t, f)
				if tc.aadsts == "AADSTS700027" {
					assertion = issuertest.Sign(t, key, payloadOf(t, assertion))
				}
			}
			client := tc.client
			if client == "" {
				client = shopClient
			}
			tok, err := f.exchange(t, client, assertion)
			f.onRecord(t, err == nil)
			if tc.aadsts != "" {
				e := fault.From(err)
				if e == nil || e.Inner != tc.aadsts || e.Fix == "" {
					t.Fatalf("got %v, want %s with a way to mend it", err, tc.aadsts)
				}
				for _, want := range tc.says {
					if !strings.Contains(e.Message+" "+e.Fix, want) {
						t.Errorf("%q does not say %q", e.Message+" "+e.Fix, want)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			p, err := f.Verify(t.Context(), tok.Value.Reveal(), []string{vaultURL})
			if err != nil || p.Kind != access.ManagedIdentity || p.ClientID != shopClient {
				t.Errorf("the token is of %+v, %v", p, err)
			}
		})
	}
}

// payloadOf returns what a JWS says.
func payloadOf(t *testing.T, jws string) string {
	t.Helper()
	a, err := readAssertion(jws)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(a.claims)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// onRecord checks that the audit file has the exchange, with the subject that came if it succeeded.
func (f *federation) onRecord(t *testing.T, ok bool) {
	t.Helper()
	text, err := os.ReadFile(f.file)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	last := lines[len(lines)-1]
	if !strings.Contains(last, IdentityType+"/token") || ok != strings.Contains(last, " as "+shopAccount+" of "+f.issuer.URL+" by web") || strings.Contains(last, "eyJ") {
		t.Errorf("the record of the exchange (success %t): %s", ok, last)
	}
}

// TestAskedOnlyIfTrusted: an issuer that no credential of the identity names is never asked.
func TestAskedOnlyIfTrusted(t *testing.T) {
	f := newFederation(t)
	stranger := issuertest.New(t, f.issuer.Keys[0])
	f.cfg.Issuers = issuer.New(issuer.Config{Roots: stranger.Roots()})
	if _, err := f.exchange(t, shopClient, f.token(t, func(c map[string]any) { c["iss"] = stranger.URL })); err == nil {
		t.Error("accepted")
	}
	if n := stranger.Requests.Load(); n != 0 {
		t.Errorf("a stranger's issuer was asked %d times", n)
	}
}

// TestKeysOfTheIssuerRotate: tokens of a new key are accepted at once, as after a
// rotation of a cluster's service account keys.
func TestKeysOfTheIssuerRotate(t *testing.T) {
	f := newFederation(t)
	if _, err := f.exchange(t, shopClient, f.token(t, nil)); err != nil {
		t.Fatal(err)
	}
	f.clock.forward(time.Minute)
	f.issuer.Keys = append([]jose.JSONWebKey{issuertest.EC(t, "k2")}, f.issuer.Keys...)
	if _, err := f.exchange(t, shopClient, f.token(t, nil)); err != nil {
		t.Error(err)
	}
}

func TestPutFederated(t *testing.T) {
	good := Federated{ID: shopID + "/federatedIdentityCredentials/more", Issuer: "https://issuer.example/cluster", Subject: "s", Audiences: []string{DefaultAudience}}
	cases := []struct {
		reason string
		change func(*Federated)
		code   string
		target string
	}{
		{"good", func(*Federated) {}, "", ""},
		{"a pattern", func(f *Federated) {
			f.Subject, f.Expression = "", "claims['sub'] matches 'system:serviceaccount:team-*:web'"
		}, "", ""},
		{"no issuer", func(f *Federated) { f.Issuer = "" }, "InvalidFederatedIdentityCredential", "properties.issuer"},
		{"an issuer without TLS", func(f *Federated) { f.Issuer = "http://issuer.example" }, "InvalidFederatedIdentityCredential", "properties.issuer"},
		{"an issuer with a query", func(f *Federated) { f.Issuer += "?a=b" }, "InvalidFederatedIdentityCredential", "properties.issuer"},
		{"no audience", func(f *Federated) { f.Audiences = nil }, "InvalidFederatedIdentityCredential", "properties.audiences"},
		{"an empty audience", func(f *Federated) { f.Audiences = []string{""} }, "InvalidFederatedIdentityCredential", "properties.audiences"},
		{"neither subject nor expression", func(f *Federated) { f.Subject = "" }, "InvalidFederatedIdentityCredential", "properties.subject"},
		{"subject and expression", func(f *Federated) { f.Expression = "claims['sub'] eq 's'" }, "InvalidFederatedIdentityCredential", "properties.subject"},
		{"an expression that everybody fulfils", func(f *Federated) { f.Subject, f.Expression = "", "claims['sub'] matches '*'" }, "InvalidClaimsMatchingExpression", "properties.claimsMatchingExpression.value"},
		{"a name that is too short", func(f *Federated) { f.ID = shopID + "/federatedIdentityCredentials/a" }, "InvalidResourceName", "name"},
		{"an identity that is not there", func(f *Federated) { f.ID = idPath + "none/federatedIdentityCredentials/more" }, "ResourceNotFound", ""},
		{"another type's id", func(f *Federated) { f.ID = shopID + "/other/more" }, "LinkedInvalidPropertyId", ""},
	}
	f := newFederation(t)
	for _, tc := range cases {
		want := good
		tc.change(&want)
		_, _, err := f.PutFederated(system(t.Context()), want)
		e := fault.From(err)
		if tc.code == "" && err != nil || tc.code != "" && (e == nil || e.Code != tc.code || e.Target != tc.target) {
			t.Errorf("%s: %v, want %q at %q", tc.reason, err, tc.code, tc.target)
		}
	}
	same := Federated{ID: shopID + "/federatedIdentityCredentials/twin", Issuer: f.issuer.URL, Subject: shopAccount, Audiences: []string{"x"}}
	if _, _, err := f.PutFederated(system(t.Context()), same); fault.From(err) == nil || fault.From(err).Code != "FederatedIdentityCredentialExists" || !strings.Contains(err.Error(), "'web'") {
		t.Errorf("the same issuer and subject twice: %v", err)
	}
	if _, _, err := f.PutFederated(f.as(t, access.Reader, "/subscriptions/"+subID), good); fault.KindOf(err) != fault.Denied {
		t.Errorf("a reader: %v", err)
	}
	all, err := f.ListFederated(system(t.Context()), shopID)
	if err != nil || len(all) != 2 {
		t.Errorf("%d credentials, %v", len(all), err)
	}
}

func TestExpression(t *testing.T) {
	claims := map[string]any{"sub": "system:serviceaccount:team-a:web", "n": 1.0, "ref": "main"}
	cases := []struct {
		text    string
		valid   bool
		matches bool
	}{
		{"claims['sub'] eq 'system:serviceaccount:team-a:web'", true, true},
		{"claims['sub'] eq 'system:serviceaccount:team-*:web'", true, false},
		{"claims['sub'] matches 'system:serviceaccount:team-*:web'", true, true},
		{"claims['sub'] matches 'system:serviceaccount:team-?:web'", true, true},
		{"claims['sub'] matches 'system:serviceaccount:team-?:w'", true, false},
		{"claims['sub'] matches '*:web' and claims['ref'] eq 'main'", true, true},
		{"claims['sub'] matches '*:web'  and  claims['ref'] eq 'dev'", true, false},
		{"claims['sub'] matches '*:web' and claims['absent'] matches '*'", true, false},
		{"claims['sub'] matches '*:web' and claims['n'] eq '1'", true, false},
		{"claims['sub'] matches '**'", false, false},
		{"claims['ref'] eq 'main'", false, false},
		{"claims['sub'] eq ''", false, false},
		{"claims['sub'] ne 'a'", false, false},
		{"claims['sub'] eq 'a' or claims['sub'] eq 'b'", false, false},
		{"claims['sub'] eq 'a'and claims['ref'] eq 'b'", false, false},
		{"claims['sub'] eq 'a' and", false, false},
		{"claims['sub] eq 'a'", false, false},
		{"sub eq 'a'", false, false},
		{"", false, false},
		{strings.Repeat("claims['sub'] eq 'a' and ", 20) + "claims['sub'] eq 'a'", false, false},
	}
	for _, tc := range cases {
		e, err := parseExpression(tc.text)
		if (err == nil) != tc.valid || err == nil && e.matches(claims) != tc.matches {
			t.Errorf("%s: %v, matches %t", tc.text, err, e.matches(claims))
		}
		if err != nil && (fault.KindOf(err) != fault.Invalid || fault.From(err).Fix == "") {
			t.Errorf("%s: %v is no refusal with a way to mend it", tc.text, err)
		}
	}
}

// TestGlob compares with the definition: a pattern matches if some split of the
// text at its first star does.
func TestGlob(t *testing.T) {
	var naive func(p, s string) bool
	naive = func(p, s string) bool {
		switch {
		case p == "":
			return s == ""
		case p[0] == '*':
			return naive(p[1:], s) || s != "" && naive(p, s[1:])
		}
		return s != "" && (p[0] == '?' || p[0] == s[0]) && naive(p[1:], s[1:])
	}
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.StringMatching(`[ab*?]{0,8}`).Draw(t, "pattern")
		s := rapid.StringMatching(`[ab]{0,10}`).Draw(t, "text")
		if got, want := glob(p, s), naive(p, s); got != want {
			t.Fatalf("glob(%q, %q) is %t, want %t", p, s, got, want)
		}
	})
}

// FuzzAssertion reads any text: never a token, never a crash.
func FuzzAssertion(f *testing.F) {
	f.Add("a.b.c")
	f.Add("e30.eyJpc3MiOiJhIiwic3ViIjoiYiIsImF1ZCI6ImMiLCJleHAiOjF9.e30")
	f.Add(`e30.eyJhdWQiOlsxLG51bGxdfQ.e30`)
	f.Fuzz(func(t *testing.T, jws string) {
		a, err := readAssertion(jws)
		if err == nil && (a.issuer == "" || a.subject == "" || len(a.audiences) == 0 || a.expires.IsZero()) {
			t.Errorf("%q is incomplete: %+v", jws, a)
		}
		if err != nil && fault.From(err).Inner != "AADSTS50027" {
			t.Errorf("%v", err)
		}
	})
}

// FuzzExpression parses any text; what is accepted lets nobody in who has no subject.
func FuzzExpression(f *testing.F) {
	f.Add("claims['sub'] matches 'system:serviceaccount:team-*:web' and claims['ref'] eq 'main'")
	f.Add("claims['sub'] eq ''")
	f.Fuzz(func(t *testing.T, text string) {
		e, err := parseExpression(text)
		if err == nil && e.matches(map[string]any{}) {
			t.Errorf("%q lets everybody in", text)
		}
	})
}
