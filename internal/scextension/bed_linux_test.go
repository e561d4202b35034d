package scextension

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
)

// bed is a real API server, and what a manager and a person do with it.
type bed struct {
	*kubetest.Cluster
	config  *rest.Config // of the administrator
	admin   *Cluster
	api     kubernetes.Interface // the administrator's
	cluster *Cluster             // with the rights of the operator, and no others
	log     *lines
}

// operatorRules is what operator and job may do in a cluster. That the tests of this
// package go through shows that it is enough.
var operatorRules = []rbac.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"secrets", "serviceaccounts"}, Verbs: []string{"get", "list", "watch", "create", "update", "patch", "delete"}},
	{APIGroups: []string{"secrets-store.csi.x-k8s.io"}, Resources: []string{"secretproviderclasses"}, Verbs: []string{"get", "list", "watch", "create", "update", "delete"}},
	{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: []string{"list", "watch"}},
	{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}},
	{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
	{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"get", "create", "update"}}, // in sc-system
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{Cluster: kubetest.Start(t), log: &lines{}}
	b.config = must(clientcmd.RESTConfigFromKubeConfig(b.Kubeconfig(t)))(t)
	b.admin = must(openCluster(b.config))(t)
	b.api = b.admin.api
	b.namespace(t, Namespace)
	role := &rbac.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "sc-operator"}, Rules: operatorRules}
	must(b.api.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}))(t)
	const user = "system:serviceaccount:sc-system:sc-operator"
	must(b.api.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbac.ClusterRoleBinding{
		ObjectMeta: role.ObjectMeta, RoleRef: rbac.RoleRef{Kind: "ClusterRole", Name: role.Name},
		Subjects: []rbac.Subject{{Kind: "User", Name: user}},
	}, metav1.CreateOptions{}))(t)
	b.cluster = b.as(t, user)
	return b
}

// as opens the cluster as somebody else.
func (b *bed) as(t *testing.T, user string) *Cluster {
	t.Helper()
	c := rest.CopyConfig(b.config)
	c.Impersonate = rest.ImpersonationConfig{UserName: user}
	return must(openCluster(c))(t)
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

func (b *bed) namespace(t testing.TB, name string) {
	t.Helper()
	must(b.api.CoreV1().Namespaces().Create(t.Context(), &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))(t)
}

// install makes the kind SecretProviderClass, as the add-on does.
func (b *bed) install(t testing.TB) {
	t.Helper()
	crd := map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": map[string]any{"name": "secretproviderclasses.secrets-store.csi.x-k8s.io"},
		"spec": map[string]any{
			"group": "secrets-store.csi.x-k8s.io", "scope": "Namespaced",
			"names": map[string]any{"kind": "SecretProviderClass", "listKind": "SecretProviderClassList", "plural": "secretproviderclasses", "singular": "secretproviderclass"},
			"versions": []any{map[string]any{"name": "v1", "served": true, "storage": true, "schema": map[string]any{"openAPIV3Schema": map[string]any{
				"type": "object", "properties": map[string]any{"spec": map[string]any{"type": "object", "properties": map[string]any{
					"provider":   map[string]any{"type": "string"},
					"parameters": map[string]any{"type": "object", "additionalProperties": map[string]any{"type": "string"}},
				}}},
			}}}},
		},
	}
	crds := b.admin.objects.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	must(crds.Create(t.Context(), &unstructured.Unstructured{Object: crd}, metav1.CreateOptions{}))(t)
}

// classes waits until the kind is served.
func (b *bed) classes(t testing.TB) {
	t.Helper()
	eventually(t, "the kind SecretProviderClass is served", func() bool {
		_, err := b.admin.objects.Resource(classKind.resource).Namespace("default").List(t.Context(), metav1.ListOptions{})
		return err == nil
	})
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

// linker is a desired state with a Secret.
func linker(name, namespace string, data map[string]string) wire.Desired {
	return revised(wire.Desired{
		ID:   "/subscriptions/s/resourceGroups/g/providers/Microsoft.ContainerService/managedClusters/c/providers/Microsoft.ServiceLinker/linkers/" + name,
		Name: name, Namespace: namespace, Secret: &wire.SecretObject{Name: "sc-" + name + "-secret", Data: data},
	})
}

// revised has the revision that fits its content.
func revised(d wire.Desired) wire.Desired {
	d.Revision = ""
	text, _ := json.Marshal(d)
	d.Revision = wire.SecretHash(map[string]string{"": string(text)})[:12]
	return d
}

// order writes a desired state, as the manager does.
func (b *bed) order(t testing.TB, d wire.Desired) {
	t.Helper()
	s := must(desiredSecret(d))(t)
	secrets := b.api.CoreV1().Secrets(Namespace)
	_, err := secrets.Create(t.Context(), s, metav1.CreateOptions{FieldManager: "keyfleet-manager"})
	if apierrors.IsAlreadyExists(err) {
		patch := must(json.Marshal(map[string]any{"data": s.Data}))(t)
		_, err = secrets.Patch(t.Context(), s.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "keyfleet-manager"})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// cancel deletes a desired state, as the manager does; without an order, as a person does.
func (b *bed) cancel(t testing.TB, d wire.Desired, order wire.Remove) {
	t.Helper()
	secrets, name := b.api.CoreV1().Secrets(Namespace), desiredName(Key(d.ID))
	if order != "" {
		patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, annotationRemove, order)
		must(secrets.Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}))(t)
	}
	if err := secrets.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// state reads a desired state; nil: it is gone.
