package keyvault

import (
	"encoding/base64"
	"net/http"
	"strconv"

	wire "keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/vault"
)

// certificate is a certificate as clients get it.
func certificate(r *azureapi.Request, c vault.CertificateVersion) wire.Certificate {
	out := certificateItem(r, c, true)
	out.Policy = policyOf(&c.Policy, base(r)+"/certificates/"+c.Name+"/policy")
	if c.Operation.RequestID != "" {
		out.Pending = &wire.PendingReference{ID: base(r) + "/certificates/" + c.Name + "/pending"}
	}
	if c.Version != "" {
		out.KeyID = base(r) + "/keys/" + c.Name + "/" + c.Version
		out.SecretID = base(r) + "/secrets/" + c.Name + "/" + c.Version
		out.ContentType = c.Policy.ContentType
	}
	if len(c.Chain) > 0 {
		out.CER = c.Chain[0]
	}
	return out
}

// certificateItem is a certificate in a list, with its version in the id or without.
func certificateItem(r *azureapi.Request, c vault.CertificateVersion, versioned bool) wire.Certificate {
	out := wire.Certificate{
		ID: base(r) + "/certificates/" + c.Name, Thumbprint: base64.RawURLEncoding.EncodeToString(c.Thumbprint), Attributes: attributes(c.Attributes), Tags: c.Tags,
	}
	if versioned && c.Version != "" {
		out.ID += "/" + c.Version
	}
	if c.Deleted != nil {
		out.RecoveryID = base(r) + "/deletedcertificates/" + c.Name
		out.DeletedDate, out.ScheduledPurgeDate = unix(c.Deleted.At), unix(c.Deleted.PurgeAt)
	}
	return out
}

// operation is a certificate's operation as clients get it. vaultURL has no trailing slash.
func operation(vaultURL string, c vault.CertificateVersion) wire.CertificateOperation {
	op, one := c.Operation, vaultURL+"/certificates/"+c.Name
	out := wire.CertificateOperation{
		ID: one + "/pending", Issuer: &wire.IssuerParameters{Name: &op.Issuer}, CancellationRequested: op.Cancel,
		Status: op.Status, StatusDetails: op.Details, RequestID: op.RequestID,
	}
	if op.Code != "" || op.Message != "" {
		out.Error = &wire.OperationError{Code: op.Code, Message: op.Message}
	}
	if op.Status == vault.Completed {
		out.Target = one
	}
	return out
}

func certificateReply(r *azureapi.Request, c vault.CertificateVersion, err error) (*azureapi.Reply, error) {
	if err != nil {
		return nil, err
	}
	return azureapi.OK(certificate(r, c)), nil
}

func operationReply(r *azureapi.Request, c vault.CertificateVersion, err error) (*azureapi.Reply, error) {
	if err != nil {
		return nil, err
	}
	return azureapi.OK(operation(base(r), c)), nil
}

func (s surface) createCertificate(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.CreateCertificate
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	c, err := change(body.Attributes, body.Tags, nil)
	if err != nil {
		return nil, err
	}
	var policy *vault.Policy
	if body.Policy != nil {
		p := vault.DefaultPolicy()
		merge(body.Policy, &p)
		policy = &p
	}
	out, err := s.vaults.CreateCertificate(r.Context(), r.Host.Name, r.Param("name"), policy, c)
	if err != nil {
		return nil, err
	}
	op := operation(base(r), out)
	reply := &azureapi.Reply{Status: http.StatusAccepted, Body: op}
	return reply.With("Location", op.ID+"?api-version="+r.Version+"&request_id="+op.RequestID).With("Retry-After", "1"), nil
}

func (s surface) getCertificate(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.Certificate(r.Context(), r.Host.Name, r.Param("name"), r.Param("version"))
	return certificateReply(r, out, err)
}

func (s surface) updateCertificate(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.UpdateCertificate
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	c, err := change(body.Attributes, body.Tags, nil)
	if err != nil {
		return nil, err
	}
	var edit func(*vault.Policy)
	if body.Policy != nil {
		edit = func(p *vault.Policy) { merge(body.Policy, p) }
	}
	out, err := s.vaults.UpdateCertificate(r.Context(), r.Host.Name, r.Param("name"), r.Param("version"), c, edit)
	return certificateReply(r, out, err)
}

func (s surface) listCertificates(r *azureapi.Request) (*azureapi.Reply, error) {
	p, err := paging(r)
	if err != nil {
		return nil, err
	}
	pending := false
	if q := r.Query("includePending"); q != "" {
		if pending, err = strconv.ParseBool(q); err != nil {
			return nil, fault.New(fault.Invalid, "BadParameter", "includePending is true or false, not '%s'.", q).At("includePending")
		}
	}
	items, next, err := s.vaults.ListCertificates(r.Context(), r.Host.Name, pending, p)
	return certificateList(r, items, next, false, err)
}

