package pool

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Pool is a stored pool. Its id is the resource id's store key:
// SUBSCRIPTION/GROUP/ACCOUNT/POOL in lower case.
type Pool = store.Object[Spec, Status]

// Pools is the collection of pools.
var Pools = store.NewCollection[Spec, Status]("pools")

// Spec is what a pool should be: all that later api-versions can say of it. Its
// JSON is the pool resource's, so paths into it are paths of the resource.
type Spec struct {
	ID         string     `json:"id"` // resource id, in the casing of the request that created it
	Identity   Identified `json:"identity"`
	Properties Properties `json:"properties"`
	Orders     Orders     `json:"keyfleet"`
}

// Orders counts what was asked of the pool besides its properties.
type Orders struct {
	Resize int64 `json:"resize"` // grows with every resize asked for, from 1
	Stop   int64 `json:"stop"`   // the Resize that shall be stopped
}

// Identified is the pool's identities.
type Identified struct {
	Type string              `json:"type"` // "UserAssigned" or "None"
	IDs  map[string]Identity `json:"userAssignedIdentities,omitempty"`
}

// Properties are the properties of the pool resource.
type Properties struct {
	DisplayName         string          `json:"displayName,omitempty"`
	VMSize              string          `json:"vmSize"`
	Deployment          Deployment      `json:"deploymentConfiguration"`
	Scale               Scale           `json:"scaleSettings"`
	InterNode           string          `json:"interNodeCommunication"`
	TaskSlots           int             `json:"taskSlotsPerNode"`
	Scheduling          Scheduling      `json:"taskSchedulingPolicy"`
	Metadata            []Metadata      `json:"metadata,omitempty"`
	Network             json.RawMessage `json:"networkConfiguration,omitempty"`
	ApplicationLicenses []string        `json:"applicationLicenses,omitempty"`
	TargetCommunication string          `json:"targetNodeCommunicationMode,omitempty"` // since 2022-10-01
}

// Deployment holds the only deployment there is, virtual machines.
type Deployment struct {
	VM VirtualMachine `json:"virtualMachineConfiguration"`
}

// VirtualMachine describes the nodes. The raw parts are kept and given back;
// they say nothing to Keyfleet's providers.
type VirtualMachine struct {
	Image          Image           `json:"imageReference"`
	NodeAgentSKU   string          `json:"nodeAgentSkuId"`
	Extensions     []Extension     `json:"extensions,omitempty"`
	LicenseType    string          `json:"licenseType,omitempty"`
	DataDisks      json.RawMessage `json:"dataDisks,omitempty"`
	DiskEncryption json.RawMessage `json:"diskEncryptionConfiguration,omitempty"`
	Placement      json.RawMessage `json:"nodePlacementConfiguration,omitempty"`
	OSDisk         json.RawMessage `json:"osDisk,omitempty"` // since 2021-06-01
	Windows        json.RawMessage `json:"windowsConfiguration,omitempty"`
}

// Image names what the nodes run.
type Image struct {
	ID        string `json:"id,omitempty"`
	Publisher string `json:"publisher,omitempty"`
	Offer     string `json:"offer,omitempty"`
	SKU       string `json:"sku,omitempty"`
	Version   string `json:"version,omitempty"`
}

// Extension is a VM extension of the pool.
type Extension struct {
	Name                   string          `json:"name"`
	Publisher              string          `json:"publisher"`
	Type                   string          `json:"type"`
	TypeHandlerVersion     string          `json:"typeHandlerVersion,omitempty"`
	AutoUpgradeMinor       *bool           `json:"autoUpgradeMinorVersion,omitempty"`
	EnableAutomaticUpgrade *bool           `json:"enableAutomaticUpgrade,omitempty"` // since 2023-05-01
	Settings               json.RawMessage `json:"settings,omitempty"`               // as sent; only the handler interprets it
	Protected              Protected       `json:"protectedSettings,omitempty"`
	After                  []string        `json:"provisionAfterExtensions,omitempty"` // names of extensions that come first
}

// Is reports whether the extension is of the publisher and type, whatever the casing.
func (e Extension) Is(publisher, typ string) bool {
	return strings.EqualFold(e.Publisher, publisher) && strings.EqualFold(e.Type, typ)
}

// Scale is how many nodes there shall be.
type Scale struct {
	Fixed Fixed `json:"fixedScale"`
}

// Fixed is a number of nodes that somebody chose.
type Fixed struct {
	Dedicated     int    `json:"targetDedicatedNodes"`
	LowPriority   int    `json:"targetLowPriorityNodes"` // always 0: there are no spot nodes here
	ResizeTimeout string `json:"resizeTimeout"`          // ISO 8601, PT5M to P7D
	Deallocation  string `json:"nodeDeallocationOption,omitempty"`
}

// Scheduling says how tasks fill nodes; Keyfleet runs no tasks and keeps it.
type Scheduling struct {
	NodeFillType string `json:"nodeFillType"` // "Pack" or "Spread"
}

