package pool

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// How often a pool's findings are looked at when nothing happens: more often
// while there are some, for access policies change without telling us.
const (
	recheck         = 5 * time.Minute
	recheckFindings = 15 * time.Second
)

// Resizer makes and removes the nodes of pools. It is the reconciler of the
// collection Pools; the provider is the business of [Lives].
type Resizer struct{ fleet *Fleet }

// PoolController returns the controller of pools.
func (f *Fleet) PoolController() reconcile.Runnable {
	r := &Resizer{f}
	return reconcile.Controller[Spec, Status]{
		Name: "pool", Objects: Pools, Reconciler: r, Log: f.cfg.Log,
		Also: []reconcile.Trigger{r.followNodes, r.followSecrets},
	}
}

// plan is what a resize does next.
type plan struct {
	create int           // nodes to make
	remove []string      // nodes to remove
	ended  bool          // the resize is over
	errors []ResizeError // why it did not reach its target
	after  time.Duration // when the resize times out; zero: never
}

// planResize decides the next step of the running resize. offered says whether
// any provider has nodes of the pool's operating system.
func planResize(p *Pool, nodes []*Node, offered bool, now time.Time) plan {
	r := p.Status.Resize
	var live, waiting []*Node // not leaving; of these, those that no provider has yet
	leaving := 0
	for _, n := range nodes {
		switch {
		case !n.Deleting.IsZero():
			leaving++
		case n.Status.Allocated.IsZero():
			waiting = append(waiting, n)
			fallthrough
		default:
			live = append(live, n)
		}
	}
	end := func(e ResizeError) plan {
		return plan{remove: ids(waiting), ended: true, errors: []ResizeError{e}}
	}
	deadline := r.Started.Add(resizeTimeout(r.Timeout))
	failed := failures(waiting)
	switch {
	case p.Spec.Orders.Stop == r.Order:
		return end(ResizeError{Code: "ResizeStopped", Message: "The resize was stopped on request."})
	case !offered && (len(waiting) > 0 || len(live) < r.Target):
		return end(noProvider(p))
	case len(failed) > 0:
		return end(ResizeError{Code: "AllocationFailed", Message: "Nodes could not be started: " + failed[0].Message, Details: failed})
	case len(live) > r.Target:
		return plan{remove: ids(victims(live, len(live)-r.Target)), after: deadline.Sub(now)}
	case len(live) == r.Target && len(waiting) == 0 && leaving == 0:
		return plan{ended: true}
	case !now.Before(deadline) && (len(live) < r.Target || len(waiting) > 0):
		return end(timedOut(r, len(live)-len(waiting), waiting))
	case !now.Before(deadline):
		return plan{ended: true, errors: []ResizeError{{
			Code:    "RemoveNodesFailed",
			Message: fmt.Sprintf("%d nodes were not gone within the resize timeout of %s; their removal goes on.", leaving, r.Timeout),
		}}}
	}
	return plan{create: max(0, r.Target-len(live)), after: deadline.Sub(now)}
}

func timedOut(r *Resize, have int, waiting []*Node) ResizeError {
	e := ResizeError{
		Code:    "AllocationTimedout",
		Message: fmt.Sprintf("Desired number of dedicated nodes could not be allocated as the resize timeout was reached: %d of %d nodes within %s.", have, r.Target, r.Timeout),
	}
	for _, n := range waiting {
		if n.Status.StartError != nil && len(e.Details) < 5 {
			e.Details = append(e.Details, fault.Detail{Code: n.Status.StartError.Code, Message: n.Status.StartError.Message, Target: n.ID})
		}
	}
	return e
}

func noProvider(p *Pool) ResizeError {
	return ResizeError{
		Code:    "AllocationFailed",
		Message: noProviderMessage(p.Spec.OS()),
		Details: []fault.Detail{{Code: "OperatingSystem", Message: p.Spec.OS(), Target: pathVM + ".imageReference"}},
	}
}

func noProviderMessage(os string) string {
	name := strings.ToUpper(os[:1]) + os[1:]
	return fmt.Sprintf("No provider of this server offers %s nodes. Machines can join: keyfleet node join-token --pool POOL.", name)
}

// failures are the nodes whose start cannot succeed.
func failures(waiting []*Node) []fault.Detail {
	var out []fault.Detail
	for _, n := range waiting {
		if n.Status.StartFinal && n.Status.StartError != nil {
			out = append(out, fault.Detail{Code: n.Status.StartError.Code, Message: n.Status.StartError.Message, Target: n.ID})
		}
	}
	return out
}

