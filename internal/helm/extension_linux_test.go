package helm

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/chart/common"
	v1 "helm.sh/helm/v4/pkg/release/v1"
	admission "k8s.io/api/admissionregistration/v1"
	authentication "k8s.io/api/authentication/v1"
	authorization "k8s.io/api/authorization/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"

	"keyfleet.dev/keyfleet/deploy"
)

// everyValue is a value for every name in the chart's schema.
func everyValue() map[string]any {
	small := map[string]any{"requests": map[string]any{"cpu": "20m", "memory": "64Mi"}, "limits": map[string]any{"memory": "128Mi"}}
	return map[string]any{
		"image": "registry.example.com/keyfleet-connector@sha256:" + strings.Repeat("0", 64), "imagePullPolicy": "Always", "imagePullSecrets": []any{"pull"},
		"nodeSelector": map[string]any{"kubernetes.io/os": "linux"}, "priorityClassName": "system-cluster-critical",
		"tolerations": []any{map[string]any{"key": "CriticalAddonsOnly", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}},
		"affinity": map[string]any{"nodeAffinity": map[string]any{"requiredDuringSchedulingIgnoredDuringExecution": map[string]any{"nodeSelectorTerms": []any{
			map[string]any{"matchExpressions": []any{map[string]any{"key": "kubernetes.io/arch", "operator": "In", "values": []any{"amd64"}}}},
		}}}},
		"operator": map[string]any{"replicas": 2, "resources": small},
		"job":      map[string]any{"backoffLimit": 0, "activeDeadlineSeconds": 100, "resources": small},
		"webhook": map[string]any{
			"enabled": true, "replicas": 2, "resources": small, "tenantID": "7f3c1a52-0000-0000-0000-000000000001", "authorityHost": "https://login.keyfleet.internal:8443/",
		},
	}
}

