package vault

import (
	"context"
	"crypto"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	tenant = "72f988bf-86f1-41af-91ab-2d7cd011db47"
	subID  = "042998e4-36dc-4b7d-8ce3-a7a2c4877d33"
)

// journal is a Recorder that keeps records in memory.
type journal struct {
	mu      sync.Mutex
	records []access.Record
}

func (j *journal) Append(_ context.Context, r access.Record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.records = append(j.records, r)
	return nil
}

func (j *journal) InTx(tx *store.Tx, r access.Record) error {
	tx.OnCommit(func(int64) { _ = j.Append(tx.Context(), r) })
	return nil
}

func (j *journal) count(action, outcome string) (n int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range j.records {
		if r.Action == action && r.Outcome == outcome {
			n++
		}
	}
	return n
}

// env is a capability on a store in memory, with an owner and a vault "prod1"
// in which the owner may do everything.
type env struct {
	t       testing.TB
	backend store.Backend
	store   *store.Store
	gate    *access.Gate
	journal *journal
	vaults  *Vaults
	clock   *Clock
	ca      *pki.CA
	owner   context.Context
	issuer  atomic.Pointer[Issuer] // nil: the CA
}

func as(oid string) context.Context {
	return access.With(context.Background(), access.Call{
		Principal: access.Principal{Kind: access.Application, Tenant: tenant, ObjectID: oid, ClientID: "app-" + oid}, RequestID: "r1",
	})
}

func newEnv(t testing.TB) *env {
	t.Helper()
	e := &env{t: t, backend: store.NewMemory(), journal: &journal{}, owner: as("owner")}
	t.Cleanup(func() { e.backend.Close() })
	e.open()
	e.assign("owner", access.Owner.ID, "/")
	all := []string{"all"}
	e.putVault("prod1", VaultSpec{Policies: &[]access.Policy{{Tenant: tenant, ObjectID: "owner", Secrets: all, Certificates: all}}})
	return e
}

// open builds the capability on the backend, as a server that starts does.
func (e *env) open() {
	e.t.Helper()
	s, err := store.New(context.Background(), e.backend)
	e.ok(err)
	e.store = s
	e.gate = access.NewGate(access.Config{Store: s, Recorder: e.journal})
	e.clock = NewClock(ClockConfig{Store: s, Gate: e.gate, Dev: true})
	if e.ca == nil {
		e.ca, err = pki.NewCA("Keyfleet test CA", time.Now())
		e.ok(err)
	}
	issue := FromCA(e.ca)
	e.vaults = New(Config{
		Store: s, Gate: e.gate, Clock: e.clock, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Tenant: tenant,
		Issuer: func(ctx context.Context, t pki.Template, pub crypto.PublicKey) ([][]byte, error) {
			if other := e.issuer.Load(); other != nil {
				return (*other)(ctx, t, pub)
			}
			return issue(ctx, t, pub)
		},
	})
}

// refuse lets the issuer fail with err; nil: it works.
func (e *env) refuse(err error) {
	if err == nil {
		e.issuer.Store(nil)
		return
	}
	fails := Issuer(func(context.Context, pki.Template, crypto.PublicKey) ([][]byte, error) { return nil, err })
	e.issuer.Store(&fails)
}

// run starts the controllers; the returned function ends them and waits.
func (e *env) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for _, c := range e.vaults.Controllers(nil) {
		all.Go(func() { _ = c.Run(ctx, e.store) })
	}
	return func() {
		cancel()
		all.Wait()
	}
}

