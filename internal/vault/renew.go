package vault

import (
	"context"
	"errors"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// Names of the controllers; the first is also the finalizer of vaults.
const (
	vaultController       = "vaults"
	secretController      = "deletedsecrets"
	certificateController = "certificates"
)

// issueTime is how long making one version may take: an RSA-4096 key on a busy machine takes seconds.
const issueTime = 2 * time.Minute

// Controllers returns what issues, renews and purges. The server runs them while it leads.
func (v *Vaults) Controllers(m *reconcile.Metrics) []reconcile.Runnable {
	return []reconcile.Runnable{
		reconcile.Controller[certificate, certificateStatus]{
			Name: certificateController, Objects: certificates, Reconciler: certificateReconciler{v}, Deadline: issueTime,
			Also: []reconcile.Trigger{v.clockMoved, v.vaultRecovered}, Metrics: m, Log: v.cfg.Log,
		},
		reconcile.Controller[deletedSecret, none]{Name: secretController, Objects: deletedSecrets, Reconciler: secretReconciler{v}, Metrics: m, Log: v.cfg.Log},
		reconcile.Controller[Vault, vaultStatus]{Name: vaultController, Objects: vaults, Reconciler: vaultReconciler{v}, Metrics: m, Log: v.cfg.Log},
	}
}

// todo is what a certificate needs now.
type todo string

const (
	nothing todo = ""
	toIssue todo = "issue" // a request is in progress
	toRenew todo = "renew" // the lifetime action AutoRenew is due
	toNote  todo = "note"  // the lifetime action EmailContacts is due
	toPurge todo = "purge" // deleted, and the retention is over
)

// decide says what a certificate needs at a moment of real and of policy time,
// and after which time to look again (0: when it changes).
func decide(spec *certificate, st *certificateStatus, now, policyNow time.Time) (do todo, after time.Duration) {
	if spec.Deleted != nil {
		if spec.Purging || !now.Before(spec.Deleted.PurgeAt) {
			return toPurge, 0
		}
		return nothing, spec.Deleted.PurgeAt.Sub(now)
	}
	if st.Operation.Status == InProgress && st.Operation.RequestID == spec.Request.ID {
		return toIssue, 0
	}
	if st.Current == "" {
		return nothing, 0
	}
	if a, ok := spec.Policy.action(AutoRenew); ok {
		wait := pki.RenewAt(st.Start, st.NotAfter, a.Trigger).Sub(policyNow)
		if wait <= 0 {
			return toRenew, 0
		}
		after = wait
	}
	if a, ok := spec.Policy.action(EmailContacts); ok && st.MailDue.IsZero() {
		wait := pki.RenewAt(st.Start, st.NotAfter, a.Trigger).Sub(policyNow)
		if wait <= 0 {
			return toNote, after
		}
		if after == 0 || wait < after {
			after = wait
		}
	}
	return nothing, after
}

// renewAt is when the next version is due, in policy time; zero: never by itself.
func renewAt(spec *certificate, st *certificateStatus) time.Time {
	a, ok := spec.Policy.action(AutoRenew)
	if !ok || st.Current == "" || spec.Deleted != nil {
		return time.Time{}
	}
	return pki.RenewAt(st.Start, st.NotAfter, a.Trigger)
}

// certificateReconciler issues, renews and purges certificates.
type certificateReconciler struct{ v *Vaults }

// Reconcile implements reconcile.Reconciler.
func (r certificateReconciler) Reconcile(ctx context.Context, s *store.Store, obj *certificateObject) (reconcile.Result, error) {
	policyNow, err := r.v.policyNow(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	do, after := decide(&obj.Spec, &obj.Status, r.v.cfg.Now(), policyNow)
	switch do {
	case toPurge:
		return reconcile.Result{}, r.v.expireCertificate(ctx, s, obj)
	case toNote:
		obj.Status.MailDue = policyNow.Truncate(time.Second)
		r.v.cfg.Log.Warn("a certificate's lifetime action EmailContacts is due; no mail is sent", "certificate", obj.ID, "notAfter", obj.Status.NotAfter)
		return reconcile.Result{After: after}, nil
	case nothing:
		return reconcile.Result{After: after}, nil
	}
	open, err := inUse(s.View(ctx), obj.ID)
	if err != nil || !open { // a deleted vault keeps its certificates as they are
		return reconcile.Result{}, err
	}
	if err := r.v.issue(ctx, s, obj); err != nil {
		if err := r.failed(do, obj, err); err != nil {
			return reconcile.Result{}, err
		}
	}
	if policyNow, err = r.v.policyNow(ctx); err != nil {
		return reconcile.Result{}, err
	}
	_, after = decide(&obj.Spec, &obj.Status, r.v.cfg.Now(), policyNow)
	return reconcile.Result{After: after}, nil
}

// failed makes a failure visible. A request that can never succeed ends as
// failed, and nil is returned; everything else is tried again, and the
// certificate's conditions say when.
func (r certificateReconciler) failed(do todo, obj *certificateObject, err error) error {
	if do != toIssue || errors.Is(err, store.ErrFenced) {
		return err
	}
	f := fault.From(err)
	op := &obj.Status.Operation
	op.Code, op.Message = f.Code, f.Message
	if f.Kind == fault.Internal || op.Message == "" {
		op.Code, op.Message = "InternalError", "An unforeseen error; the server's log has the cause."
	}
	if f.Kind != fault.Invalid {
		op.Details = "The last attempt failed; it is tried again."
		return err
	}
	op.Status, op.Ended, op.Details = Failed, r.v.now(), ""
	r.v.cfg.Log.Warn("a certificate request failed", "certificate", obj.ID, "error", err)
	return nil
}

// clockMoved looks at all certificates when policy time was moved.
func (v *Vaults) clockMoved(ctx context.Context, s *store.Store, enqueue func(string)) error {
	return clocks.Follow(ctx, s, "", func(ch store.Change[clockOffset, none]) error {
		if ch.ID == "" {
			return nil
		}
		return eachCertificate(ctx, s, "", enqueue)
	})
}

// vaultRecovered looks at the certificates of a vault that comes back from deletion.
func (v *Vaults) vaultRecovered(ctx context.Context, s *store.Store, enqueue func(string)) error {
	deleted := map[string]bool{}
	return vaults.Follow(ctx, s, "", func(ch store.Change[Vault, vaultStatus]) error {
		if ch.Object == nil || ch.Object.Spec.Deleted != nil {
			deleted[ch.ID] = ch.Object != nil
			return nil
		}
		if !deleted[ch.ID] {
			return nil
		}
		delete(deleted, ch.ID)
		return eachCertificate(ctx, s, ch.ID+"/", enqueue)
	})
}

func eachCertificate(ctx context.Context, s *store.Store, prefix string, fn func(id string)) error {
	list, err := certificates.List(s.View(ctx), prefix)
	if err != nil {
		return err
	}
	for _, o := range list {
		fn(o.ID)
	}
	return nil
}

// splitID takes an id VAULT/NAME apart.
func splitID(id string) (vault, name string) {
	vault, name, _ = strings.Cut(id, "/")
	return vault, name
}

// ignore drops one error.
func ignore(err, which error) error {
	if errors.Is(err, which) {
		return nil
	}
	return err
}
