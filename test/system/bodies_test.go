// Package system tests the whole system: real programs, real nodes, the REST
// surface, nothing in between.
package system

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The systems under test mostly wait for each other, so more run at once than there are processors.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	code := m.Run()
	stack.Clean()
	os.Exit(code)
}

const (
	documentedSubscription = "042998e4-36dc-4b7d-8ce3-a7a2c4877d33"
	documentedGroup        = "/subscriptions/" + documentedSubscription + "/resourceGroups/ACR"
)

func body(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(stack.Root(t), "testdata", "requests", file))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// documented is a server prepared for the documented bodies: it answers for the
// hosts that they name, and has the subscription, group and identity that they name.
type documented struct {
	*system
	clientID string
}

func startDocumented(t *testing.T, file string) *documented {
	t.Helper()
	s := start(t, stack.Config{Args: []string{
		"--host-alias", "vault.azure.cn=vault", "--host-alias", "vault.azure.net=vault", "--host-alias", "batch.azure.com=batch",
	}})
	d := &documented{system: s, clientID: regexp.MustCompile(`"msiClientId": "([0-9a-f-]+)"`).FindStringSubmatch(string(body(t, file)))[1]}
	s.call(http.MethodPost, s.Client.ARM("/keyfleet/v1/subscriptions"), "", map[string]any{"subscriptionId": documentedSubscription}, nil)
	s.put(documentedGroup, "2021-04-01", map[string]any{"location": "westus2"}, nil)
	s.put(documentedGroup+"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools", "2023-01-31",
		map[string]any{"location": "westus2", "properties": map[string]any{"clientId": d.clientID}}, nil)
	s.account(documentedGroup+"/providers/Microsoft.Batch/batchAccounts/testwestus2batch", "westus2")
	return d
}

func (d *documented) poolPath(name string) string {
	return documentedGroup + "/providers/Microsoft.Batch/batchAccounts/testwestus2batch/pools/" + name
}

func (d *documented) batch(path string) string {
	return d.Client.Batch("testwestus2batch.westus2."+d.Client.Endpoints().BatchSuffix, path)
}

func (d *documented) vault(name string, objectIDs ...string) {
	d.T.Helper()
	d.system.vault(documentedGroup, name, objectIDs...)
}

// TestWindowsBodiesAreInvalid: both documented Windows bodies are invalid JSON.
// The answer says where and what was expected, and nothing is created.
func TestWindowsBodiesAreInvalid(t *testing.T) {
	d := startDocumented(t, "000-put-pool-linux.json")
	for file, fragments := range map[string][]string{
		"000-put-pool-windows.json": {"line 41, column 26", "no comma before the closing"},
		"001-put-pool-windows.json": {"line 32, column 41", "expected ':'"},
	} {
		_, err := d.Client.Do(d.ctx, client.Request{Method: http.MethodPut, URL: d.Client.ARM(d.poolPath("p")), Version: "2021-01-01", Body: body(t, file)})
		var e *client.Error
		if !errors.As(err, &e) || e.Status != 400 || e.Code != "InvalidRequestContent" {
			t.Fatalf("%s: got %v, want 400 InvalidRequestContent", file, err)
		}
		for _, f := range fragments {
			if !strings.Contains(e.Message, f) {
				t.Errorf("%s: %q does not say %q", file, e.Message, f)
			}
		}
		if !strings.HasPrefix(e.Target, "properties.deploymentConfiguration.virtualMachineConfiguration.extensions[0]") {
			t.Errorf("%s: target %q", file, e.Target)
		}
	}
	_, err := d.Client.Do(d.ctx, client.Request{Method: http.MethodGet, URL: d.Client.ARM(d.poolPath("p")), Version: "2021-01-01"})
	if !client.IsNotFound(err) {
		t.Errorf("a refused pool is there: %v", err)
	}
}

