package reconcile_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// runnable is a Runnable made of a function.
type runnable func(ctx context.Context, s *store.Store) error

func (r runnable) Run(ctx context.Context, s *store.Store) error { return r(ctx, s) }
func (r runnable) Describe() string                              { return "test" }

const leaderKey = "/leader/controllers"

// depose ends the leadership from outside, as an expired lease would.
func (w *world) depose() {
	w.t.Helper()
	if _, err := w.memory.Commit(context.Background(), nil, []store.Write{{Key: leaderKey, Delete: true}}); err != nil {
		w.t.Fatal(err)
	}
}

func TestOnlyOneCandidateRunsAndTheNextFollows(t *testing.T) {
	inBubble(t, func(w *world) {
		var running, most, terms atomic.Int32
		r := runnable(func(ctx context.Context, s *store.Store) error {
			most.Store(max(most.Load(), running.Add(1)))
			terms.Add(1)
			<-ctx.Done()
			time.Sleep(3 * time.Second) // a slow end: the next term must wait for it
			running.Add(-1)
			return nil
		})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 2)
		for range 2 {
			go func() { ended <- reconcile.Lead(ctx, w.memory, w.store, []reconcile.Runnable{r}) }()
		}
		synctest.Wait()
		if running.Load() != 1 {
			t.Errorf("%d of two candidates run", running.Load())
		}
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if running.Load() != 0 {
			t.Error("Lead returned before its runnables had ended")
		}
		if es, _, err := w.memory.Get(context.Background(), leaderKey); err != nil || es[0].ModRev != 0 {
			t.Errorf("the leadership was not given up: %v, %v", es, err)
		}
		if most.Load() != 1 {
			t.Errorf("%d ran at once", most.Load())
		}
	})
}

func TestLostLeadershipEndsTheRunnablesAndFencesTheirWrites(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		var terms atomic.Int32
		late := make(chan error, 1)
		r := runnable(func(ctx context.Context, s *store.Store) error {
			n := terms.Add(1)
			<-ctx.Done()
			if n > 1 {
				return nil
			}
			// A deposed leader that has not noticed: its write must not land.
			late <- s.Update(context.Background(), func(tx *store.Tx) error {
				o, err := things.Get(tx, "a")
				if err != nil {
					return err
				}
				o.Spec.Want = 666
				return things.Put(tx, o)
			})
			return nil
		})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- reconcile.Lead(ctx, w.memory, w.store, []reconcile.Runnable{r}) }()
		synctest.Wait()
		w.depose()
		if err := <-late; !errors.Is(err, store.ErrFenced) {
			t.Errorf("the deposed leader's write: %v, expected ErrFenced", err)
		}
		if o := w.get("a"); o.Spec.Want != 1 {
			t.Errorf("the deposed leader's write landed: %+v", o)
		}
		time.Sleep(5 * time.Second)
		if n := terms.Load(); n != 2 {
			t.Errorf("%d terms; a server that lost campaigns again", n)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestControllerThatIsFencedOffEndsBeforeTheElectionSaysSo(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		fence, _, resign, err := w.memory.Campaign(w.t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w.depose()
		resign()
		c := reconcile.Controller[spec, status]{Name: "thinger", Objects: things, Reconciler: function(settle)}
		if err := c.Run(w.t.Context(), w.store.Fenced(fence)); !errors.Is(err, store.ErrFenced) {
			t.Errorf("Run = %v, expected ErrFenced", err)
		}
		if o := w.get("a"); o.Status.Have != 0 {
			t.Errorf("a fenced-off controller wrote %+v", o)
		}
	})
}

func TestRunnableThatEndsIsStartedAgain(t *testing.T) {
	inBubble(t, func(w *world) {
		var runs atomic.Int32
		failing := runnable(func(ctx context.Context, s *store.Store) error {
			switch runs.Add(1) {
			case 1:
				panic("no")
			case 2:
				return errors.New("no")
			}
			<-ctx.Done()
			return nil
		})
		var steady atomic.Int32
		other := runnable(func(ctx context.Context, s *store.Store) error {
			steady.Add(1)
			<-ctx.Done()
			return nil
		})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- reconcile.Lead(ctx, w.memory, w.store, []reconcile.Runnable{failing, other})
		}()
		time.Sleep(time.Minute)
		if runs.Load() != 3 || steady.Load() != 1 {
			t.Errorf("%d runs of the failing one, %d of the other; expected 3 and 1", runs.Load(), steady.Load())
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// stubborn is an Election that fails at first.
type stubborn struct {
	*store.Memory
	failures *int
}

func (s stubborn) Campaign(ctx context.Context) (store.Fence, <-chan struct{}, func(), error) {
	if *s.failures > 0 {
		*s.failures--
		return store.Fence{}, nil, nil, errors.New("no quorum")
	}
	return s.Memory.Campaign(ctx)
}

func TestFailedCampaignIsTriedAgain(t *testing.T) {
	inBubble(t, func(w *world) {
		var led atomic.Bool
		failures := 3
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- reconcile.Lead(ctx, stubborn{w.memory, &failures}, w.store, []reconcile.Runnable{runnable(func(ctx context.Context, s *store.Store) error {
				led.Store(true)
				<-ctx.Done()
				return nil
			})})
		}()
		time.Sleep(time.Minute)
		if !led.Load() {
			t.Error("gave up after failed campaigns")
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
