// Package host offers machines that joined by themselves as nodes.
//
// Idea: any machine that runs `keyfleet-agent join` with a pool's join token is
// registered as a free host of that pool (package pool keeps the records). A
// resize picks free hosts; a host that is no longer wanted gets an order to
// release, removes everything it was given, and is free again. This package
// starts nothing: it turns the provider's words into records and orders that
// agents carry out.
//
// Invariant: a host counts as released only when its agent has said so. Until
// then Stop answers "not yet", and the host is nobody else's.
//
// Consequence for the operator: a pool without a free host waits, and its resize
// error names the command that adds one. A host that died while it was a node
// keeps its node in "leaving" until the machine comes back or is struck off.
package host

import (
	"context"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
)

// Records is what the provider needs of the pools; *pool.Fleet has it.
type Records interface {
	// TakeHost makes a free host of the pool the node, or fault.Unavailable.
	TakeHost(ctx context.Context, poolKey, os, nodeID string) (*pool.Host, error)
	// OrderHost gives the node's host an order; nil where no host is the node.
	OrderHost(ctx context.Context, nodeID, kind string) (*pool.Host, error)
	// HostsInUse returns the hosts that are nodes, by node id.
	HostsInUse(ctx context.Context) (map[string]*pool.Host, error)
}

// Provider is the provider "host". Records must be set before it is used; it
// is a field because a Fleet is made with its providers.
type Provider struct{ Records Records }

var _ pool.Provider = (*Provider)(nil)

// Name is "host".
func (p *Provider) Name() string { return "host" }

// Offers reports true for every operating system an agent exists for.
func (p *Provider) Offers(os string) bool { return os == "linux" || os == "windows" }

// Start makes a free host of the pool the node.
func (p *Provider) Start(ctx context.Context, n pool.NodeSpec) error {
	if _, err := p.Records.TakeHost(ctx, strings.ToLower(n.Pool), n.OS, n.ID); err != nil {
		return fmt.Errorf("taking a host for node %s: %w", n.ID, err)
	}
	return nil
}

// again is when to look whether an order was carried out; an agent that is
// connected needs less, one that is not comes when it comes.
const again = 2 * time.Second

// Stop orders the host to release what it was given. It is nil once no host is
// the node any more, and fault.Unavailable until then.
func (p *Provider) Stop(ctx context.Context, nodeID string) error {
	h, err := p.Records.OrderHost(ctx, nodeID, "release")
	if err != nil {
		return fmt.Errorf("releasing the host of node %s: %w", nodeID, err)
	}
	if h == nil {
		return nil
	}
	return fault.New(fault.Unavailable, "HostNotReleased", "The host %s has not yet removed what it was given.", h.Status.Hostname).
		WithFix("See that keyfleet-agent runs there and reaches this server.").After(again)
}

// Restart orders the host to reboot.
func (p *Provider) Restart(ctx context.Context, nodeID string) error {
	return p.order(ctx, nodeID, "reboot")
}

// Reimage orders the host to remove what it was given and to begin anew.
func (p *Provider) Reimage(ctx context.Context, n pool.NodeSpec) error {
	return p.order(ctx, n.ID, "reimage")
}

func (p *Provider) order(ctx context.Context, nodeID, kind string) error {
	h, err := p.Records.OrderHost(ctx, nodeID, kind)
	if err != nil {
		return fmt.Errorf("ordering a %s of node %s: %w", kind, nodeID, err)
	}
	if h == nil {
		return fault.New(fault.NotFound, "NodeNotFound", "No host is the node %s.", nodeID)
	}
	return nil
}

// List returns the nodes that hosts are. A host is always "running" here;
// whether its agent is heard from is the pool's own knowledge.
func (p *Provider) List(ctx context.Context) ([]pool.ProviderNode, error) {
	hosts, err := p.Records.HostsInUse(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing hosts: %w", err)
	}
	var out []pool.ProviderNode
	for _, h := range hosts {
		detail := "host " + h.Status.Hostname
		if h.Spec.Order != nil {
			detail += ", " + h.Spec.Order.Kind + " ordered"
		}
		out = append(out, pool.ProviderNode{ID: h.Spec.Node, Running: true, Detail: detail})
	}
	return out, nil
}
