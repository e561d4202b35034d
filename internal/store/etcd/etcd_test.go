package etcd

import (
	"context"
	"log/slog"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/storetest"
)

// open starts an embedded etcd in a directory of the test.
func open(t *testing.T, dir string) *Backend {
	t.Helper()
	b, err := Open(t.Context(), Config{Dir: dir, NoSync: true, Log: slog.New(slog.DiscardHandler)})
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

// compacting lets the conformance suite compact.
type compacting struct {
	store.Backend
	raw *Backend
}

func (c compacting) Compact(ctx context.Context) error {
	head, err := c.raw.client.Get(ctx, "/")
	if err != nil {
		return err
	}
	_, err = c.raw.client.Compact(ctx, head.Header.Revision, clientv3.WithCompactPhysical())
	return err
}

func TestEmbeddedConforms(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Backend {
		b := open(t, t.TempDir())
		return compacting{b, b}
	})
}
