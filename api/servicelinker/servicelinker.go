// Package servicelinker holds the wire types of Microsoft.ServiceLinker. It is a
// leaf: plain structs with Azure's names.
package servicelinker

// ConfigurationNames is one combination of target, authentication and client, with
// the names that a workload gets.
type ConfigurationNames struct {
	Properties ConfigurationNamesProperties `json:"properties"`
}

// ConfigurationNamesProperties are the combination and its names.
type ConfigurationNamesProperties struct {
	TargetService string              `json:"targetService"` // resource type, "Microsoft.KeyVault/vaults"
	AuthType      string              `json:"authType"`      // "userAssignedIdentity"
	ClientType    string              `json:"clientType"`    // "python"
	Names         []ConfigurationName `json:"names"`
}

// ConfigurationName is one name.
type ConfigurationName struct {
	Value       string `json:"value"`
	Description string `json:"description,omitempty"`
	Required    bool   `json:"required"`
}
