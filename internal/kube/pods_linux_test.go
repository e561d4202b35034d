package kube

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// must fails the test on the error of a call that prepares it.
func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func nodes(t *testing.T, c *cluster, a *api) {
	make := func(name, label, ip, system string, ready core.ConditionStatus) {
		n := &core.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: core.NodeStatus{
			Addresses:  []core.NodeAddress{{Type: core.NodeHostName, Address: name}, {Type: core.NodeInternalIP, Address: ip}},
			Conditions: []core.NodeCondition{{Type: core.NodeReady, Status: ready}},
			NodeInfo:   core.NodeSystemInfo{OperatingSystem: system, KubeletVersion: "v1.36.3"},
		}}
		if label != "" {
			n.Labels = map[string]string{"node-role.kubernetes.io/" + label: ""}
		}
		made := must(a.typed.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}))(t)
		made.Status = n.Status
		must(a.typed.CoreV1().Nodes().UpdateStatus(t.Context(), made, metav1.UpdateOptions{}))(t)
	}
	make("a-master", "control-plane", serverIP, "linux", core.ConditionTrue)
	make("b-master", "master", "10.0.0.2", "linux", core.ConditionFalse)
	make("c-worker", "", "10.0.0.3", "windows", core.ConditionUnknown)
	make("k8s-master-12345678-0", "", "fd00::4", "linux", core.ConditionTrue)
	must(a.typed.CoreV1().Nodes().Create(t.Context(), &core.Node{ObjectMeta: metav1.ObjectMeta{Name: "new", Labels: map[string]string{core.LabelOSStable: "linux"}}}, metav1.CreateOptions{}))(t)

	_, port, _ := net.SplitHostPort(c.server)
	want := []rotation.Node{
		{Name: "a-master", Address: serverIP, Master: true, Ready: true, OS: "linux", Version: "v1.36.3", Endpoint: serverIP + ":" + port},
		{Name: "b-master", Address: "10.0.0.2", Master: true, OS: "linux", Version: "v1.36.3", Endpoint: "10.0.0.2:6443"},
		{Name: "c-worker", Address: "10.0.0.3", OS: "windows", Version: "v1.36.3"},
		{Name: "k8s-master-12345678-0", Address: "fd00::4", Master: true, Ready: true, OS: "linux", Version: "v1.36.3", Endpoint: "[fd00::4]:6443"},
		{Name: "new", OS: "linux"},
	}
	got, err := a.Nodes(t.Context())
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

// template is a pod that never runs: nobody schedules it.
func template(app string) core.PodTemplateSpec {
	return core.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": app}},
		Spec:       core.PodSpec{Containers: []core.Container{{Name: "c", Image: "none"}}},
	}
}

func selector(app string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
}

func barePod(name string, change func(p *core.Pod)) *core.Pod {
	p := &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: template(name).Spec}
	if change != nil {
		change(p)
	}
	return p
}

func projected(ttl *int64) core.Volume {
	return core.Volume{Name: "t" + time.Now().Format("150405.000000000")[7:], VolumeSource: core.VolumeSource{Projected: &core.ProjectedVolumeSource{Sources: []core.VolumeProjection{
		{ServiceAccountToken: &core.ServiceAccountTokenProjection{Path: "token", Audience: "vault", ExpirationSeconds: ttl}},
	}}}}
}