func (e *env) ok(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// refused checks kind and code of an error.
func (e *env) refused(reason string, err error, kind fault.Kind, code string) {
	e.t.Helper()
	if f := fault.From(err); err == nil || f.Kind != kind || (code != "" && f.Code != code && f.Inner != code) {
		e.t.Errorf("%s: got %v, want %s %s", reason, err, kind, code)
	}
}

func (e *env) assign(oid, role, scope string) {
	e.t.Helper()
	e.ok(e.store.Update(context.Background(), func(tx *store.Tx) error {
		o := &store.Object[access.Assignment, struct{}]{Spec: access.Assignment{Name: "a1", Scope: scope, Principal: oid, RoleID: role}}
		o.ID = oid + "/a1"
		return access.Assignments.Insert(tx, o)
	}))
}

func vaultID(name string) arm.ID {
	id, err := arm.ParseID("/subscriptions/" + subID + "/resourceGroups/Rg1/providers/Microsoft.KeyVault/vaults/" + name)
	if err != nil {
		panic(err)
	}
	return id
}

func ptr[T any](v T) *T { return &v }

// putVault creates or changes a vault as the owner.
func (e *env) putVault(name string, spec VaultSpec) Vault {
	e.t.Helper()
	if spec.Location == nil {
		spec.Location = ptr("eastus")
	}
	vt, _, err := e.vaults.PutVault(e.owner, vaultID(name), spec)
	e.ok(err)
	return vt
}

// testPolicy is a P-256 certificate in PEM that renews itself at 80 % of a month.
func testPolicy() *Policy {
	p := DefaultPolicy()
	p.KeyType, p.KeySize, p.Curve, p.ContentType = EC, 0, "P-256", PEM
	p.Subject, p.DNSNames, p.Issuer, p.ValidityMonths = "CN=web.example.org", []string{"web.example.org"}, BuiltInIssuer, 1
	p.Actions = []Action{{Type: AutoRenew, Trigger: pki.Trigger{LifetimePercentage: 80}}}
	return &p
}

// create asks for a certificate and waits until it is there.
func (e *env) create(name string, p *Policy, tags map[string]string) CertificateVersion {
	e.t.Helper()
	_, err := e.vaults.CreateCertificate(e.owner, "prod1", name, p, Change{Tags: tags})
	e.ok(err)
	synctest.Wait()
	c, err := e.vaults.Certificate(e.owner, "prod1", name, "")
	e.ok(err)
	return c
}

func (e *env) versions(name string) []CertificateVersion {
	e.t.Helper()
	var out []CertificateVersion
	for p := (Page{}); ; {
		list, next, err := e.vaults.CertificateVersions(e.owner, "prod1", name, p)
		e.ok(err)
		out = append(out, list...)
		if next == "" {
			return out
		}
		p.After = next
	}
}

func TestCertificateAndItsSecretAppearTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		start := time.Now()
		pending, err := e.vaults.CreateCertificate(e.owner, "prod1", "Web", testPolicy(), Change{Tags: map[string]string{"team": "a"}})
		e.ok(err)
		if pending.Operation.Status != InProgress || pending.Version != "" {
			t.Errorf("the answer to create is %q with version %q; want an operation in progress without one", pending.Operation.Status, pending.Version)
		}
		synctest.Wait()
		if d := time.Since(start); d != 0 {
			t.Errorf("issuing waited %s", d)
		}
		done, err := e.vaults.Pending(e.owner, "prod1", "web", pending.Operation.RequestID)
		e.ok(err)
		cert, err := e.vaults.Certificate(e.owner, "prod1", "WEB", "")
		e.ok(err)
		secret, err := e.vaults.Secret(e.owner, "prod1", "web", cert.Version, "")
		e.ok(err)
		if done.Operation.Status != Completed || done.Operation.Version != cert.Version {
			t.Errorf("the operation is %+v; the version is %s", done.Operation, cert.Version)
		}
		if cert.Name != "Web" || secret.Name != "Web" || !secret.Managed || secret.ContentType != PEM || secret.Tags["team"] != "a" {
			t.Errorf("certificate %q, secret %q managed=%v %s %v", cert.Name, secret.Name, secret.Managed, secret.ContentType, secret.Tags)
		}
		key, err := pki.ParseKey([]byte(secret.Value.Reveal()))
		e.ok(err)
		chain, err := pki.ParseChain([]byte(secret.Value.Reveal()))
		e.ok(err)
		if !pki.Matches(chain[0], key) || len(chain) != 2 || string(chain[0].Raw) != string(cert.Chain[0]) {
			t.Errorf("the secret's %d certificates do not fit its key and the certificate", len(chain))
		}
		if got, want := cert.Attributes.NotBefore, start.UTC().Add(-pki.Backdate); !got.Equal(want) {
			t.Errorf("NotBefore is %s, want %s", got, want)
		}
		if got, want := cert.Attributes.Expires, start.UTC().AddDate(0, 1, 0); !got.Equal(want) {
			t.Errorf("NotAfter is %s, want %s", got, want)
		}
		_, err = e.vaults.Pending(e.owner, "prod1", "web", "another")
		e.refused("another request's id", err, fault.NotFound, "PendingCertificateNotFound")
	})
}

