package pool

import (
	"context"
	"fmt"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// assignAction is what a caller must be allowed to do on every identity that
// is put on a pool.
const assignAction = "Microsoft.ManagedIdentity/userAssignedIdentities/*/assign/action"

// Write is a request to create or change a pool.
type Write struct {
	ID          arm.ID
	IfMatch     string // ETag without W/ and quotes, "*", or empty
	IfNoneMatch string // "*": only create; other values are ignored, as Batch does
	MustExist   bool   // PATCH: an absent pool is fault.NotFound
	MustBeNew   bool   // data-plane add: an existing pool is fault.Conflict
	Strict      bool   // refuse what would only be warned of
	// Change makes the new spec of the old one (nil: the pool is new), in the
	// terms of the caller's api-version. Problems are those of the body's form.
	// It may be called more than once.
	Change func(old *Spec) (Spec, []Problem, error)
}

// Written is the outcome of a Write.
type Written struct {
	Pool     *Pool     // as stored; for a what-if as it would be
	Created  bool      // the pool is new
	Changes  []Change  // what differs from before; empty: nothing was written
	Problems []Problem // what would be refused (what-if only)
	Warnings []Problem // faults that depend on the state of the world now
}

// Put creates or changes a pool in one transaction: all of it is stored, or
// nothing. Faults of the request itself are fault.Invalid with one detail for
// each; faults that depend on the state of the world (a secret that is not
// there yet) are stored and returned as warnings, unless w.Strict. The order
// that a new number of nodes means is part of the same transaction.
func (f *Fleet) Put(ctx context.Context, w Write) (*Written, error) {
	if err := poolID(w.ID); err != nil {
		return nil, err
	}
	facts := &gathered{fleet: f}
	var out *Written
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/pools/write", Resource: w.ID.String()}
	err := f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		var err error
		if out, err = f.prepare(tx, w, facts); err != nil {
			return err
		}
		if err := out.refusal(w.Strict); err != nil {
			return err
		}
		return f.write(tx, out)
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// WhatIf answers what Put would change and refuse, and stores nothing.
func (f *Fleet) WhatIf(ctx context.Context, w Write) (*Written, error) {
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/pools/write", Resource: w.ID.String(), Detail: "what-if"}
	if err := f.cfg.Gate.Read(ctx, op); err != nil {
		return nil, err
	}
	if err := poolID(w.ID); err != nil {
		return nil, err
	}
	return f.prepare(f.cfg.Store.View(ctx), w, &gathered{fleet: f})
}

// prepare works out what the write means, without writing.
func (f *Fleet) prepare(tx *store.Tx, w Write, facts *gathered) (*Written, error) {
	account := arm.ID{Subscription: w.ID.Subscription, ResourceGroup: w.ID.ResourceGroup, Provider: w.ID.Provider, Types: w.ID.Types[:1], Names: w.ID.Names[:1]}
	if _, err := f.account(tx, account); err != nil {
		return nil, err
	}
	old, err := Pools.Lookup(tx, w.ID.StoreKey())
	if err != nil {
		return nil, err
	}
	if err := w.precondition(old, tx.Store()); err != nil {
		return nil, err
	}
	out := &Written{Created: old == nil}
	var before *Spec
	if old != nil {
		c := old.Spec
		before, out.Pool = &c, old
	} else {
		out.Pool = &Pool{Spec: Spec{ID: w.ID.String()}}
		out.Pool.ID = w.ID.StoreKey()
	}
	next, problems, err := w.Change(before)
	if err != nil {
		return nil, err
	}
	next.ID, next.Orders = out.Pool.Spec.ID, out.Pool.Spec.Orders
	next.FillDefaults()
	if err := facts.gather(tx, &next, before); err != nil {
		return nil, err
	}
	next.Identity = facts.resolved(next.Identity)
	out.Problems = append(problems, Validate(&next, facts.facts)...)
	if len(out.Problems) == 0 {
		out.Warnings = f.findings(tx.Context(), &next)
	}
	compared := &Spec{Identity: Identified{Type: "None"}}
	if before != nil {
		compared = before
	}
	out.Changes = Diff(compared, &next)
	return out, f.decideChange(out, before, next)
}

// precondition checks If-Match and friends. Preconditions come before the body:
// who guards against a lost update must not be told about fields.
func (w Write) precondition(old *Pool, s *store.Store) error {
	switch {
	case old == nil && w.MustExist:
		return fault.New(fault.NotFound, "PoolNotFound", "The pool %q does not exist.", w.ID.Name())
	case old == nil && w.IfMatch != "":
		return fault.New(fault.Precondition, "ConditionNotMet", "The pool %q does not exist, so it does not match.", w.ID.Name())
	case old == nil:
		return nil
	case w.IfNoneMatch == "*":
		return fault.New(fault.Precondition, "ConditionNotMet", "The pool %q exists already.", w.ID.Name())
	case w.MustBeNew:
		return fault.New(fault.Conflict, "PoolExists", "The pool %q exists already.", w.ID.Name())
	}
	if err := matches(old, w.IfMatch, s); err != nil {
		return err
	}
	if !old.Deleting.IsZero() {
		return poolBeingDeleted(old)
	}
	return nil
}

// matches checks an If-Match value against the pool's ETag.
func matches(p *Pool, etag string, s *store.Store) error {
	if etag == "" || etag == "*" || etag == p.ETag(s) {
		return nil
	}
	return fault.New(fault.Precondition, "ConditionNotMet", "The pool %q was changed: its ETag is %s, not %s.", p.Spec.Name(), p.ETag(s), etag).
		WithFix("read the pool again and repeat the change")
}

// decideChange fills in out.Pool: the new spec for a new pool, the allowed
// changes for one that exists.
func (f *Fleet) decideChange(out *Written, before *Spec, next Spec) error {
	if before == nil {
		next.Orders = Orders{Resize: 1}
		out.Pool.Spec = next
		return nil
	}
	if err := cannotUpdate(out.Changes); err != nil && len(out.Problems) == 0 {
		return err
	}
	kept := *before // what does not differ in meaning stays as it was first written, protected settings among it
	kept.Properties.Scale, kept.Properties.Metadata = next.Properties.Scale, next.Properties.Metadata
	kept.Properties.DisplayName, kept.Properties.TargetCommunication = next.Properties.DisplayName, next.Properties.TargetCommunication
	if before.Properties.Scale.Fixed.Dedicated != next.Properties.Scale.Fixed.Dedicated {
		if AllocationState(out.Pool) != Steady {
			return poolBeingResized(out.Pool)
		}
		kept.Orders.Resize++
	}
	out.Pool.Spec = kept
	return nil
}

func poolBeingResized(p *Pool) error {
	return fault.New(fault.Conflict, "PoolBeingResized", "The pool %q is being resized.", p.Spec.Name()).
		WithFix("wait until its allocationState is Steady, or stop the resize: az batch pool resize --abort --pool-id %s", p.Spec.Name())
}

// refusal is why the write must not happen, nil if it may.
func (o *Written) refusal(strict bool) error {
	if err := invalid(o.Problems); err != nil {
		return err
	}
	if strict {
		return invalid(o.Warnings)
	}
	return nil
}

// write stores what prepare worked out; nothing where nothing differs.
func (f *Fleet) write(tx *store.Tx, out *Written) error {
	if !out.Created && len(out.Changes) == 0 {
		return nil
	}
	if out.Created {
		out.Pool.Status = Status{Allocation: Resizing, AllocationSince: f.cfg.Now().UTC()}
		if err := Pools.Insert(tx, out.Pool); err != nil {
			return err
		}
		return f.markPool(tx, out.Pool)
	}
	return Pools.Put(tx, out.Pool) // nothing that may change concerns the nodes' goal states
}

// gathered collects the facts of a write once, however often its transaction
// is run again.
type gathered struct {
	fleet *Fleet
	done  bool
	facts Facts
}

func (g *gathered) gather(tx *store.Tx, next, old *Spec) error {
	if g.done {
		return nil
	}
	known, err := knownTypes(tx.Store().View(tx.Context()))
	if err != nil {
		return err
	}
	g.facts = Facts{Identities: map[string]IdentityFact{}, Types: known, Settings: g.fleet.cfg.Settings}
	if old != nil { // a type that was taken away meanwhile stays where it is
		for _, e := range old.Properties.Deployment.VM.Extensions {
			g.facts.Types = append(g.facts.Types, ExtensionType{Publisher: e.Publisher, Type: e.Type})
		}
	}
	for key := range next.Identity.IDs {
		fact, err := g.identity(tx.Context(), key, old)
		if err != nil {
			return err
		}
		g.facts.Identities[strings.ToLower(key)] = fact
	}
	g.done = true
	return nil
}

// identity resolves an identity and asks whether the caller may assign it. An
// identity that the pool has already is not assigned again.
func (g *gathered) identity(ctx context.Context, key string, old *Spec) (IdentityFact, error) {
	if old != nil {
		for k, v := range old.Identity.IDs {
			if strings.EqualFold(k, key) {
				return IdentityFact{Identity: v}, nil
			}
		}
	}
	id, err := arm.ParseID(key)
	if err != nil || !id.Is(identityType) {
		return IdentityFact{}, nil // said by validation
	}
	if err := g.fleet.cfg.Gate.Read(ctx, access.Op{Action: assignAction, Resource: key}); err != nil {
		if fault.KindOf(err) != fault.Denied {
			return IdentityFact{}, err
		}
		return IdentityFact{}, fault.New(fault.Denied, "LinkedAuthorizationFailed", "To put an identity on a pool one must be allowed to assign it. %s", fault.From(err).Message).
			At(pathIdentities+"['"+key+"']").WithFix("keyfleet role assign --role 'Managed Identity Operator' --scope %s --object-id OBJECT", key)
	}
	got, err := g.fleet.cfg.Identities.Resolve(ctx, key)
	if err == nil {
		return IdentityFact{Identity: got}, nil
	}
	switch fault.KindOf(err) {
	case fault.NotFound, fault.Denied, fault.Invalid:
		return IdentityFact{Err: fault.From(err)}, nil
	}
	return IdentityFact{}, fmt.Errorf("resolving identity %s: %w", key, err)
}

// resolved fills in the ids of the pool's identities, under the keys as the caller wrote them.
func (g *gathered) resolved(id Identified) Identified {
	out := Identified{Type: id.Type}
	for key := range id.IDs {
		if out.IDs == nil {
			out.IDs = map[string]Identity{}
		}
		out.IDs[key] = g.facts.Identities[strings.ToLower(key)].Identity
	}
	return out
}

// findings are the faults of the pool that depend on the state of the world:
// secrets that its identities cannot read now, and pinned versions.
func (f *Fleet) findings(ctx context.Context, s *Spec) []Problem {
	if f.cfg.Secrets == nil {
		return nil
	}
	var ps []Problem
	for i, e := range s.Properties.Deployment.VM.Extensions {
		set, _ := f.cfg.Settings(e.Publisher, e.Type, e.TypeHandlerVersion, e.Settings)
		for _, o := range set.Observed {
			who, ok := identityFor(s.Identity, set.ClientID)
			if !ok {
				continue
			}
			v, err := f.cfg.Secrets.Check(ctx, who.Principal(), o.URL)
			if err != nil {
				v = Verdict{Answer: "unknown", Code: "CheckFailed", Message: "Whether the secret can be read cannot be told now."}
			}
			ps = append(ps, findingsOf(extensionPath(i)+"."+o.Path, o.URL, who, v)...)
		}
	}
	return ps
}

func findingsOf(path, url string, who Identity, v Verdict) []Problem {
	var ps []Problem
	if v.Answer != "yes" {
		reason := fmt.Sprintf("The identity %s (client id %s) cannot read %s: %s", who.Name, who.ClientID, url, v.Message)
		if v.Answer == "unknown" {
			reason = fmt.Sprintf("Whether %s can be read is not known: %s", url, v.Message)
		}
		code := v.Code
		if code == "" {
			code = "SecretNotReadable"
		}
		ps = append(ps, Problem{Code: code, Path: path, Reason: reason, Fix: v.Fix})
	}
	if v.Pinned {
		ps = append(ps, Problem{
			Code: "PinnedVersion", Path: path, Reason: fmt.Sprintf("%s names a version, so the nodes never get its successor.", url),
			Fix: "leave the version out: " + url[:strings.LastIndexByte(strings.TrimSuffix(url, "/"), '/')],
		})
	}
	return ps
}

// identityFor returns the pool's identity of the client id; the only one where none is named.
func identityFor(id Identified, clientID string) (Identity, bool) {
	for _, v := range id.IDs {
		if strings.EqualFold(v.ClientID, clientID) || (clientID == "" && len(id.IDs) == 1) {
			return v, true
		}
	}
	return Identity{}, false
}

// DeletePool asks for the deletion of a pool; its nodes are stopped first. It
// returns the UID of the pool, by which PoolGone knows it; empty: there was none.
func (f *Fleet) DeletePool(ctx context.Context, id arm.ID, ifMatch string) (uid string, err error) {
	if err := poolID(id); err != nil {
		return "", err
	}
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/pools/delete", Resource: id.String()}
	err = f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		p, err := Pools.Lookup(tx, id.StoreKey())
		if uid = ""; err != nil || p == nil {
			return err
		}
		uid = p.UID
		if err := matches(p, ifMatch, tx.Store()); err != nil {
			return err
		}
		return f.deletePool(tx, p.ID)
	})
	return uid, err
}

