package servicelinker_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/servicelinker"
	"keyfleet.dev/keyfleet/internal/connector"
)

type anybody struct{}

func (anybody) Verify(context.Context, string, []string) (access.Principal, error) {
	return access.Principal{Kind: access.Application, ObjectID: "o"}, nil
}

func newServer(t testing.TB) *azureapi.API {
	t.Helper()
	catalogue, err := connector.LoadCatalogue()
	if err != nil {
		t.Fatal(err)
	}
	api, err := azureapi.New(azureapi.Config{
		Endpoints: azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443"}, Routes: servicelinker.Routes(servicelinker.Config{Catalogue: catalogue}),
		Verifier: anybody{}, Tenant: "t", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return api
}

const path = "https://arm.keyfleet.internal:8443/providers/Microsoft.ServiceLinker/configurationNames?api-version=2024-04-01"

// get makes a call and decodes the answer.
func get(t testing.TB, api *azureapi.API, url string) (status int, body map[string]any) {
	t.Helper()
	r := httptest.NewRequest("GET", url, nil)
	r.Header.Set("Authorization", "Bearer t")
	w := httptest.NewRecorder()
	api.ServeHTTP(w, r)
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatalf("%s: %s", url, w.Body)
	}
	return w.Code, body
}

func filtered(filter string) string { return path + "&$filter=" + url.QueryEscape(filter) }

func TestConfigurationNames(t *testing.T) {
	api := newServer(t)
	_, body := get(t, api, filtered("TargetService eq 'MICROSOFT.KEYVAULT/VAULTS' and AuthType eq 'servicePrincipalSecret' and ClientType eq 'python'"))
	var want map[string]any
	if err := json.Unmarshal([]byte(`{"value":[{"properties":{"targetService":"Microsoft.KeyVault/vaults","authType":"servicePrincipalSecret","clientType":"python","names":[
	  {"value":"AZURE_KEYVAULT_CLIENTID","description":"{clientId}","required":true},
	  {"value":"AZURE_KEYVAULT_CLIENTSECRET","description":"{clientSecret} (a credential)","required":true},
	  {"value":"AZURE_KEYVAULT_RESOURCEENDPOINT","description":"{endpoint}","required":true},
	  {"value":"AZURE_KEYVAULT_SCOPE","description":"{scope}","required":true},
	  {"value":"AZURE_KEYVAULT_TENANTID","description":"{tenantId}","required":true}]}}]}`), &want); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, body); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	// All of them, page by page; none is for identities that clusters do not have.
	seen, pages := map[string]bool{}, 0
	for next := path; next != ""; pages++ {
		status, body := get(t, api, next)
		if status != 200 {
			t.Fatalf("%s: %d %v", next, status, body)
		}
		for _, v := range body["value"].([]any) {
			p := v.(map[string]any)["properties"].(map[string]any)
			if p["authType"] == "" || len(p["names"].([]any)) == 0 {
				t.Errorf("%v", p)
			}
			text, err := json.Marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			if seen[string(text)] {
				t.Errorf("listed twice: %s", text)
			}
			seen[string(text)] = true
		}
		next, _ = body["nextLink"].(string)
	}
	if len(seen) < 400 || pages < 4 {
		t.Errorf("%d combinations on %d pages", len(seen), pages)
	}
	for _, filter := range []string{"TargetService", "TargetService eq X", "TargetService ne 'X'", "Target eq 'X'", "ClientType eq 'go' or ClientType eq 'java'", "ClientType eq 'go' and", "ClientType eq 'go' and ClientType eq 'java'", "ClientType eq 'go"} {
		status, body := get(t, api, filtered(filter))
		if e, _ := body["error"].(map[string]any); status != 400 || e["code"] != "InvalidFilter" {
			t.Errorf("%s: %d %v", filter, status, body)
		}
	}
	if status, body := get(t, api, filtered("ClientType eq 'cobol'")); status != 200 || len(body["value"].([]any)) != 0 {
		t.Errorf("a client that nobody has: %d %v", status, body)
	}
	if status, _ := get(t, api, path+"&$skipToken=x"); status != 400 {
		t.Errorf("a skip token that is none: %d", status)
	}
}

func FuzzFilter(f *testing.F) {
	api := newServer(f)
	f.Add("TargetService eq 'Microsoft.KeyVault/vaults' and ClientType eq 'go'")
	f.Add("a eq '' and")
	f.Fuzz(func(t *testing.T, filter string) {
		if status, body := get(t, api, filtered(filter)); status != 200 && status != 400 {
			t.Errorf("%q: %d %v", filter, status, body)
		}
	})
}
