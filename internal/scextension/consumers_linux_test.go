package scextension

import (
	"fmt"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// oldPods: pods are listed until they are started anew, in the API server's own words.
func oldPods(t *testing.T, b *bed) {
	b.namespace(t, "oldpods")
	must(b.api.CoreV1().ServiceAccounts("oldpods").Create(t.Context(), &core.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}))(t)
	d := linker("oldpods", "oldpods", map[string]string{"K": "1"})
	b.order(t, d)
	must(b.work(t))(t)
	start := func(name string, use func(*core.Container)) {
		c := core.Container{Name: "c", Image: "none"}
		use(&c)
		pod := must(b.api.CoreV1().Pods("oldpods").Create(t.Context(), &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: core.PodSpec{Containers: []core.Container{c}}}, metav1.CreateOptions{}))(t)
		pod.Status = core.PodStatus{Phase: core.PodRunning, ContainerStatuses: []core.ContainerStatus{{Name: "c", State: running(time.Now())}}}
		must(b.api.CoreV1().Pods("oldpods").UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}))(t)
	}
	for i := range 22 {
		start(fmt.Sprintf("pod-%02d", i), func(c *core.Container) { c.EnvFrom = envFrom(d.Secret.Name) })
	}
	start("other", func(c *core.Container) { c.EnvFrom = envFrom("other") })
	must(b.work(t))(t)
	if a := b.applied(t, d); len(a.Consumers) != 0 {
		t.Errorf("pods that were started after the Secret was made are listed: %+v", a.Consumers)
	}
	d.Secret.Data["K"] = "2"
	d = revised(d)
	b.order(t, d)
	must(b.work(t))(t)
	if a := b.applied(t, d); len(a.Consumers) != 20 || a.MoreConsumers != 2 || a.Consumers[0].Pod != "oldpods/pod-00" || a.Consumers[0].Since.IsZero() {
		t.Errorf("%d and %d pods are listed: %+v", len(a.Consumers), a.MoreConsumers, a.Consumers)
	}
	unwritten(t, b, d, func() { must(b.work(t))(t) })
	for i := range 21 {
		none := int64(0)
		if err := b.api.CoreV1().Pods("oldpods").Delete(t.Context(), fmt.Sprintf("pod-%02d", i), metav1.DeleteOptions{GracePeriodSeconds: &none}); err != nil {
			t.Fatal(err)
		}
	}
	must(b.work(t))(t)
	if a := b.applied(t, d); len(a.Consumers) != 1 || a.MoreConsumers != 0 || a.Consumers[0].Pod != "oldpods/pod-21" {
		t.Errorf("after a restart of the others these are listed: %+v", a.Consumers)
	}
}

func envFrom(secret string) []core.EnvFromSource {
	return []core.EnvFromSource{{SecretRef: &core.SecretEnvSource{LocalObjectReference: core.LocalObjectReference{Name: secret}}}}
}

func running(since time.Time) core.ContainerState {
	return core.ContainerState{Running: &core.ContainerStateRunning{StartedAt: metav1.NewTime(since)}}
}

