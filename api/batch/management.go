// Package batch holds the wire types of Azure Batch: the management plane
// (Microsoft.Batch, accounts and pools) and the data plane (pools, nodes and
// their extensions). It is a leaf: plain structs with Azure's names.
//
// One struct serves all api-versions; which members a version has is the
// business of the REST edge. Members that Keyfleet does not offer are raw, so
// that the edge can say so by name.
package batch

import (
	"encoding/json"
	"time"
)

// Account is a Batch account, as answered.
type Account struct {
	ID         string             `json:"id"`
	Name       string             `json:"name"`
	Type       string             `json:"type"` // "Microsoft.Batch/batchAccounts"
	Location   string             `json:"location"`
	Tags       map[string]string  `json:"tags,omitempty"`
	Identity   *AccountIdentity   `json:"identity,omitempty"`
	Properties *AccountProperties `json:"properties,omitempty"`
}

// AccountIdentity is an account's own identity; here always of type None.
type AccountIdentity struct {
	Type string `json:"type"`
}

// AccountProperties are the properties of an account.
type AccountProperties struct {
	AccountEndpoint                       string              `json:"accountEndpoint"` // host and port, no scheme
	NodeManagementEndpoint                string              `json:"nodeManagementEndpoint"`
	ProvisioningState                     string              `json:"provisioningState"` // "Succeeded"
	PoolAllocationMode                    string              `json:"poolAllocationMode"`
	PublicNetworkAccess                   string              `json:"publicNetworkAccess"`
	DedicatedCoreQuota                    int                 `json:"dedicatedCoreQuota"`
	DedicatedCoreQuotaPerVMFamily         []struct{}          `json:"dedicatedCoreQuotaPerVMFamily"`
	DedicatedCoreQuotaPerVMFamilyEnforced bool                `json:"dedicatedCoreQuotaPerVMFamilyEnforced"`
	LowPriorityCoreQuota                  int                 `json:"lowPriorityCoreQuota"`
	PoolQuota                             int                 `json:"poolQuota"`
	ActiveJobAndJobScheduleQuota          int                 `json:"activeJobAndJobScheduleQuota"`
	Encryption                            *EncryptionSettings `json:"encryption,omitempty"`
	AllowedAuthenticationModes            []string            `json:"allowedAuthenticationModes"`
}

// EncryptionSettings says who holds the keys of an account.
type EncryptionSettings struct {
	KeySource string `json:"keySource"` // "Microsoft.Batch"
}

// AccountRequest is the body of an account's PUT and PATCH.
type AccountRequest struct {
	ID         string                     `json:"id,omitempty"`   // read-only; ignored
	Name       string                     `json:"name,omitempty"` // read-only; ignored
	Type       string                     `json:"type,omitempty"` // read-only; ignored
	Location   string                     `json:"location"`
	Tags       map[string]string          `json:"tags,omitempty"`
	Identity   json.RawMessage            `json:"identity,omitempty"`
	Properties map[string]json.RawMessage `json:"properties,omitempty"`
}

// Pool is a pool on the management plane, in requests and answers.
type Pool struct {
	ID         string          `json:"id,omitempty"`
	Name       string          `json:"name,omitempty"`
	Type       string          `json:"type,omitempty"` // "Microsoft.Batch/batchAccounts/pools"
	Etag       string          `json:"etag,omitempty"`
	Identity   *PoolIdentity   `json:"identity,omitempty"`
	Properties *PoolProperties `json:"properties,omitempty"`
}

// PoolIdentity is the identities of a pool.
type PoolIdentity struct {
	Type                   string                          `json:"type"` // "UserAssigned", "None"
	UserAssignedIdentities map[string]UserAssignedIdentity `json:"userAssignedIdentities,omitempty"`
}

// UserAssignedIdentity is an identity of a pool; its ids are read-only.
type UserAssignedIdentity struct {
	ClientID    string `json:"clientId,omitempty"`
	PrincipalID string `json:"principalId,omitempty"`
}

