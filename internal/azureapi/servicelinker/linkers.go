package servicelinker

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/kubernetes"
	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
)

func (s surface) linkerRoutes() []azureapi.Route {
	const (
		cluster = "/subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.containerservice/managedclusters/{cluster}"
		all     = cluster + "/providers/microsoft.servicelinker/linkers"
		one     = all + "/{name}"
		manage  = "Keyfleet/clusters/manage/action"
	)
	row := func(method, path, action string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: path, Versions: linkerVersions, Action: action, Handle: h}
	}
	own := func(method, path string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: "/keyfleet/v1" + path, Action: manage, Handle: h}
	}
	return []azureapi.Route{
		row(http.MethodGet, all, wire.Type+"/read", s.list),
		row(http.MethodGet, one, wire.Type+"/read", s.get),
		row(http.MethodPut, one, wire.Type+"/write", s.put),
		row(http.MethodPatch, one, wire.Type+"/write", s.patch),
		row(http.MethodDelete, one, wire.Type+"/delete", s.delete),
		row(http.MethodPost, one+"/validatelinker", wire.Type+"/validateLinker/action", s.validate),
		row(http.MethodPost, one+"/listconfigurations", wire.Type+"/listConfigurations/action", s.configurations),
		row(http.MethodPost, one+"/generateconfigurations", wire.Type+"/generateConfigurations/action", s.generate),
		row(http.MethodPost, one+"/rotate", wire.Type+"/rotate/action", s.rotate),
		row(http.MethodGet, "/subscriptions/{subscription}/providers/microsoft.servicelinker/locations/{location}/operationstatuses/{operation}", azureapi.Authenticated, s.operation),
		own(http.MethodPost, one+"/desired", s.desired),
		own(http.MethodPut, one+"/report", s.report),
	}
}

// linkerVersions are the api-versions that clients of linkers send, oldest first.
var linkerVersions = []string{"2022-05-01", "2022-11-01-preview", "2023-04-01-preview", "2024-04-01", "2024-07-01-preview"}

func clusterID(r *azureapi.Request) arm.ID {
	return arm.ID{
		Subscription: r.Param("subscription"), ResourceGroup: r.Param("group"), Provider: "Microsoft.ContainerService",
		Types: []string{"managedClusters"}, Names: []string{r.Param("cluster")},
	}
}

func linkerID(r *azureapi.Request) string { return connector.LinkerID(clusterID(r), r.Param("name")) }

// fromWire is a connection as a client asks for it.
func (s surface) fromWire(id string, p wire.LinkerProperties) (connector.Put, error) {
	out := connector.Put{Connection: connector.Connection{
		ID: id, Namespace: p.Scope, Client: p.ClientType,
		Target: connector.TargetService{ID: p.TargetService.ID, Values: p.TargetService.Values},
		Auth:   connector.Authentication{User: cmp.Or(p.AuthInfo.Name, p.AuthInfo.UserName), ClientID: p.AuthInfo.ClientID, ObjectID: p.AuthInfo.PrincipalID, Identity: p.AuthInfo.Identity},
	}}
	if p.SecretStore != nil {
		out.Vault = p.SecretStore.KeyVaultID
	}
	if p.ConfigurationInfo != nil {
		out.Keys = p.ConfigurationInfo.CustomizedKeys
	}
	var err error
	if out.Target.Word, err = s.word(p.TargetService); err != nil {
		return out, err
	}
	if r := p.TargetService.ResourceProperties; r != nil && r.ConnectAsKubernetesCSIDriver {
		err = csiDriver(p, &out)
		return out, err
	}
	switch strings.ToLower(p.AuthInfo.AuthType) {
	case "secret":
		out.Auth.Type = connector.Secret
		err = s.secretInfo(p, &out)
	case "serviceprincipalsecret":
		out.Auth.Type, out.Secret, out.Auth.Given = connector.ServicePrincipal, p.AuthInfo.Secret, &connector.SecretRef{}
	case "userassignedidentity":
		out.Auth.Type = connector.WorkloadIdentity
	default:
		err = fault.New(fault.Invalid, "InvalidArgument", "The authentication type '%.60s' is not known.", p.AuthInfo.AuthType).At("properties.authInfo.authType").
			WithFix("secret, servicePrincipalSecret or userAssignedIdentity")
	}
	return out, err
}

