package kube

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// place is a kind of object that names the CA of something an API server calls.
// They are read and patched as plain JSON, so that no field that this version of
// client-go does not know is lost.
type place struct {
	kind     string
	resource schema.GroupVersionResource
	field    []string // of the object; of each of its webhooks if it has any
	webhooks bool
}

func places() []place {
	hooks, config := schema.GroupVersion{Group: "admissionregistration.k8s.io", Version: "v1"}, []string{"clientConfig", "caBundle"}
	return []place{
		{"ValidatingWebhookConfiguration", hooks.WithResource("validatingwebhookconfigurations"), config, true},
		{"MutatingWebhookConfiguration", hooks.WithResource("mutatingwebhookconfigurations"), config, true},
		{"APIService", schema.GroupVersionResource{Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"}, []string{"spec", "caBundle"}, false},
		{
			"CustomResourceDefinition",
			schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
			[]string{"spec", "conversion", "webhook", "clientConfig", "caBundle"},
			false,
		},
	}
}

// bundles returns the bundle of each webhook, or the one of the object; nil where there is none.
func (p place) bundles(object map[string]any) ([][]byte, error) {
	owners := []any{object}
	if p.webhooks {
		owners, _, _ = unstructured.NestedSlice(object, "webhooks")
	}
	var out [][]byte
	for _, o := range owners {
		fields, _ := o.(map[string]any)
		text, _, _ := unstructured.NestedString(fields, p.field...)
		bundle, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, fmt.Errorf("decoding a CA bundle: %w", err)
		}
		out = append(out, bundle)
	}
	return out, nil
}

// pointer is the JSON pointer of a bundle.
func (p place) pointer(index int) string {
	field := "/" + strings.Join(p.field, "/")
	if p.webhooks {
		field = fmt.Sprintf("/webhooks/%d%s", index, field)
	}
	return field
}

// CABundles implements rotation.API.
func (a *api) CABundles(ctx context.Context) ([]rotation.CABundle, error) {
	var out []rotation.CABundle
	for _, p := range places() {
		found, err := ask(ctx, a, "listing the CA bundles of "+p.resource.Resource, func(ctx context.Context) ([]rotation.CABundle, error) {
			return a.bundlesOf(ctx, p)
		})
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

func (a *api) bundlesOf(ctx context.Context, p place) ([]rotation.CABundle, error) {
	objects, err := list(ctx, metav1.ListOptions{}, a.dynamic.Resource(p.resource).List, func(l *unstructured.UnstructuredList) []unstructured.Unstructured { return l.Items })
	if err != nil {
		return nil, err
	}
	var out []rotation.CABundle
	for i := range objects {
		bundles, err := p.bundles(objects[i].Object)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", objects[i].GetName(), err)
		}
		for index, b := range bundles {
			if len(b) > 0 {
				out = append(out, rotation.CABundle{Kind: p.kind, Name: objects[i].GetName(), Index: index, PEM: b})
			}
		}
	}
	return out, nil
}

// PutCABundle implements rotation.API. The bundle that is there now must have a
// certificate in common with the new one, else it is a fault.Conflict: the
// webhooks were put into another order, and this is somebody else's.
func (a *api) PutCABundle(ctx context.Context, b rotation.CABundle) error {
	for _, p := range places() {
		if p.kind != b.Kind {
			continue
		}
		if len(certificates(b.PEM)) == 0 {
			return fault.New(fault.Invalid, "", "The new CA bundle of %s %s has no certificate.", b.Kind, b.Name)
		}
		verb := "changing the CA bundle of " + b.Kind + " " + b.Name
		for try := 1; ; try++ {
			_, err := ask(ctx, a, verb, func(ctx context.Context) (struct{}, error) { return struct{}{}, a.replace(ctx, p, b) })
			if err == nil || try == races || !apierrors.IsConflict(err) {
				return err
			}
		}
	}
	return fault.New(fault.Invalid, "", "%q is not a kind of object with a CA bundle.", b.Kind)
}

// replace reads the object and puts the bundle into it, if it is still as it was read.
func (a *api) replace(ctx context.Context, p place, b rotation.CABundle) error {
	object, err := a.dynamic.Resource(p.resource).Get(ctx, b.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	bundles, err := p.bundles(object.Object)
	if err != nil {
		return err
	}
	if b.Index < 0 || b.Index >= len(bundles) || !overlap(bundles[b.Index], b.PEM) {
		return fault.New(fault.Conflict, "", "%s %s has another CA bundle at %d than was read.", b.Kind, b.Name, b.Index).WithFix("read the CA bundles again")
	}
	if bytes.Equal(bundles[b.Index], b.PEM) {
		return nil
	}
	return a.patchBundle(ctx, p, b.Name, b.Index, object.GetResourceVersion(), b.PEM)
}

// patchBundle changes one bundle of the version that was read: with the resource
// version in it, the server applies the patch to that version or not at all.
func (a *api) patchBundle(ctx context.Context, p place, name string, index int, version string, bundle []byte) error {
	patch, err := json.Marshal([]map[string]any{
		{"op": "replace", "path": "/metadata/resourceVersion", "value": version},
		{"op": "replace", "path": p.pointer(index), "value": bundle},
	})
	if err != nil {
		return err
	}
	_, err = a.dynamic.Resource(p.resource).Patch(ctx, name, types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: manager})
	return err
}

// certificates is the set of the certificates in a PEM text, in DER.
func certificates(text []byte) map[string]bool {
	set := map[string]bool{}
	for b, rest := pem.Decode(text); b != nil; b, rest = pem.Decode(rest) {
		if b.Type == "CERTIFICATE" {
			set[string(b.Bytes)] = true
		}
	}
	return set
}

func overlap(a, b []byte) bool {
	other := certificates(b)
	for c := range certificates(a) {
		if other[c] {
			return true
		}
	}
	return false
}
