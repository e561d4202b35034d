package connector

import (
	"context"
	"errors"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Finding is one line of a validation.
type Finding struct {
	Name        string
	Description string
	Result      string // success, failure, warning
	Code        string
	Message     string
}

// Validation is what a look at everything about a connection found.
type Validation struct {
	Started, Ended time.Time
	Findings       []Finding
}

// Available reports whether nothing has failed.
func (v Validation) Available() bool {
	for _, f := range v.Findings {
		if f.Result == "failure" {
			return false
		}
	}
	return true
}

// Validate looks at everything that a connection needs, now: the cluster and the
// objects in it as its manager last saw them, the vault, the identity, the login.
func (s *Service) Validate(ctx context.Context, linkerID string) (Validation, error) {
	v := Validation{Started: s.cfg.Now().UTC()}
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return v, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionValidate, Resource: LinkerID(cluster, name)}); err != nil {
		return v, err
	}
	o, err := lookup(s.cfg.Store.View(ctx), cluster, name)
	if err != nil {
		return v, err
	}
	ctx = system(ctx)
	c := controller{s}
	look := func(name, description string, fn func() error) {
		f := Finding{Name: name, Description: description, Result: "success"}
		if err := fn(); err != nil {
			f.Result = "failure"
			p := problemOf(err)
			if f.Code, f.Message = p.Code, p.Message; p.Fix != "" {
				f.Message += " Fix: " + p.Fix
			}
			var w waiting
			if errors.As(err, &w) { // it may be right in a moment, and is not now
				f.Code, f.Message = "Waiting", "The connection waits for "+w.what+"."
			}
		}
		v.Findings = append(v.Findings, f)
	}
	state, err := s.cfg.Clusters.State(ctx, cluster)
	look("Cluster", "The cluster answers", func() error {
		if err == nil && state.State != "Succeeded" {
			err = fault.New(fault.Unavailable, "ClusterNotReady", "The cluster is %s: %s.", state.State, state.Reason)
		}
		return err
	})
	r, onServer, err := s.reachTarget(ctx, o.Spec)
	if onServer || err != nil {
		look("Target", "The target existence is validated", func() error {
			if err == nil {
				_, err = s.cfg.Maker.Check(ctx, r)
			}
			return err
		})
	}
	d, err := s.desired(ctx, o)
	look("Configuration", "The configured values is validated", func() error { return err })
	if err == nil {
		look("Delivery", "The objects in the cluster are as they shall be", func() error {
			_, err := c.delivered(ctx, o, d, state)
			return err
		})
	}
	if o.Spec.Auth.Type == CSIAddOn {
		look("Addon", "The add-on of the cluster is validated", func() error { return s.addonFinding(ctx, o, cluster, state) })
	}
	if o.Spec.Auth.actsAs() {
		look("Identity", "The identity existence is validated", func() error {
			_, err := s.cfg.Identities.Find(ctx, o.Spec.Auth.Identity, "")
			return err
		})
		look("Permission", "The identity permission is validated", func() error { return s.permitted(ctx, o) })
	}
	if onServer && o.Spec.Auth.Type == Secret {
		look("Login", "The target takes the login that the cluster has", func() error {
			login, err := s.login(ctx, o)
			if err != nil {
				return err
			}
			_, err = s.cfg.Maker.Prove(ctx, r, login)
			return err
		})
	}
	v.Ended = s.cfg.Now().UTC()
	return v, nil
}

// permitted looks whether the identity may read the vault that it is connected to.
func (s *Service) permitted(ctx context.Context, o *Object) error {
	if _, ok := s.cfg.Vaults.Endpoint(ctx, o.Spec.Target.ID); !ok {
		return nil // not this server's to know
	}
	granted, err := s.cfg.Vaults.Granted(ctx, o.Spec.Target.ID, o.Spec.Auth.ObjectID)
	if err == nil && !granted {
		err = fault.New(fault.Denied, "VaultAccessMissing", "The identity has no access policy at the vault '%s' that lets it read secrets.", o.Spec.Target.ID).
			WithFix("make the connection again, or: keyfleet policy set, with --secrets get")
	}
	return err
}
