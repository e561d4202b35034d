package scextension

import (
	"fmt"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/deploy"
	"keyfleet.dev/keyfleet/internal/helm"
)

// pinned is a Problem if an extension was pinned to another version than that of the
// chart, which is part of this program: nothing else can be installed.
func pinned(w wire.ExtensionWork) *wire.Problem {
	chart, err := helm.ReadChart(deploy.Extension())
	if err != nil {
		return releaseProblem(w.Name, err)
	}
	if w.Version == "" || w.Version == chart.Version {
		return nil
	}
	return &wire.Problem{
		Code: "ExtensionVersionNotFound", Layer: layerHelm, Object: "release " + Namespace + "/" + w.Name,
		Message: fmt.Sprintf("Failed to resolve the extension version from the given values: it is pinned to %.60s, and this manager installs %s.", w.Version, chart.Version),
		Fix:     "take the version away, which makes it the manager's own, or run a keyfleet-connector of that version",
	}
}
