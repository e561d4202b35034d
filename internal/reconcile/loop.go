package reconcile

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// recordTime is how long the write of an attempt's outcome may take; it is not
// part of the attempt's own deadline.
const recordTime = 10 * time.Second

// loop is one run of a controller.
type loop[S, T any] struct {
	Controller[S, T]
	store *store.Store
	queue *queue
	end   context.CancelCauseFunc // ends the run from inside, with the reason
}

func newLoop[S, T any](c Controller[S, T], s *store.Store) *loop[S, T] {
	return &loop[S, T]{Controller: c, store: s, queue: newQueue()}
}

// run starts the follower, the triggers and the workers, and waits for all.
func (l *loop[S, T]) run(ctx context.Context) error {
	outer := ctx
	ctx, l.end = context.WithCancelCause(ctx)
	defer l.end(nil)
	defer l.Metrics.started(l.Name, l.queue)()

	var all sync.WaitGroup
	all.Go(func() { l.follow(ctx) })
	for _, t := range l.Also {
		all.Go(func() { l.trigger(ctx, t) })
	}
	for range l.Workers {
		all.Go(func() { l.worker(ctx) })
	}
	<-ctx.Done()
	l.queue.shutDown()
	all.Wait()
	if outer.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// follow feeds the queue from the collection. Ends with ctx.
func (l *loop[S, T]) follow(ctx context.Context) {
	err := l.Objects.Follow(ctx, l.store, "", func(ch store.Change[S, T]) error {
		switch {
		case ch.ID == "": // the first listing is complete
		case ch.Object == nil:
			l.queue.removed(ch.ID)
		default:
			l.queue.changed(ch.ID, seenOf(&ch.Object.Meta))
		}
		return nil
	})
	if ctx.Err() == nil {
		l.end(fmt.Errorf("following %s: %w", l.Objects.Kind, err))
	}
}

// trigger runs one trigger, again and again if it fails. Ends with ctx.
func (l *loop[S, T]) trigger(ctx context.Context, t Trigger) {
	ctx = access.AsSystem(ctx, l.Name)
	for n := 1; ; n++ {
		started := time.Now()
		err := guard(func() error { return t(ctx, l.store, l.queue.ask) })
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > longest {
			n = 1
		}
		wait := pause(n)
		l.Log.Warn("trigger ended, starting it again", "error", err, "after", wait)
		if !sleep(ctx, wait) {
			return
		}
	}
}

// worker takes objects from the queue. Ends with ctx, after the attempt at hand.
func (l *loop[S, T]) worker(ctx context.Context) {
	for {
		id, failures, ok := l.queue.get()
		if !ok {
			return
		}
		if ctx.Err() != nil {
			l.queue.drop(id)
			continue
		}
		l.work(ctx, id, failures)
	}
}

// work makes one attempt at an object and hands the outcome to object and queue.
func (l *loop[S, T]) work(ctx context.Context, id string, failures int) {
	attempt := rand.Text()
	call := access.Call{Principal: access.SystemPrincipal(l.Name), RequestID: attempt, CorrelationID: attempt}
	ctx = access.With(ctx, call)

	obj, err := l.load(ctx, id)
	if err == nil && obj == nil {
		l.queue.drop(id)
		return
	}
	var r Result
	var gone bool
	started := time.Now()
	base := obj
	if err == nil {
		base = clone(obj)
		markUnset(&obj.Meta)
		gone, r, err = l.attempt(ctx, obj)
	}
	if ctx.Err() != nil { // the loop ends; whoever leads next looks again
		l.queue.drop(id)
		return
	}
	l.Metrics.attempted(l.Name, time.Since(started), err != nil)
	if errors.Is(err, store.ErrFenced) {
		l.queue.drop(id)
		l.end(store.ErrFenced)
		return
	}
	o := decide(r, err, failures, l.GiveUp, l.Backoff, jitter())
	if err != nil {
		l.report(id, attempt, o, err)
	}
	if base == nil { // the object could not even be read
		l.queue.finish(id, o, nil, false)
		return
	}
	if gone {
		done := seenOf(&base.Meta)
		l.queue.finish(id, o, &done, false)
		return
	}
	conclude(&obj.Meta, o, err, attempt, time.Now().UTC())
	l.record(ctx, base, obj, o)
}

// report logs a failed attempt; a panic with its stack.
func (l *loop[S, T]) report(id, attempt string, o outcome, err error) {
	args := []any{"object", id, "error", err, "failures", o.failures, "stalled", o.stalled, "next", o.wait, "requestId", attempt}
	var p *panicError
	if errors.As(err, &p) {
		args = append(args, "stack", string(p.stack))
	}
	l.Log.Warn("reconciling failed", args...)
}

// load reads the object and sees to its finalizer. It returns nil if there is
// nothing to do: the object is gone, or is being deleted and not ours to clean up.
func (l *loop[S, T]) load(ctx context.Context, id string) (*store.Object[S, T], error) {
	ctx, cancel := context.WithTimeout(ctx, recordTime)
	defer cancel()
	_, finalizes := l.Reconciler.(Finalizer[S, T])
	var obj *store.Object[S, T]
	err := l.store.Update(ctx, func(tx *store.Tx) (err error) {
		if obj, err = l.Objects.Lookup(tx, id); err != nil || obj == nil {
			return err
		}
		if !obj.Deleting.IsZero() {
			if !finalizes || !obj.HasFinalizer(l.Name) {
				obj = nil
			}
			return nil
		}
		if !finalizes || obj.HasFinalizer(l.Name) {
			return nil
		}
		obj.Finalizers = append(obj.Finalizers, l.Name)
		tx.OnCommit(func(rev int64) { obj.Revision = rev })
		return l.Objects.Put(tx, obj)
	})
	return obj, err
}

// attempt calls the reconciler under the deadline. gone means that the
// finalizer is removed and there is no status left to write.
func (l *loop[S, T]) attempt(ctx context.Context, obj *store.Object[S, T]) (gone bool, r Result, err error) {
	limited, cancel := context.WithTimeout(ctx, l.Deadline)
	defer cancel()
	err = guard(func() (err error) {
		if f, ok := l.Reconciler.(Finalizer[S, T]); ok && !obj.Deleting.IsZero() {
			gone, r, err = f.Finalize(limited, l.store, obj)
		} else {
			r, err = l.Reconciler.Reconcile(limited, l.store, obj)
		}
		return err
	})
	if err != nil {
		if limited.Err() != nil && ctx.Err() == nil && fault.KindOf(err) == fault.Internal {
			err = fault.New(fault.Timeout, "", "The attempt was not done within %s.", l.Deadline).Because(err)
		}
		return false, Result{}, err
	}
	if gone {
		ctx, cancel := context.WithTimeout(ctx, recordTime)
		defer cancel()
		err = l.store.Update(ctx, func(tx *store.Tx) error { return l.Objects.RemoveFinalizer(tx, obj.ID, l.Name) })
	}
	return gone && err == nil, r, err
}

// record writes status and conditions, and returns the object to the queue. If
// somebody else wrote the status meanwhile, theirs stays, the conditions are
// ours, and the object is looked at again at once.
func (l *loop[S, T]) record(outer context.Context, base, obj *store.Object[S, T], o outcome) {
	ctx, cancel := context.WithTimeout(outer, recordTime)
	defer cancel()
	done, again := seenOf(&base.Meta), false
	err := l.store.Update(ctx, func(tx *store.Tx) error {
		done, again = seenOf(&base.Meta), false
		fresh, err := l.Objects.Lookup(tx, obj.ID)
		if err != nil || fresh == nil || fresh.UID != obj.UID {
			return err // gone: the follow loop says so too
		}
		if fresh.Revision != base.Revision {
			// In back-off only another spec is worth another look before its time.
			again = o.failures == 0 || !seenOf(&fresh.Meta).sameSpec(seenOf(&base.Meta))
			done.rev = fresh.Revision
		}
		if same(fresh.Status, base.Status) {
			fresh.Status = obj.Status
		}
		fresh.Conditions = mergeConditions(fresh.Conditions, obj.Conditions)
		tx.OnCommit(func(rev int64) { done.rev = max(done.rev, rev) })
		return l.Objects.PutStatus(tx, fresh)
	})
	switch {
	case err == nil:
	case outer.Err() != nil: // the loop ends
		l.queue.drop(obj.ID)
		return
	case errors.Is(err, store.ErrFenced):
		l.queue.drop(obj.ID)
		l.end(store.ErrFenced)
		return
	default:
		l.Log.Warn("writing the status failed", "object", obj.ID, "error", err)
		o.failures++
		o.wait = l.Backoff.delay(o.failures, jitter())
	}
	l.queue.finish(obj.ID, o, &done, again)
}

// mergeConditions lays ours over theirs, by type.
func mergeConditions(theirs, ours []store.Condition) []store.Condition {
	out := append([]store.Condition(nil), ours...)
	for _, t := range theirs {
		found := false
		for _, o := range ours {
			found = found || o.Type == t.Type
		}
		if !found {
			out = append(out, t)
		}
	}
	return out
}

// guard turns a panic of fn into an error.
func guard(fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &panicError{value: v, stack: debug.Stack()}
		}
	}()
	return fn()
}

// sleep waits, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func seenOf(m *store.Meta) seen { return seen{rev: m.Revision, uid: m.UID, gen: m.Generation} }

func same(a, b any) bool {
	x, xerr := json.Marshal(a)
	y, yerr := json.Marshal(b)
	return xerr == nil && yerr == nil && bytes.Equal(x, y)
}

// clone copies an object deeply, so that the original can be compared with what
// a reconciler made of the copy.
func clone[S, T any](o *store.Object[S, T]) *store.Object[S, T] {
	c := new(store.Object[S, T])
	b, err := json.Marshal(o)
	if err == nil {
		err = json.Unmarshal(b, c)
	}
	if err != nil {
		panic(fmt.Sprintf("reconcile: an object that was decoded cannot be encoded: %v", err))
	}
	c.Revision = o.Revision
	return c
}
