package client

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/keyvault"
)

// The typed calls are rows of method, place and body; this is the table.
func TestTypedCalls(t *testing.T) {
	const pool = "/subscriptions/S/resourceGroups/G/providers/Microsoft.Batch/batchAccounts/A/pools/P"
	value := "v"
	tests := []struct {
		reason string
		call   func(ctx context.Context, c *Client) error
		asked  string // the last request
		body   string
	}{
		{"a subscription is made with a chosen id", func(ctx context.Context, c *Client) error {
			_, err := c.CreateSubscription(ctx, "S", "lab")
			return err
		}, "POST arm.example.com /keyfleet/v1/subscriptions", `{"subscriptionId":"S","displayName":"lab"}`},
		{"a group has its location", func(ctx context.Context, c *Client) error {
			_, err := c.PutGroup(ctx, "S", "G", "westus2")
			return err
		}, "PUT arm.example.com /subscriptions/S/resourceGroups/G?api-version=2021-04-01", `{"location":"westus2","properties":{}}`},
		{"a grant stands at its scope", func(ctx context.Context, c *Client) error {
			_, err := c.PutRoleAssignment(ctx, "/", "N", "/role", "O")
			return err
		}, "PUT arm.example.com /providers/Microsoft.Authorization/roleAssignments/N?api-version=2022-04-01", `{"properties":{"roleDefinitionId":"/role","principalId":"O"}}`},
		{"an identity may have a chosen client id", func(ctx context.Context, c *Client) error {
			_, err := c.PutIdentity(ctx, "/i", "westus2", "C")
			return err
		}, "PUT arm.example.com /i?api-version=2023-01-31", `{"location":"westus2","properties":{"clientId":"C"}}`},
		{"a policy is added to those there are", func(ctx context.Context, c *Client) error {
			_, err := c.AddAccessPolicy(ctx, "/v", keyvault.AccessPolicyEntry{TenantID: "T", ObjectID: "O", Permissions: keyvault.Permissions{Secrets: []string{"get"}}})
			return err
		}, "PUT arm.example.com /v/accessPolicies/add?api-version=2023-02-01", `{"properties":{"accessPolicies":[{"tenantId":"T","objectId":"O","permissions":{"secrets":["get"]}}]}}`},
		{"a secret's name is escaped", func(ctx context.Context, c *Client) error {
			_, err := c.SetSecret(ctx, "V", "a/b", keyvault.SetSecret{Value: &value})
			return err
		}, "PUT v.example.com /secrets/a%2Fb?api-version=7.4", `{"value":"v"}`},
		{"the newest version is the empty one", func(ctx context.Context, c *Client) error {
			_, err := c.Secret(ctx, "v", "n", "")
			return err
		}, "GET v.example.com /secrets/n/?api-version=7.4", ""},
		{"a pool's body goes as it is", func(ctx context.Context, c *Client) error {
			_, _, err := c.PutPool(ctx, pool, []byte(`{ "name" : "P" }`))
			return err
		}, "PUT arm.example.com " + pool + "?api-version=2023-05-01", `{ "name" : "P" }`},
		{"policy time moves by a duration", func(ctx context.Context, c *Client) error {
			_, err := c.AdvanceClock(ctx, 90*time.Minute)
			return err
		}, "POST arm.example.com /keyfleet/v1/dev/clock", `{"advance":"1h30m0s"}`},
		{"the state of a renewal is Keyfleet's own", func(ctx context.Context, c *Client) error {
			_, err := c.Renewal(ctx, "v", "web")
			return err
		}, "GET arm.example.com /keyfleet/v1/vaults/v/certificates/web", ""},
	}
	for _, tt := range tests {
		d, c := newDouble(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{}`) })
		if err := tt.call(t.Context(), c); err != nil {
			t.Errorf("%s: %v", tt.reason, err)
			continue
		}
		last := len(d.seen) - 1
		if diff := cmp.Diff([]string{tt.asked, tt.body}, []string{d.seen[last], d.bodies[last]}); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.reason, diff)
		}
	}
}

func TestACertificateIsAwaited(t *testing.T) {
	states := []string{`{"status":"inProgress"}`, `{"status":"completed"}`}
	d, c := newDouble(t, nil)
	d.handle = func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/certificates/web/pending" {
			fmt.Fprint(w, `{"id":"done"}`)
			return
		}
		fmt.Fprint(w, states[0])
		if len(states) > 1 {
			states = states[1:]
		}
	}
	cert, err := c.AwaitCertificate(t.Context(), "v", "web")
	if err != nil || cert.ID != "done" {
		t.Errorf("%+v, %v", cert, err)
	}
	states = []string{`{"status":"failed","error":{"code":"Refused","message":"No."}}`}
	if _, err := c.AwaitCertificate(t.Context(), "v", "web"); err == nil || err.Error() != "Refused: No." {
		t.Errorf("a failed operation gave %v", err)
	}
}
