package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/storage/mvcc"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// pageSize is how many keys a listing reads at once.
const pageSize = 500

// Get implements store.Backend.
func (b *Backend) Get(ctx context.Context, keys ...string) ([]store.Entry, int64, error) {
	if b.server != nil {
		return b.getHere(ctx, keys)
	}
	ctx, cancel := b.limit(ctx)
	defer cancel()
	ops := make([]clientv3.Op, len(keys))
	for i, k := range keys {
		ops[i] = clientv3.OpGet(k)
	}
	resp, err := b.client.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return nil, 0, b.explain(ctx, "reading", err)
	}
	out := make([]store.Entry, len(keys))
	for i, r := range resp.Responses {
		out[i] = store.Entry{Key: keys[i]}
		if kvs := r.GetResponseRange().Kvs; len(kvs) > 0 {
			out[i] = entry(kvs[0])
		}
	}
	return out, resp.Header.Revision, nil
}

// getHere reads from the database of the embedded etcd, past its client. In a
// cluster, a read that sees every acknowledged write needs a round through
// raft. The one member of an embedded etcd has applied what it acknowledged, and
// [Open] has made a write (settle), which comes after what was on disk, so its
// own copy is the newest there is.
func (b *Backend) getHere(ctx context.Context, keys []string) ([]store.Entry, int64, error) {
	out := make([]store.Entry, len(keys))
	var rev int64
	err := b.read(ctx, func() error {
		tx := b.server.etcd.Server.KV().Read(mvcc.ConcurrentReadTxMode, traceutil.TODO())
		defer tx.End()
		for i, k := range keys {
			r, err := tx.Range(ctx, []byte(k), nil, mvcc.RangeOptions{})
			if err != nil {
				return err
			}
			out[i] = store.Entry{Key: k}
			if len(r.KVs) > 0 {
				out[i] = entry(r.KVs[0])
			}
			rev = r.Rev
		}
		return nil
	})
	if err != nil {
		return nil, 0, b.explain(ctx, "reading", err)
	}
	return out, rev, nil
}

// consistency is how listings see every acknowledged write; see getHere.
func (b *Backend) consistency() []clientv3.OpOption {
	if b.server == nil {
		return nil
	}
	return []clientv3.OpOption{clientv3.WithSerializable()}
}

