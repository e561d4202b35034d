package reconcile_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

type spec struct {
	Want int `json:"want"`
}

type status struct {
	Have int    `json:"have"`
	Note string `json:"note,omitempty"`
}

type thing = store.Object[spec, status]

var things = store.NewCollection[spec, status]("things")

// function is a Reconciler made of a function.
type function func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error)

func (f function) Reconcile(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
	return f(ctx, s, o)
}

// withFinalize adds the clean-up to a function.
type withFinalize struct {
	function
	finalize func(ctx context.Context, s *store.Store, o *thing) (bool, reconcile.Result, error)
}

func (f withFinalize) Finalize(ctx context.Context, s *store.Store, o *thing) (bool, reconcile.Result, error) {
	return f.finalize(ctx, s, o)
}

// world is a store in a bubble with one running controller.
type world struct {
	t      *testing.T
	store  *store.Store
	memory *store.Memory
	start  time.Time

	mu    sync.Mutex
	calls []time.Duration // when Reconcile was called, since start
}

// inBubble runs test with an empty store in virtual time.
func inBubble(t *testing.T, test func(w *world)) {
	synctest.Test(t, func(t *testing.T) {
		m := store.NewMemory()
		defer m.Close()
		s, err := store.New(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		test(&world{t: t, store: s, memory: m, start: time.Now()})
	})
}

// run starts a controller, and ends it with the test.
func (w *world) run(c reconcile.Controller[spec, status]) (stop func() error) {
	c.Name, c.Objects = "thinger", things
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, w.store) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	w.t.Cleanup(func() { _ = stop() })
	return stop
}

// counted notes the time of each call of f.
func (w *world) counted(f function) function {
	return func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
		w.mu.Lock()
		w.calls = append(w.calls, time.Since(w.start))
		w.mu.Unlock()
		return f(ctx, s, o)
	}
}

func (w *world) count() int { return len(w.called()) }

// called returns when Reconcile was called so far.
func (w *world) called() []time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.calls)
}

func (w *world) insert(id string, want int) {
	w.t.Helper()
	w.update(func(tx *store.Tx) error {
		o := &thing{Spec: spec{Want: want}}
		o.ID = id
		return things.Insert(tx, o)
	})
}

func (w *world) want(id string, want int) {
	w.t.Helper()
	w.update(func(tx *store.Tx) error {
		o, err := things.Get(tx, id)
		if err != nil {
			return err
		}
		o.Spec.Want = want
		return things.Put(tx, o)
	})
}

func (w *world) update(fn func(tx *store.Tx) error) {
	w.t.Helper()
	if err := w.store.Update(context.Background(), fn); err != nil {
		w.t.Fatal(err)
	}
}

// get returns the object once everything that can happen now has happened; nil if it is gone.
func (w *world) get(id string) *thing {
	w.t.Helper()
	synctest.Wait()
	o, err := things.Lookup(w.store.View(context.Background()), id)
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

// settle copies Spec to Status, the least that a controller can do.
func settle(_ context.Context, _ *store.Store, o *thing) (reconcile.Result, error) {
	o.Status.Have = o.Spec.Want
	return reconcile.Result{}, nil
}

func TestStatusIsWrittenOnceAndLeadsToNoFurtherAttempt(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		w.run(reconcile.Controller[spec, status]{Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			o.Spec.Want = 99 // a reconciler's change of the spec must not be written
			o.Status.Have++
			return reconcile.Result{}, nil
		})})
		o := w.get("a")
		if o.Status.Have != 1 || o.Spec.Want != 1 || o.Generation != 1 {
			t.Errorf("after one attempt: have %d, want %d, generation %d; expected 1, 1, 1", o.Status.Have, o.Spec.Want, o.Generation)
		}
		if r := o.Condition(reconcile.Ready); !r.Status || r.Reason != "Reconciled" || r.ObservedGeneration != 1 {
			t.Errorf("Ready = %+v", r)
		}
		time.Sleep(24 * time.Hour)
		if n := w.count(); n != 1 {
			t.Errorf("%d attempts; the controller's own status write must not cause another", n)
		}
		w.want("a", 2)
		if o := w.get("a"); o.Status.Have != 2 || o.Condition(reconcile.Ready).ObservedGeneration != 2 {
			t.Errorf("after a change of the spec: %+v", o)
		}
	})
}

