package helm

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/kube"
	"helm.sh/helm/v4/pkg/release"
	v1 "helm.sh/helm/v4/pkg/release/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Request is what a release shall be.
type Request struct {
	Name    string // of the release
	Chart   *Chart
	Values  map[string]any // for the chart; they are stored in the cluster, so no secrets
	Timeout time.Duration  // for all of it; zero: 5 minutes
}

const (
	usualTime    = 5 * time.Minute
	historyLimit = 5 // records that are kept of a release
)

// Apply installs or upgrades a release, makes its namespace if it is not there, and
// waits until what was made is ready and the hook jobs have ended. When ctx ends, the
// release is marked as failed.
func (c *Client) Apply(ctx context.Context, r Request) (Release, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r.Timeout = cmp.Or(r.Timeout, usualTime)
	o, err := c.begin(ctx, r.Name, r.Timeout)
	if err != nil {
		return Release{}, err
	}
	defer o.end()
	if err := o.makeNamespace(); err != nil {
		return Release{}, err
	}
	last, err := o.settle()
	if err != nil {
		return Release{}, err
	}
	chart, err := r.Chart.load()
	if err != nil {
		return Release{}, fmt.Errorf("loading the chart again: %w", err)
	}
	// The context goes to the waits only: Helm would return at its end and work on.
	wait := []kube.WaitOption{kube.WithWaitContext(o.ctx)}
	var done release.Releaser
	if last == nil {
		in := action.NewInstall(o.cfg)
		in.ReleaseName, in.Namespace, in.Timeout, in.Labels = r.Name, c.namespace, r.Timeout, o.mark(1)
		in.WaitStrategy, in.WaitOptions, in.WaitForJobs = kube.StatusWatcherStrategy, wait, true
		done, err = in.RunWithContext(context.WithoutCancel(ctx), chart, r.Values)
	} else {
		up := action.NewUpgrade(o.cfg)
		up.Namespace, up.Timeout, up.Labels, up.MaxHistory = c.namespace, r.Timeout, o.mark(last.Version+1), historyLimit
		up.WaitStrategy, up.WaitOptions, up.WaitForJobs = kube.StatusWatcherStrategy, wait, true
		// Values are those of the request, and what others changed in our objects is changed back.
		up.ResetValues, up.ServerSideApply, up.ForceConflicts = true, "true", true
		done, err = up.RunWithContext(context.WithoutCancel(ctx), r.Name, chart, r.Values)
	}
	var out Release
	record, _ := done.(*v1.Release)
	if record != nil {
		out = see(record)
	}
	if err != nil {
		return out, o.failed(record, err)
	}
	return out, nil
}

func (o *operation) makeNamespace() error {
	namespaces := o.api.CoreV1().Namespaces()
	_, err := namespaces.Get(o.ctx, o.namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = namespaces.Create(o.ctx, &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.namespace}}, metav1.CreateOptions{})
	}
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return o.explain("making the namespace", err)
	}
	return nil
}

// failed explains why a release was not applied.
func (o *operation) failed(record *v1.Release, err error) error {
	if record != nil && waited(err) && o.caller.Err() == nil {
		return o.why(record, err)
	}
	return o.explain("applying it", err)
}
