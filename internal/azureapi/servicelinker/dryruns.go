package servicelinker

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

func (s surface) dryrunRoutes() []azureapi.Route {
	const (
		cluster = "/subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.containerservice/managedclusters/{cluster}"
		all     = cluster + "/providers/microsoft.servicelinker/dryruns"
		one     = all + "/{name}"
	)
	row := func(method, path, verb string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: path, Versions: dryrunVersions, Action: wire.DryrunType + "/" + verb, Handle: h}
	}
	return []azureapi.Route{
		row(http.MethodGet, all, "read", s.listDryruns),
		row(http.MethodGet, one, "read", s.getDryrun),
		row(http.MethodPut, one, "write", s.putDryrun),
		row(http.MethodPatch, one, "write", s.patchDryrun),
		row(http.MethodDelete, one, "delete", s.deleteDryrun),
	}
}

// dryrunVersions are the api-versions that have dry runs, oldest first.
var dryrunVersions = []string{"2022-11-01-preview", "2023-04-01-preview", "2024-04-01", "2024-07-01-preview"}

// dryrunOperation is the kind of an operation that was done at once.
const dryrunOperation = "dryrun"

func dryrunToWire(o *connector.DryrunObject) wire.Dryrun {
	v := o.Spec
	out := wire.Dryrun{ID: v.ID, Name: v.ID[strings.LastIndexByte(v.ID, '/')+1:], Type: wire.DryrunType, Properties: wire.DryrunProperties{
		Parameters: v.Parameters, ProvisioningState: "Succeeded", PrerequisiteResults: []wire.PrerequisiteResult{}, OperationPreviews: append([]wire.OperationPreview{}, v.Plan.Previews...), Plan: &v.Plan.Details,
	}}
	for _, m := range v.Plan.Missing {
		r := wire.PrerequisiteResult{Type: "basicError", Code: m.Code, Message: m.Message, Target: m.Target, Fix: m.Fix, Status: azureapi.StatusOf(m.Kind)}
		if m.Permission != "" {
			r.Type, r.Scope, r.Permissions, r.RecommendedRole = "permissionsMissing", m.Scope, []string{m.Permission}, m.Role
		}
		out.Properties.PrerequisiteResults = append(out.Properties.PrerequisiteResults, r)
	}
	return out
}

func (s surface) listDryruns(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Connections.ListDryruns(r.Context(), clusterID(r))
	if err != nil {
		return nil, err
	}
	out := arm.List[wire.Dryrun]{Value: make([]wire.Dryrun, len(all))}
	for i, o := range all {
		out.Value[i] = dryrunToWire(o)
	}
	return azureapi.OK(out), nil
}

