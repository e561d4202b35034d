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

// Host is a machine that registered itself with a pool's join token. Its id is
// the name in its agent certificate, in the form of a node id.
type Host = store.Object[HostWanted, HostSeen]

// Hosts is the collection of registered hosts.
var Hosts = store.NewCollection[HostWanted, HostSeen]("hosts")

// HostWanted is what a host should be.
type HostWanted struct {
	Pool  string       `json:"pool"`            // store id of the pool that may use it
	OS    string       `json:"os"`              // "linux", "windows"
	Node  string       `json:"node,omitempty"`  // the node that it is; empty: it is free
	Order *node.Action `json:"order,omitempty"` // reboot, reimage or release, until the agent says it is done
}

// HostSeen is what was seen of a host.
type HostSeen struct {
	Hostname  string    `json:"hostname"`
	Agent     string    `json:"agent"`               // version
	Enrolled  time.Time `json:"enrolled"`            // when it registered
	LastSeen  time.Time `json:"lastSeen,omitzero"`   // the agent's last word, at most heartbeatEvery old
	Transport string    `json:"transport,omitempty"` // PEM certificate for protected settings
	Done      string    `json:"done,omitempty"`      // the last order that it carried out
}

// HostState says what a registered host is, for people.
func HostState(h *Host) string {
	switch {
	case !h.Deleting.IsZero():
		return "leaving"
	case h.Spec.Order != nil && h.Spec.Order.Kind == "release":
		return "releasing"
	case h.Spec.Node != "":
		return "in use"
	}
	return "free"
}

// enrolHost registers a host, or answers the id that the token gave it before.
func (f *Fleet) enrolHost(tx *store.Tx, tok JoinToken, e node.EnrolRequest, now time.Time) (string, error) {
	p, err := f.get(tx, tok.Pool)
	if err != nil {
		return "", err
	}
	if !p.Deleting.IsZero() {
		return "", poolBeingDeleted(p)
	}
	if tok.Host != "" {
		if h, err := Hosts.Lookup(tx, tok.Host); err != nil || h != nil {
			return tok.Host, err
		}
		return "", tokenRefused()
	}
	var b [16]byte
	rand.Read(b[:])
	h := &Host{Spec: HostWanted{Pool: p.ID, OS: strings.ToLower(e.OS)}}
	h.ID = hex.EncodeToString(b[:]) + "000000"
	h.Status = HostSeen{Hostname: e.Hostname, Agent: e.Agent, Enrolled: now, LastSeen: now, Transport: e.Transport}
	if err := Hosts.Insert(tx, h); err != nil {
		return "", err
	}
	return h.ID, touch(tx, nodeMark(h.ID), func(*Mark) {})
}

// hostReport notes a host's word and hands it on to the node that it is.
func (f *Fleet) hostReport(ctx context.Context, id string, r node.StatusReport, now time.Time) error {
	var nodeID string
	var obeyed bool
	err := f.cfg.Store.Update(ctx, func(tx *store.Tx) error {
		h, err := Hosts.Get(tx, id)
		if err != nil {
			return err
		}
		nodeID = h.Spec.Node
		done := h.Spec.Order != nil && r.Done == h.Spec.Order.ID
		obeyed = done
		if !done && now.Sub(h.Status.LastSeen) < heartbeatEvery {
			return nil
		}
		h.Status.LastSeen = now
		if !done {
			return Hosts.Put(tx, h)
		}
		released := h.Spec.Order.Kind == "release"
		h.Status.Done, h.Spec.Order = r.Done, nil
		if released {
			h.Spec.Node, nodeID = "", ""
		}
		if err := Hosts.Put(tx, h); err != nil {
			return err
		}
		return touch(tx, nodeMark(id), func(m *Mark) { m.Node = h.Spec.Node })
	})
	if err != nil || nodeID == "" {
		return err
	}
	f.seen.note(nodeID, now)
	err = f.nodeReport(ctx, nodeID, r, obeyed, now)
	if fault.KindOf(err) == fault.NotFound {
		return nil // the node is gone and the host not yet released
	}
	return err
}

// storeKey is the store id of a pool that is named by it or by its resource id.
func storeKey(pool string) string {
	if id, err := arm.ParseID(pool); err == nil {
		return id.StoreKey()
	}
	return strings.ToLower(pool)
}

// TakeHost makes a free host of the pool (a resource id or store id) the node: fault.Unavailable if there
// is none. A host that is the node already is taken again without harm. Hosts
// that were heard last come first.
func (f *Fleet) TakeHost(ctx context.Context, poolKey, os, nodeID string) (*Host, error) {
	var taken *Host
	poolKey = storeKey(poolKey)
	op := access.Op{Action: "Keyfleet/hosts/take/action", Resource: "/keyfleet/v1/hosts", Detail: "node " + nodeID}
	err := f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		all, err := Hosts.List(tx, "")
		if err != nil {
			return err
		}
		best := ""
		for _, h := range all {
			if h.Spec.Node == nodeID {
				taken = h
				return nil
			}
			if !usable(h, poolKey, os) {
				continue
			}
			if best == "" || f.lastHeard(h).After(f.lastHeard(find(all, best))) {
				best = h.ID
			}
		}
		if best == "" {
			return fault.New(fault.Unavailable, "NoFreeHost", "No registered host of the pool is free.").
				WithFix("register one: keyfleet node join-token --pool POOL, then on the machine: keyfleet-agent join --server URL --ca-hash H --token T --pool POOL").
				After(hostWait)
		}
		if taken, err = Hosts.Get(tx, best); err != nil { // guarded: two resizes never take one host
			return err
		}
		if !usable(taken, poolKey, os) {
			return fault.New(fault.Unavailable, "NoFreeHost", "The host was taken meanwhile.").After(time.Second)
		}
		taken.Spec.Node = nodeID
		if err := Hosts.Put(tx, taken); err != nil {
			return err
		}
		if err := f.adopt(tx, taken, nodeID); err != nil {
			return err
		}
		return touch(tx, nodeMark(taken.ID), func(m *Mark) { m.Node = nodeID })
	})
	return taken, err
}

