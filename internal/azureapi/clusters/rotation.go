package clusters

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// rotate starts a rotation. A body is Keyfleet's own; Azure's clients send none.
func (s surface) rotate(r *azureapi.Request) (*azureapi.Reply, error) {
	want, err := rotationOptions(r)
	if err != nil {
		return nil, err
	}
	o, err := s.Clusters.Rotate(r.Context(), clusterID(r), want)
	if err != nil {
		return nil, err
	}
	u := operationURL(r, o)
	return azureapi.Accepted(u, "5").With("Azure-AsyncOperation", u), nil
}

func rotationOptions(r *azureapi.Request) (cluster.Options, error) {
	var out cluster.Options
	text, err := r.Raw()
	if err != nil || len(text) == 0 {
		return out, err
	}
	var body wire.RotationOptions
	if err := jsonstrict.Decode(text, &body); err != nil {
		return out, err
	}
	out = cluster.Options{Only: body.Only, RestartPods: body.RestartPods, Complete: body.Complete}
	if body.Soak != "" {
		if out.Soak, err = time.ParseDuration(body.Soak); err != nil || out.Soak <= 0 {
			return out, fault.New(fault.Invalid, "InvalidParameter", "'%.60s' is no time to wait.", body.Soak).At("soak").WithFix("10m, for instance")
		}
	}
	return out, out.Check()
}

// operationURL is where a rotation is looked at. Its name says which, so that the
// cluster can be asked for it.
func operationURL(r *azureapi.Request, o *cluster.RotationObject) string {
	name := o.UID + "*" + base64.RawURLEncoding.EncodeToString([]byte(o.Spec.Cluster))
	return fmt.Sprintf("%s/subscriptions/%s/providers/Microsoft.ContainerService/locations/global/operations/%s?api-version=%s", r.BaseURL(), r.Param("subscription"), name, r.Version)
}

func (s surface) operation(r *azureapi.Request) (*azureapi.Reply, error) {
	name := r.Param("operation")
	uid, coded, ok := strings.Cut(name, "*")
	id, err := base64.RawURLEncoding.Strict().DecodeString(coded)
	if !ok || err != nil {
		return nil, fault.New(fault.NotFound, "OperationNotFound", "There is no operation '%.100s'.", name)
	}
	o, err := s.Clusters.Rotation(r.Context(), string(id), uid)
	if err != nil {
		return nil, err
	}
	rot := rotationToWire(o)
	out := wire.RotationOperation{
		ID: r.Path(), Name: name, ResourceID: o.Spec.Cluster, Status: "InProgress", StartTime: rot.Started, EndTime: rot.Ended, Percent: rot.Percent, Error: rot.Error, Properties: *rot,
	}
	if o.Status.State != cluster.RotationRunning {
		out.Status = o.Status.State
	}
	out.Properties.Error = nil // it stands beside
	return azureapi.OK(out).With("Retry-After", "2"), nil
}

func rotationToWire(o *cluster.RotationObject) *wire.Rotation {
	st := o.Status
	out := &wire.Rotation{
		State: st.State, Started: o.Created, Ended: st.Ended, Run: st.Run, Phase: st.Phase(), Node: st.Node(), Step: st.Step, Done: st.Done, Steps: st.Steps,
		Percent: st.Percent(), Waiting: st.Waiting, NoReturn: st.NoReturn, Kubeconfig: st.Kubeconfig,
	}
	switch {
	case st.State == cluster.RotationSucceeded:
		out.Percent = 100
	case st.State == cluster.RotationRunning:
		out.Percent = min(out.Percent, 99) // the kubeconfig comes after the steps
	case st.Problem != nil:
		out.Error = &arm.Error{Code: st.Problem.Code, Message: st.Problem.Message}
		if st.Problem.Fix != "" {
			out.Error.Details = []arm.Error{{Code: "Fix", Message: st.Problem.Fix}}
		}
	}
	return out
}

// rotationState shows the last rotation in a cluster; one that runs makes the cluster Updating.
func rotationState(p *wire.ClusterProperties, o *cluster.RotationObject) {
	if o == nil {
		return
	}
	p.Rotation = rotationToWire(o)
	if o.Status.State == cluster.RotationRunning {
		p.ProvisioningState, p.Observed.Reason = "Updating", "a rotation of its certificates is running"
	}
}

// sshFromWire is the access that a client gives; nil: none.
func sshFromWire(s *wire.SSHAccess) *cluster.SSH {
	if s == nil {
		return nil
	}
	return &cluster.SSH{Host: s.Host, User: s.User, Key: []byte(s.PrivateKey), KnownHosts: []byte(s.KnownHosts)}
}

// sshToWire is the access as clients get it; door is "user@host".
func sshToWire(door string) *wire.SSHAccess {
	user, host, ok := strings.Cut(door, "@")
	if !ok {
		return nil
	}
	return &wire.SSHAccess{Host: host, User: user}
}

func (s surface) rotationRoutes(one string, row func(method, path string, v []string, action string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route) []azureapi.Route {
	return []azureapi.Route{
		row(http.MethodPost, one+"/rotateclustercertificates", versions, wire.Type+"/rotateClusterCertificates/action", s.rotate),
		row(http.MethodGet, "/subscriptions/{subscription}/providers/microsoft.containerservice/locations/{location}/operations/{operation}", versions, azureapi.Authenticated, s.operation),
	}
}
