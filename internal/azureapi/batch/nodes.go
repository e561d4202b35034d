package batch

import (
	"bytes"
	"encoding/json"
	"net/http"

	"keyfleet.dev/keyfleet/api/batch"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/pool"
)

func encodeNode(r *azureapi.Request, poolName string, v pool.NodeView) *batch.Node {
	w := &batch.Node{
		ID: v.ID, URL: r.BaseURL() + "/pools/" + poolName + "/nodes/" + v.ID, State: v.State, SchedulingState: "enabled",
		StateTransitionTime: when(v.Since), AllocationTime: when(v.Status.Allocated), AffinityID: "TVM:" + v.ID,
		VMSize: v.Spec.VMSize, IsDedicated: true,
	}
	if v.Spec.Disabled {
		w.SchedulingState = "disabled"
	}
	if rep := v.Status.Report; rep != nil {
		w.LastBootTime = when(rep.Booted)
		w.NodeAgentInfo = &batch.NodeAgentInfo{Version: rep.Agent, LastUpdateTime: when(v.Status.Enrolled)}
	}
	for _, x := range v.Errors {
		e := batch.NodeError{Code: x.Code, Message: x.Message}
		for _, d := range x.Details {
			e.ErrorDetails = append(e.ErrorDetails, batch.NameValue{Name: d.Code, Value: d.Message})
		}
		w.Errors = append(w.Errors, e)
	}
	return w
}

func (e *edge) listNodes(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	all, err := fleet.ListNodes(ctx, id)
	if err != nil {
		return nil, err
	}
	p, err := cut(r, all, func(v pool.NodeView) string { return v.ID })
	if err != nil {
		return nil, err
	}
	out := batch.DataList[*batch.Node]{OData: metadata(r, "nodes"), Value: []*batch.Node{}, NextLink: nextLink(r, p.next)}
	for _, v := range p.items {
		out.Value = append(out.Value, encodeNode(r, id.Name(), v))
	}
	return azureapi.OK(out), nil
}

func (e *edge) getNode(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	v, err := fleet.GetNode(ctx, id, r.Param("node"))
	if err != nil {
		return nil, err
	}
	w := encodeNode(r, id.Name(), v)
	w.OData = metadata(r, "nodes/@Element")
	return azureapi.OK(w), nil
}

// orderNode answers a reboot or reimage with 202.
func (e *edge) orderNode(kind string) func(*azureapi.Request) (*azureapi.Reply, error) {
	return func(r *azureapi.Request) (*azureapi.Reply, error) {
		fleet, ctx := e.fleet(r)
		id, err := e.dataPool(r)
		if err != nil {
			return nil, err
		}
		var w batch.NodeActionRequest
		if err := decodeBody(r, &w); err != nil {
			return nil, err
		}
		if err := fleet.OrderNode(ctx, id, r.Param("node"), kind); err != nil {
			return nil, err
		}
		return azureapi.Status(http.StatusAccepted), nil
	}
}

func (e *edge) schedule(on bool) func(*azureapi.Request) (*azureapi.Reply, error) {
	return func(r *azureapi.Request) (*azureapi.Reply, error) {
		fleet, ctx := e.fleet(r)
		id, err := e.dataPool(r)
		if err != nil {
			return nil, err
		}
		var w batch.NodeActionRequest
		if err := decodeBody(r, &w); err != nil {
			return nil, err
		}
		if err := fleet.SetScheduling(ctx, id, r.Param("node"), on); err != nil {
			return nil, err
		}
		return azureapi.Status(http.StatusOK), nil
	}
}

// encodeExtension renders an extension on a node. With the documented
// api-version it has the members of the documented answer and no others; later
// versions add provisioningState and subStatuses, as the service does.
func encodeExtension(version string, v pool.ExtensionView) *batch.NodeExtension {
	x := v.Extension
	w := &batch.NodeExtension{
		ProvisioningState: v.Provisioning,
		InstanceView:      &batch.InstanceView{Name: x.Name, Statuses: encodeStatuses(v.Statuses), SubStatuses: encodeStatuses(v.SubStatuses)},
		VMExtension: &batch.NodeVMExtension{
			Name: x.Name, Publisher: x.Publisher, Type: x.Type, TypeHandlerVersion: x.TypeHandlerVersion,
			AutoUpgradeMinorVersion: x.AutoUpgradeMinor != nil && *x.AutoUpgradeMinor, Settings: settingsText(x.Settings),
			ProvisionAfterExtensions: x.After,
		},
	}
	if version == documented {
		w.ProvisioningState, w.InstanceView.SubStatuses, w.VMExtension.ProvisionAfterExtensions = "", nil, nil
	}
	return w
}

func encodeStatuses(all []pool.ViewStatus) []batch.InstanceViewStatus {
	var out []batch.InstanceViewStatus
	for _, s := range all {
		out = append(out, batch.InstanceViewStatus{Code: s.Code, Level: s.Level, DisplayStatus: s.Display, Message: s.Message})
	}
	return out
}

// settingsText is the settings as the data plane has them: the text of a JSON
// document in a string, indented by two, lines ending in CR LF.
func settingsText(raw json.RawMessage) string {
	if !said(raw) {
		return ""
	}
	var b bytes.Buffer
	if json.Indent(&b, raw, "", "  ") != nil {
		return string(raw)
	}
	return string(bytes.ReplaceAll(b.Bytes(), []byte("\n"), []byte("\r\n")))
}

func (e *edge) listExtensions(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	all, err := fleet.ListExtensions(ctx, id, r.Param("node"))
	if err != nil {
		return nil, err
	}
	p, err := cut(r, all, func(v pool.ExtensionView) string { return v.Extension.Name })
	if err != nil {
		return nil, err
	}
	out := batch.DataList[*batch.NodeExtension]{OData: metadata(r, "extensions"), Value: []*batch.NodeExtension{}, NextLink: nextLink(r, p.next)}
	for _, v := range p.items {
		out.Value = append(out.Value, encodeExtension(r.Version, v))
	}
	return azureapi.OK(out), nil
}

func (e *edge) getExtension(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	v, err := fleet.GetExtension(ctx, id, r.Param("node"), r.Param("extension"))
	if err != nil {
		return nil, err
	}
	w := encodeExtension(r.Version, v)
	w.OData = metadata(r, "extensions/@Element")
	return azureapi.OK(w), nil
}
