package vault

import (
	"context"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Contact is somebody to be told about a vault's certificates. Keyfleet keeps
// contacts and sends no mail.
type Contact struct {
	Email string `json:"email"`
	Name  string `json:"name,omitempty"`
	Phone string `json:"phone,omitempty"`
}

type contactList struct {
	Contacts []Contact `json:"contacts"`
}

var contacts = store.NewCollection[contactList, none]("certificatecontacts")

const maxContacts = 100

// Contacts returns the contacts of a vault.
func (v *Vaults) Contacts(ctx context.Context, vault string) ([]Contact, error) {
	vt, err := v.read(ctx, vault, "certificates/managecontacts", "certificates/contacts")
	if err != nil {
		return nil, err
	}
	o, err := contacts.Lookup(v.store.View(ctx), vt.ID)
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, noContacts(vt.Spec.Name)
	}
	return o.Spec.Contacts, nil
}

func noContacts(vault string) error {
	return fault.New(fault.NotFound, "ContactsNotFound", "Contacts not found: the vault '%s' has none.", vault)
}

// SetContacts replaces the contacts of a vault.
func (v *Vaults) SetContacts(ctx context.Context, vault string, list []Contact) error {
	if len(list) == 0 || len(list) > maxContacts {
		return fault.New(fault.Invalid, "BadParameter", "A vault has 1 to %d contacts; these are %d.", maxContacts, len(list)).At("contacts")
	}
	for _, c := range list {
		if !mailAddress(c.Email) || len(c.Name) > maxTagLength || len(c.Phone) > maxTagLength {
			return fault.New(fault.Invalid, "BadParameter", "'%s' is not an e-mail address, or name or phone is too long.", c.Email).At("contacts.email")
		}
	}
	return v.change(ctx, vault, "certificates/managecontacts", "certificates/contacts", "set", func(tx *store.Tx, vt *vaultObject) error {
		o, err := contacts.Lookup(tx, vt.ID)
		if err != nil {
			return err
		}
		if o == nil {
			o = &store.Object[contactList, none]{Spec: contactList{list}}
			o.ID = vt.ID
			return contacts.Insert(tx, o)
		}
		o.Spec.Contacts = list
		return contacts.Put(tx, o)
	})
}

// DeleteContacts removes the contacts of a vault and returns them.
func (v *Vaults) DeleteContacts(ctx context.Context, vault string) ([]Contact, error) {
	var list []Contact
	err := v.change(ctx, vault, "certificates/managecontacts", "certificates/contacts", "delete", func(tx *store.Tx, vt *vaultObject) error {
		o, err := contacts.Lookup(tx, vt.ID)
		if err != nil {
			return err
		}
		if o == nil {
			return noContacts(vt.Spec.Name)
		}
		list = o.Spec.Contacts
		return contacts.Delete(tx, vt.ID)
	})
	return list, err
}

// Issuers lists the names of the issuers that policies may name.
func (v *Vaults) Issuers(ctx context.Context, vault string) ([]string, error) {
	if _, err := v.read(ctx, vault, "certificates/listissuers", "certificates/issuers"); err != nil {
		return nil, err
	}
	return v.issuers(), nil
}

// Issuer returns the name of an issuer that policies of the vault may name, in its own casing.
func (v *Vaults) Issuer(ctx context.Context, vault, name string) (string, error) {
	if _, err := v.read(ctx, vault, "certificates/getissuers", "certificates/issuers/"+lower(name)); err != nil {
		return "", err
	}
	for _, i := range v.issuers() {
		if lower(i) == lower(name) {
			return i, nil
		}
	}
	return "", fault.New(fault.NotFound, "CertificateIssuerNotFound", "Issuer not found: %s. There are: %v.", name, v.issuers())
}

func (v *Vaults) issuers() []string {
	if v.cfg.Issuer == nil {
		return []string{SelfIssuer}
	}
	return []string{SelfIssuer, BuiltInIssuer}
}
