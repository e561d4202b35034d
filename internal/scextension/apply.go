package scextension

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/effect"
)

// applier is the one path by which operator and job change the user's namespaces.
//
// An object is made by a POST, which fails if anybody else made it first, and changed
// by a PUT of what is there with what a connection wants put over it, which fails if
// anybody else wrote in between. (A server-side apply cannot be told to make and
// never to take over, and would leave the keys that others put into a Secret.) Both
// name the field manager sc-extension. If nothing differs, nothing is written.
//
// An object is a connection's by its labels. An object without them is never touched.
// A ServiceAccount may be named by several connections: its label is that of one of
// them, and it stays as long as any desired state names it.
type applier struct {
	cluster *Cluster
	view    view
	now     func() time.Time
	// repaired is told of every object that was repaired; nil: nobody is.
	repaired func(o object, connection string)
}

// view is what is known of the cluster beyond one connection. It may be a little
// old: every decision that destroys something looks again.
type view interface {
	// naming lists the desired states that name an object and still want it. They
	// come without the values of Secrets.
	naming(o object) ([]wire.Desired, error)
	// labelled lists the objects with a connection's label.
	labelled(key string) []object
}

// visit is what was done for one connection, and what is to follow.
type visit struct {
	applied wire.Applied
	gone    bool          // its desired state is removed, and its objects as was ordered
	did     []deed        // object by object
	again   time.Duration // when to look again; zero: when something changes
}

// deed is what was done with an object: "created", "updated", "repaired",
// "unchanged", "paused", "removed", "released", or "problem".
type deed struct {
	object object
	what   string
}

// visit does for one connection what its desired state says, and notes there what
// became of it. An error means that it was not done or not noted, errAgain that it is
// to be done for the desired state that there is now; what the cluster does not allow
// is the Problem of Applied.
func (a *applier) visit(ctx context.Context, s *core.Secret) (visit, error) {
	before, err := readApplied(s)
	if err != nil || before == nil {
		before = &wire.Applied{} // it is written anew
	}
	d, err := readDesired(s)
	if s.DeletionTimestamp != nil {
		return a.depart(ctx, s, d, *before)
	}
	var v visit
	if err != nil {
		v.applied = *before
		v.applied.Problem = unreadable("Secret "+s.Namespace+"/"+s.Name, "it is not one that this version can read")
	} else {
		r := round{applier: a, key: Key(d.ID), desired: d, before: *before}
		if v, err = r.run(ctx); err != nil {
			return v, err
		}
	}
	return v, a.note(ctx, s, *before, &v.applied)
}

// note writes what became of a connection, if that is not what is written already.
// It is errAgain if the desired state is another one by now.
func (a *applier) note(ctx context.Context, s *core.Secret, before wire.Applied, now *wire.Applied) error {
	now.Time = before.Time
	if reflect.DeepEqual(*now, before) {
		return nil
	}
	now.Time = a.now().UTC().Truncate(time.Millisecond)
	text, err := json.Marshal(now)
	if err != nil {
		return fmt.Errorf("encoding what was applied: %w", err)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": s.ResourceVersion, "annotations": map[string]string{annotationApplied: string(text)}}})
	if err != nil {
		return fmt.Errorf("encoding what was applied: %w", err)
	}
	err = effect.Do("note what was applied", func() error {
		_, err := a.cluster.api.CoreV1().Secrets(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: Extension})
		return err
	})
	if apierrors.IsConflict(err) {
		return errAgain
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("noting on the Secret %s/%s what was applied: %w", s.Namespace, s.Name, err)
	}
	return nil
}

// round brings one connection to its desired state.
type round struct {
	*applier
	key     string
	desired wire.Desired
	before  wire.Applied
	visit   visit
}

