package reconcile

import (
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/fault"
)

func TestDecide(t *testing.T) {
	b := Backoff{Base: time.Second, Cap: time.Minute}
	for _, tc := range []struct {
		reason   string
		r        Result
		err      error
		failures int
		want     outcome
	}{
		{"success clears the failures", Result{}, nil, 7, outcome{}},
		{"success may ask for another look", Result{After: time.Minute}, nil, 0, outcome{wait: time.Minute}},
		{"no timer is longer than an hour", Result{After: 999 * time.Hour}, nil, 0, outcome{wait: time.Hour}},
		{"an invalid spec waits for another spec", Result{}, fault.New(fault.Invalid, "", "no"), 0, outcome{failures: 1, stalled: true}},
		{"an unknown error backs off", Result{}, errors.New("no"), 0, outcome{failures: 1, wait: time.Second}},
		{"the wait doubles", Result{}, errors.New("no"), 2, outcome{failures: 3, wait: 4 * time.Second}},
		{"many failures are a stall with a next attempt", Result{}, errors.New("no"), 4, outcome{failures: 5, stalled: true, wait: 16 * time.Second}},
		{"the wait has a cap", Result{}, errors.New("no"), 400, outcome{failures: 401, stalled: true, wait: time.Minute}},
		{"retry-after may lengthen the wait", Result{}, fault.New(fault.TooMany, "", "no").After(time.Hour * 2), 0, outcome{failures: 1, wait: 2 * time.Hour}},
		{"retry-after does not shorten it", Result{}, fault.New(fault.TooMany, "", "no").After(time.Second), 3, outcome{failures: 4, wait: 8 * time.Second}},
	} {
		if got := decide(tc.r, tc.err, tc.failures, 5, b, 0); got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.reason, got, tc.want)
		}
	}
}

func TestDelayGrowsIsBoundedAndSpreadsAtTheCap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := Backoff{
			Base: time.Duration(rapid.Int64Range(1, int64(time.Minute)).Draw(t, "base")),
			Cap:  time.Duration(rapid.Int64Range(int64(time.Minute), int64(longest)).Draw(t, "cap")),
		}
		n := rapid.IntRange(1, 1_000_000).Draw(t, "n")
		early, late := b.delay(n, 0.999), b.delay(n, 0)
		if late < b.Base || late > b.Cap {
			t.Fatalf("delay %s outside %s..%s", late, b.Base, b.Cap)
		}
		if early < late*3/4 || early > late || (late > 100 && early == late) {
			t.Fatalf("with jitter %s, without %s", early, late)
		}
		if next := b.delay(n+1, 0); next < late {
			t.Fatalf("delay shrank from %s to %s", late, next)
		}
	})
}
