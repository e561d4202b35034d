package helm

import (
	"context"
	"fmt"
	"log/slog"

	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/client-go/kubernetes"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// Workload looks at a Deployment ("Deployment") or a Job ("Job") that a release has
// made, and says why it is not ready, as Apply does of what it waits for; nil: it is
// not there.
func Workload(ctx context.Context, api kubernetes.Interface, kind, namespace, name string) (*wire.Workload, error) {
	l := &look{ctx: ctx, operation: &operation{
		Client: &Client{namespace: namespace, api: api, log: slog.New(slog.DiscardHandler)}, name: name,
	}}
	p := &product{Info: &resource.Info{Namespace: namespace, Name: name, Mapping: &meta.RESTMapping{GroupVersionKind: schema.GroupVersionKind{Kind: kind}}}}
	if err := l.warnings(); err != nil {
		return nil, err
	}
	err := l.workload(p)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking at the %s: %w", p, err)
	}
	out := &wire.Workload{State: wire.WorkloadReady, Message: l.waiting}
	switch {
	case l.job != nil:
		out.State, out.Message = wire.WorkloadFailed, "job failed: "+l.reason
		for _, c := range l.job.Status.Conditions {
			if c.Type == batch.JobFailed && c.Status == core.ConditionTrue && c.Message != "" {
				out.Message += ": " + c.Message
			}
		}
	case l.waiting != "":
		out.State = wire.WorkloadNotReady
	}
	l.order()
	for _, c := range l.causes {
		out.Causes = append(out.Causes, wire.Problem{Code: c.code, Layer: "kubernetes", Object: c.object, Message: c.message, Fix: c.fix})
	}
	return out, nil
}
