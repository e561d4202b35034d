package kubernetes

import "time"

// ExtensionType is the resource type of extensions of clusters.
const ExtensionType = "Microsoft.KubernetesConfiguration/extensions"

// ClusterExtension is an extension of a cluster.
type ClusterExtension struct {
	ID         string              `json:"id,omitempty"`
	Name       string              `json:"name,omitempty"`
	Type       string              `json:"type,omitempty"`
	Identity   any                 `json:"identity,omitempty"`
	Plan       any                 `json:"plan,omitempty"`
	Properties ExtensionProperties `json:"properties"`
}

// ExtensionProperties are what an extension is, and what became of it. Members
// without omitempty are printed by clients also where there is nothing.
type ExtensionProperties struct {
	ExtensionType       string            `json:"extensionType"`
	AutoUpgrade         *bool             `json:"autoUpgradeMinorVersion"` // nil: true
	ReleaseTrain        string            `json:"releaseTrain,omitempty"`
	Version             string            `json:"version,omitempty"`
	Scope               *ExtensionScope   `json:"scope,omitempty"`
	Settings            map[string]string `json:"configurationSettings"`
	ProtectedSettings   map[string]string `json:"configurationProtectedSettings"` // values are never returned
	CurrentVersion      string            `json:"currentVersion,omitempty"`       // read-only
	ProvisioningState   string            `json:"provisioningState,omitempty"`    // read-only
	Statuses            []ExtensionState  `json:"statuses"`                       // read-only
	ErrorInfo           any               `json:"errorInfo"`                      // read-only
	IsSystemExtension   bool              `json:"isSystemExtension"`              // read-only
	CustomLocation      any               `json:"customLocationSettings"`         // read-only
	PackageURI          *string           `json:"packageUri"`                     // read-only
	AKSAssignedIdentity any               `json:"aksAssignedIdentity"`
	Release             *Release          `json:"release,omitempty"` // own, read-only: as Helm has it
}

// ExtensionScope says for which part of a cluster an extension is.
type ExtensionScope struct {
	Cluster *struct {
		ReleaseNamespace string `json:"releaseNamespace,omitempty"`
	} `json:"cluster,omitempty"`
	Namespace *struct {
		TargetNamespace string `json:"targetNamespace,omitempty"`
	} `json:"namespace,omitempty"`
}

// ExtensionState is one entry of statuses.
type ExtensionState struct {
	Code          string    `json:"code"`
	DisplayStatus string    `json:"displayStatus"`
	Level         string    `json:"level"` // Error, Warning, Information
	Message       string    `json:"message"`
	Time          time.Time `json:"time"`
}
