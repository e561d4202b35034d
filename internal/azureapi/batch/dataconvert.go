package batch

import (
	"maps"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/batch"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/pool"
)

const dataVMPath = "virtualMachineConfiguration"

// decodeDataPool turns the body of an add into a spec.
func decodeDataPool(w *batch.DataPool) (pool.Spec, []pool.Problem) {
	ps := refuse("", []member{
		{"startTask", w.StartTask, startTaskReason, startTaskFix},
		{"certificateReferences", w.CertificateReferences, certificatesReason, certificatesFix},
		{"autoScaleFormula", w.AutoScaleFormula, autoScaleReason, "write targetDedicatedNodes"},
		{"autoScaleEvaluationInterval", w.AutoScaleEvaluationInterval, autoScaleReason, "write targetDedicatedNodes"},
		{"cloudServiceConfiguration", w.CloudServiceConfiguration, cloudServiceReason, cloudServiceFix},
		{"applicationPackageReferences", w.ApplicationPackageReferences, "There are no application packages here.", "deliver programs in an image or by an extension"},
		{"userAccounts", w.UserAccounts, "Nodes get no further user accounts.", "create them in the image or by an extension"},
		{"mountConfiguration", w.MountConfiguration, "Nodes mount no file systems.", "mount them in the image or by an extension"},
	})
	if w.EnableAutoScale != nil && *w.EnableAutoScale {
		ps = append(ps, pool.Problem{Code: "InvalidPropertyValue", Path: "enableAutoScale", Reason: autoScaleReason, Fix: "write targetDedicatedNodes"})
	}
	if w.Identity != nil && len(w.Identity.UserAssignedIdentities) > 0 {
		ps = append(ps, pool.Problem{
			Code: "InvalidPropertyValue", Path: "identity", Reason: "On the data plane identities can be read, not set.",
			Fix: "create the pool on the management plane: keyfleet pool create, or PUT .../batchAccounts/A/pools/P",
		})
	}
	s := pool.Spec{Properties: pool.Properties{
		DisplayName: w.DisplayName, VMSize: w.VMSize, Metadata: decodeMetadata(w.Metadata), ApplicationLicenses: w.ApplicationLicenses,
		TargetCommunication: w.TargetNodeCommunicationMode,
	}}
	p := &s.Properties
	setRaw(&p.Network, w.NetworkConfiguration)
	if w.EnableInterNodeCommunication != nil && *w.EnableInterNodeCommunication {
		p.InterNode = "Enabled"
	}
	if w.TaskSchedulingPolicy != nil {
		p.Scheduling.NodeFillType = w.TaskSchedulingPolicy.NodeFillType
	}
	p.TaskSlots, p.Scale.Fixed.Dedicated, p.Scale.Fixed.LowPriority = number(w.TaskSlotsPerNode), number(w.TargetDedicatedNodes), number(w.TargetLowPriorityNodes)
	p.Scale.Fixed.ResizeTimeout = w.ResizeTimeout
	if w.VirtualMachineConfiguration != nil {
		var more []pool.Problem
		p.Deployment.VM, more = decodeDataVM(w.VirtualMachineConfiguration)
		ps = append(ps, more...)
	}
	return s, ps
}

func number(n *batch.Number) int {
	if n == nil {
		return 0
	}
	return int(*n)
}

func decodeDataVM(w *batch.DataVirtualMachineConfiguration) (pool.VirtualMachine, []pool.Problem) {
	ps := refuse(dataVMPath+".", []member{{"containerConfiguration", w.ContainerConfiguration, "Nodes run no containers.", "remove it"}})
	ps = append(ps, misplaced(dataVMPath, w.Extensions)...)
	vm := pool.VirtualMachine{NodeAgentSKU: w.NodeAgentSKUID, LicenseType: w.LicenseType, Extensions: decodeExtensions(w.Extensions)}
	if i := w.ImageReference; i != nil {
		vm.Image = pool.Image{ID: i.VirtualMachineImageID, Publisher: i.Publisher, Offer: i.Offer, SKU: i.SKU, Version: i.Version}
	}
	setRaw(&vm.DataDisks, w.DataDisks)
	setRaw(&vm.DiskEncryption, w.DiskEncryptionConfiguration)
	setRaw(&vm.Placement, w.NodePlacementConfiguration)
	setRaw(&vm.OSDisk, w.OSDisk)
	setRaw(&vm.Windows, w.WindowsConfiguration)
	return vm, ps
}

