package identity

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"keyfleet.dev/keyfleet/internal/store"
)

func contextCancelled(t testing.TB) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx, cancel
}

func TestKeyPlan(t *testing.T) {
	const life, lead, longest = 30 * 24 * time.Hour, 24 * time.Hour, 24 * time.Hour
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	day := func(n float64) time.Time { return start.Add(time.Duration(n * 24 * float64(time.Hour))) }
	ring := func(from ...float64) Keyring {
		var k Keyring
		for i, f := range from {
			k.Keys = append(k.Keys, SigningKey{ID: string(rune('a' + i)), SignFrom: day(f)})
		}
		return k
	}
	cases := []struct {
		reason string
		ring   Keyring
		now    time.Time
		want   keyPlan
	}{
		{"no key yet: one that signs at once", ring(), day(0), keyPlan{add: true, from: day(0)}},
		{"a young key", ring(0), day(1), keyPlan{next: day(29)}},
		{"a day before its end the next is published", ring(0), day(29), keyPlan{add: true, from: day(30), next: day(31).Add(clockSkew)}},
		{"published, not yet signing: the old one is kept", ring(0, 30), day(29.5), keyPlan{next: day(31).Add(clockSkew)}},
		{"the old one's tokens may still live", ring(0, 30), day(31), keyPlan{next: day(31).Add(clockSkew)}},
		{"and now not any more", ring(0, 30), day(31.1), keyPlan{drop: []string{"a"}, next: day(59)}},
		{"the server was off for a year: the next one is still published first", ring(0), day(365), keyPlan{add: true, from: day(366), next: day(367).Add(clockSkew)}},
	}
	for _, c := range cases {
		got := c.ring.plan(c.now, life, lead, longest)
		if d := cmp.Diff(c.want, got, cmp.AllowUnexported(keyPlan{}), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.reason, d)
		}
	}
}

// TestKeysRotateUnnoticed lives through 100 days: every token counts from its
// first to its last second, and every key is public a day before it signs.
func TestKeysRotateUnnoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := store.New(t.Context(), store.NewMemory())
		if err != nil {
			t.Fatal(err)
		}
		w := serverOn(t, s, newClock(time.Now()))
		w.cfg.Now = time.Now // the bubble's clock
		app, secret := w.app(t, "deployer")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- KeyRotation{Service: w.Service}.Run(ctx, s) }()

		public := map[string]time.Time{} // key id -> first seen in the JWKS
		signers := map[string]bool{}
		var first time.Time
		for range 100 * 4 {
			keys, err := w.PublicKeys(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(keys) > 3 {
				t.Errorf("%d keys are public", len(keys))
			}
			for _, k := range keys {
				if _, ok := public[k.ID]; !ok {
					public[k.ID] = time.Now()
				}
			}
			tok := w.token(t, app, secret, armURL, V1)
			head, _ := decoded(t, tok.Value.Reveal())
			kid := head["kid"].(string)
			if first.IsZero() {
				first = time.Now()
			} else if !signers[kid] && time.Since(public[kid]) < 17*time.Hour { // looked at every 6 h
				t.Errorf("key %s signs after being public for %s", kid, time.Since(public[kid]))
			}
			signers[kid] = true
			time.Sleep(tok.Lifetime - time.Second)
			clear(w.tokens)
			if _, err := w.Verify(t.Context(), tok.Value.Reveal(), []string{armURL}); err != nil {
				t.Fatalf("after %s: %v", time.Since(first), err)
			}
			time.Sleep(6*time.Hour - tok.Lifetime + time.Second)
		}
		if len(signers) != 4 {
			t.Errorf("%d keys signed in 100 days, want 4", len(signers))
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestTwoServersMakeOneKey(t *testing.T) {
	w := serverOn(t, newStore(t), newClock(start))
	other := serverOn(t, w.store, w.clock)
	a, err := w.PublicKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := other.PublicKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(a, b); d != "" || len(a) != 1 || w.TenantID() != other.TenantID() {
		t.Errorf("keys differ: %s", d)
	}
}
