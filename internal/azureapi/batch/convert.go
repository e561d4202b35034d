package batch

import (
	"encoding/json"
	"maps"
	"time"

	"keyfleet.dev/keyfleet/api/batch"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
)

// mergePool lays what a body says over a spec. Members that are absent leave
// the spec as it is.
func mergePool(s *pool.Spec, w *batch.Pool) {
	if w.Identity != nil {
		s.Identity = pool.Identified{Type: w.Identity.Type}
		for id := range w.Identity.UserAssignedIdentities {
			if s.Identity.IDs == nil {
				s.Identity.IDs = map[string]pool.Identity{}
			}
			s.Identity.IDs[id] = pool.Identity{}
		}
	}
	w2 := w.Properties
	if w2 == nil {
		return
	}
	p := &s.Properties
	set(&p.DisplayName, w2.DisplayName)
	set(&p.VMSize, w2.VMSize)
	set(&p.InterNode, w2.InterNodeCommunication)
	set(&p.TaskSlots, w2.TaskSlotsPerNode)
	set(&p.TargetCommunication, w2.TargetNodeCommunicationMode)
	setRaw(&p.Network, w2.NetworkConfiguration)
	if w2.TaskSchedulingPolicy != nil {
		p.Scheduling.NodeFillType = w2.TaskSchedulingPolicy.NodeFillType
	}
	if w2.Metadata != nil {
		p.Metadata = decodeMetadata(w2.Metadata)
	}
	if w2.ApplicationLicenses != nil {
		p.ApplicationLicenses = w2.ApplicationLicenses
	}
	if d := w2.DeploymentConfiguration; d != nil && d.VirtualMachineConfiguration != nil {
		p.Deployment.VM = decodeVM(d.VirtualMachineConfiguration)
	}
	if w2.ScaleSettings != nil && w2.ScaleSettings.FixedScale != nil {
		p.Scale.Fixed = decodeFixed(w2.ScaleSettings.FixedScale)
	}
}

func set[T comparable](to *T, from T) {
	var zero T
	if from != zero {
		*to = from
	}
}

func setRaw(to *json.RawMessage, from json.RawMessage) {
	if said(from) {
		*to = from
	}
}

func decodeMetadata(items []batch.MetadataItem) []pool.Metadata {
	var out []pool.Metadata
	for _, m := range items {
		out = append(out, pool.Metadata(m))
	}
	return out
}

func decodeFixed(w *batch.FixedScale) pool.Fixed {
	f := pool.Fixed{ResizeTimeout: w.ResizeTimeout, Deallocation: w.NodeDeallocationOption}
	if w.TargetDedicatedNodes != nil {
		f.Dedicated = *w.TargetDedicatedNodes
	}
	if w.TargetLowPriorityNodes != nil {
		f.LowPriority = *w.TargetLowPriorityNodes
	}
	return f
}

func decodeVM(w *batch.VirtualMachineConfiguration) pool.VirtualMachine {
	vm := pool.VirtualMachine{NodeAgentSKU: w.NodeAgentSkuID, LicenseType: w.LicenseType, Extensions: decodeExtensions(w.Extensions)}
	if w.ImageReference != nil {
		vm.Image = pool.Image(*w.ImageReference)
	}
	setRaw(&vm.DataDisks, w.DataDisks)
	setRaw(&vm.DiskEncryption, w.DiskEncryptionConfiguration)
	setRaw(&vm.Placement, w.NodePlacementConfiguration)
	setRaw(&vm.OSDisk, w.OSDisk)
	setRaw(&vm.Windows, w.WindowsConfiguration)
	return vm
}

func decodeExtensions(all []batch.VMExtension) []pool.Extension {
	var out []pool.Extension
	for _, w := range all {
		e := pool.Extension{
			Name: w.Name, Publisher: w.Publisher, Type: w.Type, TypeHandlerVersion: w.TypeHandlerVersion,
			AutoUpgradeMinor: w.AutoUpgradeMinorVersion, EnableAutomaticUpgrade: w.EnableAutomaticUpgrade, After: w.ProvisionAfterExtensions,
		}
		if string(w.Settings) != "null" {
			e.Settings = w.Settings
		}
		if p := pool.Protected(w.ProtectedSettings); !p.Empty() {
			e.Protected = p
		}
		out = append(out, e)
	}
	return out
}

// encodePool renders a pool with all members that the newest version has.
func encodePool(p *pool.Pool, etag string) *batch.Pool {
	s := &p.Spec
	w := &batch.Pool{
		ID: s.ID, Name: s.Name(), Type: "Microsoft.Batch/batchAccounts/pools", Etag: `W/"` + etag + `"`,
		Properties: encodeProperties(&s.Properties),
	}
	if len(s.Identity.IDs) > 0 {
		w.Identity = &batch.PoolIdentity{Type: s.Identity.Type, UserAssignedIdentities: map[string]batch.UserAssignedIdentity{}}
		for key, id := range maps.All(s.Identity.IDs) {
			w.Identity.UserAssignedIdentities[key] = batch.UserAssignedIdentity{ClientID: id.ClientID, PrincipalID: id.ObjectID}
		}
	}
	encodeStatus(w.Properties, p)
	return w
}