func pods(t *testing.T, a *api) {
	namespace(t, a, "apps")
	eventually(t, "the namespace has a service account", func() bool {
		_, err := a.ServiceAccount(t.Context(), "apps", "default")
		return err == nil
	})
	kinds, meta := a.typed.AppsV1(), func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Name: name} }
	none, yes := metav1.CreateOptions{}, true
	must(kinds.Deployments("apps").Create(t.Context(), &apps.Deployment{ObjectMeta: meta("web"), Spec: apps.DeploymentSpec{Selector: selector("web"), Template: template("web")}}, none))(t)
	must(kinds.ReplicaSets("apps").Create(t.Context(), &apps.ReplicaSet{ObjectMeta: meta("lone"), Spec: apps.ReplicaSetSpec{Selector: selector("lone"), Template: template("lone")}}, none))(t)
	everywhere := template("agent") // nobody takes the taint from a new node that says that it is not ready
	everywhere.Spec.Tolerations = []core.Toleration{{Operator: core.TolerationOpExists}}
	must(kinds.DaemonSets("apps").Create(t.Context(), &apps.DaemonSet{ObjectMeta: meta("agent"), Spec: apps.DaemonSetSpec{Selector: selector("agent"), Template: everywhere}}, none))(t)
	must(kinds.StatefulSets("apps").Create(t.Context(), &apps.StatefulSet{ObjectMeta: meta("db"), Spec: apps.StatefulSetSpec{Selector: selector("db"), Template: template("db")}}, none))(t)
	job := template("once")
	job.Spec.RestartPolicy = core.RestartPolicyNever
	must(a.typed.BatchV1().Jobs("apps").Create(t.Context(), &batch.Job{ObjectMeta: meta("once"), Spec: batch.JobSpec{Template: job}}, none))(t)

	no, long := false, int64(7200)
	bare := a.typed.CoreV1().Pods("apps")
	must(bare.Create(t.Context(), barePod("alone", nil), none))(t)
	must(bare.Create(t.Context(), barePod("tokenless", func(p *core.Pod) { p.Spec.AutomountServiceAccountToken = &no }), none))(t)
	must(bare.Create(t.Context(), barePod("tokens", func(p *core.Pod) { p.Spec.Volumes = []core.Volume{projected(nil), projected(&long)} }), none))(t)
	must(bare.Create(t.Context(), barePod("hour", func(p *core.Pod) {
		p.Spec.AutomountServiceAccountToken, p.Spec.Volumes = &no, []core.Volume{projected(nil)}
	}), none))(t)
	must(bare.Create(t.Context(), barePod("static-a-master", func(p *core.Pod) {
		p.Annotations = map[string]string{core.MirrorPodAnnotationKey: "1"}
		p.Spec.NodeName = "a-master"
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "a-master", UID: "1", Controller: &yes}}
	}), none))(t)
	must(bare.Create(t.Context(), barePod("foreign", func(p *core.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps.kruise.io/v1beta1", Kind: "StatefulSet", Name: "db", UID: "2", Controller: &yes}}
	}), none))(t)
	ended := must(bare.Create(t.Context(), barePod("ended", nil), none))(t)
	ended.Status.Phase = core.PodSucceeded
	must(bare.UpdateStatus(t.Context(), ended, metav1.UpdateOptions{}))(t)

	automatic := 3607 * time.Second // what the API server itself puts into a pod
	want := map[string]rotation.Pod{
		"web-": {Owner: "Deployment/web", TokenTTL: automatic}, "lone-": {Owner: "ReplicaSet/lone", TokenTTL: automatic},
		"agent-": {Owner: "DaemonSet/agent", TokenTTL: automatic}, "db-0": {Owner: "StatefulSet/db", TokenTTL: automatic},
		"once-": {Owner: "Job/once", TokenTTL: automatic}, "alone": {TokenTTL: automatic}, "tokenless": {}, "hour": {TokenTTL: time.Hour},
		"tokens": {TokenTTL: 2 * time.Hour}, "static-a-master": {Node: "a-master", Mirror: true}, "foreign": {Owner: "StatefulSet.apps.kruise.io/db", TokenTTL: automatic},
	}
	eventually(t, "all controllers have made their pods", func() bool {
		all := must(a.Pods(t.Context()))(t)
		return !slices.ContainsFunc([]string{"web-", "lone-", "agent-", "db-", "once-"}, func(prefix string) bool { return find(all, prefix) == nil })
	})
	all := must(a.Pods(t.Context()))(t)
	for prefix, p := range want {
		got := find(all, prefix)
		if got == nil {
			t.Errorf("pod %s is not there", prefix)
			continue
		}
		if time.Since(got.Created) > 10*time.Minute || got.Namespace != "apps" {
			t.Errorf("%+v", got)
		}
		p.Namespace, p.Name, p.Created = got.Namespace, got.Name, got.Created
		if *got != p {
			t.Errorf("got %+v, want %+v", *got, p)
		}
	}
	if find(all, "ended") != nil {
		t.Error("a pod that has ended uses no token")
	}
}

