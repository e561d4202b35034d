package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

type spec struct {
	Size int               `json:"size"`
	Tags map[string]string `json:"tags,omitempty"`
}

type status struct {
	Seen int `json:"seen"`
}

type object = store.Object[spec, status]

var things = store.NewCollection[spec, status]("things")

func newStore(t *testing.T) (*store.Store, *store.Memory) {
	t.Helper()
	m := store.NewMemory()
	t.Cleanup(func() { _ = m.Close() })
	s, err := store.New(context.Background(), m)
	if err != nil {
		t.Fatal(err)
	}
	return s, m
}

func update(t *testing.T, s *store.Store, fn func(tx *store.Tx) error) {
	t.Helper()
	if err := s.Update(context.Background(), fn); err != nil {
		t.Fatal(err)
	}
}

func insert(t *testing.T, s *store.Store, id string, size int) *object {
	t.Helper()
	o := &object{Spec: spec{Size: size}}
	o.ID = id
	update(t, s, func(tx *store.Tx) error { return things.Insert(tx, o) })
	return read(t, s, id)
}

// read returns the object, nil if it is not there.
func read(t *testing.T, s *store.Store, id string) *object {
	t.Helper()
	o, err := things.Lookup(s.View(context.Background()), id)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestInsert(t *testing.T) {
	s, _ := newStore(t)
	o := insert(t, s, "a", 1)
	if o.Generation != 1 || len(o.UID) != 32 || o.Created.IsZero() || o.Revision == 0 {
		t.Errorf("a new object: %+v", o.Meta)
	}
	for id, want := range map[string]error{"a": fault.Conflict, "A": nil, "": nil} {
		o := &object{}
		o.ID = id
		err := s.Update(context.Background(), func(tx *store.Tx) error { return things.Insert(tx, o) })
		if err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("inserting %q: %v", id, err)
		}
	}
}

func TestPut(t *testing.T) {
	s, _ := newStore(t)
	first := insert(t, s, "a", 1)
	put := func(o object) error {
		return s.Update(context.Background(), func(tx *store.Tx) error { return things.Put(tx, &o) })
	}
	if err := put(*first); err != nil || read(t, s, "a").Generation != 1 {
		t.Errorf("writing the same again: %v, generation %d", err, read(t, s, "a").Generation)
	}
	second := read(t, s, "a")
	second.Status.Seen = 7
	if err := put(*second); err != nil || read(t, s, "a").Generation != 1 {
		t.Errorf("a change of the status: %v, generation %d", err, read(t, s, "a").Generation)
	}
	third := read(t, s, "a")
	third.Spec.Size = 2
	if err := put(*third); err != nil || read(t, s, "a").Generation != 2 {
		t.Errorf("a change of the spec: %v, generation %d", err, read(t, s, "a").Generation)
	}
	if err := put(*third); !errors.Is(err, fault.Precondition) {
		t.Errorf("writing what was read before a change: %v", err)
	}
	update(t, s, func(tx *store.Tx) error { return things.Delete(tx, "a") })
	if err := put(*third); !errors.Is(err, fault.NotFound) {
		t.Errorf("writing what is gone: %v", err)
	}
	insert(t, s, "a", 2)
	third.Revision = 0
	if err := put(*third); !errors.Is(err, fault.Precondition) {
		t.Errorf("writing over another object of the same id: %v", err)
	}
}

func TestPutStatusTouchesNothingElse(t *testing.T) {
	s, _ := newStore(t)
	o := insert(t, s, "a", 1)
	etag := o.ETag(s)
	o.Spec.Size, o.Finalizers, o.Status.Seen = 99, []string{"x"}, 5
	o.SetCondition(store.Condition{Type: "Ready", Status: true, Reason: "R"}, time.Now())
	update(t, s, func(tx *store.Tx) error { return things.PutStatus(tx, o) })
	got := read(t, s, "a")
	if got.Spec.Size != 1 || got.Finalizers != nil || got.Generation != 1 || got.Status.Seen != 5 || !got.Condition("Ready").Status {
		t.Errorf("after PutStatus: %+v", got)
	}
	if got.ETag(s) != etag {
		t.Errorf("a status write changed the ETag from %s to %s", etag, got.ETag(s))
	}
	update(t, s, func(tx *store.Tx) error { return things.PutStatus(tx, got) })
	if again := read(t, s, "a"); again.Revision != got.Revision {
		t.Error("an unchanged status was written")
	}
	err := s.Update(context.Background(), func(tx *store.Tx) error { return things.PutStatus(tx, o) })
	if !errors.Is(err, fault.Precondition) {
		t.Errorf("a status made from an older state: %v", err)
	}
}

