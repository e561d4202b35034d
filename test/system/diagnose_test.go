package system

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	admission "k8s.io/api/admissionregistration/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/test/stack"
)

// TestDiagnose: the command line asks, the server keeps the question, a manager looks
// into a real cluster with the rights that are shipped, and the first failure is named
// with what to run. Each step mends nothing but adds another mistake before the last.
func TestDiagnose(t *testing.T) {
	c := newCluster(t)
	identityID, clientID, _ := c.identity(c.group, "web")
	c.vault(c.group, "clustervault")
	body := map[string]any{
		"targetService": map[string]any{"type": "AzureResource", "id": c.group + "/providers/Microsoft.KeyVault/vaults/clustervault"},
		"authInfo":      map[string]any{"authType": "userAssignedIdentity", "identity": identityID}, "clientType": "python", "scope": "shop",
	}
	if err := c.create(t, "kv", body); err != nil {
		t.Fatal(err)
	}
	c.hook(t)
	out := c.keyfleet(t, 0, "connection", "diagnose", "kv", "--cluster", "prod")
	for _, want := range []string{"success  Registration", "success  Cluster", "success  Manager", "success  Namespace sc-system", "success  Operator", "success  Desired state", "success  Secret", "success  ServiceAccount", "success  Connection"} {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), strings.Join(strings.Fields(want), " ")) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	c.keyfleet(t, 0, "connection", "diagnose", "--cluster", "prod")

	c.sampleJob(t, "sc-account-"+clientID)
	c.diagnosed(t, "kv", "LabelMisplaced", "Job shop/sc-sample-job", `put azure.workload.identity/use: "true" under spec.template.metadata.labels`)

	body["scope"] = "absent"
	if err := c.create(t, "far", body); err == nil || !strings.Contains(err.Error(), "NamespaceNotFound") {
		t.Errorf("a connection to a namespace that is not there: %v", err)
	}
	c.diagnosed(t, "far", "NamespaceNotFound", "Namespace absent", "kubectl create namespace absent")

	if err := c.api.RbacV1().ClusterRoleBindings().Delete(c.ctx, "keyfleet-manager", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, time.Minute, "the permission is missing", func(context.Context) error {
		if f := c.first(t, "far", "PermissionMissing"); f == nil || !strings.Contains(f.Message, "list nodes") || f.Fix != "kubectl apply -f deploy/manager-role.yaml" {
			return errors.New("it is not said")
		}
		return nil
	})

	c.kube.Stop()
	c.becomes(t, "Failed", "connection refused")
	c.diagnosed(t, "kv", "ClusterNotReady", "connection refused", "keyfleet cluster show prod")
}

// diagnosed fails the test unless the first failure is of a code and says this.
func (c *connected) diagnosed(t *testing.T, name, code string, parts ...string) {
	t.Helper()
	out := c.keyfleet(t, 1, "connection", "diagnose", name, "--cluster", "prod")
	_, explained, found := strings.Cut(out, "Mend this first")
	for _, part := range append(parts, code) {
		if !found || !strings.Contains(explained, part) {
			t.Errorf("the first failure does not say %q:\n%s", part, out)
		}
	}
	t.Log(out)
}

// first is the first finding of a code; nil: there is none.
func (c *connected) first(t *testing.T, name, code string) *kubernetes.Finding {
	t.Helper()
	out := c.keyfleet(t, 1, "connection", "diagnose", name, "--cluster", "prod", "-o", "json")
	var op struct{ Properties kubernetes.Diagnosis }
	if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &op); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, f := range op.Properties.Findings {
		if f.Code == code {
			return &f
		}
	}
	return nil
}

// hook makes what is seen of a webhook of workload identity.
func (c *connected) hook(t *testing.T) {
	t.Helper()
	none := admission.SideEffectClassNone
	_, err := c.api.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(c.ctx, &admission.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "sc-webhook"}, Webhooks: []admission.MutatingWebhook{{
			Name: "mutation.azure-workload-identity.io", AdmissionReviewVersions: []string{"v1"}, SideEffects: &none,
			ClientConfig:   admission.WebhookClientConfig{Service: &admission.ServiceReference{Namespace: "sc-system", Name: "sc-webhook"}},
			ObjectSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"azure.workload.identity/use": "true"}},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// sampleJob makes the Job of the documentation, as it is written there.
func (c *connected) sampleJob(t *testing.T, account string) {
	t.Helper()
	_, err := c.api.BatchV1().Jobs("shop").Create(c.ctx, &batch.Job{
		ObjectMeta: metav1.ObjectMeta{Name: "sc-sample-job", Labels: map[string]string{"azure.workload.identity/use": "true"}},
		Spec: batch.JobSpec{Template: core.PodTemplateSpec{Spec: core.PodSpec{
			ServiceAccountName: account, RestartPolicy: core.RestartPolicyOnFailure,
			Containers: []core.Container{{
				Name: "raw-linux", Image: "alpine", Command: []string{"printenv"},
				EnvFrom: []core.EnvFromSource{{SecretRef: &core.SecretEnvSource{LocalObjectReference: core.LocalObjectReference{Name: "sc-kv-secret"}}}},
			}},
		}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}
