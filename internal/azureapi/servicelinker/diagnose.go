package servicelinker

import (
	"encoding/base64"
	"fmt"
	"net/http"

	"keyfleet.dev/keyfleet/api/kubernetes"
	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/azureapi"
)

// diagnoseRoutes are Keyfleet's own rows for what is wrong with a connection, or with
// the extension, of a cluster.
func (s surface) diagnoseRoutes() []azureapi.Route {
	const (
		cluster   = "/subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.containerservice/managedclusters/{cluster}"
		linker    = cluster + "/providers/microsoft.servicelinker/linkers/{name}"
		extension = cluster + "/providers/microsoft.kubernetesconfiguration/extensions/{name}"
		manage    = "Keyfleet/clusters/manage/action"
	)
	extensionOf := func(r *azureapi.Request) string {
		return clusterID(r).String() + "/providers/" + kubernetes.ExtensionType + "/" + r.Param("name")
	}
	return []azureapi.Route{
		{Surface: azureapi.ARM, Method: http.MethodPost, Path: linker + "/diagnose", Versions: linkerVersions, Action: wire.Type + "/diagnose/action", Handle: s.ask(linkerID)},
		{Surface: azureapi.ARM, Method: http.MethodPost, Path: extension + "/diagnose", Versions: extensionVersions, Action: kubernetes.ExtensionType + "/diagnose/action", Handle: s.ask(extensionOf)},
		{Surface: azureapi.ARM, Method: http.MethodPut, Path: "/keyfleet/v1" + linker + "/sight", Action: manage, Handle: s.answer(linkerID)},
		{Surface: azureapi.ARM, Method: http.MethodPut, Path: "/keyfleet/v1" + extension + "/sight", Action: manage, Handle: s.answer(extensionOf)},
	}
}

// opDiagnose stands where the names of other operations have the connection's UID.
const opDiagnose = "diagnose"

// ask starts a diagnosis of the resource that id names.
func (s surface) ask(id func(*azureapi.Request) string) func(*azureapi.Request) (*azureapi.Reply, error) {
	return func(r *azureapi.Request) (*azureapi.Reply, error) {
		if err := s.Connections.Ask(r.Context(), id(r)); err != nil {
			return nil, err
		}
		u := fmt.Sprintf("%s/subscriptions/%s/providers/Microsoft.ServiceLinker/locations/global/operationStatuses/%s*%s?api-version=%s",
			r.BaseURL(), r.Param("subscription"), opDiagnose, base64.RawURLEncoding.EncodeToString([]byte(id(r))), linkerVersions[len(linkerVersions)-1])
		return azureapi.Accepted(u, "1").With("Azure-AsyncOperation", u), nil
	}
}

// diagnosis looks whether there is an answer.
func (s surface) diagnosis(r *azureapi.Request, resourceID string) (*azureapi.Reply, error) {
	d, ok, err := s.Connections.Diagnosis(r.Context(), resourceID)
	if err != nil {
		return nil, err
	}
	out := wire.OperationStatus{ID: r.Path(), Name: r.Param("operation"), ResourceID: resourceID, Status: "Accepted"}
	if ok {
		out.Status, out.StartTime, out.EndTime, out.Properties = "Succeeded", d.Asked, d.Answered, d
	}
	return azureapi.OK(out).With("Retry-After", "1"), nil
}

func (s surface) answer(id func(*azureapi.Request) string) func(*azureapi.Request) (*azureapi.Reply, error) {
	return func(r *azureapi.Request) (*azureapi.Reply, error) {
		var body kubernetes.Sight
		if err := r.Decode(&body); err != nil {
			return nil, err
		}
		if err := s.Connections.Answer(r.Context(), id(r), body); err != nil {
			return nil, err
		}
		return azureapi.Status(http.StatusNoContent), nil
	}
}
