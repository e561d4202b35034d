package resources

import (
	"net/http"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/subscription"
)

func (s surface) subscriptionRoutes() []azureapi.Route {
	const (
		one       = "/subscriptions/{subscription}"
		providers = one + "/providers"
		// Paths under the provider Microsoft.Authorization are routed as those of
		// extension resources, whatever stands before; so its own registration is too.
		authorization = "/-/providers/microsoft.authorization"
		register      = "Microsoft.Resources/subscriptions/providers/register/action"
		unregister    = "Microsoft.Resources/subscriptions/providers/unregister/action"
		providersRead = "Microsoft.Resources/subscriptions/providers/read"
	)
	return []azureapi.Route{
		row(http.MethodGet, "/subscriptions", subscriptionVersions, azureapi.Authenticated, s.listSubscriptions),
		row(http.MethodGet, one, subscriptionVersions, "Microsoft.Resources/subscriptions/read", s.getSubscription),
		row(http.MethodGet, one+"/locations", subscriptionVersions, "Microsoft.Resources/subscriptions/read", s.listLocations),
		row(http.MethodGet, one+"/resources", resourceVersions, "Microsoft.Resources/subscriptions/resources/read", s.listResources),
		row(http.MethodGet, providers, resourceVersions, providersRead, s.listProviders),
		row(http.MethodGet, providers+"/{namespace}", resourceVersions, providersRead, s.getProvider),
		row(http.MethodPost, providers+"/{namespace}/register", resourceVersions, register, s.register(true)),
		row(http.MethodPost, providers+"/{namespace}/unregister", resourceVersions, unregister, s.register(false)),
		row(http.MethodPost, authorization+"/register", resourceVersions, register, s.register(true)),
		row(http.MethodPost, authorization+"/unregister", resourceVersions, unregister, s.register(false)),
	}
}

func (s surface) tenants(r *azureapi.Request) (*azureapi.Reply, error) {
	op := access.Op{Action: "Microsoft.Resources/tenants/read", Resource: "/tenants"}
	if err := s.Gate.Record(r.Context(), r.Caller, op, nil); err != nil { // every caller has a tenant, and there is one
		return nil, err
	}
	id := s.Identity.TenantID()
	return azureapi.OK(arm.List[arm.Tenant]{Value: []arm.Tenant{{ID: "/tenants/" + id, TenantID: id, DisplayName: "Keyfleet", TenantCategory: "Home"}}}), nil
}

func toSubscription(o *subscription.Object) arm.Subscription {
	return arm.Subscription{
		ID: subscription.Scope(o.Spec.ID), SubscriptionID: o.Spec.ID, TenantID: o.Spec.Tenant, DisplayName: o.Spec.DisplayName, State: "Enabled",
		Policies:            arm.SubscriptionPolicies{LocationPlacementID: "Public_2014-09-01", QuotaID: "PayAsYouGo_2014-09-01", SpendingLimit: "Off"},
		AuthorizationSource: "RoleBased", ManagedByTenants: []arm.ManagedByTenant{},
	}
}

func (s surface) listSubscriptions(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Subscriptions.List(r.Context())
	if err != nil {
		return nil, err
	}
	return list(all, toSubscription), nil
}

func (s surface) getSubscription(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Subscriptions.Get(r.Context(), r.Param("subscription"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(toSubscription(o)), nil
}

func (s surface) listLocations(r *azureapi.Request) (*azureapi.Reply, error) {
	sub := r.Param("subscription")
	all, err := s.Subscriptions.Locations(r.Context(), sub)
	if err != nil {
		return nil, err
	}
	return list(all, func(l subscription.Location) arm.Location {
		return arm.Location{
			ID: subscription.Scope(sub) + "/locations/" + l.Name, Name: l.Name, Type: "Region", DisplayName: l.DisplayName, RegionalDisplayName: l.DisplayName,
			Metadata: arm.LocationMetadata{RegionType: "Physical", RegionCategory: "Recommended"},
		}
	}), nil
}

// list makes a page of converted values; never null.
func list[T, W any](in []T, convert func(T) W) *azureapi.Reply {
	out := arm.List[W]{Value: make([]W, 0, len(in))}
	for _, v := range in {
		out.Value = append(out.Value, convert(v))
	}
	return azureapi.OK(out)
}

func (s surface) listResources(r *azureapi.Request) (*azureapi.Reply, error) {
	f, err := subscription.ParseFilter(r.Query("$filter"))
	if err != nil {
		return nil, err
	}
	all, err := s.Subscriptions.Resources(r.Context(), r.Param("subscription"), r.Param("group"), f)
	if err != nil {
		return nil, err
	}
	return list(all, func(res subscription.Resource) arm.GenericResource {
		return arm.GenericResource{ID: res.ID, Name: res.Name, Type: res.Type, Location: res.Location, Tags: res.Tags}
	}), nil
}

func (s surface) toProvider(sub string, p subscription.Provider) arm.Provider {
	out := arm.Provider{
		ID: subscription.Scope(sub) + "/providers/" + p.Namespace, Namespace: p.Namespace,
		RegistrationState: "NotRegistered", RegistrationPolicy: "RegistrationRequired",
	}
	if p.Registered {
		out.RegistrationState = "Registered"
	}
	locations := make([]string, 0, 32)
	for _, l := range subscription.Locations() {
		locations = append(locations, l.DisplayName)
	}
	var table []azureapi.Route
	if s.Table != nil {
		table = s.Table()
	}
	for _, t := range p.Types {
		versions := versionsOf(table, p.Namespace, t)
		if versions == nil {
			versions = []string{}
		}
		out.ResourceTypes = append(out.ResourceTypes, arm.ProviderResourceType{
			ResourceType: t, Locations: locations, APIVersions: versions, Capabilities: "SupportsTags, SupportsLocation",
		})
	}
	return out
}

func (s surface) listProviders(r *azureapi.Request) (*azureapi.Reply, error) {
	sub := r.Param("subscription")
	all, err := s.Subscriptions.ListProviders(r.Context(), sub)
	if err != nil {
		return nil, err
	}
	return list(all, func(p subscription.Provider) arm.Provider { return s.toProvider(sub, p) }), nil
}

func (s surface) getProvider(r *azureapi.Request) (*azureapi.Reply, error) {
	p, err := s.Subscriptions.Provider(r.Context(), r.Param("subscription"), r.Param("namespace"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(s.toProvider(r.Param("subscription"), p)), nil
}

func (s surface) register(on bool) func(*azureapi.Request) (*azureapi.Reply, error) {
	return func(r *azureapi.Request) (*azureapi.Reply, error) {
		sub, namespace := r.Param("subscription"), r.Param("namespace")
		if scope := r.Param("scope"); scope != "" { // the form of Microsoft.Authorization
			id, err := arm.ParseID(scope)
			if err != nil || id.ResourceGroup != "" || id.Provider != "" {
				return nil, notAScope(scope)
			}
			sub, namespace = id.Subscription, "Microsoft.Authorization"
		}
		p, err := s.Subscriptions.Register(r.Context(), sub, namespace, on)
		if err != nil {
			return nil, err
		}
		return azureapi.OK(s.toProvider(sub, p)), nil
	}
}
