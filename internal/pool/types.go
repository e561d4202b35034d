package pool

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// ExtensionType is a pair of publisher and type that a pool may name.
type ExtensionType struct {
	Publisher string `json:"publisher"`
	Type      string `json:"type"`
	OS        string `json:"os,omitempty"` // "linux", "windows"; empty: both
	BuiltIn   bool   `json:"-"`            // one of Batch's own list
}

// extensionTypes holds what administrators added. Ids are "PUBLISHER/TYPE" in lower case.
var extensionTypes = store.NewCollection[ExtensionType, struct{}]("extensiontypes")

// BatchTypes lists the pairs that the Batch page on extensions names.
func BatchTypes() []ExtensionType {
	return []ExtensionType{
		{"Microsoft.Azure.Diagnostics", "IaaSDiagnostics", "windows", true},
		{keyVaultPublisher, "KeyVaultForLinux", "linux", true},
		{keyVaultPublisher, "KeyVaultForWindows", "windows", true},
		{"Microsoft.Azure.Security", "IaaSAntimalware", "windows", true},
		{"Microsoft.EnterpriseCloud.Monitoring", "MicrosoftMonitoringAgent", "windows", true},
		{"Microsoft.EnterpriseCloud.Monitoring", "OmsAgentForLinux", "linux", true},
		{"Microsoft.HpcCompute", "AmdGpuDriverWindows", "windows", true},
		{"Microsoft.HpcCompute", "NvidiaGpuDriverLinux", "linux", true},
		{"Microsoft.HpcCompute", "NvidiaGpuDriverWindows", "windows", true},
		{"Microsoft.Powershell", "DSC", "windows", true},
	}
}

// The service's own extension. Batch installs it on every node for start
// tasks, which is why CustomScript is reserved.
const (
	reservedType      = "CustomScript"
	reservedExtension = "batchNodeExtension"
)

// reserved reports whether the type is CustomScript under one of its names.
func reserved(publisher, typ string) bool {
	switch strings.ToLower(typ) {
	case "customscript", "customscriptforlinux", "customscriptextension":
		return true
	}
	return strings.EqualFold(publisher, "Microsoft.Azure.Extensions") && strings.EqualFold(typ, reservedType)
}

var typeNameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$`)

// knownTypes returns Batch's list and the administrators' additions, by name.
func knownTypes(tx *store.Tx) ([]ExtensionType, error) {
	added, err := extensionTypes.List(tx, "")
	if err != nil {
		return nil, err
	}
	all := BatchTypes()
	for _, o := range added {
		all = append(all, o.Spec)
	}
	slices.SortFunc(all, func(a, b ExtensionType) int {
		return strings.Compare(strings.ToLower(a.Publisher+"/"+a.Type), strings.ToLower(b.Publisher+"/"+b.Type))
	})
	return all, nil
}

// ExtensionTypes lists the types that pools may name.
func (f *Fleet) ExtensionTypes(ctx context.Context) ([]ExtensionType, error) {
	if err := f.cfg.Gate.Read(ctx, access.Op{Action: "Keyfleet/extensiontypes/read", Resource: "/keyfleet/v1/extensiontypes"}); err != nil {
		return nil, err
	}
	return knownTypes(f.cfg.Store.View(ctx))
}

// AddExtensionType lets pools name a further publisher and type. Adding it
// again changes its operating system.
func (f *Fleet) AddExtensionType(ctx context.Context, t ExtensionType) error {
	switch {
	case !typeNameForm.MatchString(t.Publisher) || !typeNameForm.MatchString(t.Type):
		return fault.New(fault.Invalid, "InvalidPropertyValue", "Publisher and type consist of 1 to 127 letters, digits, dots, hyphens and underscores.").At("publisher")
	case t.OS != "" && t.OS != "linux" && t.OS != "windows":
		return fault.New(fault.Invalid, "InvalidPropertyValue", "The operating system %q is neither linux nor windows.", t.OS).At("os")
	case reserved(t.Publisher, t.Type):
		return fault.New(fault.Invalid, "InvalidPropertyValue", "CustomScript is reserved for the Batch service.").At("type")
	}
	key := strings.ToLower(t.Publisher + "/" + t.Type)
	op := access.Op{Action: "Keyfleet/extensiontypes/write", Resource: "/keyfleet/v1/extensiontypes/" + key}
	return f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		for _, b := range BatchTypes() {
			if strings.EqualFold(b.Publisher, t.Publisher) && strings.EqualFold(b.Type, t.Type) {
				return nil // known already
			}
		}
		o, err := extensionTypes.Lookup(tx, key)
		if err != nil {
			return err
		}
		if o == nil {
			o = &store.Object[ExtensionType, struct{}]{Spec: t}
			o.ID = key
			return extensionTypes.Insert(tx, o)
		}
		o.Spec = t
		return extensionTypes.Put(tx, o)
	})
}

// RemoveExtensionType takes an added type away; pools that have it keep it.
func (f *Fleet) RemoveExtensionType(ctx context.Context, publisher, typ string) error {
	key := strings.ToLower(publisher + "/" + typ)
	op := access.Op{Action: "Keyfleet/extensiontypes/delete", Resource: "/keyfleet/v1/extensiontypes/" + key}
	return f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error { return extensionTypes.Delete(tx, key) })
}

// unknownType says which types there are and how to add one.
func unknownType(path string, e Extension, known []ExtensionType) Problem {
	var names []string
	for _, t := range known {
		names = append(names, t.Publisher+"/"+t.Type)
	}
	return Problem{
		Code: "InvalidPropertyValue", Path: path,
		Reason: fmt.Sprintf("The extension type %s/%s is not known here. Known are: %s.", e.Publisher, e.Type, strings.Join(names, ", ")),
		Fix:    fmt.Sprintf("use one of these, or let an administrator add it: keyfleet extension type add %s %s", e.Publisher, e.Type),
	}
}
