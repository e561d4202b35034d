package seal

import (
	"context"
	"errors"
	"fmt"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Rotate replaces the sealing key of a store: it adds a key and makes it primary
// (unless a former rotation was interrupted after that), rewrites every value
// that an older key sealed, and throws the older keys away. raw is the backend
// below [Wrap]. Interrupted anywhere, it is run again and goes on. It returns how
// many values it rewrote.
//
// Only one server may use the keyset file meanwhile; others must be started
// again with the new file before the next rotation.
func Rotate(ctx context.Context, raw store.Backend, k *Keyset) (rewritten int, err error) {
	if k.path == "" {
		return 0, errors.New("seal: a keyset out of a backup cannot rotate")
	}
	if k.state().handle.Len() == 1 {
		if err := k.addPrimary(); err != nil {
			return 0, err
		}
	}
	if rewritten, err = Reseal(ctx, raw, k); err != nil {
		return rewritten, err
	}
	return rewritten, k.retire(ctx, raw)
}

// addPrimary adds a key and makes it the one that seals. When it returns, no
// commit is on its way with a value that another key sealed.
func (k *Keyset) addPrimary() error {
	k.using.Lock()
	defer k.using.Unlock()
	m := keyset.NewManagerFromHandle(k.state().handle)
	id, err := m.Add(aead.AES256GCMKeyTemplate())
	if err == nil {
		err = m.SetPrimary(id)
	}
	if err != nil {
		return fmt.Errorf("adding a sealing key: %w", err)
	}
	h, err := m.Handle()
	if err != nil {
		return fmt.Errorf("adding a sealing key: %w", err)
	}
	return k.replace(h)
}

// Reseal rewrites every value that is not sealed by the primary key, each if it
// did not change meanwhile: whoever changes it seals it by the primary key too.
// Times to live stay. It stops at the first value that cannot be opened.
func Reseal(ctx context.Context, raw store.Backend, k *Keyset) (rewritten int, err error) {
	es, err := k.old(ctx, raw)
	if err != nil {
		return 0, err
	}
	for _, e := range es {
		value, err := k.Open(e.Key, e.Value)
		if err != nil {
			return rewritten, err
		}
		sealed, err := k.seal(e.Key, value)
		if err != nil {
			return rewritten, err
		}
		err = effect.Do("reseal value", func() error {
			_, err := raw.Commit(ctx, []store.Guard{{Key: e.Key, ModRev: e.ModRev}}, []store.Write{{Key: e.Key, Value: sealed, KeepTTL: true}})
			return err
		})
		if err != nil && !errors.Is(err, store.ErrConflict) {
			return rewritten, fmt.Errorf("resealing %s: %w", e.Key, err)
		}
		if err == nil {
			rewritten++
		}
	}
	return rewritten, nil
}

// old returns the entries that are not sealed by the primary key.
func (k *Keyset) old(ctx context.Context, raw store.Backend) ([]store.Entry, error) {
	es, _, err := raw.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("listing sealed values: %w", err)
	}
	primary := k.state().primary
	out := es[:0]
	for _, e := range es {
		if id, ok := sealedBy(e.Value); !isClear(e.Key) && (!ok || id != primary) {
			out = append(out, e)
		}
	}
	return out, nil
}

// retire throws all keys but the primary away, if no value needs them.
func (k *Keyset) retire(ctx context.Context, raw store.Backend) error {
	k.using.Lock()
	defer k.using.Unlock()
	left, err := k.old(ctx, raw)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fault.New(fault.Conflict, "", "%d values are still sealed by an older key, the first of them %s.", len(left), left[0].Key).
			WithFix("run the rotation again")
	}
	m := keyset.NewManagerFromHandle(k.state().handle)
	for _, id := range k.state().ids() {
		if id == k.state().primary {
			continue
		}
		if err := m.Delete(id); err != nil {
			return fmt.Errorf("removing an old sealing key: %w", err)
		}
	}
	h, err := m.Handle()
	if err != nil {
		return fmt.Errorf("removing an old sealing key: %w", err)
	}
	return k.replace(h)
}