func TestDeleteWaitsForFinalizers(t *testing.T) {
	s, _ := newStore(t)
	o := insert(t, s, "a", 1)
	o.Finalizers = []string{"x", "y"}
	update(t, s, func(tx *store.Tx) error { return things.Put(tx, o) })
	for range 2 { // again and again without harm
		update(t, s, func(tx *store.Tx) error { return things.Delete(tx, "a") })
	}
	got := read(t, s, "a")
	if got == nil || got.Deleting.IsZero() || got.Generation != 2 {
		t.Fatalf("marked: %+v", got)
	}
	for _, name := range []string{"x", "none", "y"} {
		if read(t, s, "a") == nil {
			t.Errorf("gone before %s", name)
		}
		update(t, s, func(tx *store.Tx) error { return things.RemoveFinalizer(tx, "a", name) })
	}
	if got := read(t, s, "a"); got != nil {
		t.Errorf("still there: %+v", got)
	}
	update(t, s, func(tx *store.Tx) error { return things.Delete(tx, "a") }) // absent is no error
}

func TestTxReadsItsOwnWrites(t *testing.T) {
	s, _ := newStore(t)
	insert(t, s, "a", 1)
	insert(t, s, "b", 1)
	update(t, s, func(tx *store.Tx) error {
		if err := things.Delete(tx, "a"); err != nil {
			return err
		}
		c := &object{Spec: spec{Size: 3}}
		c.ID = "c"
		if err := things.Insert(tx, c); err != nil {
			return err
		}
		b, err := things.Get(tx, "b")
		if err != nil {
			return err
		}
		b.Spec.Size = 2
		if err := things.Put(tx, b); err != nil {
			return err
		}
		if o, err := things.Lookup(tx, "a"); o != nil || err != nil {
			t.Errorf("a deleted object reads as %+v, %v", o, err)
		}
		list, err := things.List(tx, "")
		var got []string
		for _, o := range list {
			got = append(got, fmt.Sprint(o.ID, o.Spec.Size))
		}
		if d := cmp.Diff([]string{"b2", "c3"}, got); d != "" || err != nil {
			t.Errorf("the list inside the transaction, %v (-want +got):\n%s", err, d)
		}
		again := &object{Spec: spec{Size: 9}} // deleted and inserted in one transaction
		again.ID = "a"
		return things.Insert(tx, again)
	})
	if a := read(t, s, "a"); a.Spec.Size != 9 || a.Generation != 1 {
		t.Errorf("replaced object: %+v", a)
	}
}

func TestErrorOfTheFunctionWritesNothing(t *testing.T) {
	s, _ := newStore(t)
	committed := false
	mine := errors.New("mine")
	err := s.Update(context.Background(), func(tx *store.Tx) error {
		tx.OnCommit(func(int64) { committed = true })
		o := &object{}
		o.ID = "a"
		if err := things.Insert(tx, o); err != nil {
			return err
		}
		return mine
	})
	if err != mine || committed || read(t, s, "a") != nil {
		t.Errorf("%v, committed %t, object %+v", err, committed, read(t, s, "a"))
	}
}

