package azuresdk

import (
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/msi/armmsi"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"keyfleet.dev/keyfleet/internal/issuer/issuertest"
	"keyfleet.dev/keyfleet/test/stack"
)

const audience = "api://AzureADTokenExchange"

// TestWorkloadIdentity: azidentity's WorkloadIdentityCredential reads the token of
// a service account from a file, gets a token of the managed identity that trusts
// it, and azsecrets reads the vault with that.
func TestWorkloadIdentity(t *testing.T) {
	cluster := issuertest.New(t, issuertest.RSA(t, "k1"))
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cluster.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	a, ctx := startAs(t, stack.Config{Env: []string{"SSL_CERT_FILE=" + roots}}), background(t)
	a.group(t, ctx, "rg")
	a.vault(t, ctx, "rg", "vault1")
	shop := a.identityFor(t, ctx, "rg", "shop", "vault1")
	secrets := ok(azsecrets.NewClient(a.vaultURL("vault1"), a.cred, &azsecrets.ClientOptions{ClientOptions: a.options}))(t, "client")
	ok(secrets.SetSecret(ctx, "db", azsecrets.SetSecretParameters{Value: ptr("s3cret")}, nil))(t, "set")

	credentials := ok(armmsi.NewFederatedIdentityCredentialsClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	web := ok(credentials.CreateOrUpdate(ctx, "rg", "shop", "web", armmsi.FederatedIdentityCredential{Properties: &armmsi.FederatedIdentityCredentialProperties{
		Issuer: ptr(cluster.URL), Subject: ptr("system:serviceaccount:shop:web"), Audiences: []*string{ptr(audience)},
	}}, nil))(t, "create the federated credential")
	if again := ok(credentials.Get(ctx, "rg", "shop", "web", nil))(t, "get it"); *again.ID != *web.ID || *again.Properties.Subject != "system:serviceaccount:shop:web" {
		t.Errorf("it came back as %+v", again)
	}

	file := filepath.Join(t.TempDir(), "token")
	login := func(subject string) azcore.TokenCredential {
		t.Helper()
		claims, err := json.Marshal(map[string]any{"iss": cluster.URL, "sub": subject, "aud": []string{audience}, "exp": time.Now().Add(time.Hour).Unix()})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(issuertest.Sign(t, cluster.Keys[0], string(claims))), 0o600); err != nil {
			t.Fatal(err)
		}
		return ok(azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: a.options, DisableInstanceDiscovery: true, TenantID: a.admin.Tenant, ClientID: *shop.Properties.ClientID, TokenFilePath: file,
		}))(t, "credential")
	}
	read := func(subject string) (string, error) {
		t.Helper()
		c := ok(azsecrets.NewClient(a.vaultURL("vault1"), login(subject), &azsecrets.ClientOptions{ClientOptions: a.options}))(t, "client")
		s, err := c.GetSecret(ctx, "db", "", nil)
		if err != nil {
			return "", err
		}
		return *s.Value, nil
	}
	if got, err := read("system:serviceaccount:shop:web"); err != nil || got != "s3cret" {
		t.Errorf("the service account that is trusted: %q, %v", got, err)
	}
	if _, err := read("system:serviceaccount:shop:db"); err == nil || !strings.Contains(err.Error(), "AADSTS700213") || !strings.Contains(err.Error(), "system:serviceaccount:shop:web") {
		t.Errorf("another service account: %v, want one that says which subject is expected", err)
	}
	ok(credentials.Delete(ctx, "rg", "shop", "web", nil))(t, "delete the federated credential")
	if _, err := read("system:serviceaccount:shop:web"); err == nil || !strings.Contains(err.Error(), "AADSTS70025") {
		t.Errorf("after its federated credential was deleted: %v", err)
	}
}
