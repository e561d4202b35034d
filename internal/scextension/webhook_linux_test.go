package scextension

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	admission "k8s.io/api/admission/v1"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/pki"
)

// webhookRules is what the webhook may do.
var webhookRules = []rbac.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"serviceaccounts"}, Verbs: []string{"get"}},
	{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{webhookTLS}, Verbs: []string{"get", "update"}}, // in sc-system
	{APIGroups: []string{"admissionregistration.k8s.io"}, Resources: []string{"mutatingwebhookconfigurations"}, ResourceNames: []string{webhookName}, Verbs: []string{"get", "update"}},
}

// TestWebhook has the real API server ask the webhook.
func TestWebhook(t *testing.T) {
	b := newBed(t)
	role := &rbac.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "sc-webhook"}, Rules: webhookRules}
	must(b.api.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}))(t)
	must(b.api.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbac.ClusterRoleBinding{
		ObjectMeta: role.ObjectMeta, RoleRef: rbac.RoleRef{Kind: "ClusterRole", Name: role.Name}, Subjects: []rbac.Subject{{Kind: "User", Name: "hook"}},
	}, metav1.CreateOptions{}))(t)
	address := net.JoinHostPort("127.0.0.1", kubetest.Free(t))
	b.hook(t, "https://"+address+webhookPath)
	empty := &core.Secret{ObjectMeta: metav1.ObjectMeta{Name: webhookTLS}, Type: core.SecretTypeOpaque} // as the chart makes it
	must(b.api.CoreV1().Secrets(Namespace).Create(t.Context(), empty, metav1.CreateOptions{}))(t)

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	w := &Webhook{Cluster: b.as(t, "hook"), Listen: address, Tenant: "tenant", Authority: "https://login.example/", Hosts: []string{"127.0.0.1"}, Log: slog.New(slog.NewJSONHandler(output{}, nil))}
	go func() { done <- w.Run(ctx) }()
	end := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	defer end()
	b.namespace(t, "pods")
	for name, annotations := range map[string]map[string]string{"default": nil, "app": {identityClient: "client"}, "wrong": {identityLifetime: "5"}} {
		must(b.api.CoreV1().ServiceAccounts("pods").Create(t.Context(), &core.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}, metav1.CreateOptions{}))(t)
	}
	create := func(account string, change func(*core.Pod)) (*core.Pod, error) {
		pod := onePod(func(p *core.Pod) {
			p.Name, p.GenerateName, p.Labels = "", "pod-", map[string]string{identityLabel: "true"}
			p.Spec.ServiceAccountName, p.Spec.Containers[0].Image = account, "none"
		})
		if change != nil {
			change(pod)
		}
		return b.api.CoreV1().Pods("pods").Create(t.Context(), pod, metav1.CreateOptions{})
	}
	var pod *core.Pod
	eventually(t, "the API server reaches the webhook", func() (ok bool) {
		var err error
		pod, err = create("app", nil)
		return err == nil
	})
	text := pod.String()
	for _, part := range []string{"AZURE_CLIENT_ID", "client", "AZURE_TENANT_ID", "tenant", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_AUTHORITY_HOST", "https://login.example/", tokenAudience} {
		if !strings.Contains(text, part) {
			t.Errorf("the pod has no %s: %s", part, text)
		}
	}
	if plain := must(create("app", func(p *core.Pod) { p.Labels = nil }))(t); strings.Contains(plain.String(), "AZURE_") {
		t.Error("a pod without the label was changed")
	}
	if _, err := create("wrong", nil); !apierrors.IsBadRequest(err) && !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "Expected value to be between 3600 and 86400") {
		t.Errorf("a lifetime that is not allowed: %v", err)
	}
	// An account that is not there is refused before by the API server's own admission,
	// so it is asked of the webhook itself.
	if got := w.review(t.Context(), reviewOf(t, onePod(func(p *core.Pod) {
		p.Labels, p.Spec.ServiceAccountName = map[string]string{identityLabel: "true"}, "none"
	}))); got.Allowed || got.Result.Code != 400 || !strings.Contains(got.Result.Message, `"none"`) {
		t.Errorf("an account that is not there: %+v", got)
	}
	end()
	b.renewal(t)
}

