package client

import (
	"context"
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
)

// api-versions that the typed calls send.
const (
	VersionResources     = "2021-04-01"
	VersionSubscriptions = "2022-12-01"
	VersionRoles         = "2022-04-01"
	VersionIdentities    = "2023-01-31"
	VersionVaults        = "2023-02-01"
	VersionVaultData     = "7.4"
	VersionBatch         = "2021-01-01"
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

// Subscription is a subscription.
type Subscription struct {
	ID             string `json:"id"`
	SubscriptionID string `json:"subscriptionId"`
	TenantID       string `json:"tenantId"`
	DisplayName    string `json:"displayName"`
	State          string `json:"state"`
}

// Subscriptions lists the subscriptions that the caller sees.
func (c *Client) Subscriptions(ctx context.Context) ([]Subscription, error) {
	return List[Subscription](ctx, c, Request{Method: http.MethodGet, URL: c.ARM("/subscriptions"), Version: VersionSubscriptions})
}

// Group is a resource group.
type Group struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	Type       string            `json:"type,omitempty"`
	Location   string            `json:"location"`
	Tags       map[string]string `json:"tags,omitempty"`
	Properties struct {
		ProvisioningState string `json:"provisioningState,omitempty"`
	} `json:"properties"`
}

// Groups lists the resource groups of a subscription.
func (c *Client) Groups(ctx context.Context, subscription string) ([]Group, error) {
	return List[Group](ctx, c, Request{Method: http.MethodGet, URL: c.ARM("/subscriptions/" + subscription + "/resourcegroups"), Version: VersionResources})
}

// PutGroup creates or updates a resource group.
func (c *Client) PutGroup(ctx context.Context, subscription, name, location string, tags map[string]string) (Group, error) {
	var g Group
	err := c.Call(ctx, Request{
		Method: http.MethodPut, URL: c.ARM(GroupID(subscription, name)), Version: VersionResources,
		Body: map[string]any{"location": location, "tags": tags},
	}, &g)
	return g, err
}

// Role is a role definition.
type Role struct {
	ID         string `json:"id"`
	Name       string `json:"name"`
	Properties struct {
		RoleName    string `json:"roleName"`
		Description string `json:"description,omitempty"`
		Type        string `json:"type,omitempty"`
	} `json:"properties"`
}

// RoleAssignment is a grant of a role at a scope.
type RoleAssignment struct {
	ID         string                   `json:"id"`
	Name       string                   `json:"name"`
	Type       string                   `json:"type,omitempty"`
	Properties RoleAssignmentProperties `json:"properties"`
}

// RoleAssignmentProperties says who has which role where.
type RoleAssignmentProperties struct {
	RoleDefinitionID string `json:"roleDefinitionId"`
	PrincipalID      string `json:"principalId"`
	PrincipalType    string `json:"principalType,omitempty"`
	Scope            string `json:"scope,omitempty"`
}

// AtScope is the URL of something of Microsoft.Authorization at a scope; "/" is everything.
func (c *Client) AtScope(scope, rest string) string {
	return c.ARM(strings.TrimRight(scope, "/") + "/providers/Microsoft.Authorization/" + rest)
}
