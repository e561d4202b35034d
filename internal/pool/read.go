package pool

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

const poolRead = "Microsoft.Batch/batchAccounts/pools/read"

// GetPool returns a pool.
func (f *Fleet) GetPool(ctx context.Context, id arm.ID) (*Pool, error) {
	if err := f.cfg.Gate.Read(ctx, access.Op{Action: poolRead, Resource: id.String()}); err != nil {
		return nil, err
	}
	if err := poolID(id); err != nil {
		return nil, err
	}
	return f.get(f.cfg.Store.View(ctx), id.StoreKey())
}

// ListPools returns the pools of an account, by name.
func (f *Fleet) ListPools(ctx context.Context, account arm.ID) ([]*Pool, error) {
	if err := f.cfg.Gate.Read(ctx, access.Op{Action: poolRead, Resource: account.String()}); err != nil {
		return nil, err
	}
	tx := f.cfg.Store.View(ctx)
	if _, err := f.account(tx, account); err != nil {
		return nil, err
	}
	return Pools.List(tx, account.StoreKey()+"/")
}

// ETag is the pool's entity tag, without quotes.
func (f *Fleet) ETag(p *Pool) string { return p.ETag(f.cfg.Store) }

// NodeView is a node as it is now.
type NodeView struct {
	*Node
	State  string // computed now
	Since  time.Time
	Errors []NodeError
}

// view computes a node's state as of now. A node that is on its way also shows
// what is known to be in its way: secrets that its pool cannot read.
func (f *Fleet) view(p *Pool, n *Node, now time.Time) NodeView {
	state, errs := NodeState(n, f.Requirements(&p.Spec), f.seen.newest(n.ID, n.Status.LastSeen), now)
	v := NodeView{Node: n, State: state, Since: n.Status.StateSince, Errors: errs}
	if v.Since.IsZero() || state != n.Status.State {
		v.Since = now.UTC().Truncate(time.Second)
		if n.Status.StateSince.IsZero() {
			v.Since = n.Created
		}
	}
	if state == StateCreating || state == StateStarting || state == StateUnusable {
		for _, x := range p.Status.Findings {
			if x.Code == "PinnedVersion" {
				continue
			}
			e := NodeError{Code: x.Code, Message: x.Reason, Details: []fault.Detail{{Code: "Path", Message: x.Path}}}
			if x.Fix != "" {
				e.Details = append(e.Details, fault.Detail{Code: "Fix", Message: x.Fix})
			}
			v.Errors = append(v.Errors, e)
		}
	}
	return v
}

// node returns a node of the pool.
func (f *Fleet) node(tx *store.Tx, p *Pool, id string) (*Node, error) {
	n, err := Nodes.Lookup(tx, strings.ToLower(id))
	if err != nil {
		return nil, err
	}
	if n == nil || n.Spec.Pool != p.ID {
		return nil, fault.New(fault.NotFound, "NodeNotFound", "The pool %q has no node %q.", p.Spec.Name(), id).
			WithFix("list the nodes: keyfleet node list %s", p.Spec.Name())
	}
	return n, nil
}

func (f *Fleet) readPool(ctx context.Context, id arm.ID) (*store.Tx, *Pool, error) {
	p, err := f.GetPool(ctx, id)
	return f.cfg.Store.View(ctx), p, err
}

// ListNodes returns the nodes of a pool, by id.
func (f *Fleet) ListNodes(ctx context.Context, pool arm.ID) ([]NodeView, error) {
	tx, p, err := f.readPool(ctx, pool)
	if err != nil {
		return nil, err
	}
	all, err := Nodes.List(tx, p.UID)
	if err != nil {
		return nil, err
	}
	now := f.cfg.Now()
	out := make([]NodeView, len(all))
	for i, n := range all {
		out[i] = f.view(p, n, now)
	}
	return out, nil
}

// GetNode returns a node of a pool.
func (f *Fleet) GetNode(ctx context.Context, pool arm.ID, id string) (NodeView, error) {
	tx, p, err := f.readPool(ctx, pool)
	if err != nil {
		return NodeView{}, err
	}
	n, err := f.node(tx, p, id)
	if err != nil {
		return NodeView{}, err
	}
	return f.view(p, n, f.cfg.Now()), nil
}