// hook registers the webhook as the chart does, but for its address.
func (b *bed) hook(t *testing.T, url string) {
	t.Helper()
	none, fail, again := admissionv1.SideEffectClassNone, admissionv1.Fail, admissionv1.IfNeededReinvocationPolicy
	must(b.api.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(t.Context(), &admissionv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: webhookName},
		Webhooks: []admissionv1.MutatingWebhook{{
			Name: "mutation.azure-workload-identity.io", ClientConfig: admissionv1.WebhookClientConfig{URL: &url}, SideEffects: &none, FailurePolicy: &fail, ReinvocationPolicy: &again,
			AdmissionReviewVersions: []string{"v1"}, ObjectSelector: &metav1.LabelSelector{MatchLabels: map[string]string{identityLabel: "true"}},
			Rules: []admissionv1.RuleWithOperations{{
				Operations: []admissionv1.OperationType{admissionv1.Create}, Rule: admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	}, metav1.CreateOptions{}))(t)
}

// renewal: the next certificate is trusted before it is shown, by all replicas.
func (b *bed) renewal(t *testing.T) {
	replica := func(now time.Time) *servingCertificate {
		return &servingCertificate{cluster: b.admin, namespace: Namespace, hosts: []string{"sc-webhook.sc-system.svc", "127.0.0.1"}, now: func() time.Time { return now }, log: slog.New(slog.DiscardHandler)}
	}
	bundle := func() []byte {
		c := must(b.api.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), webhookName, metav1.GetOptions{}))(t)
		return c.Webhooks[0].ClientConfig.CABundle
	}
	trusted := func(c *x509.Certificate, at time.Time) bool {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(bundle())
		_, err := c.Verify(x509.VerifyOptions{Roots: roots, DNSName: "sc-webhook.sc-system.svc", CurrentTime: at})
		return err == nil
	}
	b.discard(t, object{secretKind, Namespace, webhookTLS}) // a replica that may make it, makes it
	now := time.Now()
	one, two := replica(now), replica(now)
	for _, r := range []*servingCertificate{one, two} {
		if err := r.look(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	first := one.current.Load().Leaf
	if !bytes.Equal(first.Raw, two.current.Load().Leaf.Raw) || !trusted(first, now) {
		t.Error("the replicas do not share a certificate that is trusted")
	}
	later := now.Add(61 * 24 * time.Hour) // of 90 days
	one.now, two.now = func() time.Time { return later }, func() time.Time { return later }
	for _, r := range []*servingCertificate{one, two} {
		if err := r.look(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	second := one.current.Load().Leaf
	if bytes.Equal(first.Raw, second.Raw) || !bytes.Equal(second.Raw, two.current.Load().Leaf.Raw) {
		t.Error("the replicas did not go over to the same new certificate")
	}
	if !trusted(first, later) || !trusted(second, later) {
		t.Error("while replicas change over, one of the certificates is not trusted")
	}
	if all := must(pki.ParseChain(bundle()))(t); len(all) != 2 {
		t.Errorf("%d CAs are trusted", len(all))
	}
	before := must(b.api.CoreV1().Secrets(Namespace).Get(t.Context(), webhookTLS, metav1.GetOptions{}))(t).ResourceVersion
	if err := one.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := must(b.api.CoreV1().Secrets(Namespace).Get(t.Context(), webhookTLS, metav1.GetOptions{}))(t).ResourceVersion; after != before {
		t.Error("a certificate that is not due was renewed")
	}
}

func reviewOf(t *testing.T, pod *core.Pod) *admission.AdmissionRequest {
	t.Helper()
	return &admission.AdmissionRequest{Namespace: "pods", Object: runtime.RawExtension{Raw: must(json.Marshal(pod))(t)}}
}