// TestRenewalOverMonths lets two months pass: each version is followed by the
// next at 80 % of its life, with its tags, and by no other.
func TestRenewalOverMonths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		e.create("web", testPolicy(), map[string]string{"team": "a"})
		time.Sleep(60 * 24 * time.Hour)
		synctest.Wait()
		list := e.versions("web")
		if len(list) != 3 {
			t.Fatalf("there are %d versions after 60 days of certificates that are renewed after 25; want 3", len(list))
		}
		seen := map[string]bool{}
		for i, c := range list {
			if c.Tags["team"] != "a" || seen[c.Version] || seen[string(c.Thumbprint)] {
				t.Errorf("version %d: tags %v, version or certificate seen before: %v", i, c.Tags, seen[c.Version])
			}
			seen[c.Version], seen[string(c.Thumbprint)] = true, true
			if i == 0 {
				continue
			}
			due := pki.RenewAt(list[i-1].Attributes.NotBefore, list[i-1].Attributes.Expires, pki.Trigger{LifetimePercentage: 80})
			if late := c.Attributes.Created.Sub(due); late < 0 || late > time.Second {
				t.Errorf("version %d came %s after it was due", i, late)
			}
		}
		s, err := e.vaults.Secret(e.owner, "prod1", "web", "", "")
		e.ok(err)
		if newest := list[len(list)-1]; s.Version != newest.Version || s.Previous != list[len(list)-2].Version {
			t.Errorf("the newest secret is %s after %s", s.Version, s.Previous)
		}
	})
}

func TestAdvanceRenewsAtOnceAndCountsInPolicyTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		first := e.create("web", testPolicy(), nil)
		real := time.Now().UTC()
		policyNow, offset, err := e.clock.Advance(e.owner, 28*24*time.Hour)
		e.ok(err)
		synctest.Wait()
		second, err := e.vaults.Certificate(e.owner, "prod1", "web", "")
		e.ok(err)
		if second.Version == first.Version {
			t.Fatal("there is no new version")
		}
		if !time.Now().UTC().Equal(real) || offset != 28*24*time.Hour || !policyNow.Equal(real.Add(offset)) {
			t.Errorf("policy time %s, offset %s, real %s", policyNow, offset, real)
		}
		if got := second.Attributes.NotBefore; !got.Equal(real.Add(-pki.Backdate)) {
			t.Errorf("NotBefore is %s: real peers would not accept it at %s", got, real)
		}
		if got, want := second.Attributes.Expires, policyNow.AddDate(0, 1, 0); !got.Equal(want) {
			t.Errorf("NotAfter is %s, want a month of policy time: %s", got, want)
		}
		r, err := e.vaults.Renewal(e.owner, "prod1", "web")
		e.ok(err)
		if !r.Next.After(policyNow.AddDate(0, 0, 20)) {
			t.Errorf("the next renewal is at %s, policy time is %s", r.Next, policyNow)
		}
		// A long way ahead, one step at a time: no storm of renewals.
		for range 24 {
			_, _, err := e.clock.Advance(e.owner, 31*24*time.Hour)
			e.ok(err)
			synctest.Wait()
		}
		if n := len(e.versions("web")); n != 26 {
			t.Errorf("there are %d versions after 25 steps beyond the renewal point; want 26", n)
		}
	})
}

