package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/store"
)

// receive returns the next n events of a watch.
func receive(t *testing.T, ch <-chan store.Batch, n int) []store.Event {
	t.Helper()
	var out []store.Event
	end := time.After(patience)
	for len(out) < n {
		select {
		case b, ok := <-ch:
			if !ok || b.Err != nil {
				t.Fatalf("the watch ended after %d of %d events: %v", len(out), n, b.Err)
			}
			out = append(out, b.Events...)
		case <-end:
			t.Fatalf("%d of %d events in %s", len(out), n, patience)
		}
	}
	return out
}

func testWatch(t *testing.T, b store.Backend) {
	before := commit(t, b, put("/t/a", "0"), put("/u/a", "0"))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	watch := b.Watch(ctx, "/t/", before)
	r1 := commit(t, b, put("/t/a", "1"), put("/t/b", "1"), put("/u/a", "1"))
	r2 := commit(t, b, del("/t/a"), del("/t/none"))
	commit(t, b, put("/u/a", "2"))
	r3 := commit(t, b, put("/t/a", "3"))
	want := []store.Event{
		{Key: "/t/a", Value: []byte("1"), ModRev: r1},
		{Key: "/t/b", Value: []byte("1"), ModRev: r1},
		{Key: "/t/a", ModRev: r2, Deleted: true},
		{Key: "/t/a", Value: []byte("3"), ModRev: r3},
	}
	if d := cmp.Diff(want, receive(t, watch, len(want))); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
}

