package vault

import (
	"context"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// expireCertificate purges a certificate whose retention is over, or goes on with a purge.
func (v *Vaults) expireCertificate(ctx context.Context, s *store.Store, obj *certificateObject) error {
	if !obj.Spec.Purging {
		op := access.Op{Action: "certificates/purge", Resource: resourceOf(obj.ID), Policies: []access.Policy{}, Detail: "retention ended"}
		err := v.gate.Change(ctx, s, op, func(tx *store.Tx) error {
			fresh, err := certificates.Lookup(tx, obj.ID)
			if err != nil {
				return err
			}
			if fresh == nil || fresh.Spec.Deleted == nil {
				return errSuperseded
			}
			fresh.Spec.Purging = true
			if err := certificates.Put(tx, fresh); err != nil {
				return err
			}
			return markSecret(tx, fresh)
		})
		if err != nil {
			return ignore(err, errSuperseded)
		}
	}
	return finishCertificate(ctx, s, obj.ID)
}

// finishCertificate removes a certificate that is being purged, and its secret.
func finishCertificate(ctx context.Context, s *store.Store, id string) error {
	if err := removeAll(ctx, s, secretVersions, id+"/"); err != nil {
		return err
	}
	if err := removeAll(ctx, s, certificateVersions, id+"/"); err != nil {
		return err
	}
	return s.Update(ctx, func(tx *store.Tx) error {
		obj, err := certificates.Lookup(tx, id)
		if err != nil || obj == nil || !obj.Spec.Purging {
			return err
		}
		if err := secrets.Delete(tx, id); err != nil {
			return err
		}
		return certificates.Delete(tx, id)
	})
}

// vaultReconciler purges deleted vaults.
type vaultReconciler struct{ v *Vaults }

// Reconcile implements reconcile.Reconciler.
func (r vaultReconciler) Reconcile(ctx context.Context, s *store.Store, obj *vaultObject) (reconcile.Result, error) {
	if obj.Spec.Deleted == nil {
		return reconcile.Result{}, nil
	}
	if wait := obj.Spec.Deleted.PurgeAt.Sub(r.v.cfg.Now()); wait > 0 {
		return reconcile.Result{After: wait}, nil
	}
	op := access.Op{Action: actionPurgeDeleted, Resource: obj.Spec.ResourceID, Detail: "retention ended"}
	err := r.v.gate.Change(ctx, s, op, func(tx *store.Tx) error {
		fresh, err := vaults.Lookup(tx, obj.ID)
		if err != nil {
			return err
		}
		if fresh == nil || fresh.Spec.Deleted == nil {
			return errSuperseded
		}
		return vaults.Delete(tx, obj.ID)
	})
	return reconcile.Result{}, ignore(err, errSuperseded)
}

// Finalize implements reconcile.Finalizer: it empties the vault. Until it is
// done the name stays taken, so nobody finds another's secrets under it.
func (r vaultReconciler) Finalize(ctx context.Context, s *store.Store, obj *vaultObject) (bool, reconcile.Result, error) {
	prefix := obj.ID + "/"
	for _, remove := range []func() error{
		func() error { return removeAll(ctx, s, certificates, prefix) },
		func() error { return removeAll(ctx, s, certificateVersions, prefix) },
		func() error { return removeAll(ctx, s, secrets, prefix) },
		func() error { return removeAll(ctx, s, secretVersions, prefix) },
		func() error { return removeAll(ctx, s, deletedSecrets, prefix) },
		func() error {
			return s.Update(ctx, func(tx *store.Tx) error { return contacts.Delete(tx, obj.ID) })
		},
	} {
		if err := remove(); err != nil {
			return false, reconcile.Result{}, err
		}
	}
	return true, reconcile.Result{}, nil
}

// deletedSecret stands beside the head of a deleted secret, so that only what
// is deleted has a controller, and the heads need no status.
type deletedSecret struct {
	PurgeAt time.Time `json:"purgeAt"`
}

var deletedSecrets = store.NewCollection[deletedSecret, none]("deletedsecrets")

// scheduleSecret writes when a deleted secret is to be purged.
func scheduleSecret(tx *store.Tx, id string, at time.Time) error {
	o, err := deletedSecrets.Lookup(tx, id)
	if err != nil {
		return err
	}
	if o == nil {
		o = &store.Object[deletedSecret, none]{Spec: deletedSecret{at}}
		o.ID = id
		return deletedSecrets.Insert(tx, o)
	}
	o.Spec.PurgeAt = at
	return deletedSecrets.Put(tx, o)
}

// secretReconciler purges deleted secrets. A certificate's secret goes with the certificate.
type secretReconciler struct{ v *Vaults }

// Reconcile implements reconcile.Reconciler.
func (r secretReconciler) Reconcile(ctx context.Context, s *store.Store, obj *store.Object[deletedSecret, none]) (reconcile.Result, error) {
	h, err := secrets.Lookup(s.View(ctx), obj.ID)
	if err != nil {
		return reconcile.Result{}, err
	}
	if h != nil && h.Spec.Purging {
		return reconcile.Result{}, finishSecret(ctx, s, obj.ID)
	}
	if wait := obj.Spec.PurgeAt.Sub(r.v.cfg.Now()); wait > 0 {
		return reconcile.Result{After: wait}, nil
	}
	vault, name := splitID(obj.ID)
	op := access.Op{Action: "secrets/purge", Resource: vault + "/secrets/" + name, Policies: []access.Policy{}, Detail: "retention ended"}
	err = r.v.gate.Change(ctx, s, op, func(tx *store.Tx) error {
		fresh, err := secrets.Lookup(tx, obj.ID)
		if err != nil {
			return err
		}
		if fresh == nil || fresh.Spec.Deleted == nil {
			return errSuperseded
		}
		fresh.Spec.Purging = true
		return secrets.Put(tx, fresh)
	})
	if err != nil {
		return reconcile.Result{}, ignore(err, errSuperseded)
	}
	return reconcile.Result{}, finishSecret(ctx, s, obj.ID)
}

// finishSecret removes a secret that is being purged.
func finishSecret(ctx context.Context, s *store.Store, id string) error {
	if err := removeAll(ctx, s, secretVersions, id+"/"); err != nil {
		return err
	}
	return s.Update(ctx, func(tx *store.Tx) error {
		h, err := secrets.Lookup(tx, id)
		if err != nil || h == nil || !h.Spec.Purging {
			return err
		}
		if err := deletedSecrets.Delete(tx, id); err != nil {
			return err
		}
		return secrets.Delete(tx, id)
	})
}
