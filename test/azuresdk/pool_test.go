package azuresdk

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/arm"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/batch/armbatch/v2"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/keyvault/armkeyvault"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/msi/armmsi"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azcertificates"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

// identityFor makes a managed identity that may get the secrets of the vault.
func (a *azure) identityFor(t *testing.T, ctx context.Context, group, name, vault string) armmsi.Identity {
	t.Helper()
	ids := ok(armmsi.NewUserAssignedIdentitiesClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	id := ok(ids.CreateOrUpdate(ctx, group, name, armmsi.Identity{Location: ptr("westus2")}, nil))(t, "create identity").Identity
	vaults := ok(armkeyvault.NewVaultsClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	ok(vaults.UpdateAccessPolicy(ctx, group, vault, armkeyvault.AccessPolicyUpdateKindAdd, armkeyvault.VaultAccessPolicyParameters{
		Properties: &armkeyvault.VaultAccessPolicyProperties{AccessPolicies: []*armkeyvault.AccessPolicyEntry{{
			TenantID: ptr(a.admin.Tenant), ObjectID: id.Properties.PrincipalID,
			Permissions: &armkeyvault.Permissions{Secrets: []*armkeyvault.SecretPermissions{ptr(armkeyvault.SecretPermissionsGet)}},
		}}},
	}, nil))(t, "add access policy")
	return id
}

// ownCertificate makes a certificate of the built-in issuer and waits for it.
func (a *azure) ownCertificate(t *testing.T, ctx context.Context, vault, name string) {
	t.Helper()
	certs := ok(azcertificates.NewClient(a.vaultURL(vault), a.cred, &azcertificates.ClientOptions{ClientOptions: a.options}))(t, "client")
	ok(certs.CreateCertificate(ctx, name, azcertificates.CreateCertificateParameters{CertificatePolicy: &azcertificates.CertificatePolicy{
		IssuerParameters:          &azcertificates.IssuerParameters{Name: ptr("Keyfleet")},
		KeyProperties:             &azcertificates.KeyProperties{KeyType: ptr(azcertificates.KeyTypeEC), Curve: ptr(azcertificates.CurveNameP256), Exportable: ptr(true)},
		SecretProperties:          &azcertificates.SecretProperties{ContentType: ptr("application/x-pem-file")},
		X509CertificateProperties: &azcertificates.X509CertificateProperties{Subject: ptr("CN=web.example.org"), ValidityInMonths: ptr(int32(12))},
	}}, nil))(t, "create certificate")
	stack.Eventually(t, 2*time.Minute, "the certificate is issued", func(ctx context.Context) error {
		got, err := certs.GetCertificateOperation(ctx, name, nil)
		if err == nil && *got.Status != "completed" {
			err = errString("status " + *got.Status)
		}
		return err
	})
}

// keyVaultPool is a pool whose nodes observe the secrets as the first of the identities.
func keyVaultPool(nodes int32, observed []string, identities ...armmsi.Identity) armbatch.Pool {
	assigned := map[string]*armbatch.UserAssignedIdentities{}
	for _, id := range identities {
		assigned[*id.ID] = &armbatch.UserAssignedIdentities{}
	}
	return armbatch.Pool{
		Identity: &armbatch.PoolIdentity{Type: ptr(armbatch.PoolIdentityTypeUserAssigned), UserAssignedIdentities: assigned},
		Properties: &armbatch.PoolProperties{
			VMSize: ptr("STANDARD_DS2_V2"),
			DeploymentConfiguration: &armbatch.DeploymentConfiguration{VirtualMachineConfiguration: &armbatch.VirtualMachineConfiguration{
				ImageReference: &armbatch.ImageReference{Publisher: ptr("canonical"), Offer: ptr("ubuntuserver"), SKU: ptr("20.04-lts"), Version: ptr("latest")},
				NodeAgentSKUID: ptr("batch.node.ubuntu 20.04"),
				Extensions: []*armbatch.VMExtension{{
					Name: ptr("kv"), Publisher: ptr("Microsoft.Azure.KeyVault"), Type: ptr("KeyVaultForLinux"), TypeHandlerVersion: ptr("3.0"), AutoUpgradeMinorVersion: ptr(true),
					Settings: map[string]any{
						"secretsManagementSettings": map[string]any{
							"pollingIntervalInS": "300", "requireInitialSync": true, "observedCertificates": observed,
							"certificateStoreLocation": "/var/lib/waagent/Microsoft.Azure.KeyVault",
						},
						"authenticationSettings": map[string]any{"msiEndpoint": "http://169.254.169.254/metadata/identity", "msiClientId": *identities[0].Properties.ClientID},
					},
				}},
			}},
			ScaleSettings: scale(nodes),
		},
	}
}

func scale(nodes int32) *armbatch.ScaleSettings {
	return &armbatch.ScaleSettings{FixedScale: &armbatch.FixedScaleSettings{TargetDedicatedNodes: ptr(nodes), ResizeTimeout: ptr("PT15M")}}
}

func (a *azure) account(t *testing.T, ctx context.Context, options *arm.ClientOptions, group, name string) armbatch.Account {
	t.Helper()
	accounts := ok(armbatch.NewAccountClient(a.admin.Subscription, a.cred, options))(t, "client")
	poller := ok(accounts.BeginCreate(ctx, group, name, armbatch.AccountCreateParameters{Location: ptr("westus2"), Tags: map[string]*string{"team": ptr("hpc")}}, nil))(t, "create account")
	return ok(poller.PollUntilDone(ctx, pollFast))(t, "create account").Account
}

// idleNodes waits until the pool has n nodes and all are idle, and returns their ids.
func (a *azure) idleNodes(t *testing.T, account, pool string, n int) []string {
	t.Helper()
	var ids []string
	url := a.Client.Batch(account+".westus2."+a.admin.Endpoints.BatchSuffix, "/pools/"+pool+"/nodes")
	stack.Eventually(t, 2*time.Minute, fmt.Sprintf("%d idle nodes", n), func(ctx context.Context) error {
		var list struct{ Value []struct{ ID, State string } }
		if err := a.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: url, Version: "2021-06-01.14.0"}, &list); err != nil {
			return err
		}
		ids = nil
		for _, x := range list.Value {
			if x.State == "idle" {
				ids = append(ids, x.ID)
			}
		}
		if len(ids) != n || len(list.Value) != n {
			return fmt.Errorf("nodes: %+v", list.Value)
		}
		return nil
	})
	return ids
}

