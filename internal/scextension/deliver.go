package scextension

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/effect"
)

// managerName is the field manager of desired states. What operator and job note on
// them is theirs.
const managerName = "keyfleet-manager"

// deliver brings the desired states of a cluster's connections there and reports
// what became of them. What is there already is not written again.
func (m *Manager) deliver(ctx context.Context, api kubernetes.Interface, all []wire.ConnectionWork) error {
	if len(all) == 0 {
		return nil
	}
	there, err := desiredStates(ctx, api)
	if err != nil {
		return fmt.Errorf("listing the desired states: %w", err)
	}
	var failed []error
	for _, w := range all {
		report, err := m.bring(ctx, api, w, there[Key(w.ID)])
		var refused *client.Error
		if errors.As(err, &refused) && (refused.Status == http.StatusNotFound || refused.Status == http.StatusConflict) {
			continue // it went, or moved, since the list was made
		}
		if err != nil {
			report.Problem = deliveryProblem(w, err)
			failed = append(failed, err)
		}
		if err := m.tell(ctx, w.ID, report); err != nil {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

// desiredStates are the desired states in a cluster, by the keys of connections.
func desiredStates(ctx context.Context, api kubernetes.Interface) (map[string]*core.Secret, error) {
	out := map[string]*core.Secret{}
	for next := ""; ; {
		page, err := api.CoreV1().Secrets(Namespace).List(ctx, metav1.ListOptions{LabelSelector: labelDesired + "=true", Limit: pageSize, Continue: next})
		if err != nil {
			return nil, err
		}
		for i := range page.Items {
			out[page.Items[i].Labels[labelConnection]] = &page.Items[i]
		}
		if next = page.Continue; next == "" {
			return out, nil
		}
	}
}

// bring makes a desired state be there, or be gone, and says what the cluster's
// side has noted on it. s is nil where there is none.
func (m *Manager) bring(ctx context.Context, api kubernetes.Interface, w wire.ConnectionWork, s *core.Secret) (wire.ConnectionReport, error) {
	if w.Remove != "" {
		return removeDesired(ctx, api, w, s)
	}
	if s != nil && s.DeletionTimestamp != nil { // by somebody's hand: it is written anew when it is gone
		return wire.ConnectionReport{}, nil
	}
	if s != nil {
		if d, err := readDesired(s); err == nil && d.Revision == w.Revision && slices.Contains(s.Finalizers, finalizer) {
			applied, err := readApplied(s)
			return wire.ConnectionReport{Applied: applied}, err
		}
	}
	var d wire.Desired
	if err := m.call(ctx, http.MethodPost, "/keyfleet/v1"+w.ID+"/desired", nil, &d); err != nil {
		return wire.ConnectionReport{}, err
	}
	secret, err := desiredSecret(d)
	if err != nil {
		return wire.ConnectionReport{}, err
	}
	if err := writeDesired(ctx, api, secret); err != nil {
		return wire.ConnectionReport{}, err
	}
	return wire.ConnectionReport{}, nil // what became of it is seen the next time
}

// writeDesired applies a desired state, and makes its namespace if it is not there.
func writeDesired(ctx context.Context, api kubernetes.Interface, secret *core.Secret) error {
	text, err := json.Marshal(secret)
	if err != nil {
		return fmt.Errorf("encoding a desired state: %w", err)
	}
	force := true
	apply := func() error {
		return effect.Do("write desired state", func() error {
			_, err := api.CoreV1().Secrets(Namespace).Patch(ctx, secret.Name, types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: managerName, Force: &force})
			return err
		})
	}
	err = apply()
	if !apierrors.IsNotFound(err) {
		return err
	}
	err = effect.Do("make the namespace", func() error {
		_, err := api.CoreV1().Namespaces().Create(ctx, &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: Namespace}}, metav1.CreateOptions{FieldManager: managerName})
		return err
	})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making the namespace %s: %w", Namespace, err)
	}
	return apply()
}

// removeDesired orders the removal of a connection's objects, or tells that it is done.
func removeDesired(ctx context.Context, api kubernetes.Interface, w wire.ConnectionWork, s *core.Secret) (wire.ConnectionReport, error) {
	if s == nil {
		return wire.ConnectionReport{Gone: true}, nil
	}
	applied, err := readApplied(s)
	if err != nil {
		return wire.ConnectionReport{}, err
	}
	report := wire.ConnectionReport{Applied: applied}
	if s.Annotations[annotationRemove] != string(w.Remove) {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{annotationRemove: string(w.Remove)}}})
		if err != nil {
			return report, err
		}
		err = effect.Do("order removal", func() error {
			_, err := api.CoreV1().Secrets(Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: managerName})
			return err
		})
		if err != nil {
			return report, fmt.Errorf("ordering the removal: %w", err)
		}
	}
	if s.DeletionTimestamp == nil {
		err := effect.Do("delete desired state", func() error {
			return api.CoreV1().Secrets(Namespace).Delete(ctx, s.Name, metav1.DeleteOptions{})
		})
		if err != nil && !apierrors.IsNotFound(err) {
			return report, fmt.Errorf("deleting the desired state: %w", err)
		}
	}
	return report, nil
}

// tellAgain is how often a report is made that says nothing new: a server that was
// restored from a backup has lost it.
const tellAgain = time.Minute

// tell reports what was seen of a connection, if that is new.
func (m *Manager) tell(ctx context.Context, id string, report wire.ConnectionReport) error {
	m.lock.Lock()
	old, known := m.told[id]
	m.lock.Unlock()
	if known && time.Since(old.time) < tellAgain && reflect.DeepEqual(old.report, report) {
		return nil
	}
	err := effect.Do("report on connection", func() error { return m.call(ctx, http.MethodPut, "/keyfleet/v1"+id+"/report", report, nil) })
	if err != nil {
		return fmt.Errorf("reporting on %s: %w", id, err)
	}
	m.lock.Lock()
	defer m.lock.Unlock()
	m.told[id] = told{report, time.Now()}
	return nil
}

// deliveryProblem says why a desired state could not be brought.
func deliveryProblem(w wire.ConnectionWork, err error) *wire.Problem {
	p := &wire.Problem{
		Code: "DeliveryFailed", Layer: "kubernetes", Object: "Secret " + Namespace + "/connection-" + Key(w.ID),
		Message: "The manager cannot write to the cluster.", Raw: clip(err.Error()),
	}
	if apierrors.IsForbidden(err) {
		p.Code, p.Message = "ManagerForbidden", "The kubeconfig of the cluster does not let the manager write what a connection needs."
		p.Fix = "kubectl apply -f deploy/manager-role.yaml"
	}
	return p
}
