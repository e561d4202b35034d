// Package resources is the part of the ARM surface that belongs to no single
// resource provider, with managed identities and role assignments: what every
// client calls before it gets to vaults and pools. Keyfleet's own
// administration API (/keyfleet/v1) is here too.
//
// Idea: each function turns a path and a body into one domain operation and its
// result into Azure's wire type; nothing is decided here.
//
//	subscriptions, resource groups, providers, locations, resources, tenants   package subscription
//	userAssignedIdentities, their federated credentials, applications          package identity
//	roleAssignments, roleDefinitions                                           package access
//	audit                                                                      package audit
//	/metadata/endpoints                                                        this package
//
// Invariant: ids in answers have Azure's casing in their fixed words and the
// creator's in their names.
//
// Consequence for the operator: az, the SDKs and Terraform work with the
// api-versions that they were built with; the lists in versions.go are generous,
// because these bodies have not changed in years.
package resources

import (
	"net/http"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/subscription"
)

// Config is what the surface needs.
type Config struct {
	Gate          *access.Gate
	Identity      *identity.Service
	Subscriptions *subscription.Service
	Audit         audit.Reader
	// Table returns the whole route table of the server; the api-versions that
	// providers list are taken from it when they are asked for.
	Table func() []azureapi.Route
}

type surface struct{ Config }

// Routes is the route table of this package.
func Routes(cfg Config) []azureapi.Route {
	s := surface{cfg}
	table := []azureapi.Route{
		row(http.MethodGet, "/metadata/endpoints", nil, azureapi.Public, s.metadata),
		row(http.MethodGet, "/tenants", subscriptionVersions, azureapi.Authenticated, s.tenants),
	}
	table = append(table, s.subscriptionRoutes()...)
	table = append(table, s.groupRoutes()...)
	table = append(table, s.identityRoutes()...)
	table = append(table, s.federatedRoutes()...)
	table = append(table, s.authorizationRoutes()...)
	return append(table, s.adminRoutes()...)
}

func row(method, path string, versions []string, action string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
	return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: path, Versions: versions, Action: action, Handle: h}
}

// created answers 201 for what is new and 200 for what was there.
func created(isNew bool, body any) *azureapi.Reply {
	r := azureapi.OK(body)
	if isNew {
		r.Status = http.StatusCreated
	}
	return r
}

// deleted answers 200 for what was there and 204 for what was not.
func deleted(existed bool) *azureapi.Reply {
	if existed {
		return azureapi.Status(http.StatusOK)
	}
	return azureapi.Status(http.StatusNoContent)
}
