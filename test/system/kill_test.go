package system

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

// The main job, killed everywhere.
//
// One run of the job creates identity, vault, certificate, account and pool,
// waits for the node, renews the certificate by policy time, waits for the
// delivery, and deletes pool and certificate. A first run logs every outside
// effect of the server, the agent and the extension (package effect). Then, for
// each effect and for "before" and "after", a fresh system runs the job, the
// program in question kills itself with SIGKILL at that point, is started again
// by what starts it in production (the caller of this test, for the server), and
// the job goes on: whoever calls does what people do, they look and run it
// again. Every run must end in the same state.

// job runs the main job on a server that may die under it.
type job struct {
	*system
	root, pool string
	stop       chan struct{}
	supervised sync.WaitGroup
}

// supervise starts the server again whenever it has died, until finish.
func (j *job) supervise() {
	j.stop = make(chan struct{})
	j.supervised.Add(1)
	go func() { // ends with finish
		defer j.supervised.Done()
		for {
			select {
			case <-j.stop:
				return
			case <-j.Ended():
				if err := j.Run("KEYFLEET_KILL_AT="); err != nil {
					j.T.Errorf("starting the server again: %v", err)
					return
				}
			}
		}
	}()
}

func (j *job) finish() {
	close(j.stop)
	j.supervised.Wait()
}

// again repeats a call while the server is away or coming back.
func (j *job) again(what string, call func(ctx context.Context) error) {
	j.T.Helper()
	stack.Eventually(j.T, 2*time.Minute, what, func(ctx context.Context) error {
		err := call(ctx)
		var e *client.Error
		if errors.As(err, &e) && e.Status >= 400 && e.Status < 500 && e.Status != 409 && e.Status != 429 {
			j.T.Fatalf("%s: refused: %v", what, err)
		}
		return err
	})
}

func (j *job) send(method, url, version string, in, out any) {
	j.T.Helper()
	j.again(method+" "+url, func(ctx context.Context) error {
		return j.Client.Call(ctx, client.Request{Method: method, URL: url, Version: version, Body: in}, out)
	})
}

func (j *job) create() {
	j.T.Helper()
	j.root = "/subscriptions/" + j.Client.Subscription() + "/resourceGroups/rg"
	arm := j.Client.ARM
	j.send(http.MethodPut, arm(j.root), "2021-04-01", map[string]any{"location": "westus2"}, nil)
	var id struct {
		ID         string
		Properties struct{ ClientID, PrincipalID, TenantID string }
	}
	j.send(http.MethodPut, arm(j.root+"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/nodes"), "2023-01-31", map[string]any{"location": "westus2"}, &id)
	var me struct{ ObjectID string }
	j.send(http.MethodGet, arm("/keyfleet/v1/whoami"), "", nil, &me)
	all, get := []string{"all"}, []string{"get"}
	policy := func(oid string, verbs []string) any {
		return map[string]any{"tenantId": id.Properties.TenantID, "objectId": oid, "permissions": map[string]any{"secrets": verbs, "certificates": verbs}}
	}
	j.send(http.MethodPut, arm(j.root+"/providers/Microsoft.KeyVault/vaults/vault1"), "2023-07-01", map[string]any{"location": "westus2", "properties": map[string]any{
		"tenantId": id.Properties.TenantID, "sku": map[string]any{"family": "A", "name": "standard"},
		"accessPolicies": []any{policy(me.ObjectID, all), policy(id.Properties.PrincipalID, get)},
	}}, nil)
	j.createCertificate()
	j.send(http.MethodPut, arm(j.root+"/providers/Microsoft.Batch/batchAccounts/acct1"), "2021-01-01", map[string]any{"location": "westus2"}, nil)
	j.pool = j.root + "/providers/Microsoft.Batch/batchAccounts/acct1/pools/p1"
	raw := body(j.T.(*testing.T), "000-put-pool-linux.json")
	raw = bytes.ReplaceAll(raw, []byte("https://testkvchinanorth2s.vault.azure.cn/secrets/authcertforumatesting/8f5f3f491afd48cb99286ba2aacd39af"), []byte(j.Client.Vault("vault1", "/secrets/web")))
	raw = bytes.ReplaceAll(raw, []byte("b9f6dd56-d2d6-4967-99d7-8062d56fd84c"), []byte(id.Properties.ClientID))
	raw = bytes.ReplaceAll(raw, []byte(documentedGroup+"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools"), []byte(id.ID))
	raw = bytes.ReplaceAll(raw, []byte(`"test2"`), []byte(`"p1"`))
	j.send(http.MethodPut, arm(j.pool), "2021-01-01", raw, nil)
}

// createCertificate asks once: when the answer is lost, it looks whether the
// certificate is there before it asks again, for another POST asks for another version.
func (j *job) createCertificate() {
	j.T.Helper()
	url := j.Client.Vault("vault1", "/certificates/web")
	j.again("create the certificate", func(ctx context.Context) error {
		var op struct{ Status string }
		err := j.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: url + "/pending", Version: "7.4"}, &op)
		if client.IsNotFound(err) {
			err = j.Client.Call(ctx, client.Request{Method: http.MethodPost, URL: url + "/create", Version: "7.4", Body: map[string]any{"policy": map[string]any{
				"issuer": map[string]any{"name": "Keyfleet"}, "key_props": map[string]any{"kty": "EC", "crv": "P-256", "exportable": true},
				"secret_props": map[string]any{"contentType": "application/x-pem-file"}, "x509_props": map[string]any{"subject": "CN=web", "validity_months": 12},
				"lifetime_actions": []any{map[string]any{"trigger": map[string]any{"days_before_expiry": 30}, "action": map[string]any{"action_type": "AutoRenew"}}},
			}}}, &op)
		}
		if err == nil && op.Status != "completed" {
			err = fmt.Errorf("the operation is %s", op.Status)
		}
		return err
	})
}

