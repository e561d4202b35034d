package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Change is one change of a collection, as [Collection.Follow] delivers it.
type Change[S, T any] struct {
	ID       string
	Object   *Object[S, T] // nil: the object is gone
	Revision int64
}

// Follow calls fn for every object there is and then for every change, in
// order, until ctx ends; it returns ctx's error, fn's, or ErrCorrupt. A nil Change (ID "")
// follows the first full listing, so the caller knows it has seen all. When the
// backend no longer has the revision to go on from, or its watch breaks, Follow
// lists again and reports objects that vanished meanwhile as gone.
func (c Collection[S, T]) Follow(ctx context.Context, s *Store, prefix string, fn func(Change[S, T]) error) error {
	known := map[string]int64{} // id -> revision delivered
	synced := false
	for {
		rev, err := c.sync(ctx, s, prefix, known, fn)
		if err == nil {
			if !synced {
				synced = true
				if err := fn(Change[S, T]{Revision: rev}); err != nil {
					return err
				}
			}
			err = c.tail(ctx, s, prefix, rev, known, fn)
		}
		var stop *stopError
		if errors.As(err, &stop) {
			return stop.err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ErrCorrupt) {
			return err
		}
		if !errors.Is(err, ErrCompacted) { // a passing fault: wait a little before listing again
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
}

// stopError carries fn's own error out of the retry loop.
type stopError struct{ err error }

func (e *stopError) Error() string { return e.err.Error() }

func (c Collection[S, T]) sync(ctx context.Context, s *Store, prefix string, known map[string]int64, fn func(Change[S, T]) error) (int64, error) {
	es, rev, err := s.backend.List(ctx, c.Key(prefix))
	if err != nil {
		return 0, fmt.Errorf("listing %s: %w", c.Kind, err)
	}
	seen := make(map[string]bool, len(es))
	for _, e := range es {
		id := strings.TrimPrefix(e.Key, c.Key(""))
		seen[id] = true
		if known[id] == e.ModRev {
			continue
		}
		o, err := c.decode(e)
		if err != nil {
			return 0, err
		}
		known[id] = e.ModRev
		if err := fn(Change[S, T]{ID: id, Object: o, Revision: e.ModRev}); err != nil {
			return 0, &stopError{err}
		}
	}
	for id := range known {
		if !seen[id] {
			delete(known, id)
			if err := fn(Change[S, T]{ID: id, Revision: rev}); err != nil {
				return 0, &stopError{err}
			}
		}
	}
	return rev, nil
}

func (c Collection[S, T]) tail(ctx context.Context, s *Store, prefix string, rev int64, known map[string]int64, fn func(Change[S, T]) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for batch := range s.backend.Watch(ctx, c.Key(prefix), rev) {
		if batch.Err != nil {
			return batch.Err
		}
		for _, ev := range batch.Events {
			id := strings.TrimPrefix(ev.Key, c.Key(""))
			ch := Change[S, T]{ID: id, Revision: ev.ModRev}
			if ev.Deleted {
				delete(known, id)
			} else {
				o, err := c.decode(Entry{Key: ev.Key, Value: ev.Value, ModRev: ev.ModRev})
				if err != nil {
					return err
				}
				ch.Object, known[id] = o, ev.ModRev
			}
			if err := fn(ch); err != nil {
				return &stopError{err}
			}
		}
	}
	return errors.New("store: watch ended")
}
