// Package seal encrypts everything that reaches the disk of a store.
//
// Idea: a [Keyset] (Google Tink, AES-256-GCM) seals each value with its full key
// as associated data; the keyset is itself sealed by a key-encryption key (KEK)
// and lies beside the store. Values name the key that sealed them, so a
// rotation adds a key, makes it primary, rewrites what is sealed by the old ones
// ([Rotate]), and then throws those away.
//
//	DIR/kek            the KEK, mode 0600 (see [FileKEK]): whoever has it and the disk reads all
//	DIR/keyset.json    Tink's encrypted keyset: key ids in clear, keys sealed by the KEK
//	value              01 | key id (4) | nonce (12) | ciphertext | tag (16)
//	/leader/...        the only keys whose values stay clear: elections hold no secret
//
// Invariant: a value opens only under the key it was stored under, unchanged;
// nothing is ever sealed by a key that is not yet safely on disk, and no key is
// thrown away while a value needs it. Keys and revisions are not hidden, and
// the whole store put back to an older state is not noticed.
//
// Consequence for the operator: a copy of the disk or a backup is worthless
// without the KEK, and so is the store to its owner: keep a copy of it elsewhere.
package seal

import (
	"context"
	"encoding/binary"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// clearPrefix is where values are not sealed.
const clearPrefix = "/leader/"

// backend is a store.Backend whose values are sealed.
type backend struct {
	raw    store.Backend
	keyset *Keyset
}

// Wrap returns b with all values sealed by k, those of elections excepted.
// Closing it closes b.
func Wrap(b store.Backend, k *Keyset) store.Backend { return &backend{raw: b, keyset: k} }

func isClear(key string) bool { return strings.HasPrefix(key, clearPrefix) }

// Get implements store.Backend.
func (b *backend) Get(ctx context.Context, keys ...string) ([]store.Entry, int64, error) {
	es, rev, err := b.raw.Get(ctx, keys...)
	if err != nil {
		return nil, 0, err
	}
	return b.open(es, rev)
}

// List implements store.Backend.
func (b *backend) List(ctx context.Context, prefix string) ([]store.Entry, int64, error) {
	es, rev, err := b.raw.List(ctx, prefix)
	if err != nil {
		return nil, 0, err
	}
	return b.open(es, rev)
}

func (b *backend) open(es []store.Entry, rev int64) ([]store.Entry, int64, error) {
	out := make([]store.Entry, len(es))
	for i, e := range es {
		if e.ModRev != 0 && !isClear(e.Key) {
			value, err := b.keyset.Open(e.Key, e.Value)
			if err != nil {
				return nil, 0, err
			}
			e.Value = value
		}
		out[i] = e
	}
	return out, rev, nil
}

// Commit implements store.Backend. It holds off a rotation until what it sealed is committed.
func (b *backend) Commit(ctx context.Context, guards []store.Guard, writes []store.Write) (int64, error) {
	b.keyset.using.RLock()
	defer b.keyset.using.RUnlock()
	sealed := make([]store.Write, len(writes))
	for i, w := range writes {
		if !w.Delete && !isClear(w.Key) {
			value, err := b.keyset.seal(w.Key, w.Value)
			if err != nil {
				return 0, err
			}
			w.Value = value
		}
		sealed[i] = w
	}
	return b.raw.Commit(ctx, guards, sealed)
}

// Watch implements store.Backend. A change that cannot be opened ends it with
// ErrCompacted: the history may be older than the last rotation. The listing that
// follows tells whether the value there is now can be opened.
func (b *backend) Watch(ctx context.Context, prefix string, after int64) <-chan store.Batch {
	out := make(chan store.Batch)
	go func() { // ends with the raw watch, which ends with ctx
		defer close(out)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		for batch := range b.raw.Watch(ctx, prefix, after) {
			batch = b.openBatch(batch)
			select {
			case out <- batch:
			case <-ctx.Done():
				return
			}
			if batch.Err != nil {
				return
			}
		}
	}()
	return out
}

func (b *backend) openBatch(batch store.Batch) store.Batch {
	events := make([]store.Event, len(batch.Events))
	for i, e := range batch.Events {
		if !e.Deleted && !isClear(e.Key) {
			value, err := b.keyset.Open(e.Key, e.Value)
			if err != nil {
				return store.Batch{Err: store.ErrCompacted}
			}
			e.Value = value
		}
		events[i] = e
	}
	return store.Batch{Events: events, Err: batch.Err}
}

// Close implements store.Backend.
func (b *backend) Close() error { return b.raw.Close() }

// seal returns the value sealed for its key by the primary key.
func (k *Keyset) seal(key string, value []byte) ([]byte, error) {
	sealed, err := k.state().aead.Encrypt(value, []byte(key))
	if err != nil {
		return nil, fault.New(fault.Internal, "", "The value of %s cannot be sealed.", key).Because(err)
	}
	return sealed, nil
}

// Open returns the clear value of a sealed one that was stored under key. The
// error names the key and wraps store.ErrCorrupt.
func (k *Keyset) Open(key string, sealed []byte) ([]byte, error) {
	st := k.state()
	value, err := st.aead.Decrypt(sealed, []byte(key))
	if err == nil {
		return value, nil
	}
	if id, ok := sealedBy(sealed); ok && !st.has(id) {
		return nil, fault.New(fault.Internal, "", "The stored value of %s is sealed by key %d, which the keyset does not have.", key, id).
			WithFix("put back the keyset file that belongs to this store").Because(store.ErrCorrupt)
	}
	return nil, fault.New(fault.Internal, "", "The stored value of %s cannot be opened: it was changed outside Keyfleet, or copied from another key.", key).
		WithFix("restore a backup, or delete the key").Because(store.ErrCorrupt)
}

// sealedBy returns the id of the key that sealed a value; ok is false if it is
// not a sealed value at all. The layout is Tink's: a version byte of 1, then the id.
func sealedBy(value []byte) (id uint32, ok bool) {
	if len(value) < 5 || value[0] != 1 {
		return 0, false
	}
	return binary.BigEndian.Uint32(value[1:5]), true
}

var _ store.Backend = (*backend)(nil)
