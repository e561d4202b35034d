package helm

import (
	"strings"
	"testing"

	batch "k8s.io/api/batch/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// TestWorkload: what is seen of a Deployment and a Job, whatever made them.
func TestWorkload(t *testing.T) {
	b := newBed(t)
	b.namespace(t, "seen", nil)
	see := func(kind, name string) *wire.Workload {
		t.Helper()
		return must(Workload(t.Context(), b.api, kind, "seen", name))(t)
	}
	if w := see("Deployment", "d"); w != nil {
		t.Errorf("one that is not there is %+v", w)
	}
	for _, text := range []string{deployment("d"), job("j")} {
		for _, u := range decode(t, strings.NewReader(text)) {
			u.SetNamespace("seen")
			if err := b.put(t.Context(), u, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	becomes := func(kind, name, fate, state, code string, parts ...string) {
		t.Helper()
		b.fate("seen", name, fate)
		var w *wire.Workload
		eventually(t, kind+" is "+state+" by "+code, func() bool {
			w = see(kind, name)
			return w != nil && w.State == state && (code == "" || len(w.Causes) > 0 && w.Causes[0].Code == code)
		})
		for _, part := range parts {
			text := w.Message
			for _, c := range w.Causes {
				text += "\n" + c.Message + "\n" + c.Fix
			}
			if !strings.Contains(text, part) {
				t.Errorf("%s does not say %q: %+v", kind, part, w)
			}
		}
	}
	becomes("Deployment", "d", "pull", wire.WorkloadNotReady, "ImagePullFailed", "0 of 1 pods ready", pullText)
	becomes("Deployment", "d", "taint", wire.WorkloadNotReady, "OnlyCriticalAddonsNodes", "kubectl taint nodes")
	becomes("Deployment", "d", "ready", wire.WorkloadReady, "")
	becomes("Job", "j", "taint", wire.WorkloadNotReady, "OnlyCriticalAddonsNodes", "has not ended")
	becomes("Job", "j", "failed", wire.WorkloadFailed, "ContainerFailed", "BackoffLimitExceeded", "kubectl -n seen logs")

	background := metav1.DeletePropagationBackground
	if err := b.api.BatchV1().Jobs("seen").Delete(t.Context(), "j", metav1.DeleteOptions{PropagationPolicy: &background}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the job is gone", func() bool { return see("Job", "j") == nil })
	for _, u := range decode(t, strings.NewReader(strings.Replace(job("j"), "name: j", "name: k", 1))) {
		u.SetNamespace("seen")
		b.fate("seen", "j", "done")
		if err := b.put(t.Context(), u, nil); err != nil {
			t.Fatal(err)
		}
	}
	becomes("Job", "k", "", wire.WorkloadReady, "")
	if pods := must(b.api.CoreV1().Pods("seen").List(t.Context(), metav1.ListOptions{LabelSelector: batch.JobNameLabel + "=k"}))(t); len(pods.Items) != 1 {
		t.Errorf("the job has %d pods", len(pods.Items))
	}
}
