package vault

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyfleet.dev/keyfleet/internal/store"
)

// mortal is a backend whose server dies at a commit: before it, or after it with
// the answer lost. From then on nothing answers.
type mortal struct {
	store.Backend
	commits atomic.Int64
	at      int64 // which commit; 0: never
	after   bool
	dead    atomic.Bool
}

var errDead = errors.New("the server is dead")

func (m *mortal) Commit(ctx context.Context, g []store.Guard, w []store.Write) (int64, error) {
	if m.dead.Load() {
		return 0, errDead
	}
	if m.commits.Add(1) != m.at {
		return m.Backend.Commit(ctx, g, w)
	}
	m.dead.Store(true)
	if m.after {
		_, _ = m.Backend.Commit(ctx, g, w)
	}
	return 0, errDead
}

func (m *mortal) Get(ctx context.Context, keys ...string) ([]store.Entry, int64, error) {
	if m.dead.Load() {
		return nil, 0, errDead
	}
	return m.Backend.Get(ctx, keys...)
}

func (m *mortal) List(ctx context.Context, prefix string) ([]store.Entry, int64, error) {
	if m.dead.Load() {
		return nil, 0, errDead
	}
	return m.Backend.List(ctx, prefix)
}

// TestKilledAtEveryCommit kills the server before and after each commit of its
// controllers and lets another one take over. The end is always the same: one
// version for each reason, each with its secret; or, after a purge, nothing.
func TestKilledAtEveryCommit(t *testing.T) {
	for _, story := range []struct {
		name    string
		prepare func(e *env) // before the controllers run that are killed
		check   func(e *env)
	}{
		{"create", func(e *env) {
			_, err := e.vaults.CreateCertificate(e.owner, "prod1", "web", testPolicy(), Change{})
			e.ok(err)
		}, func(e *env) { e.consistent("web", 1) }},
		{"renew", func(e *env) {
			stop := e.run()
			e.create("web", testPolicy(), nil)
			stop()
			time.Sleep(time.Second)
			_, _, err := e.clock.Advance(e.owner, 28*24*time.Hour)
			e.ok(err)
		}, func(e *env) { e.consistent("web", 2) }},
		{"purge a certificate", func(e *env) {
			stop := e.run()
			e.create("web", testPolicy(), nil)
			stop()
			_, err := e.vaults.DeleteCertificate(e.owner, "prod1", "web")
			e.ok(err)
			time.Sleep(90 * 24 * time.Hour)
		}, func(e *env) { e.gone("prod1/") }},
		{"purge a vault", func(e *env) {
			stop := e.run()
			e.create("web", testPolicy(), nil)
			stop()
			for i := range 70 {
				_, err := e.vaults.SetSecret(e.owner, "prod1", fmt.Sprintf("s%d", i), NewSecret("x"), Change{})
				e.ok(err)
			}
			_, err := e.vaults.DeleteVault(e.owner, vaultID("prod1"))
			e.ok(err)
			e.ok(e.vaults.PurgeVault(e.owner, subID, "eastus", "prod1"))
		}, func(e *env) {
			e.gone("prod1/")
			if o, err := vaults.Lookup(e.store.View(e.owner), "prod1"); err != nil || o != nil {
				e.t.Errorf("the vault is still there (%v)", err)
			}
		}},
	} {
		points := 0
		for at := int64(1); at < 100; at++ {
			killed := false
			for _, after := range []bool{false, true} {
				synctest.Test(t, func(t *testing.T) {
					e := newEnv(t)
					story.prepare(e)
					good := e.backend
					m := &mortal{Backend: good, at: at, after: after}
					e.backend = m
					e.open()
					m.commits.Store(0) // opening is not part of the story
					stop := e.run()
					time.Sleep(time.Second)
					synctest.Wait()
					stop()
					killed = m.dead.Load()
					e.backend = good
					e.open()
					defer e.run()()
					time.Sleep(time.Second)
					synctest.Wait()
					story.check(e)
					if t.Failed() {
						t.Fatalf("%s: killed at commit %d (after: %v)", story.name, at, after)
					}
				})
				if killed {
					points++
				}
			}
			if !killed {
				break
			}
		}
		if points < 2 {
			t.Errorf("%s: only %d points were tried", story.name, points)
		}
		t.Logf("%s: %d points", story.name, points)
	}
}

