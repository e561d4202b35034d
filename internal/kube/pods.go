package kube

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// restarted is the annotation of a pod template that names the restart.
const restarted = "keyfleet.dev/restarted"

// defaultTTL is the lifetime of a projected token whose volume does not give one.
const defaultTTL = time.Hour

// Pods implements rotation.API. Pods that have ended are left out: they use no token any more.
func (a *api) Pods(ctx context.Context) ([]rotation.Pod, error) {
	pods, err := ask(ctx, a, "listing pods", func(ctx context.Context) ([]core.Pod, error) {
		return list(ctx, metav1.ListOptions{}, a.typed.CoreV1().Pods("").List, func(l *core.PodList) []core.Pod { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	owners, err := a.replicaSets(ctx)
	if err != nil {
		return nil, err
	}
	var out []rotation.Pod
	for i := range pods {
		if phase := pods[i].Status.Phase; phase != core.PodSucceeded && phase != core.PodFailed {
			out = append(out, pod(&pods[i], owners))
		}
	}
	return out, nil
}

// replicaSets returns the owner of each ReplicaSet, by "NAMESPACE/NAME". Their
// metadata is enough; with their templates they would be the largest list of all.
func (a *api) replicaSets(ctx context.Context) (map[string]string, error) {
	sets, err := ask(ctx, a, "listing ReplicaSets", func(ctx context.Context) ([]metav1.PartialObjectMetadata, error) {
		resource := schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "replicasets"}
		return list(ctx, metav1.ListOptions{}, a.meta.Resource(resource).List, func(l *metav1.PartialObjectMetadataList) []metav1.PartialObjectMetadata { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	owners := map[string]string{}
	for i := range sets {
		if o := metav1.GetControllerOf(&sets[i]); o != nil {
			owners[sets[i].Namespace+"/"+sets[i].Name] = ownerName(o)
		}
	}
	return owners, nil
}

func pod(p *core.Pod, replicaSets map[string]string) rotation.Pod {
	out := rotation.Pod{Namespace: p.Namespace, Name: p.Name, Node: p.Spec.NodeName, Created: p.CreationTimestamp.Time}
	if _, out.Mirror = p.Annotations[core.MirrorPodAnnotationKey]; out.Mirror {
		return out
	}
	out.TokenTTL = tokenTTL(p)
	o := metav1.GetControllerOf(p)
	if o == nil {
		return out
	}
	out.Owner = ownerName(o)
	if name, ok := strings.CutPrefix(out.Owner, "ReplicaSet/"); ok {
		if above := replicaSets[p.Namespace+"/"+name]; above != "" {
			out.Owner = above
		}
	}
	return out
}

// ownerName is "KIND/NAME"; with a group that is not one of Kubernetes' own,
// "KIND.GROUP/NAME": others have a DaemonSet or a StatefulSet too.
func ownerName(o *metav1.OwnerReference) string {
	group, _, found := strings.Cut(o.APIVersion, "/")
	if !found || group == "apps" || group == "batch" {
		return o.Kind + "/" + o.Name
	}
	return o.Kind + "." + group + "/" + o.Name
}

// tokenTTL is the longest lifetime of the service account tokens in a pod's volumes.
func tokenTTL(p *core.Pod) time.Duration {
	var longest time.Duration
	for _, v := range p.Spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, source := range v.Projected.Sources {
			if source.ServiceAccountToken == nil {
				continue
			}
			ttl := defaultTTL
			if s := source.ServiceAccountToken.ExpirationSeconds; s != nil {
				ttl = time.Duration(*s) * time.Second
			}
			longest = max(longest, ttl)
		}
	}
	return longest
}

// RestartOwner implements rotation.API. An owner that has the new template and
// replaces no pod by itself (a paused Deployment, the strategy OnDelete, a
// partition, a StatefulSet's pod that is not ready) gets this pod replaced by its
// eviction.
func (a *api) RestartOwner(ctx context.Context, p rotation.Pod, mark string) error {
	if p.Mirror {
		return fault.New(fault.Invalid, "", "Pod %s/%s is a static pod; only its node restarts it.", p.Namespace, p.Name)
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
		"annotations": map[string]string{restarted: mark},
	}}}})
	if err != nil {
		return err
	}
	rolls, err := ask(ctx, a, "restarting "+p.Owner+" in "+p.Namespace, func(ctx context.Context) (bool, error) {
		return a.roll(ctx, p, patch)
	})
	if err != nil || rolls {
		return err
	}
	return a.evict(ctx, p)
}

// roll patches the template of a pod's owner, and reports whether the owner will replace the pod.
func (a *api) roll(ctx context.Context, p rotation.Pod, patch []byte) (bool, error) {
	kind, name, _ := strings.Cut(p.Owner, "/")
	o := metav1.PatchOptions{FieldManager: manager}
	switch kind {
	case "Deployment":
		d, err := a.typed.AppsV1().Deployments(p.Namespace).Patch(ctx, name, types.StrategicMergePatchType, patch, o)
		return err == nil && !d.Spec.Paused, err
	case "DaemonSet":
		d, err := a.typed.AppsV1().DaemonSets(p.Namespace).Patch(ctx, name, types.StrategicMergePatchType, patch, o)
		return err == nil && d.Spec.UpdateStrategy.Type != apps.OnDeleteDaemonSetStrategyType, err
	case "StatefulSet":
		s, err := a.typed.AppsV1().StatefulSets(p.Namespace).Patch(ctx, name, types.StrategicMergePatchType, patch, o)
		if err != nil {
			return false, err
		}
		u := s.Spec.UpdateStrategy
		parted := u.RollingUpdate != nil && u.RollingUpdate.Partition != nil && *u.RollingUpdate.Partition > 0
		if u.Type == apps.OnDeleteStatefulSetStrategyType || parted {
			return false, nil
		}
		return a.ready(ctx, p)
	}
	return false, nil
}

// ready reports whether a pod is ready, or gone. A StatefulSet waits for its
// pods to become ready before it replaces any, and one whose token is not
// accepted any more never does.
func (a *api) ready(ctx context.Context, p rotation.Pod) (bool, error) {
	now, err := a.typed.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(now.Status.Conditions, func(c core.PodCondition) bool {
		return c.Type == core.PodReady && c.Status == core.ConditionTrue
	}), nil
}

// evict evicts the very pod that was listed: a StatefulSet's next one has the same name.
func (a *api) evict(ctx context.Context, p rotation.Pod) error {
	_, err := ask(ctx, a, "evicting pod "+p.Namespace+"/"+p.Name, func(ctx context.Context) (struct{}, error) {
		now, err := a.typed.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) || err == nil && (now.DeletionTimestamp != nil || !p.Created.IsZero() && !now.CreationTimestamp.Time.Equal(p.Created)) {
			return struct{}{}, nil
		}
		if err != nil {
			return struct{}{}, err
		}
		err = a.typed.PolicyV1().Evictions(p.Namespace).Evict(ctx, &policy.Eviction{
			ObjectMeta:    metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name},
			DeleteOptions: &metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(now.UID))},
		})
		if apierrors.IsNotFound(err) {
			err = nil
		}
		return struct{}{}, err
	})
	return err
}
