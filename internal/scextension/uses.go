package scextension

import (
	"context"
	"fmt"
	"slices"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// template is a workload that makes pods.
type template struct {
	self metav1.ObjectMeta
	pods core.PodTemplateSpec
}

// listing lists a page of the workloads of one kind, and says where the next one starts.
type listing func(context.Context, metav1.ListOptions) (page []template, next string, err error)

// consumers finds the workloads and Pods of the namespace that name the connection's
// Secret or ServiceAccount.
func (l looker) consumers(ctx context.Context, s *wire.Sight) error {
	if l.Namespace == "" {
		return nil
	}
	for _, w := range []struct {
		kind string
		list listing
	}{
		{"CronJob", l.cronJobs},
		{"Job", l.jobs},
		{"Deployment", l.deployments},
		{"StatefulSet", l.statefulSets},
		{"DaemonSet", l.daemonSets},
	} {
		if err := pages(func(o metav1.ListOptions) (string, error) {
			page, next, err := w.list(ctx, o)
			if err != nil {
				return "", fmt.Errorf("listing the %ss: %w", w.kind, err)
			}
			for _, t := range page {
				if owner := metav1.GetControllerOf(&t.self); w.kind == "Job" && owner != nil && owner.Kind == "CronJob" {
					continue // that one says it
				}
				l.note(s, use(w.kind, t.self, t.pods.Labels), t.pods.Spec)
			}
			return next, nil
		}); err != nil {
			return err
		}
	}
	return l.pods(ctx, s)
}

func (l looker) pods(ctx context.Context, s *wire.Sight) error {
	return pages(func(o metav1.ListOptions) (string, error) {
		page, err := l.api.CoreV1().Pods(l.Namespace).List(ctx, o)
		if err != nil {
			return "", fmt.Errorf("listing the Pods: %w", err)
		}
		for _, p := range page.Items {
			u := use("Pod", p.ObjectMeta, p.Labels)
			u.Owned, u.Token = metav1.GetControllerOf(&p) != nil, hasToken(p.Spec)
			ended := p.Status.Phase == core.PodSucceeded || p.Status.Phase == core.PodFailed
			if u.Owned && (ended || u.Token || !u.PodLabel) { // what it belongs to says it
				continue
			}
			l.note(s, u, p.Spec)
		}
		return page.Continue, nil
	})
}

func (l looker) cronJobs(ctx context.Context, o metav1.ListOptions) (out []template, next string, err error) {
	page, err := l.api.BatchV1().CronJobs(l.Namespace).List(ctx, o)
	if err != nil {
		return nil, "", err
	}
	for _, i := range page.Items {
		out = append(out, template{i.ObjectMeta, i.Spec.JobTemplate.Spec.Template})
	}
	return out, page.Continue, nil
}

func (l looker) jobs(ctx context.Context, o metav1.ListOptions) (out []template, next string, err error) {
	page, err := l.api.BatchV1().Jobs(l.Namespace).List(ctx, o)
	if err != nil {
		return nil, "", err
	}
	for _, i := range page.Items {
		out = append(out, template{i.ObjectMeta, i.Spec.Template})
	}
	return out, page.Continue, nil
}

func (l looker) deployments(ctx context.Context, o metav1.ListOptions) (out []template, next string, err error) {
	page, err := l.api.AppsV1().Deployments(l.Namespace).List(ctx, o)
	if err != nil {
		return nil, "", err
	}
	for _, i := range page.Items {
		out = append(out, template{i.ObjectMeta, i.Spec.Template})
	}
	return out, page.Continue, nil
}

func (l looker) statefulSets(ctx context.Context, o metav1.ListOptions) (out []template, next string, err error) {
	page, err := l.api.AppsV1().StatefulSets(l.Namespace).List(ctx, o)
	if err != nil {
		return nil, "", err
	}
	for _, i := range page.Items {
		out = append(out, template{i.ObjectMeta, i.Spec.Template})
	}
	return out, page.Continue, nil
}

func (l looker) daemonSets(ctx context.Context, o metav1.ListOptions) (out []template, next string, err error) {
	page, err := l.api.AppsV1().DaemonSets(l.Namespace).List(ctx, o)
	if err != nil {
		return nil, "", err
	}
	for _, i := range page.Items {
		out = append(out, template{i.ObjectMeta, i.Spec.Template})
	}
	return out, page.Continue, nil
}

// pages lists page after page; list returns where the next one starts.
func pages(list func(metav1.ListOptions) (next string, err error)) error {
	for next := ""; ; {
		var err error
		if next, err = list(metav1.ListOptions{Limit: pageSize, Continue: next}); err != nil || next == "" {
			return err
		}
	}
}

func use(kind string, self metav1.ObjectMeta, podLabels map[string]string) wire.Use {
	return wire.Use{
		Kind: kind, Namespace: self.Namespace, Name: self.Name, Label: kind != "Pod" && self.Labels[identityLabel] == "true", PodLabel: podLabels[identityLabel] == "true",
	}
}

// note adds a workload whose pods name the connection's Secret or ServiceAccount.
func (l looker) note(s *wire.Sight, u wire.Use, spec core.PodSpec) {
	u.Account, u.Secret = spec.ServiceAccountName, l.names(spec)
	switch {
	case !u.Secret && (l.ServiceAccount == "" || u.Account != l.ServiceAccount):
	case len(s.Consumers) < mostUses:
		s.Consumers = append(s.Consumers, u)
	default:
		s.MoreConsumers++
	}
}

// names reports whether a pod would read the connection's Secret.
func (l looker) names(spec core.PodSpec) bool {
	pod := &core.Pod{Spec: spec}
	volumes := volumesWith(pod, l.Secret)
	return len(volumes) > 0 || slices.ContainsFunc(containers(pod), func(c container) bool {
		once, _ := reads(c.spec, l.Secret, nil)
		return once
	})
}

// hasToken reports whether the webhook has been at a pod.
func hasToken(spec core.PodSpec) bool {
	return slices.ContainsFunc(spec.Containers, func(c core.Container) bool {
		return slices.ContainsFunc(c.Env, func(e core.EnvVar) bool { return e.Name == "AZURE_FEDERATED_TOKEN_FILE" })
	})
}
