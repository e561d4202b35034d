package storetest

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/store"
)

// testModel compares a backend with a map, over random commits with true and
// false guards.
func testModel(t *testing.T, b store.Backend) {
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		prefix := fmt.Sprintf("/m/%d/", run) // the backend is shared, the keys are not
		m := model{entries: map[string]store.Entry{}}
		keys := rapid.SampledFrom([]string{prefix + "a", prefix + "b", prefix + "b/c", prefix + "d"})
		for range rapid.IntRange(1, 15).Draw(t, "commits") {
			guards := m.drawGuards(t, keys)
			writes := drawWrites(t, keys)
			rev, err := b.Commit(context.Background(), guards, writes)
			if want := m.holds(guards); want && err != nil || !want && !errors.Is(err, store.ErrConflict) {
				t.Fatalf("commit with guards %+v on %+v: %v, expected to hold: %t", guards, m.entries, err, want)
			}
			if err == nil {
				m.apply(t, writes, rev)
			}
			got, _, err := b.List(context.Background(), prefix)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(m.sorted(), append([]store.Entry{}, got...)); d != "" {
				t.Fatalf("after writes %+v (-model +backend):\n%s", writes, d)
			}
		}
	})
}

// model is what a backend should hold.
type model struct {
	entries map[string]store.Entry
	rev     int64
}

func (m *model) holds(guards []store.Guard) bool {
	for _, g := range guards {
		e := m.entries[g.Key]
		if g.CreateRev != 0 && e.CreateRev != g.CreateRev || g.CreateRev == 0 && e.ModRev != g.ModRev {
			return false
		}
	}
	return true
}

func (m *model) apply(t *rapid.T, writes []store.Write, rev int64) {
	if rev < m.rev {
		t.Fatalf("revision %d after %d", rev, m.rev)
	}
	m.rev = rev
	for _, w := range writes {
		old, there := m.entries[w.Key]
		if w.Delete {
			delete(m.entries, w.Key)
			continue
		}
		e := store.Entry{Key: w.Key, Value: w.Value, CreateRev: rev, ModRev: rev}
		if there {
			e.CreateRev = old.CreateRev
		}
		m.entries[w.Key] = e
	}
}

func (m *model) sorted() []store.Entry {
	out := []store.Entry{}
	for _, e := range m.entries {
		out = append(out, e)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Key < out[j].Key })
	return out
}

func (m *model) drawGuards(t *rapid.T, keys *rapid.Generator[string]) []store.Guard {
	var out []store.Guard
	for range rapid.IntRange(0, 2).Draw(t, "guards") {
		k := keys.Draw(t, "guarded")
		e := m.entries[k]
		switch rapid.IntRange(0, 3).Draw(t, "sort") {
		case 0:
			out = append(out, store.Guard{Key: k, ModRev: e.ModRev})
		case 1:
			out = append(out, store.Guard{Key: k, CreateRev: e.CreateRev})
		case 2:
			out = append(out, store.Guard{Key: k})
		default:
			out = append(out, store.Guard{Key: k, ModRev: rapid.Int64Range(1, m.rev+1).Draw(t, "some revision")})
		}
	}
	return out
}

func drawWrites(t *rapid.T, keys *rapid.Generator[string]) []store.Write {
	var out []store.Write
	for _, k := range rapid.SliceOfNDistinct(keys, 1, 3, rapid.ID[string]).Draw(t, "written") {
		w := store.Write{Key: k, Delete: rapid.Bool().Draw(t, "delete")}
		if !w.Delete {
			w.Value = []byte(rapid.StringN(1, 8, -1).Draw(t, "value"))
		}
		out = append(out, w)
	}
	return out
}

type account struct {
	Money int `json:"money"`
}

var accounts = store.NewCollection[account, account]("accounts")

// testTransfers moves money between accounts from many goroutines at once; every
// reader sees the same sum at one revision.
func testTransfers(t *testing.T, b store.Backend) {
	const people, each, workers, moves = 4, 100, 4, 15
	s := newStore(t, b)
	for i := range people {
		err := s.Update(context.Background(), func(tx *store.Tx) error {
			o := &store.Object[account, account]{Spec: account{each}}
			o.ID = fmt.Sprint(i)
			return accounts.Insert(tx, o)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for m := range moves {
				from, to := fmt.Sprint((w+m)%people), fmt.Sprint((w+2*m+1)%people)
				if from == to {
					continue
				}
				if err := s.Update(context.Background(), func(tx *store.Tx) error { return transfer(tx, from, to, m) }); err != nil {
					t.Errorf("transfer: %v", err)
				}
				list, err := accounts.List(s.View(context.Background()), "")
				sum := 0
				for _, o := range list {
					sum += o.Spec.Money
				}
				if err != nil || sum != people*each {
					t.Errorf("a reader sees the sum %d of %d accounts: %v", sum, len(list), err)
				}
			}
		})
	}
	all.Wait()
}

func transfer(tx *store.Tx, from, to string, amount int) error {
	a, err := accounts.Get(tx, from)
	if err != nil {
		return err
	}
	o, err := accounts.Get(tx, to)
	if err != nil {
		return err
	}
	a.Spec.Money -= amount
	o.Spec.Money += amount
	if err := accounts.Put(tx, a); err != nil {
		return err
	}
	return accounts.Put(tx, o)
}

// testCounters adds to one counter from many goroutines, and checks that every
// acknowledged addition was seen exactly once and in order by a follower.
func testCounters(t *testing.T, b store.Backend) {
	const workers, additions = 6, 10
	s := newStore(t, b)
	write(t, s, "counter", "")
	next := followed(t, s)
	next() // the counter
	next() // synced
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for range additions {
				err := s.Update(context.Background(), func(tx *store.Tx) error {
					o, err := notes.Get(tx, "counter")
					if err != nil {
						return err
					}
					o.Spec.Text += "x"
					return notes.Put(tx, o)
				})
				if err != nil {
					t.Errorf("adding: %v", err)
				}
			}
		})
	}
	for n := 1; n <= workers*additions; n++ {
		if got, want := next(), "counter="+strings.Repeat("x", n); got != want {
			t.Errorf("change %d is %q", n, got)
			break
		}
	}
	all.Wait()
}