// mergePatch lays a data-plane PATCH over a spec.
func mergePatch(s pool.Spec, w *batch.PoolPatch) (pool.Spec, []pool.Problem) {
	ps := refuse("", []member{
		{"startTask", w.StartTask, startTaskReason, startTaskFix},
		{"certificateReferences", w.CertificateReferences, certificatesReason, certificatesFix},
		{"applicationPackageReferences", w.ApplicationPackageReferences, "There are no application packages here.", "deliver programs in an image or by an extension"},
	})
	if w.DisplayName != nil {
		s.Properties.DisplayName = *w.DisplayName
	}
	if w.TargetNodeCommunicationMode != nil {
		s.Properties.TargetCommunication = *w.TargetNodeCommunicationMode
	}
	if w.Metadata != nil {
		s.Properties.Metadata = decodeMetadata(w.Metadata)
	}
	return s, ps
}

// encodeDataPool renders a pool for the data plane.
func (e *edge) encodeDataPool(r *azureapi.Request, p *pool.Pool) *batch.DataPool {
	s := &p.Spec.Properties
	num := func(i int) *batch.Number { n := batch.Number(i); return &n }
	no, inter := false, strings.EqualFold(s.InterNode, "Enabled")
	w := &batch.DataPool{
		ID: p.Spec.Name(), DisplayName: s.DisplayName, URL: r.BaseURL() + "/pools/" + p.Spec.Name(), ETag: e.cfg.Fleet.ETag(p),
		LastModified: when(p.Changed), CreationTime: when(p.Created), State: "active", StateTransitionTime: when(p.Created),
		AllocationState: strings.ToLower(pool.AllocationState(p)), AllocationStateTransitionTime: when(p.Status.AllocationSince),
		VMSize: s.VMSize, VirtualMachineConfiguration: encodeDataVM(s.Deployment.VM), ResizeTimeout: s.Scale.Fixed.ResizeTimeout,
		CurrentDedicatedNodes: num(p.Status.Current), CurrentLowPriorityNodes: num(0),
		TargetDedicatedNodes: num(s.Scale.Fixed.Dedicated), TargetLowPriorityNodes: num(s.Scale.Fixed.LowPriority),
		EnableAutoScale: &no, EnableInterNodeCommunication: &inter, TaskSlotsPerNode: num(s.TaskSlots),
		TaskSchedulingPolicy: &batch.TaskSchedulingPolicy{NodeFillType: s.Scheduling.NodeFillType},
		ApplicationLicenses:  s.ApplicationLicenses, NetworkConfiguration: s.Network, Identity: encodeDataIdentity(p.Spec.Identity),
	}
	if r.Version >= "2022-10-01.16.0" {
		w.TargetNodeCommunicationMode, w.CurrentNodeCommunicationMode = s.TargetCommunication, "simplified"
	}
	if !p.Deleting.IsZero() {
		w.State, w.StateTransitionTime = "deleting", when(p.Deleting)
	}
	for _, m := range s.Metadata {
		w.Metadata = append(w.Metadata, batch.MetadataItem(m))
	}
	if p.Status.Resize != nil {
		for _, x := range p.Status.Resize.Errors {
			out := batch.DataResizeError{Code: x.Code, Message: x.Message}
			for _, d := range x.Details {
				out.Values = append(out.Values, batch.NameValue{Name: d.Code, Value: targeted(d)})
			}
			w.ResizeErrors = append(w.ResizeErrors, out)
		}
	}
	return w
}

func encodeDataVM(vm pool.VirtualMachine) *batch.DataVirtualMachineConfiguration {
	return &batch.DataVirtualMachineConfiguration{
		ImageReference: &batch.DataImageReference{
			Publisher: vm.Image.Publisher, Offer: vm.Image.Offer, SKU: vm.Image.SKU, Version: vm.Image.Version, VirtualMachineImageID: vm.Image.ID,
		},
		NodeAgentSKUID: vm.NodeAgentSKU, LicenseType: vm.LicenseType, Extensions: encodeExtensions(vm.Extensions),
		DataDisks: vm.DataDisks, DiskEncryptionConfiguration: vm.DiskEncryption, NodePlacementConfiguration: vm.Placement,
		OSDisk: vm.OSDisk, WindowsConfiguration: vm.Windows,
	}
}

func encodeDataIdentity(id pool.Identified) *batch.DataIdentity {
	if len(id.IDs) == 0 {
		return nil
	}
	out := &batch.DataIdentity{Type: "UserAssigned"}
	for _, key := range slices.Sorted(maps.Keys(id.IDs)) {
		out.UserAssignedIdentities = append(out.UserAssignedIdentities, batch.DataUserAssignedIdentity{ResourceID: key, ClientID: id.IDs[key].ClientID, PrincipalID: id.IDs[key].ObjectID})
	}
	return out
}