func encodeProperties(p *pool.Properties) *batch.PoolProperties {
	w := &batch.PoolProperties{
		DisplayName: p.DisplayName, VMSize: p.VMSize, InterNodeCommunication: p.InterNode, TaskSlotsPerNode: p.TaskSlots,
		TaskSchedulingPolicy: &batch.TaskSchedulingPolicy{NodeFillType: p.Scheduling.NodeFillType},
		NetworkConfiguration: p.Network, ApplicationLicenses: p.ApplicationLicenses,
		TargetNodeCommunicationMode: p.TargetCommunication,
		DeploymentConfiguration:     &batch.DeploymentConfiguration{VirtualMachineConfiguration: encodeVM(p.Deployment.VM)},
	}
	for _, m := range p.Metadata {
		w.Metadata = append(w.Metadata, batch.MetadataItem(m))
	}
	x := p.Scale.Fixed
	w.ScaleSettings = &batch.ScaleSettings{FixedScale: &batch.FixedScale{
		TargetDedicatedNodes: &x.Dedicated, TargetLowPriorityNodes: &x.LowPriority, ResizeTimeout: x.ResizeTimeout, NodeDeallocationOption: x.Deallocation,
	}}
	return w
}

func encodeVM(vm pool.VirtualMachine) *batch.VirtualMachineConfiguration {
	w := &batch.VirtualMachineConfiguration{
		NodeAgentSkuID: vm.NodeAgentSKU, LicenseType: vm.LicenseType, Extensions: encodeExtensions(vm.Extensions),
		DataDisks: vm.DataDisks, DiskEncryptionConfiguration: vm.DiskEncryption, NodePlacementConfiguration: vm.Placement,
		OSDisk: vm.OSDisk, WindowsConfiguration: vm.Windows,
	}
	if vm.Image != (pool.Image{}) {
		image := batch.ImageReference(vm.Image)
		w.ImageReference = &image
	}
	return w
}

// encodeExtensions leaves protected settings out: they are written, never read.
func encodeExtensions(all []pool.Extension) []batch.VMExtension {
	var out []batch.VMExtension
	for _, e := range all {
		out = append(out, batch.VMExtension{
			Name: e.Name, Publisher: e.Publisher, Type: e.Type, TypeHandlerVersion: e.TypeHandlerVersion,
			AutoUpgradeMinorVersion: e.AutoUpgradeMinor, EnableAutomaticUpgrade: e.EnableAutomaticUpgrade,
			Settings: e.Settings, ProvisionAfterExtensions: e.After,
		})
	}
	return out
}

// encodeStatus fills in the read-only members.
func encodeStatus(w *batch.PoolProperties, p *pool.Pool) {
	zero := 0
	w.CreationTime, w.LastModified = when(p.Created), when(p.Changed)
	w.ProvisioningState, w.ProvisioningStateTransitionTime = "Succeeded", when(p.Created)
	if !p.Deleting.IsZero() {
		w.ProvisioningState, w.ProvisioningStateTransitionTime = "Deleting", when(p.Deleting)
	}
	w.AllocationState, w.AllocationStateTransitionTime = pool.AllocationState(p), when(p.Status.AllocationSince)
	w.CurrentDedicatedNodes, w.CurrentLowPriorityNodes = &p.Status.Current, &zero
	w.CurrentNodeCommunicationMode = "Simplified"
	if r := p.Status.Resize; r != nil {
		w.ResizeOperationStatus = &batch.ResizeOperationStatus{
			TargetDedicatedNodes: &r.Target, TargetLowPriorityNodes: &zero, ResizeTimeout: r.Timeout, NodeDeallocationOption: r.Option,
			StartTime: when(r.Started), Errors: encodeResizeErrors(r.Errors),
		}
	}
}

func encodeResizeErrors(errs []pool.ResizeError) []batch.ResizeError {
	var out []batch.ResizeError
	for _, e := range errs {
		w := batch.ResizeError{Code: e.Code, Message: e.Message}
		for _, d := range e.Details {
			w.Details = append(w.Details, batch.ResizeError{Code: d.Code, Message: targeted(d)})
		}
		out = append(out, w)
	}
	return out
}

func targeted(d fault.Detail) string {
	if d.Target == "" {
		return d.Message
	}
	return d.Target + ": " + d.Message
}

// when is a time as answered; nil for no time.
func when(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	u := t.UTC()
	return &u
}
