// Package etcd keeps the store in etcd: embedded in this process by default, or in
// an external cluster.
//
// Idea: etcd's own contract is [store.Backend]'s: revisions, guarded
// transactions, leases and watches. Embedded, it is started without any client
// listener and used by function calls; the same code speaks to a cluster when
// endpoints are given.
//
//	DIR/lock            flock of the server that uses DIR, with its process id
//	DIR/etcd/           etcd's files (embedded only)
//	/leader/controllers/LEASE    the election key, bound to a lease
//
// Invariant: what Commit acknowledged survives kill -9 and loss of power (etcd
// syncs its log before it answers); one directory has one server. History is
// kept for ten minutes, so a watch that was away longer is told ErrCompacted.
//
// Consequence for the operator: nothing to install for one server; for several,
// an etcd 3.4 or newer that is Keyfleet's alone and compacts by itself
// (--auto-compaction-retention). kine is not enough: it has neither leases nor
// transactions over several keys.
package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Config says where the state is.
type Config struct {
	Dir       string       // the server's data directory, made with mode 0700 if absent, and locked; required when embedded
	Endpoints []string     // URLs of an external cluster; empty: embedded
	TLS       *tls.Config  // for Endpoints with https
	Quota     int64        // embedded: bytes that etcd may use; zero: 2 GiB. At the quota changes are refused
	Session   int          // seconds after which a silent leader is deposed; zero: 10
	Log       *slog.Logger // warnings of etcd; nil: slog.Default()

	// NoSync leaves out fsync when embedded: for tests and for a restore's
	// scratch directory only, since what was acknowledged may be lost.
	NoSync bool
}

// Backend is a store.Backend and a reconcile.Election on etcd. It is made by [Open].
type Backend struct {
	client  *clientv3.Client
	server  *server // nil when external
	where   string  // for messages: the directory or the endpoints
	session int     // seconds
	log     *slog.Logger
	lock    *os.File // on Config.Dir; nil without one

	reading sync.RWMutex    // held for reading by reads, for writing while Close ends them
	closing context.Context // ends when Close begins
	close   func() error
}

// answerTime is how long one operation may take before the store counts as unavailable.
const answerTime = 10 * time.Second

// Open starts the embedded etcd of c.Dir, or connects to c.Endpoints, and
// returns when it answers. A directory that another server uses is a
// fault.Conflict; a cluster that does not answer a fault.Unavailable.
func Open(ctx context.Context, c Config) (*Backend, error) {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Session == 0 {
		c.Session = 10
	}
	b := &Backend{session: c.Session, log: c.Log}
	closing, stop := context.WithCancel(context.Background())
	b.closing = closing
	err := b.start(ctx, c)
	if err != nil {
		stop()
		b.unlock()
		return nil, err
	}
	b.close = sync.OnceValue(func() error {
		stop()
		b.reading.Lock() // reads that were under way have ended; later ones see closing
		defer b.reading.Unlock()
		defer b.unlock()
		err := b.client.Close()
		if errors.Is(err, context.Canceled) {
			err = nil // the embedded client's own context, which Close ends
		}
		if b.server != nil {
			b.server.close()
		}
		return err
	})
	return b, nil
}

func (b *Backend) start(ctx context.Context, c Config) (err error) {
	if c.Dir != "" {
		if b.lock, err = lockDir(c.Dir); err != nil {
			return err
		}
	}
	if len(c.Endpoints) > 0 {
		b.where = strings.Join(c.Endpoints, ", ")
		return b.connect(ctx, c)
	}
	if c.Dir == "" {
		return errors.New("etcd: neither a directory nor endpoints are given")
	}
	b.where = c.Dir
	return b.embed(ctx, c)
}

// connect dials an external cluster and waits for its first answer.
func (b *Backend) connect(ctx context.Context, c Config) error {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            c.Endpoints,
		TLS:                  c.TLS,
		DialTimeout:          5 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		PermitWithoutStream:  true,
		Logger:               newLogger(c.Log, nil),
	})
	if err != nil {
		return fmt.Errorf("connecting to etcd at %s: %w", b.where, err)
	}
	b.client = client
	if err := b.Health(ctx); err != nil {
		_ = client.Close()
		return err
	}
	return nil
}

// Close ends watches and sessions, and stops an embedded etcd.
func (b *Backend) Close() error { return b.close() }

// Failed returns a channel that is closed when an embedded etcd ended by itself;
// nil when external. The server must end then, for nothing can be stored.
func (b *Backend) Failed() <-chan struct{} {
	if b.server == nil {
		return nil
	}
	return b.server.ended
}

// Health reads through the quorum, and reports a full store. It is for readiness probes.
func (b *Backend) Health(ctx context.Context) error {
	ctx, cancel := b.limit(ctx)
	defer cancel()
	if _, err := b.client.Get(ctx, "/meta/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil {
		return b.explain(ctx, "reading", err)
	}
	alarms, err := b.client.AlarmList(ctx)
	if err != nil {
		return b.explain(ctx, "reading alarms", err)
	}
	for _, a := range alarms.Alarms {
		if a.Alarm != 0 {
			return b.alarmed(a.Alarm.String())
		}
	}
	return nil
}

// alarmed is the error of an alarm that etcd has raised, NOSPACE or CORRUPT.
func (b *Backend) alarmed(alarm string) *fault.Error {
	if alarm == "NOSPACE" {
		return b.full()
	}
	return fault.New(fault.Unavailable, "", "The store at %s has raised the alarm %s.", b.where, alarm).
		WithFix("restore the latest backup into an empty directory")
}

// limit bounds an operation by answerTime and by the life of the backend.
func (b *Backend) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	stop := context.AfterFunc(b.closing, cancel)
	return ctx, func() { stop(); cancel() }
}

var _ store.Backend = (*Backend)(nil)
