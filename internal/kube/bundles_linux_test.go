package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// fill puts values, as JSON, into the places of a text that are marked by $.
func fill(t *testing.T, text string, values ...any) []byte {
	t.Helper()
	for _, v := range values {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		text = strings.Replace(text, "$", string(b), 1)
	}
	return []byte(text)
}

const hook = `{"name": $, "sideEffects": "None", "admissionReviewVersions": ["v1"], "failurePolicy": "Ignore",
	"rules": [{"apiGroups": ["none.example.com"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["nothings"]}],
	"clientConfig": {"service": {"namespace": "default", "name": "hook"}, "caBundle": $}}`

func bundles(t *testing.T, a *api) {
	old, other := kubetest.NewCA(t, "cluster").PEM(), kubetest.NewCA(t, "vendor").PEM()
	create(t, a, "ValidatingWebhookConfiguration", `{"metadata": {"name": "v"}, "webhooks": [`+hook+`,`+hook+`]}`, "a.example.com", other, "b.example.com", old)
	create(t, a, "ValidatingWebhookConfiguration", `{"metadata": {"name": "none"}, "webhooks": [`+hook+`]}`, "a.example.com", nil)
	create(t, a, "MutatingWebhookConfiguration", `{"metadata": {"name": "m"}, "webhooks": [`+hook+`]}`, "a.example.com", old)
	create(t, a, "APIService", `{"metadata": {"name": "v1.down.example.com"}, "spec": {"group": "down.example.com", "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 100,
		"service": {"namespace": "default", "name": "down"}, "caBundle": $}}`, old)
	create(t, a, "CustomResourceDefinition", `{"metadata": {"name": "things.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
		"names": {"plural": "things", "kind": "Thing"},
		"conversion": {"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": {"service": {"namespace": "default", "name": "hook"}, "caBundle": $}}},
		"versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object"}}}]}}`, old)

	both := append(append([]byte{}, old...), kubetest.NewCA(t, "new").PEM()...)
	want := map[string]string{
		"ValidatingWebhookConfiguration v 0": string(other), "ValidatingWebhookConfiguration v 1": string(old),
		"MutatingWebhookConfiguration m 0": string(old), "APIService v1.down.example.com 0": string(old), "CustomResourceDefinition things.example.com 0": string(old),
	}
	for _, b := range listed(t, a, want) {
		if string(b.PEM) == string(other) {
			continue
		}
		b.PEM = both
		for range 2 { // the second time nothing is to be done
			if err := a.PutCABundle(t.Context(), b); err != nil {
				t.Errorf("%s %s: %v", b.Kind, b.Name, err)
			}
		}
		want[fmt.Sprint(b.Kind, " ", b.Name, " ", b.Index)] = string(both)
	}
	listed(t, a, want)
	notOurs(t, a, both)
	race(t, a, both)
}

// listed compares what CABundles returns.
func listed(t *testing.T, a *api, want map[string]string) []rotation.CABundle {
	t.Helper()
	all, err := a.CABundles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, b := range all {
		got[fmt.Sprint(b.Kind, " ", b.Name, " ", b.Index)] = string(b.PEM)
	}
	if len(all) != len(want) {
		t.Errorf("%d CA bundles, want %d", len(all), len(want))
	}
	for key, pem := range want {
		if got[key] != pem {
			t.Errorf("%s is not as it should be", key)
		}
	}
	return all
}

// notOurs: a bundle is only replaced by one that goes on from it.
func notOurs(t *testing.T, a *api, pem []byte) {
	for name, test := range map[string]struct {
		b    rotation.CABundle
		kind fault.Kind
	}{
		"a webhook that has changed places": {rotation.CABundle{Kind: "ValidatingWebhookConfiguration", Name: "v", PEM: pem}, fault.Conflict},
		"a webhook that is gone":            {rotation.CABundle{Kind: "ValidatingWebhookConfiguration", Name: "v", Index: 2, PEM: pem}, fault.Conflict},
		"a webhook without a bundle":        {rotation.CABundle{Kind: "ValidatingWebhookConfiguration", Name: "none", PEM: pem}, fault.Conflict},
		"an object that is gone":            {rotation.CABundle{Kind: "APIService", Name: "v1.none.example.com", PEM: pem}, fault.NotFound},
		"no certificate":                    {rotation.CABundle{Kind: "APIService", Name: "v1.down.example.com"}, fault.Invalid},
		"another kind":                      {rotation.CABundle{Kind: "Pod", Name: "v1.down.example.com", PEM: pem}, fault.Invalid},
	} {
		if err := a.PutCABundle(t.Context(), test.b); !errors.Is(err, test.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// race: an object that was changed since it was read is not overwritten.
func race(t *testing.T, a *api, pem []byte) {
	p := places()[1]
	object, err := a.dynamic.Resource(p.resource).Get(t.Context(), "m", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	was := object.GetResourceVersion()
	if err := unstructured.SetNestedField(object.Object, "x", "metadata", "annotations", "changed"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.dynamic.Resource(p.resource).Update(t.Context(), object, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	err = a.patchBundle(t.Context(), p, "m", 0, was, kubetest.NewCA(t, "newest").PEM())
	if err = a.explain(t.Context(), "changing", err); !errors.Is(err, fault.Conflict) {
		t.Errorf("a patch for another version: %v", err)
	}
	for _, b := range mustList(t, a) {
		if b.Name == "m" && !strings.Contains(string(b.PEM), string(pem)) {
			t.Error("it was overwritten")
		}
	}
}

func mustList(t *testing.T, a *api) []rotation.CABundle {
	t.Helper()
	all, err := a.CABundles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}
