package pool

import (
	"context"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Node is a stored node. Its id is the node id: the pool's UID and six digits.
type Node = store.Object[NodeWanted, NodeSeen]

// Nodes is the collection of nodes.
var Nodes = store.NewCollection[NodeWanted, NodeSeen]("nodes")

// NodeWanted is what a node should be.
type NodeWanted struct {
	Pool     string       `json:"pool"`            // store id of its pool
	PoolID   string       `json:"poolId"`          // resource id of its pool
	OS       string       `json:"os"`              // "linux", "windows"
	VMSize   string       `json:"vmSize"`          // as the pool says it
	Order    *node.Action `json:"order,omitempty"` // the last reboot or reimage asked for; done when NodeSeen.Done is its ID
	Disabled bool         `json:"disabled,omitempty"`
}

// NodeSeen is what was seen of a node, by its provider and by its agent.
type NodeSeen struct {
	State       string             `json:"state"` // of [NodeState], when it was last computed
	StateSince  time.Time          `json:"stateSince,omitzero"`
	Provider    string             `json:"provider,omitempty"`   // who runs it
	Allocated   time.Time          `json:"allocated,omitzero"`   // when the provider first had it
	Attempts    int                `json:"attempts,omitempty"`   // starts that failed in a row
	StartError  *fault.Detail      `json:"startError,omitempty"` // why the last one failed
	StartFinal  bool               `json:"startFinal,omitempty"` // trying again cannot help
	Enrolled    time.Time          `json:"enrolled,omitzero"`
	Hostname    string             `json:"hostname,omitempty"`    // what the machine calls itself
	Transport   string             `json:"transport,omitempty"`   // PEM certificate for protected settings
	LastSeen    time.Time          `json:"lastSeen,omitzero"`     // the agent's last word, at most heartbeatEvery old
	Report      *node.StatusReport `json:"report,omitempty"`      // the last report
	Done        string             `json:"done,omitempty"`        // id of the last order carried out
	OrderedBoot string             `json:"orderedBoot,omitempty"` // the agent's boot id when the order was given
}

// heartbeatEvery is how often an unchanged report is written down: often
// enough that silence is noticed after offlineAfter, seldom enough that a
// thousand idle nodes cost some 30 small writes a second.
const heartbeatEvery = 30 * time.Second

// offlineAfter is how long an agent may be silent before its node counts as unknown.
const offlineAfter = 90 * time.Second

// seen remembers in memory when agents were last heard; the store has it only
// every heartbeatEvery. A server that just started has heard everybody.
type seen struct {
	mu    sync.Mutex
	start time.Time
	last  map[string]time.Time
}

func newSeen(start time.Time) *seen { return &seen{start: start, last: map[string]time.Time{}} }

func (s *seen) note(id string, now time.Time) {
	s.mu.Lock()
	s.last[id] = now
	s.mu.Unlock()
}

func (s *seen) forget(id string) {
	s.mu.Lock()
	delete(s.last, id)
	s.mu.Unlock()
}

// newest is the latest of what memory and the store know.
func (s *seen) newest(id string, stored time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := stored
	for _, o := range []time.Time{s.start, s.last[id]} {
		if o.After(t) {
			t = o
		}
	}
	return t
}

// Enrol redeems a join token in one transaction and returns the id that the
// agent's certificate shall carry: a token bound to a node makes that node
// enrolled, a token bound to a pool registers a host. keyHash is the hex
// SHA-256 of the CSR's public key. The same token with the same key is answered
// the same again, so that an agent whose answer was lost can ask once more; with
// another key it is fault.Denied.
func (f *Fleet) Enrol(ctx context.Context, req node.EnrolRequest, keyHash string) (string, error) {
	if req.Transport != "" {
		if _, err := transportCertificate(req.Transport); err != nil {
			return "", err
		}
	}
	req.Hostname, req.OS, req.Agent = clip(req.Hostname, 253), clip(req.OS, 32), clip(req.Agent, 64)
	now := f.cfg.Now().UTC()
	var id string
	op := access.Op{Action: "Keyfleet/nodes/enrol/action", Resource: "/keyfleet/v1/nodes", Detail: "host name " + req.Hostname}
	err := f.cfg.Gate.Change(access.AsSystem(ctx, "enrolment"), f.cfg.Store, op, func(tx *store.Tx) error {
		tok, err := useToken(tx, req.Token, keyHash, now)
		if err != nil {
			return err
		}
		if tok.Spec.Node != "" {
			id, err = tok.Spec.Node, f.enrolNode(tx, tok.Spec.Node, req, now)
		} else {
			id, err = f.enrolHost(tx, tok.Spec, req, now)
			tok.Spec.Host = id
		}
		if err != nil || tok.Spec.Key == keyHash {
			return err
		}
		tok.Spec.Key = keyHash
		return joinTokens.Put(tx, tok)
	})
	if err == nil {
		f.seen.note(id, now)
	}
	return id, err
}

// Renew answers whether the node or host may have another agent certificate:
// nil while it exists, fault.NotFound when it is gone.
func (f *Fleet) Renew(ctx context.Context, id, _ string) error {
	m, err := marks.Lookup(f.cfg.Store.View(ctx), nodeMark(id))
	if err == nil && m == nil {
		err = fault.New(fault.NotFound, "NodeNotFound", "The node %q does not exist.", id)
	}
	return err
}

// enrolNode notes the enrolment of a provider's node and encrypts its protected settings.
func (f *Fleet) enrolNode(tx *store.Tx, id string, e node.EnrolRequest, now time.Time) error {
	n, err := Nodes.Lookup(tx, id)
	if err != nil {
		return err
	}
	if n == nil || !n.Deleting.IsZero() {
		return fault.New(fault.Unauthenticated, "JoinTokenRefused", "The node of this join token is gone.")
	}
	n.Status.Enrolled, n.Status.Hostname, n.Status.Transport = now, e.Hostname, e.Transport
	if err := Nodes.Put(tx, n); err != nil {
		return err
	}
	return f.markNode(tx, n)
}

// Report stores what the node's agent sees. A report that says nothing new is
// written at most every heartbeatEvery; in between only memory knows. It
// answers fault.NotFound for a node that is gone.
func (f *Fleet) Report(ctx context.Context, id string, r node.StatusReport) error {
	now := f.cfg.Now().UTC()
	f.seen.note(id, now)
	if h, err := Hosts.Lookup(f.cfg.Store.View(ctx), id); err != nil {
		return err
	} else if h != nil {
		return f.hostReport(ctx, id, r, now)
	}
	return f.nodeReport(ctx, id, r, false, now)
}

// nodeReport stores a node's report. obeyed says that with it the node's host
// answered an order that needs no other start of the machine.
func (f *Fleet) nodeReport(ctx context.Context, id string, r node.StatusReport, obeyed bool, now time.Time) error {
	s := f.cfg.Store
	trimReport(&r)
	old, err := Nodes.Lookup(s.View(ctx), id)
	if err != nil {
		return err
	}
	if old == nil {
		return fault.New(fault.NotFound, "NodeNotFound", "The node %q does not exist.", id)
	}
	if !obeyed && sameReport(old.Status.Report, &r) && now.Sub(old.Status.LastSeen) < heartbeatEvery {
		return nil
	}
	return s.Update(ctx, func(tx *store.Tx) error {
		n, err := Nodes.Get(tx, id)
		if err != nil {
			return err
		}
		n.Status.Report, n.Status.LastSeen = &r, now
		if obeyed {
			n.Status.OrderedBoot = "before " + r.BootID
		}
		f.settle(tx, n, now)
		return Nodes.Put(tx, n)
	})
}
