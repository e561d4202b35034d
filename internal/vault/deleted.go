package vault

import (
	"context"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// DeleteCertificate deletes a certificate and its secret with all versions, softly.
func (v *Vaults) DeleteCertificate(ctx context.Context, vault, name string) (CertificateVersion, error) {
	var out CertificateVersion
	err := v.change(ctx, vault, "certificates/delete", "certificates/"+lower(name), "", func(tx *store.Tx, vt *vaultObject) error {
		obj, ver, err := findCertificate(tx, vt.ID, name, "")
		if err != nil {
			return err
		}
		obj.Spec.Deleted = vt.Spec.deletion(v.now())
		if op := &obj.Status.Operation; op.Status == InProgress {
			op.Status, op.Ended, op.Details = Cancelled, v.now(), "The certificate was deleted."
			obj.Spec.Request = request{}
		}
		out = certificateOf(vt, obj, ver)
		if err := certificates.Put(tx, obj); err != nil {
			return err
		}
		return markSecret(tx, obj)
	})
	return out, err
}

// markSecret gives the certificate's secret the same state of deletion.
func markSecret(tx *store.Tx, obj *certificateObject) error {
	h, err := secrets.Lookup(tx, obj.ID)
	if err != nil || h == nil {
		return err
	}
	h.Spec.Deleted, h.Spec.Purging = obj.Spec.Deleted, obj.Spec.Purging
	return secrets.Put(tx, h)
}

// DeletedCertificate returns a deleted certificate.
func (v *Vaults) DeletedCertificate(ctx context.Context, vault, name string) (CertificateVersion, error) {
	vt, err := v.read(ctx, vault, "certificates/get", "deletedcertificates/"+lower(name))
	if err != nil {
		return CertificateVersion{}, err
	}
	obj, ver, err := deletedCertificate(v.store.View(ctx), vt.ID, name)
	if err != nil {
		return CertificateVersion{}, err
	}
	return certificateOf(vt, obj, ver), nil
}

func deletedCertificate(tx *store.Tx, vault, name string) (*certificateObject, *certificateVersion, error) {
	id, err := itemID(vault, "certificate", name)
	if err != nil {
		return nil, nil, err
	}
	obj, err := certificates.Lookup(tx, id)
	if err != nil {
		return nil, nil, err
	}
	if obj == nil || obj.Spec.Deleted == nil || obj.Spec.Purging {
		return nil, nil, fault.New(fault.NotFound, "CertificateNotFound", "Deleted Certificate not found: %s", name)
	}
	if obj.Status.Current == "" {
		return obj, nil, nil
	}
	ver, err := certificateVersions.Lookup(tx, id+"/"+obj.Status.Current)
	return obj, ver, err
}

// RecoverCertificate brings a deleted certificate and its secret back.
func (v *Vaults) RecoverCertificate(ctx context.Context, vault, name string) (CertificateVersion, error) {
	var out CertificateVersion
	err := v.change(ctx, vault, "certificates/recover", "deletedcertificates/"+lower(name), "", func(tx *store.Tx, vt *vaultObject) error {
		obj, ver, err := deletedCertificate(tx, vt.ID, name)
		if err != nil {
			return err
		}
		obj.Spec.Deleted = nil
		out = certificateOf(vt, obj, ver)
		if err := certificates.Put(tx, obj); err != nil {
			return err
		}
		return markSecret(tx, obj)
	})
	return out, err
}

// PurgeCertificate removes a deleted certificate and its secret for good.
func (v *Vaults) PurgeCertificate(ctx context.Context, vault, name string) error {
	var id string
	err := v.change(ctx, vault, "certificates/purge", "deletedcertificates/"+lower(name), "", func(tx *store.Tx, vt *vaultObject) error {
		obj, _, err := deletedCertificate(tx, vt.ID, name)
		if err != nil {
			return err
		}
		if vt.Spec.PurgeProtection {
			return purgeForbidden(vt.Spec.Name)
		}
		obj.Spec.Purging, id = true, obj.ID
		if err := certificates.Put(tx, obj); err != nil {
			return err
		}
		return markSecret(tx, obj)
	})
	if err != nil {
		return err
	}
	return finishCertificate(ctx, v.store, id)
}
