package helm

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
)

// bed is a real API server with real controllers. It has no nodes: what a scheduler
// and a kubelet would say of a pod is written into its status by a stand-in.
type bed struct {
	*kubetest.Cluster
	config *rest.Config // of the administrator
	api    kubernetes.Interface
	any    dynamic.Interface

	mu    sync.Mutex
	fates map[string]string // what becomes of pods, by NAMESPACE/COMPONENT
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{Cluster: kubetest.Start(t), fates: map[string]string{}}
	b.StartControllers(t)
	b.collect(t)
	b.config = must(clientcmd.RESTConfigFromKubeConfig(b.Kubeconfig(t)))(t)
	b.config.QPS, b.config.WarningHandler = -1, rest.NoWarnings{}
	b.api = must(kubernetes.NewForConfig(b.config))(t)
	b.any = must(dynamic.NewForConfig(b.config))(t)
	b.standIn(t)
	return b
}

// collect starts the controllers that kubetest leaves out: those that delete what
// belongs to a deleted object, and the one that counts for quotas.
func (b *bed) collect(t *testing.T) {
	t.Helper()
	cache := os.Getenv("KEYFLEET_BED_CACHE")
	if cache == "" {
		cache = filepath.Join(must(os.UserCacheDir())(t), "keyfleet-bed")
	}
	found, _ := filepath.Glob(filepath.Join(cache, "kubernetes-*", "kube-controller-manager"))
	if len(found) == 0 {
		t.Skipf("there is no kube-controller-manager in %s; run: go run ./test/bed/cmd/bed prepare", cache)
	}
	var output bytes.Buffer
	cmd := exec.Command(found[len(found)-1], "--kubeconfig="+b.Path("kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0",
		"--controllers=garbage-collector-controller,namespace-controller,resourcequota-controller")
	cmd.Dir, cmd.Stdout, cmd.Stderr = b.Dir, &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// fate says what becomes of the pods of a component: "ready", "done", "failed",
// "pull" (its image is not there), "taint" (no node takes it), or "": nobody looks at it.
func (b *bed) fate(namespace, component, what string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fates[namespace+"/"+component] = what
}

const component = "app.kubernetes.io/component"

// standIn writes into the status of pods what scheduler and kubelet would.
func (b *bed) standIn(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			pods, err := b.api.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
			if err != nil {
				continue
			}
			for i := range pods.Items {
				pod := &pods.Items[i]
				b.mu.Lock()
				what := b.fates[pod.Namespace+"/"+pod.Labels[component]]
				b.mu.Unlock()
				if what == "" || pod.Annotations["fate"] == what {
					continue
				}
				undergo(pod, what)
				if _, err := b.api.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err == nil {
					_, _ = b.api.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, "application/merge-patch+json",
						[]byte(`{"metadata":{"annotations":{"fate":"`+what+`"}}}`), metav1.PatchOptions{})
				}
			}
		}
	}()
}

const (
	pullText  = `Back-off pulling image "x/y:none": ErrImagePull: failed to resolve reference "x/y:none": not found`
	taintText = "0/3 nodes are available: 3 node(s) had untolerated taint {CriticalAddonsOnly: true}. preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."
)

func undergo(pod *core.Pod, what string) {
	s := &pod.Status
	container := core.ContainerStatus{Name: pod.Spec.Containers[0].Name, Image: pod.Spec.Containers[0].Image}
	set := func(t core.PodConditionType, v core.ConditionStatus, reason, message string) {
		s.Conditions = append(s.Conditions, core.PodCondition{Type: t, Status: v, Reason: reason, Message: message, LastTransitionTime: metav1.Now()})
	}
	s.Conditions = nil
	switch what {
	case "ready":
		s.Phase, container.Ready = core.PodRunning, true
		container.State.Running = &core.ContainerStateRunning{StartedAt: metav1.Now()}
		set(core.PodReady, core.ConditionTrue, "", "")
	case "done":
		s.Phase = core.PodSucceeded
		container.State.Terminated = &core.ContainerStateTerminated{Reason: "Completed"}
	case "failed":
		s.Phase = core.PodFailed
		container.State.Terminated = &core.ContainerStateTerminated{ExitCode: 3, Reason: "Error"}
	case "pull":
		s.Phase = core.PodPending
		container.State.Waiting = &core.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: pullText}
	case "taint":
		s.Phase = core.PodPending
		set(core.PodScheduled, core.ConditionFalse, "Unschedulable", taintText)
		return
	}
	s.ContainerStatuses = []core.ContainerStatus{container}
}

