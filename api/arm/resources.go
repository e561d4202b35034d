package arm

// Subscription is a subscription as listings show it.
type Subscription struct {
	ID                  string               `json:"id"`
	SubscriptionID      string               `json:"subscriptionId"`
	TenantID            string               `json:"tenantId"`
	DisplayName         string               `json:"displayName"`
	State               string               `json:"state"`
	Policies            SubscriptionPolicies `json:"subscriptionPolicies"`
	AuthorizationSource string               `json:"authorizationSource"`
	ManagedByTenants    []ManagedByTenant    `json:"managedByTenants"`
}

// SubscriptionPolicies is part of a subscription; clients show it.
type SubscriptionPolicies struct {
	LocationPlacementID string `json:"locationPlacementId"`
	QuotaID             string `json:"quotaId"`
	SpendingLimit       string `json:"spendingLimit"`
}

// ManagedByTenant names a tenant that manages a subscription.
type ManagedByTenant struct {
	TenantID string `json:"tenantId"`
}

// Tenant is a tenant as listings show it.
type Tenant struct {
	ID             string `json:"id"`
	TenantID       string `json:"tenantId"`
	DisplayName    string `json:"displayName"`
	TenantCategory string `json:"tenantCategory"`
}

// Location is a location as listings show it.
type Location struct {
	ID                  string           `json:"id"`
	Name                string           `json:"name"`
	Type                string           `json:"type"`
	DisplayName         string           `json:"displayName"`
	RegionalDisplayName string           `json:"regionalDisplayName"`
	Metadata            LocationMetadata `json:"metadata"`
}

// LocationMetadata says what sort of location it is.
type LocationMetadata struct {
	RegionType     string `json:"regionType"`
	RegionCategory string `json:"regionCategory"`
}

// ResourceGroup is a resource group. In requests only Location, Tags and ManagedBy count.
type ResourceGroup struct {
	ID         string                  `json:"id,omitempty"`
	Name       string                  `json:"name,omitempty"`
	Type       string                  `json:"type,omitempty"`
	Location   string                  `json:"location"`
	ManagedBy  string                  `json:"managedBy,omitempty"`
	Tags       map[string]string       `json:"tags,omitempty"`
	Properties ResourceGroupProperties `json:"properties"`
}

// ResourceGroupProperties are read-only.
type ResourceGroupProperties struct {
	ProvisioningState string `json:"provisioningState,omitempty"`
}

// TagsUpdate is the body of a PATCH that changes tags only.
type TagsUpdate struct {
	Tags map[string]string `json:"tags"`
}

// GenericResource is a resource in a listing over all providers.
type GenericResource struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Location string            `json:"location"`
	Tags     map[string]string `json:"tags,omitempty"`
}

// Provider is a resource provider and its state in a subscription.
type Provider struct {
	ID                 string                 `json:"id"`
	Namespace          string                 `json:"namespace"`
	RegistrationState  string                 `json:"registrationState"`
	RegistrationPolicy string                 `json:"registrationPolicy"`
	ResourceTypes      []ProviderResourceType `json:"resourceTypes"`
}

// ProviderResourceType is a resource type of a provider.
type ProviderResourceType struct {
	ResourceType string   `json:"resourceType"`
	Locations    []string `json:"locations"`
	APIVersions  []string `json:"apiVersions"`
	Capabilities string   `json:"capabilities"`
}

// RoleAssignment is a role assignment.
type RoleAssignment struct {
	ID         string                   `json:"id,omitempty"`
	Name       string                   `json:"name,omitempty"`
	Type       string                   `json:"type,omitempty"`
	Properties RoleAssignmentProperties `json:"properties"`
}

// RoleAssignmentProperties say who has which role where. In requests
// RoleDefinitionID, PrincipalID and PrincipalType count.
type RoleAssignmentProperties struct {
	RoleDefinitionID string `json:"roleDefinitionId"`
	PrincipalID      string `json:"principalId"`
	PrincipalType    string `json:"principalType,omitempty"`
	Scope            string `json:"scope,omitempty"`
	Condition        string `json:"condition,omitempty"`
	CreatedOn        string `json:"createdOn,omitempty"`
	UpdatedOn        string `json:"updatedOn,omitempty"`
	CreatedBy        string `json:"createdBy,omitempty"`
	UpdatedBy        string `json:"updatedBy,omitempty"`
}

// RoleDefinition is a role definition.
type RoleDefinition struct {
	ID         string                   `json:"id"`
	Name       string                   `json:"name"`
	Type       string                   `json:"type"`
	Properties RoleDefinitionProperties `json:"properties"`
}

// RoleDefinitionProperties say what a role allows.
type RoleDefinitionProperties struct {
	RoleName         string           `json:"roleName"`
	Type             string           `json:"type"` // "BuiltInRole"
	Description      string           `json:"description"`
	AssignableScopes []string         `json:"assignableScopes"`
	Permissions      []RolePermission `json:"permissions"`
}

// RolePermission is one set of actions.
type RolePermission struct {
	Actions        []string `json:"actions"`
	NotActions     []string `json:"notActions"`
	DataActions    []string `json:"dataActions"`
	NotDataActions []string `json:"notDataActions"`
}

// CloudMetadata is the answer of /metadata/endpoints since api-version
// 2019-05-01 (there in an array, later alone).
type CloudMetadata struct {
	Name                     string              `json:"name"`
	Portal                   string              `json:"portal"`
	Authentication           CloudAuthentication `json:"authentication"`
	ResourceManager          string              `json:"resourceManager"`
	Batch                    string              `json:"batch"`
	Gallery                  string              `json:"gallery"`
	Graph                    string              `json:"graph"`
	GraphAudience            string              `json:"graphAudience"`
	MicrosoftGraphResourceID string              `json:"microsoftGraphResourceId"`
	Media                    string              `json:"media"`
	SQLManagement            string              `json:"sqlManagement"`
	VMImageAliasDoc          string              `json:"vmImageAliasDoc"`
	Suffixes                 CloudSuffixes       `json:"suffixes"`
}

// CloudAuthentication says where tokens come from and what they are for.
type CloudAuthentication struct {
	LoginEndpoint    string   `json:"loginEndpoint"`
	Audiences        []string `json:"audiences"`
	Tenant           string   `json:"tenant,omitempty"`
	IdentityProvider string   `json:"identityProvider,omitempty"`
}

// CloudSuffixes are the suffixes of host names, without a leading dot.
type CloudSuffixes struct {
	Storage           string `json:"storage"`
	KeyVaultDNS       string `json:"keyVaultDns"`
	SQLServerHostname string `json:"sqlServerHostname"`
	ACRLoginServer    string `json:"acrLoginServer"`
}

// CloudMetadata2015 is the answer of /metadata/endpoints for older api-versions.
type CloudMetadata2015 struct {
	GalleryEndpoint string              `json:"galleryEndpoint"`
	GraphEndpoint   string              `json:"graphEndpoint"`
	PortalEndpoint  string              `json:"portalEndpoint"`
	Authentication  CloudAuthentication `json:"authentication"`
}