// deletePool asks for the deletion. A pool that its controller has not seen
// has no nodes and is gone at once, and its mark with it.
func (f *Fleet) deletePool(tx *store.Tx, key string) error {
	if err := Pools.Delete(tx, key); err != nil {
		return err
	}
	left, err := Pools.Lookup(tx, key)
	if err != nil || left != nil {
		return err
	}
	return marks.Delete(tx, poolMark(key))
}

// ResizeRequest is the data plane's resize.
type ResizeRequest struct {
	ID           arm.ID
	IfMatch      string
	Dedicated    *int // nil: unchanged
	LowPriority  *int
	Timeout      string // ISO 8601; empty: PT15M
	Deallocation string // empty: the default
}

// Resize asks for another number of nodes. The same number once more tries
// again what an earlier resize did not reach.
func (f *Fleet) Resize(ctx context.Context, r ResizeRequest) (*Pool, error) {
	return f.change(ctx, r.ID, "resize", r.IfMatch, func(tx *store.Tx, p *Pool) error {
		if AllocationState(p) != Steady {
			return poolBeingResized(p)
		}
		x := p.Spec.Properties.Scale.Fixed
		if r.Dedicated != nil {
			x.Dedicated = *r.Dedicated
		}
		if r.LowPriority != nil {
			x.LowPriority = *r.LowPriority
		}
		x.ResizeTimeout, x.Deallocation = defaultResizeTimeout, r.Deallocation
		if r.Timeout != "" {
			x.ResizeTimeout = r.Timeout
		}
		if err := invalid(validateScale(x)); err != nil {
			return err
		}
		p.Spec.Properties.Scale.Fixed = x
		p.Spec.Orders.Resize++
		return nil
	})
}

