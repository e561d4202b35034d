// Package kubernetes holds the wire types of Microsoft.ContainerService's managed
// clusters, and Keyfleet's own between server and manager. It is a leaf: plain
// structs with Azure's names.
package kubernetes

import (
	"encoding/json"
	"time"
)

// Type is the resource type of clusters.
const Type = "Microsoft.ContainerService/managedClusters"

// ManagedCluster is a cluster.
type ManagedCluster struct {
	ID         string            `json:"id,omitempty"`
	Name       string            `json:"name,omitempty"`
	Type       string            `json:"type,omitempty"`
	Location   string            `json:"location"`
	Tags       map[string]string `json:"tags,omitempty"`
	Properties ClusterProperties `json:"properties"`
}

// ClusterProperties are read-only but for Kubeconfig, which is write-only and
// Keyfleet's own, as SSH, Rotation and Observed are. What is enabled is what was seen.
type ClusterProperties struct {
	Kubeconfig               string           `json:"kubeconfig,omitempty"`
	ProvisioningState        string           `json:"provisioningState,omitempty"`
	PowerState               *PowerState      `json:"powerState,omitempty"`
	KubernetesVersion        string           `json:"kubernetesVersion,omitempty"`
	CurrentKubernetesVersion string           `json:"currentKubernetesVersion,omitempty"`
	FQDN                     string           `json:"fqdn,omitempty"`
	OIDCIssuerProfile        *OIDCIssuer      `json:"oidcIssuerProfile,omitempty"`
	SecurityProfile          *Security        `json:"securityProfile,omitempty"`
	AddonProfiles            map[string]Addon `json:"addonProfiles,omitempty"`
	Observed                 *Observed        `json:"observed,omitempty"`
	SSH                      *SSHAccess       `json:"ssh,omitempty"`
	Rotation                 *Rotation        `json:"rotation,omitempty"`
}

// PowerState is "Running" for a cluster that answers.
type PowerState struct {
	Code string `json:"code"`
}

// OIDCIssuer is the issuer of service account tokens.
type OIDCIssuer struct {
	Enabled   bool   `json:"enabled"`
	IssuerURL string `json:"issuerURL,omitempty"`
}

// Security says whether pods get the tokens and variables of workload identity.
type Security struct {
	WorkloadIdentity Enabled `json:"workloadIdentity"`
}

// Enabled is a switch.
type Enabled struct {
	Enabled bool `json:"enabled"`
}

// KeyVaultAddon is the name of the add-on with the Secrets Store CSI driver.
const KeyVaultAddon = "azureKeyvaultSecretsProvider"

// Addon is the state of an add-on.
type Addon struct {
	Enabled bool `json:"enabled"`
}

// Observed says when a manager last looked at the cluster, and what it saw.
type Observed struct {
	Time    time.Time `json:"time,omitzero"`
	Reason  string    `json:"reason,omitempty"` // why the state is not Succeeded
	Server  string    `json:"server"`
	Nodes   int       `json:"nodes"`
	Ready   int       `json:"ready"`
	Missing []string  `json:"missingPermissions,omitempty"`
}

// ClusterUpdate is the body of PATCH. Tags nil: unchanged.
type ClusterUpdate struct {
	Tags map[string]string `json:"tags,omitempty"`
}

// CredentialResults is the answer of listClusterUserCredential.
type CredentialResults struct {
	Kubeconfigs []CredentialResult `json:"kubeconfigs"`
}

// CredentialResult is one kubeconfig.
type CredentialResult struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
}

// Work is what a manager has to look after.
type Work struct {
	Clusters []Assignment `json:"clusters"`
}

// Assignment is one cluster. Login changes when its kubeconfig does.
type Assignment struct {
	ID          string           `json:"id"`
	Login       string           `json:"login"`
	Extensions  []ExtensionWork  `json:"extensions,omitempty"`
	Connections []ConnectionWork `json:"connections,omitempty"`
	Questions   []Question       `json:"questions,omitempty"` // that no manager has answered
}

// Observation is what a manager saw of a cluster: Problem, or the rest.
type Observation struct {
	Problem   string          `json:"problem,omitempty"`
	Version   string          `json:"version,omitempty"` // of the API server, "v1.36.3"
	Nodes     int             `json:"nodes"`
	Ready     int             `json:"ready"`
	Issuer    string          `json:"issuer,omitempty"`
	KeySet    json.RawMessage `json:"keySet,omitempty"` // RFC 7517
	Webhook   bool            `json:"webhook,omitempty"`
	CSIDriver bool            `json:"csiDriver,omitempty"` // and the kind SecretProviderClass
	Missing   []string        `json:"missingPermissions,omitempty"`
}
