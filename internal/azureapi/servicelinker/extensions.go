package servicelinker

import (
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
)

// extensionVersions are the api-versions that clients of extensions send, oldest first.
var extensionVersions = []string{"2021-09-01", "2022-03-01", "2022-07-01", "2022-11-01", "2023-05-01", "2024-11-01", "2025-03-01"}

func (s surface) extensionRoutes() []azureapi.Route {
	const (
		all = "/subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.containerservice/managedclusters/{cluster}/providers/microsoft.kubernetesconfiguration/extensions"
		one = all + "/{name}"
	)
	row := func(method, path, verb string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: path, Versions: extensionVersions, Action: kubernetes.ExtensionType + "/" + verb, Handle: h}
	}
	return []azureapi.Route{
		row(http.MethodGet, all, "read", s.listExtensions),
		row(http.MethodGet, one, "read", s.getExtension),
		row(http.MethodPut, one, "write", s.putExtension),
		row(http.MethodDelete, one, "delete", s.deleteExtension),
		{Surface: azureapi.ARM, Method: http.MethodPut, Path: "/keyfleet/v1" + one + "/report", Action: "Keyfleet/clusters/manage/action", Handle: s.reportExtension},
	}
}

func extensionToWire(o *connector.ExtensionObject) kubernetes.ClusterExtension {
	e, r := o.Spec, o.Status.Report
	p := kubernetes.ExtensionProperties{
		ExtensionType: "microsoft.servicelinker.connection", AutoUpgrade: &e.AutoUpgrade, ReleaseTrain: e.Train, Version: e.Version, Settings: e.Settings,
		ProtectedSettings: map[string]string{}, ProvisioningState: connector.ExtensionState(o), Statuses: []kubernetes.ExtensionState{}, Release: r.Release,
		Scope: &kubernetes.ExtensionScope{Cluster: &struct {
			ReleaseNamespace string `json:"releaseNamespace,omitempty"`
		}{"sc-system"}},
	}
	if p.Settings == nil {
		p.Settings = map[string]string{}
	}
	if r.Release != nil {
		p.CurrentVersion = r.Release.Version
	}
	switch {
	case r.Problem != nil:
		text := r.Problem.Message
		if r.Problem.Fix != "" {
			between := " "
			if strings.Contains(text, "\n") { // it ends with a log
				between = "\n"
			}
			text += between + "Fix: " + r.Problem.Fix
		}
		p.ErrorInfo = problemError(*r.Problem)
		p.Statuses = append(p.Statuses, kubernetes.ExtensionState{Code: r.Problem.Code, DisplayStatus: "Failed", Level: "Error", Message: text, Time: o.Status.Time})
	case p.ProvisioningState == "Succeeded":
		p.Statuses = append(p.Statuses, kubernetes.ExtensionState{
			Code: "InstallationSucceeded", DisplayStatus: "Installed", Level: "Information", Message: "Helm has deployed " + r.Release.Chart + ".", Time: o.Status.Time,
		})
	}
	return kubernetes.ClusterExtension{ID: e.ID, Name: connector.ExtensionName, Type: kubernetes.ExtensionType, Properties: p}
}

func (s surface) listExtensions(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Connections.ExtensionsOf(r.Context(), clusterID(r))
	if err != nil {
		return nil, err
	}
	out := arm.List[kubernetes.ClusterExtension]{Value: make([]kubernetes.ClusterExtension, len(all))}
	for i, o := range all {
		out.Value[i] = extensionToWire(o)
	}
	return azureapi.OK(out), nil
}

func (s surface) getExtension(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Connections.ExtensionOf(r.Context(), clusterID(r), r.Param("name"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(extensionToWire(o)), nil
}

func (s surface) putExtension(r *azureapi.Request) (*azureapi.Reply, error) {
	var body kubernetes.ClusterExtension
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	p := body.Properties
	for name := range p.ProtectedSettings {
		return nil, fault.New(fault.Invalid, "InvalidArgument", "The extension has no protected setting %.60s: what is secret of a connection never goes through the extension.", name).
			At("properties.configurationProtectedSettings." + name).WithFix("make the connection: keyfleet connection create")
	}
	if _, ok := p.Settings["image"]; ok { // the operator may read every Secret: what runs as it is not for whoever may write an extension
		return nil, fault.New(fault.Invalid, "InvalidArgument", "The image of the extension is not a setting: whoever runs the manager says which it is.").
			At("properties.configurationSettings.image").WithFix("start the server with --connector-image, or the manager with --image")
	}
	if p.Scope != nil && (p.Scope.Namespace != nil || p.Scope.Cluster != nil && p.Scope.Cluster.ReleaseNamespace != "" && p.Scope.Cluster.ReleaseNamespace != "sc-system") {
		return nil, fault.New(fault.Invalid, "InvalidArgument", "The extension is for the whole cluster, in the namespace sc-system.").At("properties.scope")
	}
	o, created, err := s.Connections.PutExtension(r.Context(), clusterID(r), r.Param("name"), p.ExtensionType, connector.Extension{
		Train: p.ReleaseTrain, Version: p.Version, AutoUpgrade: p.AutoUpgrade == nil || *p.AutoUpgrade, Settings: p.Settings,
	})
	if err != nil {
		return nil, err
	}
	reply := azureapi.OK(extensionToWire(o))
	if created {
		reply.Status = http.StatusCreated
	}
	return reply, nil
}

// deleteExtension takes forceDelete, which clients of Azure know, as the word that
// the connections shall go too.
func (s surface) deleteExtension(r *azureapi.Request) (*azureapi.Reply, error) {
	existed, err := s.Connections.DeleteExtension(r.Context(), clusterID(r), r.Param("name"), strings.EqualFold(r.Query("forceDelete"), "true"))
	if err != nil {
		return nil, err
	}
	if !existed {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Status(http.StatusOK), nil
}

func (s surface) reportExtension(r *azureapi.Request) (*azureapi.Reply, error) {
	var body kubernetes.ExtensionReport
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	if err := s.Connections.ReportExtension(r.Context(), clusterID(r), r.Param("name"), body); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}