// StopResize stops the running resize. The pool keeps the nodes that it has by then.
func (f *Fleet) StopResize(ctx context.Context, id arm.ID, ifMatch string) (*Pool, error) {
	return f.change(ctx, id, "stopResize", ifMatch, func(tx *store.Tx, p *Pool) error {
		if AllocationState(p) == Steady {
			return fault.New(fault.Conflict, "OperationInvalidForCurrentState", "The pool %q is not being resized.", p.Spec.Name())
		}
		p.Spec.Orders.Stop = p.Spec.Orders.Resize
		return nil
	})
}

// DisableAutoScale has nothing to do: pools have a fixed scale here.
func (f *Fleet) DisableAutoScale(ctx context.Context, id arm.ID) (*Pool, error) {
	return f.change(ctx, id, "disableAutoScale", "", func(*store.Tx, *Pool) error { return nil })
}

// RemoveNodes takes nodes out of the pool and makes it smaller by their number.
func (f *Fleet) RemoveNodes(ctx context.Context, id arm.ID, ids []string, timeout, ifMatch string) (*Pool, error) {
	if len(ids) == 0 || len(ids) > 100 {
		return nil, invalid([]Problem{value("nodeList", "name 1 to 100 nodes", "%d nodes are named.", len(ids))})
	}
	if timeout == "" {
		timeout = defaultResizeTimeout
	}
	if p := checkResizeTimeout("resizeTimeout", timeout); p != nil {
		return nil, timeoutFault(p)
	}
	return f.change(ctx, id, "removeNodes", ifMatch, func(tx *store.Tx, p *Pool) error {
		if AllocationState(p) != Steady {
			return poolBeingResized(p)
		}
		removed := map[string]bool{}
		for _, n := range ids {
			node, err := f.node(tx, p, n)
			if err != nil {
				return err
			}
			if removed[node.ID] || !node.Deleting.IsZero() {
				continue
			}
			removed[node.ID] = true
			if err := f.deleteNode(tx, node.ID); err != nil {
				return err
			}
		}
		x := &p.Spec.Properties.Scale.Fixed
		x.Dedicated, x.ResizeTimeout = max(0, x.Dedicated-len(removed)), timeout
		p.Spec.Orders.Resize++
		return nil
	})
}