// TestExtension goes through the life of the chart sc-extension as the account of
// deploy/manager-role.yaml.
func TestExtension(t *testing.T) {
	b := newBed(t)
	b.install(t, "../../deploy/manager-role.yaml")
	manager := must(New(b.TokenKubeconfig(t, b.token(t, "keyfleet", "manager")), "sc-system", nil))(t)
	extension := must(ReadChart(deploy.Extension()))(t)
	b.fate("sc-system", "operator", "ready")
	b.fate("sc-system", "webhook", "ready")
	b.fate("sc-system", "job", "done")
	eventually(t, "sc-system has its account", func() bool { // which pods without another one need
		_, err := b.api.CoreV1().ServiceAccounts("sc-system").Get(t.Context(), "default", metav1.GetOptions{})
		return err == nil
	})
	before := b.everything(t)
	apply := func(t *testing.T, values map[string]any) Release {
		t.Helper()
		r, err := manager.Apply(t.Context(), Request{Name: "sc-extension", Chart: extension, Values: values, Timeout: long})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	t.Run("the API server accepts every object, strictly", func(t *testing.T) {
		for _, values := range []map[string]any{nil, everyValue()} {
			b.accepts(t, extension, values)
		}
	})
	t.Run("the schema refuses wrong values", func(t *testing.T) { wrongValues(t, b, extension) })
	t.Run("another namespace is refused", func(t *testing.T) {
		_, err := b.client(t, "default").Apply(t.Context(), Request{Name: "sc-extension", Chart: extension, Timeout: long})
		refused(t, err, "RenderingFailed", "has to be sc-system")
	})
	t.Run("the manager installs it", func(t *testing.T) {
		if r := apply(t, nil); r.Chart != "sc-extension-0.1.0" || r.Status != "deployed" || r.Revision != 1 {
			t.Errorf("the release is %+v", r)
		}
		if _, err := b.api.BatchV1().Jobs("sc-system").Get(t.Context(), "sc-job", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("the job that succeeded: %v", err)
		}
	})
	t.Run("the webhook, and an upgrade leaves alone what it wrote", func(t *testing.T) { webhook(t, b, apply) })
	t.Run("the accounts have the rights that they need, and no others", func(t *testing.T) { rights(t, b) })
	t.Run("the manager removes it, and nothing is left", func(t *testing.T) {
		if err := manager.Remove(t.Context(), "sc-extension", long); err != nil {
			t.Fatal(err)
		}
		b.same(t, before, "sc-system")
	})
	t.Run("the job fails", func(t *testing.T) {
		b.fate("sc-system", "job", "failed")
		_, err := manager.Apply(t.Context(), Request{Name: "sc-extension", Chart: extension, Values: map[string]any{"job": map[string]any{"backoffLimit": 0}}, Timeout: long})
		refused(t, err, "JobFailed", "job failed: BackoffLimitExceeded", "kubectl logs job/sc-job -n sc-system")
		if err := manager.Remove(t.Context(), "sc-extension", long); err != nil {
			t.Fatal(err)
		}
		b.same(t, before, "sc-system")
	})
}

// webhook does what the webhook does, and upgrades.
func webhook(t *testing.T, b *bed, apply func(*testing.T, map[string]any) Release) {
	apply(t, everyValue())
	b.asAccount(t, "sc-system", "sc-webhook", func(api *dynamic.DynamicClient) {
		write := metav1.UpdateOptions{FieldManager: "sc-extension"}
		configurations := api.Resource(admission.SchemeGroupVersion.WithResource("mutatingwebhookconfigurations"))
		c := must(configurations.Get(t.Context(), "sc-webhook", metav1.GetOptions{}))(t)
		hooks, _, _ := unstructured.NestedSlice(c.Object, "webhooks")
		hooks[0].(map[string]any)["clientConfig"].(map[string]any)["caBundle"] = base64.StdEncoding.EncodeToString(b.CA.PEM())
		_ = unstructured.SetNestedSlice(c.Object, hooks, "webhooks")
		must(configurations.Update(t.Context(), c, write))(t)
		secrets := api.Resource(core.SchemeGroupVersion.WithResource("secrets")).Namespace("sc-system")
		s := must(secrets.Get(t.Context(), "sc-webhook-tls", metav1.GetOptions{}))(t)
		s.Object["data"] = map[string]any{"tls.crt": "eA=="}
		must(secrets.Update(t.Context(), s, write))(t)
	})
	values := everyValue()
	values["operator"] = map[string]any{"replicas": 1}
	apply(t, values)
	c := must(b.api.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), "sc-webhook", metav1.GetOptions{}))(t)
	w := c.Webhooks[0]
	if !bytes.Equal(w.ClientConfig.CABundle, b.CA.PEM()) {
		t.Error("the upgrade took the CA of the webhook away")
	}
	if w.Name != "mutation.azure-workload-identity.io" || *w.FailurePolicy != admission.Fail || *w.ReinvocationPolicy != admission.IfNeededReinvocationPolicy ||
		*w.MatchPolicy != admission.Equivalent || *w.SideEffects != admission.SideEffectClassNone || *w.TimeoutSeconds != 10 || *w.ClientConfig.Service.Path != "/mutate-v1-pod" ||
		w.ObjectSelector.MatchLabels["azure.workload.identity/use"] != "true" || len(w.Rules) != 1 || w.Rules[0].Resources[0] != "pods" || w.Rules[0].Operations[0] != admission.Create {
		t.Errorf("the webhook is %+v", w)
	}
	if s := must(b.api.CoreV1().Secrets("sc-system").Get(t.Context(), "sc-webhook-tls", metav1.GetOptions{}))(t); string(s.Data["tls.crt"]) != "x" {
		t.Error("the upgrade took the certificate of the webhook away")
	}
}

