package reconcile

import (
	"math/rand/v2"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// longest is the longest time the runtime waits without looking.
const longest = time.Hour

// Backoff is how long an object waits after failures in a row: Base doubled
// with each, at most Cap, shortened by a random part of up to a quarter so that
// objects that failed together do not come back together. The shortening comes
// after the cap: at the cap the attempts still spread.
type Backoff struct {
	Base time.Duration // zero: 1 s
	Cap  time.Duration // zero: 5 min
}

// delay returns the wait after the n-th failure in a row (from 1); random is in [0,1).
func (b Backoff) delay(n int, random float64) time.Duration {
	base, limit := b.Base, b.Cap
	if base <= 0 {
		base = time.Second
	}
	if limit <= 0 {
		limit = 5 * time.Minute
	}
	d := base
	for i := 1; i < n && d < limit; i++ {
		d *= 2
	}
	d = min(d, limit)
	return d - time.Duration(random*float64(d)/4)
}

// outcome is what an attempt's end means for an object's future.
type outcome struct {
	failures int           // in a row, this one included
	stalled  bool          // given up until next, or until the spec changes
	wait     time.Duration // until the next attempt; zero: no timer
}

// decide turns the end of an attempt into its outcome: success clears, a
// fault.Invalid waits for another spec, other errors back off and after giveUp
// of them count as stalled. A RetryAfter is never undercut.
func decide(r Result, err error, failures, giveUp int, b Backoff, random float64) outcome {
	if err == nil {
		return outcome{wait: min(r.After, longest)}
	}
	f := fault.From(err)
	if f.Kind == fault.Invalid {
		return outcome{failures: failures + 1, stalled: true}
	}
	o := outcome{failures: failures + 1, wait: b.delay(failures+1, random)}
	o.stalled = o.failures >= giveUp
	if f.RetryAfter > 0 {
		o.wait = max(o.wait, f.RetryAfter)
	}
	return o
}

// jitter returns a random number in [0,1).
func jitter() float64 { return rand.Float64() }