// TestLinuxBodiesNameWhatIsMissing: both documented Linux bodies are accepted
// byte for byte; their vaults do not exist here, and pool and node say so with
// the URL exactly as the body wrote it.
func TestLinuxBodiesNameWhatIsMissing(t *testing.T) {
	for file, pool := range map[string]string{"000-put-pool-linux.json": "test2", "001-put-pool-linux.json": "test1"} {
		t.Run(file, func(t *testing.T) {
			d := startDocumented(t, file)
			secret := regexp.MustCompile(`https://[^"]+/secrets/[^"]+`).FindString(string(body(t, file)))
			resp := d.do(client.Request{Method: http.MethodPut, URL: d.Client.ARM(d.poolPath(pool)), Version: "2021-01-01", Body: body(t, file)})
			if resp.Status != 200 {
				t.Errorf("the PUT answered %d, want 200", resp.Status)
			}
			if w := strings.Join(resp.Warnings(), "\n"); !strings.Contains(w, secret) {
				t.Errorf("the Warning header does not name %s: %q", secret, w)
			}
			stack.Eventually(t, 2*time.Minute, "the node names the secret", func(ctx context.Context) error {
				var nodes struct{ Value []json.RawMessage }
				if err := d.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: d.batch("/pools/" + pool + "/nodes"), Version: "2021-06-01.14.0"}, &nodes); err != nil {
					return err
				}
				if len(nodes.Value) != 1 || !strings.Contains(string(nodes.Value[0]), secret) {
					return fmt.Errorf("nodes: %s", nodes.Value)
				}
				return nil
			})
		})
	}
}

// TestInstanceViewOfTheDocumentedPool: with the vault and secret that the second
// Linux body names, its node becomes idle, and GET of the extension answers
// with the members, nesting and types of the documented response body.
func TestInstanceViewOfTheDocumentedPool(t *testing.T) {
	const file = "001-put-pool-linux.json"
	d := startDocumented(t, file)
	var id struct {
		Properties struct{ PrincipalID string }
	}
	d.call(http.MethodGet, d.Client.ARM(documentedGroup+"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools"), "2023-01-31", nil, &id)
	d.vault("testkvwestus2", id.Properties.PrincipalID)
	d.certificate("testkvwestus2", "authsecreat", nil)
	d.do(client.Request{Method: http.MethodPut, URL: d.Client.ARM(d.poolPath("test1")), Version: "2021-01-01", Body: body(t, file)})
	node := d.idle("testwestus2batch", "westus2", "test1", 1)[0]

	var want, got map[string]any
	if err := json.Unmarshal(body(t, "001-get-node-extension-response.json"), &want); err != nil {
		t.Fatal(err)
	}
	d.call(http.MethodGet, d.batch("/pools/test1/nodes/"+node+"/extensions/secretext"), "2010-01-01", nil, &got)
	sameShape(t, "", want, got)

	status := got["instanceView"].(map[string]any)["statuses"].([]any)[0].(map[string]any)
	documentedStatus := want["instanceView"].(map[string]any)["statuses"].([]any)[0].(map[string]any)
	for _, k := range []string{"code", "level", "displayStatus"} {
		if !reflect.DeepEqual(status[k], documentedStatus[k]) {
			t.Errorf("%s is %v, documented is %v", k, status[k], documentedStatus[k])
		}
	}
	form := regexp.MustCompile(`^Successfully started Key Vault extension service\. \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`)
	if !form.MatchString(status["message"].(string)) || !form.MatchString(documentedStatus["message"].(string)) {
		t.Errorf("message %q", status["message"])
	}
	// settings is a JSON string that says what the pool's body says.
	var sent struct {
		Properties struct {
			DeploymentConfiguration struct {
				VirtualMachineConfiguration struct{ Extensions []struct{ Settings any } }
			}
		}
	}
	var settings any
	if err := json.Unmarshal(body(t, file), &sent); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(got["vmExtension"].(map[string]any)["settings"].(string)), &settings); err != nil {
		t.Fatalf("settings is no JSON string: %v", err)
	}
	if !reflect.DeepEqual(settings, sent.Properties.DeploymentConfiguration.VirtualMachineConfiguration.Extensions[0].Settings) {
		t.Errorf("settings differ from the pool's: %v", settings)
	}
}

// sameShape fails where got has other members or JSON types than want.
func sameShape(t *testing.T, path string, want, got any) {
	t.Helper()
	if fmt.Sprintf("%T", want) != fmt.Sprintf("%T", got) {
		t.Errorf("%s is a %T, documented is a %T", path, got, want)
		return
	}
	switch w := want.(type) {
	case map[string]any:
		g := got.(map[string]any)
		for k := range w {
			if _, ok := g[k]; !ok {
				t.Errorf("%s.%s is missing", path, k)
				continue
			}
			sameShape(t, path+"."+k, w[k], g[k])
		}
		for k := range g {
			if _, ok := w[k]; !ok {
				t.Errorf("%s.%s is not in the documented body", path, k)
			}
		}
	case []any:
		g := got.([]any)
		if len(g) != len(w) {
			t.Errorf("%s has %d elements, documented are %d", path, len(g), len(w))
			return
		}
		for i := range w {
			sameShape(t, fmt.Sprintf("%s[%d]", path, i), w[i], g[i])
		}
	}
}
