package servicelinker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/servicelinker"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

var update = flag.Bool("update", false, "write the golden files")

const (
	planGroup   = "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/rg1"
	planCluster = planGroup + "/providers/Microsoft.ContainerService/managedClusters/prod"
	planServer  = planGroup + "/providers/Microsoft.DBforPostgreSQL/flexibleServers/main"
	planVault   = planGroup + "/providers/Microsoft.KeyVault/vaults/sc-prod"
)

// outside is what connections know of the rest: a cluster that answers, a vault, and a
// server whose administrator gets in. Nothing here reaches the real ones, which
// package test/system does.
type outside struct{ secrets map[string]string }

func (outside) State(context.Context, arm.ID) (connector.ClusterState, error) {
	return connector.ClusterState{ID: planCluster, Location: "westus2", State: "Succeeded", Managed: true}, nil
}

func (outside) Ensure(context.Context, arm.ID, string) (string, error) { return planVault, nil }

func (outside) Default(context.Context, arm.ID) (string, bool, error) { return planVault, false, nil }
func (outside) MaySet(context.Context, connector.SecretRef) error     { return nil }
func (outside) MayGet(context.Context, connector.SecretRef) error     { return nil }
func (outside) Endpoint(context.Context, string) (string, bool)       { return "", false }
func (outside) Granted(context.Context, string, string) (bool, error) { return false, nil }
func (outside) Grant(context.Context, string, string) error           { return nil }
func (outside) Revoke(context.Context, string, string) error          { return nil }
func (o outside) Delete(_ context.Context, ref connector.SecretRef) error {
	delete(o.secrets, ref.Name)
	return nil
}

func (outside) Check(context.Context, connector.Reach) ([]string, error)          { return nil, nil }
func (outside) MayTrust(context.Context, string) error                            { return nil }
func (outside) Trust(context.Context, string, string, string, string) error       { return nil }
func (outside) Distrust(context.Context, string, string) error                    { return nil }
func (outside) Remove(context.Context, connector.Reach, string) ([]string, error) { return nil, nil }

func (o outside) Set(_ context.Context, ref connector.SecretRef, value string) (string, error) {
	o.secrets[ref.Name] = value
	return "1", nil
}

func (o outside) Get(_ context.Context, ref connector.SecretRef) (string, error) {
	return o.secrets[ref.Name], nil
}

func (outside) Find(context.Context, string, string) (connector.ManagedIdentity, error) {
	return connector.ManagedIdentity{}, fault.New(fault.NotFound, "ResourceNotFound", "There is no such identity.")
}

// logins makes none; Vaults and Maker both have an Ensure.
type logins struct{ outside }

func (logins) Ensure(context.Context, connector.Reach, string, connector.Login) error { return nil }
func (logins) Revoke(context.Context, connector.Reach, string, string) error          { return nil }
func (logins) Refused(context.Context, connector.Reach, connector.Login) error        { return nil }
func (logins) Prove(context.Context, connector.Reach, connector.Login) (time.Duration, error) {
	return 0, nil
}

// planned is a surface with a registered server.
type planned struct {
	t   testing.TB
	api *azureapi.API
}

func newPlanned(t testing.TB) planned {
	t.Helper()
	backend := store.NewMemory()
	t.Cleanup(func() { _ = backend.Close() })
	st, err := store.New(t.Context(), backend)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.jsonl"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Close)
	catalogue, err := connector.LoadCatalogue()
	if err != nil {
		t.Fatal(err)
	}
	err = st.Update(t.Context(), func(tx *store.Tx) error {
		return access.Grant(tx, access.Assignment{Name: "7d3b0c1e-9a0f-4f0e-8d6c-0f1d8c9a2b3c", Principal: someone, RoleID: access.Owner.ID, Scope: planGroup})
	})
	if err != nil {
		t.Fatal(err)
	}
	all := outside{map[string]string{}}
	connections := connector.New(connector.Config{
		Store: st, Gate: access.NewGate(access.Config{Store: st, Recorder: log}), Catalogue: catalogue, Clusters: all, Vaults: all, Identities: all, Maker: logins{all},
		Tenant: "t", Log: slog.New(slog.DiscardHandler),
	})
	api, err := azureapi.New(azureapi.Config{
		Endpoints: azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443"}, Verifier: owner{}, Tenant: "t", Log: slog.New(slog.DiscardHandler),
		Routes: servicelinker.Routes(servicelinker.Config{Catalogue: catalogue, Connections: connections}),
	})
	if err != nil {
		t.Fatal(err)
	}
	p := planned{t, api}
	p.call(201, "PUT", planServer, `{"location":"westus2","properties":{"fullyQualifiedDomainName":"db.example.org","administratorLogin":"admin","administratorLoginPassword":"pw"}}`)
	return p
}

const someone = "6f8dd4cb-2b1f-4cbe-a2f5-0c55a1a5c1f0"

type owner struct{}

func (owner) Verify(context.Context, string, []string) (access.Principal, error) {
	return access.Principal{Kind: access.Application, ObjectID: someone}, nil
}

