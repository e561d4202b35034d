package azuresdk

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/resourcemanager/batch/armbatch/v2"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"

	"keyfleet.dev/keyfleet/client"
)

// TestManagedIdentityOnANode: azidentity inside a real node gets tokens from
// the node's own metadata endpoint and azsecrets reads the vault with them.
func TestManagedIdentityOnANode(t *testing.T) {
	probe := filepath.Join(t.TempDir(), "imdsprobe")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", probe, "./imdsprobe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the probe: %v\n%s", err, out)
	}
	a, ctx := start(t), background(t)
	a.group(t, ctx, "rg")
	a.vault(t, ctx, "rg", "vault1")
	reader := a.identityFor(t, ctx, "rg", "reader", "vault1")
	a.vault(t, ctx, "rg", "unused")
	stranger := a.identityFor(t, ctx, "rg", "stranger", "unused") // may read another vault only
	a.ownCertificate(t, ctx, "vault1", "web")
	secrets := ok(azsecrets.NewClient(a.vaultURL("vault1"), a.cred, &azsecrets.ClientOptions{ClientOptions: a.options}))(t, "client")
	ok(secrets.SetSecret(ctx, "db", azsecrets.SetSecretParameters{Value: ptr("s3cret")}, nil))(t, "set")

	a.account(t, ctx, a.arm(), "rg", "acct1")
	pools := ok(armbatch.NewPoolClient(a.admin.Subscription, a.cred, a.arm()))(t, "client")
	observed := []string{a.vaultURL("vault1") + "/secrets/web"}
	ok(pools.Create(ctx, "rg", "acct1", "one", keyVaultPool(1, observed, reader), nil))(t, "create pool")
	two := ok(pools.Create(ctx, "rg", "acct1", "two", keyVaultPool(1, observed, reader, stranger), nil))(t, "create pool")
	one := ok(pools.Get(ctx, "rg", "acct1", "one", nil))(t, "get pool")
	onOne := a.onNode(t, probe, *one.ID, a.idleNodes(t, "acct1", "one", 1)[0])
	onTwo := a.onNode(t, probe, *two.ID, a.idleNodes(t, "acct1", "two", 1)[0])

	url := a.vaultURL("vault1")
	for _, c := range []struct {
		name string
		run  func(ctx context.Context, args ...string) (string, int)
		who  []string
		want string // output, or a fragment of the refusal
		exit int
	}{
		{"by client id", onOne, []string{*reader.Properties.ClientID}, "s3cret", 0},
		{"the only identity, unnamed", onOne, nil, "s3cret", 0},
		{"DefaultAzureCredential", onOne, []string{"default"}, "s3cret", 0},
		{"one of two, by client id", onTwo, []string{*reader.Properties.ClientID}, "s3cret", 0},
		{"the other of two has no access", onTwo, []string{*stranger.Properties.ClientID}, "does not have secrets get permission", 1},
		{"an identity that is not on the pool", onOne, []string{*stranger.Properties.ClientID}, "Identity not found", 1},
		{"unnamed, but there are two", onTwo, nil, "Multiple user assigned identities exist", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, exit := c.run(ctx, append([]string{url, "db"}, c.who...)...)
			if exit != c.exit || !strings.Contains(out, c.want) {
				t.Errorf("exit %d, want %d with %q:\n%s", exit, c.exit, c.want, out)
			}
		})
	}
}

// onNode copies the probe onto the node and returns what runs it there.
func (a *azure) onNode(t *testing.T, probe, poolID, node string) func(ctx context.Context, args ...string) (string, int) {
	t.Helper()
	text, err := os.ReadFile(probe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(a.Dir, "nodes", node, "waagent", "imdsprobe"), text, 0o755); err != nil {
		t.Fatal(err)
	}
	return func(ctx context.Context, args ...string) (string, int) {
		ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
		defer cancel()
		var out bytes.Buffer
		line := append([]string{"/usr/bin/env", "SSL_CERT_FILE=/var/lib/waagent/keyfleet-ca.pem", "/var/lib/waagent/imdsprobe"}, args...)
		exit, err := a.Client.Shell(ctx, poolID, node, client.Terminal{Command: line, Out: &out, Err: &out})
		if err != nil {
			t.Fatalf("shell: %v", err)
		}
		return out.String(), exit
	}
}
