package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/client"
)

// mainJob does the job and returns the node that was shown.
func (d *demo) mainJob(ctx context.Context) (shown string, err error) {
	if _, err := d.keyfleet(ctx, "login", "--from", filepath.Join(d.dir, "data")); err != nil {
		return "", err
	}
	pool, err := d.createAll(ctx)
	if err != nil {
		return "", err
	}
	ids, err := d.waitIdle(ctx, pool)
	if err != nil {
		return "", err
	}
	shown = ids[0]
	if err := d.look(ctx, shown); err != nil {
		return "", err
	}
	return shown, d.renewByTime(ctx, ids)
}

// createAll makes identity, vault, access policy, certificate, account and pool.
func (d *demo) createAll(ctx context.Context) (pool string, err error) {
	sub := "/subscriptions/" + d.client.Subscription()
	rg := sub + "/resourceGroups/" + group
	if err := d.put(ctx, rg, "2021-04-01", map[string]any{"location": location}, nil); err != nil {
		return "", err
	}
	var id struct {
		ID         string `json:"id"`
		Properties struct{ ClientID, PrincipalID, TenantID string }
	}
	if err := d.put(ctx, rg+"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/nodes", "2023-01-31", map[string]any{"location": location}, &id); err != nil {
		return "", err
	}
	d.say("identity       nodes, client id %s", id.Properties.ClientID)

	me, err := d.administrator(ctx)
	if err != nil {
		return "", err
	}
	policy := func(objectID string, permissions map[string]any) map[string]any {
		return map[string]any{"tenantId": id.Properties.TenantID, "objectId": objectID, "permissions": permissions}
	}
	err = d.put(ctx, rg+"/providers/Microsoft.KeyVault/vaults/"+vaultName, "2023-07-01", map[string]any{
		"location": location,
		"properties": map[string]any{
			"tenantId": id.Properties.TenantID, "sku": map[string]any{"family": "A", "name": "standard"},
			"accessPolicies": []any{
				policy(me, map[string]any{"secrets": []string{"all"}, "certificates": []string{"all"}}),
				policy(id.Properties.PrincipalID, map[string]any{"secrets": []string{"get"}, "certificates": []string{"get"}}),
			},
		},
	}, nil)
	if err != nil {
		return "", err
	}
	d.say("vault          %s, access policy: the identity may get secrets and certificates", vaultName)

	if err := d.createCertificate(ctx); err != nil {
		return "", err
	}
	acct := rg + "/providers/Microsoft.Batch/batchAccounts/" + account
	resp, err := d.client.Do(ctx, client.Request{Method: http.MethodPut, URL: d.client.ARM(acct), Version: "2021-01-01", Body: map[string]any{"location": location}})
	if err != nil {
		return "", fmt.Errorf("creating the account: %w", err)
	}
	if _, err := d.client.Wait(ctx, resp, nil); err != nil {
		return "", fmt.Errorf("creating the account: %w", err)
	}
	d.say("account        %s", account)
	pool = acct + "/pools/" + poolName
	return pool, d.createPool(ctx, pool, id.ID, id.Properties.ClientID)
}

func (d *demo) createCertificate(ctx context.Context) error {
	body := map[string]any{"policy": map[string]any{
		"issuer":       map[string]any{"name": "Keyfleet"},
		"key_props":    map[string]any{"kty": "EC", "crv": "P-256", "exportable": true, "reuse_key": false},
		"secret_props": map[string]any{"contentType": "application/x-pem-file"},
		"x509_props":   map[string]any{"subject": "CN=web.example.org", "sans": map[string]any{"dns_names": []string{"web.example.org"}}, "validity_months": 12},
		"lifetime_actions": []any{map[string]any{
			"trigger": map[string]any{"days_before_expiry": 30}, "action": map[string]any{"action_type": "AutoRenew"},
		}},
	}}
	url := d.client.Vault(vaultName, "/certificates/"+certificate)
	if err := d.client.Call(ctx, client.Request{Method: http.MethodPost, URL: url + "/create", Version: "7.4", Body: body}, nil); err != nil {
		return fmt.Errorf("creating the certificate: %w", err)
	}
	var op struct {
		Status string
		Error  *struct{ Code, Message string }
	}
	err := d.client.Poll(ctx, 50*time.Millisecond, func(ctx context.Context) (bool, error) {
		err := d.client.Call(ctx, client.Request{Method: http.MethodGet, URL: url + "/pending", Version: "7.4"}, &op)
		if err == nil && op.Status == "failed" {
			err = fmt.Errorf("%s: %s", op.Error.Code, op.Error.Message)
		}
		return op.Status == "completed", err
	})
	if err != nil {
		return fmt.Errorf("waiting for the certificate: %w", err)
	}
	d.say("certificate    %s, 12 months, AutoRenew 30 days before its end", certificate)
	return nil
}

