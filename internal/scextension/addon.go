package scextension

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/effect"
)

// csiDriver is the CSIDriver object of the Secrets Store CSI driver.
const csiDriver = "secrets-store.csi.k8s.io"

// addonTime is how long the driver may take to show after its chart was installed.
const addonTime = 30 * time.Second

// addonMissing says what is not there of the Secrets Store CSI driver; empty: all is.
func addonMissing(ctx context.Context, api kubernetes.Interface) (string, error) {
	_, err := api.StorageV1().CSIDrivers().Get(ctx, csiDriver, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "CSIDriver " + csiDriver, nil
	}
	if err != nil {
		return "", fmt.Errorf("looking for the CSI driver: %w", err)
	}
	served, err := classesServed(api)
	if err != nil {
		return "", fmt.Errorf("looking for the kind %s: %w", classKind.name, err)
	}
	if !served {
		return "CustomResourceDefinition " + classKind.resource.GroupResource().String(), nil
	}
	return "", nil
}

// classesServed reports whether the cluster knows the kind SecretProviderClass.
func classesServed(api kubernetes.Interface) (bool, error) {
	known, err := api.Discovery().ServerResourcesForGroupVersion(classKind.resource.GroupVersion().String())
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, r := range known.APIResources {
		if r.Name == classKind.resource.Resource {
			return true, nil
		}
	}
	return false, nil
}

// addon looks for the add-on of a cluster, and installs it where it is not there and
// this manager has its chart. What somebody else has installed is left alone.
func (m *Manager) addon(ctx context.Context, c connection, w wire.ExtensionWork) wire.ExtensionReport {
	report := wire.ExtensionReport{Revision: w.Revision}
	missing, err := addonMissing(ctx, c.api)
	switch {
	case err != nil:
		report.Problem = addonUnseen(err)
	case missing == "" && c.addon != nil:
		report.Release, _ = c.addon.Get(ctx, w.Name) // nil: somebody else's, or it cannot be seen
	case missing != "" && c.addon == nil:
		report.Problem = addonAbsent(missing, "")
	case missing != "":
		report.Release, report.Problem = m.installAddon(ctx, c, w.Name)
	}
	return report
}

// installAddon installs the chart and waits until the driver is seen.
func (m *Manager) installAddon(ctx context.Context, c connection, name string) (*wire.Release, *wire.Problem) {
	var release wire.Release
	err := effect.Do("install add-on", func() (err error) {
		release, err = c.addon.Install(ctx, name, nil, installTime)
		return err
	})
	if err != nil {
		p := releaseProblem(name, err)
		p.Object = "release " + wire.AddonNamespace + "/" + name
		there, _ := c.addon.Get(ctx, name) // what there is of it, if that can be seen
		return there, p
	}
	ctx, cancel := context.WithTimeoutCause(ctx, addonTime, errors.New("it did not show in time"))
	defer cancel()
	for {
		missing, err := addonMissing(ctx, c.api)
		if err == nil && missing == "" {
			return &release, nil
		}
		select {
		case <-ctx.Done():
			if err != nil {
				return &release, addonUnseen(err)
			}
			return &release, addonAbsent(missing, release.Chart)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// addonAbsent is a Problem: the driver is not there, and no chart that was installed
// has brought it.
func addonAbsent(missing, chart string) *wire.Problem {
	p := &wire.Problem{
		Code: "AddonNotInstalled", Layer: layerCluster, Object: missing,
		Message: fmt.Sprintf("The add-on %s (Secrets Store CSI driver and provider for Azure) is not installed: the cluster has no %s.", wire.KeyVaultAddon, missing),
		Fix:     addonWay,
	}
	if chart != "" {
		p.Message = fmt.Sprintf("The chart %s was installed as the add-on %s, and the cluster has no %s.", chart, wire.KeyVaultAddon, missing)
		p.Fix = "give --addon-chart the chart of the Secrets Store CSI driver with the provider for Azure; see: helm status " + wire.AddonRelease + " -n " + wire.AddonNamespace
	}
	return p
}

// addonWay is how the add-on comes into a cluster.
const addonWay = "start the manager with its chart: keyfleet-connector manager --addon-chart DIR|TGZ; or: helm install " + wire.AddonRelease + " CHART -n " + wire.AddonNamespace

// addonUnseen is a Problem: whether the driver is there cannot be seen.
func addonUnseen(err error) *wire.Problem {
	p := &wire.Problem{
		Code: "AddonNotSeen", Layer: layerKubernetes, Object: "CSIDriver " + csiDriver, Raw: clip(err.Error()),
		Message: "It cannot be seen whether the add-on " + wire.KeyVaultAddon + " is installed.", Fix: "nothing, it is tried again; if it lasts, look at the API server",
	}
	if apierrors.IsForbidden(err) {
		p.Code, p.Fix = "ManagerForbidden", "kubectl apply -f deploy/manager-role.yaml"
	}
	return p
}