func TestReadsOld(t *testing.T) {
	changed := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	before, after := changed.Add(-time.Hour), changed.Add(time.Second)
	volume := func(pod *core.Pod) {
		pod.Spec.Volumes = []core.Volume{{Name: "v", VolumeSource: core.VolumeSource{Secret: &core.SecretVolumeSource{SecretName: "s"}}}}
	}
	cases := []struct {
		name   string
		change func(*core.Pod)
		now    time.Time // zero: an hour after the change
		old    bool
	}{
		{"variables of all keys", func(p *core.Pod) { p.Spec.Containers[0].EnvFrom = envFrom("s") }, time.Time{}, true},
		{"one variable", func(p *core.Pod) {
			p.Spec.Containers[0].Env = []core.EnvVar{{Name: "X", ValueFrom: &core.EnvVarSource{SecretKeyRef: &core.SecretKeySelector{LocalObjectReference: core.LocalObjectReference{Name: "s"}, Key: "k"}}}}
		}, time.Time{}, true},
		{"variables of another Secret", func(p *core.Pod) { p.Spec.Containers[0].EnvFrom = envFrom("other") }, time.Time{}, false},
		{"the container was started anew", func(p *core.Pod) {
			p.Spec.Containers[0].EnvFrom, p.Status.ContainerStatuses[0].State = envFrom("s"), running(after)
		}, time.Time{}, false},
		{"the container waits and reads it when it starts", func(p *core.Pod) {
			p.Spec.Containers[0].EnvFrom, p.Status.ContainerStatuses[0].State = envFrom("s"), core.ContainerState{}
		}, time.Time{}, false},
		{"the kubelet has not said anything yet", func(p *core.Pod) {
			p.Spec.Containers[0].EnvFrom, p.Status.ContainerStatuses = envFrom("s"), nil
		}, time.Time{}, false},
		{"the pod has ended", func(p *core.Pod) { p.Spec.Containers[0].EnvFrom, p.Status.Phase = envFrom("s"), core.PodSucceeded }, time.Time{}, false},
		{"the pod has failed", func(p *core.Pod) { p.Spec.Containers[0].EnvFrom, p.Status.Phase = envFrom("s"), core.PodFailed }, time.Time{}, false},
		{"an init container that stays", func(p *core.Pod) {
			p.Spec.InitContainers = []core.Container{{Name: "i", EnvFrom: envFrom("s")}}
			p.Status.InitContainerStatuses = []core.ContainerStatus{{Name: "i", State: running(before)}}
		}, time.Time{}, true},
		{"an ephemeral container", func(p *core.Pod) {
			p.Spec.EphemeralContainers = []core.EphemeralContainer{{EphemeralContainerCommon: core.EphemeralContainerCommon{Name: "e", EnvFrom: envFrom("s")}}}
			p.Status.EphemeralContainerStatuses = []core.ContainerStatus{{Name: "e", State: running(before)}}
		}, time.Time{}, true},
		{"files, a minute after the change", func(p *core.Pod) {
			volume(p)
			p.Spec.Containers[0].VolumeMounts = []core.VolumeMount{{Name: "v", MountPath: "/v"}}
		}, changed.Add(time.Minute), true},
		{"files, when the kubelet has renewed them", func(p *core.Pod) {
			volume(p)
			p.Spec.Containers[0].VolumeMounts = []core.VolumeMount{{Name: "v", MountPath: "/v"}}
		}, changed.Add(settle), false},
		{"a file with subPath, which is never renewed", func(p *core.Pod) {
			volume(p)
			p.Spec.Containers[0].VolumeMounts = []core.VolumeMount{{Name: "v", MountPath: "/v", SubPath: "k"}}
		}, time.Time{}, true},
		{"a volume that no container mounts", volume, changed.Add(time.Minute), false},
		{"a projected volume", func(p *core.Pod) {
			p.Spec.Volumes = []core.Volume{{Name: "v", VolumeSource: core.VolumeSource{Projected: &core.ProjectedVolumeSource{Sources: []core.VolumeProjection{
				{Secret: &core.SecretProjection{LocalObjectReference: core.LocalObjectReference{Name: "s"}}},
			}}}}}
			p.Spec.Containers[0].VolumeMounts = []core.VolumeMount{{Name: "v", MountPath: "/v", SubPathExpr: "$(X)"}}
		}, time.Time{}, true},
	}
	for _, c := range cases {
		pod := &core.Pod{
			Spec:   core.PodSpec{Containers: []core.Container{{Name: "c"}}},
			Status: core.PodStatus{Phase: core.PodRunning, ContainerStatuses: []core.ContainerStatus{{Name: "c", State: running(before)}}},
		}
		c.change(pod)
		if c.now.IsZero() {
			c.now = changed.Add(time.Hour)
		}
		if since := readsOld(pod, "s", changed, c.now); since.IsZero() == c.old || c.old && !since.Equal(before) {
			t.Errorf("%s: old since %s, want %t", c.name, since, c.old)
		}
	}
}

func TestLookAgain(t *testing.T) {
	changed := time.Now()
	for _, c := range []struct {
		old  bool
		age  time.Duration
		want time.Duration
	}{
		{true, -time.Second, 2 * time.Second},
		{true, 5 * time.Minute, 30 * time.Second},
		{true, 24 * time.Hour, time.Minute},
		{false, 0, 10 * time.Second},
		{false, 11 * time.Second, settle - 11*time.Second},
		{false, settle, 0},
	} {
		if got := lookAgain(c.old, changed, changed.Add(c.age)); got != c.want {
			t.Errorf("old %t, %s after the change: again in %s, want %s", c.old, c.age, got, c.want)
		}
	}
}