// createPool sends the documented body for Linux nodes with our names in it.
func (d *demo) createPool(ctx context.Context, pool, identity, clientID string) error {
	raw, err := documentedBody()
	if err != nil {
		return err
	}
	text := strings.NewReplacer(
		`"test2"`, `"`+poolName+`"`,
		`https://testkvchinanorth2s.vault.azure.cn/secrets/authcertforumatesting/8f5f3f491afd48cb99286ba2aacd39af`, d.client.Vault(vaultName, "/secrets/"+certificate),
		`b9f6dd56-d2d6-4967-99d7-8062d56fd84c`, clientID,
		`/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools`, identity,
		`"targetDedicatedNodes": 1`, fmt.Sprintf(`"targetDedicatedNodes": %d`, nodes),
	).Replace(string(raw))
	resp, err := d.client.Do(ctx, client.Request{Method: http.MethodPut, URL: d.client.ARM(pool), Version: "2021-01-01", Body: []byte(text)})
	if err != nil {
		return fmt.Errorf("creating the pool: %w", err)
	}
	for _, w := range resp.Warnings() {
		d.say("warning        %s", w)
	}
	d.say("pool           %s, %d nodes, from the documented request body", poolName, nodes)
	return nil
}

func documentedBody() ([]byte, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(filepath.Dir(exe), "..", "testdata", "requests", "000-put-pool-linux.json"))
}

type nodeView struct {
	ID     string
	State  string
	Errors []struct{ Code, Message string }
}

// waitIdle waits until all nodes of the pool are idle.
func (d *demo) waitIdle(ctx context.Context, pool string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var list struct{ Value []nodeView }
	last := ""
	err := d.client.Poll(ctx, 100*time.Millisecond, func(ctx context.Context) (bool, error) {
		err := d.client.Call(ctx, client.Request{Method: http.MethodGet, URL: d.batch("/pools/" + poolName + "/nodes"), Version: "2021-06-01.14.0"}, &list)
		if err != nil {
			return false, err
		}
		count := map[string]int{}
		for _, n := range list.Value {
			count[n.State]++
			if n.State == "unusable" {
				b, _ := json.Marshal(n.Errors)
				return false, fmt.Errorf("node %s is unusable: %s", n.ID, b)
			}
		}
		if line := fmt.Sprint(count); line != last {
			last = line
			d.say("nodes          %s", strings.TrimPrefix(line, "map"))
		}
		return count["idle"] == nodes, nil
	})
	if err != nil {
		return nil, fmt.Errorf("waiting for the nodes: %w", err)
	}
	var ids []string
	for _, n := range list.Value {
		ids = append(ids, n.ID)
	}
	return ids, nil
}

// look shows the status file and the certificate directory of a node.
func (d *demo) look(ctx context.Context, node string) error {
	fmt.Fprintf(d.out, "\non node %s:\n", node)
	for _, command := range []string{
		"cat /var/lib/waagent/Microsoft.Azure.KeyVault.KeyVaultForLinux-*/status/1.status",
		"ls -l /var/lib/waagent/Microsoft.Azure.KeyVault",
	} {
		fmt.Fprintf(d.out, "# %s\n", command)
		out, err := d.shell(ctx, node, command)
		if err != nil {
			return err
		}
		fmt.Fprintf(d.out, "%s\n", strings.TrimRight(out, "\n"))
	}
	fmt.Fprintln(d.out)
	return nil
}

// shell runs a command on a node by "keyfleet node shell".
func (d *demo) shell(ctx context.Context, node, command string) (string, error) {
	out, err := d.keyfleet(ctx, "node", "shell", poolName, node, "--", "/bin/sh", "-c", command)
	if err != nil {
		return "", fmt.Errorf("looking at node %s: %w", node, err)
	}
	return out, nil
}

// keyfleet runs our command line, logged in from the server's data directory.
func (d *demo) keyfleet(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "keyfleet"), args...)
	cmd.Env = append(os.Environ(), "KEYFLEET_CONFIG="+filepath.Join(d.dir, "config.yaml"))
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("keyfleet %s: %w\n%s", strings.Join(args, " "), err, exit.Stderr)
	}
	return string(out), err
}

func (d *demo) batch(path string) string {
	return d.client.Batch(account+"."+location+"."+d.client.Endpoints().BatchSuffix, path)
}

func (d *demo) put(ctx context.Context, path, version string, body, out any) error {
	if err := d.client.Call(ctx, client.Request{Method: http.MethodPut, URL: d.client.ARM(path), Version: version, Body: body}, out); err != nil {
		return fmt.Errorf("creating %s: %w", path, err)
	}
	return nil
}

// administrator returns the object id of the caller, from the vault of roles: its own assignments.
func (d *demo) administrator(ctx context.Context) (string, error) {
	var me struct{ ObjectID string }
	err := d.client.Call(ctx, client.Request{Method: http.MethodGet, URL: d.client.ARM("/keyfleet/v1/whoami")}, &me)
	return me.ObjectID, err
}
