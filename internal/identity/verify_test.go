package identity

import (
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/fault"
)

var b64 = base64.RawURLEncoding

// decoded returns header and claims of a token.
func decoded(t testing.TB, token string) (head, body map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	for i, v := range []*map[string]any{&head, &body} {
		b, err := b64.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	return head, body
}

// TestTokenShapes compares the claims with golden ones; what differs from token
// to token is replaced by its name.
func TestTokenShapes(t *testing.T) {
	w := newWorld(t)
	app, secret := w.app(t, "deployer")
	id, _, err := w.PutIdentity(system(t.Context()), Identity{ID: idPath + "testumaforpools", Location: "westus2"})
	if err != nil {
		t.Fatal(err)
	}
	mi, err := w.TokenFor(system(t.Context()), Selector{ResourceID: id.Spec.ID}, "https://vault.azure.cn")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{app.ClientID: "CLIENT", app.ObjectID: "OBJECT", w.TenantID(): "TENANT", id.Spec.ClientID: "MI-CLIENT", id.Spec.PrincipalID: "MI-OBJECT"}
	at := w.clock.now().Unix()
	common := func(more map[string]any) map[string]any {
		m := map[string]any{"iat": float64(at), "nbf": float64(at), "exp": float64(at + 3600), "idtyp": "app", "tid": "TENANT", "uti": "UTI"}
		for k, v := range more {
			m[k] = v
		}
		return m
	}
	cases := []struct {
		reason string
		token  string
		want   map[string]any
	}{
		{"v1", w.token(t, app, secret, armURL+"/", V1).Value.Reveal(), common(map[string]any{
			"aud": armURL + "/", "iss": loginURL + "/TENANT/", "idp": loginURL + "/TENANT/", "appid": "CLIENT", "appidacr": "1",
			"oid": "OBJECT", "sub": "OBJECT", "ver": "1.0",
		})},
		{"v2", w.token(t, app, secret, armURL, V2).Value.Reveal(), common(map[string]any{
			"aud": armURL, "iss": loginURL + "/TENANT/v2.0", "azp": "CLIENT", "azpacr": "1", "oid": "OBJECT", "sub": "OBJECT", "ver": "2.0",
		})},
		{"managed identity", mi.Value.Reveal(), common(map[string]any{
			"aud": "https://vault.azure.cn", "iss": loginURL + "/TENANT/", "idp": loginURL + "/TENANT/", "appid": "MI-CLIENT", "appidacr": "2",
			"oid": "MI-OBJECT", "sub": "MI-OBJECT", "ver": "1.0", "xms_mirid": idPath + "testumaforpools", "exp": float64(at + 86400),
		})},
	}
	for _, c := range cases {
		head, body := decoded(t, c.token)
		if head["alg"] != "RS256" || head["typ"] != "JWT" || len(head) != 3 {
			t.Errorf("%s: header %v", c.reason, head)
		}
		body["uti"] = "UTI"
		for k, v := range body {
			if s, ok := v.(string); ok {
				for value, name := range names {
					s = strings.ReplaceAll(s, value, name)
				}
				body[k] = s
			}
		}
		if d := cmp.Diff(c.want, body); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.reason, d)
		}
	}
}

