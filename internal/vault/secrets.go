package vault

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"sort"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
)

// Content types of a certificate's secret.
const (
	PFX = "application/x-pkcs12"
	PEM = "application/x-pem-file"
)

// SecretVersion is a version of a secret. In lists, and after a deletion, Value is empty.
type SecretVersion struct {
	Vault       string // as first written
	Name        string // as first written
	Version     string
	Value       Secret
	ContentType string
	Tags        map[string]string
	Attributes  Attributes
	Managed     bool // belongs to the certificate, and key, of the same name and version
	Previous    string
	Deleted     *Deletion
}

// storedSecret is a secret version as the store keeps it, sealed.
type storedSecret struct {
	Value       string            `json:"value"`
	ContentType string            `json:"contentType,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"`
	Disabled    bool              `json:"disabled,omitempty"`
	NotBefore   time.Time         `json:"nbf,omitzero"`
	Expires     time.Time         `json:"exp,omitzero"`
	Created     time.Time         `json:"created"`
	Updated     time.Time         `json:"updated"`
	Managed     bool              `json:"managed,omitempty"`
	Previous    string            `json:"previous,omitempty"` // the version before, of a certificate's secret
}

// Format implements fmt.Formatter: a stored secret prints as [redacted].
func (s storedSecret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

type (
	secretHead    = store.Object[head, none]
	secretVersion = store.Object[storedSecret, none]
)

var (
	secrets        = store.NewCollection[head, none]("secrets")
	secretVersions = store.NewCollection[storedSecret, none]("secretversions")
)

// SetSecret adds a version to a secret, which becomes its newest.
func (v *Vaults) SetSecret(ctx context.Context, vault, name string, value Secret, c Change) (SecretVersion, error) {
	id, err := itemID(vault, "secret", name)
	if err != nil {
		return SecretVersion{}, err
	}
	if value.Len() > maxSecret {
		return SecretVersion{}, fault.New(fault.Invalid, "BadParameter", "The secret's value has %d bytes; at most %d are possible.", value.Len(), maxSecret).At("value")
	}
	if err := c.check(""); err != nil {
		return SecretVersion{}, err
	}
	version, now := newVersion(), v.now()
	spec := storedSecret{Value: value.Reveal(), Created: now, Updated: now}
	if err := spec.apply(c); err != nil {
		return SecretVersion{}, err
	}
	var out SecretVersion
	err = v.change(ctx, vault, "secrets/set", "secrets/"+lower(name), version, func(tx *store.Tx, vt *vaultObject) error {
		h, err := writableSecret(tx, id, name)
		if err != nil {
			return err
		}
		obj := &secretVersion{Spec: spec}
		obj.ID = id + "/" + version
		if err := secretVersions.Insert(tx, obj); err != nil {
			return err
		}
		h.Spec.Current = version
		out = secretOf(vt, h, version, &spec)
		return putHead(tx, h)
	})
	return out, err
}

// writableSecret finds the head that a new version goes under, or a new one.
// It reads the certificate of the name too, so that neither is made beside the other.
func writableSecret(tx *store.Tx, id, name string) (*secretHead, error) {
	h, err := secrets.Lookup(tx, id)
	if err != nil {
		return nil, err
	}
	cert, err := certificates.Lookup(tx, id)
	switch {
	case err != nil:
		return nil, err
	case cert != nil && cert.Spec.Deleted != nil:
		return nil, inTheWay("certificate", cert.Spec.Name, cert.Spec.Purging)
	case cert != nil || (h != nil && h.Spec.Managed):
		return nil, fault.New(fault.Denied, "Forbidden", "The secret %s belongs to the certificate of the same name and cannot be set.", name).
			WithInner("ForbiddenByPolicy").WithFix("create a new version of the certificate, or use another name")
	case h == nil:
		h = &secretHead{Spec: head{Name: name}}
		h.ID = id
		return h, nil
	case h.Spec.Deleted != nil:
		return nil, inTheWay("secret", h.Spec.Name, h.Spec.Purging)
	}
	return h, nil
}

// putHead writes a head, new or old.
func putHead(tx *store.Tx, h *secretHead) error {
	if h.UID == "" {
		return secrets.Insert(tx, h)
	}
	return secrets.Put(tx, h)
}

// Secret returns a version of a secret with its value; version "" is the newest.
// as asks for a certificate's secret in another form (PEM instead of PFX); "" is
// as it is stored. That it has expired or is not valid yet hinders nobody: nbf
// and exp only inform.
func (v *Vaults) Secret(ctx context.Context, vault, name, version, as string) (SecretVersion, error) {
	vt, err := v.read(ctx, vault, "secrets/get", secretPath(name, version))
	if err != nil {
		return SecretVersion{}, err
	}
	h, obj, err := findSecret(v.store.View(ctx), vt.ID, name, version)
	if err != nil {
		return SecretVersion{}, err
	}
	if obj.Spec.Disabled {
		return SecretVersion{}, fault.New(fault.Denied, "Forbidden", "Operation get is not allowed on a disabled secret.").WithInner("SecretDisabled").
			WithFix("keyfleet secret set-attributes %s --enabled true", h.Spec.Name)
	}
	out := secretOf(vt, h, versionOf(obj.ID), &obj.Spec)
	if as != "" && as != out.ContentType {
		if err := out.convert(as); err != nil {
			return SecretVersion{}, err
		}
	}
	return out, nil
}

func secretPath(name, version string) string {
	if version == "" {
		return "secrets/" + lower(name)
	}
	return "secrets/" + lower(name) + "/" + version
}

// convert changes the form of a certificate's secret from PFX to PEM.
func (s *SecretVersion) convert(as string) error {
	if as != PEM || !s.Managed || s.ContentType != PFX {
		return fault.New(fault.Invalid, "BadParameter", "The secret cannot be given as '%s': only a certificate's secret in %s can be converted, to %s.", as, PFX, PEM).At("outContentType")
	}
	pfx, err := base64.StdEncoding.DecodeString(s.Value.Reveal())
	if err != nil {
		return fault.New(fault.Internal, "", "").Because(err)
	}
	key, chain, err := pki.DecodePFX(pfx, "")
	if err != nil {
		return fault.New(fault.Invalid, "BadParameter", "The secret holds no private key and cannot be converted.").At("outContentType")
	}
	text, err := pki.EncodeKey(key)
	if err != nil {
		return err
	}
	for _, c := range chain {
		text = append(text, pki.EncodeChain(c.Raw)...)
	}
	s.Value, s.ContentType = NewSecret(string(text)), PEM
	return nil
}

// findSecret finds a version of a secret that is not deleted.
func findSecret(tx *store.Tx, vault, name, version string) (*secretHead, *secretVersion, error) {
	id, err := itemID(vault, "secret", name)
	if err != nil {
		return nil, nil, err
	}
	h, err := secrets.Lookup(tx, id)
	if err != nil {
		return nil, nil, err
	}
	if h == nil || h.Spec.Deleted != nil {
		return nil, nil, notFound("secret", name, version)
	}
	want := lower(version)
	if want == "" {
		want = h.Spec.Current
	} else if !itemVersion.MatchString(want) {
		return nil, nil, notFound("secret", name, version)
	}
	obj, err := secretVersions.Lookup(tx, id+"/"+want)
	if err != nil {
		return nil, nil, err
	}
	if obj == nil {
		return nil, nil, notFound("secret", name, version)
	}
	return h, obj, nil
}

// UpdateSecret changes attributes, content type and tags of a version; "" is the newest.
func (v *Vaults) UpdateSecret(ctx context.Context, vault, name, version string, c Change) (SecretVersion, error) {
	if err := c.check(""); err != nil {
		return SecretVersion{}, err
	}
	var out SecretVersion
	err := v.change(ctx, vault, "secrets/set", secretPath(name, version), "attributes", func(tx *store.Tx, vt *vaultObject) error {
		h, obj, err := findSecret(tx, vt.ID, name, version)
		if err != nil {
			return err
		}
		if h.Spec.Managed {
			return fault.New(fault.Denied, "Forbidden", "The secret %s belongs to the certificate of the same name and cannot be changed by itself.", h.Spec.Name).
				WithInner("ForbiddenByPolicy").WithFix("change the certificate")
		}
		if err := obj.Spec.apply(c); err != nil {
			return err
		}
		obj.Spec.Updated = v.now()
		out = secretOf(vt, h, versionOf(obj.ID), &obj.Spec)
		out.Value = Secret{}
		return secretVersions.Put(tx, obj)
	})
	return out, err
}

func (s *storedSecret) apply(c Change) error {
	if c.Enabled != nil {
		s.Disabled = !*c.Enabled
	}
	set(&s.NotBefore, c.NotBefore)
	set(&s.Expires, c.Expires)
	set(&s.ContentType, c.ContentType)
	if c.Tags != nil {
		s.Tags = maps.Clone(c.Tags)
	}
	return checkTimes(s.NotBefore, s.Expires)
}

// Secrets lists the secrets of a vault by name, each with the attributes of its newest version.
func (v *Vaults) Secrets(ctx context.Context, vault string, p Page) ([]SecretVersion, string, error) {
	return v.listSecrets(ctx, vault, p, func(h *head) bool { return h.Deleted == nil })
}

// DeletedSecrets lists the deleted secrets of a vault by name.
func (v *Vaults) DeletedSecrets(ctx context.Context, vault string, p Page) ([]SecretVersion, string, error) {
	return v.listSecrets(ctx, vault, p, func(h *head) bool { return h.Deleted != nil && !h.Purging })
}

func (v *Vaults) listSecrets(ctx context.Context, vault string, p Page, keep func(*head) bool) ([]SecretVersion, string, error) {
	vt, err := v.read(ctx, vault, "secrets/list", "secrets")
	if err != nil {
		return nil, "", err
	}
	tx := v.store.View(ctx)
	heads, err := secrets.List(tx, vt.ID+"/")
	if err != nil {
		return nil, "", err
	}
	kept := heads[:0]
	for _, h := range heads {
		if keep(&h.Spec) {
			kept = append(kept, h)
		}
	}
	part, next := page(kept, p, func(h *secretHead) string { return h.ID })
	out := make([]SecretVersion, 0, len(part))
	for _, h := range part {
		obj, err := secretVersions.Lookup(tx, h.ID+"/"+h.Spec.Current)
		if err != nil {
			return nil, "", err
		}
		if obj == nil { // purged between the two reads
			continue
		}
		s := secretOf(vt, h, h.Spec.Current, &obj.Spec)
		s.Value = Secret{}
		out = append(out, s)
	}
	return out, next, nil
}

// SecretVersions lists the versions of a secret, oldest first.
func (v *Vaults) SecretVersions(ctx context.Context, vault, name string, p Page) ([]SecretVersion, string, error) {
	vt, err := v.read(ctx, vault, "secrets/list", secretPath(name, "")+"/versions")
	if err != nil {
		return nil, "", err
	}
	tx := v.store.View(ctx)
	h, _, err := findSecret(tx, vt.ID, name, "")
	if err != nil {
		return nil, "", err
	}
	objs, err := secretVersions.List(tx, h.ID+"/")
	if err != nil {
		return nil, "", err
	}
	sort.Slice(objs, func(i, j int) bool { return cursor(&objs[i].Meta) < cursor(&objs[j].Meta) })
	part, next := page(objs, p, func(o *secretVersion) string { return cursor(&o.Meta) })
	out := make([]SecretVersion, 0, len(part))
	for _, o := range part {
		s := secretOf(vt, h, versionOf(o.ID), &o.Spec)
		s.Value = Secret{}
		out = append(out, s)
	}
	return out, next, nil
}

// cursor orders versions by their creation.
func cursor(m *store.Meta) string {
	return m.Created.UTC().Format("20060102150405.000000000") + "/" + versionOf(m.ID)
}

// DeleteSecret deletes a secret with all versions, softly.
func (v *Vaults) DeleteSecret(ctx context.Context, vault, name string) (SecretVersion, error) {
	var out SecretVersion
	err := v.change(ctx, vault, "secrets/delete", secretPath(name, ""), "", func(tx *store.Tx, vt *vaultObject) error {
		h, obj, err := findSecret(tx, vt.ID, name, "")
		if err != nil {
			return err
		}
		if h.Spec.Managed {
			return managed("delete", h.Spec.Name)
		}
		h.Spec.Deleted = vt.Spec.deletion(v.now())
		out = secretOf(vt, h, h.Spec.Current, &obj.Spec)
		out.Value = Secret{}
		if err := scheduleSecret(tx, h.ID, h.Spec.Deleted.PurgeAt); err != nil {
			return err
		}
		return secrets.Put(tx, h)
	})
	return out, err
}

// managed refuses what is done to a certificate's secret alone. verb is the command's word.
func managed(verb, name string) error {
	return fault.New(fault.Denied, "Forbidden", "The secret %s belongs to the certificate of the same name, and %s is possible for both together only.", name, verb).
		WithInner("ForbiddenByPolicy").WithFix("keyfleet certificate %s %s", verb, name)
}

// DeletedSecret returns a deleted secret.
func (v *Vaults) DeletedSecret(ctx context.Context, vault, name string) (SecretVersion, error) {
	vt, err := v.read(ctx, vault, "secrets/get", "deletedsecrets/"+lower(name))
	if err != nil {
		return SecretVersion{}, err
	}
	return v.deletedSecret(v.store.View(ctx), vt, name)
}

func (v *Vaults) deletedSecret(tx *store.Tx, vt *vaultObject, name string) (SecretVersion, error) {
	h, err := deletedHead(tx, vt.ID, name)
	if err != nil {
		return SecretVersion{}, err
	}
	obj, err := secretVersions.Get(tx, h.ID+"/"+h.Spec.Current)
	if err != nil {
		return SecretVersion{}, err
	}
	out := secretOf(vt, h, h.Spec.Current, &obj.Spec)
	out.Value = Secret{}
	return out, nil
}

func deletedHead(tx *store.Tx, vault, name string) (*secretHead, error) {
	id, err := itemID(vault, "secret", name)
	if err != nil {
		return nil, err
	}
	h, err := secrets.Lookup(tx, id)
	if err != nil {
		return nil, err
	}
	if h == nil || h.Spec.Deleted == nil || h.Spec.Purging {
		return nil, fault.New(fault.NotFound, "SecretNotFound", "Deleted Secret not found: %s", name)
	}
	return h, nil
}

// RecoverSecret brings a deleted secret back.
func (v *Vaults) RecoverSecret(ctx context.Context, vault, name string) (SecretVersion, error) {
	var out SecretVersion
	err := v.change(ctx, vault, "secrets/recover", "deletedsecrets/"+lower(name), "", func(tx *store.Tx, vt *vaultObject) (err error) {
		if out, err = v.deletedSecret(tx, vt, name); err != nil {
			return err
		}
		h, err := deletedHead(tx, vt.ID, name)
		if err != nil {
			return err
		}
		if h.Spec.Managed {
			return managed("recover", h.Spec.Name)
		}
		h.Spec.Deleted, out.Deleted = nil, nil
		if err := deletedSecrets.Delete(tx, h.ID); err != nil {
			return err
		}
		return secrets.Put(tx, h)
	})
	return out, err
}

// PurgeSecret removes a deleted secret for good.
func (v *Vaults) PurgeSecret(ctx context.Context, vault, name string) error {
	var id string
	err := v.change(ctx, vault, "secrets/purge", "deletedsecrets/"+lower(name), "", func(tx *store.Tx, vt *vaultObject) error {
		h, err := deletedHead(tx, vt.ID, name)
		switch {
		case err != nil:
			return err
		case h.Spec.Managed:
			return managed("purge", h.Spec.Name)
		case vt.Spec.PurgeProtection:
			return purgeForbidden(vt.Spec.Name)
		}
		h.Spec.Purging, id = true, h.ID
		if err := scheduleSecret(tx, id, v.now()); err != nil { // if this server dies, the controller goes on
			return err
		}
		return secrets.Put(tx, h)
	})
	if err != nil {
		return err
	}
	return finishSecret(ctx, v.store, id)
}

func versionOf(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// secretOf is a version as callers see it.
func secretOf(vt *vaultObject, h *secretHead, version string, s *storedSecret) SecretVersion {
	level, days := vt.Spec.recovery()
	return SecretVersion{
		Vault: vt.Spec.Name, Name: h.Spec.Name, Version: version, Value: NewSecret(s.Value), ContentType: s.ContentType, Tags: s.Tags,
		Attributes: Attributes{
			Enabled: !s.Disabled, NotBefore: s.NotBefore, Expires: s.Expires, Created: s.Created, Updated: s.Updated,
			RecoveryLevel: level, RecoverableDays: days,
		},
		Managed: s.Managed, Previous: s.Previous, Deleted: h.Spec.Deleted,
	}
}