// call makes a call; path is a resource id, or a URL that the server has given.
func (p planned) call(status int, method, path, body string) *httptest.ResponseRecorder {
	p.t.Helper()
	u := path
	if strings.HasPrefix(path, "/") {
		version := "2024-04-01"
		if strings.Contains(path, "flexibleServers") {
			version = "2024-08-01"
		}
		u = "https://arm.keyfleet.internal:8443" + path + "?api-version=" + version
	}
	r := httptest.NewRequest(method, u, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer t")
	w := httptest.NewRecorder()
	p.api.ServeHTTP(w, r)
	if w.Code != status {
		p.t.Fatalf("%s %s: %d %s, expected %d", method, path, w.Code, w.Body, status)
	}
	return w
}

// TestDryrunBody: the body of a dry run, byte for byte, and its life.
func TestDryrunBody(t *testing.T) {
	p := newPlanned(t)
	url := planCluster + "/providers/Microsoft.ServiceLinker/dryruns/first"
	body := `{"properties":{"parameters":{"actionName":"createOrUpdate","linkerName":"shop-db","targetService":{"type":"AzureResource","id":"` + planServer + `/databases/shop"},` +
		`"authInfo":{"authType":"secret"},"clientType":"django","scope":"shop","secretStore":{},"publicNetworkSolution":{},"configurationInfo":{}}}}`
	put := p.call(201, "PUT", url, body)
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, put.Body.Bytes(), "", "  "); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "dryrun.json")
	if *update {
		if err := os.WriteFile(golden, pretty.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), pretty.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	// The operation has ended by the time it is told.
	operation := p.call(200, "GET", put.Header().Get("Azure-AsyncOperation"), "")
	if !strings.Contains(operation.Body.String(), `"status":"Succeeded"`) || !strings.Contains(operation.Body.String(), url) {
		t.Errorf("%s", operation.Body)
	}
	if got := p.call(200, "GET", url, "").Body.String(); got != put.Body.String() {
		t.Errorf("GET shows something else:\n%s", got)
	}
	if got := p.call(200, "GET", strings.TrimSuffix(url, "/first"), "").Body.String(); !strings.Contains(got, `"name":"first"`) {
		t.Errorf("%s", got)
	}
	if got := p.call(200, "PUT", url, put.Body.String()); got.Body.String() != put.Body.String() {
		t.Errorf("what was shown cannot be sent back:\n%s", got.Body)
	}
	// Another client type; what was not said stays.
	changed := p.call(200, "PATCH", url, `{"properties":{"parameters":{"clientType":"go","configurationInfo":{"customizedKeys":{"AZURE_POSTGRESQL_CONNECTIONSTRING":"DB"}}}}}`)
	for _, want := range []string{`"clientType":"go"`, `"name":"DB"`, `"scope":"shop"`, `"linkerName":"shop-db"`} {
		if !strings.Contains(changed.Body.String(), want) {
			t.Errorf("PATCH does not lead to %s:\n%s", want, changed.Body)
		}
	}
	if changed.Header().Get("Azure-AsyncOperation") == "" {
		t.Error("PATCH tells no operation")
	}
	p.call(200, "DELETE", url, "")
	p.call(204, "DELETE", url, "")
	p.call(404, "GET", url, "")
	p.call(404, "PATCH", url, `{}`)
	// Nothing was made.
	if got := p.call(200, "GET", planCluster+"/providers/Microsoft.ServiceLinker/linkers", "").Body.String(); got != `{"value":[]}`+"\n" && got != `{"value":[]}` {
		t.Errorf("%s", got)
	}
}

// TestDryrunOfARequestThatIsNotUnderstood: target and authentication are both named,
// and what is wrong beside them.
func TestDryrunOfARequestThatIsNotUnderstood(t *testing.T) {
	p := newPlanned(t)
	const secret = "canary-0815"
	got := p.call(201, "PUT", planCluster+"/providers/Microsoft.ServiceLinker/dryruns/bad", `{"properties":{"parameters":{"actionName":"createOrUpdate","linkerName":"Upper",
		"targetService":{"type":"AzureResource","id":"`+planServer+`","values":{"password":"`+secret+`"}},"authInfo":{"authType":"secret","secretInfo":{"secretType":"magic","value":"`+secret+`"}}}}}`).Body.String()
	for _, want := range []string{
		`"code":"InvalidResourceName"`, `"code":"TargetTypeNotSupported","message":"Target resource type MICROSOFT.DBFORPOSTGRESQL/FLEXIBLESERVERS is not supported."`,
		`"message":"The secret type 'magic' is not known."`, `"status":400`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in\n%s", want, got)
		}
	}
	if strings.Contains(got, secret) {
		t.Errorf("a secret shows: %s", got)
	}
	for body, code := range map[string]string{
		`{"properties":{"parameters":{"actionName":"drop"}}}`: "InvalidArgument",
		`{"properties":{"parameters":{"colour":"red"}}}`:      "InvalidRequestContent",
		``: "InvalidRequestContent",
	} {
		if got := p.call(400, "PUT", planCluster+"/providers/Microsoft.ServiceLinker/dryruns/bad", body).Body.String(); !strings.Contains(got, code) {
			t.Errorf("%s: %s", body, got)
		}
	}
}