// TestPools: the SDK with the api-version of the documented requests, and with its own.
func TestPools(t *testing.T) {
	for name, version := range map[string]string{"2021-01-01": "2021-01-01", "its own version": ""} {
		t.Run(name, func(t *testing.T) {
			a, ctx := start(t), background(t)
			options := a.armVersion(version)
			a.group(t, ctx, "rg")
			a.vault(t, ctx, "rg", "vault1")
			id := a.identityFor(t, ctx, "rg", "nodes", "vault1")
			a.ownCertificate(t, ctx, "vault1", "web")
			testAccount(t, ctx, a, options)

			pools := ok(armbatch.NewPoolClient(a.admin.Subscription, a.cred, options))(t, "client")
			body := keyVaultPool(1, []string{a.vaultURL("vault1") + "/secrets/web"}, id)
			created := ok(pools.Create(ctx, "rg", "acct1", "p1", body, nil))(t, "create pool")
			if *created.Name != "p1" || *created.Properties.ProvisioningState != armbatch.PoolProvisioningStateSucceeded || created.Etag == nil {
				t.Errorf("created: %+v", created.Pool)
			}
			a.idleNodes(t, "acct1", "p1", 1)
			testPoolReads(t, ctx, pools, id)
			testPoolWrites(t, ctx, pools, body)
			testStopResize(t, ctx, pools, body)

			ok(pools.Update(ctx, "rg", "acct1", "p1", armbatch.Pool{Properties: &armbatch.PoolProperties{ScaleSettings: scale(2)}}, nil))(t, "resize")
			a.idleNodes(t, "acct1", "p1", 2)
			poller := ok(pools.BeginDelete(ctx, "rg", "acct1", "p1", nil))(t, "delete")
			ok(poller.PollUntilDone(ctx, pollFast))(t, "delete")
			_, err := pools.Get(ctx, "rg", "acct1", "p1", nil)
			if err == nil || !strings.Contains(err.Error(), "404") {
				t.Errorf("get of a deleted pool: %v", err)
			}
		})
	}
}