// hostWait is how long to wait before looking for a free host again, if none registers before.
const hostWait = 5 * time.Second

func usable(h *Host, poolKey, os string) bool {
	return h.Spec.Pool == poolKey && h.Spec.OS == os && h.Spec.Node == "" && h.Spec.Order == nil && h.Deleting.IsZero()
}

func find(all []*Host, id string) *Host {
	for _, h := range all {
		if h.ID == id {
			return h
		}
	}
	return nil
}

func (f *Fleet) lastHeard(h *Host) time.Time { return f.seen.newest(h.ID, h.Status.LastSeen) }

// adopt gives the node what the host brought with it: it has enrolled already.
func (f *Fleet) adopt(tx *store.Tx, h *Host, nodeID string) error {
	n, err := Nodes.Get(tx, nodeID)
	if err != nil {
		return err
	}
	n.Status.Enrolled, n.Status.Hostname, n.Status.Transport = h.Status.Enrolled, h.Status.Hostname, h.Status.Transport
	if err := Nodes.Put(tx, n); err != nil {
		return err
	}
	return f.markNode(tx, n)
}

// OrderHost gives the host that is the node an order; a second order of the
// same kind while the first is not done changes nothing. It answers nil where
// no host is the node.
func (f *Fleet) OrderHost(ctx context.Context, nodeID, kind string) (*Host, error) {
	h, err := f.HostOf(ctx, nodeID)
	if err != nil || h == nil {
		return nil, err
	}
	op := access.Op{Action: "Keyfleet/hosts/" + kind + "/action", Resource: "/keyfleet/v1/hosts/" + h.ID}
	err = f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		if h, err = Hosts.Get(tx, h.ID); err != nil {
			return err
		}
		if h.Spec.Node != nodeID || (h.Spec.Order != nil && h.Spec.Order.Kind == kind) {
			return nil
		}
		var b [8]byte
		rand.Read(b[:])
		h.Spec.Order = &node.Action{ID: hex.EncodeToString(b[:]), Kind: kind}
		if err := Hosts.Put(tx, h); err != nil {
			return err
		}
		return touch(tx, nodeMark(h.ID), func(*Mark) {})
	})
	return h, err
}

// HostOf returns the host that is the node, nil if none is.
func (f *Fleet) HostOf(ctx context.Context, nodeID string) (*Host, error) {
	all, err := f.HostsInUse(ctx)
	if err != nil {
		return nil, err
	}
	return all[nodeID], nil
}

// HostsInUse returns the hosts that are nodes, by node id.
func (f *Fleet) HostsInUse(ctx context.Context) (map[string]*Host, error) {
	all, err := Hosts.List(f.cfg.Store.View(ctx), "")
	if err != nil {
		return nil, err
	}
	out := map[string]*Host{}
	for _, h := range all {
		if h.Spec.Node != "" {
			out[h.Spec.Node] = h
		}
	}
	return out, nil
}

// ListHosts returns the registered hosts.
func (f *Fleet) ListHosts(ctx context.Context) ([]*Host, error) {
	if err := f.cfg.Gate.Read(ctx, access.Op{Action: "Keyfleet/hosts/read", Resource: "/keyfleet/v1/hosts"}); err != nil {
		return nil, err
	}
	return Hosts.List(f.cfg.Store.View(ctx), "")
}

// abandoned reports whether the node that the host is should be gone, and only
// waits for the host to say that it removed everything.
func (f *Fleet) abandoned(tx *store.Tx, h *Host) bool {
	n, err := Nodes.Lookup(tx, h.Spec.Node)
	return err == nil && (n == nil || !n.Deleting.IsZero())
}

// RemoveHost strikes a host off. One that is a node is refused, unless the node
// is being removed: then the host is taken for lost.
func (f *Fleet) RemoveHost(ctx context.Context, id string) error {
	op := access.Op{Action: "Keyfleet/hosts/delete", Resource: "/keyfleet/v1/hosts/" + id}
	return f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		h, err := Hosts.Lookup(tx, strings.ToLower(id))
		if err != nil || h == nil {
			return err
		}
		if h.Spec.Node != "" && !f.abandoned(tx, h) {
			return fault.New(fault.Conflict, "HostInUse", "The host %s is the node %s.", h.Status.Hostname, h.Spec.Node).
				WithFix("remove the node from its pool first: keyfleet node delete POOL %s", h.Spec.Node)
		}
		if err := marks.Delete(tx, nodeMark(h.ID)); err != nil {
			return err
		}
		return Hosts.Delete(tx, h.ID)
	})
}

// AgentOf returns the name under which the agent of a node is connected: the
// node's own id, or that of the registered host that is the node.
func (f *Fleet) AgentOf(ctx context.Context, pool arm.ID, nodeID string) (string, error) {
	tx := f.cfg.Store.View(ctx)
	p, err := f.get(tx, pool.StoreKey())
	if err != nil {
		return "", err
	}
	n, err := f.node(tx, p, nodeID)
	if err != nil {
		return "", err
	}
	h, err := f.HostOf(ctx, n.ID)
	if err != nil || h == nil {
		return n.ID, err
	}
	return h.ID, nil
}
