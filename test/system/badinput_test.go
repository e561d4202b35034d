package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

// object is a JSON object of a request.
type object = map[string]any

// fleet is a server with one group, one identity, one vault that the identity
// may read, and one Batch account: what pools are made of.
type fleet struct {
	*system
	group, identityID, clientID string
}

const accountName = "acct1"

func startFleet(t *testing.T, cfg stack.Config) *fleet {
	t.Helper()
	f := &fleet{system: start(t, cfg)}
	f.group = f.system.group("rg")
	var objectID string
	f.identityID, f.clientID, objectID = f.identity(f.group, "nodes")
	f.vault(f.group, "vault1", objectID)
	f.account(f.group+"/providers/Microsoft.Batch/batchAccounts/"+accountName, "westus2")
	return f
}

func (f *fleet) poolPath(name string) string {
	return f.group + "/providers/Microsoft.Batch/batchAccounts/" + accountName + "/pools/" + name
}

// extension is a Key Vault extension that observes the secrets.
func (f *fleet) extension(urls ...string) object {
	return object{
		"name": "kv", "publisher": "Microsoft.Azure.KeyVault", "type": "KeyVaultForLinux", "typeHandlerVersion": "3.0", "autoUpgradeMinorVersion": true,
		"settings": object{
			"secretsManagementSettings": object{
				"pollingIntervalInS": "300", "requireInitialSync": true,
				"certificateStoreLocation": "/var/lib/waagent/Microsoft.Azure.KeyVault", "observedCertificates": urls,
			},
			"authenticationSettings": object{"msiEndpoint": "http://169.254.169.254/metadata/identity", "msiClientId": f.clientID},
		},
	}
}

// poolBody is a pool of n Linux nodes with the pool's identity and the extensions.
func (f *fleet) poolBody(n int, extensions ...object) object {
	return object{
		"identity": object{"type": "UserAssigned", "userAssignedIdentities": object{f.identityID: object{}}},
		"properties": object{
			"vmSize": "STANDARD_DS2_V2",
			"deploymentConfiguration": object{"virtualMachineConfiguration": object{
				"imageReference": object{"publisher": "canonical", "offer": "ubuntuserver", "sku": "20.04-lts", "version": "latest"},
				"nodeAgentSkuId": "batch.node.ubuntu 20.04", "extensions": extensions,
			}},
			"scaleSettings": object{"fixedScale": object{"targetDedicatedNodes": n, "resizeTimeout": "PT15M"}},
		},
	}
}

func (f *fleet) resize(name string, n int) {
	f.T.Helper()
	f.call(http.MethodPatch, f.Client.ARM(f.poolPath(name)), "2021-01-01",
		object{"properties": object{"scaleSettings": object{"fixedScale": object{"targetDedicatedNodes": n}}}}, nil)
}

// sub walks down nested objects.
func sub(o object, names ...string) object {
	for _, n := range names {
		o = o[n].(object)
	}
	return o
}

