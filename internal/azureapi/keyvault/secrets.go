package keyvault

import (
	"net/http"

	wire "keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/vault"
)

// bundle is a secret as clients get it.
func bundle(r *azureapi.Request, s vault.SecretVersion) wire.Secret {
	id := base(r) + "/secrets/" + s.Name
	out := wire.Secret{
		ID: id + "/" + s.Version, ContentType: s.ContentType, Attributes: attributes(s.Attributes), Tags: s.Tags, Managed: s.Managed, PreviousVersion: s.Previous,
	}
	if s.Managed {
		out.KeyID = base(r) + "/keys/" + s.Name + "/" + s.Version
	}
	if s.Deleted != nil {
		out.RecoveryID = base(r) + "/deletedsecrets/" + s.Name
		out.DeletedDate, out.ScheduledPurgeDate = unix(s.Deleted.At), unix(s.Deleted.PurgeAt)
	}
	return out
}

// item is a secret in a list: without version.
func item(r *azureapi.Request, s vault.SecretVersion) wire.Secret {
	out := bundle(r, s)
	out.ID, out.KeyID, out.PreviousVersion = base(r)+"/secrets/"+s.Name, "", ""
	return out
}

// secretList is a page of secrets, or of versions where versioned.
func secretList(r *azureapi.Request, list []vault.SecretVersion, versioned bool) []wire.Secret {
	out := make([]wire.Secret, len(list))
	for i, s := range list {
		if out[i] = item(r, s); versioned {
			out[i].ID += "/" + s.Version
		}
	}
	return out
}

func (s surface) setSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.SetSecret
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.Value == nil {
		return nil, fault.New(fault.Invalid, "BadParameter", "The secret's value is missing.").At("value")
	}
	c, err := change(body.Attributes, body.Tags, body.ContentType)
	if err != nil {
		return nil, err
	}
	out, err := s.vaults.SetSecret(r.Context(), r.Host.Name, r.Param("name"), vault.NewSecret(*body.Value), c)
	if err != nil {
		return nil, err
	}
	return withValue(r, out), nil
}

// withValue is the one answer that holds a secret's value.
func withValue(r *azureapi.Request, s vault.SecretVersion) *azureapi.Reply {
	out := bundle(r, s)
	value := s.Value.Reveal()
	out.Value = &value
	return azureapi.OK(out)
}

func (s surface) getSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	as := ""
	if r.URL.RawQuery != "" {
		as = r.Query("outContentType")
	}
	out, err := s.vaults.Secret(r.Context(), r.Host.Name, r.Param("name"), r.Param("version"), as)
	if err != nil {
		return nil, err
	}
	return withValue(r, out), nil
}

func (s surface) updateSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.UpdateSecret
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	c, err := change(body.Attributes, body.Tags, body.ContentType)
	if err != nil {
		return nil, err
	}
	out, err := s.vaults.UpdateSecret(r.Context(), r.Host.Name, r.Param("name"), r.Param("version"), c)
	return secretReply(r, out, err)
}

func secretReply(r *azureapi.Request, s vault.SecretVersion, err error) (*azureapi.Reply, error) {
	if err != nil {
		return nil, err
	}
	return azureapi.OK(bundle(r, s)), nil
}

func (s surface) listSecrets(r *azureapi.Request) (*azureapi.Reply, error) {
	p, err := paging(r)
	if err != nil {
		return nil, err
	}
	items, next, err := s.vaults.Secrets(r.Context(), r.Host.Name, p)
	if err != nil {
		return nil, err
	}
	return list(r, secretList(r, items, false), next), nil
}

func (s surface) listSecretVersions(r *azureapi.Request) (*azureapi.Reply, error) {
	p, err := paging(r)
	if err != nil {
		return nil, err
	}
	items, next, err := s.vaults.SecretVersions(r.Context(), r.Host.Name, r.Param("name"), p)
	if err != nil {
		return nil, err
	}
	return list(r, secretList(r, items, true), next), nil
}

func (s surface) listDeletedSecrets(r *azureapi.Request) (*azureapi.Reply, error) {
	p, err := paging(r)
	if err != nil {
		return nil, err
	}
	items, next, err := s.vaults.DeletedSecrets(r.Context(), r.Host.Name, p)
	if err != nil {
		return nil, err
	}
	return list(r, secretList(r, items, false), next), nil
}

func (s surface) deleteSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.DeleteSecret(r.Context(), r.Host.Name, r.Param("name"))
	return secretReply(r, out, err)
}

func (s surface) getDeletedSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.DeletedSecret(r.Context(), r.Host.Name, r.Param("name"))
	return secretReply(r, out, err)
}

func (s surface) recoverSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.RecoverSecret(r.Context(), r.Host.Name, r.Param("name"))
	return secretReply(r, out, err)
}

func (s surface) purgeSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	if err := s.vaults.PurgeSecret(r.Context(), r.Host.Name, r.Param("name")); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}