func wrongValues(t *testing.T, b *bed, extension *Chart) {
	c := b.client(t, "sc-system")
	for _, test := range []struct {
		values map[string]any
		field  string
	}{
		{map[string]any{"connection": "x"}, "connection"},
		{map[string]any{"image": ""}, "image"},
		{map[string]any{"image": "a b"}, "image"},
		{map[string]any{"imagePullPolicy": "Sometimes"}, "imagePullPolicy"},
		{map[string]any{"imagePullSecrets": []any{"A_B"}}, "imagePullSecrets.0"},
		{map[string]any{"nodeSelector": map[string]any{"a": true}}, "nodeSelector.a"},
		{map[string]any{"tolerations": []any{map[string]any{"keys": "x"}}}, "tolerations.0"},
		{map[string]any{"affinity": map[string]any{"x": 1}}, "affinity"},
		{map[string]any{"operator": map[string]any{"replicas": 0}}, "operator.replicas"},
		{map[string]any{"operator": map[string]any{"replicas": "2"}}, "operator.replicas"},
		{map[string]any{"operator": map[string]any{"resources": map[string]any{"requests": map[string]any{"cpu": "much"}}}}, "operator.resources.requests.cpu"},
		{map[string]any{"job": map[string]any{"backoffLimit": 7}}, "job.backoffLimit"},
		{map[string]any{"job": map[string]any{"activeDeadlineSeconds": 30}}, "job.activeDeadlineSeconds"},
		{map[string]any{"webhook": map[string]any{"enabled": "yes"}}, "webhook.enabled"},
		{map[string]any{"webhook": map[string]any{"authorityHost": "http://x"}}, "webhook.authorityHost"},
		{map[string]any{"webhook": map[string]any{"tenant": "x"}}, "webhook"},
	} {
		_, err := c.Apply(t.Context(), Request{Name: "sc-extension", Chart: extension, Values: test.values, Timeout: long})
		f := refused(t, err, "RenderingFailed", test.field)
		if len(f.Details) == 0 || f.Target != test.field && !strings.Contains(f.Message, "'"+test.field+"'") {
			t.Errorf("%v: the field is %q, want %q: %s", test.values, f.Target, test.field, f.Message)
		}
	}
}

// accepts has the API server look at every object of a chart without keeping it.
func (b *bed) accepts(t *testing.T, c *Chart, values map[string]any) {
	t.Helper()
	objects := render(t, c, values)
	if want := map[bool]int{false: 8, true: 17}[values != nil]; len(objects) != want {
		t.Errorf("the chart has %d objects, want %d", len(objects), want)
	}
	for _, u := range objects {
		if err := b.put(t.Context(), u, []string{metav1.DryRunAll}); err != nil {
			t.Errorf("%s %s: %v", u.GetKind(), u.GetName(), err)
		}
		if spec, found, _ := unstructured.NestedMap(u.Object, "spec", "template", "spec"); found { // sc-system takes "restricted" pods only
			delete(spec, "serviceAccountName") // it is not there yet
			pod := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "x", "namespace": "sc-system"}, "spec": spec}}
			if err := b.put(t.Context(), pod, []string{metav1.DryRunAll}); err != nil {
				t.Errorf("a pod of %s %s: %v", u.GetKind(), u.GetName(), err)
			}
		}
	}
}

// render makes the objects of a chart, hooks included, without a cluster.
func render(t *testing.T, c *Chart, values map[string]any) []*unstructured.Unstructured {
	t.Helper()
	in := action.NewInstall(action.NewConfiguration())
	in.ReleaseName, in.Namespace, in.DryRunStrategy = "sc-extension", "sc-system", action.DryRunClient
	in.KubeVersion = &common.KubeVersion{Version: "v1.36.0", Major: "1", Minor: "36"}
	r := must(in.RunWithContext(t.Context(), must(c.load())(t), values))(t).(*v1.Release)
	text := r.Manifest
	for _, h := range r.Hooks {
		text += "\n---\n" + h.Manifest
	}
	return decode(t, strings.NewReader(text))
}

// put makes an object, strictly.
func (b *bed) put(ctx context.Context, u *unstructured.Unstructured, dry []string) error {
	known := memory.NewMemCacheClient(discovery.NewDiscoveryClientForConfigOrDie(b.config))
	m, err := restmapper.NewDeferredDiscoveryRESTMapper(known).RESTMapping(u.GroupVersionKind().GroupKind(), u.GroupVersionKind().Version)
	if err != nil {
		return err
	}
	var resource dynamic.ResourceInterface = b.any.Resource(m.Resource)
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		resource = b.any.Resource(m.Resource).Namespace(u.GetNamespace())
	}
	_, err = resource.Create(ctx, u, metav1.CreateOptions{DryRun: dry, FieldValidation: metav1.FieldValidationStrict})
	return err
}