func (b *bed) state(t testing.TB, d wire.Desired) *core.Secret {
	t.Helper()
	s, err := b.api.CoreV1().Secrets(Namespace).Get(t.Context(), desiredName(Key(d.ID)), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return must(s, err)(t)
}

// applied reads what became of a connection.
func (b *bed) applied(t testing.TB, d wire.Desired) wire.Applied {
	t.Helper()
	s := b.state(t, d)
	if s == nil {
		return wire.Applied{}
	}
	a := must(readApplied(s))(t)
	if a == nil {
		return wire.Applied{}
	}
	return *a
}

// live reads an object; nil: it is not there.
func (b *bed) live(t testing.TB, o object) *unstructured.Unstructured {
	t.Helper()
	u, err := b.admin.objects.Resource(o.kind.resource).Namespace(o.namespace).Get(t.Context(), o.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return must(u, err)(t)
}

// edit changes an object, as a person does.
func (b *bed) edit(t testing.TB, o object, patch string) {
	t.Helper()
	must(b.admin.objects.Resource(o.kind.resource).Namespace(o.namespace).
		Patch(t.Context(), o.name, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "kubectl-edit"}))(t)
}

// discard deletes an object, as a person does.
func (b *bed) discard(t testing.TB, o object) {
	t.Helper()
	if err := b.admin.objects.Resource(o.kind.resource).Namespace(o.namespace).Delete(t.Context(), o.name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// holds reports whether a Secret has exactly this data.
func (b *bed) holds(t testing.TB, o object, data map[string]string) bool {
	t.Helper()
	s, err := b.api.CoreV1().Secrets(o.namespace).Get(t.Context(), o.name, metav1.GetOptions{})
	if err != nil {
		return false
	}
	have := map[string]string{}
	for name, value := range s.Data {
		have[name] = string(value)
	}
	return wire.SecretHash(have) == wire.SecretHash(data) && s.Type == core.SecretTypeOpaque
}

// work runs the job once, and returns what it printed.
func (b *bed) work(t testing.TB) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out bytes.Buffer
	j := Job{Cluster: b.cluster, Out: &out}
	err := j.Run(ctx)
	return out.String(), err
}

// operate starts an operator; the function that it returns ends it.
func (b *bed) operate(t testing.TB, identity string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	o := &Operator{Cluster: b.cluster, Identity: identity, Lease: 3 * time.Second, Log: slog.New(slog.NewJSONHandler(io.MultiWriter(b.log, output{}), nil))}
	done := make(chan error, 1)
	go func() { done <- o.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Error("the operator does not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

// lines is a log that is read again.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// output shows what an operator logs, if KEYFLEET_TEST_LOG is set.
type output struct{}

func (output) Write(p []byte) (int, error) {
	if os.Getenv("KEYFLEET_TEST_LOG") == "" {
		return len(p), nil
	}
	return os.Stderr.Write(p)
}

func secretOf(d wire.Desired) object { return object{secretKind, d.Namespace, d.Secret.Name} }
func accountOf(d wire.Desired) object {
	return object{accountKind, d.Namespace, d.ServiceAccount.Name}
}
func classOf(d wire.Desired) object { return object{classKind, d.Namespace, d.ProviderClass.Name} }

// says fails the test unless a Problem has a code and a text in one of its parts.
func says(t testing.TB, p *wire.Problem, code string, parts ...string) {
	t.Helper()
	if p == nil || p.Code != code {
		t.Fatalf("the problem is %+v, want %s", p, code)
	}
	all := p.Object + "\n" + p.Message + "\n" + p.Raw + "\n" + p.Fix
	for _, part := range parts {
		if !strings.Contains(all, part) {
			t.Errorf("%s does not say %q: %+v", code, part, p)
		}
	}
	if p.Layer == "" || p.Object == "" || p.Fix == "" {
		t.Errorf("%s says too little: %+v", code, p)
	}
}