// OrderNode asks for a "reboot" or a "reimage". A node that is under another
// order refuses with fault.Conflict; repeating the order under way changes nothing.
func (f *Fleet) OrderNode(ctx context.Context, pool arm.ID, id, kind string) error {
	if kind != "reboot" && kind != "reimage" {
		return fault.New(fault.Invalid, "InvalidPropertyValue", "%q is neither reboot nor reimage.", kind)
	}
	return f.changeNode(ctx, pool, id, kind, func(n *Node) error {
		switch orderState(n) {
		case "":
		case StateRebooting:
			if kind == "reboot" {
				return nil
			}
			return fault.New(fault.Conflict, "NodeBeingRebooted", "The node %q is being rebooted.", n.ID)
		default:
			if kind == "reimage" {
				return nil
			}
			return fault.New(fault.Conflict, "NodeBeingReimaged", "The node %q is being reimaged.", n.ID)
		}
		if n.Status.Allocated.IsZero() {
			return fault.New(fault.Conflict, "NodeBeingCreated", "The node %q is being created.", n.ID)
		}
		var b [8]byte
		rand.Read(b[:])
		n.Spec.Order = &node.Action{ID: hex.EncodeToString(b[:]), Kind: kind}
		n.Status.OrderedBoot = ""
		if r := n.Status.Report; r != nil {
			n.Status.OrderedBoot = r.BootID
		}
		return nil
	})
}

// SetScheduling switches a node's task scheduling on or off. Keyfleet runs no
// tasks; a node that is switched off is "offline" instead of "idle".
func (f *Fleet) SetScheduling(ctx context.Context, pool arm.ID, id string, on bool) error {
	return f.changeNode(ctx, pool, id, "scheduling", func(n *Node) error {
		if n.Spec.Disabled != on {
			return fault.New(fault.Conflict, "NodeAlreadyInTargetSchedulingState", "The node %q is in that scheduling state already.", n.ID)
		}
		n.Spec.Disabled = !on
		return nil
	})
}

func (f *Fleet) changeNode(ctx context.Context, pool arm.ID, id, verb string, fn func(*Node) error) error {
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/pools/write", Resource: pool.String(), Detail: verb + " of node " + printable(id)}
	return f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		p, err := f.get(tx.Store().View(ctx), pool.StoreKey())
		if err != nil {
			return err
		}
		n, err := f.node(tx, p, id)
		if err != nil {
			return err
		}
		if !n.Deleting.IsZero() {
			return fault.New(fault.Conflict, "OperationInvalidForCurrentState", "The node %q is leaving the pool.", n.ID)
		}
		before := n.Spec
		if err := fn(n); err != nil || (before.Order == n.Spec.Order && before.Disabled == n.Spec.Disabled) {
			return err
		}
		f.settleWith(p, n, f.cfg.Now())
		return Nodes.Put(tx, n)
	})
}

// NodeIdentity chooses the pool's identity that a node's token request means.
// The faults carry IMDS's two cases: IdentityNotFound, and MultipleIdentities
// where none is named and there are several.
func (f *Fleet) NodeIdentity(ctx context.Context, id string, r node.TokenRequest) (Identity, error) {
	tx := f.cfg.Store.View(ctx)
	own, err := marks.Lookup(tx, nodeMark(id))
	if err == nil && own != nil && own.Spec.Node != "" { // a registered host: as the node that it is
		own, err = marks.Lookup(tx, nodeMark(own.Spec.Node))
	}
	if err != nil {
		return Identity{}, err
	}
	if own == nil || own.Spec.Pool == "" {
		return Identity{}, fault.New(fault.Invalid, "IdentityNotFound", "Identity not found: the machine belongs to no pool.")
	}
	p, err := f.get(tx, own.Spec.Pool)
	if err != nil {
		return Identity{}, err
	}
	ids := p.Spec.Identity.IDs
	named := r.ClientID != "" || r.ObjectID != "" || r.ResourceID != ""
	if !named && len(ids) > 1 {
		return Identity{}, fault.New(fault.Invalid, "MultipleIdentities", "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request.")
	}
	for _, v := range ids {
		if (r.ClientID == "" || strings.EqualFold(r.ClientID, v.ClientID)) && (r.ObjectID == "" || strings.EqualFold(r.ObjectID, v.ObjectID)) &&
			(r.ResourceID == "" || strings.EqualFold(r.ResourceID, v.ResourceID)) {
			return v, nil
		}
	}
	return Identity{}, fault.New(fault.Invalid, "IdentityNotFound", "Identity not found.").
		WithFix("name an identity of the pool by its client id; identities are put on a pool when it is created")
}

// PoolGone reports whether the pool with this UID is gone: what the poller of a
// deletion asks.
func (f *Fleet) PoolGone(ctx context.Context, id arm.ID, uid string) (bool, error) {
	if err := f.cfg.Gate.Read(ctx, access.Op{Action: poolRead, Resource: id.String()}); err != nil {
		return false, err
	}
	p, err := Pools.Lookup(f.cfg.Store.View(ctx), id.StoreKey())
	return err == nil && (p == nil || p.UID != uid), err
}
