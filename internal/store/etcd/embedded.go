package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

const (
	maxTxnOps    = 10_000           // etcd's default of 128 is less than one large pool
	maxRequest   = 8 << 20          // bytes of one transaction
	defaultQuota = 2 << 30          // bytes
	readyTime    = 60 * time.Second // replaying a large log on a slow disk
	keepHistory  = "10m"            // revisions older than this are compacted away
)

// server is an embedded etcd and the lock on its directory.
type server struct {
	etcd    *embed.Etcd
	lock    *os.File
	quiet   atomic.Bool // while starting and closing, what etcd reports is expected, or an error that we return
	closing atomic.Bool
	ended   chan struct{} // closed when etcd ended before close was called
}

// embed locks the directory, starts etcd in it and waits until it answers.
func (b *Backend) embed(ctx context.Context, c Config) error {
	if c.Dir == "" {
		return errors.New("etcd: neither a directory nor endpoints are given")
	}
	if c.Quota == 0 {
		c.Quota = defaultQuota
	}
	if err := makePrivate(c.Dir); err != nil {
		return err
	}
	lock, err := lockDir(c.Dir)
	if err != nil {
		return err
	}
	s := &server{lock: lock, ended: make(chan struct{})}
	if err := s.start(ctx, c); err != nil {
		_ = lock.Close()
		return err
	}
	b.server = s
	b.client = v3client.New(s.etcd.Server)
	if err := b.settle(ctx, c.Quota); err != nil {
		_ = b.client.Close()
		return errors.Join(err, s.close())
	}
	return nil
}

// makePrivate makes the directory, for its owner only.
func makePrivate(dir string) error {
	if err := effect.Do("make data directory", func() error { return os.MkdirAll(dir, 0o700) }); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("closing the data directory to others: %w", err)
	}
	return nil
}

// lockDir takes the directory for this process until the file is closed. The
// kernel gives the lock back when the process dies, however it dies.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock of the data directory: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		_ = f.Close()
		return nil, fault.New(fault.Conflict, "", "The data directory %s is in use by another server (process %s).", dir, strings.TrimSpace(string(holder[:n]))).
			WithFix("end that server, or give this one another directory")
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("locking the data directory: %w", err)
	}
	return f, nil
}

// start runs etcd and waits until it is ready.
func (s *server) start(ctx context.Context, c Config) error {
	cfg := embed.NewConfig()
	cfg.Name = "keyfleet"
	cfg.Dir = filepath.Join(c.Dir, "etcd")
	// No client listener: the client calls functions. etcd insists on a peer
	// listener; it gets a free loopback port, and there are no peers.
	none := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = nil, nil
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{none}, []url.URL{none}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newLogger(c.Log, &s.quiet))
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, keepHistory
	cfg.QuotaBackendBytes, cfg.MaxTxnOps, cfg.MaxRequestBytes = c.Quota, maxTxnOps, maxRequest
	// A single member needs no log for others to catch up with: keep it short in memory.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 5000, 100
	// With one member an election is never contested, but etcd still waits a
	// random part of this time before it holds one: it is most of a start.
	cfg.TickMs, cfg.ElectionMs = 50, 250
	cfg.EnableGRPCGateway = false
	cfg.UnsafeNoFsync = c.NoSync
	s.quiet.Store(true)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("starting the embedded etcd in %s: %w", cfg.Dir, err)
	}
	s.etcd = e
	select {
	case <-e.Server.ReadyNotify():
	case err = <-e.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(readyTime):
		err = fmt.Errorf("not ready after %s", readyTime)
	}
	if err != nil {
		e.Close()
		return fmt.Errorf("starting the embedded etcd in %s: %w", cfg.Dir, err)
	}
	s.quiet.Store(false)
	go s.watch()
	return nil
}

// watch notices when etcd ends; it ends with it.
func (s *server) watch() {
	<-s.etcd.Server.StopNotify()
	if !s.closing.Load() {
		close(s.ended)
	}
}

func (s *server) failed() <-chan struct{} { return s.ended }

func (s *server) close() error {
	s.closing.Store(true)
	s.quiet.Store(true)
	s.etcd.Close()
	return s.lock.Close()
}

// settle clears what a former process left: its leadership, which nobody can hold
// while we hold the lock, and a NOSPACE alarm, if there is space again after
// giving back that of old revisions.
func (b *Backend) settle(ctx context.Context, quota int64) error {
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	if _, err := b.client.Delete(ctx, "/leader/", clientv3.WithPrefix()); err != nil {
		return b.explain(ctx, "clearing old leaderships", err)
	}
	alarms, err := b.client.AlarmList(ctx)
	if err != nil {
		return b.explain(ctx, "reading alarms", err)
	}
	if len(alarms.Alarms) == 0 {
		return nil
	}
	if err := b.reclaim(ctx, quota); err != nil {
		b.log.Error("the store is full and stays read-only", "error", err)
	}
	return nil
}

// Compact forgets all history up to now. Watches that are behind are told so.
func (b *Backend) Compact(ctx context.Context) error {
	head, err := b.client.Get(ctx, "/meta/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return b.explain(ctx, "compacting", err)
	}
	_, err = b.client.Compact(ctx, head.Header.Revision, clientv3.WithCompactPhysical())
	if err != nil && !errors.Is(err, rpctypes.ErrCompacted) { // that was done already
		return b.explain(ctx, "compacting", err)
	}
	return nil
}

// reclaim gives the space of old revisions back to the file system and clears
// the NOSPACE alarm if that helped.
func (b *Backend) reclaim(ctx context.Context, quota int64) error {
	if err := b.Compact(ctx); err != nil {
		return err
	}
	// The client's Defragment and Status need a listener; the server has them too.
	file := b.server.etcd.Server.Backend()
	if err := file.Defrag(); err != nil {
		return fmt.Errorf("defragmenting: %w", err)
	}
	if file.Size() >= quota*9/10 {
		return fmt.Errorf("%d bytes are in use and the quota is %d", file.Size(), quota)
	}
	_, err := b.client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	return err
}
