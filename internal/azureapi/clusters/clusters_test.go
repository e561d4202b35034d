package clusters_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/clusters"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	group = "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/rg1"
	prod  = group + "/providers/Microsoft.ContainerService/managedClusters/prod"
	api   = "?api-version=2025-01-01"
)

// anybody is a Verifier that takes every token for one of the system's: decisions
// are tested elsewhere.
type anybody struct{}

func (anybody) Verify(context.Context, string, []string) (access.Principal, error) {
	c, _ := access.From(access.AsSystem(context.Background(), "test"))
	return c.Principal, nil
}

type server struct {
	*azureapi.API
	now time.Time
}

func newServer(t *testing.T) *server {
	t.Helper()
	backend := store.NewMemory()
	t.Cleanup(func() { backend.Close() })
	st, err := store.New(t.Context(), backend)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.jsonl"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Close)
	s := &server{now: time.Date(2026, 11, 29, 8, 0, 0, 0, time.UTC)}
	now := func() time.Time { return s.now }
	gate := access.NewGate(access.Config{Store: st, Recorder: log})
	s.API, err = azureapi.New(azureapi.Config{
		Endpoints: azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443"},
		Routes:    clusters.Routes(clusters.Config{Clusters: cluster.New(cluster.Config{Store: st, Gate: gate, Now: now, CanRotate: func() error { return nil }}), Now: now}),
		Verifier:  anybody{}, Tenant: "t", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// call makes a call that must be answered with a status.
func (s *server) call(t *testing.T, status int, method, path, body string) map[string]any {
	t.Helper()
	r := httptest.NewRequest(method, "https://arm.keyfleet.internal:8443"+path, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer t")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	if w.Code != status {
		t.Fatalf("%s %s: %d, want %d: %s", method, path, w.Code, status, w.Body)
	}
	var out map[string]any
	if w.Body.Len() > 0 {
		if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
	}
	return out
}

const kubeconfig = `{"apiVersion":"v1","kind":"Config","current-context":"x","contexts":[{"name":"x","context":{"cluster":"c","user":"u"}}],
  "clusters":[{"name":"c","cluster":{"server":"https://10.0.0.1:6443"}}],"users":[{"name":"u","user":{"token":"t0ken-of-the-manager"}}]}`

func register(t *testing.T, s *server, status int, extra string) map[string]any {
	t.Helper()
	text, err := json.Marshal(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	return s.call(t, status, "PUT", prod+api, `{"location":"West US 2","properties":{"kubeconfig":`+string(text)+extra+`}}`)
}

// TestBodies follows a cluster from its registration to its end, body by body.
func TestBodies(t *testing.T) {
	s := newServer(t)
	golden := func(what string, got map[string]any, want string) {
		t.Helper()
		var w map[string]any
		if err := json.Unmarshal([]byte(want), &w); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(w, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", what, d)
		}
	}
	golden("registered", register(t, s, 201, ""), `{
	  "id": "`+prod+`", "name": "prod", "type": "Microsoft.ContainerService/managedClusters", "location": "westus2",
	  "properties": {"provisioningState": "Creating", "fqdn": "10.0.0.1", "observed": {"server": "https://10.0.0.1:6443", "nodes": 0, "ready": 0,
	    "reason": "no manager has looked at the cluster yet; keyfleet-connector manager does"}}}`)

	work := s.call(t, 200, "GET", "/keyfleet/v1/clusters/work", "")["clusters"].([]any)
	if len(work) != 1 || work[0].(map[string]any)["id"] != prod || work[0].(map[string]any)["login"] == "" {
		t.Errorf("work: %v", work)
	}
	k := s.call(t, 200, "POST", "/keyfleet/v1"+prod+"/kubeconfig", "")
	if text, err := base64.StdEncoding.DecodeString(k["value"].(string)); err != nil || !strings.Contains(string(text), "t0ken-of-the-manager") {
		t.Errorf("the manager's kubeconfig: %s, %v", text, err)
	}
	s.call(t, 204, "PUT", "/keyfleet/v1"+prod+"/observation",
		`{"version":"v1.36.3","nodes":4,"ready":3,"issuer":"https://kubernetes.default.svc","keySet":{"keys":[]},"webhook":true,"missingPermissions":["get csidrivers"]}`)
	golden("seen", s.call(t, 200, "GET", prod+api, ""), `{
	  "id": "`+prod+`", "name": "prod", "type": "Microsoft.ContainerService/managedClusters", "location": "westus2",
	  "properties": {"provisioningState": "Succeeded", "powerState": {"code": "Running"}, "fqdn": "10.0.0.1", "kubernetesVersion": "1.36.3", "currentKubernetesVersion": "1.36.3",
	    "oidcIssuerProfile": {"enabled": true, "issuerURL": "https://kubernetes.default.svc"}, "securityProfile": {"workloadIdentity": {"enabled": true}},
	    "addonProfiles": {"azureKeyvaultSecretsProvider": {"enabled": false}},
	    "observed": {"time": "2026-11-29T08:00:00Z", "server": "https://10.0.0.1:6443", "nodes": 4, "ready": 3, "missingPermissions": ["get csidrivers"]}}}`)

	s.now = s.now.Add(2 * time.Minute)
	got := s.call(t, 200, "GET", group+"/providers/microsoft.containerservice/managedclusters"+api, "")["value"].([]any)[0].(map[string]any)["properties"].(map[string]any)
	if got["provisioningState"] != "Failed" || got["powerState"] != nil || got["observed"].(map[string]any)["reason"] != "no manager has looked at the cluster since 2026-11-29T08:00:00Z" {
		t.Errorf("nobody looks any more: %v", got)
	}
	user := s.call(t, 200, "POST", prod+"/listClusterUserCredential"+api, "")["kubeconfigs"].([]any)[0].(map[string]any)
	if text, err := base64.StdEncoding.DecodeString(user["value"].(string)); err != nil || user["name"] != "clusterUser" || !strings.Contains(string(text), "t0ken-of-the-manager") {
		t.Errorf("the user's kubeconfig: %v, %v", user, err)
	}
	if tags := s.call(t, 200, "PATCH", prod+api, `{"tags":{"a":"b"}}`)["tags"]; tags.(map[string]any)["a"] != "b" {
		t.Errorf("tags: %v", tags)
	}
	s.call(t, 200, "DELETE", prod+api, "")
	s.call(t, 204, "DELETE", prod+api, "")
	s.call(t, 404, "GET", prod+api, "")
	s.call(t, 404, "PUT", "/keyfleet/v1"+prod+"/observation", `{"problem":"gone"}`)
}

// TestWhatIsRefused: a body that asks for more than a registration is refused with
// the member's name; one that a client got and sends back is not.
func TestWhatIsRefused(t *testing.T) {
	s := newServer(t)
	for extra, target := range map[string]string{
		`,"agentPoolProfiles":[{"name":"a"}]`: "properties.agentPoolProfiles",
		`,"dnsPrefix":"x"`:                    "properties.dnsPrefix",
		`,"networkProfile":{}`:                "properties.networkProfile",
	} {
		e := register(t, s, 400, extra)["error"].(map[string]any)
		if e["code"] != "InvalidRequestContent" || e["target"] != target {
			t.Errorf("%s: %v", extra, e)
		}
	}
	register(t, s, 201, "")
	back := s.call(t, 200, "GET", prod+api, "")
	text, err := json.Marshal(back)
	if err != nil {
		t.Fatal(err)
	}
	s.call(t, 200, "PUT", prod+api, string(text))
	e := s.call(t, 400, "PUT", strings.Replace(prod, "prod", "new", 1)+api, `{"location":"westus2","properties":{}}`)["error"].(map[string]any)
	if fix, err := json.Marshal(e["details"]); err != nil || e["code"] != "MissingKubeconfig" || !strings.Contains(string(fix), "keyfleet cluster register new") {
		t.Errorf("without a kubeconfig: %v", e)
	}
	e = s.call(t, 400, "PUT", prod+api, `{"location":"westus2","properties":{"kubeconfig":"current-context: x\nusers: [{name: u, user: {exec: {command: rm}}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]"}}`)["error"].(map[string]any)
	if e["code"] != "InvalidKubeconfig" || e["target"] != "properties.kubeconfig.users[u].exec" {
		t.Errorf("a kubeconfig that runs a program: %v", e)
	}
	e = s.call(t, 400, "PUT", "/keyfleet/v1"+prod+"/observation", `{"version":"v1","ready":2}`)["error"].(map[string]any)
	if e["code"] != "InvalidObservation" {
		t.Errorf("two of no nodes: %v", e)
	}
}
