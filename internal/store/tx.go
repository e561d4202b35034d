package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// maxAttempts bounds how often Update runs its function when others keep
// changing what it read.
const maxAttempts = 32

// Tx is a transaction, or a read-only view. It is for one goroutine.
type Tx struct {
	ctx    context.Context
	store  *Store
	reads  map[string]Entry // nil in a view
	writes map[string]Write
	order  []string // keys of writes in first-write order
	after  []func(rev int64)
}

// View returns a read-only Tx that always reads the newest committed state.
func (s *Store) View(ctx context.Context) *Tx { return &Tx{ctx: ctx, store: s} }

// Update runs fn and commits what it wrote if nothing it read with Get was
// changed meanwhile; otherwise it runs fn again from the start, so fn must have
// no effect outside the Tx. Lists inside fn see committed state but are not
// guarded: guard a rule over many objects with a key of its own. An error of
// fn is returned as it is and nothing is written.
func (s *Store) Update(ctx context.Context, fn func(tx *Tx) error) error {
	for attempt := 0; attempt < maxAttempts; attempt++ {
		tx := &Tx{ctx: ctx, store: s, reads: map[string]Entry{}, writes: map[string]Write{}}
		if err := fn(tx); err != nil {
			return err
		}
		rev, err := tx.commit()
		if err == nil {
			for _, f := range tx.after {
				f(rev)
			}
			return nil
		}
		if !errors.Is(err, ErrConflict) {
			return err
		}
		if err := yield(ctx, attempt); err != nil {
			return err
		}
	}
	return fault.New(fault.Unavailable, "", "The resource is being changed by many callers at once.").After(time.Second)
}

// yield lets others go first after a conflict: at once at first, then after a
// random time that grows to 64 ms.
func yield(ctx context.Context, attempt int) error {
	if attempt < 2 {
		return ctx.Err()
	}
	t := time.NewTimer(mrand.N(time.Millisecond << min(attempt, 6)))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Context returns the context of the transaction.
func (tx *Tx) Context() context.Context { return tx.ctx }

// Store returns the store the transaction runs on.
func (tx *Tx) Store() *Store { return tx.store }

// OnCommit registers f to run after a successful commit, with its revision.
func (tx *Tx) OnCommit(f func(rev int64)) { tx.after = append(tx.after, f) }

func (tx *Tx) commit() (int64, error) {
	if len(tx.writes) == 0 {
		return 0, nil
	}
	guards := make([]Guard, 0, len(tx.reads)+1)
	for k, e := range tx.reads {
		guards = append(guards, Guard{Key: k, ModRev: e.ModRev})
	}
	if f := tx.store.fence; f != nil {
		guards = append(guards, Guard{Key: f.Key, CreateRev: f.CreateRev})
	}
	writes := make([]Write, 0, len(tx.order))
	for _, k := range tx.order {
		writes = append(writes, tx.writes[k])
	}
	if err := checkSize(writes, MaxValue); err != nil {
		return 0, err
	}
	var rev int64
	err := effect.Do("commit "+tx.kinds(), func() (err error) {
		rev, err = tx.store.backend.Commit(tx.ctx, guards, writes)
		return err
	})
	if errors.Is(err, ErrConflict) && tx.store.fence != nil {
		if e, _, gerr := tx.store.backend.Get(tx.ctx, tx.store.fence.Key); gerr == nil && e[0].CreateRev != tx.store.fence.CreateRev {
			return 0, ErrFenced
		}
	}
	if err != nil && !errors.Is(err, ErrConflict) {
		return 0, fmt.Errorf("committing: %w", err)
	}
	return rev, err
}

// kinds names the collections that the transaction writes to.
func (tx *Tx) kinds() string {
	var out []string
	for _, k := range tx.order {
		if kind, _, _ := strings.Cut(strings.TrimPrefix(k, "/"), "/"); !slices.Contains(out, kind) {
			out = append(out, kind)
		}
	}
	return strings.Join(out, ", ")
}

// get reads one key: the Tx's own write, else the committed value.
func (tx *Tx) get(key string) (Entry, error) {
	if w, ok := tx.writes[key]; ok {
		if w.Delete {
			return Entry{Key: key}, nil
		}
		return Entry{Key: key, Value: w.Value, ModRev: tx.reads[key].ModRev, CreateRev: tx.reads[key].CreateRev}, nil
	}
	if e, ok := tx.reads[key]; ok {
		return e, nil
	}
	es, _, err := tx.store.backend.Get(tx.ctx, key)
	if err != nil {
		return Entry{}, fmt.Errorf("reading %s: %w", key, err)
	}
	if tx.reads != nil {
		tx.reads[key] = es[0]
	}
	return es[0], nil
}

// list reads all keys with the prefix, the Tx's own writes laid over them.
func (tx *Tx) list(prefix string) ([]Entry, error) {
	es, _, err := tx.store.backend.List(tx.ctx, prefix)
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", prefix, err)
	}
	if len(tx.writes) == 0 {
		return es, nil
	}
	out := es[:0:0]
	for _, e := range es {
		if _, ok := tx.writes[e.Key]; !ok {
			out = append(out, e)
		}
	}
	for _, k := range tx.order {
		if w := tx.writes[k]; !w.Delete && strings.HasPrefix(k, prefix) {
			out = append(out, Entry{Key: k, Value: w.Value, ModRev: tx.reads[k].ModRev})
		}
	}
	return out, nil
}

func (tx *Tx) put(key string, value []byte, ttl time.Duration) {
	tx.write(Write{Key: key, Value: value, TTL: ttl})
}

func (tx *Tx) remove(key string) { tx.write(Write{Key: key, Delete: true}) }

func (tx *Tx) write(w Write) {
	if tx.writes == nil {
		panic("store: write in a view")
	}
	if _, ok := tx.writes[w.Key]; !ok {
		tx.order = append(tx.order, w.Key)
	}
	tx.writes[w.Key] = w
}

// newID returns 32 random hex digits.
func newID() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
