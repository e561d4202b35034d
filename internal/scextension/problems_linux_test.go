package scextension

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// TestProblems has a real API server refuse what a connection wants, in every way
// that it can, and reads what the connection then says.
func TestProblems(t *testing.T) {
	b := newBed(t)
	cases := []struct {
		name    string
		prepare func(t *testing.T, d *wire.Desired)
		as      string // who does it; empty: the operator
		code    string
		parts   []string
		made    bool // the rest of the connection is there nevertheless
	}{
		{name: "absent", code: "NamespaceNotFound", parts: []string{"kubectl create namespace absent", `namespaces "absent" not found`}},
		{name: "terminating", code: "NamespaceTerminating", parts: []string{"terminating", "is being deleted"}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace) // without a controller it never ends to terminate
			if err := b.api.CoreV1().Namespaces().Delete(t.Context(), d.Namespace, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "quota", code: "QuotaExceeded", parts: []string{"describe resourcequota few", "exceeded quota: few"}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
			none := core.ResourceList{"count/secrets": resource.MustParse("0")}
			q := must(b.api.CoreV1().ResourceQuotas(d.Namespace).Create(t.Context(), &core.ResourceQuota{
				ObjectMeta: metav1.ObjectMeta{Name: "few"}, Spec: core.ResourceQuotaSpec{Hard: none},
			}, metav1.CreateOptions{}))(t)
			q.Status = core.ResourceQuotaStatus{Hard: none, Used: none}
			must(b.api.CoreV1().ResourceQuotas(d.Namespace).UpdateStatus(t.Context(), q, metav1.UpdateOptions{}))(t)
		}},
		{name: "policy", code: "AdmissionRefused", parts: []string{"ValidatingAdmissionPolicy 'talks'", "refused: ***"}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
			d.Secret.Data = map[string]string{"K": "canary-value"}
			b.policy(t, d.Namespace)
		}},
		{name: "nohook", code: "AdmissionUnavailable", parts: []string{`"down.example.com"`}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
			b.brokenHook(t, d.Namespace)
		}},
		{name: "weak", as: "weak", code: "PermissionMissing", parts: []string{"You do not have permission to perform get on secrets", "kubectl auth can-i get secrets -n weak --as=weak"}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
		}},
		{name: "addon", code: "AddonNotInstalled", parts: []string{"azureKeyvaultSecretsProvider", "secretproviderclasses.secrets-store.csi.x-k8s.io"}, made: true, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
			d.ProviderClass = &wire.ProviderObject{Name: "class", Spec: []byte(`{"provider":"azure"}`)}
		}},
		{name: "large", code: "ObjectTooLarge", parts: []string{"1 MiB", "Too long"}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
			d.Secret.Data = map[string]string{"K": strings.Repeat("canary-large", 100_000)}
		}},
		{name: "invalid", code: "ObjectInvalid", parts: []string{"K K"}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
			d.Secret.Data = map[string]string{"K K": "canary-value"}
		}},
		{name: "name", code: "ObjectInvalid", parts: []string{"Upper"}, prepare: func(t *testing.T, d *wire.Desired) {
			b.namespace(t, d.Namespace)
			d.Secret.Name = "Upper"
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			d := linker(c.name, c.name, map[string]string{"K": "v"})
			if c.prepare != nil {
				c.prepare(t, &d)
			}
			a := applier{cluster: b.cluster, view: &survey{}, now: time.Now}
			if c.as != "" {
				a.cluster = b.as(t, c.as)
			}
			r := round{applier: &a, key: Key(d.ID), desired: d}
			v, err := r.run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			p := v.applied.Problem
			says(t, p, c.code, c.parts...)
			text := fmt.Sprint(*p)
			if strings.Contains(text, "canary") || strings.Contains(text, base64.StdEncoding.EncodeToString([]byte("canary-value"))) {
				t.Errorf("a value is shown: %.2000s", text)
			}
			if made := len(v.applied.Objects) > 0; made != c.made {
				t.Errorf("made: %+v", v.applied.Objects)
			}
		})
	}
	t.Run("the API server is away", func(t *testing.T) {
		b.Stop()
		_, err := b.admin.api.CoreV1().Secrets("x").Get(t.Context(), "x", metav1.GetOptions{})
		says(t, explain(err, object{secretKind, "x", "x"}), "APIServerUnreachable", "Secret x/x")
	})
}

// policy refuses Secrets of a namespace and repeats what is in them.
func (b *bed) policy(t *testing.T, namespace string) {
	t.Helper()
	all := b.api.AdmissionregistrationV1()
	must(all.ValidatingAdmissionPolicies().Create(t.Context(), &admissionv1.ValidatingAdmissionPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "talks"},
		Spec: admissionv1.ValidatingAdmissionPolicySpec{
			MatchConstraints: &admissionv1.MatchResources{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{core.LabelMetadataName: namespace}}, ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: secretRule}}},
			Validations:      []admissionv1.Validation{{Expression: "false", MessageExpression: `"refused: " + string(object.data["K"])`}},
		},
	}, metav1.CreateOptions{}))(t)
	must(all.ValidatingAdmissionPolicyBindings().Create(t.Context(), &admissionv1.ValidatingAdmissionPolicyBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "talks"},
		Spec:       admissionv1.ValidatingAdmissionPolicyBindingSpec{PolicyName: "talks", ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny}},
	}, metav1.CreateOptions{}))(t)
	b.refuses(t, namespace)
}

// brokenHook has the API server ask a webhook that is not there.
func (b *bed) brokenHook(t *testing.T, namespace string) {
	t.Helper()
	url, none := "https://127.0.0.1:1/", admissionv1.SideEffectClassNone
	must(b.api.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(t.Context(), &admissionv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "down"},
		Webhooks: []admissionv1.ValidatingWebhook{{
			Name: "down.example.com", ClientConfig: admissionv1.WebhookClientConfig{URL: &url}, SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
			Rules: []admissionv1.RuleWithOperations{secretRule}, NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{core.LabelMetadataName: namespace}},
		}},
	}, metav1.CreateOptions{}))(t)
	b.refuses(t, namespace)
}

var secretRule = admissionv1.RuleWithOperations{
	Operations: []admissionv1.OperationType{admissionv1.Create},
	Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"secrets"}},
}

// refuses waits until the API server refuses Secrets in a namespace.
func (b *bed) refuses(t *testing.T, namespace string) {
	t.Helper()
	probe := &core.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "probe-"}, StringData: map[string]string{"K": "k"}}
	eventually(t, "Secrets are refused in "+namespace, func() bool {
		_, err := b.api.CoreV1().Secrets(namespace).Create(t.Context(), probe, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err != nil
	})
}

// TestAnswersThatAreNone has something else than an API server answer.
func TestAnswersThatAreNone(t *testing.T) {
	for code, status := range map[string]int{
		"APIServerBusy": http.StatusTooManyRequests, "LoginRefused": http.StatusUnauthorized, "ObjectTooLarge": http.StatusRequestEntityTooLarge,
		"RequestRefused": http.StatusForbidden, "KubernetesError": http.StatusTeapot,
	} {
		answer := func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("no JSON"))}, nil
		}
		c := must(openCluster(&rest.Config{Host: "http://localhost", Transport: roundTrip(answer)}))(t)
		_, err := c.api.CoreV1().Secrets("x").Get(context.Background(), "x", metav1.GetOptions{})
		says(t, explain(err, object{secretKind, "x", "x"}), code, "Secret x/x")
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
