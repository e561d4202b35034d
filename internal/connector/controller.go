package connector

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

const controllerName = "connections"

// patience is how long a passing failure leaves an operation open; after it the
// connection is Failed, and goes on being tried.
const patience = 2 * time.Minute

// Controller returns the loop that makes connections what they shall be.
func (s *Service) Controller(m *reconcile.Metrics) reconcile.Runnable {
	return reconcile.Controller[Connection, Status]{
		Name: controllerName, Objects: Connections, Reconciler: controller{s}, Workers: 8, Deadline: 3 * time.Minute,
		Also: []reconcile.Trigger{reported, addonReported}, Metrics: m, Log: s.cfg.Log,
	}
}

// reported looks at a connection when a manager has reported something of it.
func reported(ctx context.Context, s *store.Store, enqueue func(id string)) error {
	return reports.Follow(ctx, s, "", func(c store.Change[wire.ConnectionReport, struct{}]) error {
		if c.ID != "" {
			enqueue(c.ID)
		}
		return nil
	})
}

type controller struct{ *Service }

// waiting is not a failure: somebody else has to do something first.
type waiting struct {
	what  string
	after time.Duration
}

// errRecord asks for the status to be written before the next step.
var errRecord = errors.New("the status has to be written first")

func (w waiting) Error() string { return "waiting for " + w.what }

// Reconcile implements reconcile.Reconciler.
func (c controller) Reconcile(ctx context.Context, st *store.Store, o *Object) (reconcile.Result, error) {
	ctx = system(ctx)
	err := c.advance(ctx, st, o)
	now := c.cfg.Now()
	o.Status.Waiting, o.Status.Problem, o.Status.Looked = "", nil, o.Generation
	var w waiting
	switch {
	case errors.Is(err, errRecord):
		return reconcile.Result{After: time.Millisecond}, nil
	case err == nil:
		o.Status.State, o.Status.Done = "Succeeded", o.Generation
		return reconcile.Result{After: proofEvery}, nil
	case errors.As(err, &w):
		o.Status.Waiting = w.what
		if o.Status.State != "Succeeded" || o.Status.Done != o.Generation {
			o.Status.State = under(o)
		}
		return reconcile.Result{After: w.after}, nil
	}
	o.Status.Problem = problemOf(err)
	o.Status.State = "Failed"
	if passing(err) && now.Sub(o.Changed) < patience {
		o.Status.State = under(o)
	}
	return reconcile.Result{}, err
}

// under is the state of an operation that is under way.
func under(o *Object) string {
	if o.Status.Done == 0 {
		return "Accepted"
	}
	return "Updating"
}

// passing reports whether trying again can help without anybody's doing.
func passing(err error) bool {
	var p *problemError
	if errors.As(err, &p) {
		switch p.Code {
		case "NamespaceTerminating", "AdmissionUnavailable", "APIServerBusy", "APIServerUnreachable", "KubernetesError", "ObjectTerminating", "ObjectAltered", "DeliveryFailed":
			return true
		}
		return false
	}
	switch fault.KindOf(err) {
	case fault.Internal, fault.Unavailable, fault.Timeout, fault.TooMany, fault.Precondition:
		return true
	}
	return false
}

// problemOf says an error as the connection shows it.
func problemOf(err error) *wire.Problem {
	var p *problemError
	if errors.As(err, &p) {
		return &p.Problem
	}
	e := fault.From(err)
	out := &wire.Problem{Code: e.Code, Layer: layerOf(e.Code), Object: e.Target, Message: e.Message, Fix: e.Fix}
	if out.Message == "" { // not foreseen: the log has it
		out.Code, out.Layer, out.Message = "InternalError", "keyfleet", "Something went wrong that was not foreseen; the log of the server has it."
	}
	return out
}

func layerOf(code string) string {
	switch {
	case strings.HasPrefix(code, "Target"), code == "InvalidDbSecret":
		return "target"
	case strings.Contains(code, "Vault"), strings.Contains(code, "Secret"):
		return "vault"
	case strings.Contains(code, "Identity"), strings.Contains(code, "Federated"):
		return "identity"
	case strings.Contains(code, "Cluster"):
		return "cluster"
	}
	return "keyfleet"
}

// problemError is a Problem that another program has reported.
type problemError struct{ wire.Problem }

func (p *problemError) Error() string { return p.Code + ": " + p.Message }

// advance does what is left to do, and returns nil when the connection is as it shall be.
func (c controller) advance(ctx context.Context, st *store.Store, o *Object) error {
	cluster, _, err := parseLinker(o.Spec.ID)
	if err != nil {
		return err
	}
	state, err := c.cfg.Clusters.State(ctx, cluster)
	if err != nil {
		return err
	}
	if state.Busy != "" {
		return waiting{fmt.Sprintf("the cluster, which is being updated: %s is running", state.Busy), 5 * time.Second}
	}
	r, onServer, err := c.reachTarget(ctx, o.Spec)
	if err != nil {
		return err
	}
	m, err := c.credential(ctx, st, o, r)
	if err != nil {
		return err
	}
	if err := c.grant(ctx, o, cluster, state); err != nil {
		return err
	}
	d, err := c.desired(ctx, o)
	if err != nil {
		return err
	}
	o.Status.Desired = d.Revision
	if err := c.addon(ctx, o, cluster, state); err != nil {
		return err
	}
	report, err := c.delivered(ctx, o, d, state)
	if err != nil {
		return err
	}
	if err := c.prove(ctx, o, d, r, onServer); err != nil {
		return err
	}
	return c.retireOld(ctx, m, o, report)
}

