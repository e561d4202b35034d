package scextension

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Releases installs and removes releases of charts in one cluster; package helm has
// the real one.
type Releases interface {
	// Install makes the release be as the values say, and waits until it works.
	Install(ctx context.Context, name string, values map[string]any, timeout time.Duration) (wire.Release, error)
	// Get returns a release; nil: there is none.
	Get(ctx context.Context, name string) (*wire.Release, error)
	// Remove removes a release with all its objects.
	Remove(ctx context.Context, name string, timeout time.Duration) error
}

// installTime is how long an installation may take: images are pulled, pods started,
// and sc-job makes the objects of all connections.
const installTime = 6 * time.Minute

// installation is what is known of an extension's release.
type installation struct {
	revision string // that was worked on, or is
	removed  bool   // that was to remove it
	running  bool
	next     time.Time // when to do it again; zero: it succeeded
}

// tryAgain is the pause after an installation that failed.
const tryAgain = time.Minute

// install starts what has to be done about an extension, unless it is under way or
// done. One that has failed is tried again.
func (m *Manager) install(ctx context.Context, cluster string, c connection, w wire.ExtensionWork) {
	key := cluster + "/" + w.Name
	m.lock.Lock()
	defer m.lock.Unlock()
	was, now := m.done[key], time.Now()
	same := was.revision == w.Revision && was.removed == w.Remove
	if was.running || same && (was.next.IsZero() || now.Before(was.next)) {
		return
	}
	m.done[key] = installation{revision: w.Revision, removed: w.Remove, running: true}
	m.work.Go(func() {
		pause := m.extend(ctx, cluster, c, w)
		m.lock.Lock()
		defer m.lock.Unlock()
		i := installation{revision: w.Revision, removed: w.Remove}
		if pause > 0 {
			i.next = time.Now().Add(pause)
		}
		m.done[key] = i
	})
}

// extend brings the extension of a cluster to what is wanted, and reports. It
// returns when to do so again; zero: when something else is wanted.
func (m *Manager) extend(ctx context.Context, cluster string, c connection, w wire.ExtensionWork) (again time.Duration) {
	addon := w.Name == wire.AddonRelease
	var report wire.ExtensionReport
	if addon {
		report = m.addon(ctx, c, w)
	} else {
		report = m.release(ctx, c, w)
	}
	err := effect.Do("report on extension", func() error {
		return m.call(ctx, http.MethodPut, "/keyfleet/v1"+cluster+"/providers/"+wire.ExtensionType+"/"+w.Name+"/report", report, nil)
	})
	if err != nil {
		m.Log.Error("what became of the extension cannot be reported", "cluster", cluster, "error", err)
	}
	switch p := report.Problem; {
	case addon && (p == nil || p.Layer != layerHelm):
		return m.Interval // whether it is there is looked at again and again
	case err != nil || p != nil:
		return tryAgain
	}
	return 0
}

// release does what is wanted, and says what became of it.
func (m *Manager) release(ctx context.Context, c connection, w wire.ExtensionWork) wire.ExtensionReport {
	report, r := wire.ExtensionReport{Revision: w.Revision}, c.releases
	if r == nil || m.Image == "" && !w.Remove {
		if r != nil {
			report.Release, _ = r.Get(ctx, w.Name) // another manager's, which must not be told away
		}
		if report.Release != nil || operatorWorks(ctx, c.api) {
			return report // somebody else has seen to it
		}
		report.Problem = &wire.Problem{
			Code: "ImageNotConfigured", Layer: layerHelm, Object: "release " + Namespace + "/" + w.Name, Message: "The manager was not told which image the extension runs.",
			Fix: "start the server with --connector-image REGISTRY/keyfleet-connector:TAG, or the manager with --image",
		}
		return report
	}
	if w.Remove {
		if err := effect.Do("remove release", func() error { return r.Remove(ctx, w.Name, installTime) }); err != nil {
			report.Problem = releaseProblem(w.Name, err)
			return report
		}
		report.Gone = true
		return report
	}
	if report.Problem = pinned(w); report.Problem != nil {
		return report
	}
	values, err := m.values(w.Settings)
	if err != nil {
		report.Problem = releaseProblem(w.Name, err)
		return report
	}
	var release wire.Release
	err = effect.Do("install release", func() (err error) {
		release, err = r.Install(ctx, w.Name, values, installTime)
		return err
	})
	if err != nil {
		report.Problem = releaseProblem(w.Name, err)
		report.Release, _ = r.Get(ctx, w.Name) // what there is of it, if that can be seen
		return report
	}
	report.Release = &release
	return report
}

// values are the chart's values: the manager's image, and the settings of the extension.
func (m *Manager) values(settings map[string]string) (map[string]any, error) {
	out := map[string]any{"image": m.Image}
	if m.Authority != "" { // pods of the webhook come to this server, unless a setting says otherwise
		out["webhook"] = map[string]any{"authorityHost": m.Authority, "tenantID": m.Tenant}
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) { // "operator" comes before "operator.replicas", and is in its way
		at, parts := out, strings.Split(name, ".")
		for _, p := range parts[:len(parts)-1] {
			inner, ok := at[p].(map[string]any)
			if !ok {
				if at[p] != nil {
					return nil, fault.New(fault.Invalid, "RenderingFailed", "Helm chart rendering failed with given values: %s is set twice.", name).At("configurationSettings." + name)
				}
				inner = map[string]any{}
				at[p] = inner
			}
			at = inner
		}
		at[parts[len(parts)-1]] = scalar(settings[name])
	}
	return out, nil
}

// scalar is a setting as the chart's schema wants it: numbers and truth values are such.
func scalar(text string) any {
	if n, err := strconv.ParseInt(text, 10, 32); err == nil {
		return n
	}
	if b, err := strconv.ParseBool(text); err == nil && (text == "true" || text == "false") {
		return b
	}
	return text
}

// releaseProblem says an error of Helm as the extension shows it.
func releaseProblem(name string, err error) *wire.Problem {
	e := fault.From(err)
	p := &wire.Problem{Code: e.Code, Layer: layerHelm, Object: "release " + Namespace + "/" + name, Message: e.Message, Fix: e.Fix}
	if e.Err != nil {
		p.Raw = problem(e.Err)
	}
	if p.Code == "" {
		p.Code, p.Message, p.Raw = "HelmFailed", "The release could not be worked on.", problem(err)
	}
	var said []string // a cause of each sort: the pods of one Job or Deployment say the same
	for _, d := range e.Details {
		if !slices.Contains(said, d.Code) && !strings.Contains(p.Message, d.Message) {
			p.Message += fmt.Sprintf(" %s: %s", d.Code, d.Message)
		}
		said = append(said, d.Code)
	}
	return p
}

// operatorWorks reports whether an operator of connections is at work in the cluster.
func operatorWorks(ctx context.Context, api kubernetes.Interface) bool {
	l, err := api.CoordinationV1().Leases(Namespace).Get(ctx, leaseName, metav1.GetOptions{})
	if err != nil || l.Spec.RenewTime == nil || l.Spec.LeaseDurationSeconds == nil {
		return false
	}
	return time.Since(l.Spec.RenewTime.Time) < time.Duration(*l.Spec.LeaseDurationSeconds)*time.Second
}
