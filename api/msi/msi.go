// Package msi holds the wire types of Microsoft.ManagedIdentity. It is a leaf:
// plain structs with Azure's names.
package msi

// Type is the resource type of user-assigned identities.
const Type = "Microsoft.ManagedIdentity/userAssignedIdentities"

// Identity is a user-assigned identity.
type Identity struct {
	ID         string             `json:"id,omitempty"`
	Name       string             `json:"name,omitempty"`
	Type       string             `json:"type,omitempty"`
	Location   string             `json:"location"`
	Tags       map[string]string  `json:"tags,omitempty"`
	Properties IdentityProperties `json:"properties"`
}

// IdentityProperties are read-only, but for ClientID on creation by an administrator.
type IdentityProperties struct {
	TenantID    string `json:"tenantId,omitempty"`
	PrincipalID string `json:"principalId,omitempty"`
	ClientID    string `json:"clientId,omitempty"`
}

// IdentityUpdate is the body of PATCH. Tags nil: unchanged.
type IdentityUpdate struct {
	Location string            `json:"location,omitempty"`
	Tags     map[string]string `json:"tags,omitempty"`
}

// Token is the answer of the metadata service (169.254.169.254); its numbers are strings.
type Token struct {
	AccessToken  string `json:"access_token"`
	ClientID     string `json:"client_id"`
	ExpiresIn    string `json:"expires_in"`
	ExpiresOn    string `json:"expires_on"`
	ExtExpiresIn string `json:"ext_expires_in"`
	NotBefore    string `json:"not_before"`
	Resource     string `json:"resource"`
	TokenType    string `json:"token_type"`
}

// FederatedType is the resource type of federated identity credentials.
const FederatedType = Type + "/federatedIdentityCredentials"

// FederatedCredential is a federated identity credential of a user-assigned identity.
type FederatedCredential struct {
	ID         string              `json:"id,omitempty"`
	Name       string              `json:"name,omitempty"`
	Type       string              `json:"type,omitempty"`
	Properties FederatedProperties `json:"properties"`
}

// FederatedProperties say whose tokens are accepted. Exactly one of Subject and
// ClaimsMatchingExpression is set.
type FederatedProperties struct {
	Issuer                   string      `json:"issuer"`
	Cluster                  string      `json:"cluster,omitempty"` // Keyfleet's own: resource id of the registered cluster that is the issuer
	Subject                  string      `json:"subject,omitempty"`
	Audiences                []string    `json:"audiences"`
	ClaimsMatchingExpression *Expression `json:"claimsMatchingExpression,omitempty"`
}

// Expression is a claims matching expression; its one language version is 1.
type Expression struct {
	Value           string `json:"value"`
	LanguageVersion int    `json:"languageVersion"`
}
