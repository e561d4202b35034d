package store

import (
	"context"
	"errors"
	"sort"
	"strings"
	"sync"
	"time"
)

// Memory is a Backend in memory: for tests, where it also runs inside a
// testing/synctest bubble. It keeps the last 1024 changes for watches and
// answers older ones with ErrCompacted, as etcd does after a compaction.
// Use [NewMemory].
type Memory struct {
	mu sync.Mutex // guards all fields below

	rev     int64
	data    map[string]Entry
	expiry  map[string]expiry
	history []Event
	first   int64         // revision of the oldest change in history
	changed chan struct{} // closed and replaced at each change
	closed  bool

	deadlines int64 // counts expiries, to tell an old timer from its successor
}

// expiry is the end of a key that has a TTL.
type expiry struct {
	n     int64
	timer *time.Timer
}

const memoryHistory = 1024

var errMemoryClosed = errors.New("store: memory backend is closed")

// NewMemory returns an empty backend.
func NewMemory() *Memory {
	return &Memory{rev: 1, first: 1, data: map[string]Entry{}, expiry: map[string]expiry{}, changed: make(chan struct{})}
}

// Get implements Backend.
func (m *Memory) Get(ctx context.Context, keys ...string) ([]Entry, int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usable(ctx); err != nil {
		return nil, 0, err
	}
	out := make([]Entry, len(keys))
	for i, k := range keys {
		if e, ok := m.data[k]; ok {
			out[i] = e
		} else {
			out[i] = Entry{Key: k}
		}
	}
	return out, m.rev, nil
}

// List implements Backend.
func (m *Memory) List(ctx context.Context, prefix string) ([]Entry, int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usable(ctx); err != nil {
		return nil, 0, err
	}
	var out []Entry
	for k, e := range m.data {
		if strings.HasPrefix(k, prefix) {
			out = append(out, e)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Key < out[j].Key })
	return out, m.rev, nil
}

// Commit implements Backend.
func (m *Memory) Commit(ctx context.Context, guards []Guard, writes []Write) (int64, error) {
	if err := CheckSize(writes); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usable(ctx); err != nil {
		return 0, err
	}
	for _, g := range guards {
		e := m.data[g.Key]
		if g.CreateRev != 0 && e.CreateRev != g.CreateRev || g.CreateRev == 0 && e.ModRev != g.ModRev {
			return 0, ErrConflict
		}
	}
	m.rev++
	for _, w := range writes {
		m.apply(w)
	}
	m.announce()
	return m.rev, nil
}

func (m *Memory) apply(w Write) {
	if x, ok := m.expiry[w.Key]; ok && !w.KeepTTL {
		x.timer.Stop()
		delete(m.expiry, w.Key)
	}
	if w.Delete {
		if _, ok := m.data[w.Key]; !ok {
			return
		}
		delete(m.data, w.Key)
		m.history = append(m.history, Event{Key: w.Key, ModRev: m.rev, Deleted: true})
		return
	}
	e := Entry{Key: w.Key, Value: append([]byte(nil), w.Value...), ModRev: m.rev, CreateRev: m.rev}
	if old, ok := m.data[w.Key]; ok {
		e.CreateRev = old.CreateRev
	}
	m.data[w.Key] = e
	m.history = append(m.history, Event{Key: w.Key, Value: e.Value, ModRev: m.rev})
	if w.TTL > 0 {
		m.deadlines++
		n := m.deadlines
		m.expiry[w.Key] = expiry{n, time.AfterFunc(w.TTL, func() { m.expire(w.Key, n) })}
	}
}

func (m *Memory) expire(key string, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.expiry[key].n != n {
		return
	}
	m.rev++
	m.apply(Write{Key: key, Delete: true})
	m.announce()
}

// announce wakes the watches and trims the history. m.mu is held.
func (m *Memory) announce() {
	if over := len(m.history) - memoryHistory; over > 0 {
		m.first = m.history[over-1].ModRev + 1
		m.history = append([]Event(nil), m.history[over:]...)
	}
	close(m.changed)
	m.changed = make(chan struct{})
}

// Watch implements Backend. Its goroutine ends with ctx, with Close, or after a Batch with Err.
func (m *Memory) Watch(ctx context.Context, prefix string, after int64) <-chan Batch {
	out := make(chan Batch)
	go func() {
		defer close(out)
		for {
			batch, next, changed := m.since(prefix, after)
			if len(batch.Events) > 0 || batch.Err != nil {
				select {
				case out <- batch:
				case <-ctx.Done():
					return
				}
			}
			if batch.Err != nil {
				return
			}
			after = next
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

func (m *Memory) since(prefix string, after int64) (Batch, int64, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return Batch{Err: errMemoryClosed}, 0, nil
	}
	if after+1 < m.first {
		return Batch{Err: ErrCompacted}, 0, nil
	}
	var b Batch
	for _, e := range m.history {
		if e.ModRev > after && strings.HasPrefix(e.Key, prefix) {
			b.Events = append(b.Events, e)
		}
	}
	return b, m.rev, m.changed
}

// Close implements Backend.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.closed = true
		for _, x := range m.expiry {
			x.timer.Stop()
		}
		close(m.changed)
		m.changed = make(chan struct{})
	}
	return nil
}

func (m *Memory) usable(ctx context.Context) error {
	if m.closed {
		return errMemoryClosed
	}
	return ctx.Err()
}