// PoolProperties are the properties of a pool.
type PoolProperties struct {
	DisplayName                 string                   `json:"displayName,omitempty"`
	VMSize                      string                   `json:"vmSize,omitempty"`
	DeploymentConfiguration     *DeploymentConfiguration `json:"deploymentConfiguration,omitempty"`
	ScaleSettings               *ScaleSettings           `json:"scaleSettings,omitempty"`
	InterNodeCommunication      string                   `json:"interNodeCommunication,omitempty"`
	TaskSlotsPerNode            int                      `json:"taskSlotsPerNode,omitempty"`
	TaskSchedulingPolicy        *TaskSchedulingPolicy    `json:"taskSchedulingPolicy,omitempty"`
	Metadata                    []MetadataItem           `json:"metadata,omitempty"`
	NetworkConfiguration        json.RawMessage          `json:"networkConfiguration,omitempty"`
	ApplicationLicenses         []string                 `json:"applicationLicenses,omitempty"`
	TargetNodeCommunicationMode string                   `json:"targetNodeCommunicationMode,omitempty"` // since 2022-10-01

	// Not offered by Keyfleet; the edge refuses them where they say anything.
	StartTask           json.RawMessage `json:"startTask,omitempty"`
	Certificates        json.RawMessage `json:"certificates,omitempty"`
	ApplicationPackages json.RawMessage `json:"applicationPackages,omitempty"`
	UserAccounts        json.RawMessage `json:"userAccounts,omitempty"`
	MountConfiguration  json.RawMessage `json:"mountConfiguration,omitempty"`

	// Read-only.
	CreationTime                    *time.Time             `json:"creationTime,omitempty"`
	LastModified                    *time.Time             `json:"lastModified,omitempty"`
	ProvisioningState               string                 `json:"provisioningState,omitempty"` // "Succeeded", "Deleting"
	ProvisioningStateTransitionTime *time.Time             `json:"provisioningStateTransitionTime,omitempty"`
	AllocationState                 string                 `json:"allocationState,omitempty"` // "Steady", "Resizing", "Stopping"
	AllocationStateTransitionTime   *time.Time             `json:"allocationStateTransitionTime,omitempty"`
	CurrentDedicatedNodes           *int                   `json:"currentDedicatedNodes,omitempty"`
	CurrentLowPriorityNodes         *int                   `json:"currentLowPriorityNodes,omitempty"`
	CurrentNodeCommunicationMode    string                 `json:"currentNodeCommunicationMode,omitempty"` // since 2022-10-01
	ResizeOperationStatus           *ResizeOperationStatus `json:"resizeOperationStatus,omitempty"`
	AutoScaleRun                    json.RawMessage        `json:"autoScaleRun,omitempty"`
}

// DeploymentConfiguration says what nodes are made of.
type DeploymentConfiguration struct {
	VirtualMachineConfiguration *VirtualMachineConfiguration `json:"virtualMachineConfiguration,omitempty"`
	CloudServiceConfiguration   json.RawMessage              `json:"cloudServiceConfiguration,omitempty"` // not offered
}

// VirtualMachineConfiguration describes the machines of a pool.
type VirtualMachineConfiguration struct {
	ImageReference              *ImageReference `json:"imageReference,omitempty"`
	NodeAgentSkuID              string          `json:"nodeAgentSkuId,omitempty"`
	Extensions                  []VMExtension   `json:"extensions,omitempty"`
	LicenseType                 string          `json:"licenseType,omitempty"`
	DataDisks                   json.RawMessage `json:"dataDisks,omitempty"`
	DiskEncryptionConfiguration json.RawMessage `json:"diskEncryptionConfiguration,omitempty"`
	NodePlacementConfiguration  json.RawMessage `json:"nodePlacementConfiguration,omitempty"`
	OSDisk                      json.RawMessage `json:"osDisk,omitempty"` // since 2021-06-01
	WindowsConfiguration        json.RawMessage `json:"windowsConfiguration,omitempty"`
	ContainerConfiguration      json.RawMessage `json:"containerConfiguration,omitempty"` // not offered
}

