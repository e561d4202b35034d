package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	armURL   = "https://arm.keyfleet.internal:8443"
	vaultURL = "https://vault.keyfleet.internal:8443"
	loginURL = "https://login.keyfleet.internal:8443"
	subID    = "042998e4-36dc-4b7d-8ce3-a7a2c4877d33"
	idPath   = "/subscriptions/" + subID + "/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/"
)

// clock is a settable time.
type clock struct{ at atomic.Int64 }

func (c *clock) now() time.Time                  { return time.Unix(0, c.at.Load()) }
func (c *clock) forward(d time.Duration)         { c.at.Add(int64(d)) }
func newClock(t time.Time) *clock                { c := &clock{}; c.at.Store(t.UnixNano()); return c }
func system(ctx context.Context) context.Context { return access.AsSystem(ctx, "test") }

type world struct {
	*Service
	store *store.Store
	gate  *access.Gate
	clock *clock
	file  string // audit file
}

var start = time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)

// testKey is the signing key of most worlds, for making one takes long.
var testKey = sync.OnceValues(newSigningKey)

func newStore(t testing.TB) *store.Store {
	t.Helper()
	backend := store.NewMemory()
	t.Cleanup(func() { backend.Close() })
	s, err := store.New(t.Context(), backend)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newWorld(t testing.TB) *world {
	t.Helper()
	key, err := testKey()
	if err != nil {
		t.Fatal(err)
	}
	key.SignFrom = start
	s := newStore(t)
	err = s.Update(t.Context(), func(tx *store.Tx) error {
		return Keyrings.Insert(tx, &store.Object[Keyring, struct{}]{Meta: store.Meta{ID: keyringID}, Spec: Keyring{Keys: []SigningKey{key}}})
	})
	if err != nil {
		t.Fatal(err)
	}
	return serverOn(t, s, newClock(start))
}

// serverOn is one more server on the same store.
func serverOn(t testing.TB, s *store.Store, c *clock) *world {
	t.Helper()
	w := &world{store: s, clock: c, file: filepath.Join(t.TempDir(), "audit.jsonl")}
	log, err := audit.Open(audit.Config{Path: w.file, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Close)
	w.gate = access.NewGate(access.Config{Store: s, Recorder: log, Principal: RequirePrincipal})
	w.Service, err = New(t.Context(), Config{
		Store: s, Gate: w.gate, Login: loginURL, Now: c.now,
		Audiences: map[string]string{armURL: armURL, vaultURL: vaultURL, "https://vault.azure.cn": vaultURL},
		Place: func(_ *store.Tx, sub, _ string) error {
			if !strings.EqualFold(sub, subID) {
				return fault.New(fault.NotFound, "SubscriptionNotFound", "no")
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) app(t testing.TB, name string) (Application, Secret) {
	t.Helper()
	o, secret, err := w.CreateApplication(system(t.Context()), NewApplication{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return o.Spec, secret
}

func (w *world) token(t testing.TB, a Application, s Secret, resource string, v Version) Token {
	t.Helper()
	tok, err := w.ClientCredentials(t.Context(), Credentials{Tenant: w.TenantID(), ClientID: a.ClientID, Secret: s.Reveal(), Resource: resource, Version: v})
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestClientCredentials(t *testing.T) {
	w := newWorld(t)
	app, secret := w.app(t, "deployer")
	good := Credentials{Tenant: w.TenantID(), ClientID: app.ClientID, Secret: secret.Reveal(), Resource: armURL, Version: V2}
	with := func(change func(*Credentials)) Credentials { c := good; change(&c); return c }
	cases := []struct {
		reason string
		c      Credentials
		aadsts string // empty: a token
	}{
		{"the right secret", good, ""},
		{"a client id in capitals", with(func(c *Credentials) { c.ClientID = strings.ToUpper(c.ClientID) }), ""},
		{"tenant common", with(func(c *Credentials) { c.Tenant = "common" }), ""},
		{"tenant organizations", with(func(c *Credentials) { c.Tenant = "Organizations" }), ""},
		{"tenant adfs, which az uses so as not to ask a public host", with(func(c *Credentials) { c.Tenant = "adfs" }), ""},
		{"a resource with a trailing slash", with(func(c *Credentials) { c.Resource += "/" }), ""},
		{"a resource by an alias", with(func(c *Credentials) { c.Resource = "https://VAULT.azure.cn" }), ""},
		{"another tenant", with(func(c *Credentials) { c.Tenant = newGUID() }), "AADSTS90002"},
		{"an unknown application", with(func(c *Credentials) { c.ClientID = newGUID() }), "AADSTS700016"},
		{"a wrong secret", with(func(c *Credentials) { c.Secret = newSecret().Reveal() }), "AADSTS7000215"},
		{"the secret's id instead of the secret", with(func(c *Credentials) { c.Secret = app.Secrets[0].ID }), "AADSTS7000215"},
		{"no secret", with(func(c *Credentials) { c.Secret = "" }), "AADSTS7000215"},
		{"the secret and more", with(func(c *Credentials) { c.Secret += "x" }), "AADSTS7000215"},
		{"a resource of somebody else", with(func(c *Credentials) { c.Resource = "https://graph.microsoft.com" }), "AADSTS500011"},
		{"no resource", with(func(c *Credentials) { c.Resource = "" }), "AADSTS500011"},
		{"a resource that only begins like ours", with(func(c *Credentials) { c.Resource = armURL + ".example.org" }), "AADSTS500011"},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			tok, err := w.ClientCredentials(t.Context(), c.c)
			if c.aadsts != "" {
				if e := fault.From(err); e == nil || e.Inner != c.aadsts {
					t.Fatalf("got %v, want %s", err, c.aadsts)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			p, err := w.Verify(t.Context(), tok.Value.Reveal(), []string{c.c.Resource})
			if err != nil || p.ObjectID != app.ObjectID || p.ClientID != app.ClientID || p.Kind != access.Application || p.Tenant != w.TenantID() {
				t.Errorf("principal %+v, %v", p, err)
			}
		})
	}
}

func TestSecretsOfAnApplication(t *testing.T) {
	w := newWorld(t)
	ctx := system(t.Context())
	app, first := w.app(t, "deployer")
	try := func(s Secret) string {
		_, err := w.ClientCredentials(ctx, Credentials{Tenant: "common", ClientID: app.ClientID, Secret: s.Reveal(), Resource: armURL, Version: V1})
		if err != nil {
			return fault.From(err).Inner
		}
		return "token"
	}
	stored, second, err := w.AddSecret(ctx, app.ClientID, w.clock.now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if a, b := try(first), try(second); a != "token" || b != "token" {
		t.Errorf("both secrets must work: %s, %s", a, b)
	}
	w.clock.forward(time.Hour)
	if a, b := try(first), try(second); a != "token" || b != "AADSTS7000222" {
		t.Errorf("an expired secret: %s, %s", a, b)
	}
	for range 2 { // removing is repeatable
		if err := w.RemoveSecret(ctx, app.ClientID, stored.ID); err != nil {
			t.Fatal(err)
		}
	}
	if b := try(second); b != "AADSTS7000215" {
		t.Errorf("a removed secret: %s", b)
	}
	for i := 1; i < maxSecrets; i++ {
		if _, _, err := w.AddSecret(ctx, app.ClientID, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := w.AddSecret(ctx, app.ClientID, time.Time{}); !errors.Is(err, fault.Conflict) {
		t.Errorf("secret %d: %v", maxSecrets+1, err)
	}
}

func TestSecretsDoNotShow(t *testing.T) {
	w := newWorld(t)
	app, secret := w.app(t, "deployer")
	tok := w.token(t, app, secret, armURL, V1)
	var logged bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&logged, nil))
	ring, err := Keyrings.Get(w.store.View(t.Context()), keyringID)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("x", "secret", secret, "token", tok, "admin", Admin{Secret: secret}, "key", ring.Spec.Keys[0])
	fmt.Fprintf(&logged, "%v %+v %#v %s %q %x %d %v %+v", secret, tok, tok, secret, secret, secret, secret, ring.Spec.Keys[0], ring.Spec)
	records, err := os.ReadFile(w.file)
	if err != nil {
		t.Fatal(err)
	}
	logged.Write(records)
	for what, canary := range map[string]string{
		"client secret": secret.Reveal(), "hex of it": fmt.Sprintf("%x", secret.Reveal()), "token": tok.Value.Reveal(),
		"private key": fmt.Sprintf("%v", ring.Spec.Keys[0].Private[:16]),
	} {
		if strings.Contains(logged.String(), canary) {
			t.Errorf("%s shows in %s", what, logged.String())
		}
	}
	if o, err := Applications.Get(w.store.View(t.Context()), app.ClientID); err != nil || strings.Contains(fmt.Sprintf("%s", o.Spec.Secrets), secret.Reveal()) {
		t.Errorf("the store holds the client secret, %v", err)
	}
	if _, err := ParseSecret(secret.Reveal()); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "kf_", "password", "kf_password", secret.Reveal() + "A", secret.Reveal()[:20]} {
		if _, err := ParseSecret(bad); err == nil {
			t.Errorf("%q passes as a generated secret", bad)
		}
	}
}

func TestTokenRequestsAreOnRecord(t *testing.T) {
	w := newWorld(t)
	app, secret := w.app(t, "deployer")
	w.token(t, app, secret, armURL, V1)
	_, err := w.ClientCredentials(t.Context(), Credentials{Tenant: "common", ClientID: app.ClientID, Secret: "guess", Resource: armURL})
	if err == nil {
		t.Fatal("a guess got a token")
	}
	b, err := os.ReadFile(w.file)
	if err != nil {
		t.Fatal(err)
	}
	for _, outcome := range []string{"allowed", "denied"} {
		if n := strings.Count(string(b), `"outcome":"`+outcome+`"`); n != 1 {
			t.Errorf("%d records of outcome %s, want 1:\n%s", n, outcome, b)
		}
	}
}

func TestDeletingAnApplication(t *testing.T) {
	w := newWorld(t)
	ctx := system(t.Context())
	app, secret := w.app(t, "deployer")
	tok := w.token(t, app, secret, armURL, V1)
	other := serverOn(t, w.store, w.clock) // a second server that has seen the token
	for _, s := range []*world{w, other} {
		if _, err := s.Verify(ctx, tok.Value.Reveal(), []string{armURL}); err != nil {
			t.Fatal(err)
		}
	}
	if existed, err := w.DeleteApplication(ctx, app.ClientID); err != nil || !existed {
		t.Fatal(existed, err)
	}
	if _, err := w.Verify(ctx, tok.Value.Reveal(), []string{armURL}); !errors.Is(err, fault.Unauthenticated) {
		t.Errorf("the token still counts where the application was deleted: %v", err)
	}
	w.clock.forward(5 * time.Second)
	if _, err := other.Verify(ctx, tok.Value.Reveal(), []string{armURL}); !errors.Is(err, fault.Unauthenticated) {
		t.Errorf("the token still counts on another server after 5 seconds: %v", err)
	}
	if _, _, err := w.CreateApplication(ctx, NewApplication{Name: "again", ClientID: app.ClientID}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Verify(ctx, tok.Value.Reveal(), []string{armURL}); !errors.Is(err, fault.Unauthenticated) {
		t.Errorf("the old token counts for a new application with the same client id: %v", err)
	}
	if existed, err := w.DeleteApplication(ctx, newGUID()); err != nil || existed {
		t.Errorf("deleting what is not there: %t, %v", existed, err)
	}
}

// TestBootstrap dies at each place of the first start; the end state is the same.
func TestBootstrap(t *testing.T) {
	boom := errors.New("died here")
	cases := []struct {
		reason     string
		keep       func(kept *Admin, a Admin) (Admin, error)
		subscribe  error
		firstFails bool
	}{
		{"undisturbed", func(kept *Admin, a Admin) (Admin, error) { *kept = a; return a, nil }, nil, false},
		{"before the file is written", func(_ *Admin, a Admin) (Admin, error) { return a, boom }, nil, true},
		{"after the file is written", func(kept *Admin, a Admin) (Admin, error) { *kept = a; return a, boom }, nil, true},
		{"before the commit", func(kept *Admin, a Admin) (Admin, error) { *kept = a; return a, nil }, boom, true},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			w := newWorld(t)
			var kept Admin
			var subs []string
			_, err := w.Bootstrap(t.Context(), Bootstrap{
				Keep:      func(a Admin) (Admin, error) { return c.keep(&kept, a) },
				Subscribe: func(_ *store.Tx, _, sub string) error { subs = append(subs, sub); return c.subscribe },
			})
			if (err != nil) != c.firstFails {
				t.Fatalf("first start: %v", err)
			}
			keep := func(a Admin) (Admin, error) {
				if kept.ClientID == "" {
					kept = a
				}
				return kept, nil
			}
			for range 2 {
				done, err := w.Bootstrap(t.Context(), Bootstrap{Keep: keep, Subscribe: func(*store.Tx, string, string) error { return nil }})
				if err != nil || done.ClientID != kept.ClientID || done.SubscriptionID != kept.SubscriptionID {
					t.Fatalf("next start: %+v, %v; kept %+v", done, err, kept)
				}
			}
			tok := w.token(t, Application{ClientID: kept.ClientID}, kept.Secret, armURL, V2)
			p, err := w.Verify(t.Context(), tok.Value.Reveal(), []string{armURL})
			if err != nil {
				t.Fatal(err)
			}
			if err := w.gate.CanAs(t.Context(), p, access.Op{Action: "Keyfleet/applications/write", Resource: "/"}); err != nil {
				t.Errorf("the administrator is not Owner: %v", err)
			}
			if apps, _ := Applications.List(w.store.View(t.Context()), ""); len(apps) != 1 {
				t.Errorf("%d applications, want 1", len(apps))
			}
			_, err = w.DeleteApplication(system(t.Context()), kept.ClientID)
			if e := fault.From(err); e == nil || e.Code != "LastOwner" {
				t.Errorf("deleting the last Owner: %v", err)
			}
		})
	}
}

func TestBootstrapOfTwoServers(t *testing.T) {
	w := newWorld(t)
	other := serverOn(t, w.store, w.clock)
	var mine, theirs Admin
	noSub := func(*store.Tx, string, string) error { return nil }
	done, err := w.Bootstrap(t.Context(), Bootstrap{Subscribe: noSub, Keep: func(a Admin) (Admin, error) {
		mine = a // the other server does all of its first start just now
		if _, err := other.Bootstrap(t.Context(), Bootstrap{Subscribe: noSub, Keep: func(a Admin) (Admin, error) { theirs = a; return a, nil }}); err != nil {
			t.Fatal(err)
		}
		return a, nil
	}})
	if err != nil || done.ClientID != theirs.ClientID || done.ClientID == mine.ClientID {
		t.Errorf("result %+v, %v: must name the administrator that was committed, %s", done, err, theirs.ClientID)
	}
}

func TestLeftoverAdministratorIsRefused(t *testing.T) {
	w := newWorld(t)
	_, err := w.Bootstrap(t.Context(), Bootstrap{
		Keep:      func(a Admin) (Admin, error) { a.TenantID = newGUID(); return a, nil },
		Subscribe: func(*store.Tx, string, string) error { t.Error("committed"); return nil },
	})
	if e := fault.From(err); e == nil || e.Code != "LeftoverAdministrator" {
		t.Errorf("got %v", err)
	}
}

func TestResourceOfScope(t *testing.T) {
	cases := []struct{ reason, scope, want string }{
		{"az", "https://arm.x/.default", "https://arm.x"},
		{"Go adds OpenID's scopes", "https://arm.x/.default openid offline_access profile", "https://arm.x"},
		{"a resource with a trailing slash", "https://batch.x//.default", "https://batch.x/"},
		{"only one is taken off", "https://x/.default/.default", "https://x/.default"},
		{"no .default", "https://arm.x/user_impersonation", ""},
		{"two resources", "https://arm.x/.default https://vault.x/.default", ""},
		{"only OpenID's", "openid profile", ""},
		{"only .default", "/.default", ""},
		{"nothing", "", ""},
	}
	for _, c := range cases {
		got, err := ResourceOfScope(c.scope)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: got %q, %v, want %q", c.reason, got, err, c.want)
		}
	}
}
