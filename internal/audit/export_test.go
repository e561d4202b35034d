package audit

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/store"
)

// thing is what the tests change under audit.
type thing struct{ N int }

var things = store.NewCollection[thing, struct{}]("things")

func newStore(t *testing.T) *store.Store {
	t.Helper()
	b := store.NewMemory()
	t.Cleanup(func() { b.Close() })
	s, err := store.New(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// change makes thing n through a gate, with its record in the same transaction.
func change(ctx context.Context, l *Log, s *store.Store, n int) error {
	gate := access.NewGate(access.Config{Store: s, Recorder: l})
	op := access.Op{Action: "things/write", Resource: fmt.Sprintf("/things/%04d", n)}
	return gate.Change(access.AsSystem(ctx, "test"), s, op, func(tx *store.Tx) error {
		return things.Insert(tx, &store.Object[thing, struct{}]{Meta: store.Meta{ID: fmt.Sprintf("%04d", n)}, Spec: thing{n}})
	})
}

// lines returns the resources of all lines of the live and rotated files with the action.
func lines(t *testing.T, path, action string) []string {
	t.Helper()
	l := &Log{cfg: Config{Path: path}}
	var out []string
	found, err := l.search(context.Background(), Query{Action: action, Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range found {
		out = append(out, e.Record.Resource)
	}
	return out
}

func TestExportInCommitOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.jsonl")
		l := open(t, Config{Path: path, Name: "server"})
		s := newStore(t)
		var want []string
		for i := range 120 { // more than two batches wait when the exporter starts
			if err := change(t.Context(), l, s, i); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- (&Exporter{Log: l}).Run(ctx, s) }()
		for i := 120; i < 150; i++ {
			if err := change(t.Context(), l, s, i); err != nil {
				t.Fatal(err)
			}
			if err := l.Append(t.Context(), rec(i)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for i := range 150 {
			want = append(want, fmt.Sprintf("/things/%04d", i))
		}
		if got := lines(t, path, "things/write"); !slices.Equal(got, want) {
			t.Errorf("exported %v", got)
		}
		left, err := Records.List(s.View(t.Context()), "")
		if err != nil || len(left) != 0 {
			t.Errorf("%d records are left in the store, %v", len(left), err)
		}
		anchor, err := Anchors.Get(s.View(t.Context()), "server")
		if head, herr := l.Head(t.Context()); err != nil || herr != nil || Head(anchor.Spec).Seq > head.Seq || anchor.Spec.Seq < 150 {
			t.Errorf("anchor %+v, head %+v", anchor, head)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestExporterWaitsForTheFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.jsonl")
		l := open(t, Config{Path: path})
		s := newStore(t)
		if err := change(t.Context(), l, s, 1); err != nil {
			t.Fatal(err)
		}
		l.Close() // nothing can be written any more
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- (&Exporter{Log: l}).Run(ctx, s) }()
		time.Sleep(time.Hour)
		left, err := Records.List(s.View(t.Context()), "")
		if err != nil || len(left) != 1 {
			t.Errorf("%d records in the store, %v: a record that is not in the file must stay", len(left), err)
		}
		cancel()
		<-done
		l = open(t, Config{Path: path})
		ctx, cancel = context.WithCancel(t.Context())
		go func() { done <- (&Exporter{Log: l}).Run(ctx, s) }()
		time.Sleep(time.Minute)
		if got := lines(t, path, "things/write"); len(got) != 1 {
			t.Errorf("exported %v", got)
		}
		cancel()
		<-done
	})
}

func TestLossGoesOnRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "audit.jsonl")
		s := newStore(t)
		run := func(path string, n int) {
			l := open(t, Config{Path: path})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- (&Exporter{Log: l}).Run(ctx, s) }()
			appendN(t, l, n, n+5)
			time.Sleep(2 * time.Minute) // the anchor moves at least once a minute
			cancel()
			<-done
			l.Close()
		}
		run(path, 0)
		run(path, 5)
		if gaps := lines(t, path, "Keyfleet/audit/gap"); len(gaps) != 0 {
			t.Errorf("a gap is on record where there is none")
		}
		other := filepath.Join(dir, "other.jsonl") // the file was taken away
		run(other, 10)
		if gaps := lines(t, other, "Keyfleet/audit/gap"); len(gaps) != 1 {
			t.Errorf("%d gaps on record, want 1", len(gaps))
		}
		run(other, 15)
		if gaps := lines(t, other, "Keyfleet/audit/gap"); len(gaps) != 1 {
			t.Errorf("%d gaps on record after a further start, want still 1", len(gaps))
		}
	})
}

func TestReaderIsItselfOnRecord(t *testing.T) {
	l := open(t, Config{Path: filepath.Join(t.TempDir(), "audit.jsonl")})
	s := newStore(t)
	r := Reader{Log: l, Gate: access.NewGate(access.Config{Store: s, Recorder: l})}
	if _, err := r.Search(t.Context(), Query{}); err == nil {
		t.Error("a caller without a credential read the audit file")
	}
	found, err := r.Search(access.AsSystem(t.Context(), "test"), Query{Action: "Keyfleet/audit/read"})
	if err != nil || len(found) != 2 {
		t.Fatalf("found %d, %v; want the refused and the allowed read", len(found), err)
	}
	if got := found[0].Record.Outcome + " " + found[1].Record.Outcome; !strings.EqualFold(got, "denied allowed") {
		t.Errorf("outcomes %s", got)
	}
}
