package batch

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Number is a whole number that some clients write as a string ("2"), as az
// 2.74 does in a resize. It is answered as a number.
type Number int

// UnmarshalJSON accepts 2 and "2".
func (n *Number) UnmarshalJSON(b []byte) error {
	s := strings.TrimSpace(string(b))
	if u, err := strconv.Unquote(s); err == nil && strings.HasPrefix(s, `"`) {
		s = u
	}
	i, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return fmt.Errorf("%s is not a whole number", b)
	}
	*n = Number(i)
	return nil
}

// DataList is a page of a data-plane collection.
type DataList[T any] struct {
	OData    string `json:"odata.metadata"`
	Value    []T    `json:"value"`
	NextLink string `json:"odata.nextLink,omitempty"`
}

// NameValue is a name and a value, as errors carry them.
type NameValue struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// DataPool is a pool on the data plane: the body of an add, and the answer.
type DataPool struct {
	OData                         string                           `json:"odata.metadata,omitempty"`
	ID                            string                           `json:"id,omitempty"`
	DisplayName                   string                           `json:"displayName,omitempty"`
	URL                           string                           `json:"url,omitempty"`
	ETag                          string                           `json:"eTag,omitempty"`
	LastModified                  *time.Time                       `json:"lastModified,omitempty"`
	CreationTime                  *time.Time                       `json:"creationTime,omitempty"`
	State                         string                           `json:"state,omitempty"` // "active", "deleting"
	StateTransitionTime           *time.Time                       `json:"stateTransitionTime,omitempty"`
	AllocationState               string                           `json:"allocationState,omitempty"` // "steady", "resizing", "stopping"
	AllocationStateTransitionTime *time.Time                       `json:"allocationStateTransitionTime,omitempty"`
	VMSize                        string                           `json:"vmSize,omitempty"`
	VirtualMachineConfiguration   *DataVirtualMachineConfiguration `json:"virtualMachineConfiguration,omitempty"`
	ResizeTimeout                 string                           `json:"resizeTimeout,omitempty"`
	ResizeErrors                  []DataResizeError                `json:"resizeErrors,omitempty"`
	CurrentDedicatedNodes         *Number                          `json:"currentDedicatedNodes,omitempty"`
	CurrentLowPriorityNodes       *Number                          `json:"currentLowPriorityNodes,omitempty"`
	TargetDedicatedNodes          *Number                          `json:"targetDedicatedNodes,omitempty"`
	TargetLowPriorityNodes        *Number                          `json:"targetLowPriorityNodes,omitempty"`
	EnableAutoScale               *bool                            `json:"enableAutoScale,omitempty"`
	EnableInterNodeCommunication  *bool                            `json:"enableInterNodeCommunication,omitempty"`
	TaskSlotsPerNode              *Number                          `json:"taskSlotsPerNode,omitempty"`
	TaskSchedulingPolicy          *TaskSchedulingPolicy            `json:"taskSchedulingPolicy,omitempty"`
	Metadata                      []MetadataItem                   `json:"metadata,omitempty"`
	Identity                      *DataIdentity                    `json:"identity,omitempty"` // read-only on the data plane
	NetworkConfiguration          json.RawMessage                  `json:"networkConfiguration,omitempty"`
	TargetNodeCommunicationMode   string                           `json:"targetNodeCommunicationMode,omitempty"`  // since 2022-10-01.16.0
	CurrentNodeCommunicationMode  string                           `json:"currentNodeCommunicationMode,omitempty"` // since 2022-10-01.16.0

	// Not offered by Keyfleet; the edge refuses them where they say anything.
	AutoScaleFormula             json.RawMessage `json:"autoScaleFormula,omitempty"`
	AutoScaleEvaluationInterval  json.RawMessage `json:"autoScaleEvaluationInterval,omitempty"`
	CloudServiceConfiguration    json.RawMessage `json:"cloudServiceConfiguration,omitempty"`
	StartTask                    json.RawMessage `json:"startTask,omitempty"`
	CertificateReferences        json.RawMessage `json:"certificateReferences,omitempty"`
	ApplicationPackageReferences json.RawMessage `json:"applicationPackageReferences,omitempty"`
	ApplicationLicenses          []string        `json:"applicationLicenses,omitempty"`
	UserAccounts                 json.RawMessage `json:"userAccounts,omitempty"`
	MountConfiguration           json.RawMessage `json:"mountConfiguration,omitempty"`
}

// DataVirtualMachineConfiguration describes the machines of a pool.
type DataVirtualMachineConfiguration struct {
	ImageReference              *DataImageReference `json:"imageReference,omitempty"`
	NodeAgentSKUID              string              `json:"nodeAgentSKUId,omitempty"`
	Extensions                  []VMExtension       `json:"extensions,omitempty"`
	LicenseType                 string              `json:"licenseType,omitempty"`
	DataDisks                   json.RawMessage     `json:"dataDisks,omitempty"`
	DiskEncryptionConfiguration json.RawMessage     `json:"diskEncryptionConfiguration,omitempty"`
	NodePlacementConfiguration  json.RawMessage     `json:"nodePlacementConfiguration,omitempty"`
	OSDisk                      json.RawMessage     `json:"osDisk,omitempty"`
	WindowsConfiguration        json.RawMessage     `json:"windowsConfiguration,omitempty"`
	ContainerConfiguration      json.RawMessage     `json:"containerConfiguration,omitempty"` // not offered
}

// DataImageReference names an image on the data plane.
type DataImageReference struct {
	Publisher             string `json:"publisher,omitempty"`
	Offer                 string `json:"offer,omitempty"`
	SKU                   string `json:"sku,omitempty"`
	Version               string `json:"version,omitempty"`
	ExactVersion          string `json:"exactVersion,omitempty"` // read-only
	VirtualMachineImageID string `json:"virtualMachineImageId,omitempty"`
}

