package rotation

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestUntil: what is told when the time is over is the last reason that somebody
// gave, not that a look was broken off.
func TestUntil(t *testing.T) {
	down := errors.New("member master-1 does not answer")
	// slow takes a minute to say no, or is broken off.
	slow := func(ctx context.Context) error {
		select {
		case <-time.After(time.Minute):
			return down
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	cases := []struct {
		reason string
		within time.Duration
		cancel time.Duration // zero: never
		want   error
		after  time.Duration
	}{
		{"the last look is broken off", 90 * time.Second, 0, down, 90 * time.Second},
		{"the only look is broken off", 30 * time.Second, 0, context.DeadlineExceeded, 30 * time.Second},
		{"somebody stops it", time.Hour, 90 * time.Second, context.Canceled, 90 * time.Second},
	}
	for _, tc := range cases {
		t.Run(tc.reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if tc.cancel != 0 {
					time.AfterFunc(tc.cancel, cancel)
				}
				began := time.Now()
				if err := until(ctx, tc.within, slow); !errors.Is(err, tc.want) {
					t.Errorf("%v, want %v", err, tc.want)
				}
				if took := time.Since(began); took != tc.after {
					t.Errorf("it took %s, want %s", took, tc.after)
				}
			})
		})
	}
}
