package batch

import (
	"encoding/json"
	"fmt"
	"strings"

	"keyfleet.dev/keyfleet/api/batch"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
	"keyfleet.dev/keyfleet/internal/pool"
)

// version is the pool resource as clients of one api-version see it. The hub
// is pool.Spec; a member that the version does not have is refused in requests,
// kept as it is in updates, and left out of answers.
type version struct {
	date                   string
	osDisk                 bool // virtualMachineConfiguration.osDisk
	communicationMode      bool // targetNodeCommunicationMode, currentNodeCommunicationMode
	enableAutomaticUpgrade bool // extensions[].enableAutomaticUpgrade
}

// versions is the registry of the management plane, oldest first.
func versions() []version {
	return []version{
		{date: "2021-01-01"},
		{date: "2021-06-01", osDisk: true},
		{date: "2022-01-01", osDisk: true},
		{date: "2022-10-01", osDisk: true, communicationMode: true},
		{date: "2023-05-01", osDisk: true, communicationMode: true, enableAutomaticUpgrade: true},
	}
}

// dates lists the api-versions of the management plane.
func dates() []string {
	var out []string
	for _, v := range versions() {
		out = append(out, v.date)
	}
	return out
}

// versionOf returns a version; the newest for "" (Keyfleet's own routes).
func versionOf(date string) version {
	all := versions()
	for _, v := range all {
		if v.date == date {
			return v
		}
	}
	return all[len(all)-1]
}

// Decode reads a pool body onto the hub. With patch, members that are not there
// keep what old has; else they are the defaults. What the version cannot say
// keeps what old has in both cases. old is nil for a new pool.
func (v version) Decode(body []byte, old *pool.Spec, patch bool) (pool.Spec, []pool.Problem, error) {
	var w batch.Pool
	if err := jsonstrict.Decode(body, &w); err != nil {
		return pool.Spec{}, nil, err
	}
	problems := append(v.unknownMembers(&w), notOffered(&w)...)
	var s pool.Spec
	if patch && old != nil {
		s = *old
	}
	mergePool(&s, &w)
	v.keep(&s, old)
	return s, problems, nil
}

// Encode renders a pool as answered to this version.
func (v version) Encode(p *pool.Pool, etag string) *batch.Pool {
	w := encodePool(p, etag)
	if !v.communicationMode {
		w.Properties.TargetNodeCommunicationMode, w.Properties.CurrentNodeCommunicationMode = "", ""
	}
	vm := w.Properties.DeploymentConfiguration.VirtualMachineConfiguration
	if !v.osDisk {
		vm.OSDisk = nil
	}
	if !v.enableAutomaticUpgrade {
		for i := range vm.Extensions {
			vm.Extensions[i].EnableAutomaticUpgrade = nil
		}
	}
	return w
}

// Example is a request body of this version, for documents and tests: the
// documented one for Linux, with what the version adds.
func (v version) Example() string {
	var more, disk, upgrade string
	if v.communicationMode {
		more = `"targetNodeCommunicationMode": "Simplified",`
	}
	if v.osDisk {
		disk = `"osDisk": {"ephemeralOSDiskSettings": {"placement": "CacheDisk"}},`
	}
	if v.enableAutomaticUpgrade {
		upgrade = `"enableAutomaticUpgrade": false,`
	}
	return fmt.Sprintf(`{
  "properties": {
    "vmSize": "STANDARD_DS2_V2", %s
    "deploymentConfiguration": {"virtualMachineConfiguration": {
      "imageReference": {"publisher": "canonical", "offer": "ubuntuserver", "sku": "20.04-lts", "version": "latest"}, %s
      "nodeAgentSkuId": "batch.node.ubuntu 20.04",
      "extensions": [{"name": "KVExtensions", "publisher": "Microsoft.Azure.KeyVault", "type": "KeyVaultForLinux", "typeHandlerVersion": "3.0", %s
        "autoUpgradeMinorVersion": true,
        "settings": {"secretsManagementSettings": {"observedCertificates": ["https://prod1.vault.keyfleet.internal/secrets/web"]}}}]
    }},
    "scaleSettings": {"fixedScale": {"targetDedicatedNodes": 3, "resizeTimeout": "PT15M"}}
  },
  "identity": {"type": "UserAssigned", "userAssignedIdentities": {
    "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/nodes": {}}}
}`, more, disk, upgrade)
}

// unknownMembers are the members of a body that only later versions have.
func (v version) unknownMembers(w *batch.Pool) []pool.Problem {
	var ps []pool.Problem
	later := func(path, since string) {
		ps = append(ps, pool.Problem{
			Code: "InvalidRequestBody", Path: path, Reason: fmt.Sprintf("api-version %s has no such property.", v.date),
			Fix: "use api-version " + since + " or later, or remove it",
		})
	}
	p := w.Properties
	if p == nil {
		return nil
	}
	if !v.communicationMode && p.TargetNodeCommunicationMode != "" {
		later("properties.targetNodeCommunicationMode", "2022-10-01")
	}
	if p.DeploymentConfiguration == nil || p.DeploymentConfiguration.VirtualMachineConfiguration == nil {
		return ps
	}
	vm := p.DeploymentConfiguration.VirtualMachineConfiguration
	if !v.osDisk && said(vm.OSDisk) {
		later(vmPath+".osDisk", "2021-06-01")
	}
	for i, e := range vm.Extensions {
		if !v.enableAutomaticUpgrade && e.EnableAutomaticUpgrade != nil {
			later(fmt.Sprintf("%s.extensions[%d].enableAutomaticUpgrade", vmPath, i), "2023-05-01")
		}
	}
	return ps
}

