package servicelinker

import (
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/subscription"
)

// serverVersions are the api-versions of registered servers: those of the flexible
// servers, and of Redis, that clients send.
var serverVersions = []string{"2022-12-01", "2023-06-01-preview", "2023-08-01", "2023-12-30", "2024-03-01", "2024-08-01", "2024-11-01"}

func (s surface) serverRoutes() []azureapi.Route {
	var out []azureapi.Route
	for _, t := range connector.ServerTypes() {
		typ := t.Type
		sub := "/subscriptions/{subscription}/providers/" + strings.ToLower(typ)
		all := "/subscriptions/{subscription}/resourcegroups/{group}/providers/" + strings.ToLower(typ)
		row := func(method, path, verb string, h func(*azureapi.Request, string) (*azureapi.Reply, error)) azureapi.Route {
			return azureapi.Route{
				Surface: azureapi.ARM, Method: method, Path: path, Versions: serverVersions, Action: typ + "/" + verb,
				Handle: func(r *azureapi.Request) (*azureapi.Reply, error) { return h(r, typ) },
			}
		}
		out = append(out,
			row(http.MethodGet, sub, "read", s.listServers),
			row(http.MethodGet, all, "read", s.listServers),
			row(http.MethodGet, all+"/{name}", "read", s.getServer),
			row(http.MethodPut, all+"/{name}", "write", s.putServer),
			row(http.MethodDelete, all+"/{name}", "delete", s.deleteServer))
	}
	return out
}

func serverID(r *azureapi.Request, typ string) string {
	provider, kind, _ := strings.Cut(typ, "/")
	return arm.ID{Subscription: r.Param("subscription"), ResourceGroup: r.Param("group"), Provider: provider, Types: []string{kind}, Names: []string{r.Param("name")}}.String()
}

func serverToWire(o *connector.ServerObject, typ string) wire.Server {
	id, _ := arm.ParseID(o.Spec.ID) // it was parsed when it was stored
	v := o.Spec
	return wire.Server{ID: v.ID, Name: id.Name(), Type: typ, Location: v.Location, Tags: v.Tags, Properties: wire.ServerProperties{
		FQDN: v.Host, Administrator: v.Administrator, State: "Ready", Port: v.Port, Reach: v.Reach, Management: v.Management, Plain: v.Plain, CA: v.CA,
		Checked: o.Status.Checked, Warnings: o.Status.Warnings,
	}}
}

func (s surface) listServers(r *azureapi.Request, typ string) (*azureapi.Reply, error) {
	all, err := s.Connections.ListServers(r.Context(), typ, r.Param("subscription"), r.Param("group"))
	if err != nil {
		return nil, err
	}
	out := arm.List[wire.Server]{Value: make([]wire.Server, len(all))}
	for i, o := range all {
		out.Value[i] = serverToWire(o, typ)
	}
	return azureapi.OK(out), nil
}

func (s surface) getServer(r *azureapi.Request, typ string) (*azureapi.Reply, error) {
	o, err := s.Connections.Server(r.Context(), serverID(r, typ))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(serverToWire(o, typ)), nil
}

// putServer registers a server that exists. What would make one is refused: the
// decoder knows no such member.
func (s surface) putServer(r *azureapi.Request, typ string) (*azureapi.Reply, error) {
	var body wire.Server
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	location, err := subscription.NormalizeLocation(body.Location)
	if err != nil {
		return nil, err
	}
	p := body.Properties
	o, created, err := s.Connections.PutServer(r.Context(), connector.ServerRegistration{
		Server: connector.Server{
			ID: serverID(r, typ), Location: location, Tags: body.Tags, Host: p.FQDN, Port: p.Port, Reach: p.Reach, Management: p.Management,
			Plain: p.Plain, CA: p.CA, Administrator: p.Administrator,
		},
		Password: p.Password,
	})
	if err != nil {
		return nil, err
	}
	reply := azureapi.OK(serverToWire(o, typ))
	if created {
		reply.Status = http.StatusCreated
	}
	return reply, nil
}

func (s surface) deleteServer(r *azureapi.Request, typ string) (*azureapi.Reply, error) {
	existed, err := s.Connections.DeleteServer(r.Context(), serverID(r, typ))
	if err != nil {
		return nil, err
	}
	if !existed {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Status(http.StatusOK), nil
}
