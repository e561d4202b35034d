package host_test

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
	"keyfleet.dev/keyfleet/internal/provider/host"
)

// records plays the pool's records of one host.
type records struct {
	host   pool.Host
	orders []string
}

func (r *records) TakeHost(_ context.Context, poolKey, os, nodeID string) (*pool.Host, error) {
	if r.host.Spec.Pool != poolKey || r.host.Spec.OS != os || r.host.Spec.Node != "" && r.host.Spec.Node != nodeID {
		return nil, fault.New(fault.Unavailable, "NoFreeHost", "No registered host of the pool is free.")
	}
	r.host.Spec.Node = nodeID
	return &r.host, nil
}

func (r *records) OrderHost(_ context.Context, nodeID, kind string) (*pool.Host, error) {
	if r.host.Spec.Node != nodeID {
		return nil, nil
	}
	r.host.Spec.Order = &node.Action{ID: "1", Kind: kind}
	r.orders = append(r.orders, kind)
	return &r.host, nil
}

func (r *records) HostsInUse(context.Context) (map[string]*pool.Host, error) {
	return map[string]*pool.Host{r.host.Spec.Node: &r.host}, nil
}

// TestLife: a host is taken, ordered about, and gone only when it said so.
func TestLife(t *testing.T) {
	r := &records{}
	r.host.Spec.Pool, r.host.Spec.OS, r.host.Status.Hostname = "/subscriptions/s/resourcegroups/g/pools/p", "linux", "rack7"
	p := &host.Provider{Records: r}
	ctx := t.Context()
	spec := pool.NodeSpec{ID: "n0", Pool: "/subscriptions/S/resourceGroups/G/pools/P", OS: "linux"}
	for range 2 { // starting is idempotent
		if err := p.Start(ctx, spec); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Start(ctx, pool.NodeSpec{ID: "n1", Pool: spec.Pool, OS: "linux"}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a second node got the same host: %v", err)
	}
	got, err := p.List(ctx)
	if diff := cmp.Diff([]pool.ProviderNode{{ID: "n0", Running: true, Detail: "host rack7"}}, got); diff != "" || err != nil {
		t.Errorf("list (-want +got), %v:\n%s", err, diff)
	}
	if err := errors.Join(p.Restart(ctx, "n0"), p.Reimage(ctx, spec)); err != nil {
		t.Error(err)
	}
	if err := p.Restart(ctx, "n9"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a node that no host is: %v", err)
	}
	if err := p.Stop(ctx, "n0"); !errors.Is(err, fault.Unavailable) || fault.From(err).RetryAfter == 0 {
		t.Errorf("a host that has not yet released: %v", err)
	}
	r.host.Spec.Node, r.host.Spec.Order = "", nil // what its agent's report does
	if err := p.Stop(ctx, "n0"); err != nil {
		t.Errorf("a host that has released: %v", err)
	}
	if diff := cmp.Diff([]string{"reboot", "reimage", "release"}, r.orders); diff != "" {
		t.Errorf("orders (-want +got):\n%s", diff)
	}
}