func (r *round) run(ctx context.Context) (visit, error) {
	out := &r.visit.applied
	*out = wire.Applied{Revision: r.desired.Revision, Repaired: r.before.Repaired, RepairedAt: r.before.RepairedAt}
	objects := named(r.desired)
	live := make([]*unstructured.Unstructured, len(objects))
	for i, o := range objects {
		u, err := r.read(ctx, o)
		if err != nil {
			r.failed(o, explain(err, o))
			if known := r.known(o); known != nil && !noSuchKind(err) {
				out.Objects = append(out.Objects, *known) // nobody says that it is gone
			}
			continue
		}
		live[i] = u
		if u != nil { // a repair that was made and not noted
			if n := repairs(u, r.key); n > out.Repaired {
				out.Repaired, out.RepairedAt = n, r.now().UTC().Truncate(time.Millisecond)
			}
		}
	}
	for i, o := range objects {
		if !slices.ContainsFunc(r.visit.did, func(d deed) bool { return d.object == o }) { // it could be read
			r.bring(ctx, o, live[i])
		}
	}
	r.dropRest(ctx, objects)
	r.see(ctx)
	out.Problem = hide(out.Problem, r.desired)
	return r.visit, ctx.Err() // a Problem that is only our own end is not noted
}

// failed notes a Problem with an object.
func (r *round) failed(o object, p *wire.Problem) {
	r.visit.did = append(r.visit.did, deed{o, "problem"})
	r.visit.applied.Problem = first(r.visit.applied.Problem, p)
}

// known is what was noted of an object; nil: it was not there, or not ours.
func (r *round) known(o object) *wire.AppliedObject {
	i := slices.IndexFunc(r.before.Objects, func(a wire.AppliedObject) bool { return is(a, o) })
	if i < 0 {
		return nil
	}
	return &r.before.Objects[i]
}

// is reports whether what was noted is of an object.
func is(a wire.AppliedObject, o object) bool {
	return a.Kind == o.kind.name && a.Namespace == o.namespace && a.Name == o.name
}

// read reads an object; nil: it is not there.
func (a *applier) read(ctx context.Context, o object) (*unstructured.Unstructured, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	u, err := a.cluster.objects.Resource(o.kind.resource).Namespace(o.namespace).Get(ctx, o.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) && !noSuchKind(err) {
		return nil, nil
	}
	return u, err
}

// errAgain: somebody else was faster, and it has to be looked at again.
var errAgain = errors.New("somebody else wrote it at the same time")

// bring makes one object as it shall be.
func (r *round) bring(ctx context.Context, o object, live *unstructured.Unstructured) {
	others, err := r.others(o)
	if err != nil {
		r.failed(o, unreadable(o.String(), err.Error()))
		return
	}
	w, problem := want(r.desired, o, others)
	for tries := 0; problem == nil; tries++ {
		var what string
		what, problem, err = r.once(ctx, &w, live, others)
		if !errors.Is(err, errAgain) {
			if err != nil {
				problem = explain(err, o)
			}
			if problem == nil {
				r.visit.did = append(r.visit.did, deed{o, what})
				return
			}
			break
		}
		if tries == 5 {
			problem = explain(err, o)
			break
		}
		if live, err = r.read(ctx, o); err != nil {
			problem = explain(err, o)
		}
	}
	r.failed(o, problem)
	listed := slices.ContainsFunc(r.visit.applied.Objects, func(a wire.AppliedObject) bool { return is(a, o) })
	if known := r.known(o); known != nil && live != nil && r.mine(live) && !listed {
		r.visit.applied.Objects = append(r.visit.applied.Objects, *known)
	}
}

// others are the other connections that name an object.
func (r *round) others(o object) ([]wire.Desired, error) {
	all, err := r.view.naming(o)
	return slices.DeleteFunc(all, func(d wire.Desired) bool { return Key(d.ID) == r.key }), err
}

// mine reports whether an object carries our labels, this connection's or any.
func (r *round) mine(live *unstructured.Unstructured) bool {
	labels := live.GetLabels()
	return labels[labelManagedBy] == Extension || labels[labelConnection] == r.key
}

