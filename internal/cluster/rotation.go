package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// A rotation replaces the certificates of a cluster. It is an object of its own, so
// that who asked for it finds its end, and the server that leads finds what is left
// to do. The work is that of the program rotate-certs: see rotationloop.go.

// Options are what a rotation may be asked to do otherwise than by default. They are
// those of rotate-certs.
type Options struct {
	Only        []string      `json:"only,omitempty"`        // what to rotate; empty: everything
	Soak        time.Duration `json:"soak,omitempty"`        // longest wait until the old is unused; zero: the longest token lifetime, at most an hour
	RestartPods bool          `json:"restartPods,omitempty"` // restart the owners of pods that use the old
	Complete    bool          `json:"complete,omitempty"`    // retire the old although it is in use
}

// rotationParts are what rotate-certs --only knows.
var rotationParts = []string{"cluster-ca", "etcd-ca", "front-proxy-ca", "service-account-keys", "leaves"}

// Check refuses options that rotate-certs would refuse.
func (o Options) Check() error {
	for _, part := range o.Only {
		if !slices.Contains(rotationParts, part) {
			return fault.New(fault.Invalid, "InvalidParameter", "'%.60s' cannot be rotated alone.", part).At("only").WithFix("%s", strings.Join(rotationParts, ", "))
		}
	}
	return nil
}

// Rotation is the spec of a rotation.
type Rotation struct {
	Cluster string  `json:"cluster"` // ARM id
	Options Options `json:"options"`
}

// The states of a rotation.
const (
	RotationRunning   = "Running"
	RotationSucceeded = "Succeeded"
	RotationFailed    = "Failed"
)

// RotationStatus is how far a rotation is.
type RotationStatus struct {
	State    string    `json:"state"`
	Ended    time.Time `json:"ended,omitzero"`
	Host     string    `json:"host,omitempty"` // name of the machine that keeps the run's journal
	Progress `json:"progress"`
	// Kubeconfig says what became of the registered kubeconfig; empty: not looked at yet.
	Kubeconfig string   `json:"kubeconfig,omitempty"`
	Problem    *Problem `json:"problem,omitempty"` // of a failed one
}

// Progress is what a run of rotate-certs has told so far.
type Progress struct {
	Run      string `json:"run,omitempty"`
	Done     int    `json:"done,omitempty"` // number of the last step that is done
	Steps    int    `json:"steps,omitempty"`
	Step     string `json:"step,omitempty"`    // its name: "trust: restart kube-apiserver on cp1"
	Waiting  string `json:"waiting,omitempty"` // for whom, in the soak
	NoReturn bool   `json:"noReturn,omitempty"`
}

// Phase and Node are taken from the step's name; empty: none.
func (p Progress) Phase() string {
	phase, _, _ := strings.Cut(p.Step, ":")
	return phase
}

// Node is the machine of the last step; empty: none in particular.
func (p Progress) Node() string {
	if i := strings.LastIndex(p.Step, " on "); i >= 0 {
		return p.Step[i+len(" on "):]
	}
	return ""
}

// Percent of the steps that are done.
func (p Progress) Percent() int { return p.Done * 100 / max(p.Steps, 1) }

// Problem is why a rotation stopped, and the way on.
type Problem struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"`
}

// RotationObject is a stored rotation. Its id is that of the cluster and a number.
type RotationObject = store.Object[Rotation, RotationStatus]

var rotations = store.NewCollection[Rotation, RotationStatus]("cluster-rotations")

// rotationsKept is how many rotations of a cluster are remembered.
const rotationsKept = 10

// Rotate starts a rotation. While one runs that was asked for in the same way, it is joined.
func (s *Service) Rotate(ctx context.Context, resourceID string, want Options) (out *RotationObject, err error) {
	id, err := parseID(resourceID)
	if err != nil {
		return nil, err
	}
	op := access.Op{Action: actionRotate, Resource: id.String(), Detail: strings.Join(want.Only, " ")}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		o, err := lookup(tx, id)
		if err != nil {
			return err
		}
		if err := s.canRotate(o); err != nil {
			return err
		}
		all, err := rotations.List(tx, o.ID+"/")
		if err != nil {
			return err
		}
		if out = running(all); out != nil {
			return joins(out, want)
		}
		number := 1
		if n := len(all); n > 0 {
			if _, err := fmt.Sscanf(strings.TrimPrefix(all[n-1].ID, o.ID+"/"), "%d", &number); err != nil {
				return fmt.Errorf("numbering a rotation after %s: %w", all[n-1].ID, err)
			}
			number++
		}
		out = &RotationObject{
			Meta: store.Meta{ID: fmt.Sprintf("%s/%08d", o.ID, number)}, Spec: Rotation{Cluster: o.Spec.ID, Options: want}, Status: RotationStatus{State: RotationRunning},
		}
		for _, old := range all[:max(0, len(all)-rotationsKept+1)] {
			if err := rotations.Delete(tx, old.ID); err != nil {
				return err
			}
		}
		return rotations.Insert(tx, out)
	})
	return out, err
}

