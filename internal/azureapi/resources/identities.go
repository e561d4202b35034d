package resources

import (
	"net/http"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/msi"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/subscription"
)

func (s surface) identityRoutes() []azureapi.Route {
	const (
		typ   = "/providers/microsoft.managedidentity/userassignedidentities"
		group = "/subscriptions/{subscription}/resourcegroups/{group}" + typ
		one   = group + "/{name}"
		read  = msi.Type + "/read"
		write = msi.Type + "/write"
	)
	return []azureapi.Route{
		row(http.MethodGet, "/subscriptions/{subscription}"+typ, identityVersions, read, s.listIdentities),
		row(http.MethodGet, group, identityVersions, read, s.listIdentities),
		row(http.MethodGet, one, identityVersions, read, s.getIdentity),
		row(http.MethodPut, one, identityVersions, write, s.putIdentity),
		row(http.MethodPatch, one, identityVersions, write, s.patchIdentity),
		row(http.MethodDelete, one, identityVersions, msi.Type+"/delete", s.deleteIdentity),
	}
}

func toIdentity(o *identity.IdentityObject) msi.Identity {
	id, _ := arm.ParseID(o.Spec.ID) // it was parsed when it was stored
	return msi.Identity{
		ID: o.Spec.ID, Name: id.Name(), Type: msi.Type, Location: o.Spec.Location, Tags: o.Spec.Tags,
		Properties: msi.IdentityProperties{TenantID: o.Spec.Tenant, PrincipalID: o.Spec.PrincipalID, ClientID: o.Spec.ClientID},
	}
}

func (s surface) listIdentities(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Identity.ListIdentities(r.Context(), r.Param("subscription"), r.Param("group"))
	if err != nil {
		return nil, err
	}
	return list(all, toIdentity), nil
}

func (s surface) getIdentity(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Identity.Identity(r.Context(), r.Path())
	if err != nil {
		return nil, err
	}
	return azureapi.OK(toIdentity(o)), nil
}

// putIdentity takes properties.clientId as a wish; package identity decides
// whether the caller may have it. The other properties are read-only and ignored.
func (s surface) putIdentity(r *azureapi.Request) (*azureapi.Reply, error) {
	var body msi.Identity
	if err := r.DecodeLoose(&body); err != nil {
		return nil, err
	}
	location, err := subscription.NormalizeLocation(body.Location)
	if err != nil {
		return nil, err
	}
	o, isNew, err := s.Identity.PutIdentity(r.Context(), identity.Identity{
		ID: r.Path(), Location: location, Tags: body.Tags, ClientID: body.Properties.ClientID,
	})
	if err != nil {
		return nil, err
	}
	return created(isNew, toIdentity(o)), nil
}

func (s surface) patchIdentity(r *azureapi.Request) (*azureapi.Reply, error) {
	var body msi.IdentityUpdate
	if err := r.DecodeLoose(&body); err != nil {
		return nil, err
	}
	o, err := s.Identity.TagIdentity(r.Context(), r.Path(), body.Tags)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(toIdentity(o)), nil
}

func (s surface) deleteIdentity(r *azureapi.Request) (*azureapi.Reply, error) {
	existed, err := s.Identity.DeleteIdentity(r.Context(), r.Path())
	if err != nil {
		return nil, err
	}
	return deleted(existed), nil
}
