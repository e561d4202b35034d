// Package clusters is the surface of registered Kubernetes clusters: the management
// API of Microsoft.ContainerService/managedClusters as far as a cluster that exists
// already has one, and Keyfleet's own rows for managers.
//
//	PUT, PATCH, GET, DELETE .../managedClusters/{name}           register (properties.kubeconfig), show, forget
//	POST .../listClusterUserCredential                           the kubeconfig back
//	POST .../rotateClusterCertificates                           needs SSH access (properties.ssh)
//	GET  .../locations/{location}/operations/{operation}         how far that is
//	GET  /keyfleet/v1/clusters/work                              what a manager has to look after
//	POST /keyfleet/v1/subscriptions/.../kubeconfig               the kubeconfig, for a manager
//	PUT  /keyfleet/v1/subscriptions/.../observation              what it saw
//
// Invariant: a kubeconfig or an SSH key is never part of a cluster's representation.
//
// Consequence for the operator: a body that asks for a cluster to be made (node
// pools, networks) is refused with the member's name, not accepted and forgotten.
package clusters

import (
	"context"
	"net/http"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/subscription"
)

// versions are api-versions that clients of managed clusters send, oldest first:
// az 2.45 sends 2023-01-01, az 2.74 2025-03-01 or a preview beside it,
// armcontainerservice v6 2025-01-01.
var versions = []string{
	"2020-09-01", "2021-03-01", "2021-05-01", "2021-07-01", "2021-08-01", "2021-09-01", "2021-10-01", "2022-01-01", "2022-02-01", "2022-03-01", "2022-04-01",
	"2022-06-01", "2022-07-01", "2022-09-01", "2022-11-01", "2023-01-01", "2023-02-01", "2023-03-01", "2023-04-01", "2023-05-01", "2023-06-01", "2023-07-01",
	"2023-08-01", "2023-09-01", "2023-10-01", "2023-11-01", "2024-01-01", "2024-02-01", "2024-05-01", "2024-06-01", "2024-07-01", "2024-08-01", "2024-09-01",
	"2024-10-01", "2025-01-01", "2025-02-01", "2025-03-01", "2025-04-01", "2025-05-01",
}

// Config is what the surface needs.
type Config struct {
	Clusters *cluster.Service
	// Connections are what a manager brings to the clusters. Nil: nothing.
	Connections interface {
		Work(ctx context.Context) (map[string][]wire.ConnectionWork, map[string][]wire.ExtensionWork, error)
		Questions(ctx context.Context) (map[string][]wire.Question, error)
	}
	Now func() time.Time // nil: time.Now
}

type surface struct{ Config }

// Routes is the route table of the surface.
func Routes(cfg Config) []azureapi.Route {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := surface{cfg}
	const (
		typ    = "/providers/microsoft.containerservice/managedclusters"
		group  = "/subscriptions/{subscription}/resourcegroups/{group}" + typ
		one    = group + "/{name}"
		manage = "Keyfleet/clusters/manage/action"
	)
	row := func(method, path string, v []string, action string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: path, Versions: v, Action: action, Handle: h}
	}
	return append(s.rotationRoutes(one, row),
		row(http.MethodGet, "/subscriptions/{subscription}"+typ, versions, wire.Type+"/read", s.list),
		row(http.MethodGet, group, versions, wire.Type+"/read", s.list),
		row(http.MethodGet, one, versions, wire.Type+"/read", s.get),
		row(http.MethodPut, one, versions, wire.Type+"/write", s.put),
		row(http.MethodPatch, one, versions, wire.Type+"/write", s.patch),
		row(http.MethodDelete, one, versions, wire.Type+"/delete", s.delete),
		row(http.MethodPost, one+"/listclusterusercredential", versions, wire.Type+"/listClusterUserCredential/action", s.credential),
		row(http.MethodGet, "/keyfleet/v1/clusters/work", nil, manage, s.work),
		row(http.MethodPost, "/keyfleet/v1"+one+"/kubeconfig", nil, manage, s.managerCredential),
		row(http.MethodPut, "/keyfleet/v1"+one+"/observation", nil, manage, s.report),
	)
}

// clusterID is the resource id that the path names, without what follows the cluster.
func clusterID(r *azureapi.Request) string {
	return arm.ID{
		Subscription: r.Param("subscription"), ResourceGroup: r.Param("group"), Provider: "Microsoft.ContainerService",
		Types: []string{"managedClusters"}, Names: []string{r.Param("name")},
	}.String()
}

// shown answers with a cluster.
func (s surface) shown(r *azureapi.Request, o *cluster.Object) (*azureapi.Reply, error) {
	last, err := s.Clusters.LastRotations(r.Context(), o)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(s.toWire(o, last[o.ID])), nil
}

