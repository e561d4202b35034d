package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

const (
	maxTxnOps    = 10_000           // etcd's default of 128 is less than one large pool
	maxRequest   = 8 << 20          // bytes of one transaction
	defaultQuota = 2 << 30          // bytes
	readyTime    = 60 * time.Second // replaying a large log on a slow disk
	keepHistory  = "10m"            // revisions older than this are compacted away
)

// server is an embedded etcd.
type server struct {
	etcd    *embed.Etcd
	quiet   atomic.Bool // while starting and closing, what etcd reports is expected, or an error that we return
	closing atomic.Bool
	ended   chan struct{} // closed when etcd ended before close was called
}

// embed starts etcd in the directory and waits until it answers.
func (b *Backend) embed(ctx context.Context, c Config) error {
	if c.Quota == 0 {
		c.Quota = defaultQuota
	}
	s := &server{ended: make(chan struct{})}
	if err := s.start(ctx, c); err != nil {
		return err
	}
	b.server = s
	b.client = v3client.New(s.etcd.Server)
	if err := b.settle(ctx, c.Quota); err != nil {
		_ = b.client.Close()
		s.close()
		return err
	}
	return nil
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

func (s *server) close() {
	s.closing.Store(true)
	s.quiet.Store(true)
	s.etcd.Close()
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
