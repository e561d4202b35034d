package keyvault

import (
	"encoding/json"
	"time"
)

// Vault is the resource Microsoft.KeyVault/vaults.
type Vault struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	Type       string            `json:"type"`
	Location   string            `json:"location"`
	Tags       map[string]string `json:"tags"`
	Properties VaultProperties   `json:"properties"`
}

// PutVault is the body of PUT and PATCH. The members that only the server sets
// are accepted, because clients send back what they got, and ignored.
type PutVault struct {
	ID         string            `json:"id,omitempty"`
	Name       string            `json:"name,omitempty"`
	Type       string            `json:"type,omitempty"`
	Location   *string           `json:"location,omitempty"`
	Tags       map[string]string `json:"tags,omitempty"`
	Properties *VaultProperties  `json:"properties,omitempty"`
	SystemData json.RawMessage   `json:"systemData,omitempty"`
}

// VaultProperties are a vault's properties. In requests nil was not sent.
type VaultProperties struct {
	TenantID                     *string              `json:"tenantId,omitempty"`
	SKU                          *SKU                 `json:"sku,omitempty"`
	AccessPolicies               *[]AccessPolicyEntry `json:"accessPolicies,omitempty"`
	VaultURI                     string               `json:"vaultUri,omitempty"`
	EnabledForDeployment         *bool                `json:"enabledForDeployment,omitempty"`
	EnabledForDiskEncryption     *bool                `json:"enabledForDiskEncryption,omitempty"`
	EnabledForTemplateDeployment *bool                `json:"enabledForTemplateDeployment,omitempty"`
	EnableSoftDelete             *bool                `json:"enableSoftDelete,omitempty"`
	SoftDeleteRetentionInDays    *int                 `json:"softDeleteRetentionInDays,omitempty"`
	EnablePurgeProtection        *bool                `json:"enablePurgeProtection,omitempty"`
	EnableRbacAuthorization      *bool                `json:"enableRbacAuthorization,omitempty"`
	CreateMode                   string               `json:"createMode,omitempty"` // default, recover
	NetworkACLs                  *NetworkACLs         `json:"networkAcls,omitempty"`
	PublicNetworkAccess          string               `json:"publicNetworkAccess,omitempty"`
	ProvisioningState            string               `json:"provisioningState,omitempty"`
	HSMPoolResourceID            string               `json:"hsmPoolResourceId,omitempty"`
	PrivateEndpointConnections   json.RawMessage      `json:"privateEndpointConnections,omitempty"`
}

// SKU is a vault's SKU.
type SKU struct {
	Family string `json:"family,omitempty"` // "A"
	Name   string `json:"name"`             // "standard", "premium"
}

// NetworkACLs is a vault's firewall. The server has none: it accepts what lets everybody through.
type NetworkACLs struct {
	Bypass              string            `json:"bypass,omitempty"`
	DefaultAction       string            `json:"defaultAction,omitempty"`
	IPRules             []json.RawMessage `json:"ipRules,omitempty"`
	VirtualNetworkRules []json.RawMessage `json:"virtualNetworkRules,omitempty"`
}

// AccessPolicyEntry gives a principal permissions in a vault.
type AccessPolicyEntry struct {
	TenantID      string      `json:"tenantId"`
	ObjectID      string      `json:"objectId"`
	ApplicationID string      `json:"applicationId,omitempty"`
	Permissions   Permissions `json:"permissions"`
}

// Permissions are permissions by kind of object.
type Permissions struct {
	Keys         []string `json:"keys,omitempty"`
	Secrets      []string `json:"secrets,omitempty"`
	Certificates []string `json:"certificates,omitempty"`
	Storage      []string `json:"storage,omitempty"`
}

// AccessPolicies is the body and the answer of PUT vaults/N/accessPolicies/{add|replace|remove}.
type AccessPolicies struct {
	ID         string                   `json:"id,omitempty"`
	Name       string                   `json:"name,omitempty"`
	Type       string                   `json:"type,omitempty"`
	Location   string                   `json:"location,omitempty"`
	Properties AccessPoliciesProperties `json:"properties"`
}

// AccessPoliciesProperties holds the list.
type AccessPoliciesProperties struct {
	AccessPolicies []AccessPolicyEntry `json:"accessPolicies"`
}

// DeletedVault is a deleted vault.
type DeletedVault struct {
	ID         string                 `json:"id"`
	Name       string                 `json:"name"`
	Type       string                 `json:"type"`
	Properties DeletedVaultProperties `json:"properties"`
}

// DeletedVaultProperties are a deleted vault's properties.
type DeletedVaultProperties struct {
	VaultID                string            `json:"vaultId"`
	Location               string            `json:"location"`
	DeletionDate           time.Time         `json:"deletionDate"`
	ScheduledPurgeDate     time.Time         `json:"scheduledPurgeDate"`
	Tags                   map[string]string `json:"tags"`
	PurgeProtectionEnabled *bool             `json:"purgeProtectionEnabled,omitempty"`
}

// CheckName is the body of POST checkNameAvailability.
type CheckName struct {
	Name string `json:"name"`
	Type string `json:"type,omitempty"`
}

// NameAvailability is its answer.
type NameAvailability struct {
	NameAvailable bool   `json:"nameAvailable"`
	Reason        string `json:"reason,omitempty"` // AccountNameInvalid, AlreadyExists
	Message       string `json:"message,omitempty"`
}