// TestReplayVariants is the list of tokens that must not count.
func TestReplayVariants(t *testing.T) {
	w := newWorld(t)
	app, secret := w.app(t, "deployer")
	good := w.token(t, app, secret, armURL, V1).Value.Reveal()
	foreign := serverOn(t, newStore(t), newClock(start)) // another server: other tenant, other keys
	fapp, fsecret := foreign.app(t, "deployer")
	twin := newWorld(t) // another tenant whose key is the same, as after a careless copy
	tapp, tsecret := twin.app(t, "deployer")
	keys, err := w.signingKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kid := keys.ring.Keys[0].ID
	key := keys.parsed[kid]
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signed := func(head, body string, k *rsa.PrivateKey) string {
		s := b64.EncodeToString([]byte(head)) + "." + b64.EncodeToString([]byte(body))
		sum := sha256.Sum256([]byte(s))
		sig, err := rsa.SignPKCS1v15(rand.Reader, k, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return s + "." + b64.EncodeToString(sig)
	}
	parts := strings.Split(good, ".")
	head, err := b64.DecodeString(parts[0])
	if err != nil {
		t.Fatal(err)
	}
	body, err := b64.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	header := func(more string) string { return fmt.Sprintf(`{"alg":"RS256","kid":%q,"typ":"JWT"%s}`, kid, more) }
	claim := func(old, new string) string {
		out := strings.Replace(string(body), old, new, 1)
		if out == string(body) {
			t.Fatalf("claims %s do not contain %s", body, old)
		}
		return signed(string(head), out, key)
	}
	pub, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	hs := func(alg string) string {
		s := b64.EncodeToString(fmt.Appendf(nil, `{"alg":%q,"kid":%q,"typ":"JWT"}`, alg, kid)) + "." + parts[1]
		m := hmac.New(sha256.New, pub)
		m.Write([]byte(s))
		return s + "." + b64.EncodeToString(m.Sum(nil))
	}
	pss := func() string {
		s := parts[0] + "." + parts[1]
		sum := sha256.Sum256([]byte(s))
		sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, sum[:], nil)
		if err != nil {
			t.Fatal(err)
		}
		return s + "." + b64.EncodeToString(sig)
	}
	none := func(alg string) string {
		return b64.EncodeToString(fmt.Appendf(nil, `{"alg":%q,"typ":"JWT"}`, alg)) + "." + parts[1] + "."
	}
	now := w.clock.now().Unix()
	variants := map[string]string{
		"empty":                               "",
		"no dots":                             "token",
		"one dot":                             parts[0] + "." + parts[1],
		"an empty signature":                  parts[0] + "." + parts[1] + ".",
		"four parts":                          good + ".x",
		"five parts, as an encrypted token":   good + "." + parts[1] + "." + parts[2],
		"the token twice":                     good + good,
		"a space after it":                    good + " ",
		"a newline in it":                     parts[0] + "." + parts[1] + "\n." + parts[2],
		"padded base64":                       good + "==",
		"standard base64":                     strings.NewReplacer("-", "+", "_", "/").Replace(good) + "/",
		"longer than the limit":               good + strings.Repeat("A", maxTokenSize),
		"algorithm none":                      none("none"),
		"algorithm None":                      none("None"),
		"algorithm none with the old header":  signed(`{"alg":"none","kid":"`+kid+`","typ":"JWT"}`, string(body), key),
		"HS256 keyed with the public key":     hs("HS256"),
		"RS256 by name, HMAC by content":      hs("RS256"),
		"RS512 by name":                       signed(strings.Replace(string(head), "RS256", "RS512", 1), string(body), key),
		"PSS padding":                         pss(),
		"signed by a stranger under our kid":  signed(string(head), string(body), stranger),
		"a key of the stranger in the header": signed(header(`,"jwk":{"kty":"RSA","n":"`+b64.EncodeToString(stranger.N.Bytes())+`","e":"AQAB"}`), string(body), stranger),
		"jku":                                 signed(header(`,"jku":"https://example.org/keys"`), string(body), key),
		"x5u":                                 signed(header(`,"x5u":"https://example.org/cert"`), string(body), key),
		"x5c":                                 signed(header(`,"x5c":["AA"]`), string(body), key),
		"crit":                                signed(header(`,"crit":["exp"],"exp":1`), string(body), key),
		"b64 false":                           signed(header(`,"b64":false`), string(body), key),
		"zip":                                 signed(header(`,"zip":"DEF"`), string(body), key),
		"a header member twice":               signed(header(`,"alg":"none"`), string(body), key),
		"an unknown kid":                      signed(strings.Replace(string(head), kid, "other", 1), string(body), key),
		"a path as kid":                       signed(strings.Replace(string(head), kid, "../../dev/null", 1), string(body), key),
		"an empty kid":                        signed(strings.Replace(string(head), kid, "", 1), string(body), key),
		"another type":                        signed(strings.Replace(string(head), `"JWT"`, `"at+jwt"`, 1), string(body), key),
		"a header that is no object":          signed(`["RS256"]`, string(body), key),
		"a changed claim":                     parts[0] + "." + b64.EncodeToString([]byte(strings.Replace(string(body), app.ObjectID, fapp.ObjectID, 1))) + "." + parts[2],
		"another audience":                    claim(armURL, vaultURL),
		"an audience that begins like ours":   claim(armURL, armURL+".example.org"),
		"several audiences":                   claim(`"aud":"`+armURL+`"`, `"aud":["`+armURL+`"]`),
		"another issuer":                      claim(loginURL+"/"+w.TenantID()+"/", "https://sts.windows.net/"+w.TenantID()+"/"),
		"the issuer of the other version":     claim(loginURL+"/"+w.TenantID()+"/", loginURL+"/"+w.TenantID()+"/v2.0"),
		"another version":                     claim(`"ver":"1.0"`, `"ver":"3.0"`),
		"another tenant":                      claim(`"tid":"`+w.TenantID(), `"tid":"`+foreign.TenantID()),
		"a principal that does not exist":     claim(`"oid":"`+app.ObjectID+`","sub":"`+app.ObjectID, `"oid":"`+fapp.ObjectID+`","sub":"`+fapp.ObjectID),
		"subject and object differ":           claim(`"sub":"`+app.ObjectID, `"sub":"`+fapp.ObjectID),
		"no principal":                        claim(`"oid":"`+app.ObjectID+`","sub":"`+app.ObjectID, `"oid":"","sub":"`),
		"expired by a second":                 claim(fmt.Sprintf(`"exp":%d`, now+3600), fmt.Sprintf(`"exp":%d`, now)),
		"expired a day ago":                   claim(fmt.Sprintf(`"exp":%d`, now+3600), fmt.Sprintf(`"exp":%d`, now-86400)),
		"never expires":                       claim(fmt.Sprintf(`"exp":%d`, now+3600), `"exp":0`),
		"expires as a string":                 claim(fmt.Sprintf(`"exp":%d`, now+3600), fmt.Sprintf(`"exp":"%d"`, now+3600)),
		"from the future, beyond the skew":    claim(fmt.Sprintf(`"nbf":%d`, now), fmt.Sprintf(`"nbf":%d`, now+61)),
		"from tomorrow":                       claim(fmt.Sprintf(`"nbf":%d`, now), fmt.Sprintf(`"nbf":%d`, now+86400)),
		"a claim twice":                       claim(`"ver":"1.0"`, `"ver":"1.0","aud":"`+armURL+`"`),
		"an unknown claim":                    claim(`"ver":"1.0"`, `"ver":"1.0","roles":["Owner"]`),
		"claims in another casing":            claim(`"oid"`, `"OID"`),
		"a token of a tenant with our key":    twin.token(t, tapp, tsecret, armURL, V1).Value.Reveal(),
		"a token of another server":           foreign.token(t, fapp, fsecret, armURL, V1).Value.Reveal(),
	}
	if _, err := w.Verify(t.Context(), good, []string{armURL}); err != nil {
		t.Fatalf("the good token: %v", err)
	}
	for reason, tok := range variants {
		if p, err := w.Verify(t.Context(), tok, []string{armURL, armURL + "/"}); !errors.Is(err, fault.Unauthenticated) {
			t.Errorf("%s: accepted or failed otherwise: %+v, %v", reason, p, err)
		}
	}
	t.Logf("%d variants refused", len(variants))
	if _, err := w.Verify(t.Context(), claim(fmt.Sprintf(`"nbf":%d`, now), fmt.Sprintf(`"nbf":%d`, now+59)), []string{armURL}); err != nil {
		t.Errorf("from the future within the skew: %v", err)
	}
}