// csiDriver reads what is asked for of the CSI driver. It needs no authentication; an
// identity may be named.
func csiDriver(p wire.LinkerProperties, out *connector.Put) error {
	out.Auth.Type, out.Target.Objects = connector.CSIAddOn, p.TargetService.ResourceProperties.Objects
	if typ := p.AuthInfo.AuthType; typ != "" && !strings.EqualFold(typ, "userAssignedIdentity") {
		return fault.New(fault.Invalid, "InvalidArgument", "Only one auth info is needed: connectAsKubernetesCsiDriver is one, and '%.60s' is another one.", typ).
			At("properties.authInfo.authType").WithFix("leave authInfo out, or name an identity with userAssignedIdentity")
	}
	return nil
}

// word finds the target's word: as given, or by the type of its id.
func (s surface) word(t wire.TargetService) (string, error) {
	if t.Target != "" {
		return t.Target, nil
	}
	typ := t.Type
	if strings.EqualFold(typ, "AzureResource") {
		id, err := arm.ParseID(t.ID)
		if err != nil || len(id.Types) == 0 {
			return "", fault.New(fault.Invalid, "InvalidArgument", "'%.300s' is not the resource id of a target.", t.ID).At("properties.targetService.id")
		}
		typ = id.Type()
	}
	for _, target := range s.catalogue.Targets {
		if strings.EqualFold(target.Type, typ) {
			return target.Word, nil
		}
	}
	e := fault.New(fault.Invalid, "TargetTypeNotSupported", "Target resource type %.200s is not supported.", strings.ToUpper(typ)).At("properties.targetService.id")
	for _, target := range s.catalogue.Targets {
		if strings.HasPrefix(strings.ToLower(target.Type), strings.ToLower(typ)+"/") {
			return "", e.WithFix("the id of a %s goes on with what is in the server: .../%s/NAME", target.Word, target.Type[len(typ)+1:])
		}
	}
	return "", e.WithFix("the types are listed at /providers/Microsoft.ServiceLinker/configurationNames")
}

func (s surface) secretInfo(p wire.LinkerProperties, out *connector.Put) error {
	i := p.AuthInfo.SecretInfo
	if i == nil {
		return nil // Keyfleet makes it
	}
	out.Auth.Given = &connector.SecretRef{}
	switch strings.ToLower(i.SecretType) {
	case "rawvalue":
		out.Secret = i.Value
		return nil
	case "keyvaultsecreturi":
		ref, err := s.Locate(i.Value)
		if err != nil {
			return fault.New(fault.Invalid, "InvalidArgument", "The value is not the URL of a secret of this server.").At("properties.authInfo.secretInfo.value").Because(err)
		}
		out.Auth.Given = &ref
		return nil
	case "keyvaultsecretreference":
		if out.Vault == "" {
			return fault.New(fault.Invalid, "InvalidArgument", "--vault-id must be provided to use secret-name").At("properties.secretStore.keyVaultId")
		}
		out.Auth.Given = &connector.SecretRef{Vault: out.Vault, Name: i.Name, Version: i.Version}
		return nil
	}
	return fault.New(fault.Invalid, "InvalidArgument", "The secret type '%.60s' is not known.", i.SecretType).At("properties.authInfo.secretInfo.secretType").
		WithFix("rawValue, keyVaultSecretUri or keyVaultSecretReference")
}

