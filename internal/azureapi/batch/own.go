package batch

import (
	"encoding/json"
	"net/http"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/batch"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
)

// ownRoutes are Keyfleet's additions, on the arm host under /keyfleet/v1:
//
//	POST   {pool id}/whatif                          what a PUT of the same body would change, refuse and warn of
//	GET    extensiontypes                            publisher/type pairs that pools may name
//	PUT    extensiontypes/PUBLISHER/TYPE             {"os": "linux"}
//	DELETE extensiontypes/PUBLISHER/TYPE
//	POST   jointokens                                {"pool": id, "expiresIn": "1h"}
//	GET    hosts                                     machines that joined
//	DELETE hosts/ID
func (e *edge) ownRoutes() []azureapi.Route {
	row := func(method, path, action string, handle func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: "/keyfleet/v1" + path, Action: action, Handle: handle}
	}
	const oneType = "/extensiontypes/{publisher}/{type}"
	return []azureapi.Route{
		row(http.MethodPost, onePool+"/whatif", "Microsoft.Batch/batchAccounts/pools/write", e.whatIf),
		row(http.MethodGet, "/extensiontypes", "Keyfleet/extensiontypes/read", e.listTypes),
		row(http.MethodPut, oneType, "Keyfleet/extensiontypes/write", e.putType),
		row(http.MethodDelete, oneType, "Keyfleet/extensiontypes/delete", e.deleteType),
		row(http.MethodPost, "/jointokens", "Keyfleet/jointokens/write", e.createToken),
		row(http.MethodGet, "/hosts", "Keyfleet/hosts/read", e.listHosts),
		row(http.MethodDelete, "/hosts/{host}", "Keyfleet/hosts/delete", e.deleteHost),
	}
}

// whatIf takes the body of a PUT (?patch=true: of a PATCH) and stores nothing.
func (e *edge) whatIf(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	w, err := e.write(r, poolID(r), r.Query("patch") == "true")
	if err != nil {
		return nil, err
	}
	w.Strict = false
	out, err := fleet.WhatIf(ctx, w)
	if err != nil {
		return nil, err
	}
	answer := batch.PoolResult{
		Created: out.Created, Accepted: len(out.Problems) == 0, Changes: []batch.Change{},
		Problems: problems(out.Problems), Warnings: problems(out.Warnings),
	}
	for _, c := range out.Changes {
		answer.Changes = append(answer.Changes, batch.Change{Path: c.Path, Old: json.RawMessage(c.Old), New: json.RawMessage(c.New), Allowed: out.Created || c.Mutable})
	}
	return azureapi.OK(answer), nil
}

func problems(ps []pool.Problem) []batch.Problem {
	out := []batch.Problem{}
	for _, p := range ps {
		out = append(out, batch.Problem(p))
	}
	return out
}

// extensionType is a publisher and type that pools may name.
type extensionType struct {
	Publisher string `json:"publisher"`
	Type      string `json:"type"`
	OS        string `json:"os,omitempty"`
	BuiltIn   bool   `json:"builtIn"`
}

func (e *edge) listTypes(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	all, err := fleet.ExtensionTypes(ctx)
	if err != nil {
		return nil, err
	}
	out := arm.List[extensionType]{Value: []extensionType{}}
	for _, t := range all {
		out.Value = append(out.Value, extensionType{t.Publisher, t.Type, t.OS, t.BuiltIn})
	}
	return azureapi.OK(out), nil
}

func (e *edge) putType(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	var w struct {
		OS string `json:"os"`
	}
	if raw, err := r.Raw(); err != nil {
		return nil, err
	} else if len(raw) > 0 {
		if err := json.Unmarshal(raw, &w); err != nil {
			return nil, fault.New(fault.Invalid, "InvalidRequestContent", `The body is not {"os": "linux"}.`).At("os")
		}
	}
	t := pool.ExtensionType{Publisher: r.Param("publisher"), Type: r.Param("type"), OS: w.OS}
	if err := fleet.AddExtensionType(ctx, t); err != nil {
		return nil, err
	}
	return azureapi.OK(extensionType{t.Publisher, t.Type, t.OS, false}), nil
}

func (e *edge) deleteType(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	if err := fleet.RemoveExtensionType(ctx, r.Param("publisher"), r.Param("type")); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}

// joinToken is the answer to a new join token, which is shown this once.
type joinToken struct {
	Token   string    `json:"token"`
	Pool    string    `json:"pool"`
	Expires time.Time `json:"expires"`
	Server  string    `json:"server"` // for keyfleet-agent join --server
	CAHash  string    `json:"caHash,omitempty"`
}

func (e *edge) createToken(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	var w struct {
		Pool      string `json:"pool"`
		ExpiresIn string `json:"expiresIn"`
	}
	if err := r.Decode(&w); err != nil {
		return nil, err
	}
	id, err := arm.ParseID(w.Pool)
	if err != nil {
		return nil, fault.New(fault.Invalid, "InvalidPropertyValue", "It is not the resource id of a pool.").At("pool").WithFix("write /subscriptions/S/resourceGroups/G/providers/Microsoft.Batch/batchAccounts/A/pools/P")
	}
	var life time.Duration
	if w.ExpiresIn != "" {
		if life, err = time.ParseDuration(w.ExpiresIn); err != nil {
			if life, err = pool.ParseDuration(w.ExpiresIn); err != nil {
				return nil, fault.New(fault.Invalid, "InvalidPropertyValue", "%q is not a duration.", w.ExpiresIn).At("expiresIn").WithFix(`write "1h" or "PT1H"`)
			}
		}
	}
	token, expires, err := fleet.CreateJoinToken(ctx, id, life)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(joinToken{Token: token.Reveal(), Pool: id.String(), Expires: expires, Server: r.Endpoints().Node(), CAHash: e.cfg.CAHash}).
		With("Cache-Control", "no-store"), nil
}

// host is a registered machine.
type host struct {
	ID       string    `json:"id"`
	Hostname string    `json:"hostname"`
	Pool     string    `json:"pool"` // SUBSCRIPTION/GROUP/ACCOUNT/POOL
	OS       string    `json:"os"`
	State    string    `json:"state"` // free, in use, releasing, leaving
	Node     string    `json:"node,omitempty"`
	Agent    string    `json:"agent"`
	Enrolled time.Time `json:"enrolled"`
	LastSeen time.Time `json:"lastSeen"`
}

func (e *edge) listHosts(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	all, err := fleet.ListHosts(ctx)
	if err != nil {
		return nil, err
	}
	out := arm.List[host]{Value: []host{}}
	for _, h := range all {
		out.Value = append(out.Value, host{
			ID: h.ID, Hostname: h.Status.Hostname, Pool: h.Spec.Pool, OS: h.Spec.OS, State: pool.HostState(h), Node: h.Spec.Node,
			Agent: h.Status.Agent, Enrolled: h.Status.Enrolled, LastSeen: h.Status.LastSeen,
		})
	}
	return azureapi.OK(out), nil
}

func (e *edge) deleteHost(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	if err := fleet.RemoveHost(ctx, r.Param("host")); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}
