package audit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/store"
)

// Exporter moves the records of committed changes into the file, exactly once
// and in the order of their commits. It runs on the server that leads (it has
// the shape of reconcile.Runnable).
//
//	list -> sort by revision -> write and fsync (lines say "open") -> one transaction: remove, move the anchor -> "confirmed"
//
// Dying after the write leaves records in both places; the file's last line
// then names the first of them (Open), and the next run only removes them.
type Exporter struct {
	Log    *Log
	Linger time.Duration // how long records are collected before they are moved; zero: 50 ms
	Anchor time.Duration // how often the anchor is moved when only reads are recorded; zero: one minute
}

// exportBatch is how many records one transaction removes; etcd's limit is 128
// operations by default, the anchor and guards included.
const exportBatch = 50

// Describe names it for logs.
func (x *Exporter) Describe() string { return "audit exporter" }

// Run works until ctx ends. Passing failures are tried again.
func (x *Exporter) Run(ctx context.Context, s *store.Store) error {
	linger, every := x.Linger, x.Anchor
	if linger == 0 {
		linger = 50 * time.Millisecond
	}
	if every == 0 {
		every = time.Minute
	}
	wake := make(chan struct{}, 1)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return Records.Follow(ctx, s, "", func(c store.Change[access.Record, struct{}]) error {
			if c.Object != nil || c.ID == "" {
				select {
				case wake <- struct{}{}:
				default:
				}
			}
			return nil
		})
	})
	g.Go(func() error { return x.loop(ctx, s, wake, linger, every) })
	if err := g.Wait(); ctx.Err() == nil || errors.Is(err, store.ErrFenced) {
		return err
	}
	return nil
}

func (x *Exporter) loop(ctx context.Context, s *store.Store, wake <-chan struct{}, linger, every time.Duration) error {
	var st state
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-wake:
			if err := pause(ctx, linger); err != nil {
				return err
			}
		case <-tick.C:
			st.anchor = true
		}
		for wait := time.Second; ; wait = min(2*wait, time.Minute) {
			err := x.step(ctx, s, &st)
			if err == nil {
				break
			}
			if errors.Is(err, store.ErrFenced) || ctx.Err() != nil {
				return err
			}
			x.Log.cfg.Log.Error("exporting audit records failed; trying again", "error", err, "in", wait)
			if err := pause(ctx, wait); err != nil {
				return err
			}
		}
	}
}

// state is what the loop has to remember between steps.
type state struct {
	checked bool // the file was compared with the anchor
	anchor  bool // the anchor is due, whether or not there is something to export
}

func (x *Exporter) step(ctx context.Context, s *store.Store, st *state) error {
	if !st.checked {
		if err := x.checkAnchor(ctx, s); err != nil {
			return err
		}
		st.checked, st.anchor = true, true
	}
	if err := x.drain(ctx, s); err != nil {
		return err
	}
	if st.anchor {
		if err := x.anchor(ctx, s); err != nil {
			return err
		}
		st.anchor = false
	}
	return nil
}

// drain moves all records that are in the store now.
func (x *Exporter) drain(ctx context.Context, s *store.Store) error {
	list, err := Records.List(s.View(ctx), "")
	if err != nil {
		return fmt.Errorf("listing audit records: %w", err)
	}
	slices.SortFunc(list, func(a, b *store.Object[access.Record, struct{}]) int {
		if a.Revision != b.Revision {
			return int(a.Revision - b.Revision)
		}
		return strings.Compare(a.ID, b.ID)
	})
	for batch := range slices.Chunk(list, exportBatch) {
		if err := x.move(ctx, s, batch); err != nil {
			return err
		}
	}
	if err := x.Log.do(ctx, &request{confirm: true}); err != nil {
		return err
	}
	clear(x.Log.exported)
	return nil
}

func (x *Exporter) move(ctx context.Context, s *store.Store, batch []*store.Object[access.Record, struct{}]) error {
	q := &request{export: true}
	for _, o := range batch {
		if !x.Log.exported[o.ID] {
			q.items = append(q.items, item{key: o.ID, record: o.Spec})
		}
	}
	// Not cancelled half way: whether the lines are in the file must be known.
	if err := x.Log.do(context.WithoutCancel(ctx), q); err != nil {
		return err
	}
	for _, o := range batch { // if the transaction fails, the next attempt must not write them again
		x.Log.exported[o.ID] = true
	}
	err := s.Update(ctx, func(tx *store.Tx) error {
		for _, o := range batch {
			if err := Records.Delete(tx, o.ID); err != nil {
				return err
			}
		}
		return putAnchor(tx, x.Log.cfg.Name, q.head)
	})
	if err != nil {
		return fmt.Errorf("removing exported audit records: %w", err)
	}
	return nil
}

// anchor moves the anchor to the head.
func (x *Exporter) anchor(ctx context.Context, s *store.Store) error {
	head, err := x.Log.Head(ctx)
	if err != nil || head.Seq == 0 {
		return err
	}
	return s.Update(ctx, func(tx *store.Tx) error { return putAnchor(tx, x.Log.cfg.Name, head) })
}

func putAnchor(tx *store.Tx, name string, head Head) error {
	id := strings.ToLower(name)
	o, err := Anchors.Lookup(tx, id)
	if err != nil {
		return err
	}
	a := Anchor(head)
	if o == nil {
		return Anchors.Insert(tx, &store.Object[Anchor, struct{}]{Meta: store.Meta{ID: id}, Spec: a})
	}
	if o.Spec == a {
		return nil
	}
	o.Spec = a
	return Anchors.Put(tx, o)
}

// checkAnchor compares the file with what the store remembers of it, and puts
// a loss on record.
func (x *Exporter) checkAnchor(ctx context.Context, s *store.Store) error {
	o, err := Anchors.Lookup(s.View(ctx), strings.ToLower(x.Log.cfg.Name))
	if err != nil || o == nil || o.Spec.Seq == 0 {
		return err
	}
	e, found, err := findLine(x.Log.cfg.Path, o.Spec.Seq)
	if err != nil {
		return err
	}
	if found && e.Hash == o.Spec.Hash {
		return nil
	}
	head, err := x.Log.Head(ctx)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("the file held line %d with hash %s; now it ends at line %d without it: lines were lost, or the file was replaced", o.Spec.Seq, o.Spec.Hash, head.Seq)
	x.Log.cfg.Log.Error("the audit file is not the one this store knows", "file", x.Log.cfg.Path, "detail", what)
	return x.Log.Append(ctx, x.Log.own("Keyfleet/audit/gap", what))
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