// testWatchedIsVisible reads at once what a watch told, as a controller does: a
// read from before the change would make it forget the object for good.
func testWatchedIsVisible(t *testing.T, b store.Backend) {
	const writers, each, watches = 4, 25, 4
	start := commit(t, b, put("/t/start", "0"))
	ctx := deadline(t)
	done := make(chan error, writers+watches)
	for range watches {
		watch := b.Watch(ctx, "/t/", start)
		go func() { done <- readWatched(ctx, b, watch, writers*each) }()
	}
	for w := range writers {
		go func() {
			for i := range each {
				if _, err := b.Commit(ctx, nil, []store.Write{put(fmt.Sprintf("/t/%02d-%04d", w, i), "v")}); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range writers + watches {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// readWatched reads the key of each of n events by Get and by List.
func readWatched(ctx context.Context, b store.Backend, watch <-chan store.Batch, n int) error {
	for n > 0 {
		batch, ok := <-watch
		if !ok || batch.Err != nil {
			return fmt.Errorf("the watch ended with %d events to come: %w", n, batch.Err)
		}
		for _, ev := range batch.Events {
			es, rev, err := b.Get(ctx, ev.Key)
			if err != nil {
				return err
			}
			listed, at, err := b.List(ctx, ev.Key)
			if err != nil {
				return err
			}
			if es[0].ModRev != ev.ModRev || len(listed) != 1 || rev < ev.ModRev || at < ev.ModRev {
				return fmt.Errorf("told of %s at revision %d, but Get at %d shows revision %d and List at %d shows %d keys", ev.Key, ev.ModRev, rev, es[0].ModRev, at, len(listed))
			}
		}
		n -= len(batch.Events)
	}
	return nil
}

func testWatchResumes(t *testing.T, b store.Backend) {
	const n = 300
	start := commit(t, b, put("/t/x", "start"))
	for i := range n {
		commit(t, b, put(fmt.Sprintf("/t/%03d", i), "v"))
	}
	// Read in three pieces, each from where the one before ended.
	after, seen := start, 0
	for _, piece := range []int{1, 100, n - 101} {
		ctx, cancel := context.WithCancel(context.Background())
		watch := b.Watch(ctx, "/t/", after)
		for got := 0; got < piece; {
			batch := receive(t, watch, 1)
			for _, e := range batch {
				if got == piece {
					break // the next piece starts here
				}
				if want := fmt.Sprintf("/t/%03d", seen); e.Key != want {
					t.Fatalf("event %d is of %s, expected %s", seen, e.Key, want)
				}
				after, seen, got = e.ModRev, seen+1, got+1
			}
		}
		cancel()
	}
}

func testWatchEnds(t *testing.T, b store.Backend) {
	rev := commit(t, b, put("/t/a", "1"))
	ctx, cancel := context.WithCancel(context.Background())
	watch := b.Watch(ctx, "/t/", rev)
	cancel()
	end := time.After(patience)
	for {
		select {
		case _, ok := <-watch:
			if !ok {
				return
			}
		case <-end:
			t.Fatal("the channel is not closed after the context ended")
		}
	}
}

// forget makes the backend drop its history.
func forget(t *testing.T, b store.Backend) {
	t.Helper()
	if c, ok := b.(Compacter); ok {
		if err := c.Compact(context.Background()); err != nil {
			t.Fatalf("compacting: %v", err)
		}
		return
	}
	for range 3000 {
		commit(t, b, put("/filler", "x"))
	}
}

func testCompacted(t *testing.T, b store.Backend) {
	old := commit(t, b, put("/t/a", "1"))
	for range 3 {
		commit(t, b, put("/t/a", "2"))
	}
	forget(t, b)
	watch := b.Watch(deadline(t), "/t/", old)
	batch, ok := <-watch
	if !ok || !errors.Is(batch.Err, store.ErrCompacted) {
		t.Fatalf("batch %+v, channel open %t, expected ErrCompacted", batch, ok)
	}
	if _, more := <-watch; more {
		t.Error("a batch after the one with Err")
	}
}

type note struct {
	Text string `json:"text"`
}

var notes = store.NewCollection[note, note]("notes")

func newStore(t *testing.T, b store.Backend) *store.Store {
	t.Helper()
	s, err := store.New(context.Background(), b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// write makes or changes a note.
func write(t *testing.T, s *store.Store, id, text string) {
	t.Helper()
	err := s.Update(context.Background(), func(tx *store.Tx) error {
		o, err := notes.Lookup(tx, id)
		if err != nil {
			return err
		}
		if o != nil {
			o.Spec.Text = text
			return notes.Put(tx, o)
		}
		o = &store.Object[note, note]{Spec: note{text}}
		o.ID = id
		return notes.Insert(tx, o)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, s *store.Store, id string) {
	t.Helper()
	if err := s.Update(context.Background(), func(tx *store.Tx) error { return notes.Delete(tx, id) }); err != nil {
		t.Fatal(err)
	}
}

// followed is a running Follow whose changes come one at a time; a change of
// the first listing's end is "synced", a vanished object "-ID".
func followed(t *testing.T, s *store.Store) (next func() string) {
	ctx, cancel := context.WithCancel(context.Background())
	changes, done := make(chan string), make(chan error, 1)
	go func() {
		done <- notes.Follow(ctx, s, "", func(c store.Change[note, note]) error {
			line := "synced"
			switch {
			case c.ID != "" && c.Object == nil:
				line = "-" + c.ID
			case c.ID != "":
				line = c.ID + "=" + c.Object.Spec.Text
			}
			select {
			case changes <- line:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Follow ended with %v", err)
		}
	})
	return func() string {
		select {
		case c := <-changes:
			return c
		case err := <-done:
			t.Fatalf("Follow ended: %v", err)
		case <-time.After(patience):
			t.Fatal("no change in time")
		}
		return ""
	}
}

func testFollow(t *testing.T, b store.Backend) {
	s := newStore(t, b)
	write(t, s, "a", "1")
	write(t, s, "b", "1")
	next := followed(t, s)
	got := []string{next(), next(), next()}
	write(t, s, "a", "2")
	got = append(got, next())
	remove(t, s, "b")
	got = append(got, next())
	write(t, s, "b", "3")
	got = append(got, next())
	if d := cmp.Diff([]string{"a=1", "b=1", "synced", "a=2", "-b", "b=3"}, got); d != "" {
		t.Errorf("changes (-want +got):\n%s", d)
	}
}

// testFollowCompacted lets history be forgotten while the follower is busy with
// an early change, so that its next watch must fail or be full.
func testFollowCompacted(t *testing.T, b store.Backend) {
	s := newStore(t, b)
	for _, id := range []string{"a", "b", "c"} {
		write(t, s, id, "1")
	}
	next := followed(t, s)
	for range 4 {
		next() // a, b, c, synced
	}
	write(t, s, "a", "2") // the follower gets this one and then waits for us
	for i := range 200 {
		write(t, s, "c", fmt.Sprint(i))
	}
	remove(t, s, "b")
	forget(t, b)
	write(t, s, "d", "new")
	state := map[string]string{"a": "1", "b": "1", "c": "1"}
	for state["d"] != "new" || state["b"] != "" || state["c"] != "199" || state["a"] != "2" {
		line := next()
		if line == "synced" {
			t.Error("the first listing ended twice")
		}
		if line[0] == '-' {
			delete(state, line[1:])
			continue
		}
		id, text := line[:1], line[2:]
		state[id] = text
	}
	if d := cmp.Diff(map[string]string{"a": "2", "c": "199", "d": "new"}, state); d != "" {
		t.Errorf("what the follower knows (-want +got):\n%s", d)
	}
}
