// Package storetest is the conformance suite that every store.Backend passes.
//
// Idea: the contract of store.Backend, and of what store.Store and
// Collection.Follow promise on top of it, is a set of tests, so that a second
// backend is held to the letter of the first. A backend's own test hands a
// function that opens an empty one to [Run].
//
// Invariant: a test here asserts only what the contract says; what is special to
// a backend is tested there.
//
// Consequence for the operator: memory, embedded etcd, an etcd cluster, and each
// of them sealed, behave the same.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// A Compacter is a backend that can be told to forget its history now. One
// that is not a Compacter must forget by itself after a few thousand commits.
type Compacter interface {
	Compact(ctx context.Context) error
}

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// Run runs the suite. open returns an empty backend, which open closes with the
// test; Run may close it before.
func Run(t *testing.T, open func(t *testing.T) store.Backend) {
	for _, tc := range []struct {
		name string
		test func(t *testing.T, b store.Backend)
	}{
		{"Get", testGet},
		{"CommitIsAllOrNothing", testCommit},
		{"Guards", testGuards},
		{"CreateRevisionIsAFence", testFence},
		{"List", testList},
		{"ListPages", testListPages},
		{"Model", testModel},
		{"ValuesAreCopied", testCopies},
		{"LargeValues", testLarge},
		{"ManyWritesInOneCommit", testManyWrites},
		{"TTL", testTTL},
		{"WatchOrderAndPrefix", testWatch},
		{"WatchShowsWhatReadsShow", testWatchedIsVisible},
		{"WatchResumes", testWatchResumes},
		{"WatchEndsWithItsContext", testWatchEnds},
		{"WatchOfCompactedRevision", testCompacted},
		{"FollowSeesEverything", testFollow},
		{"FollowSurvivesCompaction", testFollowCompacted},
		{"TransfersConserveTheSum", testTransfers},
		{"CountersLoseNothing", testCounters},
		{"CancelledContext", testCancelled},
		{"Close", testClose},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, open(t)) })
	}
}

// deadline is a context for waiting.
func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func put(key, value string) store.Write { return store.Write{Key: key, Value: []byte(value)} }

func del(key string) store.Write { return store.Write{Key: key, Delete: true} }

// commit applies writes that must succeed.
func commit(t testing.TB, b store.Backend, writes ...store.Write) int64 {
	t.Helper()
	rev, err := b.Commit(context.Background(), nil, writes)
	if err != nil {
		t.Fatalf("committing: %v", err)
	}
	return rev
}

// get reads one key that may be absent.
func get(t testing.TB, b store.Backend, key string) store.Entry {
	t.Helper()
	es, _, err := b.Get(context.Background(), key)
	if err != nil {
		t.Fatalf("reading %s: %v", key, err)
	}
	return es[0]
}

// contents returns key=value of everything under the prefix, in the backend's order.
func contents(t testing.TB, b store.Backend, prefix string) []string {
	t.Helper()
	es, _, err := b.List(context.Background(), prefix)
	if err != nil {
		t.Fatalf("listing %s: %v", prefix, err)
	}
	out := []string{}
	for _, e := range es {
		out = append(out, e.Key+"="+string(e.Value))
	}
	return out
}

func testGet(t *testing.T, b store.Backend) {
	first := commit(t, b, put("/t/a", "1"), put("/t/b", ""))
	second := commit(t, b, put("/t/a", "2"))
	if second <= first {
		t.Errorf("revision %d follows %d; revisions grow", second, first)
	}
	es, rev, err := b.Get(context.Background(), "/t/b", "/t/none", "/t/a")
	if err != nil {
		t.Fatal(err)
	}
	if rev < second {
		t.Errorf("read at revision %d after a commit of %d", rev, second)
	}
	if es[1].Key != "/t/none" || es[1].ModRev != 0 || es[1].CreateRev != 0 || es[1].Value != nil {
		t.Errorf("an absent key is %+v", es[1])
	}
	if a := es[2]; a.Key != "/t/a" || string(a.Value) != "2" || a.CreateRev != first || a.ModRev != second {
		t.Errorf("/t/a is %+v, expected value 2 created at %d, changed at %d", a, first, second)
	}
	if e := es[0]; e.Key != "/t/b" || len(e.Value) != 0 || e.ModRev != first {
		t.Errorf("a key with an empty value is %+v", e)
	}
}