// credential makes, or finds, what the workload logs in with. m is nil where it was given.
func (c controller) credential(ctx context.Context, st *store.Store, o *Object, r Reach) (*maker, error) {
	if g := o.Spec.Auth.Given; g != nil {
		o.Status.Credential = Credential{User: o.Spec.Auth.User, Secret: *g}
		return nil, nil
	}
	if o.Spec.Auth.Type != Secret {
		o.Status.Credential = Credential{User: o.Spec.Auth.User}
		return nil, nil
	}
	m, err := c.makerOf(ctx, st, o, r)
	if err != nil {
		return nil, err
	}
	made := m.obj.Spec
	if made.Phase == preparing || made.Current.User == "" || made.Phase == atRest && made.Rotated < o.Spec.Rotations {
		if r.Kind == "" {
			id, _ := serverOf(o.Spec.Target.ID)
			return nil, fault.New(fault.NotFound, "TargetNotRegistered", "The server '%s' of the target is not registered any more.", id.String()).At(o.Spec.Target.ID)
		}
		if err := m.prepare(ctx); err != nil {
			return nil, err
		}
	}
	o.Status.Credential, o.Status.Rotated = m.obj.Spec.Current, m.obj.Spec.Rotated
	if m.obj.Spec.Phase == retiring {
		o.Status.Rotated-- // not until the old one is refused
	}
	return m, nil
}

// delivered waits until the cluster has the desired state, by what its manager saw.
func (c controller) delivered(ctx context.Context, o *Object, d wire.Desired, state ClusterState) (wire.Applied, error) {
	report, err := reports.Lookup(c.cfg.Store.View(ctx), o.ID)
	if err != nil {
		return wire.Applied{}, err
	}
	switch {
	case report != nil && report.Spec.Problem != nil:
		return wire.Applied{}, &problemError{*report.Spec.Problem}
	case report == nil || report.Spec.Applied == nil || report.Spec.Applied.Revision != d.Revision:
		if state.State != "Succeeded" {
			return wire.Applied{}, notReady(o, state)
		}
		return wire.Applied{}, c.undelivered(ctx, o)
	}
	a := *report.Spec.Applied
	if a.Problem != nil {
		return a, &problemError{*a.Problem}
	}
	there := func(kind, name, hash string) bool {
		return slices.ContainsFunc(a.Objects, func(o wire.AppliedObject) bool { return o.Kind == kind && o.Name == name && o.Hash == hash })
	}
	if d.Secret != nil && !there("Secret", d.Secret.Name, wire.SecretHash(d.Secret.Data)) {
		return a, waiting{"the Secret in the cluster to be as it shall be", 10 * time.Second}
	}
	if d.ProviderClass != nil {
		hash, err := d.ProviderClass.Hash()
		if err == nil && !there("SecretProviderClass", d.ProviderClass.Name, hash) {
			err = waiting{"the SecretProviderClass in the cluster to be as it shall be", 10 * time.Second}
		}
		return a, err
	}
	return a, nil
}

// notReady says that a cluster does not answer.
func notReady(o *Object, state ClusterState) error {
	return fault.New(fault.Unavailable, "ClusterNotReady", "The cluster is %s: %s.", state.State, state.Reason).At(state.ID).
		WithFix("keyfleet cluster show %s", o.Spec.Cluster[strings.LastIndexByte(o.Spec.Cluster, '/')+1:])
}

// installPatience is how long a connection waits although the extension has a
// problem: somebody may be about to mend it.
const installPatience = 30 * time.Second

// undelivered says why the cluster does not have the connection yet: it takes a
// moment, or the extension that would make the objects could not be installed.
func (c controller) undelivered(ctx context.Context, o *Object) error {
	cluster, _, err := parseLinker(o.Spec.ID)
	if err != nil {
		return err
	}
	ext, err := Extensions.Lookup(c.cfg.Store.View(ctx), key(cluster, ExtensionName))
	if err != nil {
		return err
	}
	if ext == nil || ext.Status.Report.Problem == nil {
		return waiting{"the cluster to have it", 10 * time.Second}
	}
	p := *ext.Status.Report.Problem
	if c.cfg.Now().Sub(o.Changed) < installPatience {
		return waiting{"the extension " + ExtensionName + ": " + p.Message, 5 * time.Second}
	}
	return &problemError{p}
}

// prove logs in with what was delivered: the hash of the cluster's Secret has shown
// that it is what the vault has.
func (c controller) prove(ctx context.Context, o *Object, d wire.Desired, r Reach, onServer bool) error {
	p := o.Status.Proof
	if !onServer || o.Spec.Auth.Type != Secret || p.Desired == d.Revision && c.cfg.Now().Sub(p.Time) < proofEvery {
		return nil
	}
	login, err := c.login(ctx, o)
	if err != nil {
		return err
	}
	took, err := c.cfg.Maker.Prove(ctx, r, login)
	if err != nil {
		return err
	}
	o.Status.Proof = Proof{Time: c.cfg.Now().UTC(), Took: took, Desired: d.Revision}
	return nil
}

// retireOld ends the old login when no pod is left that was started with it.
func (c controller) retireOld(ctx context.Context, m *maker, o *Object, a wire.Applied) error {
	if m == nil || m.obj.Spec.Phase != retiring {
		return nil
	}
	if n := len(a.Consumers); n > 0 {
		return waiting{fmt.Sprintf("%d pods that were started with the old credential, %s first; kubectl rollout restart what they belong to", n, a.Consumers[0].Pod), 10 * time.Second}
	}
	if err := m.retire(ctx); err != nil {
		return err
	}
	o.Status.Rotated = m.obj.Spec.Rotated
	return nil
}