func TestVerifyOverTime(t *testing.T) {
	w := newWorld(t)
	app, secret := w.app(t, "deployer")
	tok := w.token(t, app, secret, vaultURL, V2).Value.Reveal()
	steps := []struct {
		forward   time.Duration
		audiences []string
		code      string
	}{
		{0, []string{vaultURL}, ""},
		{0, []string{"https://vault.azure.cn/"}, ""}, // the alias means the same
		{0, []string{armURL}, "InvalidAuthenticationTokenAudience"},
		{0, nil, "InvalidAuthenticationTokenAudience"},
		{59*time.Minute + 59*time.Second, []string{vaultURL}, ""},
		{time.Second, []string{vaultURL}, "ExpiredAuthenticationToken"},
		{-24 * time.Hour, []string{vaultURL}, "InvalidAuthenticationToken"}, // the clock went back: issued in the future
	}
	for i, s := range steps {
		w.clock.forward(s.forward)
		_, err := w.Verify(t.Context(), tok, s.audiences)
		code := ""
		if err != nil {
			code = fault.From(err).Code
		}
		if code != s.code {
			t.Errorf("step %d: %v, want %q", i, err, s.code)
		}
	}
}

func TestVerifyFailsClosedWithoutTheStore(t *testing.T) {
	w := newWorld(t)
	app, secret := w.app(t, "deployer")
	tok := w.token(t, app, secret, armURL, V1).Value.Reveal()
	if _, err := w.Verify(t.Context(), tok, []string{armURL}); err != nil {
		t.Fatal(err)
	}
	w.clock.forward(principalTTL)
	ctx, cancel := contextCancelled(t)
	defer cancel()
	if _, err := w.Verify(ctx, tok, []string{armURL}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("got %v, want Unavailable", err)
	}
}