func testCommit(t *testing.T, b store.Backend) {
	rev := commit(t, b, put("/t/a", "1"), put("/t/b", "1"), put("/t/c", "1"))
	for _, k := range []string{"/t/a", "/t/b", "/t/c"} {
		if e := get(t, b, k); e.ModRev != rev {
			t.Errorf("%s has revision %d, expected that of its commit, %d", k, e.ModRev, rev)
		}
	}
	commit(t, b, put("/t/a", "2"), del("/t/b"), del("/t/none"), put("/t/d", "2"))
	want := []string{"/t/a=2", "/t/c=1", "/t/d=2"}
	if d := cmp.Diff(want, contents(t, b, "/t/")); d != "" {
		t.Errorf("after a mixed commit (-want +got):\n%s", d)
	}
	_, err := b.Commit(context.Background(), []store.Guard{{Key: "/t/a", ModRev: 1 << 40}},
		[]store.Write{put("/t/a", "3"), del("/t/c"), put("/t/e", "3")})
	if !errors.Is(err, store.ErrConflict) {
		t.Errorf("a commit with a false guard: %v, expected ErrConflict", err)
	}
	if d := cmp.Diff(want, contents(t, b, "/t/")); d != "" {
		t.Errorf("a refused commit changed something (-want +got):\n%s", d)
	}
}

func testGuards(t *testing.T, b store.Backend) {
	old := commit(t, b, put("/t/a", "1"))
	cur := commit(t, b, put("/t/a", "2"))
	for _, tc := range []struct {
		reason string
		guards []store.Guard
		ok     bool
	}{
		{"no guards", nil, true},
		{"the current revision", []store.Guard{{Key: "/t/a", ModRev: cur}}, true},
		{"an older revision", []store.Guard{{Key: "/t/a", ModRev: old}}, false},
		{"absent, but it is there", []store.Guard{{Key: "/t/a"}}, false},
		{"absent", []store.Guard{{Key: "/t/none"}}, true},
		{"a revision of an absent key", []store.Guard{{Key: "/t/none", ModRev: cur}}, false},
		{"several, all true", []store.Guard{{Key: "/t/a", ModRev: cur}, {Key: "/t/none"}}, true},
		{"several, one false", []store.Guard{{Key: "/t/none"}, {Key: "/t/a", ModRev: old}}, false},
	} {
		_, err := b.Commit(context.Background(), tc.guards, []store.Write{put("/t/other", tc.reason)})
		if tc.ok && err != nil || !tc.ok && !errors.Is(err, store.ErrConflict) {
			t.Errorf("%s: %v, expected it to hold: %t", tc.reason, err, tc.ok)
		}
	}
}

func testFence(t *testing.T, b store.Backend) {
	created := commit(t, b, put("/leader/x/1", "me"))
	commit(t, b, put("/leader/x/1", "still me"))
	fence := []store.Guard{{Key: "/leader/x/1", CreateRev: created}}
	write := []store.Write{put("/t/a", "1")}
	if _, err := b.Commit(context.Background(), fence, write); err != nil {
		t.Errorf("a change of the key does not break the fence: %v", err)
	}
	commit(t, b, del("/leader/x/1"))
	if _, err := b.Commit(context.Background(), fence, write); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a deleted key breaks the fence: %v", err)
	}
	commit(t, b, put("/leader/x/1", "another"))
	if _, err := b.Commit(context.Background(), fence, write); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a key made anew does not mend the fence: %v", err)
	}
}

func testList(t *testing.T, b store.Backend) {
	commit(t, b, put("/t/b", "1"), put("/t/a/2", "1"), put("/t/a", "1"), put("/t/a-1", "1"), put("/tt", "1"), put("/t/é", "1"), put("/t/B", "1"))
	for _, tc := range []struct {
		prefix string
		want   []string
	}{
		{"/t/", []string{"/t/B=1", "/t/a=1", "/t/a-1=1", "/t/a/2=1", "/t/b=1", "/t/é=1"}},
		{"/t/a", []string{"/t/a=1", "/t/a-1=1", "/t/a/2=1"}},
		{"/t/a/", []string{"/t/a/2=1"}},
		{"/none/", []string{}},
	} {
		if d := cmp.Diff(tc.want, contents(t, b, tc.prefix)); d != "" {
			t.Errorf("prefix %s, in byte order (-want +got):\n%s", tc.prefix, d)
		}
	}
	if all := contents(t, b, ""); len(all) != 7 {
		t.Errorf("the empty prefix lists %d keys of 7: %v", len(all), all)
	}
}

func testListPages(t *testing.T, b store.Backend) {
	const n = 1234 // more than any backend reads at once
	var writes []store.Write
	for i := range n {
		writes = append(writes, put(fmt.Sprintf("/t/%04d", i), "v"))
	}
	rev := commit(t, b, writes...)
	es, at, err := b.List(context.Background(), "/t/")
	if err != nil || len(es) != n || at < rev {
		t.Fatalf("%d keys of %d at revision %d of %d: %v", len(es), n, at, rev, err)
	}
	for i, e := range es {
		if e.Key != fmt.Sprintf("/t/%04d", i) || e.ModRev != rev || e.CreateRev != rev {
			t.Fatalf("key %d is %+v", i, e)
		}
	}
}

