//go:build linux

package target_test

import (
	"context"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/target"
)

// step is an operation that is interrupted, and what must hold after it was called again.
type step struct {
	name  string
	setup func()                                     // before each interruption
	call  func(context.Context, target.Server) error // the operation
	check func()                                     // after it was called again without interruption
}

// testCrash interrupts each operation at every message that it sends: the message
// is lost, or its answer is, or the caller gives up. Calling the operation again
// always leads to the same end.
func testCrash(t *testing.T, f *fixture) {
	points, stride := 0, 1
	if testing.Short() {
		stride = 5
	}
	for _, s := range crashSteps(t, f) {
		for _, how := range []struct {
			name      string
			cut, drop bool
		}{{"message lost", true, true}, {"answer lost", true, false}, {"given up", false, false}} {
			for at := 1; ; at += stride {
				s.setup()
				ctx, cancel := context.WithCancel(t.Context())
				c := &cutter{at: at, cut: how.cut, drop: how.drop}
				if !how.cut {
					c.before = cancel
				}
				err := s.call(ctx, c.through(t, f.target()))
				cancel()
				c.end()
				if !c.done() {
					if err != nil {
						t.Fatalf("%s without an interruption: %v", s.name, err)
					}
					break
				}
				points++
				if err != nil && leaks(f, err) {
					t.Fatalf("%s, %s at %d: the error has a password", s.name, how.name, at)
				}
				if again := s.call(t.Context(), f.target()); again != nil {
					t.Fatalf("%s again after %s at %d (%v): %v", s.name, how.name, at, err, again)
				}
				s.check()
				if t.Failed() {
					t.Fatalf("%s, %s at %d", s.name, how.name, at)
				}
			}
		}
	}
	t.Logf("%s: %d points", f.Kind, points)
}

func crashSteps(t *testing.T, f *fixture) []step {
	nothing := f.inventory(t, f.Server)
	both := [2]target.Login{f.ensure(t, "crash", 0), f.ensure(t, "crash", 1)}
	made := f.inventory(t, f.Server)
	f.remove(t, "crash")
	one := f.ensure(t, "crash", 1)
	oneMade := f.inventory(t, f.Server)
	f.remove(t, "crash")
	same := func(want string) {
		t.Helper()
		if got := f.inventory(t, f.Server); got != want {
			t.Errorf("the end is\n%s\nwant\n%s", got, want)
		}
	}
	login := both[0]
	gone := func(l target.Login) {
		t.Helper()
		if f.Kind != target.RabbitMQ { // which takes three seconds for it; that the user is not there is seen below
			f.refused(t, l)
		}
	}
	makeBoth := func() {
		for _, l := range both {
			if err := target.Ensure(t.Context(), f.target(), "crash", l); err != nil {
				t.Fatal(err)
			}
		}
	}
	return []step{
		{
			"Ensure", func() { f.remove(t, "crash") },
			func(ctx context.Context, s target.Server) error {
				for _, l := range both {
					if err := target.Ensure(ctx, s, "crash", l); err != nil {
						return err
					}
				}
				return nil
			},
			func() { f.prove(t, login); same(made) },
		},
		{
			"Revoke", makeBoth,
			func(ctx context.Context, s target.Server) error { return target.Revoke(ctx, s, "crash", login.User) },
			func() {
				gone(login)
				f.prove(t, target.Login{User: one.User, Password: both[1].Password})
				same(oneMade)
			},
		},
		{
			"Remove", makeBoth,
			func(ctx context.Context, s target.Server) error {
				_, err := target.Remove(ctx, s, "crash")
				return err
			},
			func() { gone(login); same(nothing) },
		},
	}
}

// leaks tells whether an error shows a password.
func leaks(f *fixture, err error) bool {
	for _, p := range append(f.passwords, f.AdminPassword) {
		if strings.Contains(err.Error(), p) {
			return true
		}
	}
	return false
}