// keep carries over what this version cannot say.
func (v version) keep(s, old *pool.Spec) {
	if old == nil {
		return
	}
	if !v.communicationMode {
		s.Properties.TargetCommunication = old.Properties.TargetCommunication
	}
	vm, was := &s.Properties.Deployment.VM, old.Properties.Deployment.VM
	if !v.osDisk {
		vm.OSDisk = was.OSDisk
	}
	if v.enableAutomaticUpgrade {
		return
	}
	for i := range vm.Extensions {
		for _, o := range was.Extensions {
			if strings.EqualFold(o.Name, vm.Extensions[i].Name) {
				vm.Extensions[i].EnableAutomaticUpgrade = o.EnableAutomaticUpgrade
			}
		}
	}
}

const vmPath = "properties.deploymentConfiguration.virtualMachineConfiguration"

// said reports whether a raw member says anything: null, "", {}, [] do not.
func said(raw json.RawMessage) bool {
	switch strings.Join(strings.Fields(string(raw)), "") {
	case "", "null", `""`, "{}", "[]":
		return false
	}
	return true
}

// notOffered are the members of a body that the Batch service has and Keyfleet
// does not.
func notOffered(w *batch.Pool) []pool.Problem {
	if w.Properties == nil {
		return nil
	}
	p := w.Properties
	ps := refuse("properties.", []member{
		{"startTask", p.StartTask, startTaskReason, startTaskFix},
		{"certificates", p.Certificates, certificatesReason, certificatesFix},
		{"applicationPackages", p.ApplicationPackages, "There are no application packages here.", "deliver programs in an image or by an extension"},
		{"userAccounts", p.UserAccounts, "Nodes get no further user accounts.", "create them in the image or by an extension"},
		{"mountConfiguration", p.MountConfiguration, "Nodes mount no file systems.", "mount them in the image or by an extension"},
	})
	if p.ScaleSettings != nil {
		ps = append(ps, refuse("properties.scaleSettings.", []member{{"autoScale", p.ScaleSettings.AutoScale, autoScaleReason, autoScaleFix}})...)
	}
	d := p.DeploymentConfiguration
	if d == nil {
		return ps
	}
	ps = append(ps, refuse("properties.deploymentConfiguration.", []member{{"cloudServiceConfiguration", d.CloudServiceConfiguration, cloudServiceReason, cloudServiceFix}})...)
	if vm := d.VirtualMachineConfiguration; vm != nil {
		ps = append(ps, refuse(vmPath+".", []member{{"containerConfiguration", vm.ContainerConfiguration, "Nodes run no containers.", "remove it"}})...)
		ps = append(ps, misplaced(vmPath, vm.Extensions)...)
	}
	return ps
}

const (
	startTaskReason    = "Nodes run no start task."
	startTaskFix       = "do it in the image, or write an extension and let an administrator add its type: keyfleet extension type add PUBLISHER TYPE"
	certificatesReason = "Batch certificates are retired, in Azure as well."
	certificatesFix    = "deliver certificates with the Key Vault extension (Microsoft.Azure.KeyVault/KeyVaultForLinux)"
	autoScaleReason    = "Pools have a fixed scale here; autoscale formulas are not evaluated."
	autoScaleFix       = "write scaleSettings.fixedScale with targetDedicatedNodes"
	cloudServiceReason = "Pools use virtualMachineConfiguration only; cloud services are retired, and extensions need virtual machines."
	cloudServiceFix    = "describe the nodes in virtualMachineConfiguration"
)

type member struct {
	name        string
	raw         json.RawMessage
	reason, fix string
}

func refuse(prefix string, members []member) []pool.Problem {
	var ps []pool.Problem
	for _, m := range members {
		if said(m.raw) {
			ps = append(ps, pool.Problem{Code: "InvalidPropertyValue", Path: prefix + m.name, Reason: m.reason, Fix: m.fix})
		}
	}
	return ps
}

// misplaced finds authenticationSettings beside settings instead of inside.
func misplaced(prefix string, all []batch.VMExtension) []pool.Problem {
	var ps []pool.Problem
	for i, e := range all {
		if e.AuthenticationSettings != nil {
			ps = append(ps, pool.Problem{
				Code: "InvalidPropertyValue", Path: fmt.Sprintf("%s.extensions[%d].authenticationSettings", prefix, i),
				Reason: "authenticationSettings stands beside settings, where the extension does not see it.",
				Fix:    "move it into settings, beside secretsManagementSettings",
			})
		}
	}
	return ps
}