func TestFailuresBackOffAndBecomeStalled(t *testing.T) {
	inBubble(t, func(w *world) {
		var mended atomic.Bool
		w.insert("a", 1)
		w.run(reconcile.Controller[spec, status]{
			GiveUp: 3, Backoff: reconcile.Backoff{Base: time.Second, Cap: 10 * time.Second},
			Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
				if !mended.Load() {
					return reconcile.Result{}, fault.New(fault.Unavailable, "NoProvider", "No provider answers.").WithFix("start one")
				}
				return settle(ctx, s, o)
			}),
		})
		o := w.get("a")
		if c := o.Condition(reconcile.Reconciling); !c.Status || c.Reason != "Retrying" || c.NextAttempt.IsZero() {
			t.Errorf("after the first failure Reconciling = %+v", c)
		}
		if c := o.Condition(reconcile.Ready); c.Status || c.Reason != "NoProvider" || c.Message != "No provider answers. Fix: start one" {
			t.Errorf("Ready = %+v", c)
		}
		time.Sleep(time.Minute)
		o = w.get("a")
		stalled := o.Condition(reconcile.Stalled)
		if !stalled.Status || stalled.Reason != "NoProvider" || !stalled.NextAttempt.After(time.Now()) {
			t.Errorf("after many failures Stalled = %+v, now %s", stalled, time.Now())
		}
		// 1, 2, 4, 8, 10, 10 ... each shortened by at most a quarter.
		full := []time.Duration{1, 2, 4, 8, 10, 10, 10}
		calls := w.called()
		for i := 1; i < len(calls) && i <= len(full); i++ {
			gap, limit := calls[i]-calls[i-1], full[i-1]*time.Second
			if gap > limit || gap < limit*3/4 {
				t.Errorf("gap %d is %s, expected %s to %s", i, gap, limit*3/4, limit)
			}
		}
		if len(calls) < 7 {
			t.Errorf("only %d attempts in a minute", len(calls))
		}
		mended.Store(true)
		time.Sleep(11 * time.Second)
		o = w.get("a")
		if o.Condition(reconcile.Stalled).Status || !o.Condition(reconcile.Ready).Status || o.Status.Have != 1 {
			t.Errorf("success must clear: %+v", o)
		}
	})
}

func TestInvalidIsStalledUntilTheSpecChanges(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", -1)
		w.run(reconcile.Controller[spec, status]{Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			if o.Spec.Want < 0 {
				return reconcile.Result{}, fault.New(fault.Invalid, "", "Less than nothing.").At("spec.want")
			}
			return settle(ctx, s, o)
		})})
		time.Sleep(48 * time.Hour)
		o := w.get("a")
		if c := o.Condition(reconcile.Stalled); !c.Status || c.Reason != "Invalid" || !c.NextAttempt.IsZero() {
			t.Errorf("Stalled = %+v", c)
		}
		w.update(func(tx *store.Tx) error { // somebody else's status does not make the spec better
			o, err := things.Get(tx, "a")
			if err != nil {
				return err
			}
			o.Status.Note = "seen"
			return things.Put(tx, o)
		})
		w.get("a")
		if n := w.count(); n != 1 {
			t.Errorf("%d attempts at a spec that cannot work, expected 1", n)
		}
		w.want("a", 5)
		if o := w.get("a"); o.Status.Have != 5 || o.Condition(reconcile.Stalled).Status {
			t.Errorf("after a better spec: %+v", o)
		}
	})
}

func TestRetryAfterIsNeverUndercut(t *testing.T) {
	for _, wait := range []time.Duration{90 * time.Second, 3 * time.Hour} { // the second is longer than any timer
		inBubble(t, func(w *world) {
			w.insert("a", 1)
			w.run(reconcile.Controller[spec, status]{Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
				return reconcile.Result{}, fault.New(fault.TooMany, "", "Slow down.").After(wait)
			})})
			time.Sleep(wait - time.Second)
			if n := w.count(); n != 1 {
				t.Errorf("retry after %s: %d attempts before", wait, n)
			}
			time.Sleep(2 * time.Second)
			if n := w.count(); n != 2 {
				t.Errorf("retry after %s: %d attempts when it was over", wait, n)
			}
		})
	}
}

func TestLongWaitsAreLookedAtEveryHour(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		w.run(reconcile.Controller[spec, status]{Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			return reconcile.Result{After: 60 * 24 * time.Hour}, nil
		})})
		time.Sleep(24*time.Hour + time.Minute)
		if n := w.count(); n != 25 {
			t.Errorf("%d attempts in a day, expected 25: one at once and one an hour", n)
		}
	})
}