// DataIdentity is the identities of a pool on the data plane.
type DataIdentity struct {
	Type                   string                     `json:"type"`
	UserAssignedIdentities []DataUserAssignedIdentity `json:"userAssignedIdentities,omitempty"`
}

// DataUserAssignedIdentity is one identity of a pool.
type DataUserAssignedIdentity struct {
	ResourceID  string `json:"resourceId"`
	ClientID    string `json:"clientId,omitempty"`
	PrincipalID string `json:"principalId,omitempty"`
}

// DataResizeError says why a resize did not reach its target.
type DataResizeError struct {
	Code    string      `json:"code"`
	Message string      `json:"message"`
	Values  []NameValue `json:"values,omitempty"`
}

// PoolPatch is the body of a pool's PATCH on the data plane.
type PoolPatch struct {
	DisplayName                  *string         `json:"displayName,omitempty"`
	Metadata                     []MetadataItem  `json:"metadata,omitempty"`
	TargetNodeCommunicationMode  *string         `json:"targetNodeCommunicationMode,omitempty"`
	StartTask                    json.RawMessage `json:"startTask,omitempty"`
	CertificateReferences        json.RawMessage `json:"certificateReferences,omitempty"`
	ApplicationPackageReferences json.RawMessage `json:"applicationPackageReferences,omitempty"`
}

// ResizeRequest is the body of a resize.
type ResizeRequest struct {
	TargetDedicatedNodes   *Number `json:"targetDedicatedNodes,omitempty"`
	TargetLowPriorityNodes *Number `json:"targetLowPriorityNodes,omitempty"`
	ResizeTimeout          string  `json:"resizeTimeout,omitempty"`
	NodeDeallocationOption string  `json:"nodeDeallocationOption,omitempty"`
}

// RemoveNodesRequest is the body of removenodes.
type RemoveNodesRequest struct {
	NodeList               []string `json:"nodeList"`
	ResizeTimeout          string   `json:"resizeTimeout,omitempty"`
	NodeDeallocationOption string   `json:"nodeDeallocationOption,omitempty"`
}

// NodeActionRequest is the body of reboot, reimage and disablescheduling. The
// options are about tasks; there are none here.
type NodeActionRequest struct {
	NodeRebootOption            string `json:"nodeRebootOption,omitempty"`
	NodeReimageOption           string `json:"nodeReimageOption,omitempty"`
	NodeDisableSchedulingOption string `json:"nodeDisableSchedulingOption,omitempty"`
}

// Node is a compute node.
type Node struct {
	OData               string         `json:"odata.metadata,omitempty"`
	ID                  string         `json:"id"`
	URL                 string         `json:"url"`
	State               string         `json:"state"`
	SchedulingState     string         `json:"schedulingState"` // "enabled", "disabled"
	StateTransitionTime *time.Time     `json:"stateTransitionTime,omitempty"`
	LastBootTime        *time.Time     `json:"lastBootTime,omitempty"`
	AllocationTime      *time.Time     `json:"allocationTime,omitempty"`
	AffinityID          string         `json:"affinityId"`
	VMSize              string         `json:"vmSize"`
	TotalTasksRun       int            `json:"totalTasksRun"`
	RunningTasksCount   int            `json:"runningTasksCount"`
	TotalTasksSucceeded int            `json:"totalTasksSucceeded"`
	IsDedicated         bool           `json:"isDedicated"`
	Errors              []NodeError    `json:"errors,omitempty"`
	NodeAgentInfo       *NodeAgentInfo `json:"nodeAgentInfo,omitempty"`
}

// NodeError is an error of a node.
type NodeError struct {
	Code         string      `json:"code"`
	Message      string      `json:"message"`
	ErrorDetails []NameValue `json:"errorDetails,omitempty"`
}

// NodeAgentInfo says which agent runs on a node.
type NodeAgentInfo struct {
	Version        string     `json:"version"`
	LastUpdateTime *time.Time `json:"lastUpdateTime,omitempty"`
}

// NodeExtension is an extension on a node, with its live status.
type NodeExtension struct {
	OData             string           `json:"odata.metadata,omitempty"`
	ProvisioningState string           `json:"provisioningState,omitempty"` // not with api-version 2010-01-01
	InstanceView      *InstanceView    `json:"instanceView"`
	VMExtension       *NodeVMExtension `json:"vmExtension"`
}

// InstanceView is what an extension said of itself.
type InstanceView struct {
	Name        string               `json:"name"`
	Statuses    []InstanceViewStatus `json:"statuses"`
	SubStatuses []InstanceViewStatus `json:"subStatuses,omitempty"` // not with api-version 2010-01-01
}

// InstanceViewStatus is one status of an instance view.
type InstanceViewStatus struct {
	Code          string `json:"code"`
	Level         int    `json:"level"` // 0 info, 1 warning, 2 error
	DisplayStatus string `json:"displayStatus"`
	Message       string `json:"message"`
}

// NodeVMExtension is what the pool asked for. Settings are a string that holds JSON.
type NodeVMExtension struct {
	Name                     string   `json:"name"`
	Publisher                string   `json:"publisher"`
	Type                     string   `json:"type"`
	TypeHandlerVersion       string   `json:"typeHandlerVersion"`
	AutoUpgradeMinorVersion  bool     `json:"autoUpgradeMinorVersion"`
	Settings                 string   `json:"settings,omitempty"`
	ProvisionAfterExtensions []string `json:"provisionAfterExtensions,omitempty"` // not with api-version 2010-01-01
}