func testCopies(t *testing.T, b store.Backend) {
	value := []byte("before")
	commit(t, b, store.Write{Key: "/t/a", Value: value})
	copy(value, "XXXXXX")
	e := get(t, b, "/t/a")
	if string(e.Value) != "before" {
		t.Errorf("the backend kept the caller's memory: %q", e.Value)
	}
}

func testLarge(t *testing.T, b store.Backend) {
	big := bytes.Repeat([]byte("0123456789abcdef"), store.MaxValue/16)
	commit(t, b, store.Write{Key: "/t/a", Value: big})
	if e := get(t, b, "/t/a"); !bytes.Equal(e.Value, big) {
		t.Errorf("a value of %d bytes came back with %d", len(big), len(e.Value))
	}
	_, err := b.Commit(context.Background(), nil, []store.Write{put("/t/b", "1"), {Key: "/t/a", Value: append(big, big...)}})
	if !errors.Is(err, fault.TooLarge) {
		t.Errorf("a value over the limit: %v, expected fault.TooLarge", err)
	}
	if e := get(t, b, "/t/b"); e.ModRev != 0 {
		t.Error("a refused commit wrote its other key")
	}
}

func testManyWrites(t *testing.T, b store.Backend) {
	const n = 2000
	var guards []store.Guard
	var writes []store.Write
	for i := range n {
		k := fmt.Sprintf("/t/%04d", i)
		guards, writes = append(guards, store.Guard{Key: k}), append(writes, put(k, "v"))
	}
	if _, err := b.Commit(context.Background(), guards, writes); err != nil {
		t.Fatalf("%d guarded writes: %v", n, err)
	}
	if got := contents(t, b, "/t/"); len(got) != n {
		t.Errorf("%d keys of %d", len(got), n)
	}
}

func testTTL(t *testing.T, b store.Backend) {
	rev := commit(t, b,
		store.Write{Key: "/t/short", Value: []byte("1"), TTL: 2 * time.Second},
		store.Write{Key: "/t/long", Value: []byte("1"), TTL: time.Hour},
		store.Write{Key: "/t/kept", Value: []byte("1"), TTL: 2 * time.Second},
		store.Write{Key: "/t/plain", Value: []byte("1")})
	commit(t, b, put("/t/kept", "2"), // written again without a TTL: it stays
		store.Write{Key: "/t/short", Value: []byte("2"), KeepTTL: true},
		store.Write{Key: "/t/plain", Value: []byte("2"), KeepTTL: true})
	start := time.Now()
	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	for batch := range b.Watch(ctx, "/t/", rev) {
		if batch.Err != nil {
			t.Fatal(batch.Err)
		}
		if e := batch.Events[len(batch.Events)-1]; e.Deleted {
			if e.Key != "/t/short" {
				t.Errorf("%s vanished", e.Key)
			}
			break
		}
	}
	if took := time.Since(start); took < time.Second || ctx.Err() != nil {
		t.Errorf("a TTL of 2 s was over after %s (%v)", took, ctx.Err())
	}
	if d := cmp.Diff([]string{"/t/kept=2", "/t/long=1", "/t/plain=2"}, contents(t, b, "/t/")); d != "" {
		t.Errorf("afterwards (-want +got):\n%s", d)
	}
}

func testCancelled(t *testing.T, b store.Backend) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := b.Get(ctx, "/t/a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get: %v", err)
	}
	if _, _, err := b.List(ctx, "/t/"); !errors.Is(err, context.Canceled) {
		t.Errorf("List: %v", err)
	}
	if _, err := b.Commit(ctx, nil, []store.Write{put("/t/a", "1")}); !errors.Is(err, context.Canceled) {
		t.Errorf("Commit: %v", err)
	}
}

func testClose(t *testing.T, b store.Backend) {
	rev := commit(t, b, put("/t/a", "1"))
	watch := b.Watch(context.Background(), "/t/", rev)
	if err := b.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	end := time.After(patience)
	for open := true; open; {
		select {
		case _, open = <-watch:
		case <-end:
			t.Fatal("a watch outlives its backend")
		}
	}
	if _, _, err := b.Get(context.Background(), "/t/a"); err == nil || strings.Contains(err.Error(), "panic") {
		t.Errorf("Get after Close: %v", err)
	}
	if _, err := b.Commit(context.Background(), nil, []store.Write{put("/t/a", "1")}); err == nil {
		t.Error("Commit after Close succeeded")
	}
	if err := b.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
