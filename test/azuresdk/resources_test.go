package azuresdk

import (
	"strings"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/msi/armmsi"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/resources/armresources"
)

func TestResourceGroupsAndIdentities(t *testing.T) {
	a, ctx := start(t), background(t)

	groups := ok(armresources.NewResourceGroupsClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	g := ok(groups.CreateOrUpdate(ctx, "Rg-One", armresources.ResourceGroup{Location: ptr("westus2"), Tags: map[string]*string{"team": ptr("hpc")}}, nil))(t, "create group")
	if *g.Name != "Rg-One" || *g.Properties.ProvisioningState != "Succeeded" || *g.Tags["team"] != "hpc" {
		t.Errorf("group: %+v", g.ResourceGroup)
	}
	if !ok(groups.CheckExistence(ctx, "rg-one", nil))(t, "exists").Success {
		t.Error("HEAD in another casing does not find the group")
	}
	if ok(groups.CheckExistence(ctx, "rg-two", nil))(t, "exists not").Success {
		t.Error("HEAD finds a group that is not there")
	}
	_, err := groups.Get(ctx, "rg-two", nil)
	refused(t, "get of no group", err, 404, "ResourceGroupNotFound")

	providers := ok(armresources.NewProvidersClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	ok(providers.Register(ctx, "Microsoft.Batch", nil))(t, "register")
	p := ok(providers.Get(ctx, "Microsoft.Batch", nil))(t, "get provider")
	if *p.RegistrationState != "Registered" {
		t.Errorf("registration state %s", *p.RegistrationState)
	}

	ids := ok(armmsi.NewUserAssignedIdentitiesClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	id := ok(ids.CreateOrUpdate(ctx, "Rg-One", "Id1", armmsi.Identity{Location: ptr("westus2")}, nil))(t, "create identity")
	if len(*id.Properties.ClientID) != 36 || len(*id.Properties.PrincipalID) != 36 || *id.Properties.TenantID != a.admin.Tenant {
		t.Errorf("identity: %+v", *id.Properties)
	}
	if !strings.HasSuffix(*id.ID, "/resourceGroups/Rg-One/providers/Microsoft.ManagedIdentity/userAssignedIdentities/Id1") {
		t.Errorf("the id does not keep the caller's casing: %s", *id.ID)
	}
	again := ok(ids.CreateOrUpdate(ctx, "rg-one", "id1", armmsi.Identity{Location: ptr("westus2")}, nil))(t, "create it again")
	if *again.Properties.ClientID != *id.Properties.ClientID {
		t.Error("a second PUT made another client id")
	}
	ok(ids.Delete(ctx, "rg-one", "id1", nil))(t, "delete")
	_, err = ids.Get(ctx, "Rg-One", "Id1", nil)
	refused(t, "get of a deleted identity", err, 404, "ResourceNotFound")

	poller := ok(groups.BeginDelete(ctx, "Rg-One", nil))(t, "delete group")
	ok(poller.PollUntilDone(ctx, pollFast))(t, "delete group")
	if ok(groups.CheckExistence(ctx, "Rg-One", nil))(t, "exists").Success {
		t.Error("the deleted group is still there")
	}
}

func TestWrongSecretIsRefused(t *testing.T) {
	a, ctx := start(t), background(t)
	cred := ok(azidentity.NewClientSecretCredential(a.admin.Tenant, a.admin.ClientID, "wrong",
		&azidentity.ClientSecretCredentialOptions{ClientOptions: a.options, DisableInstanceDiscovery: true}))(t, "credential")
	_, err := cred.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{a.admin.Endpoints.ResourceManager + "/.default"}})
	if err == nil || !strings.Contains(err.Error(), "AADSTS7000215") {
		t.Errorf("got %v", err)
	}
}