func testAccount(t *testing.T, ctx context.Context, a *azure, options *arm.ClientOptions) {
	t.Helper()
	acct := a.account(t, ctx, options, "rg", "acct1")
	if *acct.Properties.ProvisioningState != armbatch.ProvisioningStateSucceeded || !strings.HasPrefix(*acct.Properties.AccountEndpoint, "acct1.westus2.") || *acct.Tags["team"] != "hpc" {
		t.Errorf("account: %+v", *acct.Properties)
	}
	accounts := ok(armbatch.NewAccountClient(a.admin.Subscription, a.cred, options))(t, "client")
	if got := ok(accounts.Get(ctx, "RG", "ACCT1", nil))(t, "get account"); *got.ID != *acct.ID {
		t.Errorf("account id %s, was %s", *got.ID, *acct.ID)
	}
	n := 0
	for p := accounts.NewListByResourceGroupPager("rg", nil); p.More(); {
		n += len(ok(p.NextPage(ctx))(t, "list accounts of the group").Value)
	}
	for p := accounts.NewListPager(nil); p.More(); {
		n += len(ok(p.NextPage(ctx))(t, "list accounts").Value)
	}
	if n != 2 {
		t.Errorf("two lists show %d accounts, want one each", n)
	}
}

func testPoolReads(t *testing.T, ctx context.Context, pools *armbatch.PoolClient, id armmsi.Identity) {
	t.Helper()
	got := ok(pools.Get(ctx, "rg", "acct1", "p1", nil))(t, "get pool")
	p := got.Properties
	if *p.AllocationState != armbatch.AllocationStateSteady || *p.CurrentDedicatedNodes != 1 || p.CreationTime == nil || p.CreationTime.IsZero() {
		t.Errorf("pool: state %s, %d nodes, created %v", *p.AllocationState, *p.CurrentDedicatedNodes, p.CreationTime)
	}
	ext := p.DeploymentConfiguration.VirtualMachineConfiguration.Extensions[0]
	if *ext.Name != "kv" || ext.ProtectedSettings != nil {
		t.Errorf("extension: %+v", ext)
	}
	if text, _ := json.Marshal(ext.Settings); !strings.Contains(string(text), *id.Properties.ClientID) {
		t.Errorf("settings: %s", text)
	}
	if u := got.Identity.UserAssignedIdentities[*id.ID]; u == nil || *u.ClientID != *id.Properties.ClientID {
		t.Errorf("identities: %v", got.Identity.UserAssignedIdentities)
	}
	n := 0
	for pager := pools.NewListByBatchAccountPager("rg", "acct1", nil); pager.More(); {
		n += len(ok(pager.NextPage(ctx))(t, "list pools").Value)
	}
	if n != 1 {
		t.Errorf("%d pools are listed", n)
	}
}

