package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	patrolEvery   = 2 * time.Second // how often providers are asked what is really there
	maxStarts     = 3               // failed starts after which a new node is given up
	providerLimit = 5 * time.Minute // how long a provider may take for one call
	leaveWait     = 2 * time.Second // between looks at a node that takes its time to go
)

// Lives brings nodes to life, keeps them alive and lays them to rest. It is
// the reconciler of the collection Nodes and the only caller of providers.
type Lives struct{ fleet *Fleet }

// NodeController returns the controller of nodes.
func (f *Fleet) NodeController() reconcile.Runnable {
	l := &Lives{f}
	return reconcile.Controller[NodeWanted, NodeSeen]{
		Name: "node", Objects: Nodes, Reconciler: l, Log: f.cfg.Log, Workers: 16, Deadline: providerLimit,
		Also: []reconcile.Trigger{l.patrol, l.followHosts},
	}
}

// hostProvider is the name of the provider that has machines which joined.
const hostProvider = "host"

// providerItem is the metadata item by which a pool chooses its provider.
const providerItem = "keyfleet-provider"

// choose returns the provider of a pool's new nodes: the one that its metadata
// names; the hosts, if machines have joined for the pool; else the first that
// offers the operating system without anybody joining. nil means that there is none.
func (f *Fleet) choose(ctx context.Context, p *Pool) (Provider, error) {
	os := p.Spec.OS()
	for _, m := range p.Spec.Properties.Metadata {
		if m.Name == providerItem {
			prov := f.named(m.Value)
			if prov == nil || !prov.Offers(os) {
				return nil, nil
			}
			return prov, nil
		}
	}
	hosts, err := Hosts.List(f.cfg.Store.View(ctx), "")
	if err != nil {
		return nil, err
	}
	joined := slices.ContainsFunc(hosts, func(h *Host) bool { return h.Spec.Pool == p.ID && h.Spec.OS == os })
	for _, prov := range f.cfg.Providers {
		if prov.Offers(os) && (prov.Name() == hostProvider) == joined {
			return prov, nil
		}
	}
	return nil, nil
}

func (f *Fleet) named(name string) Provider {
	for _, p := range f.cfg.Providers {
		if p.Name() == name {
			return p
		}
	}
	return nil
}

// providerOf returns the provider that runs the node, or would.
func (f *Fleet) providerOf(ctx context.Context, p *Pool, n *Node) (Provider, error) {
	if n.Status.Provider != "" {
		return f.named(n.Status.Provider), nil
	}
	return f.choose(ctx, p)
}

// Reconcile implements reconcile.Reconciler: start what is not running, carry
// out an order, write down the state.
func (l *Lives) Reconcile(ctx context.Context, s *store.Store, n *Node) (reconcile.Result, error) {
	f := l.fleet
	p, err := Pools.Lookup(s.View(ctx), n.Spec.Pool)
	if err != nil {
		return reconcile.Result{}, err
	}
	if p == nil {
		return reconcile.Result{}, fault.New(fault.Conflict, "PoolNotFound", "The node's pool is gone.")
	}
	prov, err := f.providerOf(ctx, p, n)
	if err != nil {
		return reconcile.Result{}, err
	}
	var again reconcile.Result
	switch {
	case prov == nil:
		n.Status.StartError = &fault.Detail{Code: "AllocationFailed", Message: noProviderMessage(n.Spec.OS)}
		n.Status.StartFinal = true
	case n.Status.StartFinal && n.Status.Allocated.IsZero(): // the pool controller takes it away
	default:
		if again, err = l.bring(ctx, s, prov, n); err != nil {
			return again, err
		}
	}
	now := f.cfg.Now().UTC()
	f.settleWith(p, n, now)
	return reconcile.Result{After: sooner(again.After, l.nextLook(n, now))}, nil
}

// sooner is the shorter of two waits, where zero means none.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