// deleteNode asks for a node's deletion. One that its controller has not seen
// was never started and is gone at once, and its mark with it.
func (f *Fleet) deleteNode(tx *store.Tx, id string) error {
	if err := Nodes.Delete(tx, id); err != nil {
		return err
	}
	left, err := Nodes.Lookup(tx, id)
	if err != nil || left != nil {
		return err
	}
	return marks.Delete(tx, nodeMark(id))
}

// change is the frame of the operations on a pool that is there.
func (f *Fleet) change(ctx context.Context, id arm.ID, verb, ifMatch string, fn func(*store.Tx, *Pool) error) (*Pool, error) {
	if err := poolID(id); err != nil {
		return nil, err
	}
	var p *Pool
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/pools/write", Resource: id.String(), Detail: verb}
	err := f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) (err error) {
		if p, err = f.get(tx, id.StoreKey()); err != nil {
			return err
		}
		if err := matches(p, ifMatch, tx.Store()); err != nil {
			return err
		}
		if !p.Deleting.IsZero() {
			return poolBeingDeleted(p)
		}
		before := p.Spec
		if err := fn(tx, p); err != nil {
			return err
		}
		if before.Orders == p.Spec.Orders {
			return nil
		}
		return Pools.Put(tx, p)
	})
	return p, err
}
