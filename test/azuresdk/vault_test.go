package azuresdk

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/keyvault/armkeyvault"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/resources/armresources"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azcertificates"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"keyfleet.dev/keyfleet/test/stack"
)

var pollFast = &runtime.PollUntilDoneOptions{Frequency: 100 * time.Millisecond}

func (a *azure) group(t *testing.T, ctx context.Context, name string) {
	t.Helper()
	groups := ok(armresources.NewResourceGroupsClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	ok(groups.CreateOrUpdate(ctx, name, armresources.ResourceGroup{Location: ptr("westus2")}, nil))(t, "create group")
}

// objectID finds the administrator's object id in its own token.
func (a *azure) objectID(t *testing.T, ctx context.Context) string {
	t.Helper()
	var me struct {
		ObjectID string `json:"oid"`
	}
	tok := ok(a.Client.Token(ctx, a.admin.Endpoints.ResourceManager))(t, "token").Reveal()
	decodeClaims(t, tok, &me)
	return me.ObjectID
}

func (a *azure) vault(t *testing.T, ctx context.Context, group, name string) {
	t.Helper()
	vaults := ok(armkeyvault.NewVaultsClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	poller := ok(vaults.BeginCreateOrUpdate(ctx, group, name, armkeyvault.VaultCreateOrUpdateParameters{
		Location: ptr("westus2"),
		Properties: &armkeyvault.VaultProperties{
			TenantID: ptr(a.admin.Tenant), SKU: &armkeyvault.SKU{Family: ptr(armkeyvault.SKUFamilyA), Name: ptr(armkeyvault.SKUNameStandard)},
			AccessPolicies: []*armkeyvault.AccessPolicyEntry{{
				TenantID: ptr(a.admin.Tenant), ObjectID: ptr(a.objectID(t, ctx)),
				Permissions: &armkeyvault.Permissions{
					Secrets:      []*armkeyvault.SecretPermissions{ptr(armkeyvault.SecretPermissionsAll)},
					Certificates: []*armkeyvault.CertificatePermissions{ptr(armkeyvault.CertificatePermissionsAll)},
				},
			}},
		},
	}, nil))(t, "create vault")
	v := ok(poller.PollUntilDone(ctx, pollFast))(t, "create vault")
	if got, want := strings.TrimRight(*v.Properties.VaultURI, "/"), a.vaultURL(name); got != want {
		t.Errorf("vault URI %s, want %s", got, want)
	}
}

func TestVaultRBACModeIsRefused(t *testing.T) {
	a, ctx := start(t), background(t)
	a.group(t, ctx, "rg")
	vaults := ok(armkeyvault.NewVaultsClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	_, err := vaults.BeginCreateOrUpdate(ctx, "rg", "vault1", armkeyvault.VaultCreateOrUpdateParameters{
		Location: ptr("westus2"),
		Properties: &armkeyvault.VaultProperties{
			TenantID: ptr(a.admin.Tenant), EnableRbacAuthorization: ptr(true),
			SKU: &armkeyvault.SKU{Family: ptr(armkeyvault.SKUFamilyA), Name: ptr(armkeyvault.SKUNameStandard)},
		},
	}, nil)
	if err == nil || !strings.Contains(err.Error(), "enableRbacAuthorization") {
		t.Errorf("got %v, want a 400 that names enableRbacAuthorization", err)
	}
}

func TestSecrets(t *testing.T) {
	a, ctx := start(t), background(t)
	a.group(t, ctx, "rg")
	a.vault(t, ctx, "rg", "vault1")
	secrets := ok(azsecrets.NewClient(a.vaultURL("vault1"), a.cred, &azsecrets.ClientOptions{ClientOptions: a.options}))(t, "client")

	set := ok(secrets.SetSecret(ctx, "db", azsecrets.SetSecretParameters{Value: ptr("s3cret"), ContentType: ptr("text/plain"), Tags: map[string]*string{"k": ptr("v")}}, nil))(t, "set")
	first := set.ID.Version()
	ok(secrets.SetSecret(ctx, "db", azsecrets.SetSecretParameters{Value: ptr("n3wer")}, nil))(t, "set again")
	if got := ok(secrets.GetSecret(ctx, "db", "", nil))(t, "get newest"); *got.Value != "n3wer" {
		t.Errorf("newest value %q", *got.Value)
	}
	if got := ok(secrets.GetSecret(ctx, "DB", first, nil))(t, "get first"); *got.Value != "s3cret" || *got.Tags["k"] != "v" {
		t.Errorf("first version: %+v", got.Secret)
	}
	versions := 0
	for p := secrets.NewListSecretPropertiesVersionsPager("db", nil); p.More(); {
		versions += len(ok(p.NextPage(ctx))(t, "versions").Value)
	}
	if versions != 2 {
		t.Errorf("%d versions, want 2", versions)
	}
	for i := range 30 { // more than a page of 25
		ok(secrets.SetSecret(ctx, "many-"+string(rune('a'+i%26))+string(rune('a'+i/26)), azsecrets.SetSecretParameters{Value: ptr("x")}, nil))(t, "set")
	}
	count := 0
	for p := secrets.NewListSecretPropertiesPager(nil); p.More(); {
		for _, item := range ok(p.NextPage(ctx))(t, "list").Value {
			count++
			if item.ID.Version() != "" {
				t.Errorf("a list item carries a version: %s", *item.ID)
			}
		}
	}
	if count != 31 {
		t.Errorf("%d secrets, want 31", count)
	}
	ok(secrets.UpdateSecretProperties(ctx, "db", first, azsecrets.UpdateSecretPropertiesParameters{SecretAttributes: &azsecrets.SecretAttributes{Enabled: ptr(false)}}, nil))(t, "disable")
	_, err := secrets.GetSecret(ctx, "db", first, nil)
	refused(t, "get of a disabled secret", err, 403, "Forbidden")
	_, err = secrets.GetSecret(ctx, "nothing", "", nil)
	refused(t, "get of no secret", err, 404, "SecretNotFound")

	ok(secrets.DeleteSecret(ctx, "db", nil))(t, "delete")
	_, err = secrets.SetSecret(ctx, "db", azsecrets.SetSecretParameters{Value: ptr("x")}, nil)
	refused(t, "set of a deleted name", err, 409, "Conflict")
	ok(secrets.RecoverDeletedSecret(ctx, "db", nil))(t, "recover")
	if got := ok(secrets.GetSecret(ctx, "db", "", nil))(t, "get recovered"); *got.Value != "n3wer" {
		t.Errorf("recovered value %q", *got.Value)
	}
	ok(secrets.DeleteSecret(ctx, "db", nil))(t, "delete")
	ok(secrets.PurgeDeletedSecret(ctx, "db", nil))(t, "purge")
	ok(secrets.SetSecret(ctx, "db", azsecrets.SetSecretParameters{Value: ptr("x")}, nil))(t, "set of a purged name")
}

func TestCertificates(t *testing.T) {
	a, ctx := start(t), background(t)
	a.group(t, ctx, "rg")
	a.vault(t, ctx, "rg", "vault1")
	certs := ok(azcertificates.NewClient(a.vaultURL("vault1"), a.cred, &azcertificates.ClientOptions{ClientOptions: a.options}))(t, "client")
	secrets := ok(azsecrets.NewClient(a.vaultURL("vault1"), a.cred, &azsecrets.ClientOptions{ClientOptions: a.options}))(t, "client")

	for _, c := range []struct {
		name, issuer, content string
		key                   azcertificates.KeyProperties
	}{
		{"rsa-pem", "Self", "application/x-pem-file", azcertificates.KeyProperties{KeyType: ptr(azcertificates.KeyTypeRSA), KeySize: ptr(int32(2048)), Exportable: ptr(true), ReuseKey: ptr(false)}},
		{"ec-pfx", "Keyfleet", "application/x-pkcs12", azcertificates.KeyProperties{KeyType: ptr(azcertificates.KeyTypeEC), Curve: ptr(azcertificates.CurveNameP256), Exportable: ptr(true)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			op := ok(certs.CreateCertificate(ctx, c.name, azcertificates.CreateCertificateParameters{
				Tags: map[string]*string{"owner": ptr("hpc")},
				CertificatePolicy: &azcertificates.CertificatePolicy{
					IssuerParameters: &azcertificates.IssuerParameters{Name: ptr(c.issuer)},
					KeyProperties:    &c.key,
					SecretProperties: &azcertificates.SecretProperties{ContentType: ptr(c.content)},
					X509CertificateProperties: &azcertificates.X509CertificateProperties{
						Subject: ptr("CN=web.example.org"), ValidityInMonths: ptr(int32(12)),
						SubjectAlternativeNames: &azcertificates.SubjectAlternativeNames{DNSNames: []*string{ptr("web.example.org")}},
					},
					LifetimeActions: []*azcertificates.LifetimeAction{{
						Trigger: &azcertificates.LifetimeActionTrigger{DaysBeforeExpiry: ptr(int32(30))},
						Action:  &azcertificates.LifetimeActionType{ActionType: ptr(azcertificates.CertificatePolicyActionAutoRenew)},
					}},
				},
			}, nil))(t, "create")
			if *op.Status == "failed" {
				t.Fatalf("operation: %+v", op.Error)
			}
			stack.Eventually(t, 2*time.Minute, "the operation completes", func(ctx context.Context) error {
				got, err := certs.GetCertificateOperation(ctx, c.name, nil)
				if err == nil && *got.Status != "completed" {
					err = errString("status " + *got.Status)
				}
				return err
			})
			first := ok(certs.GetCertificate(ctx, c.name, "", nil))(t, "get")
			leaf := ok(x509.ParseCertificate(first.CER))(t, "parse")
			if leaf.Subject.CommonName != "web.example.org" || !bytes.Equal(leaf.Raw, first.CER) {
				t.Errorf("certificate: %s", leaf.Subject)
			}
			secret := ok(secrets.GetSecret(ctx, c.name, first.ID.Version(), nil))(t, "get the secret of the version")
			if *secret.ContentType != c.content || secret.Managed == nil || !*secret.Managed {
				t.Errorf("secret: %+v", secret.Secret)
			}
			if c.content == "application/x-pem-file" {
				if _, err := tls.X509KeyPair([]byte(*secret.Value), []byte(*secret.Value)); err != nil {
					t.Errorf("the PEM is no key pair: %v", err)
				}
			} else if raw, err := base64.StdEncoding.DecodeString(*secret.Value); err != nil || len(raw) < 500 {
				t.Errorf("the PFX is not base64: %v", err)
			}

			if err := a.Client.Call(ctx, renewRequest(a, "vault1", c.name), nil); err != nil {
				t.Fatalf("renew: %v", err)
			}
			stack.Eventually(t, 2*time.Minute, "a second version", func(ctx context.Context) error {
				got, err := certs.GetCertificate(ctx, c.name, "", nil)
				switch {
				case err != nil:
					return err
				case got.ID.Version() == first.ID.Version():
					return errString("still the first version")
				case got.Tags["owner"] == nil || *got.Tags["owner"] != "hpc":
					t.Errorf("tags are not carried over: %v", got.Tags)
				}
				return nil
			})
			policy := ok(certs.GetCertificatePolicy(ctx, c.name, nil))(t, "policy")
			if *policy.LifetimeActions[0].Trigger.DaysBeforeExpiry != 30 {
				t.Errorf("policy: %+v", policy)
			}
			policy.LifetimeActions[0].Trigger.DaysBeforeExpiry = ptr(int32(10))
			ok(certs.UpdateCertificatePolicy(ctx, c.name, policy.CertificatePolicy, nil))(t, "update policy")
			ok(certs.UpdateCertificate(ctx, c.name, first.ID.Version(), azcertificates.UpdateCertificateParameters{Tags: map[string]*string{"a": ptr("b")}}, nil))(t, "update")
			ok(certs.DeleteCertificate(ctx, c.name, nil))(t, "delete")
			_, err := certs.GetCertificate(ctx, c.name, "", nil)
			refused(t, "get of a deleted certificate", err, 404, "CertificateNotFound")
			ok(certs.RecoverDeletedCertificate(ctx, c.name, nil))(t, "recover")
			ok(certs.GetCertificate(ctx, c.name, "", nil))(t, "get recovered")
			ok(certs.DeleteCertificate(ctx, c.name, nil))(t, "delete")
			ok(certs.PurgeDeletedCertificate(ctx, c.name, nil))(t, "purge")
		})
	}
	for p := certs.NewListCertificatePropertiesPager(nil); p.More(); {
		if got := ok(p.NextPage(ctx))(t, "list").Value; len(got) != 0 {
			t.Errorf("purged certificates are listed: %d", len(got))
		}
	}
}

type errString string

func (e errString) Error() string { return string(e) }