// install makes the objects of a file.
func (b *bed) install(t *testing.T, path string) {
	t.Helper()
	f := must(os.Open(path))(t)
	defer f.Close()
	for _, u := range decode(t, f) {
		if err := b.put(t.Context(), u, nil); err != nil {
			t.Fatalf("%s %s: %v", u.GetKind(), u.GetName(), err)
		}
	}
}

func decode(t *testing.T, r io.Reader) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	for dec := utilyaml.NewYAMLOrJSONDecoder(r, 4096); ; {
		u := &unstructured.Unstructured{}
		err := dec.Decode(&u.Object)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(u.Object) > 0 {
			all = append(all, u)
		}
	}
}

// token is one of a service account.
func (b *bed) token(t *testing.T, namespace, name string) string {
	t.Helper()
	return must(b.api.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, &authentication.TokenRequest{}, metav1.CreateOptions{}))(t).Status.Token
}

// asAccount does something as a service account.
func (b *bed) asAccount(t *testing.T, namespace, name string, do func(*dynamic.DynamicClient)) {
	t.Helper()
	c := must(New(b.TokenKubeconfig(t, b.token(t, namespace, name)), namespace, nil))(t)
	do(must(dynamic.NewForConfig(c.config))(t))
}

func rule(verb, group, resource string) rbac.PolicyRule {
	return rbac.PolicyRule{Verbs: []string{verb}, APIGroups: []string{group}, Resources: []string{resource}}
}

// allow gives an account these rights in the whole cluster, and no others.
func (b *bed) allow(t *testing.T, namespace, name string, rules ...rbac.PolicyRule) {
	t.Helper()
	role := &rbac.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "test:" + namespace + ":" + name}, Rules: rules}
	must(b.api.RbacV1().ClusterRoles().Update(t.Context(), role, metav1.UpdateOptions{}))(t) // which makes it, too
	_, err := b.api.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbac.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role.Name}, RoleRef: rbac.RoleRef{Kind: "ClusterRole", Name: role.Name},
		Subjects: []rbac.Subject{{Kind: "ServiceAccount", Namespace: namespace, Name: name}},
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	want := rules[len(rules)-1]
	eventually(t, "the rights are in force", func() bool {
		return b.may(t, namespace, name, authorization.ResourceAttributes{Verb: want.Verbs[0], Group: want.APIGroups[0], Resource: want.Resources[0], Namespace: namespace}) && !b.mayMore(t, namespace, name, rules)
	})
}

// mayMore reports whether an account still has a right on ConfigMaps or namespaces that no rule gives.
func (b *bed) mayMore(t *testing.T, namespace, name string, rules []rbac.PolicyRule) bool {
	t.Helper()
	for _, right := range []rbac.PolicyRule{rule("get", "", "namespaces"), rule("get", "", "configmaps"), rule("delete", "", "configmaps")} {
		given := false
		for _, r := range rules {
			given = given || r.Resources[0] == right.Resources[0] && (r.Verbs[0] == "*" || r.Verbs[0] == right.Verbs[0])
		}
		if !given && b.may(t, namespace, name, authorization.ResourceAttributes{Verb: right.Verbs[0], Resource: right.Resources[0], Namespace: namespace}) {
			return true
		}
	}
	return false
}

func (b *bed) may(t *testing.T, namespace, name string, what authorization.ResourceAttributes) bool {
	t.Helper()
	r := must(b.api.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorization.SubjectAccessReview{Spec: authorization.SubjectAccessReviewSpec{
		User: "system:serviceaccount:" + namespace + ":" + name, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + namespace, "system:authenticated"},
		ResourceAttributes: &what,
	}}, metav1.CreateOptions{}))(t)
	return r.Status.Allowed
}

