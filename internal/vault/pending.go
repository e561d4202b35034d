package vault

import (
	"context"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Pending returns the newest operation of a certificate. A requestID that is not its own finds nothing.
func (v *Vaults) Pending(ctx context.Context, vault, name, requestID string) (CertificateVersion, error) {
	vt, err := v.read(ctx, vault, "certificates/get", "certificates/"+lower(name)+"/pending")
	if err != nil {
		return CertificateVersion{}, err
	}
	obj, _, err := findCertificate(v.store.View(ctx), vt.ID, name, "")
	if err != nil {
		return CertificateVersion{}, err
	}
	if op := obj.Status.Operation; op.RequestID == "" || (requestID != "" && requestID != op.RequestID) {
		return CertificateVersion{}, noPending(name)
	}
	return v.pendingOf(vt, obj), nil
}

func noPending(name string) error {
	return fault.New(fault.NotFound, "PendingCertificateNotFound", "Pending certificate not found: %s", name)
}

// CancelPending cancels the operation in progress.
func (v *Vaults) CancelPending(ctx context.Context, vault, name string) (CertificateVersion, error) {
	return v.endPending(ctx, vault, name, "cancel", func(obj *certificateObject) error {
		op := &obj.Status.Operation
		if op.Status != InProgress {
			return fault.New(fault.Invalid, "BadParameter", "The operation is %s; only one in progress can be cancelled.", op.Status).At("cancellation_requested")
		}
		op.Cancel, op.Status, op.Ended, op.Details = true, Cancelled, v.now(), "The certificate operation was cancelled."
		obj.Spec.Request = request{}
		return nil
	})
}

// DeletePending forgets the newest operation, and ends it if it is in progress.
func (v *Vaults) DeletePending(ctx context.Context, vault, name string) (CertificateVersion, error) {
	return v.endPending(ctx, vault, name, "delete", func(obj *certificateObject) error { return nil })
}

func (v *Vaults) endPending(ctx context.Context, vault, name, verb string, fn func(*certificateObject) error) (CertificateVersion, error) {
	var out CertificateVersion
	err := v.change(ctx, vault, "certificates/update", "certificates/"+lower(name)+"/pending", verb, func(tx *store.Tx, vt *vaultObject) error {
		obj, _, err := findCertificate(tx, vt.ID, name, "")
		if err != nil {
			return err
		}
		if obj.Status.Operation.RequestID == "" {
			return noPending(name)
		}
		if err := fn(obj); err != nil {
			return err
		}
		out = v.pendingOf(vt, obj)
		if verb == "delete" {
			obj.Spec.Request, obj.Status.Operation = request{}, Operation{}
		}
		return certificates.Put(tx, obj)
	})
	return out, err
}
