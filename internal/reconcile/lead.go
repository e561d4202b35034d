package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/store"
)

// Election decides which of several servers on one store runs the controllers.
type Election interface {
	// Campaign waits until this server leads or ctx ends. fence ties writes
	// to this leadership. lost is closed when the leadership has ended or can no
	// longer be relied on. resign gives it up and returns when that is done or
	// hopeless; it must be called, also after lost.
	Campaign(ctx context.Context) (fence store.Fence, lost <-chan struct{}, resign func(), err error)
}

// pause is the time after the n-th failed attempt to lead, and before the n-th
// restart of a Runnable or a Trigger that ended by itself.
func pause(n int) time.Duration {
	return Backoff{Base: time.Second, Cap: 30 * time.Second}.delay(n, jitter())
}

// Lead runs the runnables whenever and as long as this server leads, with a
// store whose commits the leadership fences. When leadership is lost it ends
// them, waits until they have ended, and campaigns again. It returns nil when
// ctx ends, after all runnables have ended and the leadership is given up.
func Lead(ctx context.Context, e Election, s *store.Store, rs []Runnable) error {
	for failed := 0; ctx.Err() == nil; {
		fence, lost, resign, err := e.Campaign(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			failed++
			wait := pause(failed)
			slog.Warn("campaigning for leadership failed", "error", err, "again", wait)
			sleep(ctx, wait)
			continue
		}
		failed = 0
		slog.Info("leading", "key", fence.Key)
		err = term(ctx, lost, s.Fenced(fence), rs)
		resign()
		if ctx.Err() == nil {
			slog.Warn("no longer leading", "reason", err)
			sleep(ctx, pause(1))
		}
	}
	return nil
}

var errLost = errors.New("the election was lost")

// term runs the runnables until ctx ends, the leadership is lost, or one of them
// finds that its writes are fenced off. It returns when all have ended.
func term(ctx context.Context, lost <-chan struct{}, s *store.Store, rs []Runnable) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	var all sync.WaitGroup
	for _, r := range rs {
		all.Go(func() { keepRunning(ctx, end, s, r) })
	}
	select {
	case <-lost:
		end(errLost)
	case <-ctx.Done():
	}
	all.Wait()
	return context.Cause(ctx)
}

// keepRunning runs r until ctx ends, again after a pause if it ends by itself.
func keepRunning(ctx context.Context, end context.CancelCauseFunc, s *store.Store, r Runnable) {
	for n := 1; ; n++ {
		err := guard(func() error { return r.Run(ctx, s) })
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, store.ErrFenced) {
			end(store.ErrFenced)
			return
		}
		wait := pause(n)
		var p *panicError
		if errors.As(err, &p) {
			slog.Error("runnable panicked", "what", r.Describe(), "error", err, "stack", string(p.stack))
		}
		slog.Error("runnable ended, starting it again", "what", r.Describe(), "error", err, "after", wait)
		if !sleep(ctx, wait) {
			return
		}
	}
}