// read runs a read unless ctx or the backend has ended. A read of the embedded
// copy does not notice either by itself, and must not meet a closed database,
// so [Backend.Close] waits for it.
func (b *Backend) read(ctx context.Context, fn func() error) error {
	b.reading.RLock()
	defer b.reading.RUnlock()
	if err := b.closing.Err(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return fn()
}

func entry(kv *mvccpb.KeyValue) store.Entry {
	return store.Entry{Key: string(kv.Key), Value: kv.Value, CreateRev: kv.CreateRevision, ModRev: kv.ModRevision}
}

// List implements store.Backend. It reads in pages, all at the revision of the first.
func (b *Backend) List(ctx context.Context, prefix string) ([]store.Entry, int64, error) {
	var out []store.Entry
	rev, err := b.scan(ctx, prefix, 0, func(kv *mvccpb.KeyValue) error {
		out = append(out, entry(kv))
		return nil
	})
	return out, rev, err
}

// scan calls fn for every key under the prefix, in order, as of rev, or as of
// the newest revision if rev is 0; it returns the revision.
func (b *Backend) scan(ctx context.Context, prefix string, rev int64, fn func(*mvccpb.KeyValue) error) (int64, error) {
	end := clientv3.GetPrefixRangeEnd(prefix)
	if prefix == "" {
		prefix, end = "\x00", "\x00" // etcd's way of saying: all keys
	}
	for from := prefix; ; {
		page, err := b.page(ctx, from, end, rev)
		if err != nil {
			return 0, err
		}
		if rev == 0 {
			rev = page.Header.Revision
		}
		for _, kv := range page.Kvs {
			if err := fn(kv); err != nil {
				return 0, err
			}
		}
		if !page.More {
			return rev, nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
}

func (b *Backend) page(ctx context.Context, from, end string, rev int64) (*clientv3.GetResponse, error) {
	ctx, cancel := b.limit(ctx)
	defer cancel()
	var resp *clientv3.GetResponse
	err := b.read(ctx, func() (err error) {
		resp, err = b.client.Get(ctx, from, append(b.consistency(), clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(rev))...)
		return err
	})
	if errors.Is(err, rpctypes.ErrCompacted) { // somebody compacted between two pages
		return nil, fault.New(fault.Unavailable, "", "The store was compacted while it was read.").After(time.Second).Because(err)
	}
	if err != nil {
		return nil, b.explain(ctx, "listing", err)
	}
	return resp, nil
}

// Commit implements store.Backend. Writes with a TTL get a lease each TTL value.
func (b *Backend) Commit(ctx context.Context, guards []store.Guard, writes []store.Write) (int64, error) {
	if err := store.CheckSize(writes); err != nil {
		return 0, err
	}
	ctx, cancel := b.limit(ctx)
	defer cancel()
	leases, err := b.grant(ctx, writes)
	if err != nil {
		return 0, b.explain(ctx, "granting a lease", err)
	}
	resp, err := b.client.Txn(ctx).If(compare(guards)...).Then(operations(writes, leases)...).Commit()
	if err != nil {
		return 0, b.explain(ctx, "committing", err)
	}
	if !resp.Succeeded {
		for _, l := range leases { // nothing hangs on them; if this fails they expire
			_, _ = b.client.Revoke(ctx, l)
		}
		return 0, store.ErrConflict
	}
	return resp.Header.Revision, nil
}

// grant returns a lease for each TTL among the writes.
func (b *Backend) grant(ctx context.Context, writes []store.Write) (map[time.Duration]clientv3.LeaseID, error) {
	var leases map[time.Duration]clientv3.LeaseID
	for _, w := range writes {
		if w.TTL <= 0 || w.Delete {
			continue
		}
		if _, ok := leases[w.TTL]; ok {
			continue
		}
		seconds := int64((w.TTL + time.Second - 1) / time.Second)
		l, err := b.client.Grant(ctx, seconds)
		if err != nil {
			return nil, err
		}
		if leases == nil {
			leases = map[time.Duration]clientv3.LeaseID{}
		}
		leases[w.TTL] = l.ID
	}
	return leases, nil
}

func compare(guards []store.Guard) []clientv3.Cmp {
	out := make([]clientv3.Cmp, len(guards))
	for i, g := range guards {
		if g.CreateRev != 0 {
			out[i] = clientv3.Compare(clientv3.CreateRevision(g.Key), "=", g.CreateRev)
		} else {
			out[i] = clientv3.Compare(clientv3.ModRevision(g.Key), "=", g.ModRev)
		}
	}
	return out
}

func operations(writes []store.Write, leases map[time.Duration]clientv3.LeaseID) []clientv3.Op {
	out := make([]clientv3.Op, len(writes))
	for i, w := range writes {
		switch {
		case w.Delete:
			out[i] = clientv3.OpDelete(w.Key)
		case w.TTL > 0:
			out[i] = clientv3.OpPut(w.Key, string(w.Value), clientv3.WithLease(leases[w.TTL]))
		case w.KeepTTL:
			out[i] = clientv3.OpPut(w.Key, string(w.Value), clientv3.WithIgnoreLease())
		default:
			out[i] = clientv3.OpPut(w.Key, string(w.Value))
		}
	}
	return out
}

// resumePause is the time before a broken watch is opened again.
const resumePause = 100 * time.Millisecond

// Watch implements store.Backend. A broken connection is resumed after the last
// revision delivered. Its goroutine ends with ctx, with Close, or after a Batch with Err.
func (b *Backend) Watch(ctx context.Context, prefix string, after int64) <-chan store.Batch {
	out := make(chan store.Batch)
	go func() {
		defer close(out)
		send := func(batch store.Batch) bool {
			select {
			case out <- batch:
				return batch.Err == nil
			case <-ctx.Done():
				return false
			}
		}
		for b.watchOnce(ctx, prefix, &after, send) {
			select {
			case <-time.After(resumePause):
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// watchOnce delivers changes until the watch breaks, moving after along. It
// reports whether it is worth opening again.
func (b *Backend) watchOnce(ctx context.Context, prefix string, after *int64, send func(store.Batch) bool) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.closing, cancel)()
	// With RequireLeader a member cut off from the others breaks the watch
	// instead of letting it wait in silence.
	changes := b.client.Watch(clientv3.WithRequireLeader(ctx), prefix, clientv3.WithPrefix(), clientv3.WithRev(*after+1))
	for resp := range changes {
		if resp.CompactRevision != 0 {
			return send(store.Batch{Err: store.ErrCompacted})
		}
		if err := resp.Err(); err != nil {
			if noAnswer(err) || ctx.Err() != nil {
				break
			}
			return send(store.Batch{Err: fmt.Errorf("watching %s: %w", prefix, err)})
		}
		if len(resp.Events) == 0 {
			continue
		}
		if err := b.shown(ctx, resp.Events[len(resp.Events)-1].Kv.ModRevision); err != nil {
			break
		}
		if !send(store.Batch{Events: events(resp.Events)}) {
			return false
		}
		*after = resp.Events[len(resp.Events)-1].Kv.ModRevision
	}
	if b.closing.Err() != nil {
		return send(store.Batch{Err: errClosed})
	}
	return true
}

// shown waits until reads show the revision that a watch told of. etcd tells its
// watches of a change just before it ends the change's transaction, so a read of
// the embedded copy may come too early; a read through raft waits for all that
// is committed. Those of a cluster are such reads.
func (b *Backend) shown(ctx context.Context, rev int64) error {
	if b.server == nil {
		return nil
	}
	var now int64
	if err := b.read(ctx, func() error { now = b.server.etcd.Server.KV().Rev(); return nil }); err != nil || now >= rev {
		return err
	}
	ctx, cancel := b.limit(ctx)
	defer cancel()
	_, err := b.client.Get(ctx, store.IncarnationKey, clientv3.WithCountOnly())
	return err
}

func events(in []*clientv3.Event) []store.Event {
	out := make([]store.Event, len(in))
	for i, e := range in {
		out[i] = store.Event{Key: string(e.Kv.Key), ModRev: e.Kv.ModRevision, Deleted: e.Type == clientv3.EventTypeDelete}
		if !out[i].Deleted {
			out[i].Value = e.Kv.Value
		}
	}
	return out
}