func (s *Service) canRotate(o *Object) error {
	if o.Spec.SSH == "" {
		name, group := nameAndGroup(o)
		return fault.New(fault.Conflict, "SSHAccessNotConfigured", "The certificates of the cluster '%s' cannot be rotated: no SSH access to its machines is configured.", o.Spec.ID).
			WithFix(registerSSH, name, group)
	}
	if s.cfg.CanRotate == nil {
		return fault.New(fault.Conflict, "RotationNotOffered", "This server rotates no certificates of clusters.").WithFix("run keyfleet rotate-certs where the cluster is reached by SSH")
	}
	return s.cfg.CanRotate()
}

func nameAndGroup(o *Object) (name, group string) {
	id, _ := parseID(o.Spec.ID) // it was parsed when it was stored
	return id.Name(), id.ResourceGroup
}

func running(all []*RotationObject) *RotationObject {
	if i := slices.IndexFunc(all, func(r *RotationObject) bool { return r.Status.State == RotationRunning }); i >= 0 {
		return all[i]
	}
	return nil
}

// joins refuses to take one rotation for another.
func joins(r *RotationObject, want Options) error {
	have := r.Spec.Options
	if slices.Equal(have.Only, want.Only) && have.Soak == want.Soak && have.RestartPods == want.RestartPods && have.Complete == want.Complete {
		return nil
	}
	return rotating(r).WithFix("it was asked for with other options; wait for its end: keyfleet cluster show %s", clusterName(r))
}

func rotating(r *RotationObject) *fault.Error {
	p := r.Status.Progress
	at := "it begins"
	if p.Step != "" {
		at = fmt.Sprintf("%d %% are done, the last: %s", p.Percent(), p.Step)
	}
	return fault.New(fault.Conflict, "Conflict", "The cluster '%s' is being updated: a rotation of its certificates is running since %s (%s).",
		r.Spec.Cluster, r.Created.UTC().Format(time.RFC3339), at).After(30 * time.Second)
}

func clusterName(r *RotationObject) string {
	return r.Spec.Cluster[strings.LastIndexByte(r.Spec.Cluster, '/')+1:]
}

// forgetRotations removes what is kept for rotations of a cluster that is forgotten,
// and refuses while one runs. The journals stay, sealed, as they do on the masters: a
// cluster that is registered again goes on with an unfinished run.
func forgetRotations(tx *store.Tx, o *Object) error {
	all, err := rotations.List(tx, o.ID+"/")
	if err != nil {
		return err
	}
	if r := running(all); r != nil {
		return rotating(r).WithFix("wait for its end: keyfleet cluster show %s", clusterName(r))
	}
	for _, r := range all {
		if err := rotations.Delete(tx, r.ID); err != nil {
			return err
		}
	}
	return sshAccess.Delete(tx, o.ID)
}

// Rotation returns a rotation by its cluster and UID.
func (s *Service) Rotation(ctx context.Context, resourceID, uid string) (*RotationObject, error) {
	id, err := parseID(resourceID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionRead, Resource: id.String()}); err != nil {
		return nil, err
	}
	all, err := rotations.List(s.cfg.Store.View(ctx), id.StoreKey()+"/")
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(all, func(r *RotationObject) bool { return r.UID == uid }); i >= 0 {
		return all[i], nil
	}
	return nil, fault.New(fault.NotFound, "OperationNotFound", "There is no such rotation of the cluster '%s' any more.", id.String())
}

// LastRotations returns the last rotation of each of some clusters, by the clusters'
// ids in the store; of one that has none, nothing. It decides nothing about access.
func (s *Service) LastRotations(ctx context.Context, of ...*Object) (map[string]*RotationObject, error) {
	out := map[string]*RotationObject{}
	tx := s.cfg.Store.View(ctx)
	for _, o := range of {
		if o.Spec.SSH == "" {
			continue // it never had one
		}
		all, err := rotations.List(tx, o.ID+"/")
		if err != nil {
			return nil, err
		}
		if n := len(all); n > 0 {
			out[o.ID] = all[n-1]
		}
	}
	return out, nil
}

// Busy says what changes a cluster at the moment; empty: nothing. It decides nothing
// about access.
func (s *Service) Busy(ctx context.Context, o *Object) (string, error) {
	last, err := s.LastRotations(ctx, o)
	if r := last[o.ID]; err == nil && r != nil && r.Status.State == RotationRunning {
		return "a rotation of its certificates", nil
	}
	return "", err
}
