package system

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

// system is a running server and the few calls that every test makes.
type system struct {
	*stack.Stack
	ctx context.Context
}

func start(t *testing.T, cfg stack.Config) *system {
	t.Helper()
	s := &system{Stack: stack.Start(t, cfg)}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	s.ctx = ctx
	return s
}

// do makes a call that must succeed.
func (s *system) do(r client.Request) *client.Response {
	s.T.Helper()
	resp, err := s.Client.Do(s.ctx, r)
	if err != nil {
		s.T.Fatalf("%s %s: %v", r.Method, r.URL, err)
	}
	return resp
}

func (s *system) call(method, url, version string, in, out any) {
	s.T.Helper()
	if err := s.Client.Call(s.ctx, client.Request{Method: method, URL: url, Version: version, Body: in}, out); err != nil {
		s.T.Fatalf("%s %s: %v", method, url, err)
	}
}

func (s *system) put(path, version string, in, out any) {
	s.T.Helper()
	s.call(http.MethodPut, s.Client.ARM(path), version, in, out)
}

// group makes a resource group in the default subscription and returns its id.
func (s *system) group(name string) string {
	s.T.Helper()
	path := "/subscriptions/" + s.Client.Subscription() + "/resourceGroups/" + name
	s.put(path, "2021-04-01", map[string]any{"location": "westus2"}, nil)
	return path
}

// identity makes a managed identity and returns resource id, client id and object id.
func (s *system) identity(group, name string) (id, clientID, objectID string) {
	s.T.Helper()
	var out struct {
		ID         string
		Properties struct{ ClientID, PrincipalID string }
	}
	s.put(group+"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/"+name, "2023-01-31", map[string]any{"location": "westus2"}, &out)
	return out.ID, out.Properties.ClientID, out.Properties.PrincipalID
}

// vault makes a vault in which the administrator may do everything and the
// others may get secrets and certificates.
func (s *system) vault(group, name string, readers ...string) {
	s.T.Helper()
	var me struct{ ObjectID, TenantID string }
	s.call(http.MethodGet, s.Client.ARM("/keyfleet/v1/whoami"), "", nil, &me)
	all, get := []string{"all"}, []string{"get"}
	policies := []any{map[string]any{"tenantId": me.TenantID, "objectId": me.ObjectID, "permissions": map[string]any{"secrets": all, "certificates": all}}}
	for _, r := range readers {
		policies = append(policies, map[string]any{"tenantId": me.TenantID, "objectId": r, "permissions": map[string]any{"secrets": get, "certificates": get}})
	}
	s.put(group+"/providers/Microsoft.KeyVault/vaults/"+name, "2023-07-01", map[string]any{"location": "westus2", "properties": map[string]any{
		"tenantId": me.TenantID, "sku": map[string]any{"family": "A", "name": "standard"}, "accessPolicies": policies,
	}}, nil)
}

// certificate makes an EC certificate from the built-in issuer, renewed 30 days
// before its end, and waits for it. change may alter the request body.
func (s *system) certificate(vault, name string, change func(policy map[string]any)) {
	s.T.Helper()
	policy := map[string]any{
		"issuer":           map[string]any{"name": "Keyfleet"},
		"key_props":        map[string]any{"kty": "EC", "crv": "P-256", "exportable": true},
		"secret_props":     map[string]any{"contentType": "application/x-pem-file"},
		"x509_props":       map[string]any{"subject": "CN=" + name + ".example.org", "validity_months": 12},
		"lifetime_actions": []any{map[string]any{"trigger": map[string]any{"days_before_expiry": 30}, "action": map[string]any{"action_type": "AutoRenew"}}},
	}
	if change != nil {
		change(policy)
	}
	url := s.Client.Vault(vault, "/certificates/"+name)
	s.call(http.MethodPost, url+"/create", "7.4", map[string]any{"policy": policy}, nil)
	s.issued(vault, name)
}

// issued waits until no operation of the certificate is under way.
func (s *system) issued(vault, name string) {
	s.T.Helper()
	stack.Eventually(s.T, 30*time.Second, "certificate "+name+" is issued", func(ctx context.Context) error {
		var op struct {
			Status string
			Error  json.RawMessage
		}
		err := s.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: s.Client.Vault(vault, "/certificates/"+name+"/pending"), Version: "7.4"}, &op)
		if err == nil && op.Status != "completed" {
			err = fmt.Errorf("status %s %s", op.Status, op.Error)
		}
		return err
	})
}

// account makes a Batch account.
func (s *system) account(path, location string) {
	s.T.Helper()
	resp := s.do(client.Request{Method: http.MethodPut, URL: s.Client.ARM(path), Version: "2021-01-01", Body: map[string]any{"location": location}})
	if _, err := s.Client.Wait(s.ctx, resp, nil); err != nil {
		s.T.Fatalf("waiting for account %s: %v", path, err)
	}
}

// node is what the tests look at in a node of the data plane.
type node struct {
	ID     string
	State  string
	Errors []struct {
		Code, Message string
		ErrorDetails  []struct{ Name, Value string }
	}
}

func (s *system) nodes(ctx context.Context, account, region, pool string) ([]node, error) {
	var list struct{ Value []node }
	url := s.Client.Batch(account+"."+region+"."+s.Client.Endpoints().BatchSuffix, "/pools/"+pool+"/nodes")
	err := s.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: url, Version: "2021-06-01.14.0"}, &list)
	return list.Value, err
}

// idle waits until the pool has n nodes and all are idle, and returns their ids.
func (s *system) idle(account, region, pool string, n int) []string {
	s.T.Helper()
	var ids []string
	stack.Eventually(s.T, 90*time.Second, fmt.Sprintf("%d idle nodes", n), func(ctx context.Context) error {
		nodes, err := s.nodes(ctx, account, region, pool)
		if err != nil {
			return err
		}
		ids = ids[:0]
		for _, x := range nodes {
			if x.State == "idle" {
				ids = append(ids, x.ID)
			}
		}
		if len(nodes) != n || len(ids) != n {
			return fmt.Errorf("%d of %d are idle: %+v", len(ids), len(nodes), nodes)
		}
		return nil
	})
	return ids
}