// owner says whose label an object shall carry. A Problem: it is not to be touched.
func (r *round) owner(w *wanted, live *unstructured.Unstructured, others []wire.Desired) (string, *wire.Problem) {
	if live == nil {
		return r.key, nil
	}
	if !r.mine(live) {
		return "", inTheWay(w.object)
	}
	label := live.GetLabels()[labelConnection]
	for _, other := range others {
		if Key(other.ID) != label {
			continue
		}
		if w.kind == accountKind {
			return label, nil
		}
		return "", taken(w.object, other)
	}
	return r.key, nil // also of an object whose connection is gone or wants it no more
}

// once looks at an object and makes it as it shall be with at most one change.
func (r *round) once(ctx context.Context, w *wanted, live *unstructured.Unstructured, others []wire.Desired) (string, *wire.Problem, error) {
	key, problem := r.owner(w, live, others)
	if problem != nil {
		return "", problem, nil
	}
	known := r.known(w.object)
	drift := known != nil && known.Hash == w.hash && !inherits(live, key) // it was as it shall be
	if w.kind == secretKind {
		w.annotations[annotationChanged] = r.changed(w, known, live, drift).Format(time.RFC3339)
	}
	if live == nil {
		u, err := r.create(ctx, w, key, drift)
		return r.done(w, u, key, drift, "created"), r.check(w, u, key), err
	}
	if live.GetDeletionTimestamp() != nil {
		return "", lingering(w.object, live.GetFinalizers()), nil
	}
	next := w.impose(live, key)
	if !w.replaced(live) && reflect.DeepEqual(next.Object, live.Object) {
		return r.done(w, live, key, false, "unchanged"), nil, nil
	}
	if until := pausedUntil(live, r.now()); drift && !until.IsZero() {
		if p := &r.visit.applied.PausedUntil; p.IsZero() || until.Before(*p) {
			*p = until
		}
		r.visit.applied.Objects = append(r.visit.applied.Objects, *known)
		return "paused", nil, nil
	}
	if w.replaced(live) {
		if err := r.delete(ctx, w.object, live); err != nil {
			return "", nil, err
		}
		return "", nil, errAgain
	}
	if drift {
		countRepair(next, r.key, r.visit.applied.Repaired+1)
	}
	u, err := r.update(ctx, w.object, next)
	return r.done(w, u, key, drift, "updated"), r.check(w, u, key), err
}

// inherits reports whether an object goes over from a connection that is gone, or
// wants it no more.
func inherits(live *unstructured.Unstructured, key string) bool {
	if live == nil {
		return false
	}
	label := live.GetLabels()[labelConnection]
	return label != "" && label != key
}

// changed says when the data of a Secret last changed: what was noted of data that
// is still the same; for new data the next whole second, so that whatever started
// before counts as before. A Secret that was not there has no earlier values.
func (r *round) changed(w *wanted, known *wire.AppliedObject, live *unstructured.Unstructured, drift bool) time.Time {
	now := r.now().UTC().Truncate(time.Second)
	switch {
	case drift && !known.Changed.IsZero():
		return known.Changed
	case live == nil && known == nil:
		return now
	case live != nil && w.holds(live) && !changedAt(live).IsZero(): // written, and not noted
		return changedAt(live)
	}
	return now.Add(time.Second)
}

// done notes an object that is there. A nil object: it is not, there is an error.
func (r *round) done(w *wanted, u *unstructured.Unstructured, key string, drift bool, what string) string {
	if u == nil {
		return what
	}
	noted := wire.AppliedObject{Kind: w.kind.name, Namespace: w.namespace, Name: w.name, Hash: w.hash}
	if w.kind == secretKind {
		noted.Changed = changedAt(u)
	}
	if r.check(w, u, key) != nil {
		noted.Hash = "" // of something that nobody wanted
	}
	out := &r.visit.applied
	out.Objects = append(out.Objects, noted)
	if !drift {
		return what
	}
	out.Repaired++
	out.RepairedAt = r.now().UTC().Truncate(time.Millisecond)
	if r.repaired != nil {
		r.repaired(w.object, r.desired.Name)
	}
	return "repaired"
}

