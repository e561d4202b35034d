// Package cluster knows the Kubernetes clusters that are registered here: how they
// are reached, and what was last seen of them.
//
// Idea: a cluster is registered with a kubeconfig. A manager (keyfleet-connector)
// fetches it, looks at the cluster again and again, and reports what it saw. This
// server never connects to a cluster itself, so a manager can stand where the
// cluster can be reached, and the server where it cannot.
//
//	Register ──> kubeconfig, sealed ──Work──> manager ──looks──> API server
//	Get      <── observation <───────Report──────┘
//
// Invariant: nothing that a cluster's resource says of the cluster was asked for;
// it was observed, and is shown with its time. The kubeconfig leaves only by two
// recorded operations. The keys of a cluster's issuer count only for who names the
// cluster: anybody can give an API server any issuer.
//
// Consequence for the operator: "Succeeded" means that a manager reached the
// cluster within the last minute; everything else comes with the reason.
package cluster

import (
	"context"
	"regexp"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Type is the ARM type of clusters.
const Type = "Microsoft.ContainerService/managedClusters"

// Fresh is how long an observation counts.
const Fresh = time.Minute

// Cluster is the spec of a registered cluster.
type Cluster struct {
	ID       string            `json:"id"` // ARM id, the creator's casing
	Location string            `json:"location"`
	Tags     map[string]string `json:"tags,omitempty"`
	Server   string            `json:"server"`        // URL of the API server
	SSH      string            `json:"ssh,omitempty"` // user@host of the SSH access; empty: not configured
}

// Object is a stored cluster.
type Object = store.Object[Cluster, Observation]

// Clusters is the collection of clusters; ids are "SUBSCRIPTION/GROUP/NAME".
var Clusters = store.NewCollection[Cluster, Observation]("clusters")

// login is how a cluster is reached; it is stored apart, so that no list of
// clusters carries it. Ids are those of the clusters.
type login struct {
	Kubeconfig Kubeconfig `json:"kubeconfig"`
}

var logins = store.NewCollection[login, struct{}]("cluster-logins")

const (
	actionRead       = Type + "/read"
	actionWrite      = Type + "/write"
	actionDelete     = Type + "/delete"
	actionCredential = Type + "/listClusterUserCredential/action"
	actionRotate     = Type + "/rotateClusterCertificates/action"
	actionManage     = "Keyfleet/clusters/manage/action" // of managers: fetch kubeconfigs, report
)

var name = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?$`) // Azure's rule

// Config is what a Service needs.
type Config struct {
	Store *store.Store // required
	Gate  *access.Gate // required
	// Place fails unless a cluster can be made in the group now. Nil: not checked.
	Place func(tx *store.Tx, subscription, group string) error
	// CanRotate fails, with the way to mend it, unless certificates can be rotated from here. Nil: they cannot.
	CanRotate func() error
	Now       func() time.Time // nil: time.Now
}

// Service has the operations. Make it with [New].
type Service struct{ cfg Config }

// New returns a Service.
func New(cfg Config) *Service {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Service{cfg}
}

// Registration is what a PUT asks for.
type Registration struct {
	ID         string
	Location   string
	Tags       map[string]string
	Kubeconfig []byte // empty: as it is; a new cluster needs one
	SSH        *SSH   // nil: as it is
}

// Register registers a cluster, or changes its kubeconfig and tags. A kubeconfig
// that leads to another API server makes what was seen before count no more.
func (s *Service) Register(ctx context.Context, want Registration) (out *Object, created bool, err error) {
	id, err := parseID(want.ID)
	if err != nil {
		return nil, false, err
	}
	if !name.MatchString(id.Name()) {
		return nil, false, fault.New(fault.Invalid, "InvalidResourceName",
			"The cluster name '%.100s' is not valid: 1 to 63 letters, digits, '_' and '-', the first and the last a letter or digit.", id.Name()).At("name")
	}
	var kubeconfig Kubeconfig
	if len(want.Kubeconfig) > 0 {
		if kubeconfig, err = ParseKubeconfig(want.Kubeconfig, s.cfg.Now()); err != nil {
			return nil, false, err
		}
	}
	op := access.Op{Action: actionWrite, Resource: id.String(), Detail: kubeconfig.Server}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if s.cfg.Place != nil {
			if err := s.cfg.Place(tx, id.Subscription, id.ResourceGroup); err != nil {
				return err
			}
		}
		if out, err = Clusters.Lookup(tx, id.StoreKey()); err != nil {
			return err
		}
		if created = out == nil; created {
			if kubeconfig.Server == "" {
				return fault.New(fault.Invalid, "MissingKubeconfig", "A cluster is registered with a kubeconfig; Keyfleet makes no clusters.").
					At(atKubeconfig).WithFix("keyfleet cluster register %s --kubeconfig FILE", id.Name())
			}
			out = &Object{Meta: store.Meta{ID: id.StoreKey()}, Spec: Cluster{ID: id.String(), Location: want.Location, Tags: want.Tags, Server: kubeconfig.Server}}
			if err := keepSSH(tx, out, want.SSH); err != nil {
				return err
			}
			if err := Clusters.Insert(tx, out); err != nil {
				return err
			}
			return logins.Insert(tx, &store.Object[login, struct{}]{Meta: store.Meta{ID: out.ID}, Spec: login{kubeconfig}})
		}
		return s.change(tx, out, want, kubeconfig)
	})
	return out, created, err
}

func (s *Service) change(tx *store.Tx, o *Object, want Registration, kubeconfig Kubeconfig) error {
	if want.Location != o.Spec.Location {
		return fault.New(fault.Conflict, "InvalidResourceLocation",
			"The resource '%s' already exists in location '%s'. A resource with the same name cannot be created in location '%s'.", o.Spec.ID, o.Spec.Location, want.Location).At("location")
	}
	o.Spec.Tags = want.Tags
	if err := keepSSH(tx, o, want.SSH); err != nil {
		return err
	}
	if kubeconfig.Server != "" {
		l, err := logins.Get(tx, o.ID)
		if err != nil {
			return err
		}
		l.Spec.Kubeconfig = kubeconfig
		if err := logins.Put(tx, l); err != nil {
			return err
		}
		if o.Spec.Server != kubeconfig.Server {
			o.Spec.Server, o.Status = kubeconfig.Server, Observation{}
		}
	}
	return Clusters.Put(tx, o)
}

// Get returns a cluster, fault.NotFound if there is none.
func (s *Service) Get(ctx context.Context, resourceID string) (*Object, error) {
	id, err := parseID(resourceID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionRead, Resource: id.String()}); err != nil {
		return nil, err
	}
	return lookup(s.cfg.Store.View(ctx), id)
}

// List returns the clusters of a subscription, of one group only if group is not empty.
func (s *Service) List(ctx context.Context, subscription, group string) ([]*Object, error) {
	scope := arm.ID{Subscription: subscription, ResourceGroup: group}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionRead, Resource: scope.String()}); err != nil {
		return nil, err
	}
	return s.In(ctx, subscription, group)
}

// In is List without a decision: for listings over all providers and for the
// deletion of a group, which decide themselves.
func (s *Service) In(ctx context.Context, subscription, group string) ([]*Object, error) {
	prefix := subscription + "/"
	if group != "" {
		prefix += group + "/"
	}
	return Clusters.List(s.cfg.Store.View(ctx), strings.ToLower(prefix))
}

// Tag replaces the tags of a cluster; nil leaves them as they are.
func (s *Service) Tag(ctx context.Context, resourceID string, tags map[string]string) (out *Object, err error) {
	id, err := parseID(resourceID)
	if err != nil {
		return nil, err
	}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, access.Op{Action: actionWrite, Resource: id.String()}, func(tx *store.Tx) error {
		if out, err = lookup(tx, id); err != nil {
			return err
		}
		if tags != nil {
			out.Spec.Tags = tags
		}
		return Clusters.Put(tx, out)
	})
	return out, err
}

// Delete forgets a cluster; nothing on the cluster is touched. It reports whether
// there was one. While its certificates are rotated it is refused.
func (s *Service) Delete(ctx context.Context, resourceID string) (existed bool, err error) {
	id, err := parseID(resourceID)
	if err != nil {
		return false, err
	}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, access.Op{Action: actionDelete, Resource: id.String()}, func(tx *store.Tx) error {
		o, err := Clusters.Lookup(tx, id.StoreKey())
		if existed = o != nil; err != nil || o == nil {
			return err
		}
		if err := forgetRotations(tx, o); err != nil {
			return err
		}
		if err := logins.Delete(tx, o.ID); err != nil {
			return err
		}
		return Clusters.Delete(tx, o.ID)
	})
	return existed, err
}

// UserCredential returns the kubeconfig of a cluster, under the cluster's name.
func (s *Service) UserCredential(ctx context.Context, resourceID string) ([]byte, error) {
	return s.credential(ctx, resourceID, actionCredential)
}

func (s *Service) credential(ctx context.Context, resourceID, action string) ([]byte, error) {
	id, err := parseID(resourceID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: action, Resource: id.String()}); err != nil {
		return nil, err
	}
	tx := s.cfg.Store.View(ctx)
	if _, err := lookup(tx, id); err != nil {
		return nil, err
	}
	l, err := logins.Get(tx, id.StoreKey())
	if err != nil {
		return nil, err
	}
	return l.Spec.Kubeconfig.Document(id.Name())
}

func lookup(tx *store.Tx, id arm.ID) (*Object, error) {
	o, err := Clusters.Lookup(tx, id.StoreKey())
	if err == nil && o == nil {
		err = fault.New(fault.NotFound, "ResourceNotFound", "The Resource '%s/%s' under resource group '%s' was not found.", Type, id.Name(), id.ResourceGroup).
			WithFix("keyfleet cluster register %s --group %s --kubeconfig FILE", id.Name(), id.ResourceGroup)
	}
	return o, err
}

// parseID parses the resource id of a cluster and gives it the standard casing of provider and type.
func parseID(s string) (arm.ID, error) {
	id, err := arm.ParseID(s)
	if err != nil || !id.Is(Type) || id.ResourceGroup == "" {
		return arm.ID{}, fault.New(fault.Invalid, "LinkedInvalidPropertyId", "'%.300s' is not the resource id of a cluster.", s).
			WithFix("/subscriptions/ID/resourceGroups/GROUP/providers/%s/NAME", Type)
	}
	id.Provider, id.Types = "Microsoft.ContainerService", []string{"managedClusters"}
	return id, nil
}
