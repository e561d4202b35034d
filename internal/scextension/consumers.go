package scextension

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

const (
	// settle is how long a kubelet may need to bring changed values into a volume:
	// its sync period of a minute, and as much again for its cache.
	settle        = 2 * time.Minute
	mostConsumers = 20 // that are listed; the others are counted
)

// consumers finds the pods that run with values of a Secret that are old: those
// that read it before it last changed. It asks the API server each time, because
// who is missing here may have its credential revoked.
func (c *Cluster) consumers(ctx context.Context, secret object, changed, now time.Time) (old []wire.Consumer, more int, err error) {
	for next := ""; ; {
		page, err := c.api.CoreV1().Pods(secret.namespace).List(ctx, metav1.ListOptions{Limit: pageSize, Continue: next})
		if err != nil {
			return nil, 0, fmt.Errorf("listing the pods: %w", err)
		}
		for i := range page.Items {
			pod := &page.Items[i]
			if since := readsOld(pod, secret.name, changed, now); !since.IsZero() {
				old = append(old, wire.Consumer{Pod: pod.Namespace + "/" + pod.Name, Since: since.UTC()})
			}
		}
		if next = page.Continue; next == "" {
			break
		}
	}
	slices.SortFunc(old, func(a, b wire.Consumer) int { return strings.Compare(a.Pod, b.Pod) })
	if more = len(old) - mostConsumers; more > 0 {
		return old[:mostConsumers], more, nil
	}
	return old, 0, nil
}

// readsOld returns since when a pod's containers run with old values of a Secret;
// zero: none does. A container reads variables, and files that are mounted with
// subPath, once, when it starts; other files are kept up to date by the kubelet, and
// count as old for the time that this may take.
func readsOld(pod *core.Pod, secret string, changed, now time.Time) time.Time {
	var since time.Time
	if pod.Status.Phase == core.PodSucceeded || pod.Status.Phase == core.PodFailed {
		return since
	}
	volumes := volumesWith(pod, secret)
	for _, c := range containers(pod) {
		once, live := reads(c.spec, secret, volumes)
		if !once && !(live && now.Before(changed.Add(settle))) {
			continue
		}
		if c.status == nil || c.status.State.Running == nil {
			continue // one that waits reads it when it starts, one that ended does not read it
		}
		started := c.status.State.Running.StartedAt.Time
		if started.Before(changed) && (since.IsZero() || started.Before(since)) {
			since = started
		}
	}
	return since
}

// container is one of a pod's, of whatever sort.
type container struct {
	spec   core.EphemeralContainerCommon // has all the fields of a container
	status *core.ContainerStatus         // nil: its kubelet has not said anything yet
}

func containers(pod *core.Pod) []container {
	statuses := slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses)
	var all []container
	add := func(spec core.EphemeralContainerCommon) {
		c := container{spec: spec}
		if i := slices.IndexFunc(statuses, func(s core.ContainerStatus) bool { return s.Name == spec.Name }); i >= 0 {
			c.status = &statuses[i]
		}
		all = append(all, c)
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		add(core.EphemeralContainerCommon(c))
	}
	for _, c := range pod.Spec.EphemeralContainers {
		add(c.EphemeralContainerCommon)
	}
	return all
}

// volumesWith names the volumes of a pod that show a Secret.
func volumesWith(pod *core.Pod, secret string) []string {
	var names []string
	for _, v := range pod.Spec.Volumes {
		shows := v.Secret != nil && v.Secret.SecretName == secret
		if v.Projected != nil {
			shows = shows || slices.ContainsFunc(v.Projected.Sources, func(p core.VolumeProjection) bool { return p.Secret != nil && p.Secret.Name == secret })
		}
		if shows {
			names = append(names, v.Name)
		}
	}
	return names
}

// reads reports whether a container reads a Secret once, and whether it sees it live.
func reads(c core.EphemeralContainerCommon, secret string, volumes []string) (once, live bool) {
	for _, e := range c.EnvFrom {
		once = once || e.SecretRef != nil && e.SecretRef.Name == secret
	}
	for _, e := range c.Env {
		once = once || e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil && e.ValueFrom.SecretKeyRef.Name == secret
	}
	for _, m := range c.VolumeMounts {
		if slices.Contains(volumes, m.Name) {
			fixed := m.SubPath != "" || m.SubPathExpr != ""
			once, live = once || fixed, live || !fixed
		}
	}
	return once, live
}

// lookAgain says when the consumers of a Secret are to be looked at again; zero:
// when something changes. There is no watch on pods: a cluster has many, and few
// of them matter here.
func lookAgain(old bool, changed, now time.Time) time.Duration {
	age := now.Sub(changed)
	switch {
	case old:
		return min(max(age/10, 2*time.Second), time.Minute)
	case age < settle/12: // a kubelet may report late that a container started early
		return settle / 12
	case age < settle:
		return settle - age
	}
	return 0
}
