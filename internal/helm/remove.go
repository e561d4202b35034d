package helm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/kube"
	"helm.sh/helm/v4/pkg/release/common"
	v1 "helm.sh/helm/v4/pkg/release/v1"
	"helm.sh/helm/v4/pkg/storage/driver"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/resource"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Remove uninstalls a release, and returns when all that it made is gone: objects,
// their pods, hook jobs that failed, records. The namespace stays. It does nothing if
// there is no release.
func (c *Client) Remove(ctx context.Context, name string, timeout time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	o, err := c.begin(ctx, name, timeout)
	if err != nil {
		return err
	}
	defer o.end()
	last, err := o.last()
	if err != nil || last == nil {
		return err
	}
	if last.Info.Status.IsPending() {
		if err := o.takeOver(last, time.Now()); err != nil {
			return err
		}
	}
	return o.remove()
}

// remove removes what any revision made. Helm alone would delete what the last one
// has, leave hook jobs, count an object that it may not read as gone, and forget the
// release before the objects are gone.
func (o *operation) remove() error {
	all, err := o.history()
	if err != nil || len(all) == 0 {
		return err
	}
	made, err := o.made(all)
	if err != nil {
		return err
	}
	if made, err = o.present(made); err != nil { // before anything is deleted: all has to be seen
		return err
	}
	if all[len(all)-1].Info.Status != common.StatusUninstalled {
		un := action.NewUninstall(o.cfg)
		un.KeepHistory, un.DeletionPropagation, un.Timeout = true, "foreground", o.limit
		un.WaitStrategy, un.WaitOptions = kube.HookOnlyStrategy, []kube.WaitOption{kube.WithWaitContext(o.ctx)}
		if _, err := un.Run(o.name); err != nil {
			return o.explain("uninstalling it", err)
		}
	}
	if err := o.deleteRest(made); err != nil {
		return err
	}
	for _, r := range all {
		if _, err := o.cfg.Releases.Delete(r.Name, r.Version); err != nil && !errors.Is(err, driver.ErrReleaseNotFound) {
			return o.explain("deleting the records", err)
		}
	}
	return nil
}

// product is an object that a release made.
type product struct {
	*resource.Info
	hook bool      // it carries no mark of the release
	uid  types.UID // when it was first seen; another one of the same name is another object
}

func (p *product) String() string {
	kind := p.Mapping.GroupVersionKind.Kind
	if p.Namespace == "" {
		return kind + " " + p.Name
	}
	return kind + " " + p.Namespace + "/" + p.Name
}

// made lists what the revisions of a release may have made.
func (o *operation) made(all []*v1.Release) ([]*product, error) {
	var out []*product
	known := map[string]bool{}
	add := func(manifest string, hook bool) error {
		infos, err := o.build(manifest)
		if err != nil {
			return o.explain("reading what it made", err)
		}
		for _, info := range infos {
			p := &product{Info: info, hook: hook}
			if !known[p.String()] {
				known[p.String()] = true
				out = append(out, p)
			}
		}
		return nil
	}
	for _, r := range all {
		if strings.TrimSpace(r.Manifest) != "" {
			if err := add(r.Manifest, false); err != nil {
				return nil, err
			}
		}
		for _, h := range r.Hooks {
			if !h.LastRun.StartedAt.IsZero() && h.Kind != "CustomResourceDefinition" {
				if err := add(h.Manifest, true); err != nil {
					return nil, err
				}
			}
		}
	}
	return out, nil
}

// present returns those of the objects that are there and are the release's.
func (o *operation) present(made []*product) ([]*product, error) {
	var left []*product
	for _, p := range made {
		err := p.Get()
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, o.explain("looking for the "+p.String(), err)
		}
		m, err := meta.Accessor(p.Object)
		if err != nil {
			return nil, fmt.Errorf("reading the %s: %w", p, err)
		}
		if p.uid == "" {
			p.uid = m.GetUID()
		}
		if p.uid == m.GetUID() && (p.hook || o.owns(m)) {
			left = append(left, p)
		}
	}
	return left, nil
}

// owns reports whether an object has Helm's marks of this release, and shall go with it.
func (o *operation) owns(m metav1.Object) bool {
	a := m.GetAnnotations()
	return m.GetLabels()["app.kubernetes.io/managed-by"] == "Helm" && a["meta.helm.sh/release-name"] == o.name &&
		a["meta.helm.sh/release-namespace"] == o.namespace && a["helm.sh/resource-policy"] != "keep"
}

// deleteRest deletes what is left, and waits until it is gone.
func (o *operation) deleteRest(made []*product) error {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		left, err := o.present(made)
		if err != nil || len(left) == 0 {
			return err
		}
		for _, p := range left {
			if err := o.delete(p); err != nil {
				return err
			}
		}
		select {
		case <-o.ctx.Done():
			return o.lingering(left)
		case <-time.After(pause):
		}
	}
}

func (o *operation) delete(p *product) error {
	m, err := meta.Accessor(p.Object)
	if err != nil || m.GetDeletionTimestamp() != nil {
		return err
	}
	foreground := metav1.DeletePropagationForeground
	_, err = resource.NewHelper(p.Client, p.Mapping).DeleteWithOptions(p.Namespace, p.Name, &metav1.DeleteOptions{
		PropagationPolicy: &foreground, Preconditions: &metav1.Preconditions{UID: &p.uid},
	})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return o.explain("deleting the "+p.String(), err)
	}
	return nil
}

// lingering is the error for objects that do not go.
func (o *operation) lingering(left []*product) error {
	if cause := context.Cause(o.caller); cause != nil {
		return fmt.Errorf("removing the %s: %w", o.target(), cause)
	}
	var all []string
	for _, p := range left {
		all = append(all, p.String())
	}
	first := left[0]
	f := fault.New(fault.Timeout, "TimedOutWaitingForReadiness", "Timed out waiting for resource readiness: after %s still there: %s.", o.limit, short(strings.Join(all, ", "))).At(first.String())
	if m, err := meta.Accessor(first.Object); err == nil && len(m.GetFinalizers()) > 0 {
		f = f.WithDetail("Finalizers", "The %s waits for %s.", first, strings.Join(m.GetFinalizers(), ", "))
	}
	in := ""
	if first.Namespace != "" {
		in = " -n " + first.Namespace
	}
	return f.WithFix("see what holds it and remove again: kubectl get %s %s%s -o yaml", strings.ToLower(first.Mapping.GroupVersionKind.Kind), first.Name, in)
}