func TestFinalizerComesBeforeTheFirstAttemptAndGoesAfterTheCleanUp(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		outside := map[string]bool{}
		cleanups := 0
		w.run(reconcile.Controller[spec, status]{Reconciler: withFinalize{
			function: func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
				if stored, err := things.Get(s.View(ctx), o.ID); err != nil || !stored.HasFinalizer("thinger") {
					t.Errorf("first attempt without a stored finalizer: %v, %v", stored, err)
				}
				outside[o.ID] = true
				return settle(ctx, s, o)
			},
			finalize: func(ctx context.Context, s *store.Store, o *thing) (bool, reconcile.Result, error) {
				cleanups++
				switch cleanups {
				case 1:
					return false, reconcile.Result{After: time.Second}, nil
				case 2:
					return false, reconcile.Result{}, errors.New("the door is stuck")
				}
				delete(outside, o.ID)
				return true, reconcile.Result{}, nil
			},
		}})
		if o := w.get("a"); !outside["a"] || o.Generation != 1 {
			t.Fatalf("not set up: %+v", o)
		}
		w.update(func(tx *store.Tx) error { return things.Delete(tx, "a") })
		o := w.get("a")
		if o == nil || o.Deleting.IsZero() {
			t.Fatalf("the object went before its clean-up: %+v", o)
		}
		if c := o.Condition(reconcile.Ready); c.Status || c.Reason != "Deleting" {
			t.Errorf("Ready while deleting = %+v", c)
		}
		time.Sleep(time.Minute)
		if o := w.get("a"); o != nil || len(outside) != 0 || cleanups != 3 {
			t.Errorf("after the clean-up: object %+v, outside %v, %d clean-ups", o, outside, cleanups)
		}
		w.insert("a", 2) // the same id again is another object
		if o := w.get("a"); o.Status.Have != 2 || !outside["a"] {
			t.Errorf("a new object of the same id was not worked on: %+v", o)
		}
	})
}

func TestPanicBecomesAConditionAndTheWorkerLives(t *testing.T) {
	inBubble(t, func(w *world) {
		var log strings.Builder
		w.insert("bad", 1)
		w.run(reconcile.Controller[spec, status]{
			Workers: 1, Log: slog.New(slog.NewTextHandler(&log, nil)),
			Reconciler: function(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
				if o.ID == "bad" {
					panic("secret words")
				}
				return settle(ctx, s, o)
			}),
		})
		c := w.get("bad").Condition(reconcile.Ready)
		if c.Status || c.Reason != "Panicked" || strings.Contains(c.Message, "secret words") {
			t.Errorf("Ready = %+v; a panic's value is for the log only", c)
		}
		w.insert("good", 3)
		if o := w.get("good"); o.Status.Have != 3 {
			t.Errorf("the only worker did not survive: %+v", o)
		}
		id := strings.TrimSuffix(c.Message[strings.LastIndexByte(c.Message, ' ')+1:], ".")
		if !strings.Contains(log.String(), "requestId="+id) || !strings.Contains(log.String(), "loop_test.go") {
			t.Errorf("the log has no stack under request id %s:\n%s", id, log.String())
		}
	})
}

func TestChangeDuringWorkIsKeptAndNeverWorkedOnTwiceAtOnce(t *testing.T) {
	inBubble(t, func(w *world) {
		var busy, most int
		w.insert("a", 1)
		w.run(reconcile.Controller[spec, status]{Workers: 4, Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			busy++
			most = max(most, busy)
			time.Sleep(5 * time.Second)
			busy--
			return settle(ctx, s, o)
		})})
		synctest.Wait()
		for i := 2; i <= 4; i++ { // three changes while the first attempt works
			time.Sleep(time.Second)
			w.want("a", i)
		}
		time.Sleep(time.Hour)
		if o := w.get("a"); o.Status.Have != 4 || o.Condition(reconcile.Ready).ObservedGeneration != 4 {
			t.Errorf("a change during work was lost: %+v", o)
		}
		if most != 1 {
			t.Errorf("%d workers at one object", most)
		}
		if n := w.count(); n != 2 {
			t.Errorf("%d attempts, expected 2: three changes during work are one further look", n)
		}
	})
}

func TestStatusOfSomebodyElseWrittenDuringWorkStays(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		first := true
		w.run(reconcile.Controller[spec, status]{Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			if first {
				first = false
				w.update(func(tx *store.Tx) error {
					o, err := things.Get(tx, "a")
					if err != nil {
						return err
					}
					o.Status.Note = "theirs"
					return things.Put(tx, o)
				})
			}
			return settle(ctx, s, o)
		})})
		if o := w.get("a"); o.Status.Note != "theirs" || o.Status.Have != 1 || w.count() != 2 {
			t.Errorf("after %d attempts: %+v; expected both writes, ours by a second attempt", w.count(), o)
		}
	})
}

func TestDeadlineEndsAnAttempt(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		w.run(reconcile.Controller[spec, status]{Deadline: 2 * time.Second, Backoff: reconcile.Backoff{Base: time.Hour}, Reconciler: function(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			<-ctx.Done()
			return reconcile.Result{}, fmt.Errorf("dialling: %w", ctx.Err())
		})})
		time.Sleep(3 * time.Second)
		if c := w.get("a").Condition(reconcile.Ready); c.Reason != "Timeout" || c.Message != "The attempt was not done within 2s." {
			t.Errorf("Ready = %+v", c)
		}
	})
}