func (j *job) waitIdle() (nodeID string) {
	j.T.Helper()
	j.again("one idle node", func(ctx context.Context) error {
		list, err := j.nodes(ctx, "acct1", "westus2", "p1")
		if err != nil {
			return err
		}
		if len(list) != 1 || list[0].State != "idle" {
			return fmt.Errorf("nodes: %+v", list)
		}
		nodeID = list[0].ID
		return nil
	})
	return nodeID
}

// renew moves policy time past the renewal, to a target, so that asking twice moves it once.
func (j *job) renew() {
	j.T.Helper()
	const target = 336 * 24 * time.Hour
	url := j.Client.ARM("/keyfleet/v1/dev/clock")
	j.again("advance policy time", func(ctx context.Context) error {
		var clock struct{ Offset string }
		if err := j.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: url}, &clock); err != nil {
			return err
		}
		if at, err := time.ParseDuration(clock.Offset); err == nil && at >= target {
			return nil
		}
		return j.Client.Call(ctx, client.Request{Method: http.MethodPost, URL: url, Body: map[string]any{"advance": target.String()}}, nil)
	})
}

// delivered waits until the node's agent reports the second version.
func (j *job) delivered() (version string) {
	j.T.Helper()
	j.again("the second version on the node", func(ctx context.Context) error {
		if n, err := j.versions(ctx); err != nil || n != 2 {
			return fmt.Errorf("%d versions: %w", n, err)
		}
		var d keyfleet.Deliveries
		err := j.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: j.Client.ARM("/keyfleet/v1/vaults/vault1/certificates/web/deliveries")}, &d)
		if err == nil && (len(d.Nodes) != 1 || d.Nodes[0].Version != d.Version) {
			err = fmt.Errorf("deliveries: %+v", d)
		}
		version = d.Version
		return err
	})
	return version
}

func (j *job) versions(ctx context.Context) (int, error) {
	list, err := client.List[json.RawMessage](ctx, j.Client, client.Request{Method: http.MethodGet, URL: j.Client.Vault("vault1", "/certificates/web/versions"), Version: "7.4"})
	return len(list), err
}

// run does the whole job and checks what must be so at each stage.
func (j *job) run() {
	j.T.Helper()
	j.create()
	nodeID := j.waitIdle()
	j.renew()
	version := j.delivered()

	dir := filepath.Join(j.Dir, "nodes", nodeID, "waagent", "Microsoft.Azure.KeyVault")
	target, err := os.Readlink(filepath.Join(dir, "vault1.web"))
	if err != nil || !strings.Contains(target, version) {
		j.T.Errorf("the link leads to %q, want version %s (%v)", target, version, err)
	}
	if pair, err := os.ReadFile(filepath.Join(dir, filepath.Base(target))); err != nil || !keyPair(pair) {
		j.T.Errorf("the file behind the link is no key pair: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) != 0 {
		j.T.Errorf("left over in the certificate directory: %v %v", left, err)
	}

	j.again("delete the pool", func(ctx context.Context) error {
		err := j.Client.Call(ctx, client.Request{Method: http.MethodDelete, URL: j.Client.ARM(j.pool), Version: "2021-01-01"}, nil)
		if err == nil {
			err = j.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: j.Client.ARM(j.pool), Version: "2021-01-01"}, nil)
			if err == nil {
				return errors.New("the pool is still there")
			}
		}
		if client.IsNotFound(err) {
			return nil
		}
		return err
	})
	j.again("delete the certificate", func(ctx context.Context) error {
		err := j.Client.Call(ctx, client.Request{Method: http.MethodDelete, URL: j.Client.Vault("vault1", "/certificates/web"), Version: "7.4"}, nil)
		if client.IsNotFound(err) {
			return nil
		}
		return err
	})
	j.endState(nodeID)
}

// endState is the same for every run: one deleted certificate with its secret,
// no pool, no node, no process and no file of it.
func (j *job) endState(nodeID string) {
	j.T.Helper()
	j.again("the end state", func(ctx context.Context) error {
		for path, want := range map[string]int{"/certificates": 0, "/secrets": 0, "/deletedcertificates": 1, "/deletedsecrets": 1} {
			list, err := client.List[json.RawMessage](ctx, j.Client, client.Request{Method: http.MethodGet, URL: j.Client.Vault("vault1", path), Version: "7.4"})
			if err != nil {
				return err
			}
			if len(list) != want {
				return fmt.Errorf("%s holds %d, want %d", path, len(list), want)
			}
		}
		pools, err := client.List[json.RawMessage](ctx, j.Client, client.Request{Method: http.MethodGet, URL: j.Client.ARM(strings.TrimSuffix(j.pool, "/p1")), Version: "2021-01-01"})
		if err != nil || len(pools) != 0 {
			return fmt.Errorf("%d pools: %w", len(pools), err)
		}
		left, err := os.ReadDir(filepath.Join(j.Dir, "nodes"))
		if err != nil || len(left) != 0 {
			return fmt.Errorf("%d node folders are left: %w", len(left), err)
		}
		if procs := processesOf(nodeID); len(procs) != 0 {
			return fmt.Errorf("processes of the node are left: %v", procs)
		}
		return nil
	})
}
