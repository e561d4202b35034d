package etcd

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"keyfleet.dev/keyfleet/internal/store"
)

// leaderPrefix is where candidates compete; each has a key named by its lease.
const leaderPrefix = "/leader/controllers"

// Campaign implements reconcile.Election with a session that expires Config.Session
// seconds after this server fell silent. The fence is the election key: it
// vanishes with the session, so later writes of this leadership are refused
// even before lost is closed.
func (b *Backend) Campaign(ctx context.Context) (fence store.Fence, lost <-chan struct{}, resign func(), err error) {
	alive, end := context.WithCancel(b.closing)
	session, err := b.newSession(ctx, alive)
	if err != nil {
		end()
		return store.Fence{}, nil, nil, err
	}
	host, _ := os.Hostname() // only for people who look at the key
	election := concurrency.NewElection(session, leaderPrefix)
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(session.Ctx(), stop)() // an expired session cannot win
	if err := election.Campaign(waiting, fmt.Sprintf("%s %d", host, os.Getpid())); err != nil {
		closeSession(session)
		end()
		if ctx.Err() != nil {
			return store.Fence{}, nil, nil, ctx.Err()
		}
		return store.Fence{}, nil, nil, b.explain(waiting, "campaigning", err)
	}
	resign = sync.OnceFunc(func() {
		closeSession(session) // revokes the lease, and with it the key
		end()
	})
	return store.Fence{Key: election.Key(), CreateRev: election.Rev()}, session.Done(), resign, nil
}

// newSession makes a session that lives as long as alive; ctx bounds the making.
func (b *Backend) newSession(ctx, alive context.Context) (*concurrency.Session, error) {
	ctx, cancel := b.limit(ctx)
	defer cancel()
	lease, err := b.client.Grant(ctx, int64(b.session))
	if err != nil {
		return nil, b.explain(ctx, "granting a lease", err)
	}
	session, err := concurrency.NewSession(b.client,
		concurrency.WithContext(alive), concurrency.WithLease(lease.ID), concurrency.WithTTL(b.session))
	if err != nil {
		return nil, b.explain(ctx, "opening a session", err)
	}
	return session, nil
}

// closeSession gives the lease up, for at most two seconds; then it expires.
func closeSession(s *concurrency.Session) {
	s.Orphan()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, _ = s.Client().Revoke(ctx, s.Lease())
}
