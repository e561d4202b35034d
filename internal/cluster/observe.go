package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Observation is what a manager saw of a cluster; the zero value: nobody has looked yet.
type Observation struct {
	Time time.Time `json:"time,omitzero"` // by this server's clock
	// Problem says why the cluster could not be looked at; all below is then of an
	// earlier look, at Seen.
	Problem string    `json:"problem,omitempty"`
	Seen    time.Time `json:"seen,omitzero"`
	View
}

// View is what can be seen of a cluster.
type View struct {
	Version   string          `json:"version,omitempty"` // of the API server, "v1.36.3"
	Nodes     int             `json:"nodes"`
	Ready     int             `json:"ready"`               // of Nodes
	Issuer    string          `json:"issuer,omitempty"`    // of service account tokens
	KeySet    json.RawMessage `json:"keySet,omitempty"`    // its public keys (RFC 7517)
	Webhook   bool            `json:"webhook,omitempty"`   // pods get the tokens and variables of workload identity
	CSIDriver bool            `json:"csiDriver,omitempty"` // the Secrets Store CSI driver and its kind are there
	// Missing are permissions that the kubeconfig does not give, with what is
	// therefore not known.
	Missing []string `json:"missing,omitempty"`
}

const (
	maxKeySet  = 64 << 10
	maxProblem = 1000
	maxMissing = 20
)

// Assignment is a cluster that a manager shall look at. Login changes when the
// kubeconfig does.
type Assignment struct{ ID, Login string }

// Work returns all clusters, for a manager.
func (s *Service) Work(ctx context.Context) ([]Assignment, error) {
	op := access.Op{Action: actionManage, Resource: "/"}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return nil, s.cfg.Gate.Read(ctx, op) // records the refusal; what is allowed is no secret, and asked for all the time
	}
	tx := s.cfg.Store.View(ctx)
	all, err := Clusters.List(tx, "")
	if err != nil {
		return nil, err
	}
	out := []Assignment{}
	for _, o := range all {
		l, err := logins.Lookup(tx, o.ID)
		if err != nil {
			return nil, err
		}
		if l != nil { // else it is being deleted
			out = append(out, Assignment{o.Spec.ID, l.ETag(s.cfg.Store)})
		}
	}
	return out, nil
}

// ManagerCredential returns the kubeconfig of a cluster to a manager.
func (s *Service) ManagerCredential(ctx context.Context, resourceID string) ([]byte, error) {
	return s.credential(ctx, resourceID, actionManage)
}

// Report takes what a manager saw of a cluster: a view, or the problem for which
// there is none.
func (s *Service) Report(ctx context.Context, resourceID string, v View, problem string) error {
	id, err := parseID(resourceID)
	if err != nil {
		return err
	}
	if err := v.check(problem); err != nil {
		return err
	}
	op := access.Op{Action: actionManage, Resource: id.String()}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	now := s.cfg.Now().UTC()
	return s.cfg.Store.Update(ctx, func(tx *store.Tx) error {
		o, err := lookup(tx, id)
		if err != nil {
			return err
		}
		was := o.Status
		o.Status.Time, o.Status.Problem = now, problem
		if problem == "" {
			o.Status.Seen, o.Status.View = now, v
		}
		if was.Problem == problem && reflect.DeepEqual(was.View, o.Status.View) && now.Sub(was.Time) < Fresh/3 {
			return nil // nothing new: not worth a write
		}
		return Clusters.PutStatus(tx, o)
	})
}

func (v View) check(problem string) error {
	switch {
	case len(problem) > maxProblem || len(v.Missing) > maxMissing || len(v.KeySet) > maxKeySet || len(v.Version) > 100 || len(v.Issuer) > 600:
		return fault.New(fault.Invalid, "InvalidObservation", "The observation is larger than anything that can be seen of a cluster.")
	case problem == "" && v.Version == "":
		return fault.New(fault.Invalid, "InvalidObservation", "The observation has neither a version nor a problem.").At("version")
	case v.Ready < 0 || v.Ready > v.Nodes:
		return fault.New(fault.Invalid, "InvalidObservation", "%d of %d nodes cannot be ready.", v.Ready, v.Nodes).At("ready")
	case (v.Issuer == "") != (len(v.KeySet) == 0):
		return fault.New(fault.Invalid, "InvalidObservation", "Issuer and key set come together.").At("keySet")
	case len(v.KeySet) > 0 && !json.Valid(v.KeySet):
		return fault.New(fault.Invalid, "InvalidObservation", "The key set is no JSON.").At("keySet")
	}
	return nil
}

// State is the provisioning state of a cluster, with the reason where it is not
// Succeeded: Creating until somebody has looked, Failed if the last look failed or
// nobody looks any more.
func (o Observation) State(now time.Time) (state, reason string) {
	switch {
	case o.Time.IsZero():
		return "Creating", "no manager has looked at the cluster yet; keyfleet-connector manager does"
	case o.Problem != "":
		return "Failed", o.Problem
	case now.Sub(o.Time) > Fresh:
		return "Failed", fmt.Sprintf("no manager has looked at the cluster since %s", o.Time.UTC().Format(time.RFC3339))
	}
	return "Succeeded", ""
}

// Issuer returns the standard resource id and the issuer of a cluster that the
// caller may read, as it was seen.
func (s *Service) Issuer(ctx context.Context, resourceID string) (id, issuer string, err error) {
	o, err := s.Get(ctx, resourceID)
	if err != nil {
		return "", "", err
	}
	if o.Status.Issuer == "" {
		state, reason := o.Status.State(s.cfg.Now())
		return "", "", fault.New(fault.Conflict, "IssuerNotSeen", "The issuer of the cluster '%s' was not seen yet (it is %s: %s).", o.Spec.ID, state, cmp.Or(reason, "its kubeconfig does not give the permission")).
			WithFix("keyfleet cluster show %s says what is missing", o.ID[strings.LastIndexByte(o.ID, '/')+1:])
	}
	return o.Spec.ID, o.Status.Issuer, nil
}

// KeySet returns the public keys (RFC 7517) that a cluster publishes as that issuer,
// as they were last seen.
func (s *Service) KeySet(ctx context.Context, issuer, resourceID string) ([]byte, error) {
	id, err := parseID(resourceID)
	if err != nil {
		return nil, err
	}
	o, err := lookup(s.cfg.Store.View(ctx), id)
	if err != nil {
		return nil, err
	}
	switch age := s.cfg.Now().Sub(o.Status.Seen); {
	case o.Status.Issuer != issuer:
		return nil, fmt.Errorf("the issuer of the cluster %s is '%s' now", o.Spec.ID, o.Status.Issuer)
	case age > keysFresh:
		return nil, fmt.Errorf("the keys of the cluster %s were last seen %s ago; is its manager running?", o.Spec.ID, age.Round(time.Second))
	}
	return o.Status.View.KeySet, nil
}

// keysFresh is how long the keys of a cluster's issuer count after they were seen.
const keysFresh = time.Hour
