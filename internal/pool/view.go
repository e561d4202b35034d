package pool

import (
	"context"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Levels of an instance view status, as Batch numbers them.
const (
	LevelInfo    = 0
	LevelWarning = 1
	LevelError   = 2
)

// ExtensionView is an extension on a node: what was asked for and what is.
type ExtensionView struct {
	Extension    Extension
	Provisioning string // "Succeeded", "Failed", "Creating"
	Statuses     []ViewStatus
	SubStatuses  []ViewStatus
}

// ViewStatus is one status of an instance view.
type ViewStatus struct {
	Code    string // "ProvisioningState/succeeded", "ProvisioningState/failed/1007"
	Level   int
	Display string
	Message string
}

// instanceView turns the agent's last word about an extension into its
// instance view. No word yet is a view too: creating.
func instanceView(e Extension, x *node.ExtensionStatus) ExtensionView {
	v := ExtensionView{Extension: e}
	if x == nil {
		v.Provisioning = "Creating"
		v.Statuses = []ViewStatus{{Code: "ProvisioningState/creating", Display: "Creating", Message: "The node has not reported this extension yet."}}
		return v
	}
	st := ViewStatus{Message: x.Message}
	switch x.Status {
	case "success":
		v.Provisioning, st.Code, st.Display = "Succeeded", "ProvisioningState/succeeded", "Provisioning succeeded"
	case "warning":
		v.Provisioning, st.Code, st.Display, st.Level = "Succeeded", "ProvisioningState/succeeded", "Provisioning succeeded", LevelWarning
	case "error":
		v.Provisioning, st.Code, st.Display, st.Level = "Failed", "ProvisioningState/failed/"+strconv.Itoa(x.Code), "Provisioning failed", LevelError
		if x.Skipped != "" {
			st.Message = "Not started, because the extension " + strconv.Quote(x.Skipped) + ", which comes first, failed."
		}
		if len(x.Log) > 0 {
			st.Message += "\n" + strings.Join(x.Log, "\n")
		}
	default:
		v.Provisioning, st.Code, st.Display = "Creating", "ProvisioningState/transitioning", "Transitioning"
	}
	v.Statuses = []ViewStatus{st}
	for _, s := range x.Substatus {
		v.SubStatuses = append(v.SubStatuses, subStatus(s))
	}
	return v
}

func subStatus(s node.Substatus) ViewStatus {
	v := ViewStatus{Code: "ComponentStatus/" + s.Name + "/" + word(s.Status), Message: s.Message, Display: "Provisioning " + word(s.Status)}
	switch s.Status {
	case "error":
		v.Level = LevelError
	case "warning":
		v.Level = LevelWarning
	}
	return v
}

// word is a handler's status as instance views say it.
func word(status string) string {
	switch status {
	case "success", "warning":
		return "succeeded"
	case "error":
		return "failed"
	}
	return "transitioning"
}

// serviceExtension is the extension that the Batch service itself has on every
// node; in Keyfleet the agent does its work, so it is as well as the agent is.
func serviceExtension(n NodeView) ExtensionView {
	yes := true
	e := Extension{Name: reservedExtension, Publisher: "Microsoft.Azure.Extensions", Type: reservedType, TypeHandlerVersion: "2.0", AutoUpgradeMinor: &yes}
	if n.Status.Report == nil {
		return instanceView(e, nil)
	}
	return instanceView(e, &node.ExtensionStatus{Status: "success", Message: "The node agent " + n.Status.Report.Agent + " runs."})
}

// ListExtensions returns the extensions of a node, the service's own last.
func (f *Fleet) ListExtensions(ctx context.Context, pool arm.ID, id string) ([]ExtensionView, error) {
	tx, p, err := f.readPool(ctx, pool)
	if err != nil {
		return nil, err
	}
	n, err := f.node(tx, p, id)
	if err != nil {
		return nil, err
	}
	var out []ExtensionView
	for _, e := range p.Spec.Properties.Deployment.VM.Extensions {
		out = append(out, instanceView(e, statusOf(n.Status.Report, e.Name)))
	}
	return append(out, serviceExtension(f.view(p, n, f.cfg.Now()))), nil
}

// GetExtension returns an extension of a node by the name that the pool gave it.
func (f *Fleet) GetExtension(ctx context.Context, pool arm.ID, id, name string) (ExtensionView, error) {
	all, err := f.ListExtensions(ctx, pool, id)
	if err != nil {
		return ExtensionView{}, err
	}
	var names []string
	for _, v := range all {
		if strings.EqualFold(v.Extension.Name, name) {
			return v, nil
		}
		names = append(names, v.Extension.Name)
	}
	return ExtensionView{}, fault.New(fault.NotFound, "ExtensionNotFound", "The node has no extension %q; it has %s.", name, strings.Join(names, ", "))
}