// check looks at what the API server made of what was written.
func (r *round) check(w *wanted, u *unstructured.Unstructured, key string) *wire.Problem {
	if u == nil || reflect.DeepEqual(w.impose(u, key).Object, u.Object) {
		return nil
	}
	return altered(w.object)
}

func (r *round) create(ctx context.Context, w *wanted, key string, drift bool) (u *unstructured.Unstructured, err error) {
	next := w.fresh(key)
	if drift {
		countRepair(next, r.key, r.visit.applied.Repaired+1)
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	err = effect.Do("create "+w.kind.name, func() error {
		u, err = r.cluster.objects.Resource(w.kind.resource).Namespace(w.namespace).Create(ctx, next, metav1.CreateOptions{FieldManager: Extension})
		return err
	})
	if apierrors.IsAlreadyExists(err) {
		return nil, errAgain
	}
	if err != nil {
		return nil, err
	}
	return u, nil
}

// update writes an object over the one that was read.
func (a *applier) update(ctx context.Context, o object, next *unstructured.Unstructured) (u *unstructured.Unstructured, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	err = effect.Do("update "+o.kind.name, func() error {
		u, err = a.cluster.objects.Resource(o.kind.resource).Namespace(o.namespace).Update(ctx, next, metav1.UpdateOptions{FieldManager: Extension})
		return err
	})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) && !noSuchKind(err) {
		return nil, errAgain
	}
	if err != nil {
		return nil, err
	}
	return u, nil
}

// dropRest removes what this connection had and wants no more.
func (r *round) dropRest(ctx context.Context, wanted []object) {
	for _, o := range belongings(r.before, r.view.labelled(r.key)) {
		if slices.Contains(wanted, o) {
			continue
		}
		what, problem := r.drop(ctx, r.key, o)
		switch {
		case problem != nil:
			r.failed(o, problem)
			if known := r.known(o); known != nil {
				r.visit.applied.Objects = append(r.visit.applied.Objects, *known)
			}
		case what != "":
			r.visit.did = append(r.visit.did, deed{o, what})
		}
	}
}

// belongings are the objects that a connection may have, in the order in which they
// are removed: those that were noted, and those that carry its label because the
// process died before it could note them.
func belongings(before wire.Applied, labelled []object) []object {
	all := map[object]bool{}
	for _, a := range before.Objects {
		if o, ok := fromWire(a); ok {
			all[o] = true
		}
	}
	for _, o := range labelled {
		all[o] = true
	}
	return slices.SortedFunc(maps.Keys(all), func(a, b object) int {
		if c := slices.Index(kinds, a.kind) - slices.Index(kinds, b.kind); c != 0 {
			return c
		}
		return strings.Compare(a.String(), b.String())
	})
}

// see finds the pods that have old values.
func (r *round) see(ctx context.Context) {
	out := &r.visit.applied
	i := slices.IndexFunc(out.Objects, func(a wire.AppliedObject) bool { return a.Kind == secretKind.name })
	if i >= 0 && r.desired.Secret != nil {
		changed, now := out.Objects[i].Changed, r.now()
		o := object{secretKind, r.desired.Namespace, r.desired.Secret.Name}
		ctx, cancel := context.WithTimeout(ctx, answerTime)
		defer cancel()
		old, more, err := r.cluster.consumers(ctx, o, changed, now)
		if err != nil {
			out.Problem = first(out.Problem, explain(err, o))
			out.Consumers, out.MoreConsumers = r.before.Consumers, r.before.MoreConsumers
			return
		}
		out.Consumers, out.MoreConsumers = old, more
		r.visit.again = lookAgain(len(old) > 0, changed, now)
	}
	if !out.PausedUntil.IsZero() {
		left := out.PausedUntil.Sub(r.now())
		if r.visit.again == 0 || left < r.visit.again {
			r.visit.again = max(left, time.Second)
		}
	}
}
