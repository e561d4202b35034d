package vault

import (
	"context"
	"fmt"
	"io"
	"maps"
	"sort"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// States of an operation.
const (
	InProgress = "inProgress"
	Completed  = "completed"
	Cancelled  = "cancelled"
	Failed     = "failed"
)

// certificate is what is asked for: the policy, and the newest request for a version.
type certificate struct {
	Name    string    `json:"name"` // as first written
	Policy  Policy    `json:"policy"`
	Request request   `json:"request,omitzero"`
	Deleted *Deletion `json:"deleted,omitempty"`
	Purging bool      `json:"purging,omitempty"`
}

// request asks for one new version. It is done when the operation with its ID
// is no longer in progress.
type request struct {
	ID       string            `json:"id"`
	At       time.Time         `json:"at"`
	Tags     map[string]string `json:"tags,omitempty"`
	Disabled bool              `json:"disabled,omitempty"`
}

// certificateStatus is what is: the newest operation and the newest version.
type certificateStatus struct {
	Operation  Operation `json:"operation,omitzero"`
	Current    string    `json:"current,omitempty"`    // newest version
	Start      time.Time `json:"start,omitzero"`       // its NotBefore in policy time
	NotBefore  time.Time `json:"notBefore,omitzero"`   // its NotBefore
	NotAfter   time.Time `json:"notAfter,omitzero"`    // its NotAfter, in policy time
	MailDue    time.Time `json:"mailDue,omitzero"`     // when EmailContacts became due for it, in policy time
	Thumbprint []byte    `json:"thumbprint,omitempty"` // its SHA-1
}

// Operation is the making of a version: Key Vault's pending certificate operation.
type Operation struct {
	RequestID string    `json:"requestId"`
	Status    string    `json:"status"`
	Details   string    `json:"details,omitempty"` // what is being waited for
	Code      string    `json:"code,omitempty"`    // of the error, if it failed
	Message   string    `json:"message,omitempty"`
	Version   string    `json:"version,omitempty"`
	Cancel    bool      `json:"cancel,omitempty"` // cancellation was asked for
	Started   time.Time `json:"started"`
	Ended     time.Time `json:"ended,omitzero"`
	Issuer    string    `json:"issuer"`
}

// CertificateVersion is a version of a certificate. In lists Chain is empty.
type CertificateVersion struct {
	Vault      string // as first written
	Name       string // as first written
	Version    string // empty while the first version is being made
	Chain      [][]byte
	Thumbprint []byte
	Tags       map[string]string
	Attributes Attributes
	Policy     Policy
	Operation  Operation // zero RequestID: none is kept
	Deleted    *Deletion
}

// storedCertificate is a version as the store keeps it, sealed.
type storedCertificate struct {
	Chain      [][]byte          `json:"chain"`      // DER, leaf first
	Key        []byte            `json:"key"`        // PKCS#8
	NotBefore  time.Time         `json:"nbf"`        // of the leaf
	Expires    time.Time         `json:"exp"`        // of the leaf
	Start      time.Time         `json:"start"`      // NotBefore in policy time
	Thumbprint []byte            `json:"thumbprint"` // SHA-1 of the leaf
	Tags       map[string]string `json:"tags,omitempty"`
	Disabled   bool              `json:"disabled,omitempty"`
	Created    time.Time         `json:"created"`
	Updated    time.Time         `json:"updated"`
}

// Format implements fmt.Formatter: what holds a private key prints as [redacted].
func (s storedCertificate) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

type (
	certificateObject  = store.Object[certificate, certificateStatus]
	certificateVersion = store.Object[storedCertificate, none]
)

var (
	certificates        = store.NewCollection[certificate, certificateStatus]("certificates")
	certificateVersions = store.NewCollection[storedCertificate, none]("certificateversions")
)

// CreateCertificate asks for a new version of a certificate, and so for the
// certificate if there is none. A nil policy keeps the one there is. The version
// comes a moment later; the operation that is returned tells.
func (v *Vaults) CreateCertificate(ctx context.Context, vault, name string, policy *Policy, c Change) (CertificateVersion, error) {
	id, err := itemID(vault, "certificate", name)
	if err != nil {
		return CertificateVersion{}, err
	}
	if err := c.check(""); err != nil {
		return CertificateVersion{}, err
	}
	if c.NotBefore != nil || c.Expires != nil {
		return CertificateVersion{}, fault.New(fault.Invalid, "BadParameter", "Start and end of a certificate come from its policy.").At("attributes").WithFix("leave nbf and exp out and set policy.x509_props.validity_months")
	}
	if policy != nil {
		if err := policy.Validate(v.cfg.Issuer != nil); err != nil {
			return CertificateVersion{}, err
		}
	}
	var out CertificateVersion
	err = v.change(ctx, vault, "certificates/create", "certificates/"+lower(name), "", func(tx *store.Tx, vt *vaultObject) error {
		obj, err := v.writableCertificate(tx, id, name, policy)
		if err != nil {
			return err
		}
		req := request{Tags: maps.Clone(c.Tags), Disabled: c.Enabled != nil && !*c.Enabled}
		v.ask(obj, req)
		out = v.pendingOf(vt, obj)
		if obj.UID == "" {
			return certificates.Insert(tx, obj)
		}
		return certificates.Put(tx, obj)
	})
	return out, err
}

// ask puts a request for a version on the certificate.
func (v *Vaults) ask(obj *certificateObject, req request) {
	req.ID, req.At = newVersion(), v.now()
	obj.Spec.Request = req
	obj.Status.Operation = Operation{
		RequestID: req.ID, Status: InProgress, Started: req.At, Issuer: obj.Spec.Policy.Issuer,
		Details: "Pending certificate created. The certificate is about to be issued.",
	}
}

// writableCertificate finds the certificate that gets a new version, or a new one.
func (v *Vaults) writableCertificate(tx *store.Tx, id, name string, policy *Policy) (*certificateObject, error) {
	obj, err := certificates.Lookup(tx, id)
	if err != nil {
		return nil, err
	}
	if obj == nil {
		h, err := secrets.Lookup(tx, id)
		switch {
		case err != nil:
			return nil, err
		case h != nil && h.Spec.Deleted != nil:
			return nil, inTheWay("secret", h.Spec.Name, h.Spec.Purging)
		case h != nil:
			return nil, fault.New(fault.Conflict, "Conflict", "There is a secret %s, and a certificate brings a secret of its own name.", h.Spec.Name).WithFix("use another name")
		case policy == nil:
			return nil, fault.New(fault.Invalid, "BadParameter", "A new certificate needs a policy.").At("policy")
		}
		obj = &certificateObject{Spec: certificate{Name: name}}
		obj.ID = id
	}
	switch {
	case obj.Spec.Deleted != nil:
		return nil, inTheWay("certificate", obj.Spec.Name, obj.Spec.Purging)
	case obj.Status.Operation.Status == InProgress:
		return nil, pendingConflict()
	}
	if policy != nil {
		created := obj.Spec.Policy.Created
		obj.Spec.Policy = *policy
		obj.Spec.Policy.Created, obj.Spec.Policy.Updated = created, v.now()
		if created.IsZero() {
			obj.Spec.Policy.Created = obj.Spec.Policy.Updated
		}
	}
	return obj, nil
}

func pendingConflict() error {
	return fault.New(fault.Conflict, "Forbidden", "A new key vault certificate can not be created or imported while a pending key vault certificate's status is inProgress.").
		WithFix("wait for it, or cancel it (az keyvault certificate pending delete)")
}

// RenewNow asks for the next version of a certificate now, by its policy and
// with the tags of its newest version. Besides those who may create
// certificates in the vault, holders of the action
// Keyfleet/vaults/certificates/renew/action may do so.
func (v *Vaults) RenewNow(ctx context.Context, vault, name string) (CertificateVersion, error) {
	var out CertificateVersion
	fn := func(tx *store.Tx, vt *vaultObject) error {
		obj, current, err := findCertificate(tx, vt.ID, name, "")
		if err != nil {
			return err
		}
		if obj.Status.Operation.Status == InProgress {
			return pendingConflict()
		}
		v.ask(obj, request{Tags: current.Spec.Tags})
		out = v.pendingOf(vt, obj)
		return certificates.Put(tx, obj)
	}
	vt, err := v.open(ctx, vault, "certificates/create", "certificates/"+lower(name))
	if err != nil {
		return out, err
	}
	op := access.Op{Action: "Keyfleet/vaults/certificates/renew/action", Resource: vt.Spec.ResourceID, Detail: lower(name)}
	if v.gate.Can(ctx, op) != nil {
		return out, v.change(ctx, vault, "certificates/create", "certificates/"+lower(name), "renew", fn)
	}
	err = v.gate.Change(ctx, v.store, op, func(tx *store.Tx) error {
		fresh, err := vaults.Get(tx, vt.ID)
		if err != nil {
			return err
		}
		if fresh.UID != vt.UID || fresh.Spec.Deleted != nil || !fresh.Deleting.IsZero() {
			return fault.New(fault.Conflict, "Conflict", "The vault '%s' was deleted.", vault)
		}
		return fn(tx, fresh)
	})
	return out, err
}

// Certificate returns a version of a certificate; version "" is the newest.
func (v *Vaults) Certificate(ctx context.Context, vault, name, version string) (CertificateVersion, error) {
	path := "certificates/" + lower(name)
	if version != "" {
		path += "/" + version
	}
	vt, err := v.read(ctx, vault, "certificates/get", path)
	if err != nil {
		return CertificateVersion{}, err
	}
	tx := v.store.View(ctx)
	obj, ver, err := findCertificate(tx, vt.ID, name, version)
	if err != nil {
		return CertificateVersion{}, err
	}
	if ver == nil { // the first version is being made, or could not be
		return v.pendingOf(vt, obj), nil
	}
	return certificateOf(vt, obj, ver), nil
}

// findCertificate finds a certificate that is not deleted and a version of it.
// Without a version named, and with none there yet, ver is nil.
func findCertificate(tx *store.Tx, vault, name, version string) (obj *certificateObject, ver *certificateVersion, err error) {
	id, err := itemID(vault, "certificate", name)
	if err != nil {
		return nil, nil, err
	}
	if obj, err = certificates.Lookup(tx, id); err != nil {
		return nil, nil, err
	}
	if obj == nil || obj.Spec.Deleted != nil || (version != "" && !itemVersion.MatchString(lower(version))) {
		return nil, nil, notFound("certificate", name, version)
	}
	want := lower(version)
	if want == "" {
		want = obj.Status.Current
	}
	if want == "" {
		return obj, nil, nil
	}
	if ver, err = certificateVersions.Lookup(tx, id+"/"+want); err != nil {
		return nil, nil, err
	}
	if ver == nil {
		return nil, nil, notFound("certificate", name, version)
	}
	return obj, ver, nil
}

// UpdateCertificate changes enabled and tags of a version ("" is the newest) and
// of its secret, and the policy if edit is not nil.
func (v *Vaults) UpdateCertificate(ctx context.Context, vault, name, version string, c Change, edit func(*Policy)) (CertificateVersion, error) {
	if err := c.check(""); err != nil {
		return CertificateVersion{}, err
	}
	var out CertificateVersion
	err := v.change(ctx, vault, "certificates/update", "certificates/"+lower(name), "attributes", func(tx *store.Tx, vt *vaultObject) error {
		obj, ver, err := findCertificate(tx, vt.ID, name, version)
		if err != nil {
			return err
		}
		if ver == nil {
			return notFound("certificate", name, "")
		}
		if err := sameTimes(c, &ver.Spec); err != nil {
			return err
		}
		if edit != nil {
			if err := v.editPolicy(tx, obj, edit); err != nil {
				return err
			}
		}
		if err := v.updateVersion(tx, ver, c); err != nil {
			return err
		}
		out = certificateOf(vt, obj, ver)
		return nil
	})
	return out, err
}

// sameTimes lets a client send back nbf and exp as it got them.
func sameTimes(c Change, ver *storedCertificate) error {
	if (c.NotBefore != nil && !c.NotBefore.Equal(ver.NotBefore)) || (c.Expires != nil && !c.Expires.Equal(ver.Expires)) {
		return fault.New(fault.Invalid, "BadParameter", "Start and end of a certificate are fixed when it is issued.").At("attributes").WithFix("leave nbf and exp out")
	}
	return nil
}

// updateVersion changes a certificate version and, in the same transaction, its secret.
func (v *Vaults) updateVersion(tx *store.Tx, ver *certificateVersion, c Change) error {
	secret, err := secretVersions.Get(tx, ver.ID)
	if err != nil {
		return err
	}
	if c.Enabled != nil {
		ver.Spec.Disabled, secret.Spec.Disabled = !*c.Enabled, !*c.Enabled
	}
	if c.Tags != nil {
		ver.Spec.Tags, secret.Spec.Tags = maps.Clone(c.Tags), maps.Clone(c.Tags)
	}
	ver.Spec.Updated, secret.Spec.Updated = v.now(), v.now()
	if err := certificateVersions.Put(tx, ver); err != nil {
		return err
	}
	return secretVersions.Put(tx, secret)
}

func (v *Vaults) editPolicy(tx *store.Tx, obj *certificateObject, edit func(*Policy)) error {
	created := obj.Spec.Policy.Created
	edit(&obj.Spec.Policy)
	if err := obj.Spec.Policy.Validate(v.cfg.Issuer != nil); err != nil {
		return err
	}
	obj.Spec.Policy.Created, obj.Spec.Policy.Updated = created, v.now()
	return certificates.Put(tx, obj)
}

// CertificatePolicy returns the policy of a certificate, and the certificate without a version.
func (v *Vaults) CertificatePolicy(ctx context.Context, vault, name string) (CertificateVersion, error) {
	vt, err := v.read(ctx, vault, "certificates/get", "certificates/"+lower(name)+"/policy")
	if err != nil {
		return CertificateVersion{}, err
	}
	obj, _, err := findCertificate(v.store.View(ctx), vt.ID, name, "")
	if err != nil {
		return CertificateVersion{}, err
	}
	return v.pendingOf(vt, obj), nil
}

// UpdatePolicy changes the policy, which holds from the next version on; when
// the newest one is renewed follows at once.
func (v *Vaults) UpdatePolicy(ctx context.Context, vault, name string, edit func(*Policy)) (CertificateVersion, error) {
	var out CertificateVersion
	err := v.change(ctx, vault, "certificates/update", "certificates/"+lower(name)+"/policy", "policy", func(tx *store.Tx, vt *vaultObject) error {
		obj, _, err := findCertificate(tx, vt.ID, name, "")
		if err != nil {
			return err
		}
		if err := v.editPolicy(tx, obj, edit); err != nil {
			return err
		}
		out = v.pendingOf(vt, obj)
		return nil
	})
	return out, err
}

// ListCertificates lists the certificates of a vault by name; with pending also
// those whose first version is not there yet.
func (v *Vaults) ListCertificates(ctx context.Context, vault string, pending bool, p Page) ([]CertificateVersion, string, error) {
	return v.listCertificates(ctx, vault, p, func(o *certificateObject) bool {
		return o.Spec.Deleted == nil && (pending || o.Status.Current != "")
	})
}

// DeletedCertificates lists the deleted certificates of a vault by name.
func (v *Vaults) DeletedCertificates(ctx context.Context, vault string, p Page) ([]CertificateVersion, string, error) {
	return v.listCertificates(ctx, vault, p, func(o *certificateObject) bool { return o.Spec.Deleted != nil && !o.Spec.Purging })
}

func (v *Vaults) listCertificates(ctx context.Context, vault string, p Page, keep func(*certificateObject) bool) ([]CertificateVersion, string, error) {
	vt, err := v.read(ctx, vault, "certificates/list", "certificates")
	if err != nil {
		return nil, "", err
	}
	tx := v.store.View(ctx)
	objs, err := certificates.List(tx, vt.ID+"/")
	if err != nil {
		return nil, "", err
	}
	kept := objs[:0]
	for _, o := range objs {
		if keep(o) {
			kept = append(kept, o)
		}
	}
	part, next := page(kept, p, func(o *certificateObject) string { return o.ID })
	out := make([]CertificateVersion, 0, len(part))
	for _, o := range part {
		ver, err := certificateVersions.Lookup(tx, o.ID+"/"+o.Status.Current)
		if err != nil {
			return nil, "", err
		}
		if ver == nil {
			out = append(out, v.pendingOf(vt, o))
			continue
		}
		c := certificateOf(vt, o, ver)
		c.Chain = nil
		out = append(out, c)
	}
	return out, next, nil
}

// CertificateVersions lists the versions of a certificate, oldest first.
func (v *Vaults) CertificateVersions(ctx context.Context, vault, name string, p Page) ([]CertificateVersion, string, error) {
	vt, err := v.read(ctx, vault, "certificates/list", "certificates/"+lower(name)+"/versions")
	if err != nil {
		return nil, "", err
	}
	tx := v.store.View(ctx)
	obj, _, err := findCertificate(tx, vt.ID, name, "")
	if err != nil {
		return nil, "", err
	}
	list, err := certificateVersions.List(tx, obj.ID+"/")
	if err != nil {
		return nil, "", err
	}
	sort.Slice(list, func(i, j int) bool { return cursor(&list[i].Meta) < cursor(&list[j].Meta) })
	part, next := page(list, p, func(o *certificateVersion) string { return cursor(&o.Meta) })
	out := make([]CertificateVersion, 0, len(part))
	for _, ver := range part {
		c := certificateOf(vt, obj, ver)
		c.Chain = nil
		out = append(out, c)
	}
	return out, next, nil
}

// certificateOf is a version as callers see it. ver may be nil.
func certificateOf(vt *vaultObject, obj *certificateObject, ver *certificateVersion) CertificateVersion {
	level, days := vt.Spec.recovery()
	out := CertificateVersion{
		Vault: vt.Spec.Name, Name: obj.Spec.Name, Policy: obj.Spec.Policy, Operation: obj.Status.Operation, Deleted: obj.Spec.Deleted,
		Attributes: Attributes{Created: obj.Created, Updated: obj.Changed, RecoveryLevel: level, RecoverableDays: days},
	}
	if ver == nil {
		return out
	}
	s := &ver.Spec
	out.Version, out.Chain, out.Thumbprint, out.Tags = versionOf(ver.ID), s.Chain, s.Thumbprint, s.Tags
	a := &out.Attributes
	a.Enabled, a.NotBefore, a.Expires, a.Created, a.Updated = !s.Disabled, s.NotBefore, s.Expires, s.Created, s.Updated
	return out
}

// pendingOf is a certificate without regard to its versions.
func (v *Vaults) pendingOf(vt *vaultObject, obj *certificateObject) CertificateVersion {
	c := certificateOf(vt, obj, nil)
	c.Tags = obj.Spec.Request.Tags
	if c.Attributes.Created.IsZero() {
		c.Attributes.Created, c.Attributes.Updated = v.now(), v.now()
	}
	return c
}