// program runs one of the programs and returns its output and exit code.
func (s *system) program(name string, args ...string) (stdout, stderr string, exit int) {
	s.T.Helper()
	var out, errs strings.Builder
	cmd := exec.CommandContext(s.ctx, filepath.Join(s.Bin, name), args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		s.T.Fatalf("running %s: %v", name, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// TestStaticFaultsAreRefused: what is wrong in itself is 400 with the path of
// the field, the reason and the fix, and nothing of the pool comes to be.
func TestStaticFaultsAreRefused(t *testing.T) {
	t.Parallel()
	f := startFleet(t, stack.Config{})
	_, otherClient, _ := f.identity(f.group, "other")
	url := f.Client.Vault("vault1", "/secrets/web")
	const ext0 = "properties.deploymentConfiguration.virtualMachineConfiguration.extensions[0]"
	elsewhere := "/subscriptions/11111111-2222-3333-4444-555555555555/resourceGroups/rg/providers/Microsoft.ManagedIdentity/userAssignedIdentities/theirs"

	for _, c := range []struct {
		name        string
		change      func(pool, ext object)
		path        string // of a detail
		reason, fix string // fragments of that detail
	}{
		{"authenticationSettings inside secretsManagementSettings", func(_, e object) {
			s := sub(e, "settings")
			sub(s, "secretsManagementSettings")["authenticationSettings"] = s["authenticationSettings"]
			delete(s, "authenticationSettings")
		}, ext0 + ".settings.secretsManagementSettings.authenticationSettings", "wrong level", "move it to settings"},
		{"a resource id as client id", func(_, e object) {
			sub(e, "settings", "authenticationSettings")["msiClientId"] = f.identityID
		}, ext0 + ".settings.authenticationSettings.msiClientId", "resource id", "client id"},
		{"a client id that is not on the pool", func(_, e object) {
			sub(e, "settings", "authenticationSettings")["msiClientId"] = otherClient
		}, ext0 + ".settings.authenticationSettings.msiClientId", otherClient, f.clientID + " (nodes)"},
		{"no identity", func(p, _ object) { delete(p, "identity") }, "identity", "the pool has none", `"userAssignedIdentities"`},
		{"another tenant's identity", func(p, _ object) {
			p["identity"] = object{"type": "UserAssigned", "userAssignedIdentities": object{elsewhere: object{}}}
		}, "identity.userAssignedIdentities['" + elsewhere + "']", "tenant", "subscription"},
		{"an identity that does not exist", func(p, _ object) {
			p["identity"] = object{"type": "UserAssigned", "userAssignedIdentities": object{f.identityID + "x": object{}}}
		}, "identity.userAssignedIdentities['" + f.identityID + "x']", "does not exist", "keyfleet identity create"},
		{"an unknown extension type", func(_, e object) { e["type"] = "KeyVaultForLinx" }, ext0 + ".type", "KeyVaultForLinx", "KeyVaultForLinux"},
		{"CustomScript", func(_, e object) {
			e["publisher"], e["type"] = "Microsoft.Azure.Extensions", "CustomScript"
			delete(e, "settings")
		}, ext0 + ".type", "reserved", "an extension of your own"},
		{"cloudServiceConfiguration", func(p, _ object) {
			sub(p, "properties")["deploymentConfiguration"] = object{"cloudServiceConfiguration": object{"osFamily": "6"}}
		}, "properties.deploymentConfiguration.cloudServiceConfiguration", "retired", "virtualMachineConfiguration"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ext := f.extension(url)
			pool := f.poolBody(1, ext)
			c.change(pool, ext)
			_, err := f.Client.Do(f.ctx, client.Request{Method: http.MethodPut, URL: f.Client.ARM(f.poolPath("bad")), Version: "2021-01-01", Body: pool})
			var e *client.Error
			if !errors.As(err, &e) || e.Status != http.StatusBadRequest {
				t.Fatalf("got %v, want 400", err)
			}
			said := false
			for _, d := range e.Details {
				if d.Target == c.path {
					said = true
					if !strings.Contains(d.Message, c.reason) || !strings.Contains(d.Message, c.fix) || d.Code == "" {
						t.Errorf("the detail is %+v; want the reason %q and the fix %q", d, c.reason, c.fix)
					}
				}
			}
			if !said {
				t.Errorf("no detail has the path %s: %s %+v", c.path, e, e.Details)
			}
			f.nothingCreated(t)
		})
	}
}

// nothingCreated fails if anything of a refused pool is there.
func (f *fleet) nothingCreated(t *testing.T) {
	t.Helper()
	_, err := f.Client.Do(f.ctx, client.Request{Method: http.MethodGet, URL: f.Client.ARM(f.poolPath("bad")), Version: "2021-01-01"})
	if !client.IsNotFound(err) {
		t.Errorf("a refused pool is there: %v", err)
	}
	out, stderr, exit := f.program("keyfleet-server", "store", "dump", "--data-dir", f.Dir)
	if exit != 0 {
		t.Fatalf("store dump: %s", stderr)
	}
	for _, kind := range []string{"/pools/", "/nodes/", "/goals/"} {
		if strings.Contains(out, `"`+kind) {
			t.Errorf("the store holds something under %s:\n%s", kind, out)
		}
	}
}

// TestFaultsOfStateAreShown: what depends on the state of other things is
// accepted, and shown at once: Warning header, pool condition, node error.
func TestFaultsOfStateAreShown(t *testing.T) {
	t.Parallel()
	f := startFleet(t, stack.Config{})
	f.vault(f.group, "closed") // the identity may not read it
	f.certificate("closed", "web", nil)
	f.certificate("vault1", "web", nil)
	var version object
	f.call(http.MethodGet, f.Client.Vault("vault1", "/secrets/web"), "7.4", nil, &version)
	pinned := version["id"].(string)

	for _, c := range []struct {
		pool, url string
		reason    string // in the warning and the node's error
		idle      bool   // the node becomes idle all the same
	}{
		{"no-access", f.Client.Vault("closed", "/secrets/web"), "closed", false},
		{"no-secret", f.Client.Vault("vault1", "/secrets/nothing"), "nothing", false},
		{"no-version", f.Client.Vault("vault1", "/secrets/web/0123456789abcdef0123456789abcdef"), "0123456789abcdef0123456789abcdef", false},
		{"no-vault", f.Client.Vault("nobody", "/secrets/web"), "does not exist", false},
		{"not-hosted", "https://theirs.vault.example.org/secrets/web", "theirs.vault.example.org", false},
		{"pinned", pinned, "names a version", true},
	} {
		t.Run(c.pool, func(t *testing.T) {
			resp := f.do(client.Request{Method: http.MethodPut, URL: f.Client.ARM(f.poolPath(c.pool)), Version: "2021-01-01", Body: f.poolBody(1, f.extension(c.url))})
			if resp.Status != http.StatusOK {
				t.Errorf("the PUT answered %d, want 200", resp.Status)
			}
			w := strings.Join(resp.Warnings(), "\n")
			if !strings.Contains(w, c.url) || !strings.Contains(w, c.reason) {
				t.Errorf("the Warning header does not say %s and %q: %q", c.url, c.reason, w)
			}
			f.hasCondition(t, c.pool, c.url)
			if c.idle {
				f.idle(accountName, "westus2", c.pool, 1)
			} else {
				f.nodeSays(t, c.pool, c.url, c.reason)
			}
			f.call(http.MethodDelete, f.Client.ARM(f.poolPath(c.pool)), "2021-01-01", nil, nil)
		})
	}
}

// nodeSays waits until the pool's node has an error that names the URL and the reason.
func (f *fleet) nodeSays(t *testing.T, pool, url, reason string) {
	t.Helper()
	stack.Eventually(t, 2*time.Minute, "the node names the secret", func(ctx context.Context) error {
		nodes, err := f.nodes(ctx, accountName, "westus2", pool)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			for _, e := range n.Errors {
				if strings.Contains(e.Message, url) && strings.Contains(e.Message, reason) {
					return nil
				}
			}
		}
		return fmt.Errorf("nodes: %+v", nodes)
	})
}

// hasCondition waits until the stored pool has a condition that names the URL.
func (f *fleet) hasCondition(t *testing.T, pool, url string) {
	t.Helper()
	stack.Eventually(t, 2*time.Minute, "a condition of the pool", func(context.Context) error {
		out, stderr, exit := f.program("keyfleet-server", "store", "dump", "--data-dir", f.Dir, "--prefix", "/pools/")
		if exit != 0 {
			return errors.New(stderr)
		}
		for _, line := range strings.Split(out, "\n") {
			var o struct {
				Key   string
				Value struct {
					Conditions []struct{ Message string }
				}
			}
			if json.Unmarshal([]byte(line), &o) != nil || !strings.HasSuffix(o.Key, "/"+pool) {
				continue
			}
			for _, c := range o.Value.Conditions {
				if strings.Contains(c.Message, url) {
					return nil
				}
			}
		}
		return fmt.Errorf("no condition of the stored pool names %s", url)
	})
}

// TestWindowsPoolIsAccepted: a valid Windows pool is stored; that no provider
// offers Windows nodes is a resize error.
func TestWindowsPoolIsAccepted(t *testing.T) {
	t.Parallel()
	f := startFleet(t, stack.Config{})
	f.certificate("vault1", "web", nil)
	ext := f.extension(f.Client.Vault("vault1", "/secrets/web"))
	ext["type"] = "KeyVaultForWindows"
	management := sub(ext, "settings", "secretsManagementSettings")
	delete(management, "certificateStoreLocation")
	pool := f.poolBody(1, ext)
	vm := sub(pool, "properties", "deploymentConfiguration", "virtualMachineConfiguration")
	vm["imageReference"] = object{"publisher": "microsoftwindowsserver", "offer": "windowsserver", "sku": "2022-datacenter", "version": "latest"}
	vm["nodeAgentSkuId"] = "batch.node.windows amd64"
	f.put(f.poolPath("win"), "2021-01-01", pool, nil)
	stack.Eventually(t, 2*time.Minute, "the resize error", func(ctx context.Context) error {
		var got object
		if err := f.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: f.Client.ARM(f.poolPath("win")), Version: "2021-01-01"}, &got); err != nil {
			return err
		}
		text, _ := json.Marshal(sub(got, "properties")["resizeOperationStatus"])
		if !strings.Contains(strings.ToLower(string(text)), "windows") {
			return fmt.Errorf("resizeOperationStatus: %s", text)
		}
		return nil
	})
}