func find(all []rotation.Pod, prefix string) *rotation.Pod {
	i := slices.IndexFunc(all, func(p rotation.Pod) bool { return p.Namespace == "apps" && strings.HasPrefix(p.Name, prefix) })
	if i < 0 {
		return nil
	}
	return &all[i]
}

// nextSecond waits until pods get another creation time than those that are there:
// one that replaces another in the same second cannot be told from it.
func nextSecond() { time.Sleep(1100 * time.Millisecond) }

// there reports whether this very pod is still there and not about to end.
func there(t *testing.T, a *api, p rotation.Pod) bool {
	t.Helper()
	now, err := a.typed.CoreV1().Pods(p.Namespace).Get(t.Context(), p.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	return now.DeletionTimestamp == nil && now.CreationTimestamp.Time.Equal(p.Created)
}

// setReady says of a pod what its kubelet would say.
func setReady(t *testing.T, a *api, name string) {
	t.Helper()
	status := []byte(`{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}`)
	must(a.typed.CoreV1().Pods("apps").Patch(t.Context(), name, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status"))(t)
}

func restarts(t *testing.T, a *api) {
	nextSecond()
	pod := func(prefix string) rotation.Pod {
		t.Helper()
		p := find(must(a.Pods(t.Context()))(t), prefix)
		if p == nil {
			t.Fatalf("no pod %s", prefix)
		}
		return *p
	}
	restart := func(p rotation.Pod) {
		t.Helper()
		if err := a.RestartOwner(t.Context(), p, "turn 1"); err != nil {
			t.Errorf("%s: %v", p.Name, err)
		}
	}
	web := pod("web-")
	restart(web)
	first := must(a.typed.AppsV1().Deployments("apps").Get(t.Context(), "web", metav1.GetOptions{}))(t)
	restart(web)
	second := must(a.typed.AppsV1().Deployments("apps").Get(t.Context(), "web", metav1.GetOptions{}))(t)
	if second.Spec.Template.Annotations[restarted] != "turn 1" || second.Generation != first.Generation || first.Generation < 2 || second.Spec.Template.Labels["app"] != "web" {
		t.Errorf("the same mark twice: generation %d, then %d, template %v", first.Generation, second.Generation, second.Spec.Template.ObjectMeta)
	}
	eventually(t, "the Deployment has a pod with the mark", func() bool {
		l := must(a.typed.CoreV1().Pods("apps").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"}))(t)
		return slices.ContainsFunc(l.Items, func(p core.Pod) bool { return p.Annotations[restarted] == "turn 1" })
	})
	agent := pod("agent-")
	restart(agent)
	if d := must(a.typed.AppsV1().DaemonSets("apps").Get(t.Context(), "agent", metav1.GetOptions{}))(t); d.Spec.Template.Annotations[restarted] != "turn 1" {
		t.Error("the DaemonSet has no mark")
	}
	db := pod("db-0")
	setReady(t, a, "db-0")
	restart(db)
	if s := must(a.typed.AppsV1().StatefulSets("apps").Get(t.Context(), "db", metav1.GetOptions{}))(t); s.Spec.Template.Annotations[restarted] != "turn 1" {
		t.Error("the StatefulSet has no mark")
	}
	eventually(t, "the StatefulSet has replaced its pod", func() bool { return !there(t, a, db) })

	for _, prefix := range []string{"alone", "lone-", "once-", "foreign"} { // evicted
		p := pod(prefix)
		restart(p)
		if there(t, a, p) {
			t.Errorf("%s was not evicted", p.Name)
		}
		restart(p) // it is gone, or another
	}
	if err := a.RestartOwner(t.Context(), pod("static-a-master"), "turn 1"); !errors.Is(err, fault.Invalid) {
		t.Errorf("a static pod: %v", err)
	}
	gone := web
	gone.Owner = "Deployment/none"
	if err := a.RestartOwner(t.Context(), gone, "turn 1"); !errors.Is(err, fault.NotFound) {
		t.Errorf("an owner that is gone: %v", err)
	}
	ownersThatDoNotReplace(t, a, pod)
	budget(t, a, pod)
}

// ownersThatDoNotReplace their pods by themselves have them evicted.
func ownersThatDoNotReplace(t *testing.T, a *api, pod func(string) rotation.Pod) {
	merge, o := types.MergePatchType, metav1.PatchOptions{}
	must(a.typed.AppsV1().DaemonSets("apps").Patch(t.Context(), "agent", merge, []byte(`{"spec":{"updateStrategy":{"type":"OnDelete","rollingUpdate":null}}}`), o))(t)
	must(a.typed.AppsV1().Deployments("apps").Patch(t.Context(), "web", merge, []byte(`{"spec":{"paused":true}}`), o))(t)
	must(a.typed.AppsV1().StatefulSets("apps").Patch(t.Context(), "db", merge, []byte(`{"spec":{"updateStrategy":{"rollingUpdate":{"partition":5}}}}`), o))(t)
	nextSecond()
	eventually(t, "the StatefulSet has a pod", func() bool { return find(must(a.Pods(t.Context()))(t), "db-0") != nil })
	evicted(t, a, pod, "turn 2", "agent-", "web-", "db-0")
	must(a.typed.AppsV1().StatefulSets("apps").Patch(t.Context(), "db", merge, []byte(`{"spec":{"updateStrategy":{"rollingUpdate":{"partition":0}}}}`), o))(t)
	eventually(t, "the StatefulSet has a pod", func() bool { return find(must(a.Pods(t.Context()))(t), "db-0") != nil })
	nextSecond()
	evicted(t, a, pod, "turn 3", "db-0") // it is not ready
}

func evicted(t *testing.T, a *api, pod func(string) rotation.Pod, mark string, prefixes ...string) {
	t.Helper()
	for _, prefix := range prefixes {
		p := pod(prefix)
		if err := a.RestartOwner(t.Context(), p, mark); err != nil {
			t.Errorf("%s: %v", p.Name, err)
		}
		if there(t, a, p) {
			t.Errorf("%s was not evicted", p.Name)
		}
	}
}

// budget: a disruption budget holds, at once and not after a minute of trying.
func budget(t *testing.T, a *api, pod func(string) rotation.Pod) {
	eventually(t, "the StatefulSet has a pod", func() bool { return find(must(a.Pods(t.Context()))(t), "db-0") != nil })
	p := pod("db-0")
	one := intstr.FromInt32(1)
	budgets := a.typed.PolicyV1().PodDisruptionBudgets("apps")
	must(budgets.Create(t.Context(), &policy.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Name: "db"}, Spec: policy.PodDisruptionBudgetSpec{MinAvailable: &one, Selector: selector("db")}}, metav1.CreateOptions{}))(t)
	setReady(t, a, "db-0")
	// The StatefulSet leaves it to us to end its pods.
	must(a.typed.AppsV1().StatefulSets("apps").Patch(t.Context(), "db", types.MergePatchType, []byte(`{"spec":{"updateStrategy":{"type":"OnDelete","rollingUpdate":null}}}`), metav1.PatchOptions{}))(t)
	began := time.Now()
	err := a.RestartOwner(t.Context(), p, "turn 4")
	if !errors.Is(err, fault.TooMany) || !there(t, a, p) {
		t.Errorf("against a disruption budget: %v", err)
	}
	eventually(t, "the budget counts the pod", func() bool {
		return must(budgets.Get(t.Context(), "db", metav1.GetOptions{}))(t).Status.CurrentHealthy == 1
	})
	err = a.RestartOwner(t.Context(), p, "turn 4")
	if !errors.Is(err, fault.TooMany) || !strings.Contains(err.Error(), "disruption budget") || !there(t, a, p) {
		t.Errorf("against a disruption budget that is known: %v", err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("it took %s to say so", took)
	}
	if err := budgets.Delete(t.Context(), "db", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	nextSecond()
	if err := a.RestartOwner(t.Context(), p, "turn 4"); err != nil || there(t, a, p) {
		t.Errorf("without the budget: %v", err)
	}
	var next rotation.Pod
	eventually(t, "the StatefulSet has another pod of the same name", func() bool {
		n := find(must(a.Pods(t.Context()))(t), "db-0")
		if n != nil {
			next = *n
		}
		return n != nil
	})
	if err := a.RestartOwner(t.Context(), p, "turn 4"); err != nil || !there(t, a, next) {
		t.Errorf("once more for the pod that is replaced already: %v", err)
	}
}