func TestReconcilerMaySetItsOwnConditions(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		stop := w.run(reconcile.Controller[spec, status]{Reconciler: function(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			o.SetCondition(store.Condition{Type: reconcile.Ready, Reason: "Resizing", Message: "1 of 3"}, time.Now())
			o.SetCondition(store.Condition{Type: "NodesHealthy", Status: true, Reason: "AllIdle"}, time.Now())
			return reconcile.Result{After: time.Minute}, nil
		})})
		time.Sleep(10 * time.Minute)
		o := w.get("a")
		_ = stop()
		want := []store.Condition{
			{Type: reconcile.Ready, Reason: "Resizing", Message: "1 of 3", ObservedGeneration: 1, Since: w.start.UTC()},
			{Type: "NodesHealthy", Status: true, Reason: "AllIdle", ObservedGeneration: 1, Since: w.start.UTC()},
			{Type: reconcile.Reconciling, Status: true, Reason: "Resizing", Message: "1 of 3", ObservedGeneration: 1, Since: w.start.UTC()},
			{Type: reconcile.Stalled, Reason: "Reconciled", ObservedGeneration: 1, Since: w.start.UTC()},
		}
		if d := cmp.Diff(want, o.Conditions); d != "" {
			t.Errorf("conditions after ten attempts (-want +got):\n%s", d)
		}
	})
}

func TestTriggerCutsTheBackOffShort(t *testing.T) {
	inBubble(t, func(w *world) {
		w.insert("a", 1)
		ring := make(chan string)
		starts := 0
		w.run(reconcile.Controller[spec, status]{
			Backoff: reconcile.Backoff{Base: time.Hour, Cap: time.Hour},
			Also: []reconcile.Trigger{func(ctx context.Context, s *store.Store, enqueue func(string)) error {
				if starts++; starts == 1 {
					panic("first time") // a trigger that ends is started again
				}
				for {
					select {
					case id := <-ring:
						enqueue(id)
					case <-ctx.Done():
						return ctx.Err()
					}
				}
			}},
			Reconciler: w.counted(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
				if c, ok := access.From(ctx); !ok || c.Principal.Name != "thinger" || c.RequestID == "" {
					t.Errorf("the attempt acts as %+v", c)
				}
				return reconcile.Result{}, errors.New("no")
			}),
		})
		w.get("a")
		ring <- "a"
		ring <- "nobody" // an id without an object does no harm
		w.get("a")
		if n := w.count(); n != 2 {
			t.Errorf("%d attempts, expected 2", n)
		}
	})
}

func TestOneBadObjectDoesNotStopTheOthers(t *testing.T) {
	inBubble(t, func(w *world) {
		for i := range 50 {
			w.insert(fmt.Sprintf("n%02d", i), i)
		}
		w.run(reconcile.Controller[spec, status]{Workers: 3, Reconciler: function(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			time.Sleep(time.Second)
			if o.Spec.Want%10 == 0 {
				return reconcile.Result{}, errors.New("unlucky")
			}
			return settle(ctx, s, o)
		})})
		time.Sleep(10 * time.Minute)
		for i := range 50 {
			if o := w.get(fmt.Sprintf("n%02d", i)); o.Condition(reconcile.Ready).Status != (i%10 != 0) {
				t.Errorf("%s: %+v", o.ID, o.Conditions)
			}
		}
	})
}

func TestMetricsTellOfQueueAndAttempts(t *testing.T) {
	inBubble(t, func(w *world) {
		m := reconcile.NewMetrics()
		reg := prometheus.NewPedanticRegistry()
		reg.MustRegister(m)
		w.insert("slow", 1)
		w.insert("waits", 1)
		stop := w.run(reconcile.Controller[spec, status]{Workers: 1, Metrics: m, GiveUp: 1, Reconciler: function(func(ctx context.Context, s *store.Store, o *thing) (reconcile.Result, error) {
			time.Sleep(10 * time.Second)
			return reconcile.Result{}, errors.New("no")
		})})
		time.Sleep(4 * time.Second)
		synctest.Wait()
		if got := gather(t, reg); got["keyfleet_reconcile_queue_depth"] != 1 || got["keyfleet_reconcile_queue_oldest_seconds"] != 4 {
			t.Errorf("while one object is worked on and one waits: %v", got)
		}
		time.Sleep(7 * time.Second)
		synctest.Wait()
		got := gather(t, reg)
		if got["keyfleet_reconcile_attempts_total"] != 1 || got["keyfleet_reconcile_failures_total"] != 1 || got["keyfleet_reconcile_stalled_objects"] != 1 {
			t.Errorf("after one failure: %v", got)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		if _, there := gather(t, reg)["keyfleet_reconcile_queue_depth"]; there {
			t.Error("a controller that does not run shows a queue")
		}
	})
}

// gather returns the values of all metrics by name; a histogram's is its count.
func gather(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			out[f.GetName()] += m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out
}