func certificateList(r *azureapi.Request, items []vault.CertificateVersion, next string, versioned bool, err error) (*azureapi.Reply, error) {
	if err != nil {
		return nil, err
	}
	out := make([]wire.Certificate, len(items))
	for i, c := range items {
		out[i] = certificateItem(r, c, versioned)
	}
	return list(r, out, next), nil
}

func (s surface) listCertificateVersions(r *azureapi.Request) (*azureapi.Reply, error) {
	p, err := paging(r)
	if err != nil {
		return nil, err
	}
	items, next, err := s.vaults.CertificateVersions(r.Context(), r.Host.Name, r.Param("name"), p)
	return certificateList(r, items, next, true, err)
}

func (s surface) listDeletedCertificates(r *azureapi.Request) (*azureapi.Reply, error) {
	p, err := paging(r)
	if err != nil {
		return nil, err
	}
	items, next, err := s.vaults.DeletedCertificates(r.Context(), r.Host.Name, p)
	return certificateList(r, items, next, false, err)
}

func (s surface) getPolicy(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.CertificatePolicy(r.Context(), r.Host.Name, r.Param("name"))
	return policyReply(r, out, err)
}

func policyReply(r *azureapi.Request, c vault.CertificateVersion, err error) (*azureapi.Reply, error) {
	if err != nil {
		return nil, err
	}
	return azureapi.OK(policyOf(&c.Policy, base(r)+"/certificates/"+c.Name+"/policy")), nil
}

func (s surface) updatePolicy(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.CertificatePolicy
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	out, err := s.vaults.UpdatePolicy(r.Context(), r.Host.Name, r.Param("name"), func(p *vault.Policy) { merge(&body, p) })
	return policyReply(r, out, err)
}

func (s surface) getPending(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.Pending(r.Context(), r.Host.Name, r.Param("name"), r.Query("request_id"))
	return operationReply(r, out, err)
}

func (s surface) updatePending(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.UpdateOperation
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.CancellationRequested == nil || !*body.CancellationRequested {
		return nil, fault.New(fault.Invalid, "BadParameter", "The only change of an operation is its cancellation.").At("cancellation_requested").WithFix(`send {"cancellation_requested":true}`)
	}
	out, err := s.vaults.CancelPending(r.Context(), r.Host.Name, r.Param("name"))
	return operationReply(r, out, err)
}

func (s surface) deletePending(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.DeletePending(r.Context(), r.Host.Name, r.Param("name"))
	return operationReply(r, out, err)
}

func (s surface) deleteCertificate(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.DeleteCertificate(r.Context(), r.Host.Name, r.Param("name"))
	return certificateReply(r, out, err)
}

func (s surface) getDeletedCertificate(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.DeletedCertificate(r.Context(), r.Host.Name, r.Param("name"))
	return certificateReply(r, out, err)
}

func (s surface) recoverCertificate(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.RecoverCertificate(r.Context(), r.Host.Name, r.Param("name"))
	return certificateReply(r, out, err)
}

func (s surface) purgeCertificate(r *azureapi.Request) (*azureapi.Reply, error) {
	if err := s.vaults.PurgeCertificate(r.Context(), r.Host.Name, r.Param("name")); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}

func (s surface) getContacts(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.Contacts(r.Context(), r.Host.Name)
	return contactsReply(r, out, err)
}

func contactsReply(r *azureapi.Request, contacts []vault.Contact, err error) (*azureapi.Reply, error) {
	if err != nil {
		return nil, err
	}
	out := wire.Contacts{ID: base(r) + "/certificates/contacts", Contacts: make([]wire.Contact, len(contacts))}
	for i, c := range contacts {
		out.Contacts[i] = wire.Contact(c)
	}
	return azureapi.OK(out), nil
}

func (s surface) setContacts(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.Contacts
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	contacts := make([]vault.Contact, len(body.Contacts))
	for i, c := range body.Contacts {
		contacts[i] = vault.Contact(c)
	}
	err := s.vaults.SetContacts(r.Context(), r.Host.Name, contacts)
	return contactsReply(r, contacts, err)
}

func (s surface) deleteContacts(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.DeleteContacts(r.Context(), r.Host.Name)
	return contactsReply(r, out, err)
}

func (s surface) listIssuers(r *azureapi.Request) (*azureapi.Reply, error) {
	names, err := s.vaults.Issuers(r.Context(), r.Host.Name)
	if err != nil {
		return nil, err
	}
	out := make([]wire.Issuer, len(names))
	for i, n := range names {
		out[i] = wire.Issuer{ID: base(r) + "/certificates/issuers/" + n, Provider: n}
	}
	return list(r, out, ""), nil
}

func (s surface) getIssuer(r *azureapi.Request) (*azureapi.Reply, error) {
	name, err := s.vaults.Issuer(r.Context(), r.Host.Name, r.Param("name"))
	if err != nil {
		return nil, err
	}
	enabled := true
	return azureapi.OK(wire.Issuer{ID: base(r) + "/certificates/issuers/" + name, Provider: name, Attributes: &wire.Attributes{Enabled: &enabled}}), nil
}