// nextLook is when the node's state may change by time alone.
func (l *Lives) nextLook(n *Node, now time.Time) time.Duration {
	switch {
	case n.Status.Allocated.IsZero():
		return 0
	case n.Status.Enrolled.IsZero():
		return max(time.Second, n.Status.Allocated.Add(enrolWithin).Sub(now)+time.Second)
	}
	heard := l.fleet.seen.newest(n.ID, n.Status.LastSeen)
	return max(time.Second, heard.Add(offlineAfter).Sub(now)+time.Second)
}

// bring starts the node if it does not run, and carries out its order.
func (l *Lives) bring(ctx context.Context, s *store.Store, prov Provider, n *Node) (reconcile.Result, error) {
	running, err := l.running(ctx, prov, n.ID)
	if err != nil {
		return reconcile.Result{}, fmt.Errorf("asking provider %s for its nodes: %w", prov.Name(), err)
	}
	if !running {
		spec, err := l.spec(ctx, s, n, n.Status.Enrolled.IsZero())
		if err != nil {
			return reconcile.Result{}, err
		}
		if err := effect.Do("start node", func() error { return prov.Start(ctx, spec) }); err != nil {
			return startFailed(n, err)
		}
	}
	n.Status.Provider, n.Status.Attempts, n.Status.StartError, n.Status.StartFinal = prov.Name(), 0, nil, false
	if n.Status.Allocated.IsZero() {
		n.Status.Allocated = l.fleet.cfg.Now().UTC()
	}
	return reconcile.Result{}, l.obey(ctx, s, prov, n)
}

// startFailed notes a failed start. What cannot get better, or failed often on
// a node that never ran, is final; "not now" is tried again as long as the
// resize allows.
func startFailed(n *Node, err error) (reconcile.Result, error) {
	e := fault.From(err)
	d := fault.Detail{Code: e.Code, Message: e.Message}
	if d.Code == "" {
		d.Code = "AllocationFailed"
	}
	if d.Message == "" { // not made to be shown: the log has it
		d.Message = "The provider could not start the node; the server's log says why."
	}
	if e.Fix != "" {
		d.Message += " Fix: " + e.Fix + "."
	}
	n.Status.StartError = &d
	wait := max(e.RetryAfter, time.Second)
	switch e.Kind {
	case fault.Unavailable, fault.TooMany:
		return reconcile.Result{After: wait}, nil
	case fault.Invalid, fault.Denied, fault.NotFound:
		n.Status.StartFinal = n.Status.Allocated.IsZero()
	}
	n.Status.Attempts++
	if n.Status.Allocated.IsZero() && n.Status.Attempts >= maxStarts {
		n.Status.StartFinal = true
	}
	return reconcile.Result{}, fmt.Errorf("starting node %s: %w", n.ID, err)
}

// obey carries out a reboot or reimage. Its end is seen by the agent's report
// of another start, not by this call.
func (l *Lives) obey(ctx context.Context, s *store.Store, prov Provider, n *Node) error {
	o := n.Spec.Order
	if o == nil || n.Status.Done == o.ID {
		return nil
	}
	var err error
	if o.Kind == "reimage" {
		var spec NodeSpec
		if spec, err = l.spec(ctx, s, n, true); err == nil {
			err = effect.Do("reimage node", func() error { return prov.Reimage(ctx, spec) })
		}
	} else {
		err = effect.Do("restart node", func() error { return prov.Restart(ctx, n.ID) })
	}
	if err != nil {
		return fmt.Errorf("%s of node %s: %w", o.Kind, n.ID, err)
	}
	n.Status.Done = o.ID
	return nil
}

// spec is what the provider is told; with a fresh token where the node needs one.
func (l *Lives) spec(ctx context.Context, s *store.Store, n *Node, withToken bool) (NodeSpec, error) {
	out := NodeSpec{ID: n.ID, Pool: n.Spec.PoolID, OS: n.Spec.OS, VMSize: n.Spec.VMSize, Hosts: l.fleet.hosts(nil)}
	if !withToken {
		return out, nil
	}
	op := access.Op{Action: "Keyfleet/jointokens/write", Resource: n.Spec.PoolID, Detail: "node " + n.ID}
	err := l.fleet.cfg.Gate.Change(ctx, s, op, func(tx *store.Tx) (err error) {
		out.Token, err = newToken(tx, JoinToken{Node: n.ID, Expires: l.fleet.cfg.Now().UTC().Add(tokenLife)})
		return err
	})
	return out, err
}

