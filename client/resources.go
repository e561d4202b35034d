package client

import (
	"context"
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
)

// api-versions that the typed calls and the command line send.
const (
	VersionResources     = "2021-04-01"
	VersionSubscriptions = "2022-12-01"
	VersionRoles         = "2022-04-01"
	VersionIdentities    = "2023-01-31"
	VersionClusters      = "2025-01-01"
	VersionVaults        = "2023-02-01"
	VersionVaultData     = "7.4"
	VersionBatch         = "2023-05-01"
	VersionBatchData     = "2021-06-01.14.0"
)

// GroupID is the id of a resource group.
func GroupID(subscription, group string) string {
	return arm.ID{Subscription: subscription, ResourceGroup: group}.String()
}

// ResourceID is the id of a resource in a group: provider "Microsoft.Batch",
// then types and names in turn.
func ResourceID(subscription, group, provider string, typesAndNames ...string) string {
	id := arm.ID{Subscription: subscription, ResourceGroup: group, Provider: provider}
	for i := 0; i+1 < len(typesAndNames); i += 2 {
		id.Types = append(id.Types, typesAndNames[i])
		id.Names = append(id.Names, typesAndNames[i+1])
	}
	return id.String()
}

// AtScope is the URL of something of Microsoft.Authorization at a scope; "/" is everything.
func (c *Client) AtScope(scope, rest string) string {
	return c.ARM(strings.TrimRight(scope, "/") + "/providers/Microsoft.Authorization/" + rest)
}

// Subscriptions lists the subscriptions that the caller sees.
func (c *Client) Subscriptions(ctx context.Context) ([]arm.Subscription, error) {
	return List[arm.Subscription](ctx, c, Request{Method: http.MethodGet, URL: c.ARM("/subscriptions"), Version: VersionSubscriptions})
}

// CreateSubscription makes a subscription with a chosen id; the same id again is no error.
func (c *Client) CreateSubscription(ctx context.Context, id, displayName string) (arm.Subscription, error) {
	return call[arm.Subscription](ctx, c, http.MethodPost, c.ARM("/keyfleet/v1/subscriptions"), "",
		arm.NewSubscription{SubscriptionID: id, DisplayName: displayName})
}

// Groups lists the resource groups of a subscription.
func (c *Client) Groups(ctx context.Context, subscription string) ([]arm.ResourceGroup, error) {
	return List[arm.ResourceGroup](ctx, c, Request{Method: http.MethodGet, URL: c.ARM("/subscriptions/" + subscription + "/resourcegroups"), Version: VersionResources})
}

// PutGroup creates or updates a resource group.
func (c *Client) PutGroup(ctx context.Context, subscription, name, location string) (arm.ResourceGroup, error) {
	return call[arm.ResourceGroup](ctx, c, http.MethodPut, c.ARM(GroupID(subscription, name)), VersionResources, arm.ResourceGroup{Location: location})
}

// PutRoleAssignment gives a principal a role at a scope. name is a GUID; the
// same assignment again is no error.
func (c *Client) PutRoleAssignment(ctx context.Context, scope, name, roleDefinitionID, principalID string) (arm.RoleAssignment, error) {
	return call[arm.RoleAssignment](ctx, c, http.MethodPut, c.AtScope(scope, "roleAssignments/"+name), VersionRoles,
		arm.RoleAssignment{Properties: arm.RoleAssignmentProperties{RoleDefinitionID: roleDefinitionID, PrincipalID: principalID}})
}

// call is one call with a typed answer.
func call[T any](ctx context.Context, c *Client, method, url, version string, body any) (T, error) {
	var out T
	err := c.Call(ctx, Request{Method: method, URL: url, Version: version, Body: body}, &out)
	return out, err
}