func (s surface) getDryrun(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Connections.Dryrun(r.Context(), clusterID(r), r.Param("name"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(dryrunToWire(o)), nil
}

func (s surface) putDryrun(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.Dryrun
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	return s.dryrun(r, body.Properties.Parameters)
}

// patchDryrun asks again with other parameters. Secrets were not kept: one that is
// needed has to be given again.
func (s surface) patchDryrun(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Connections.Dryrun(r.Context(), clusterID(r), r.Param("name"))
	if err != nil {
		return nil, err
	}
	var body wire.Dryrun
	if err := patched(r, wire.Dryrun{Properties: wire.DryrunProperties{Parameters: o.Spec.Parameters}}, &body); err != nil {
		return nil, err
	}
	return s.dryrun(r, body.Properties.Parameters)
}

// dryrun makes a plan while the client waits; the operation has ended when it is told.
func (s surface) dryrun(r *azureapi.Request, p wire.DryrunParameters) (*azureapi.Reply, error) {
	if !strings.EqualFold(p.ActionName, "createOrUpdate") {
		return nil, fault.New(fault.Invalid, "InvalidArgument", "The action '%.60s' is not known.", p.ActionName).At("properties.parameters.actionName").WithFix("createOrUpdate")
	}
	want, unclear := s.asked(connector.LinkerID(clusterID(r), cmp.Or(p.LinkerName, r.Param("name"))), p.LinkerProperties)
	want.FailIfBusy = strings.EqualFold(r.Query("ifBusy"), "fail")
	o, created, err := s.Connections.PutDryrun(r.Context(), clusterID(r), r.Param("name"), p, want, unclear...)
	if err != nil {
		return nil, err
	}
	reply := azureapi.OK(dryrunToWire(o))
	if created {
		reply.Status = http.StatusCreated
	}
	return reply.With("Azure-AsyncOperation", s.operationURL(r, o.UID, dryrunOperation, 0, o.Spec.ID)).With("Retry-After", "1"), nil
}

// asked is fromWire with all that is wrong: the target and the authentication are
// read apart from each other.
func (s surface) asked(id string, p wire.LinkerProperties) (want connector.Put, unclear []error) {
	want, err := s.fromWire(id, p)
	if err == nil {
		return want, nil
	}
	unclear = []error{err}
	if want.Target.Word == "" {
		p.TargetService.Target = "-"
		if _, err := s.fromWire(id, p); err != nil {
			unclear = append(unclear, err)
		}
	}
	return want, unclear
}

func (s surface) deleteDryrun(r *azureapi.Request) (*azureapi.Reply, error) {
	existed, err := s.Connections.DeleteDryrun(r.Context(), clusterID(r), r.Param("name"))
	if err != nil {
		return nil, err
	}
	if !existed {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Status(http.StatusOK), nil
}

// dryrunDone is the state of the operation that made a dry run.
func (s surface) dryrunDone(r *azureapi.Request, operation, dryrun, uid string) (*azureapi.Reply, error) {
	notFound := fault.New(fault.NotFound, "OperationNotFound", "There is no operation '%.100s'.", operation)
	i := strings.Index(strings.ToLower(dryrun), "/providers/"+strings.ToLower(wire.DryrunType)+"/")
	if i < 0 {
		return nil, notFound
	}
	cluster, err := arm.ParseID(dryrun[:i])
	if err != nil {
		return nil, notFound
	}
	o, err := s.Connections.Dryrun(r.Context(), cluster, dryrun[strings.LastIndexByte(dryrun, '/')+1:])
	if err != nil {
		return nil, err
	}
	if o.UID != uid {
		return nil, notFound
	}
	return azureapi.OK(wire.OperationStatus{ID: r.Path(), Name: operation, ResourceID: o.Spec.ID, Status: "Succeeded", StartTime: o.Created, EndTime: o.Changed}), nil
}

// patched merges the body of a PATCH into base, and decodes the result into v as a
// PUT decodes its body (RFC 7396: null removes, objects merge, the rest replaces).
func patched(r *azureapi.Request, base, v any) error {
	body, err := r.Raw()
	if err != nil {
		return err
	}
	merged, err := merge(base, body)
	if err != nil {
		return err
	}
	return jsonstrict.Decode(merged, v)
}

// merge applies the merge patch to the JSON form of base.
func merge(base any, patch []byte) ([]byte, error) {
	var p, b map[string]any
	if err := jsonstrict.DecodeLoose(patch, &p); err != nil {
		return nil, err
	}
	text, err := json.Marshal(base)
	if err != nil {
		return nil, fmt.Errorf("encoding what is patched: %w", err)
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return nil, fmt.Errorf("reading what is patched: %w", err)
	}
	if text, err = json.Marshal(mergeObjects(b, p)); err != nil {
		return nil, fmt.Errorf("encoding what was patched: %w", err)
	}
	return text, nil
}

func mergeObjects(into, patch map[string]any) map[string]any {
	if into == nil {
		into = map[string]any{}
	}
	for name, v := range patch {
		switch v := v.(type) {
		case nil:
			delete(into, name)
		case map[string]any:
			old, _ := into[name].(map[string]any)
			into[name] = mergeObjects(old, v)
		default:
			into[name] = v
		}
	}
	return into
}