func (s surface) toWire(r *azureapi.Request, o *connector.Object) (wire.Linker, error) {
	c, st := o.Spec, o.Status
	out := wire.Linker{ID: c.ID, Name: c.Name(), Type: wire.Type, Properties: wire.LinkerProperties{
		TargetService: wire.TargetService{Type: "AzureResource", ID: c.Target.ID, Target: c.Target.Word, Values: c.Target.Values},
		AuthInfo:      wire.AuthInfo{AuthType: authTypes[c.Auth.Type], Name: c.Auth.User, ClientID: c.Auth.ClientID, PrincipalID: c.Auth.ObjectID, Identity: c.Auth.Identity},
		ClientType:    c.Client, Scope: c.Namespace, ProvisioningState: st.State, Problem: st.Problem, Waiting: st.Waiting,
	}}
	p := &out.Properties
	if c.Target.ID == "" {
		p.TargetService.Type = "SelfHostedServer"
	}
	if c.Vault != "" {
		p.SecretStore = &wire.SecretStore{KeyVaultID: c.Vault}
	}
	if len(c.Keys) > 0 {
		p.ConfigurationInfo = &wire.ConfigurationInfo{CustomizedKeys: c.Keys}
	}
	if !o.Deleting.IsZero() {
		p.ProvisioningState = "Deleting"
	}
	if c.Auth.Type == connector.CSIAddOn {
		p.TargetService.ResourceProperties = &wire.ResourceProperties{Type: "KeyVault", ConnectAsKubernetesCSIDriver: true, Objects: c.Target.Objects}
	}
	names := c.Objects()
	p.KubernetesResourceName = &wire.ResourceNames{Secret: names.Secret, ServiceAccount: names.ServiceAccount, SecretProviderClass: names.ProviderClass}
	if k := st.Credential; k.Secret.Name != "" {
		p.Credential = &wire.Credential{User: k.User, Made: k.Role != "", Vault: k.Secret.Vault, Secret: k.Secret.Name, Version: k.Secret.Version, Created: k.Created}
	}
	seen, err := s.Connections.Seen(r.Context(), o)
	if err != nil {
		return out, err
	}
	if seen != nil {
		d := wire.Delivered{Time: seen.Time, Repaired: seen.Repaired, Consumers: seen.Consumers, Proven: st.Proof.Time, Took: st.Proof.Took.Milliseconds()}
		for _, obj := range seen.Objects {
			obj.Hash = "" // of credentials: for managers only
			d.Objects = append(d.Objects, obj)
		}
		p.Delivered = &d
	}
	return out, nil
}

func (s surface) list(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Connections.List(r.Context(), clusterID(r).String())
	if err != nil {
		return nil, err
	}
	out := arm.List[wire.Linker]{Value: make([]wire.Linker, len(all))}
	for i, o := range all {
		if out.Value[i], err = s.toWire(r, o); err != nil {
			return nil, err
		}
	}
	return azureapi.OK(out), nil
}

func (s surface) get(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Connections.Connection(r.Context(), linkerID(r))
	if err != nil {
		return nil, err
	}
	return s.shown(r, o)
}

func (s surface) shown(r *azureapi.Request, o *connector.Object) (*azureapi.Reply, error) {
	out, err := s.toWire(r, o)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(out), nil
}

func (s surface) put(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.Linker
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	want, err := s.fromWire(linkerID(r), body.Properties)
	if err != nil {
		return nil, err
	}
	want.FailIfBusy = strings.EqualFold(r.Query("ifBusy"), "fail")
	return s.change(r, want)
}

// change makes a connection what is wanted, and tells how that goes on.
func (s surface) change(r *azureapi.Request, want connector.Put) (*azureapi.Reply, error) {
	o, created, err := s.Connections.Put(r.Context(), want)
	if err != nil {
		return nil, err
	}
	reply, err := s.shown(r, o)
	if err != nil {
		return nil, err
	}
	if created {
		reply.Status = http.StatusCreated
	}
	return reply.With("Azure-AsyncOperation", s.operationURL(r, o.UID, connector.OpPut, 0, o.Spec.ID)).With("Retry-After", "1"), nil
}

func (s surface) delete(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Connections.Delete(r.Context(), linkerID(r), strings.EqualFold(r.Query("keep"), "true"))
	if err != nil {
		return nil, err
	}
	if o == nil {
		return azureapi.Status(http.StatusNoContent), nil
	}
	u := s.operationURL(r, o.UID, connector.OpDelete, 0, o.Spec.ID)
	return azureapi.Accepted(u, "1").With("Azure-AsyncOperation", u), nil
}

func (s surface) rotate(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Connections.Rotate(r.Context(), linkerID(r))
	if err != nil {
		return nil, err
	}
	u := s.operationURL(r, o.UID, connector.OpRotate, o.Spec.Rotations, o.Spec.ID)
	return azureapi.Accepted(u, "1").With("Azure-AsyncOperation", u), nil
}