func TestUpdateRunsAgainWhenWhatItReadWasChanged(t *testing.T) {
	s, _ := newStore(t)
	insert(t, s, "a", 1)
	runs, commits := 0, 0
	update(t, s, func(tx *store.Tx) error {
		runs++
		tx.OnCommit(func(rev int64) { commits++ })
		o, err := things.Get(tx, "a")
		if err != nil {
			return err
		}
		if runs < 3 { // somebody else is faster, twice
			update(t, s, func(tx *store.Tx) error {
				o, err := things.Get(tx, "a")
				if err != nil {
					return err
				}
				o.Spec.Size += 10
				return things.Put(tx, o)
			})
		}
		o.Spec.Size++
		return things.Put(tx, o)
	})
	if got := read(t, s, "a").Spec.Size; got != 22 || runs != 3 || commits != 1 {
		t.Errorf("size %d after %d runs and %d commits, expected 22, 3, 1", got, runs, commits)
	}
}

func TestUpdateGuardsWhatItOnlyRead(t *testing.T) {
	s, _ := newStore(t)
	insert(t, s, "limit", 1)
	runs := 0
	update(t, s, func(tx *store.Tx) error {
		runs++
		limit, err := things.Get(tx, "limit")
		if err != nil {
			return err
		}
		absent, err := things.Lookup(tx, "absent")
		if err != nil {
			return err
		}
		switch runs {
		case 1:
			limit.Spec.Size = 5
			update(t, s, func(tx *store.Tx) error { return things.Put(tx, limit) })
		case 2:
			insert(t, s, "absent", 1)
		}
		o := &object{Spec: spec{Size: limit.Spec.Size, Tags: map[string]string{"absent": fmt.Sprint(absent == nil)}}}
		o.ID = fmt.Sprint("made", runs)
		return things.Insert(tx, o)
	})
	if o := read(t, s, "made3"); o == nil || o.Spec.Size != 5 || o.Spec.Tags["absent"] != "false" {
		t.Errorf("decided on a state that was gone: %+v after %d runs", o, runs)
	}
}

func TestUpdateGivesUpWhenOthersNeverStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newStore(t)
		insert(t, s, "a", 1)
		err := s.Update(context.Background(), func(tx *store.Tx) error {
			o, err := things.Get(tx, "a")
			if err != nil {
				return err
			}
			update(t, s, func(tx *store.Tx) error {
				other := *o
				other.Spec.Size++
				return things.Put(tx, &other)
			})
			o.Spec.Size = 0
			return things.Put(tx, o)
		})
		if !errors.Is(err, fault.Unavailable) || fault.From(err).RetryAfter == 0 {
			t.Errorf("%v", err)
		}
	})
}

func TestTooLargeObjectNamesItsKey(t *testing.T) {
	s, _ := newStore(t)
	o := &object{Spec: spec{Tags: map[string]string{"x": strings.Repeat("x", store.MaxValue)}}}
	o.ID = "a"
	err := s.Update(context.Background(), func(tx *store.Tx) error { return things.Insert(tx, o) })
	if !errors.Is(err, fault.TooLarge) || fault.From(err).Target != "/things/a" {
		t.Errorf("%v", err)
	}
}

func TestFencedStoreWritesOnlyWhileTheFenceHolds(t *testing.T) {
	s, m := newStore(t)
	fence, lost, resign, err := m.Campaign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f := s.Fenced(fence)
	insert(t, f, "a", 1)
	resign()
	resign() // twice without harm
	<-lost
	err = f.Update(context.Background(), func(tx *store.Tx) error { return things.Delete(tx, "a") })
	if !errors.Is(err, store.ErrFenced) || read(t, f, "a") == nil {
		t.Errorf("a deposed leader deleted: %v", err)
	}
	update(t, s, func(tx *store.Tx) error { return things.Delete(tx, "a") }) // the plain store is not fenced
}

