package resources

import (
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/msi"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/identity"
)

func (s surface) federatedRoutes() []azureapi.Route {
	const (
		parent = "/subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.managedidentity/userassignedidentities/{name}"
		all    = parent + "/federatedidentitycredentials"
		one    = all + "/{credential}"
	)
	return []azureapi.Route{
		row(http.MethodGet, all, federatedVersions, msi.FederatedType+"/read", s.listFederated),
		row(http.MethodGet, one, federatedVersions, msi.FederatedType+"/read", s.getFederated),
		row(http.MethodPut, one, federatedVersions, msi.FederatedType+"/write", s.putFederated),
		row(http.MethodDelete, one, federatedVersions, msi.FederatedType+"/delete", s.deleteFederated),
	}
}

func toFederated(o *identity.FederatedObject) msi.FederatedCredential {
	id, _ := arm.ParseID(o.Spec.ID) // it was parsed when it was stored
	out := msi.FederatedCredential{
		ID: o.Spec.ID, Name: id.Name(), Type: msi.FederatedType,
		Properties: msi.FederatedProperties{Issuer: o.Spec.Issuer, Cluster: o.Spec.Cluster, Subject: o.Spec.Subject, Audiences: o.Spec.Audiences},
	}
	if o.Spec.Expression != "" {
		out.Properties.ClaimsMatchingExpression = &msi.Expression{Value: o.Spec.Expression, LanguageVersion: 1}
	}
	return out
}

func (s surface) listFederated(r *azureapi.Request) (*azureapi.Reply, error) {
	parent := r.Path()[:strings.LastIndexByte(r.Path(), '/')]
	found, err := s.Identity.ListFederated(r.Context(), parent)
	if err != nil {
		return nil, err
	}
	return list(found, toFederated), nil
}

func (s surface) getFederated(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Identity.Federated(r.Context(), r.Path())
	if err != nil {
		return nil, err
	}
	return azureapi.OK(toFederated(o)), nil
}

func (s surface) putFederated(r *azureapi.Request) (*azureapi.Reply, error) {
	var body msi.FederatedCredential
	if err := r.DecodeLoose(&body); err != nil {
		return nil, err
	}
	p := body.Properties
	want := identity.Federated{ID: r.Path(), Issuer: p.Issuer, Cluster: p.Cluster, Subject: p.Subject, Audiences: p.Audiences}
	if e := p.ClaimsMatchingExpression; e != nil {
		if e.LanguageVersion != 1 {
			return nil, fault.New(fault.Invalid, "InvalidClaimsMatchingExpression", "The language version of a claims matching expression is 1, not %d.", e.LanguageVersion).
				At("properties.claimsMatchingExpression.languageVersion")
		}
		want.Expression = e.Value
	}
	o, isNew, err := s.Identity.PutFederated(r.Context(), want)
	if err != nil {
		return nil, err
	}
	return created(isNew, toFederated(o)), nil
}

func (s surface) deleteFederated(r *azureapi.Request) (*azureapi.Reply, error) {
	existed, err := s.Identity.DeleteFederated(r.Context(), r.Path())
	if err != nil {
		return nil, err
	}
	return deleted(existed), nil
}
