// Package reconcile runs controllers: loops that bring what is to what was
// asked for, one object and one step at a time.
//
// Idea: a capability writes one function, [Reconciler.Reconcile], which looks at
// an object, does the next step and says when to look again. Everything that
// such loops share is here once: following the collection, one worker per
// object, back-off, deadlines, panics, finalizers, conditions, metrics, and
// running only on the server that leads.
//
// Invariant: an object is never worked on twice at once; a change during work
// is not lost; every attempt ends in conditions on the object, so giving up is a
// state with a reason and a next attempt, never only a log line. A deposed
// leader cannot write: each commit also checks that its election key is still
// the one it won.
//
//	change of the object ──┐                        ┌─ Ready        success
//	trigger (Also) ────────┼─> queue ─> attempt ─> ─┼─ Reconciling  failed, tried again at NextAttempt
//	Result.After, back-off ┘   (one per object)     └─ Stalled      failed often, or the spec is wrong
//
// While an object is in back-off, only a change of its spec or a trigger cuts
// the wait short; a status written by somebody else does not. No timer is
// longer than one hour, so a clock jump or an edited policy is noticed by then.
//
// Consequence for the operator: an object that does not get where it should
// says why and when it is tried again; the metrics per controller show a queue
// that grows old before anybody asks.
package reconcile

import (
	"context"
	"log/slog"
	"time"

	"keyfleet.dev/keyfleet/internal/store"
)

// Result says what to do after an attempt without error.
type Result struct {
	After time.Duration // look again; zero: when something changes. Longer than an hour counts as an hour
}

// A Reconciler moves one object one step nearer to its Spec.
type Reconciler[S, T any] interface {
	// Reconcile may change obj.Status and set conditions on obj; the runtime
	// writes both once at the end, if they differ from what is stored. Changes
	// of obj.Spec are not written. It is called again after every change of
	// the object, after Result.After, and after an error with back-off, so it
	// must find out what is already done. s is fenced: writes through it fail with
	// store.ErrFenced when this server no longer leads. ctx ends at the
	// attempt's deadline and acts as the system principal named after the
	// controller.
	//
	// The runtime sets Ready, Reconciling and Stalled after the outcome, except
	// those that Reconcile sets itself with obj.SetCondition.
	Reconcile(ctx context.Context, s *store.Store, obj *store.Object[S, T]) (Result, error)
}

// A Finalizer is a Reconciler that must clean up before an object goes. The
// runtime adds a finalizer named after the controller before the first
// Reconcile, and calls Finalize instead of Reconcile while obj.Deleting is set.
type Finalizer[S, T any] interface {
	// Finalize removes what Reconcile brought about. done removes the
	// finalizer, and with the last one the object; otherwise it is called again
	// as Reconcile would be.
	Finalize(ctx context.Context, s *store.Store, obj *store.Object[S, T]) (done bool, r Result, err error)
}

// A Trigger watches another source and calls enqueue with the ids of objects
// that should be looked at. It returns when ctx ends; returning earlier, it is
// started again after a pause.
type Trigger func(ctx context.Context, s *store.Store, enqueue func(id string)) error

// Runnable is what a server runs while it leads.
type Runnable interface {
	// Run works until ctx ends, and returns when all its goroutines have ended.
	Run(ctx context.Context, s *store.Store) error
	// Describe names it for logs.
	Describe() string
}

// Controller is the configuration of a control loop over one collection. It is
// a Runnable. One collection has at most one Controller, for the conditions
// Ready, Reconciling and Stalled are its.
type Controller[S, T any] struct {
	Name       string                 // finalizer, system principal, metrics label; required
	Objects    store.Collection[S, T] // required
	Reconciler Reconciler[S, T]       // required; may also be a Finalizer
	Workers    int                    // objects worked on at once; zero: 4
	Deadline   time.Duration          // per attempt; zero: 30 s
	Backoff    Backoff                // after failures
	GiveUp     int                    // failures in a row until the object is Stalled; zero: 5
	Also       []Trigger              // other reasons to look at an object
	Metrics    *Metrics               // nil: not measured
	Log        *slog.Logger           // nil: slog.Default()
}

// Describe implements Runnable.
func (c Controller[S, T]) Describe() string { return "controller " + c.Name }

// Run implements Runnable. It returns nil when ctx ends, and store.ErrFenced
// when a write shows that s no longer leads.
func (c Controller[S, T]) Run(ctx context.Context, s *store.Store) error {
	if c.Workers == 0 {
		c.Workers = 4
	}
	if c.Deadline == 0 {
		c.Deadline = 30 * time.Second
	}
	if c.GiveUp == 0 {
		c.GiveUp = 5
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	c.Log = c.Log.With("controller", c.Name)
	return newLoop(c, s).run(ctx)
}

var _ Runnable = Controller[int, int]{}
