package connector

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// Removal is the report of a deletion. It is kept for a day.
type Removal struct {
	ID      string    `json:"id"`  // of the connection
	UID     string    `json:"uid"` // of that very one
	Removed []string  `json:"removed,omitempty"`
	Kept    []string  `json:"kept,omitempty"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"` // zero: it is under way
}

// removals are the reports, by the UIDs of connections.
var removals = store.NewCollection[Removal, struct{}]("connection-removals")

// removalKept is how long a report can be read.
const removalKept = 24 * time.Hour

// Finalize implements reconcile.Finalizer: first the cluster, where workloads get
// the credential from, then what it opens, then the vault, then the grants. The
// report grows with every step, so that a crash leaves none of it out.
func (c controller) Finalize(ctx context.Context, st *store.Store, o *Object) (bool, reconcile.Result, error) {
	ctx = system(ctx)
	o.Status.State = "Deleting"
	err := c.remove(ctx, st, o)
	o.Status.Waiting, o.Status.Problem = "", nil
	var w waiting
	switch {
	case err == nil:
		return true, reconcile.Result{}, c.forgetRemovals(ctx, st)
	case errors.As(err, &w):
		o.Status.Waiting = w.what
		return false, reconcile.Result{After: w.after}, nil
	}
	o.Status.Problem = problemOf(err)
	return false, reconcile.Result{}, err
}

func (c controller) remove(ctx context.Context, st *store.Store, o *Object) error {
	if r, err := removals.Lookup(c.cfg.Store.View(ctx), o.UID); err != nil || r != nil && !r.Spec.Ended.IsZero() {
		return err // all was done by an attempt that ended before it could let the connection go
	}
	note := func(removed, kept []string) error {
		return st.Update(ctx, func(tx *store.Tx) error {
			r, err := removals.Lookup(tx, o.UID)
			if err != nil {
				return err
			}
			isNew := r == nil
			if isNew {
				r = &store.Object[Removal, struct{}]{Meta: store.Meta{ID: o.UID}, Spec: Removal{ID: o.Spec.ID, UID: o.UID, Started: o.Deleting}}
			}
			r.Spec.Removed, r.Spec.Kept = with(r.Spec.Removed, removed), with(r.Spec.Kept, kept)
			if isNew {
				return removals.Insert(tx, r)
			}
			return removals.Put(tx, r)
		})
	}
	if err := c.leaveCluster(ctx, o, note); err != nil {
		return err
	}
	if err := c.leaveAddon(ctx, o, note); err != nil {
		return err
	}
	if err := c.leaveTarget(ctx, o, note); err != nil {
		return err
	}
	revoked, err := c.revoke(ctx, o)
	if err != nil {
		return err
	}
	return st.Update(ctx, func(tx *store.Tx) error {
		for _, drop := range []func(*store.Tx, string) error{reports.Delete, makings.Delete} {
			if err := drop(tx, o.ID); err != nil {
				return err
			}
		}
		r, err := removals.Get(tx, o.UID)
		if err != nil {
			return err
		}
		r.Spec.Removed, r.Spec.Ended = with(r.Spec.Removed, revoked), c.cfg.Now().UTC()
		return removals.Put(tx, r)
	})
}