// ImageReference names a marketplace image, or another image by its id.
type ImageReference struct {
	ID        string `json:"id,omitempty"`
	Publisher string `json:"publisher,omitempty"`
	Offer     string `json:"offer,omitempty"`
	SKU       string `json:"sku,omitempty"`
	Version   string `json:"version,omitempty"`
}

// VMExtension is an extension of a pool.
type VMExtension struct {
	Name                     string          `json:"name"`
	Publisher                string          `json:"publisher"`
	Type                     string          `json:"type"`
	TypeHandlerVersion       string          `json:"typeHandlerVersion,omitempty"`
	AutoUpgradeMinorVersion  *bool           `json:"autoUpgradeMinorVersion,omitempty"`
	EnableAutomaticUpgrade   *bool           `json:"enableAutomaticUpgrade,omitempty"` // since 2023-05-01
	Settings                 json.RawMessage `json:"settings,omitempty"`
	ProtectedSettings        json.RawMessage `json:"protectedSettings,omitempty"` // in requests only
	ProvisionAfterExtensions []string        `json:"provisionAfterExtensions,omitempty"`

	// AuthenticationSettings does not exist here; people write it beside
	// settings instead of inside, and the edge tells them.
	AuthenticationSettings json.RawMessage `json:"authenticationSettings,omitempty"`
}

// ScaleSettings says how many nodes there shall be.
type ScaleSettings struct {
	FixedScale *FixedScale     `json:"fixedScale,omitempty"`
	AutoScale  json.RawMessage `json:"autoScale,omitempty"` // not offered
}

// FixedScale is a chosen number of nodes.
type FixedScale struct {
	TargetDedicatedNodes   *int   `json:"targetDedicatedNodes,omitempty"`
	TargetLowPriorityNodes *int   `json:"targetLowPriorityNodes,omitempty"`
	ResizeTimeout          string `json:"resizeTimeout,omitempty"` // ISO 8601
	NodeDeallocationOption string `json:"nodeDeallocationOption,omitempty"`
}

// TaskSchedulingPolicy says how tasks fill nodes.
type TaskSchedulingPolicy struct {
	NodeFillType string `json:"nodeFillType"`
}

// MetadataItem is a name and a value.
type MetadataItem struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// ResizeOperationStatus is the running resize, or the last one.
type ResizeOperationStatus struct {
	TargetDedicatedNodes   *int          `json:"targetDedicatedNodes,omitempty"`
	TargetLowPriorityNodes *int          `json:"targetLowPriorityNodes,omitempty"`
	ResizeTimeout          string        `json:"resizeTimeout,omitempty"`
	NodeDeallocationOption string        `json:"nodeDeallocationOption,omitempty"`
	StartTime              *time.Time    `json:"startTime,omitempty"`
	Errors                 []ResizeError `json:"errors,omitempty"`
}

// ResizeError says why a resize did not reach its target.
type ResizeError struct {
	Code    string        `json:"code"`
	Message string        `json:"message"`
	Details []ResizeError `json:"details,omitempty"`
}

// PoolResult is one answer to a what-if (Keyfleet's own).
type PoolResult struct {
	Created  bool      `json:"created"`  // the pool would be new
	Accepted bool      `json:"accepted"` // a PUT of the same body would be answered 200
	Changes  []Change  `json:"changes"`
	Problems []Problem `json:"problems"` // why it would be refused
	Warnings []Problem `json:"warnings"` // what it would be accepted with; refused with Prefer: handling=strict
}

// Change is a difference between a pool and a request.
type Change struct {
	Path    string          `json:"path"`
	Old     json.RawMessage `json:"old,omitempty"`
	New     json.RawMessage `json:"new,omitempty"`
	Allowed bool            `json:"allowed"` // whether an existing pool takes it
}

// Problem is something wrong with a request, and how to mend it.
type Problem struct {
	Code   string `json:"code"`
	Path   string `json:"path,omitempty"`
	Reason string `json:"reason"`
	Fix    string `json:"fix,omitempty"`
}