// consistent checks that a certificate has n versions, each with its secret, and
// that both heads name the newest.
func (e *env) consistent(name string, n int) {
	e.t.Helper()
	list := e.versions(name)
	if len(list) != n {
		e.t.Errorf("there are %d versions, want %d", len(list), n)
		return
	}
	for _, c := range list {
		s, err := e.vaults.Secret(e.owner, "prod1", name, c.Version, "")
		if err != nil || !s.Managed {
			e.t.Errorf("version %s has no secret: %v", c.Version, err)
		}
	}
	c, err := e.vaults.Certificate(e.owner, "prod1", name, "")
	e.ok(err)
	s, err := e.vaults.Secret(e.owner, "prod1", name, "", "")
	e.ok(err)
	if c.Version != list[n-1].Version || s.Version != c.Version || c.Operation.Status != Completed || c.Operation.Version != c.Version {
		e.t.Errorf("newest certificate %s, secret %s, operation %+v; want %s", c.Version, s.Version, c.Operation, list[n-1].Version)
	}
	all, err := secretVersions.List(e.store.View(e.owner), "prod1/"+name+"/")
	if err != nil || len(all) != n {
		e.t.Errorf("there are %d secret versions (%v), want %d", len(all), err, n)
	}
}

// gone checks that nothing is left under a prefix.
func (e *env) gone(prefix string) {
	e.t.Helper()
	for _, kind := range []string{"secrets", "secretversions", "certificates", "certificateversions"} {
		list, _, err := e.backend.List(context.Background(), "/"+kind+"/"+prefix)
		if err != nil || len(list) != 0 {
			e.t.Errorf("%d %s are left (%v)", len(list), kind, err)
		}
	}
}

// TestTwoServersRenewOnce: two leaders at once, which fencing normally excludes,
// still make one version: the transaction checks the version that it follows.
func TestTwoServersRenewOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		stop := e.run()
		e.create("web", testPolicy(), nil)
		stop()
		time.Sleep(time.Second)
		_, _, err := e.clock.Advance(e.owner, 28*24*time.Hour)
		e.ok(err)
		a, b := e.run(), e.run()
		time.Sleep(time.Minute)
		synctest.Wait()
		a()
		b()
		e.consistent("web", 2)
		if n := e.journal.count("certificates/renew", "allowed"); n != 1 {
			t.Errorf("%d renewals are on record", n)
		}
	})
}

// TestFollowerHearsOfEachNewVersion: the feed names a secret once for each new
// newest version, with a revision that grows, and when it is deleted and comes back.
func TestFollowerHearsOfEachNewVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		_, err := e.vaults.SetSecret(e.owner, "prod1", "Early", NewSecret("x"), Change{})
		e.ok(err)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		heard := make(chan string, 100)
		last := int64(0)
		feed := e.vaults.Feed()
		go func() {
			_ = feed.Follow(ctx, func(vault, secret string, rev int64) error {
				if rev <= last || feed.Revision(vault, secret) < rev {
					t.Errorf("revision %d after %d; the feed knows %d", rev, last, feed.Revision(vault, secret))
				}
				last = rev
				heard <- vault + "/" + secret
				return nil
			})
		}()
		next := func(want string) {
			t.Helper()
			synctest.Wait()
			select {
			case got := <-heard:
				if got != want {
					t.Errorf("heard of %s, want %s", got, want)
				}
			default:
				if want != "" {
					t.Errorf("heard nothing, want %s", want)
				}
			}
		}
		next("prod1/early")
		e.create("web", testPolicy(), nil)
		next("prod1/web")
		_, err = e.vaults.UpdateCertificate(e.owner, "prod1", "web", "", Change{Tags: map[string]string{"a": "b"}}, nil)
		e.ok(err)
		next("")
		_, _, err = e.clock.Advance(e.owner, 28*24*time.Hour)
		e.ok(err)
		next("prod1/web")
		_, err = e.vaults.DeleteCertificate(e.owner, "prod1", "web")
		e.ok(err)
		next("prod1/web")
		_, err = e.vaults.RecoverCertificate(e.owner, "prod1", "web")
		e.ok(err)
		next("prod1/web")
		next("")
		if e.vaults.Feed().Revision("Prod1", "WEB") != last || feed.Revision("prod1", "nothing") != 0 {
			t.Error("Revision does not tell the last revision")
		}
		cancel()
		synctest.Wait()
	})
}

// TestDeletedVaultStandsStill: nothing is renewed in a deleted vault; recovered, it catches up.
func TestDeletedVaultStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		defer e.run()()
		e.create("web", testPolicy(), nil)
		time.Sleep(time.Second)
		_, err := e.vaults.DeleteVault(e.owner, vaultID("prod1"))
		e.ok(err)
		_, _, err = e.clock.Advance(e.owner, 28*24*time.Hour)
		e.ok(err)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		e.putVault("prod1", VaultSpec{Recover: true})
		synctest.Wait()
		e.consistent("web", 2)
	})
}