// client is one for a namespace, as the administrator.
func (b *bed) client(t *testing.T, namespace string) *Client {
	t.Helper()
	return must(New(b.Kubeconfig(t), namespace, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))))(t)
}

// namespace makes one, with labels.
func (b *bed) namespace(t *testing.T, name string, labels map[string]string) {
	t.Helper()
	must(b.api.CoreV1().Namespaces().Create(t.Context(), &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{}))(t)
}

// everything lists all objects of the cluster, over all API groups, but events and
// what each namespace gets by itself.
func (b *bed) everything(t *testing.T) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	lists, err := discovery.NewDiscoveryClientForConfigOrDie(b.config).ServerPreferredResources()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lists {
		gv, _ := schema.ParseGroupVersion(l.GroupVersion)
		for _, r := range l.APIResources {
			if !slices.Contains(r.Verbs, "list") || r.Kind == "Event" || r.Kind == "ComponentStatus" {
				continue
			}
			objects, err := b.any.Resource(gv.WithResource(r.Name)).List(t.Context(), metav1.ListOptions{})
			if apierrors.IsMethodNotSupported(err) || apierrors.IsNotFound(err) {
				continue
			}
			if err != nil {
				t.Fatalf("listing %s: %v", r.Name, err)
			}
			for _, o := range objects.Items {
				if r.Kind == "ServiceAccount" && o.GetName() == "default" || r.Kind == "ConfigMap" && o.GetName() == "kube-root-ca.crt" {
					continue
				}
				all[fmt.Sprintf("%s %s/%s", r.Kind, o.GetNamespace(), o.GetName())] = true
			}
		}
	}
	return all
}

// must fails the test on the error of a call that prepares it.
func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// eventually repeats a check until it holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in a minute it did not come about: %s", what)
		}
	}
}

// chart makes a chart of templates; each name is that of a file in templates.
func chart(t testing.TB, templates map[string]string) *Chart {
	t.Helper()
	return must(ReadChart(folder(templates)))(t)
}

func folder(templates map[string]string) fstest.MapFS {
	all := fstest.MapFS{"Chart.yaml": {Data: []byte("apiVersion: v2\nname: small\nversion: 1.2.3\n")}}
	for name, text := range templates {
		if !strings.Contains(name, "/") && name != "values.schema.json" {
			name = "templates/" + name
		}
		all[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return all
}

// deployment is a template of one with a pod of a component.
func deployment(name string) string {
	return strings.ReplaceAll(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: NAME}
spec:
  selector: {matchLabels: {app.kubernetes.io/component: NAME}}
  template:
    metadata: {labels: {app.kubernetes.io/component: NAME}}
    spec: {containers: [{name: main, image: "x/y:none"}]}
`, "NAME", name)
}

// job is a template of a hook job that is tried once.
func job(name string) string {
	return strings.ReplaceAll(`
apiVersion: batch/v1
kind: Job
metadata:
  name: NAME
  annotations: {helm.sh/hook: "post-install,post-upgrade", helm.sh/hook-delete-policy: "before-hook-creation,hook-succeeded"}
spec:
  backoffLimit: 0
  template:
    metadata: {labels: {app.kubernetes.io/component: NAME}}
    spec: {restartPolicy: Never, containers: [{name: main, image: "x/y:none"}]}
`, "NAME", name)
}

func configMap(name, value string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s}\ndata: {k: %q}\n", name, value)
}

// refused fails the test unless an error has a code, says what it shall, and says
// what to do.
func refused(t testing.TB, err error, code string, parts ...string) *fault.Error {
	t.Helper()
	f := fault.From(err)
	if f == nil || f.Code != code {
		t.Fatalf("the error is %v, want %s", err, code)
	}
	text := f.Message + "\n" + f.Target + "\n" + f.Fix
	for _, d := range f.Details {
		text += "\n" + d.Code + ": " + d.Message
	}
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s does not say %q:\n%s", code, part, text)
		}
	}
	if f.Fix == "" || f.Target == "" || f.Err == nil && f.Code != "HelmOperationInProgress" {
		t.Errorf("%s says too little: %+v", code, f)
	}
	if testing.Verbose() {
		t.Logf("%s (%s): %s\n  to do: %s\n  cause: %v", f.Code, f.Target, f.Message, f.Fix, f.Err)
	}
	return f
}
