package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/storetest"
)

// open starts an embedded etcd in a directory, and closes it with the test.
func open(t testing.TB, c Config) *Backend {
	t.Helper()
	c.NoSync = true
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	b, err := Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return b
}

func commit(t testing.TB, b store.Backend, writes ...store.Write) int64 {
	t.Helper()
	rev, err := b.Commit(context.Background(), nil, writes)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func put(key, value string) store.Write { return store.Write{Key: key, Value: []byte(value)} }

func TestEmbeddedConforms(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Backend {
		return open(t, Config{Dir: t.TempDir()})
	})
}

func TestOneDirectoryHasOneServer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	first := open(t, Config{Dir: dir})
	_, err := Open(t.Context(), Config{Dir: dir})
	if !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("a second server on the same directory: %v; expected a conflict that names the process", err)
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the data directory: %v, %v; expected mode 0700", info.Mode(), err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, Config{Dir: dir}) // free again
}

func TestOpensQuickly(t *testing.T) {
	start := time.Now()
	open(t, Config{Dir: t.TempDir()})
	took := time.Since(start)
	t.Logf("ready after %s", took)
	if took > time.Minute { // usually 0.1 to 0.4 s; a busy machine is no fault
		t.Errorf("ready only after %s", took)
	}
}

func TestStateOutlivesTheServerAndItsLeadershipDoesNot(t *testing.T) {
	dir := t.TempDir()
	b := open(t, Config{Dir: dir})
	rev := commit(t, b, put("/t/a", "1"))
	if _, _, _, err := b.Campaign(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil { // without resigning, as a killed server
		t.Fatal(err)
	}
	b = open(t, Config{Dir: dir})
	es, _, err := b.Get(t.Context(), "/t/a")
	if err != nil || string(es[0].Value) != "1" || es[0].ModRev != rev {
		t.Errorf("after a restart: %+v, %v", es, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // less than the session of the dead one
	defer cancel()
	if _, _, resign, err := b.Campaign(ctx); err != nil {
		t.Errorf("the restarted server waits for its own former leadership: %v", err)
	} else {
		resign()
	}
}

func TestOpeningAndClosingLogNothing(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	h := slog.NewTextHandler(lockedWriter{&mu, &log}, nil)
	dir := t.TempDir()
	for range 2 {
		b, err := Open(t.Context(), Config{Dir: dir, Log: slog.New(h)})
		if err != nil {
			t.Fatal(err)
		}
		commit(t, b, put("/t/a", "1"))
		ctx, cancel := context.WithCancel(t.Context())
		watch := b.Watch(ctx, "/t/", 1)
		<-watch
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		cancel()
	}
	mu.Lock()
	defer mu.Unlock()
	for line := range strings.Lines(log.String()) {
		// A slow disk is worth a warning, and this machine may have one.
		if !strings.Contains(line, "slow") && !strings.Contains(line, "took too long") && !strings.Contains(line, "overloaded") {
			t.Errorf("logged: %s", line)
		}
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  *bytes.Buffer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func TestLeadershipPassesOnResignAndOnSilence(t *testing.T) {
	b := open(t, Config{Dir: t.TempDir(), Session: 2})
	fence, lost, resign, err := b.Campaign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	type win struct {
		fence  store.Fence
		lost   <-chan struct{}
		resign func()
	}
	next := func() <-chan win {
		won := make(chan win, 1)
		go func() {
			f, l, r, err := b.Campaign(context.Background())
			if err != nil {
				t.Error(err)
			}
			won <- win{f, l, r}
		}()
		return won
	}
	second := next()
	guarded := func(f store.Fence) error {
		_, err := b.Commit(t.Context(), []store.Guard{{Key: f.Key, CreateRev: f.CreateRev}}, []store.Write{put("/t/a", "1")})
		return err
	}
	if err := guarded(fence); err != nil {
		t.Errorf("the leader's write: %v", err)
	}
	select {
	case <-second:
		t.Fatal("two leaders")
	case <-lost:
		t.Fatal("lost without a reason")
	case <-time.After(200 * time.Millisecond): // nothing should happen
	}
	resign()
	w := within(t, second)
	if err := guarded(fence); !errors.Is(err, store.ErrConflict) {
		t.Errorf("the write of the one that resigned: %v", err)
	}
	if err := guarded(w.fence); err != nil {
		t.Errorf("the new leader's write: %v", err)
	}

	third := next()
	var lease clientv3.LeaseID
	if _, err := fmt.Sscanf(filepath.Base(w.fence.Key), "%x", &lease); err != nil {
		t.Fatal(err)
	}
	if _, err := b.client.Revoke(t.Context(), lease); err != nil { // what etcd does after a silence of Session seconds
		t.Fatal(err)
	}
	if err := guarded(w.fence); !errors.Is(err, store.ErrConflict) {
		t.Errorf("the write of the one whose session expired: %v", err)
	}
	within(t, w.lost)
	w.resign()
	last := within(t, third)
	last.resign()
}

// within receives, in reasonable time.
func within[T any](t *testing.T, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(time.Minute):
		t.Fatal("nothing happened in a minute")
	}
	return v
}

func TestCampaignEndsWithItsContext(t *testing.T) {
	b := open(t, Config{Dir: t.TempDir()})
	_, _, resign, err := b.Campaign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer resign()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, _, err := b.Campaign(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a campaign that cannot be won: %v", err)
	}
	es, _, err := b.List(t.Context(), leaderPrefix)
	if err != nil || len(es) != 1 {
		t.Errorf("it left its key behind: %v, %v", es, err)
	}
}

func TestFullStoreRefusesChangesAndSaysSo(t *testing.T) {
	dir := t.TempDir()
	b := open(t, Config{Dir: dir, Quota: 6 << 20})
	big := strings.Repeat("x", 512<<10)
	var err error
	// etcd compares its file with the quota, and writes the file ten times a second.
	for i, end := 0, time.Now().Add(15*time.Second); err == nil && time.Now().Before(end); i++ {
		_, err = b.Commit(t.Context(), nil, []store.Write{put(fmt.Sprintf("/t/%d", i%16), big)})
	}
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "is full") || fault.From(err).Fix == "" {
		t.Fatalf("writing beyond the quota: %v", err)
	}
	if es, _, err := b.List(t.Context(), "/t/"); err != nil || len(es) == 0 {
		t.Errorf("reads go on: %d entries, %v", len(es), err)
	}
	if err := b.Health(t.Context()); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Errorf("Health: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b = open(t, Config{Dir: dir, Quota: 64 << 20}) // what the message advises
	commit(t, b, put("/t/again", big))
	if err := b.Health(t.Context()); err != nil {
		t.Errorf("Health with a larger quota: %v", err)
	}
}

// TestToldIsShown gives etcd many watches to tell of each change: the first
// hear of it long before the change's transaction ends.
func TestToldIsShown(t *testing.T) {
	b := open(t, Config{Dir: t.TempDir()})
	start := commit(t, b, put("/t/start", "0"))
	for range 5000 {
		b.client.Watch(t.Context(), "/t/", clientv3.WithPrefix(), clientv3.WithRev(start+1))
	}
	ours := b.Watch(t.Context(), "/t/", start)
	go func() { // ends with its last commit
		for i := range 50 {
			if _, err := b.Commit(t.Context(), nil, []store.Write{put(fmt.Sprintf("/t/%03d", i), "v")}); err != nil {
				t.Errorf("committing: %v", err)
			}
		}
	}()
	for n := 0; n < 50; {
		batch := within(t, ours)
		if batch.Err != nil {
			t.Fatal(batch.Err)
		}
		for _, ev := range batch.Events {
			if es, at, err := b.Get(t.Context(), ev.Key); err != nil || es[0].ModRev != ev.ModRev {
				t.Errorf("told of %s at revision %d, but a read at %d shows revision %d: %v", ev.Key, ev.ModRev, at, es[0].ModRev, err)
			}
		}
		n += len(batch.Events)
	}
}