// victims chooses the nodes that a smaller pool loses: those that are of least
// use first, idle ones last, and the newest of equals.
func victims(live []*Node, count int) []*Node {
	rank := map[string]int{StateCreating: 0, StateUnusable: 1, StateUnknown: 2, StateStarting: 3, StateReimaging: 4, StateRebooting: 5, StateOffline: 6, StateIdle: 7}
	sorted := slices.Clone(live)
	slices.SortFunc(sorted, func(a, b *Node) int {
		if d := rank[a.Status.State] - rank[b.Status.State]; d != 0 {
			return d
		}
		return strings.Compare(b.ID, a.ID)
	})
	return sorted[:count]
}

func ids(nodes []*Node) []string {
	var out []string
	for _, n := range nodes {
		out = append(out, n.ID)
	}
	return out
}

// Reconcile implements reconcile.Reconciler.
func (r *Resizer) Reconcile(ctx context.Context, s *store.Store, p *Pool) (reconcile.Result, error) {
	f, now := r.fleet, r.fleet.cfg.Now().UTC()
	if err := s.Update(ctx, func(tx *store.Tx) error { return f.refreshPackages(tx, p) }); err != nil {
		return reconcile.Result{}, err
	}
	r.observe(ctx, p, now)
	nodes, err := Nodes.List(s.View(ctx), p.UID)
	if err != nil {
		return reconcile.Result{}, err
	}
	p.Status.Next = nextNumber(p, nodes)
	begin(p, now)
	if p.Status.Allocation != Steady {
		after, err := r.step(ctx, s, p, nodes, now)
		if err != nil {
			return reconcile.Result{}, err
		}
		if after > 0 && after < recheck {
			return reconcile.Result{After: min(after, recheckFindings)}, nil
		}
	}
	p.Status.Current = current(nodes)
	if len(p.Status.Findings) > 0 {
		return reconcile.Result{After: recheckFindings}, nil
	}
	return reconcile.Result{After: recheck}, nil
}

// begin takes up a resize that was asked for.
func begin(p *Pool, now time.Time) {
	if p.Spec.Orders.Resize == 0 || (p.Status.Resize != nil && p.Status.Resize.Order == p.Spec.Orders.Resize) {
		return
	}
	x := p.Spec.Properties.Scale.Fixed
	p.Status.Resize = &Resize{Order: p.Spec.Orders.Resize, Target: x.Dedicated, Timeout: x.ResizeTimeout, Option: x.Deallocation, Started: now}
	p.Status.Allocation, p.Status.AllocationSince = Resizing, now
}

// step carries out the next step of the running resize.
func (r *Resizer) step(ctx context.Context, s *store.Store, p *Pool, nodes []*Node, now time.Time) (time.Duration, error) {
	prov, err := r.fleet.choose(ctx, p)
	if err != nil {
		return 0, err
	}
	next := planResize(p, nodes, prov != nil, now)
	if err := r.remove(ctx, s, p, next.remove); err != nil {
		return 0, err
	}
	if err := r.create(ctx, s, p, next.create); err != nil {
		return 0, err
	}
	p.Status.Current = current(nodes)
	if next.ended {
		done := *p.Status.Resize
		done.Ended, done.Errors = now, next.errors
		p.Status.Resize = &done
		p.Status.Allocation, p.Status.AllocationSince = Steady, now
	}
	return next.after, nil
}

// current counts the nodes that their provider has.
func current(nodes []*Node) int {
	c := 0
	for _, n := range nodes {
		if !n.Status.Allocated.IsZero() {
			c++
		}
	}
	return c
}

// nextNumber is the number after every one that was used.
func nextNumber(p *Pool, nodes []*Node) int {
	next := p.Status.Next
	for _, n := range nodes {
		if i, err := strconv.Atoi(n.ID[len(p.UID):]); err == nil && i >= next {
			next = i + 1
		}
	}
	return next
}

func (r *Resizer) remove(ctx context.Context, s *store.Store, p *Pool, ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	op := access.Op{Action: "Keyfleet/nodes/delete", Resource: p.Spec.ID, Detail: fmt.Sprintf("%d nodes", len(ids))}
	return r.fleet.cfg.Gate.Change(ctx, s, op, func(tx *store.Tx) error {
		for _, id := range ids {
			if err := r.fleet.deleteNode(tx, id); err != nil {
				return err
			}
		}
		return nil
	})
}