// Metadata is a name and a value.
type Metadata struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Defaults of the pool resource, as the Batch reference gives them.
const (
	defaultResizeTimeout = "PT15M"
	defaultInterNode     = "Disabled"
	defaultFillType      = "Spread"
	defaultTaskSlots     = 1
)

// FillDefaults sets what a request left out, so that a pool is stored as the
// resource is answered.
func (s *Spec) FillDefaults() {
	p := &s.Properties
	if s.Identity.Type == "" {
		s.Identity.Type = "None"
	}
	if p.InterNode == "" {
		p.InterNode = defaultInterNode
	}
	if p.TaskSlots == 0 {
		p.TaskSlots = defaultTaskSlots
	}
	if p.Scheduling.NodeFillType == "" {
		p.Scheduling.NodeFillType = defaultFillType
	}
	if p.Scale.Fixed.ResizeTimeout == "" {
		p.Scale.Fixed.ResizeTimeout = defaultResizeTimeout
	}
}

// OS is the operating system of the nodes: "windows" where the node agent or
// the image says so, else "linux".
func (s *Spec) OS() string {
	vm := s.Properties.Deployment.VM
	for _, w := range []string{vm.NodeAgentSKU, vm.Image.Offer, vm.Image.Publisher} {
		if strings.Contains(strings.ToLower(w), "windows") {
			return "windows"
		}
	}
	return "linux"
}

// Name is the pool's name in the casing of its creation.
func (s *Spec) Name() string {
	id, err := arm.ParseID(s.ID)
	if err != nil {
		return s.ID
	}
	return id.Name()
}

// Allocation states of a pool, as the management plane spells them.
const (
	Steady   = "Steady"
	Resizing = "Resizing"
	Stopping = "Stopping"
)

// Status is what was seen of a pool.
type Status struct {
	Allocation      string    `json:"allocation"` // Steady, Resizing, Stopping
	AllocationSince time.Time `json:"allocationSince"`
	Current         int       `json:"current"`            // nodes that their provider has
	Next            int       `json:"next"`               // number of the next node; never goes back
	Resize          *Resize   `json:"resize,omitempty"`   // the running resize, or the last one
	Findings        []Problem `json:"findings,omitempty"` // faults that depend on the state of the world, when last looked at
}

// Resize is one resize of a pool.
type Resize struct {
	Order   int64         `json:"order"`  // Orders.Resize that it carries out
	Target  int           `json:"target"` // dedicated nodes
	Timeout string        `json:"timeout"`
	Option  string        `json:"option,omitempty"`
	Started time.Time     `json:"started"`
	Ended   time.Time     `json:"ended,omitzero"`
	Errors  []ResizeError `json:"errors,omitempty"`
}

// ResizeError says why a resize did not reach its target. Codes are Batch's:
// AllocationFailed, AllocationTimedout, ResizeStopped, RemoveNodesFailed.
type ResizeError struct {
	Code    string         `json:"code"`
	Message string         `json:"message"`
	Details []fault.Detail `json:"details,omitempty"`
}

// AllocationState is the pool's allocation state: a resize that was asked for
// and not yet seen by the controller counts as running.
func AllocationState(p *Pool) string {
	if p.Spec.Orders.Resize != 0 && (p.Status.Resize == nil || p.Status.Resize.Order != p.Spec.Orders.Resize) {
		return Resizing
	}
	if p.Status.Allocation == "" {
		return Steady
	}
	if p.Status.Allocation == Resizing && p.Spec.Orders.Stop == p.Spec.Orders.Resize {
		return Stopping
	}
	return p.Status.Allocation
}

// poolID checks a resource id and returns it.
func poolID(id arm.ID) error {
	if !id.Is("Microsoft.Batch/batchAccounts/pools") || id.ResourceGroup == "" {
		return fault.New(fault.Invalid, "InvalidResourceID", "%q is not the id of a pool.", id.String())
	}
	if !validPoolName(id.Name()) {
		return fault.New(fault.Invalid, "InvalidResourceName", "The pool name %q is not valid: 1 to 64 letters, digits, hyphens and underscores are.", id.Name()).At("name")
	}
	return nil
}

func validPoolName(s string) bool {
	if len(s) < 1 || len(s) > 64 {
		return false
	}
	for _, c := range s {
		if c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

// get returns the pool of a store key, or the fault that Batch clients know.
func (f *Fleet) get(tx *store.Tx, key string) (*Pool, error) {
	p, err := Pools.Lookup(tx, strings.ToLower(key))
	if err != nil {
		return nil, err
	}
	if p == nil {
		return nil, fault.New(fault.NotFound, "PoolNotFound", "The pool %q does not exist.", key[strings.LastIndexByte(key, '/')+1:]).
			WithFix("list the pools: keyfleet pool list")
	}
	return p, nil
}

func poolBeingDeleted(p *Pool) error {
	return fault.New(fault.Conflict, "PoolBeingDeleted", "The pool %q is being deleted.", p.Spec.Name()).At(p.Spec.ID)
}

// nodeID is the id of the pool's n-th node: the pool's UID (32 hex digits) and
// six digits, the form of a Batch node's host name.
func nodeID(poolUID string, n int) string { return fmt.Sprintf("%s%06d", poolUID, n) }