func (l *Lives) running(ctx context.Context, prov Provider, id string) (bool, error) {
	there, err := prov.List(ctx)
	if err != nil {
		return false, err
	}
	for _, n := range there {
		if n.ID == id {
			return n.Running, nil
		}
	}
	return false, nil
}

// Finalize implements reconcile.Finalizer: the node goes from its provider,
// then its mark, which ends its tokens and its goal state.
func (l *Lives) Finalize(ctx context.Context, s *store.Store, n *Node) (bool, reconcile.Result, error) {
	for _, prov := range l.fleet.cfg.Providers {
		if n.Status.Provider != "" && prov.Name() != n.Status.Provider {
			continue // one that never told may still have begun: then all are asked
		}
		err := effect.Do("stop node", func() error { return prov.Stop(ctx, n.ID) })
		if errors.Is(err, fault.Unavailable) { // a host that has not said yet that it is released
			n.Status.State = StateLeavingPool
			return false, reconcile.Result{After: leaveWait}, nil
		}
		if err != nil {
			return false, reconcile.Result{}, fmt.Errorf("stopping node %s: %w", n.ID, err)
		}
	}
	err := s.Update(ctx, func(tx *store.Tx) error { return marks.Delete(tx, nodeMark(n.ID)) })
	l.fleet.seen.forget(n.ID)
	return err == nil, reconcile.Result{}, err
}

// patrol compares what providers have with what is stored: a node that is not
// running is looked at, and one that nobody knows is stopped. The provider is
// asked first: a node object exists before its node, so what is there without
// an object belongs to nobody.
func (l *Lives) patrol(ctx context.Context, s *store.Store, enqueue func(string)) error {
	tick := time.NewTicker(patrolEvery)
	defer tick.Stop()
	for {
		for _, prov := range l.fleet.cfg.Providers {
			if err := l.patrolOne(ctx, s, prov, enqueue); err != nil {
				l.fleet.cfg.Log.Warn("comparing provider with store", "provider", prov.Name(), "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func (l *Lives) patrolOne(ctx context.Context, s *store.Store, prov Provider, enqueue func(string)) error {
	there, err := prov.List(ctx)
	if err != nil {
		return err
	}
	all, err := Nodes.List(s.View(ctx), "")
	if err != nil {
		return err
	}
	running := map[string]bool{}
	for _, n := range there {
		running[n.ID] = n.Running
	}
	for _, n := range all {
		if n.Status.Provider == prov.Name() && n.Deleting.IsZero() && !running[n.ID] {
			enqueue(n.ID)
		}
		delete(running, n.ID)
	}
	for id := range running {
		l.fleet.cfg.Log.Warn("stopping a node that nobody knows", "provider", prov.Name(), "node", id)
		op := access.Op{Action: "Keyfleet/nodes/delete", Resource: "/keyfleet/v1/nodes/" + id, Detail: "unknown to the store"}
		if err := l.fleet.cfg.Gate.Read(access.AsSystem(ctx, "node"), op); err != nil {
			return err
		}
		if err := effect.Do("stop unknown node", func() error { return prov.Stop(ctx, id) }); err != nil {
			return fmt.Errorf("stopping unknown node %s: %w", id, err)
		}
	}
	return nil
}

// followHosts brings nodes back that wait for a free host, and those that
// leave one, when a host registered or changed.
func (l *Lives) followHosts(ctx context.Context, s *store.Store, enqueue func(string)) error {
	return Hosts.Follow(ctx, s, "", func(c store.Change[HostWanted, HostSeen]) error {
		if c.Object != nil && c.Object.Spec.Node != "" && c.Object.Spec.Order == nil {
			return nil
		}
		all, err := Nodes.List(s.View(ctx), "")
		if err != nil {
			return nil // the next look comes by time
		}
		for _, n := range all {
			if n.Status.Allocated.IsZero() || !n.Deleting.IsZero() {
				enqueue(n.ID)
			}
		}
		return nil
	})
}