// rights asks for every verb on every resource that the cluster has, and a few more.
func rights(t *testing.T, b *bed) {
	const everywhere, here = "", "sc-system"
	whole := "get list watch create update patch delete"
	type grant struct{ namespace, group, resource, name, verbs string }
	accounts := map[string][]grant{
		"sc-operator": {
			{everywhere, "", "secrets", "", whole},
			{everywhere, "", "serviceaccounts", "", whole},
			{everywhere, "secrets-store.csi.x-k8s.io", "secretproviderclasses", "", whole},
			{everywhere, "", "namespaces", "", "get list watch"},
			{everywhere, "", "pods", "", "list watch"},
			{everywhere, "", "events", "", "create patch"},
			{here, "coordination.k8s.io", "leases", "", "create"},
			{here, "coordination.k8s.io", "leases", "sc-operator", "get update create"},
		},
		"sc-webhook": {
			{everywhere, "", "serviceaccounts", "", "get"},
			{everywhere, "admissionregistration.k8s.io", "mutatingwebhookconfigurations", "sc-webhook", "get update"},
			{here, "", "secrets", "sc-webhook-tls", "get update"},
		},
	}
	resources := map[[2]string]bool{{"secrets-store.csi.x-k8s.io", "secretproviderclasses"}: true}
	for _, l := range must(discovery.NewDiscoveryClientForConfigOrDie(b.config).ServerPreferredResources())(t) {
		group, _, grouped := strings.Cut(l.GroupVersion, "/")
		if !grouped {
			group = ""
		}
		for _, r := range l.APIResources {
			if group == "authorization.k8s.io" || group == "authentication.k8s.io" { // everybody may ask about himself
				continue
			}
			resources[[2]string{group, r.Name}] = true
		}
	}
	for _, sub := range []string{"pods/exec", "pods/log", "pods/ephemeralcontainers", "serviceaccounts/token", "nodes/proxy"} {
		resources[[2]string{"", sub}] = true
	}
	verbs := strings.Fields(whole + " deletecollection bind escalate impersonate")
	asked := 0
	for account, grants := range accounts {
		for what := range resources {
			names := []string{""}
			for _, g := range grants {
				if g.resource == what[1] && g.name != "" {
					names = []string{"", g.name, "other"}
				}
			}
			for _, verb := range verbs {
				for _, namespace := range []string{"default", here} {
					for _, name := range names {
						want := false
						for _, g := range grants {
							want = want || g.group == what[0] && g.resource == what[1] && (g.namespace == everywhere || g.namespace == namespace) &&
								(g.name == "" || g.name == name) && strings.Contains(" "+g.verbs+" ", " "+verb+" ")
						}
						asked++
						if got := b.may(t, here, account, authorization.ResourceAttributes{Namespace: namespace, Group: what[0], Resource: what[1], Verb: verb, Name: name}); got != want {
							t.Errorf("%s may %s %s.%s %q in %s: %v, want %v", account, verb, what[1], what[0], name, namespace, got, want)
						}
					}
				}
			}
		}
	}
	t.Logf("%d questions", asked)
}

// TestExtensionArguments has the program itself look at the arguments of the chart's
// containers.
func TestExtensionArguments(t *testing.T) {
	program := filepath.Join(t.TempDir(), "keyfleet-connector")
	if out, err := exec.Command("go", "build", "-o", program, "keyfleet.dev/keyfleet/cmd/keyfleet-connector").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	seen := map[string]bool{}
	for _, u := range render(t, must(ReadChart(deploy.Extension()))(t), everyValue()) {
		containers, _, _ := unstructured.NestedSlice(u.Object, "spec", "template", "spec", "containers")
		for _, c := range containers {
			args, _, err := unstructured.NestedStringSlice(c.(map[string]any), "args")
			if err != nil || len(args) == 0 {
				t.Fatalf("%s has the arguments %v: %v", u.GetName(), args, err)
			}
			seen[args[0]] = true
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			out, err := exec.CommandContext(ctx, program, append(args, "--help")...).CombinedOutput() // unknown ones are refused first
			cancel()
			if err != nil || !strings.Contains(string(out), "keyfleet-connector "+args[0]) {
				t.Errorf("keyfleet-connector %v: %v\n%s", args, err, out)
			}
		}
	}
	if want := map[string]bool{"operator": true, "job": true, "webhook": true}; !maps.Equal(seen, want) {
		t.Errorf("the chart runs %v", seen)
	}
}