func TestAdvanceNeedsADevelopmentServerAndAnOwner(t *testing.T) {
	e := newEnv(t)
	_, _, err := e.clock.Advance(as("stranger"), time.Hour)
	e.refused("a stranger", err, fault.Denied, "AuthorizationFailed")
	_, _, err = e.clock.Advance(e.owner, -time.Hour)
	e.refused("backwards", err, fault.Invalid, "")
	e.clock.cfg.Dev = false
	_, _, err = e.clock.Advance(e.owner, time.Hour)
	e.refused("a server without --dev", err, fault.Denied, "DevelopmentOnly")
}

// TestFailedRenewalIsAState: the issuer is away when a renewal is due. The
// certificate says so and when it is tried again; when the issuer is back, one
// version follows.
func TestFailedRenewalIsAState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		e.create("web", testPolicy(), nil)
		e.refuse(fault.New(fault.Unavailable, "IssuerFailed", "The issuer does not answer."))
		_, _, err := e.clock.Advance(e.owner, 28*24*time.Hour)
		e.ok(err)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		r, err := e.vaults.Renewal(e.owner, "prod1", "web")
		e.ok(err)
		if !r.Failing || !r.Stalled || r.Reason != "IssuerFailed" || r.Message != "The issuer does not answer." || !r.NextAttempt.After(time.Now()) {
			t.Errorf("the state is %+v; want stalled, with the issuer's reason and a next attempt", r)
		}
		if n := len(e.versions("web")); n != 1 {
			t.Errorf("there are %d versions", n)
		}
		e.refuse(nil)
		time.Sleep(time.Until(r.NextAttempt) + time.Second)
		synctest.Wait()
		r, err = e.vaults.Renewal(e.owner, "prod1", "web")
		e.ok(err)
		if r.Failing || len(e.versions("web")) != 2 {
			t.Errorf("after the issuer is back: %+v, %d versions", r, len(e.versions("web")))
		}
	})
}

func TestRequestThatCannotSucceedFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		e.refuse(fault.New(fault.Invalid, "NameNotAllowed", "The issuer does not sign this name."))
		c := e.create("web", testPolicy(), nil)
		if op := c.Operation; op.Status != Failed || op.Code != "NameNotAllowed" || op.Ended.IsZero() {
			t.Errorf("the operation is %+v", op)
		}
		_, err := e.vaults.Secret(e.owner, "prod1", "web", "", "")
		e.refused("no secret without a certificate", err, fault.NotFound, "SecretNotFound")
		list, _, err := e.vaults.ListCertificates(e.owner, "prod1", false, Page{})
		e.ok(err)
		if len(list) != 0 {
			t.Error("a certificate without a version is listed")
		}
		if list, _, err = e.vaults.ListCertificates(e.owner, "prod1", true, Page{}); err != nil || len(list) != 1 {
			t.Errorf("with includePending: %d, %v", len(list), err)
		}
		e.refuse(nil)
		soon := testPolicy()
		soon.Actions[0].Trigger.LifetimePercentage = 2 // of a month: 15 hours
		if c = e.create("web", soon, nil); c.Operation.Status != Completed {
			t.Errorf("the next request is %+v", c.Operation)
		}
		// A failed request for one more version does not stop the renewals.
		e.refuse(fault.New(fault.Invalid, "NameNotAllowed", "Not this name."))
		if c = e.create("web", soon, nil); c.Operation.Status != Failed {
			t.Errorf("the refused request is %+v", c.Operation)
		}
		e.refuse(nil)
		time.Sleep(16 * time.Hour)
		synctest.Wait()
		if n := len(e.versions("web")); n != 2 {
			t.Errorf("there are %d versions, want the first and its renewal", n)
		}
	})
}

func TestDeletedCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		v, c := e.vaults, e.create("web", testPolicy(), nil)
		_, err := v.SetSecret(e.owner, "prod1", "web", NewSecret("x"), Change{})
		e.refused("setting a certificate's secret", err, fault.Denied, "ForbiddenByPolicy")
		_, err = v.UpdateSecret(e.owner, "prod1", "web", "", Change{Enabled: ptr(false)})
		e.refused("changing a certificate's secret", err, fault.Denied, "ForbiddenByPolicy")
		_, err = v.DeleteSecret(e.owner, "prod1", "web")
		e.refused("deleting a certificate's secret", err, fault.Denied, "ForbiddenByPolicy")
		_, err = v.UpdateCertificate(e.owner, "prod1", "web", "", Change{Enabled: ptr(false)}, nil)
		e.ok(err)
		_, err = v.Secret(e.owner, "prod1", "web", c.Version, "")
		e.refused("the secret of a disabled certificate", err, fault.Denied, "SecretDisabled")
		if list, err := v.Certificates(e.owner); err != nil || len(list) != 1 || list[0].Version != c.Version || list[0].Next.IsZero() {
			t.Errorf("the list for metrics: %+v, %v", list, err)
		}

		_, err = v.DeleteCertificate(e.owner, "prod1", "web")
		e.ok(err)
		_, err = v.Secret(e.owner, "prod1", "web", c.Version, "")
		e.refused("the secret of a deleted certificate", err, fault.NotFound, "SecretNotFound")
		_, err = v.SetSecret(e.owner, "prod1", "web", NewSecret("x"), Change{})
		e.refused("a secret of its name", err, fault.Conflict, "ObjectIsDeletedButRecoverable")
		_, err = v.CreateCertificate(e.owner, "prod1", "web", testPolicy(), Change{})
		e.refused("a certificate of its name", err, fault.Conflict, "ObjectIsDeletedButRecoverable")
		_, err = v.RecoverSecret(e.owner, "prod1", "web")
		e.refused("recovering the secret alone", err, fault.Denied, "ForbiddenByPolicy")
		e.refused("purging the secret alone", v.PurgeSecret(e.owner, "prod1", "web"), fault.Denied, "ForbiddenByPolicy")
		if list, err := v.Certificates(e.owner); err != nil || len(list) != 0 {
			t.Errorf("the list for metrics: %+v, %v", list, err)
		}
		e.ok(v.PurgeCertificate(e.owner, "prod1", "web"))
		e.gone("prod1/web")
		if c := e.create("web", testPolicy(), nil); c.Operation.Status != Completed {
			t.Errorf("the name after a purge: %+v", c.Operation)
		}
	})
}

// TestRetentionEndsInRealTime: what is deleted goes by itself after the
// retention of its vault, and not because policy time was moved.
func TestRetentionEndsInRealTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		e.putVault("short", VaultSpec{RetentionDays: ptr(7), Policies: &[]access.Policy{{Tenant: tenant, ObjectID: "owner", Secrets: []string{"all"}}}})
		for _, vault := range []string{"short", "prod1"} {
			_, err := e.vaults.SetSecret(e.owner, vault, "s", NewSecret("x"), Change{})
			e.ok(err)
			_, err = e.vaults.DeleteSecret(e.owner, vault, "s")
			e.ok(err)
		}
		e.create("web", testPolicy(), nil)
		_, _, err := e.clock.Advance(e.owner, 20*24*time.Hour)
		e.ok(err)
		time.Sleep(7*24*time.Hour - time.Minute)
		synctest.Wait()
		if list, _, err := e.vaults.DeletedSecrets(e.owner, "short", Page{}); err != nil || len(list) != 1 {
			t.Errorf("a minute before the end: %d, %v", len(list), err)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		e.gone("short/")
		if list, _, err := e.vaults.DeletedSecrets(e.owner, "prod1", Page{}); err != nil || len(list) != 1 {
			t.Errorf("with 90 days of retention: %d, %v", len(list), err)
		}
		if n := e.journal.count("secrets/purge", "allowed"); n != 1 {
			t.Errorf("%d purges are on record", n)
		}
		_, err = e.vaults.DeleteVault(e.owner, vaultID("short"))
		e.ok(err)
		time.Sleep(8 * 24 * time.Hour)
		synctest.Wait()
		e.putVault("short", VaultSpec{})
	})
}

func TestPendingOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t) // no controllers: the operation stays in progress
		_, err := e.vaults.CreateCertificate(e.owner, "prod1", "web", testPolicy(), Change{})
		e.ok(err)
		_, err = e.vaults.CreateCertificate(e.owner, "prod1", "web", testPolicy(), Change{})
		e.refused("a second create", err, fault.Conflict, "Forbidden")
		c, err := e.vaults.CancelPending(e.owner, "prod1", "web")
		e.ok(err)
		if c.Operation.Status != Cancelled || !c.Operation.Cancel {
			t.Errorf("after cancelling: %+v", c.Operation)
		}
		_, err = e.vaults.CancelPending(e.owner, "prod1", "web")
		e.refused("cancelling what is not in progress", err, fault.Invalid, "BadParameter")
		_, err = e.vaults.DeletePending(e.owner, "prod1", "web")
		e.ok(err)
		_, err = e.vaults.Pending(e.owner, "prod1", "web", "")
		e.refused("a forgotten operation", err, fault.NotFound, "PendingCertificateNotFound")
		defer e.run()()
		synctest.Wait()
		if n := len(e.versions("web")); n != 0 {
			t.Errorf("a cancelled request made %d versions", n)
		}
	})
}

func TestEmailContactsIsRecordedAndRenewsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		p := testPolicy()
		p.Actions[0].Type = EmailContacts
		e.create("web", p, nil)
		_, _, err := e.clock.Advance(e.owner, 28*24*time.Hour)
		e.ok(err)
		synctest.Wait()
		r, err := e.vaults.Renewal(e.owner, "prod1", "web")
		e.ok(err)
		if r.MailDue.IsZero() || !r.Next.IsZero() || len(e.versions("web")) != 1 {
			t.Errorf("%+v with %d versions", r, len(e.versions("web")))
		}
	})
}

func TestRenewNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		p := testPolicy()
		p.ReuseKey = true
		first := e.create("web", p, map[string]string{"team": "a"})
		_, err := e.vaults.RenewNow(as("stranger"), "prod1", "web")
		e.refused("a stranger", err, fault.Denied, "AccessDenied")
		_, err = e.vaults.RenewNow(e.owner, "prod1", "web")
		e.ok(err)
		synctest.Wait()
		second, err := e.vaults.Certificate(e.owner, "prod1", "web", "")
		e.ok(err)
		if second.Version == first.Version || second.Tags["team"] != "a" {
			t.Errorf("version %s, tags %v", second.Version, second.Tags)
		}
		a, err := e.vaults.Secret(e.owner, "prod1", "web", first.Version, "")
		e.ok(err)
		b, err := e.vaults.Secret(e.owner, "prod1", "web", second.Version, "")
		e.ok(err)
		ka, _, _ := strings.Cut(a.Value.Reveal(), "-----END PRIVATE KEY")
		kb, _, _ := strings.Cut(b.Value.Reveal(), "-----END PRIVATE KEY")
		if ka != kb || a.Value.Reveal() == b.Value.Reveal() {
			t.Error("reuse_key: want the same key in another certificate")
		}
	})
}

func TestSecretForms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		for _, c := range []struct {
			content    string
			exportable bool
		}{{PEM, true}, {PEM, false}, {PFX, true}, {PFX, false}} {
			p := testPolicy()
			p.ContentType, p.Exportable, p.Issuer = c.content, c.exportable, SelfIssuer
			name := fmt.Sprintf("c-%v-%d", c.exportable, len(c.content))
			e.create(name, p, nil)
			s, err := e.vaults.Secret(e.owner, "prod1", name, "", "")
			e.ok(err)
			if s.ContentType != c.content {
				t.Errorf("%s: content type %s", name, s.ContentType)
			}
			text := s.Value.Reveal()
			if c.content == PFX {
				asPEM, err := e.vaults.Secret(e.owner, "prod1", name, "", PEM)
				if !c.exportable {
					e.refused("no key to convert", err, fault.Invalid, "BadParameter")
					continue
				}
				e.ok(err)
				text = asPEM.Value.Reveal()
			}
			_, kerr := pki.ParseKey([]byte(text))
			if chain, err := pki.ParseChain([]byte(text)); err != nil || len(chain) != 1 || (kerr == nil) != c.exportable {
				t.Errorf("%s exportable=%v: %d certificates, %v; key: %v", c.content, c.exportable, len(chain), err, kerr)
			}
		}
	})
}