func TestTokenCacheIsBounded(t *testing.T) {
	w := newWorld(t)
	now := w.clock.now()
	for i := range 3 * maxTokens {
		w.remember(sha256.Sum256(fmt.Appendf(nil, "%d", i)), verified{expires: now.Add(time.Hour)}, now)
	}
	if n := len(w.tokens); n > maxTokens {
		t.Errorf("%d tokens are remembered, at most %d should be", n, maxTokens)
	}
}

func FuzzVerify(f *testing.F) {
	w := newWorld(f)
	app, secret := w.app(f, "deployer")
	good := w.token(f, app, secret, armURL, V1).Value.Reveal()
	f.Add(good)
	f.Add(w.token(f, app, secret, armURL, V2).Value.Reveal())
	f.Add(good[:len(good)-1])
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) {
		p, err := w.Verify(t.Context(), token, []string{armURL})
		if err == nil && p.ObjectID != app.ObjectID {
			t.Errorf("a token for %+v was made up: %s", p, token)
		}
		if err != nil && !errors.Is(err, fault.Unauthenticated) {
			t.Errorf("%v is not Unauthenticated", err)
		}
	})
}

func FuzzResourceOfScope(f *testing.F) {
	f.Add("https://arm.x/.default openid offline_access profile")
	f.Add("https://batch.x//.default")
	f.Fuzz(func(t *testing.T, scope string) {
		r, err := ResourceOfScope(scope)
		if (err == nil) != (r != "") {
			t.Errorf("%q: resource %q, %v", scope, r, err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	w := newWorld(b)
	app, secret := w.app(b, "deployer")
	tok := w.token(b, app, secret, armURL, V1).Value.Reveal()
	audiences := []string{armURL, armURL + "/"}
	b.Run("known", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := w.Verify(b.Context(), tok, audiences); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("new", func(b *testing.B) {
		for b.Loop() {
			clear(w.tokens)
			if _, err := w.Verify(b.Context(), tok, audiences); err != nil {
				b.Fatal(err)
			}
		}
	})
}