// operationURL is where an operation is looked at. Its name says all about it, so
// nothing has to be kept.
func (s surface) operationURL(r *azureapi.Request, uid, kind string, n int64, id string) string {
	name := uid + "*" + base64.RawURLEncoding.EncodeToString([]byte(kind+" "+strconv.FormatInt(n, 10)+" "+id))
	return fmt.Sprintf("%s/subscriptions/%s/providers/Microsoft.ServiceLinker/locations/global/operationStatuses/%s?api-version=%s", r.BaseURL(), r.Param("subscription"), name, r.Version)
}

func (s surface) operation(r *azureapi.Request) (*azureapi.Reply, error) {
	name := r.Param("operation")
	notFound := fault.New(fault.NotFound, "OperationNotFound", "There is no operation '%.100s'.", name)
	uid, coded, ok := strings.Cut(name, "*")
	text, err := base64.RawURLEncoding.Strict().DecodeString(coded)
	if !ok || err != nil {
		return nil, notFound
	}
	if uid == opDiagnose {
		return s.diagnosis(r, string(text))
	}
	parts := strings.SplitN(string(text), " ", 3)
	if len(parts) != 3 {
		return nil, notFound
	}
	n, err := strconv.ParseInt(parts[1], 10, 64)
	if err != nil {
		return nil, notFound
	}
	if parts[0] == dryrunOperation {
		return s.dryrunDone(r, name, parts[2], uid)
	}
	op, err := s.Connections.Operation(r.Context(), parts[0], parts[2], uid, n)
	if err != nil {
		return nil, err
	}
	out := wire.OperationStatus{ID: r.Path(), Name: name, ResourceID: parts[2], Status: op.Status}
	if op.Status == "Failed" && op.Problem != nil {
		out.Error = problemError(*op.Problem)
	}
	if op.Removal != nil {
		out.StartTime, out.EndTime = op.Removal.Started, op.Removal.Ended
		out.Properties = map[string]any{"removed": op.Removal.Removed, "kept": op.Removal.Kept}
	}
	return azureapi.OK(out).With("Retry-After", "1"), nil
}

// problemError is a problem as an ARM error: layer and raw text as details.
func problemError(p kubernetes.Problem) arm.Error {
	e := arm.Error{Code: p.Code, Message: p.Message, Target: p.Object}
	for _, d := range []arm.Error{{Code: "Fix", Message: p.Fix}, {Code: "Layer", Message: p.Layer}, {Code: "Raw", Message: p.Raw}} {
		if d.Message != "" {
			e.Details = append(e.Details, d)
		}
	}
	return e
}

// validate answers at once: it looks while the client waits.
func (s surface) validate(r *azureapi.Request) (*azureapi.Reply, error) {
	v, err := s.Connections.Validate(r.Context(), linkerID(r))
	if err != nil {
		return nil, err
	}
	p := wire.ValidationProperties{
		LinkerName: r.Param("name"), IsConnectionAvailable: v.Available(), ReportStartTimeUTC: v.Started, ReportEndTimeUTC: v.Ended, SourceID: clusterID(r).String(),
		ValidationDetail: []wire.ValidationDetail{},
	}
	for _, f := range v.Findings {
		p.ValidationDetail = append(p.ValidationDetail, wire.ValidationDetail{Name: f.Name, Description: f.Description, Result: f.Result, ErrorCode: f.Code, ErrorMessage: f.Message})
	}
	return azureapi.OK(wire.ValidateResult{ResourceID: linkerID(r), Status: "Succeeded", Properties: p}), nil
}

func (s surface) configurations(r *azureapi.Request) (*azureapi.Reply, error) {
	env, err := s.Connections.Environment(r.Context(), linkerID(r))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(configurationsToWire(env)), nil
}

func (s surface) desired(r *azureapi.Request) (*azureapi.Reply, error) {
	d, err := s.Connections.Desired(r.Context(), linkerID(r))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(d).With("Cache-Control", "no-store"), nil
}

func (s surface) report(r *azureapi.Request) (*azureapi.Reply, error) {
	var body kubernetes.ConnectionReport
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	if err := s.Connections.Report(r.Context(), linkerID(r), body); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}
