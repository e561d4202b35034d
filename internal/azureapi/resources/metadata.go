package resources

import (
	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/azureapi"
)

// metadata answers /metadata/endpoints, by which clients find a private cloud.
// Its shape depends on the api-version:
//
//	before 2019-05-01   an object of the old form (az cloud register)
//	before 2022-09-01   an array of clouds (az with ARM_CLOUD_METADATA_URL)
//	later, or without   one cloud (Azure PowerShell, Terraform)
//
// Services that Keyfleet does not have get names under its domain, which
// nobody answers: clients insist that they are there.
func (s surface) metadata(r *azureapi.Request) (*azureapi.Reply, error) {
	e := r.Endpoints()
	auth := arm.CloudAuthentication{LoginEndpoint: e.Login(), Audiences: []string{e.ARM()}, Tenant: "common", IdentityProvider: "AAD"}
	other := func(service string) string { return "https://" + service + "." + e.Domain + e.Port + "/" }
	version := r.Query("api-version")
	if version != "" && version < "2019-05-01" {
		auth.Tenant, auth.IdentityProvider = "", ""
		return azureapi.OK(arm.CloudMetadata2015{
			GalleryEndpoint: other("gallery"), GraphEndpoint: other("graph"), PortalEndpoint: other("portal"), Authentication: auth,
		}), nil
	}
	cloud := arm.CloudMetadata{
		Name: "Keyfleet", Portal: other("portal"), Authentication: auth, ResourceManager: e.ARM(), Batch: "https://" + e.BatchSuffix() + "/",
		Gallery: other("gallery"), Graph: other("graph"), GraphAudience: other("graph"), MicrosoftGraphResourceID: other("graph"),
		Media: other("media"), SQLManagement: other("sql"), VMImageAliasDoc: other("images"),
		Suffixes: arm.CloudSuffixes{
			Storage: "core." + e.Domain, KeyVaultDNS: e.VaultSuffix(), SQLServerHostname: "database." + e.Domain, ACRLoginServer: "registry." + e.Domain,
		},
	}
	if version != "" && version < "2022-09-01" {
		return azureapi.OK([]arm.CloudMetadata{cloud}), nil
	}
	return azureapi.OK(cloud), nil
}
