package scextension

import (
	"context"
	"log/slog"
	"testing"
	"testing/fstest"
	"time"

	storage "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/helm"
)

// oneChart installs one chart, as the program does.
type oneChart struct {
	client *helm.Client
	chart  *helm.Chart
}

func (c oneChart) Install(ctx context.Context, name string, values map[string]any, timeout time.Duration) (wire.Release, error) {
	r, err := c.client.Apply(ctx, helm.Request{Name: name, Chart: c.chart, Values: values, Timeout: timeout})
	return r.Release, err
}

func (c oneChart) Get(ctx context.Context, name string) (*wire.Release, error) {
	r, err := c.client.Get(ctx, name)
	if err != nil || r == nil {
		return nil, err
	}
	return &r.Release, nil
}

func (c oneChart) Remove(ctx context.Context, name string, timeout time.Duration) error {
	return c.client.Remove(ctx, name, timeout)
}

// addonOf is a chart with one template, for the release of the add-on.
func (b *bed) addonOf(t *testing.T, template string) oneChart {
	t.Helper()
	chart := must(helm.ReadChart(fstest.MapFS{
		"Chart.yaml":          {Data: []byte("{apiVersion: v2, name: other, version: 1.2.3}")},
		"templates/some.yaml": {Data: []byte(template)},
	}))(t)
	return oneChart{must(helm.New(b.Kubeconfig(t), wire.AddonNamespace, slog.New(slog.DiscardHandler)))(t), chart}
}

// TestAddon: the add-on is there when both of its halves are seen, whoever installed
// them. Until then it is said what is not there; a chart that does not bring it, or
// cannot be installed, is said too.
func TestAddon(t *testing.T) {
	b := newBed(t)
	m := &Manager{Interval: time.Second, Log: slog.New(slog.DiscardHandler)}
	work := wire.ExtensionWork{Name: wire.AddonRelease, Revision: "1"}
	seen := func() bool {
		t.Helper()
		return must(look(t.Context(), b.api))(t).CSIDriver
	}
	says(t, m.addon(t.Context(), connection{api: b.api}, work).Problem, "AddonNotInstalled", "CSIDriver secrets-store.csi.k8s.io", "--addon-chart", "helm install azure-keyvault-secrets-provider")

	broken := m.addon(t.Context(), connection{api: b.api, addon: b.addonOf(t, "{{ fail `no values` }}")}, work)
	says(t, broken.Problem, "RenderingFailed", "release kube-system/azure-keyvault-secrets-provider", "no values")

	driver := &storage.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: csiDriver}}
	must(b.api.StorageV1().CSIDrivers().Create(t.Context(), driver, metav1.CreateOptions{}))(t)
	says(t, m.addon(t.Context(), connection{api: b.api}, work).Problem, "AddonNotInstalled", "CustomResourceDefinition secretproviderclasses.secrets-store.csi.x-k8s.io")
	if seen() {
		t.Error("half of it counts as the add-on")
	}

	other := b.addonOf(t, "{apiVersion: v1, kind: ConfigMap, metadata: {name: other}}")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // shorter than addonTime
	defer cancel()
	wrong := m.addon(ctx, connection{api: b.api, addon: other}, work)
	says(t, wrong.Problem, "AddonNotInstalled", "The chart other-1.2.3 was installed", "CustomResourceDefinition")
	if wrong.Release == nil || wrong.Release.Status != "deployed" || wrong.Release.Namespace != "kube-system" {
		t.Errorf("the release is %+v", wrong.Release)
	}

	b.install(t)
	b.classes(t)
	if r := m.addon(t.Context(), connection{api: b.api}, work); r.Problem != nil || r.Release != nil || r.Revision != "1" || !seen() {
		t.Errorf("both halves are there, of nobody's chart: %+v", r)
	}
	if r := m.addon(t.Context(), connection{api: b.api, addon: other}, work); r.Problem != nil || r.Release == nil {
		t.Errorf("both halves are there, and the release: %+v", r)
	}
	says(t, m.addon(t.Context(), connection{api: b.as(t, "nobody").api}, work).Problem, "ManagerForbidden", "deploy/manager-role.yaml")
}
