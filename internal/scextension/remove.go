package scextension

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/effect"
)

// goTime is how long one visit waits for a removed object to be gone; finalizers of
// others may hold it for longer.
const goTime = 3 * time.Second

// depart does with the objects of a connection what was ordered when its desired
// state was deleted, and then lets the desired state go. Without an order somebody
// deleted it by hand: the objects stay as they are, and the manager writes it anew.
func (a *applier) depart(ctx context.Context, s *core.Secret, d wire.Desired, before wire.Applied) (visit, error) {
	v := visit{applied: before}
	if !slices.Contains(s.Finalizers, finalizer) { // others hold it
		v.gone = true
		return v, nil
	}
	key := s.Labels[labelConnection]
	order := wire.Remove(s.Annotations[annotationRemove])
	v.applied.Problem = nil
	if order == wire.RemoveDelete || order == wire.RemoveKeep {
		all := a.view.labelled(key)
		if Key(d.ID) == key { // it could be read
			all = append(all, named(d)...)
		}
		v.applied.Objects = nil
		for _, o := range belongings(before, all) {
			what, problem := a.dismiss(ctx, key, o, order)
			if problem != nil {
				v.applied.Problem = first(v.applied.Problem, problem)
				v.applied.Objects = append(v.applied.Objects, wire.AppliedObject{Kind: o.kind.name, Namespace: o.namespace, Name: o.name})
				what = "problem"
			}
			if what != "" {
				v.did = append(v.did, deed{o, what})
			}
			if problem != nil && order == wire.RemoveDelete {
				break // in order: what uses an object goes before it
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return v, err
	}
	if v.applied.Problem != nil {
		v.applied.Problem = hide(v.applied.Problem, d)
		return v, a.note(ctx, s, before, &v.applied)
	}
	v.gone = true
	return v, a.letGo(ctx, s)
}

func (a *applier) dismiss(ctx context.Context, key string, o object, order wire.Remove) (string, *wire.Problem) {
	if order == wire.RemoveKeep {
		return a.release(ctx, key, o)
	}
	return a.drop(ctx, key, o)
}

// letGo takes our finalizer off a desired state, which is deleted with it.
func (a *applier) letGo(ctx context.Context, s *core.Secret) error {
	left := slices.DeleteFunc(slices.Clone(s.Finalizers), func(f string) bool { return f == finalizer })
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": s.ResourceVersion, "finalizers": left}})
	if err != nil {
		return fmt.Errorf("encoding the finalizers: %w", err)
	}
	err = effect.Do("let the desired state go", func() error {
		_, err := a.cluster.api.CoreV1().Secrets(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: Extension})
		return err
	})
	if apierrors.IsConflict(err) {
		return errAgain
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("taking the finalizer off the Secret %s/%s: %w", s.Namespace, s.Name, err)
	}
	return nil
}

// leave reports whether an object is to be left as it is by a connection that goes:
// it is not ours, belongs to another connection, or is still wanted by one.
func (a *applier) leave(ctx context.Context, key string, o object, live *unstructured.Unstructured) (bool, error) {
	labels := live.GetLabels()
	if labels[labelManagedBy] != Extension && labels[labelConnection] != key {
		return true, nil
	}
	all, err := a.cluster.desiredStates(ctx) // not the view: a connection may be a moment old
	if err != nil {
		return true, err
	}
	for i := range all {
		s := &all[i]
		if s.Labels[labelConnection] == key || !wants(s) {
			continue
		}
		if d, err := readDesired(s); err == nil && slices.Contains(named(d), o) {
			return true, nil
		}
	}
	return o.kind != accountKind && labels[labelConnection] != key, nil
}

// drop deletes an object of a connection and waits until it is gone. It returns
// "removed", or nothing if there was nothing to do.
func (a *applier) drop(ctx context.Context, key string, o object) (string, *wire.Problem) {
	asked := ""
	for end := time.Now().Add(goTime); ; {
		live, err := a.read(ctx, o)
		if noSuchKind(err) {
			return asked, nil // with its kind, all its objects are gone
		}
		if err != nil {
			return "", explain(err, o)
		}
		if live == nil {
			return asked, nil
		}
		leave, err := a.leave(ctx, key, o, live)
		if err != nil {
			return "", explain(err, o)
		}
		if leave {
			return asked, nil
		}
		if live.GetDeletionTimestamp() == nil {
			if err := a.delete(ctx, o, live); err != nil && !errors.Is(err, errAgain) {
				return "", explain(err, o)
			}
		}
		if asked = "removed"; time.Now().After(end) {
			return "", lingering(o, live.GetFinalizers())
		}
		if live.GetDeletionTimestamp() == nil {
			continue // mostly it is gone at once
		}
		select {
		case <-ctx.Done():
			return "", lingering(o, live.GetFinalizers())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// delete deletes the object that was read, and no other.
func (a *applier) delete(ctx context.Context, o object, live *unstructured.Unstructured) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	uid, version := live.GetUID(), live.GetResourceVersion()
	err := effect.Do("delete "+o.kind.name, func() error {
		return a.cluster.objects.Resource(o.kind.resource).Namespace(o.namespace).
			Delete(ctx, o.name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version}})
	})
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return errAgain
	}
	return err
}

// release takes what is ours off an object, which stays usable and nobody's. It
// returns "released", or nothing if there was nothing to do.
func (a *applier) release(ctx context.Context, key string, o object) (string, *wire.Problem) {
	for {
		live, err := a.read(ctx, o)
		if noSuchKind(err) || err == nil && live == nil {
			return "", nil
		}
		if err != nil {
			return "", explain(err, o)
		}
		leave, err := a.leave(ctx, key, o, live)
		if err != nil {
			return "", explain(err, o)
		}
		if leave || live.GetDeletionTimestamp() != nil {
			return "", nil
		}
		_, err = a.update(ctx, o, disowned(live))
		if errors.Is(err, errAgain) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			return "", explain(err, o)
		}
		return "released", nil
	}
}

// disowned is an object without our labels, annotations and managed fields.
func disowned(live *unstructured.Unstructured) *unstructured.Unstructured {
	u := live.DeepCopy()
	labels, annotations := u.GetLabels(), u.GetAnnotations()
	delete(labels, labelManagedBy)
	delete(labels, labelConnection)
	u.SetLabels(labels)
	for _, name := range []string{annotationLinker, annotationChanged, annotationRepaired, annotationPause} {
		delete(annotations, name)
	}
	u.SetAnnotations(annotations)
	fields := slices.DeleteFunc(u.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool { return f.Manager == Extension })
	if len(fields) == 0 {
		fields = []metav1.ManagedFieldsEntry{{}} // an empty list would mean: as they were
	}
	u.SetManagedFields(fields)
	return u
}
