package scextension

import (
	"context"
	"flag"
	"maps"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// TestAnyHistoryEndsAsDesired lets managers and people change desired states and
// objects in any order while an operator works. In the end there is what the desired
// states say, and nothing else that is ours.
func TestAnyHistoryEndsAsDesired(t *testing.T) {
	b := newBed(t)
	for _, namespace := range []string{"one", "two"} {
		b.namespace(t, namespace)
	}
	b.operate(t, "property")
	if err := flag.Set("rapid.checks", "25"); err != nil { // a fifth of it with -short
		t.Fatal(err)
	}
	histories, steps := 0, 0
	rapid.Check(t, func(r *rapid.T) {
		histories++
		desired := map[string]wire.Desired{}
		for range rapid.IntRange(1, 12).Draw(r, "steps") {
			steps++
			step(t, r, b, desired)
		}
		eventually(t, "all is as the desired states say", func() bool { return b.agrees(t, desired) })
		for _, d := range desired {
			b.cancel(t, d, wire.RemoveDelete)
		}
		eventually(t, "nothing is left", func() bool {
			return b.agrees(t, nil) && len(must(b.admin.desiredStates(t.Context()))(t)) == 0
		})
	})
	t.Logf("%d steps in %d histories", steps, histories)
}

// step is one thing that somebody does.
func step(t *testing.T, r *rapid.T, b *bed, desired map[string]wire.Desired) {
	name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(r, "connection")
	d, there := desired[name]
	switch what := rapid.SampledFrom([]string{"order", "order", "cancel", "edit", "discard", "freeze"}).Draw(r, "what"); {
	case what == "order" || !there:
		d = linker(name, rapid.SampledFrom([]string{"one", "two"}).Draw(r, "namespace"), rapid.MapOfN(rapid.SampledFrom([]string{"K", "L"}), rapid.StringN(0, 8, 20), 0, 2).Draw(r, "data"))
		d.Secret.Name = name + rapid.SampledFrom([]string{"-1", "-2"}).Draw(r, "secret")
		if account := rapid.SampledFrom([]string{"", "x", "y"}).Draw(r, "account"); account != "" {
			d.ServiceAccount = &wire.AccountObject{Name: account, Annotations: map[string]string{identityClient: account}}
		}
		d = revised(d)
		b.order(t, d)
		desired[name] = d
	case what == "cancel":
		b.cancel(t, d, wire.RemoveDelete)
		eventually(t, "it is gone", func() bool { return b.state(t, d) == nil }) // as the manager waits
		delete(desired, name)
	default:
		o := named(d)[rapid.IntRange(0, len(named(d))-1).Draw(r, "object")]
		if b.live(t, o) == nil {
			return // the operator has not made it yet
		}
		switch {
		case what == "discard":
			_ = b.admin.objects.Resource(o.kind.resource).Namespace(o.namespace).Delete(t.Context(), o.name, metav1.DeleteOptions{})
		case o.kind == accountKind:
			b.try(o, `{"metadata":{"annotations":{"azure.workload.identity/client-id":"edited"}}}`)
		case what == "freeze":
			b.try(o, `{"immutable":true,"stringData":{"K":"frozen"}}`)
		default:
			b.try(o, `{"stringData":{"K":"edited","M":"added"}}`)
		}
	}
}

// try edits an object that may be gone at the same moment.
func (b *bed) try(o object, patch string) {
	_, _ = b.admin.objects.Resource(o.kind.resource).Namespace(o.namespace).
		Patch(context.Background(), o.name, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "kubectl-edit"})
}

// agrees compares the objects of the cluster that are ours with the desired states.
func (b *bed) agrees(t *testing.T, desired map[string]wire.Desired) bool {
	t.Helper()
	want, have := map[string]string{}, map[string]string{}
	for _, d := range desired {
		want[secretOf(d).String()] = wire.SecretHash(d.Secret.Data)
		if d.ServiceAccount != nil {
			want[accountOf(d).String()] = d.ServiceAccount.Name
		}
		if a := b.applied(t, d); a.Revision != d.Revision || a.Problem != nil || len(a.Objects) != len(named(d)) {
			return false
		}
	}
	for _, s := range must(b.api.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{LabelSelector: ours}))(t).Items {
		data := map[string]string{}
		for name, value := range s.Data {
			data[name] = string(value)
		}
		have[object{secretKind, s.Namespace, s.Name}.String()] = wire.SecretHash(data)
	}
	for _, a := range must(b.api.CoreV1().ServiceAccounts("").List(t.Context(), metav1.ListOptions{LabelSelector: ours}))(t).Items {
		have[object{accountKind, a.Namespace, a.Name}.String()] = a.Annotations[identityClient]
	}
	return maps.Equal(want, have)
}