// create makes nodes and their marks in one transaction, unless the pool is
// being deleted meanwhile.
func (r *Resizer) create(ctx context.Context, s *store.Store, p *Pool, count int) error {
	if count == 0 {
		return nil
	}
	first := p.Status.Next
	op := access.Op{Action: "Keyfleet/nodes/write", Resource: p.Spec.ID, Detail: fmt.Sprintf("%d nodes", count)}
	err := r.fleet.cfg.Gate.Change(ctx, s, op, func(tx *store.Tx) error {
		fresh, err := Pools.Get(tx, p.ID)
		if err != nil {
			return err
		}
		if fresh.UID != p.UID || !fresh.Deleting.IsZero() {
			return poolBeingDeleted(p)
		}
		for i := first; i < first+count; i++ {
			n := &Node{Spec: NodeWanted{Pool: p.ID, PoolID: p.Spec.ID, OS: p.Spec.OS(), VMSize: p.Spec.Properties.VMSize}}
			n.ID = nodeID(p.UID, i)
			n.Status.State, n.Status.StateSince = StateCreating, r.fleet.cfg.Now().UTC()
			if err := Nodes.Insert(tx, n); err != nil {
				return err
			}
			if err := r.fleet.markNode(tx, n); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		p.Status.Next = first + count
	}
	return err
}

// observe looks at what the pool's identities can read now.
func (r *Resizer) observe(ctx context.Context, p *Pool, now time.Time) {
	if r.fleet.cfg.Secrets == nil {
		return
	}
	p.Status.Findings = r.fleet.findings(ctx, &p.Spec)
	c := store.Condition{Type: "SecretsReadable", Status: true, Reason: "Readable"}
	for _, x := range p.Status.Findings {
		if x.Code != "PinnedVersion" {
			c.Status, c.Reason, c.Message = false, x.Code, x.String()
			break
		}
		c.Reason, c.Message = x.Code, x.String() // readable, and will never rotate
	}
	p.SetCondition(c, now)
}

// Finalize implements reconcile.Finalizer: it removes the nodes, then the hosts
// that had registered for the pool, then the pool's mark.
func (r *Resizer) Finalize(ctx context.Context, s *store.Store, p *Pool) (bool, reconcile.Result, error) {
	nodes, err := Nodes.List(s.View(ctx), p.UID)
	if err != nil {
		return false, reconcile.Result{}, err
	}
	var live []string
	for _, n := range nodes {
		if n.Deleting.IsZero() {
			live = append(live, n.ID)
		}
	}
	if err := r.remove(ctx, s, p, live); err != nil {
		return false, reconcile.Result{}, err
	}
	p.Status.Current = current(nodes)
	if len(nodes) > 0 {
		return false, reconcile.Result{After: time.Minute}, nil // the nodes' going brings us back
	}
	err = s.Update(ctx, func(tx *store.Tx) error {
		hosts, err := Hosts.List(tx, "")
		if err != nil {
			return err
		}
		for _, h := range hosts {
			if h.Spec.Pool != p.ID {
				continue
			}
			if err := marks.Delete(tx, nodeMark(h.ID)); err != nil {
				return err
			}
			if err := Hosts.Delete(tx, h.ID); err != nil {
				return err
			}
		}
		return marks.Delete(tx, poolMark(p.ID))
	})
	return err == nil, reconcile.Result{}, err
}

// followNodes brings a pool back when one of its nodes changed.
func (r *Resizer) followNodes(ctx context.Context, s *store.Store, enqueue func(string)) error {
	type seen struct{ pool, what string }
	known := map[string]seen{}
	return Nodes.Follow(ctx, s, "", func(c store.Change[NodeWanted, NodeSeen]) error {
		if c.ID == "" {
			return nil
		}
		old := known[c.ID]
		if c.Object == nil {
			delete(known, c.ID)
			enqueue(old.pool)
			return nil
		}
		o := c.Object // only what planResize looks at; the reports of idle nodes are none of its business
		now := seen{o.Spec.Pool, fmt.Sprint(!o.Deleting.IsZero(), !o.Status.Allocated.IsZero(), o.Status.StartFinal, o.Status.StartError != nil)}
		if now != old {
			known[c.ID] = now
			enqueue(o.Spec.Pool)
		}
		return nil
	})
}

// followSecrets brings the pools that observe a secret back when it changed,
// so that their conditions do.
func (r *Resizer) followSecrets(ctx context.Context, s *store.Store, enqueue func(string)) error {
	ch := r.fleet.cfg.Changes
	if ch == nil {
		<-ctx.Done()
		return ctx.Err()
	}
	var mu sync.Mutex
	pending := map[secretRef]bool{}
	wake := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		failed <- ch.Follow(ctx, func(vault, secret string, _ int64) {
			mu.Lock()
			pending[secretRef{strings.ToLower(vault), strings.ToLower(secret)}] = true
			mu.Unlock()
			select {
			case wake <- struct{}{}:
			default:
			}
		})
	}()
	for {
		select {
		case err := <-failed:
			return err
		case <-wake:
		}
		mu.Lock()
		changed := pending
		pending = map[secretRef]bool{}
		mu.Unlock()
		all, err := marks.List(s.View(ctx), "pool/")
		if err != nil {
			cancel()
			<-failed
			return err
		}
		for _, m := range all {
			for _, u := range m.Spec.URLs { // a pinned version may have come to be as well
				vault, secret, _, ok := ch.Resolve(u)
				if ok && changed[secretRef{strings.ToLower(vault), strings.ToLower(secret)}] {
					enqueue(strings.TrimPrefix(m.ID, "pool/"))
					break
				}
			}
		}
	}
}