// TestPatchOfALinker: a PATCH says what is different; a secret that was given stays.
func TestPatchOfALinker(t *testing.T) {
	p := newPlanned(t)
	url := planCluster + "/providers/Microsoft.ServiceLinker/linkers/db"
	p.call(404, "PATCH", url, `{"properties":{"clientType":"go"}}`)
	p.call(201, "PUT", url, `{"properties":{"targetService":{"type":"AzureResource","id":"`+planServer+`/databases/shop"},"clientType":"go","scope":"shop",
		"authInfo":{"authType":"secret","name":"app","secretInfo":{"secretType":"rawValue","value":"s3cret"}},"configurationInfo":{"customizedKeys":{"AZURE_POSTGRESQL_CONNECTIONSTRING":"DB"}}}}`)
	got := p.call(200, "PATCH", url, `{"properties":{"clientType":"python"}}`)
	for _, want := range []string{`"clientType":"python"`, `"name":"app"`, `"scope":"shop"`, `"AZURE_POSTGRESQL_CONNECTIONSTRING":"DB"`} {
		if !strings.Contains(got.Body.String(), want) {
			t.Errorf("PATCH does not lead to %s:\n%s", want, got.Body)
		}
	}
	if got.Header().Get("Azure-AsyncOperation") == "" || strings.Contains(got.Body.String(), "s3cret") {
		t.Errorf("%v %s", got.Header(), got.Body)
	}
	if got := p.call(200, "PATCH", url, `{"properties":{"configurationInfo":null}}`).Body.String(); strings.Contains(got, "customizedKeys") {
		t.Errorf("null does not remove: %s", got)
	}
	p.call(200, "PATCH", url, `{"properties":{"authInfo":{"secretInfo":{"value":"another"}}}}`)
	p.call(200, "PATCH", url, `{}`)
	for body, code := range map[string]string{
		`{"properties":{"scope":"elsewhere"}}`:                 "PropertyChangeNotAllowed",
		`{"properties":{"clientTyp":"go"}}`:                    "InvalidRequestContent",
		`{"properties":{"clientType":"go","clientType":"go"}}`: "InvalidRequestContent",
		`[]`:                                    "InvalidRequestContent",
		`{"properties":{"clientType":"cobol"}}`: "InvalidArgument",
	} {
		status := 400
		if code == "PropertyChangeNotAllowed" {
			status = 409
		}
		if got := p.call(status, "PATCH", url, body).Body.String(); !strings.Contains(got, code) {
			t.Errorf("%s: %s", body, got)
		}
	}
}

// TestGenerateConfigurations answers like listConfigurations, with other names.
func TestGenerateConfigurations(t *testing.T) {
	p := newPlanned(t)
	url := planCluster + "/providers/Microsoft.ServiceLinker/linkers/db"
	p.call(201, "PUT", url, `{"properties":{"targetService":{"type":"AzureResource","id":"`+planServer+`/databases/shop"},"clientType":"django","authInfo":{"authType":"secret"}}}`)
	if a, b := p.call(200, "POST", url+"/generateConfigurations", "").Body.String(), p.call(200, "POST", url+"/listConfigurations", "").Body.String(); a != b {
		t.Errorf("without a body:\n%s\n%s", a, b)
	}
	got := p.call(200, "POST", url+"/generateConfigurations", `{"action":"enable","customizedKeys":{"AZURE_POSTGRESQL_HOST":"DB_HOST"},"additionalConfigurations":{"LOG_LEVEL":"debug"}}`).Body.String()
	for _, want := range []string{`{"name":"DB_HOST","value":"db.example.org","configType":"Default"}`, `{"name":"LOG_LEVEL","value":"debug","configType":"Default"}`, `"AZURE_POSTGRESQL_USER"`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in %s", want, got)
		}
	}
	if strings.Contains(got, "AZURE_POSTGRESQL_HOST") {
		t.Errorf("%s", got)
	}
	for body, what := range map[string]string{
		`{"configurationStore":{"appConfigurationId":"/x"}}`:         "configurationStore",
		`{"daprProperties":{"version":"v1"}}`:                        "daprProperties",
		`{"additionalConnectionStringProperties":{"a":"b"}}`:         "additionalConnectionStringProperties",
		`{"action":"optOut"}`:                                        "optOut",
		`{"customizedKeys":{"NONE":"X"}}`:                            "NONE",
		`{"additionalConfigurations":{"AZURE_POSTGRESQL_HOST":"x"}}`: "AZURE_POSTGRESQL_HOST",
	} {
		if got := p.call(400, "POST", url+"/generateConfigurations", body).Body.String(); !strings.Contains(got, what) {
			t.Errorf("%s: %s", body, got)
		}
	}
}
