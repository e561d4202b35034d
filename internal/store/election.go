package store

import (
	"context"
	"errors"
	"sync"
)

// leaderKey is what candidates on one Memory compete for.
const leaderKey = "/leader/controllers"

// Campaign waits until nobody else leads on this backend, or ctx ends. It is the
// election of tests and of a server that keeps nothing: the leadership ends
// with resign, with Close, or when somebody deletes or replaces the key that fence
// names. lost is closed then; resign may be called more than once.
func (m *Memory) Campaign(ctx context.Context) (fence Fence, lost <-chan struct{}, resign func(), err error) {
	rev, err := m.acquire(ctx)
	if err != nil {
		return Fence{}, nil, nil, err
	}
	watching, stop := context.WithCancel(context.Background())
	gone := make(chan struct{})
	go func() { // ends when the key changes, the backend is closed, or with resign
		defer close(gone)
		<-m.Watch(watching, leaderKey, rev)
	}()
	resign = sync.OnceFunc(func() {
		stop()
		<-gone
		_, _ = m.Commit(context.Background(), []Guard{{Key: leaderKey, CreateRev: rev}}, []Write{{Key: leaderKey, Delete: true}})
	})
	return Fence{Key: leaderKey, CreateRev: rev}, gone, resign, nil
}

// acquire creates the leader key, waiting for its deletion where it exists.
func (m *Memory) acquire(ctx context.Context) (int64, error) {
	for {
		rev, err := m.Commit(ctx, []Guard{{Key: leaderKey}}, []Write{{Key: leaderKey, Value: []byte(newID())}})
		if !errors.Is(err, ErrConflict) {
			return rev, err
		}
		es, at, err := m.Get(ctx, leaderKey)
		if err != nil {
			return 0, err
		}
		if es[0].ModRev == 0 {
			continue
		}
		if err := m.awaitChange(ctx, at); err != nil {
			return 0, err
		}
	}
}

func (m *Memory) awaitChange(ctx context.Context, after int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	b, ok := <-m.Watch(ctx, leaderKey, after)
	if !ok {
		return ctx.Err()
	}
	if errors.Is(b.Err, ErrCompacted) {
		return nil // something has changed, that is all we ask
	}
	return b.Err
}
