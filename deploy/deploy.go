// Package deploy holds what is installed into clusters.
//
// Idea: the program that installs the extension carries its chart, so the two are
// always of one version and nothing is downloaded.
//
// Invariant: the chart holds no secret and takes none; see its values.yaml.
//
// Consequence for the operator: "helm upgrade sc-extension deploy/sc-extension" does
// the same as keyfleet-connector; a cluster needs no access to a chart repository.
package deploy

import (
	"embed"
	"fmt"
	"io/fs"
)

//go:embed all:sc-extension manager-role.yaml
var charts embed.FS

// Extension is the chart of sc-extension.
func Extension() fs.FS {
	chart, err := fs.Sub(charts, "sc-extension")
	if err != nil {
		panic(fmt.Sprintf("the chart of sc-extension is not in this program: %v", err)) // the folder is named above
	}
	return chart
}

// ManagerRole is manager-role.yaml: what keyfleet-connector needs in a cluster.
func ManagerRole() []byte {
	text, err := charts.ReadFile("manager-role.yaml")
	if err != nil {
		panic(fmt.Sprintf("the role of the manager is not in this program: %v", err)) // the file is named above
	}
	return text
}