func TestETagNamesIncarnationObjectAndGeneration(t *testing.T) {
	s, m := newStore(t)
	o := insert(t, s, "a", 1)
	tags := map[string]string{"first": o.ETag(s)}
	o.Spec.Size = 2
	update(t, s, func(tx *store.Tx) error { return things.Put(tx, o) })
	tags["changed"] = read(t, s, "a").ETag(s)
	update(t, s, func(tx *store.Tx) error { return things.Delete(tx, "a") })
	tags["another object"] = insert(t, s, "a", 1).ETag(s)
	same, err := store.New(context.Background(), m)
	if err != nil || same.Incarnation() != s.Incarnation() {
		t.Errorf("opening again gave incarnation %v, %v", same, err)
	}
	seen := map[string]string{}
	for what, tag := range tags {
		if seen[tag] != "" {
			t.Errorf("%s and %s have the same ETag %s", what, seen[tag], tag)
		}
		seen[tag] = what
	}
}

func TestConditionSinceMovesOnlyWithStatus(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	m := store.Meta{Generation: 3}
	m.SetCondition(store.Condition{Type: "Ready", Status: false, Reason: "A"}, at(1))
	m.SetCondition(store.Condition{Type: "Ready", Status: false, Reason: "B"}, at(2))
	if c := m.Condition("Ready"); !c.Since.Equal(at(1)) || c.Reason != "B" || c.ObservedGeneration != 3 {
		t.Errorf("same status: %+v", c)
	}
	m.SetCondition(store.Condition{Type: "Ready", Status: true, Reason: "C"}, at(3))
	if c := m.Condition("Ready"); !c.Since.Equal(at(3)) || len(m.Conditions) != 1 {
		t.Errorf("another status: %+v", m.Conditions)
	}
	if c := m.Condition("none"); c.Type != "" {
		t.Errorf("a condition that was never set: %+v", c)
	}
}

func TestTTLCollectionForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newStore(t)
		short := store.Collection[spec, status]{Kind: "short", TTL: time.Minute}
		o := &object{}
		o.ID = "a"
		update(t, s, func(tx *store.Tx) error { return short.Insert(tx, o) })
		for _, tc := range []struct {
			after time.Duration
			there bool
		}{{59 * time.Second, true}, {2 * time.Second, false}} {
			time.Sleep(tc.after)
			synctest.Wait()
			got, err := short.Lookup(s.View(context.Background()), "a")
			if err != nil || (got != nil) != tc.there {
				t.Errorf("after %s more: %+v, %v", tc.after, got, err)
			}
		}
	})
}

func TestFollowWithPrefixAndErrorOfItsFunction(t *testing.T) {
	s, _ := newStore(t)
	insert(t, s, "prod/a", 1)
	insert(t, s, "test/a", 1)
	mine := errors.New("mine")
	var got []string
	err := things.Follow(context.Background(), s, "prod/", func(c store.Change[spec, status]) error {
		got = append(got, c.ID)
		if c.ID == "" {
			insert(t, s, "test/b", 1)
			insert(t, s, "prod/b", 1)
		}
		if c.ID == "prod/b" {
			return mine
		}
		return nil
	})
	if d := cmp.Diff([]string{"prod/a", "", "prod/b"}, got); err != mine || d != "" {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
}

// TestGenerationCountsChangesOfSpec compares generations with a model over any
// sequence of writes.
func TestGenerationCountsChangesOfSpec(t *testing.T) {
	s, _ := newStore(t)
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		id := fmt.Sprint("g", run)
		o := insert(t, s, id, 0)
		generation := int64(1)
		for range rapid.IntRange(0, 10).Draw(rt, "writes") {
			size := rapid.IntRange(0, 2).Draw(rt, "size")
			if size != o.Spec.Size {
				generation++
			}
			o.Spec.Size, o.Status.Seen = size, rapid.IntRange(0, 2).Draw(rt, "seen")
			onlyStatus := rapid.Bool().Draw(rt, "status only")
			if onlyStatus && size != read(t, s, id).Spec.Size {
				generation-- // PutStatus leaves the spec
			}
			update(t, s, func(tx *store.Tx) error {
				if onlyStatus {
					return things.PutStatus(tx, o)
				}
				return things.Put(tx, o)
			})
			if o = read(t, s, id); o.Generation != generation {
				rt.Fatalf("generation %d, expected %d", o.Generation, generation)
			}
		}
	})
}