// leaveCluster waits until the manager has seen that the objects are gone. A
// cluster that is not registered any more cannot be reached: its objects stay, and
// the report says so.
func (c controller) leaveCluster(ctx context.Context, o *Object, note func(removed, kept []string) error) error {
	cluster, _, err := parseLinker(o.Spec.ID)
	if err != nil {
		return err
	}
	report, err := reports.Lookup(c.cfg.Store.View(ctx), o.ID)
	if err != nil {
		return err
	}
	names := o.Spec.Objects()
	objects := []string{"Secret " + o.Spec.Namespace + "/" + names.Secret}
	if names.ProviderClass != "" {
		objects = []string{"SecretProviderClass " + o.Spec.Namespace + "/" + names.ProviderClass}
	}
	if names.ServiceAccount != "" {
		objects = append(objects, "ServiceAccount "+o.Spec.Namespace+"/"+names.ServiceAccount)
	}
	state, err := c.cfg.Clusters.State(ctx, cluster)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return note(nil, objects)
	case err != nil:
		return err
	case report != nil && report.Spec.Gone && o.Spec.Keep:
		return note(nil, objects)
	case report != nil && report.Spec.Gone:
		return note(objects, nil)
	case o.Status.Desired == "" && (report == nil || report.Spec.Applied == nil):
		return note(nil, nil) // no manager was ever told of it
	case report != nil && report.Spec.Problem != nil:
		return &problemError{*report.Spec.Problem}
	case report != nil && report.Spec.Applied != nil && report.Spec.Applied.Problem != nil:
		return &problemError{*report.Spec.Applied.Problem}
	case state.State != "Succeeded":
		return fault.New(fault.Unavailable, "ClusterNotReady", "The cluster is %s: %s. Its objects are removed when it answers.", state.State, state.Reason).At(state.ID).
			WithFix("if it is gone for good: keyfleet cluster delete %s --yes", cluster.Name())
	}
	return waiting{"the cluster to remove its objects", 10 * time.Second}
}

// leaveTarget removes what Keyfleet made on the server, and the secret.
func (c controller) leaveTarget(ctx context.Context, o *Object, note func(removed, kept []string) error) error {
	cred := o.Status.Credential
	made, err := makings.Lookup(c.cfg.Store.View(ctx), o.ID)
	if err != nil {
		return err
	}
	var removed []string
	if made != nil {
		if cred = made.Spec.Current; cred.Secret.Name == "" && len(made.Spec.Journal) > 0 { // a first one that was not finished
			if cred.Secret, err = c.kept(ctx, o.Spec); err != nil {
				return err
			}
		}
		r, ok, err := c.reachTarget(ctx, o.Spec)
		if err != nil {
			return err
		}
		if ok {
			gone, err := c.cfg.Maker.Remove(ctx, r, o.Spec.roleName())
			if err != nil {
				return err
			}
			if gone, err = c.alsoGone(ctx, o, made.Spec, gone); err != nil {
				return err
			}
			for _, g := range gone {
				removed = append(removed, g+" on "+o.Spec.Target.ID)
			}
		}
	}
	if s := cred.Secret; s.Name == o.Spec.secretName() {
		if err := c.cfg.Vaults.Delete(ctx, s); err != nil {
			return err
		}
		removed = append(removed, fmt.Sprintf("secret %s of %s (it can be recovered for a while)", s.Name, s.Vault))
	}
	return note(removed, nil)
}

// alsoGone adds the logins that an attempt removed which ended before it could say so.
func (c controller) alsoGone(ctx context.Context, o *Object, made making, gone []string) ([]string, error) {
	r, err := removals.Get(c.cfg.Store.View(ctx), o.UID)
	if err != nil {
		return nil, err
	}
	said := strings.Join(append(r.Spec.Removed, gone...), "\n")
	for _, user := range []string{made.Previous.User, made.Current.User} {
		if user != "" && !strings.Contains(said, user) {
			gone = append(gone, "login "+user)
		}
	}
	return gone, nil
}

// with adds the lines that are not there yet: a second try finds less to remove.
func with(all, lines []string) []string {
	for _, l := range lines {
		if !slices.Contains(all, l) {
			all = append(all, l)
		}
	}
	return all
}

// forgetRemovals drops old reports.
func (s *Service) forgetRemovals(ctx context.Context, st *store.Store) error {
	return st.Update(ctx, func(tx *store.Tx) error {
		all, err := removals.List(tx, "")
		if err != nil {
			return err
		}
		for _, r := range all {
			if s.cfg.Now().Sub(r.Spec.Started) > removalKept && !r.Spec.Ended.IsZero() {
				if err := removals.Delete(tx, r.ID); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
