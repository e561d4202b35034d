package reconcile

import (
	"sync"
	"time"

	"k8s.io/client-go/util/workqueue"
)

// queue says which object is due. It lays what the runtime must know about each
// object over client-go's work queue, which keeps an object with one worker at a
// time and remembers what is added during work.
type queue struct {
	work workqueue.TypedDelayingInterface[string]

	mu      sync.Mutex // guards the fields below
	objects map[string]*state
}

// state is what is known of one object between attempts.
type state struct {
	asked    time.Time // when a change or trigger asked for a look; zero: nobody did
	next     time.Time // no attempt before, unless asked; zero: none planned
	failures int       // in a row
	stalled  bool
	working  bool
	gone     bool // seen to be deleted while working

	latest seen // newest state the follow loop saw
	begun  seen // latest when the work at hand began
	done   seen // state the last attempt started from, or wrote
}

// seen identifies a state of an object.
type seen struct {
	rev int64
	uid string
	gen int64
}

func (a seen) sameSpec(b seen) bool { return a.uid == b.uid && a.gen == b.gen }

func newQueue() *queue {
	return &queue{
		work:    workqueue.NewTypedDelayingQueue[string](),
		objects: map[string]*state{},
	}
}

func (q *queue) state(id string) *state {
	st := q.objects[id]
	if st == nil {
		st = &state{}
		q.objects[id] = st
	}
	return st
}

// ask makes the object due now.
func (q *queue) ask(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.askLocked(id, q.state(id))
}

func (q *queue) askLocked(id string, st *state) {
	if st.asked.IsZero() {
		st.asked = time.Now()
	}
	q.work.Add(id)
}

// changed takes note of a state that the follow loop saw, and makes the object
// due if it is news.
func (q *queue) changed(id string, now seen) {
	q.mu.Lock()
	defer q.mu.Unlock()
	st := q.state(id)
	st.latest, st.gone = now, false
	if !st.working { // else finish decides
		q.lookIfNews(id, st)
	}
}

// lookIfNews makes the object due if the newest state is not the one the last
// attempt knew. In back-off only another spec counts.
func (q *queue) lookIfNews(id string, st *state) {
	if st.latest.rev <= st.done.rev || st.failures > 0 && st.latest.sameSpec(st.done) {
		return
	}
	q.askLocked(id, st)
}

// removed forgets an object that is gone.
func (q *queue) removed(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if st := q.objects[id]; st != nil && st.working {
		st.gone = true
		return
	}
	delete(q.objects, id)
}

// get waits for an object that is due and marks it as worked on; finish or drop
// must follow. ok is false when the queue has ended.
func (q *queue) get() (id string, failures int, ok bool) {
	for {
		id, shutdown := q.work.Get()
		if shutdown {
			return "", 0, false
		}
		if n, due := q.begin(id); due {
			return id, n, true
		}
		q.work.Done(id)
	}
}

// begin reports whether the object is really due: an older timer may fire before
// the time that a later failure set, and a long wait is made of several timers.
func (q *queue) begin(id string) (failures int, due bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	st := q.objects[id]
	if st == nil {
		return 0, false
	}
	if st.asked.IsZero() {
		if st.next.IsZero() {
			return 0, false
		}
		if left := time.Until(st.next); left > 0 {
			q.work.AddAfter(id, min(left, longest))
			return 0, false
		}
	}
	st.asked, st.working, st.gone, st.begun = time.Time{}, true, false, st.latest
	return st.failures, true
}

// finish ends the work on an object: done is the state it knew and wrote (nil:
// the object could not be read), again asks for another look at once.
func (q *queue) finish(id string, o outcome, done *seen, again bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	defer q.work.Done(id)
	st := q.objects[id]
	st.working, st.failures, st.stalled, st.next = false, o.failures, o.stalled, time.Time{}
	if st.gone {
		delete(q.objects, id)
		return
	}
	st.done = st.begun
	if done != nil {
		st.done = *done
	}
	if o.wait > 0 {
		st.next = time.Now().Add(o.wait)
		q.work.AddAfter(id, min(o.wait, longest))
	}
	if again {
		q.askLocked(id, st)
		return
	}
	q.lookIfNews(id, st)
}

// drop ends the work on an object that turned out to be gone or not ours, or
// whose attempt was cut short by the end of the loop.
func (q *queue) drop(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	defer q.work.Done(id)
	st := q.objects[id]
	st.working, st.failures, st.stalled, st.next, st.done = false, 0, false, time.Time{}, st.begun
	if st.gone || st.latest.rev == 0 {
		delete(q.objects, id)
		return
	}
	q.lookIfNews(id, st)
}

// gauges are the numbers of a queue that are read when somebody asks.
type gauges struct {
	depth   int           // objects due and not yet worked on
	oldest  time.Duration // how long the first of them has waited
	stalled int           // objects given up for now
	next    time.Duration // until the next planned attempt; negative: none is planned
}

func (q *queue) gauges() gauges {
	q.mu.Lock()
	defer q.mu.Unlock()
	g := gauges{next: -1}
	for _, st := range q.objects {
		if st.stalled {
			g.stalled++
		}
		since := st.asked
		if since.IsZero() && !st.next.IsZero() {
			left := time.Until(st.next)
			if left > 0 {
				if g.next < 0 || left < g.next {
					g.next = left
				}
				continue
			}
			since = st.next
		}
		if since.IsZero() || st.working {
			continue
		}
		g.depth++
		g.oldest = max(g.oldest, time.Since(since))
	}
	return g
}

func (q *queue) shutDown() { q.work.ShutDown() }