func testPoolWrites(t *testing.T, ctx context.Context, pools *armbatch.PoolClient, body armbatch.Pool) {
	t.Helper()
	before := ok(pools.Get(ctx, "rg", "acct1", "p1", nil))(t, "get pool")
	again := ok(pools.Create(ctx, "rg", "acct1", "p1", body, nil))(t, "the same PUT again")
	if *again.Etag != *before.Etag {
		t.Errorf("the same PUT changed the etag from %s to %s", *before.Etag, *again.Etag)
	}
	same := ok(pools.Update(ctx, "rg", "acct1", "p1", armbatch.Pool{Properties: &armbatch.PoolProperties{
		DeploymentConfiguration: before.Properties.DeploymentConfiguration, Metadata: []*armbatch.MetadataItem{{Name: ptr("k"), Value: ptr("v")}},
	}}, &armbatch.PoolClientUpdateOptions{IfMatch: before.Etag}))(t, "PATCH with the deploymentConfiguration as it was read")
	if len(same.Properties.Metadata) != 1 || *same.Etag == *before.Etag {
		t.Errorf("after the PATCH: %+v", same.Properties.Metadata)
	}
	_, err := pools.Update(ctx, "rg", "acct1", "p1", armbatch.Pool{Properties: &armbatch.PoolProperties{ScaleSettings: scale(1)}}, &armbatch.PoolClientUpdateOptions{IfMatch: before.Etag})
	refused(t, "PATCH with an old etag", err, http.StatusPreconditionFailed, "ConditionNotMet")

	vm := *before.Properties.DeploymentConfiguration.VirtualMachineConfiguration
	ext := *vm.Extensions[0]
	settings := maps.Clone(ext.Settings.(map[string]any))
	management := maps.Clone(settings["secretsManagementSettings"].(map[string]any))
	management["pollingIntervalInS"] = "600"
	settings["secretsManagementSettings"], ext.Settings = management, settings
	vm.Extensions = []*armbatch.VMExtension{&ext}
	changed := armbatch.Pool{Identity: body.Identity, Properties: &armbatch.PoolProperties{
		VMSize: body.Properties.VMSize, ScaleSettings: scale(1), DeploymentConfiguration: &armbatch.DeploymentConfiguration{VirtualMachineConfiguration: &vm},
	}}
	for what, err := range map[string]error{
		"PUT":   second(pools.Create(ctx, "rg", "acct1", "p1", changed, nil)),
		"PATCH": second(pools.Update(ctx, "rg", "acct1", "p1", armbatch.Pool{Properties: &armbatch.PoolProperties{DeploymentConfiguration: changed.Properties.DeploymentConfiguration}}, nil)),
	} {
		refused(t, what+" of a changed extension", err, http.StatusBadRequest, "PropertyCannotBeUpdated")
		if err != nil && !strings.Contains(strings.ToLower(err.Error()), "pollingintervalins") {
			t.Errorf("%s: the refusal does not name the field: %v", what, err)
		}
	}
	_, err = pools.StopResize(ctx, "rg", "acct1", "p1", nil)
	refused(t, "stopResize of a steady pool", err, http.StatusConflict, "OperationInvalidForCurrentState")
}

// testStopResize stops a resize that cannot end by itself: no machine has joined for the pool.
func testStopResize(t *testing.T, ctx context.Context, pools *armbatch.PoolClient, body armbatch.Pool) {
	t.Helper()
	properties := *body.Properties
	properties.Metadata = []*armbatch.MetadataItem{{Name: ptr("keyfleet-provider"), Value: ptr("host")}}
	created := ok(pools.Create(ctx, "rg", "acct1", "waiting", armbatch.Pool{Identity: body.Identity, Properties: &properties}, nil))(t, "create pool")
	if *created.Properties.AllocationState != armbatch.AllocationStateResizing {
		t.Errorf("a new pool is %s", *created.Properties.AllocationState)
	}
	ok(pools.StopResize(ctx, "rg", "acct1", "waiting", nil))(t, "stopResize")
	stack.Eventually(t, 2*time.Minute, "the resize is stopped", func(ctx context.Context) error {
		got, err := pools.Get(ctx, "rg", "acct1", "waiting", nil)
		if err == nil && *got.Properties.AllocationState != armbatch.AllocationStateSteady {
			err = errString("the pool is " + string(*got.Properties.AllocationState))
		}
		if err == nil && (got.Properties.ResizeOperationStatus == nil || len(got.Properties.ResizeOperationStatus.Errors) == 0) {
			err = errString("no resize error says that it was stopped")
		}
		return err
	})
	poller := ok(pools.BeginDelete(ctx, "rg", "acct1", "waiting", nil))(t, "delete")
	ok(poller.PollUntilDone(ctx, pollFast))(t, "delete")
}

func second[T any](_ T, err error) error { return err }