// toWire is a cluster as clients get it: what was seen, and whether that still
// counts. last is its last rotation; nil: there was none.
func (s surface) toWire(o *cluster.Object, last *cluster.RotationObject) wire.ManagedCluster {
	id, _ := arm.ParseID(o.Spec.ID) // it was parsed when it was stored
	state, reason := o.Status.State(s.Now())
	v := o.Status.View
	p := wire.ClusterProperties{
		ProvisioningState: state, KubernetesVersion: strings.TrimPrefix(v.Version, "v"), CurrentKubernetesVersion: strings.TrimPrefix(v.Version, "v"),
		Observed: &wire.Observed{Time: o.Status.Seen, Reason: reason, Server: o.Spec.Server, Nodes: v.Nodes, Ready: v.Ready, Missing: v.Missing},
	}
	if host, _, ok := strings.Cut(strings.TrimPrefix(o.Spec.Server, "https://"), ":"); ok || host != "" {
		p.FQDN = host
	}
	if !o.Status.Seen.IsZero() {
		p.OIDCIssuerProfile = &wire.OIDCIssuer{Enabled: v.Issuer != "", IssuerURL: v.Issuer}
		p.SecurityProfile = &wire.Security{WorkloadIdentity: wire.Enabled{Enabled: v.Webhook}}
		p.AddonProfiles = map[string]wire.Addon{wire.KeyVaultAddon: {Enabled: v.CSIDriver}}
	}
	p.SSH = sshToWire(o.Spec.SSH)
	rotationState(&p, last)
	if state == "Succeeded" {
		p.PowerState = &wire.PowerState{Code: "Running"}
	}
	return wire.ManagedCluster{ID: o.Spec.ID, Name: id.Name(), Type: wire.Type, Location: o.Spec.Location, Tags: o.Spec.Tags, Properties: p}
}

func (s surface) list(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Clusters.List(r.Context(), r.Param("subscription"), r.Param("group"))
	if err != nil {
		return nil, err
	}
	last, err := s.Clusters.LastRotations(r.Context(), all...)
	if err != nil {
		return nil, err
	}
	out := arm.List[wire.ManagedCluster]{Value: make([]wire.ManagedCluster, len(all))}
	for i, o := range all {
		out.Value[i] = s.toWire(o, last[o.ID])
	}
	return azureapi.OK(out), nil
}

func (s surface) get(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Clusters.Get(r.Context(), clusterID(r))
	if err != nil {
		return nil, err
	}
	return s.shown(r, o)
}

// put registers. What clients send back of what they got is read and ignored; what
// would make a cluster is refused, for the decoder knows no such member.
func (s surface) put(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.ManagedCluster
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	location, err := subscription.NormalizeLocation(body.Location)
	if err != nil {
		return nil, err
	}
	o, created, err := s.Clusters.Register(r.Context(), cluster.Registration{
		ID: clusterID(r), Location: location, Tags: body.Tags, Kubeconfig: []byte(body.Properties.Kubeconfig), SSH: sshFromWire(body.Properties.SSH),
	})
	if err != nil {
		return nil, err
	}
	reply, err := s.shown(r, o)
	if err == nil && created {
		reply.Status = http.StatusCreated
	}
	return reply, err
}

func (s surface) patch(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.ClusterUpdate
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	o, err := s.Clusters.Tag(r.Context(), clusterID(r), body.Tags)
	if err != nil {
		return nil, err
	}
	return s.shown(r, o)
}

func (s surface) delete(r *azureapi.Request) (*azureapi.Reply, error) {
	existed, err := s.Clusters.Delete(r.Context(), clusterID(r))
	if err != nil {
		return nil, err
	}
	if !existed {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Status(http.StatusOK), nil
}

func (s surface) credential(r *azureapi.Request) (*azureapi.Reply, error) {
	text, err := s.Clusters.UserCredential(r.Context(), clusterID(r))
	if err != nil {
		return nil, err
	}
	return secret(wire.CredentialResults{Kubeconfigs: []wire.CredentialResult{{Name: "clusterUser", Value: text}}}), nil
}

func (s surface) managerCredential(r *azureapi.Request) (*azureapi.Reply, error) {
	text, err := s.Clusters.ManagerCredential(r.Context(), clusterID(r))
	if err != nil {
		return nil, err
	}
	return secret(wire.CredentialResult{Name: r.Param("name"), Value: text}), nil
}

func secret(body any) *azureapi.Reply { return azureapi.OK(body).With("Cache-Control", "no-store") }

func (s surface) work(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Clusters.Work(r.Context())
	if err != nil {
		return nil, err
	}
	var connections map[string][]wire.ConnectionWork // by the keys of clusters
	var extensions map[string][]wire.ExtensionWork
	var questions map[string][]wire.Question
	if s.Connections != nil {
		if connections, extensions, err = s.Connections.Work(r.Context()); err != nil {
			return nil, err
		}
		if questions, err = s.Connections.Questions(r.Context()); err != nil {
			return nil, err
		}
	}
	out := wire.Work{Clusters: make([]wire.Assignment, len(all))}
	for i, a := range all {
		key := strings.ToLower(a.ID)
		out.Clusters[i] = wire.Assignment{ID: a.ID, Login: a.Login, Connections: connections[key], Extensions: extensions[key], Questions: questions[key]}
	}
	return azureapi.OK(out), nil
}

func (s surface) report(r *azureapi.Request) (*azureapi.Reply, error) {
	var o wire.Observation
	if err := r.Decode(&o); err != nil {
		return nil, err
	}
	v := cluster.View{
		Version: o.Version, Nodes: o.Nodes, Ready: o.Ready, Issuer: o.Issuer, KeySet: o.KeySet, Webhook: o.Webhook, CSIDriver: o.CSIDriver, Missing: o.Missing,
	}
	if err := s.Clusters.Report(r.Context(), clusterID(r), v, o.Problem); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}
