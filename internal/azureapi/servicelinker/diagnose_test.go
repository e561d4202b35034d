package servicelinker_test

import (
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/api/kubernetes"
)

const (
	diagnosed    = planCluster + "/providers/Microsoft.ServiceLinker/linkers/db"
	theExtension = planCluster + "/providers/Microsoft.KubernetesConfiguration/extensions/sc-extension"
)

// extension makes a call to an extension, which has api-versions of its own.
func (p planned) extension(status int, method, path, body string) *httptest.ResponseRecorder {
	p.t.Helper()
	return p.call(status, method, "https://arm.keyfleet.internal:8443"+path+"?api-version=2023-05-01", body)
}

// answered is the operation that an answer speaks of.
func (p planned) answered(w *httptest.ResponseRecorder) (status string, d kubernetes.Diagnosis) {
	p.t.Helper()
	u := w.Header().Get("Azure-AsyncOperation")
	if u == "" || w.Header().Get("Location") == "" || w.Header().Get("Retry-After") != "1" {
		p.t.Fatalf("the answer does not say where to look: %v", w.Header())
	}
	var op struct {
		Status     string
		Properties kubernetes.Diagnosis
	}
	if err := json.Unmarshal(p.call(200, "GET", u, "").Body.Bytes(), &op); err != nil {
		p.t.Fatal(err)
	}
	return op.Status, op.Properties
}

// TestDiagnose: the life of a question, as client and manager see it.
func TestDiagnose(t *testing.T) {
	p := newPlanned(t)
	p.call(404, "POST", diagnosed+"/diagnose", "")
	p.call(201, "PUT", diagnosed, `{"properties":{"targetService":{"type":"AzureResource","id":"`+planServer+`/databases/shop"},"authInfo":{"authType":"secret"},"clientType":"go"}}`)
	asked := p.call(202, "POST", diagnosed+"/diagnose", "")
	if status, _ := p.answered(asked); status != "Accepted" {
		t.Errorf("nobody has answered, and it is %s", status)
	}
	report := "https://arm.keyfleet.internal:8443/keyfleet/v1" + diagnosed + "/sight"
	p.call(404, "PUT", report, `{"uid":"another"}`)
	p.call(400, "PUT", report, `{"uid":"another","unknown":1}`)

	asked = p.extension(202, "POST", theExtension+"/diagnose", "")
	if status, _ := p.answered(asked); status != "Accepted" {
		t.Errorf("nobody has answered, and it is %s", status)
	}
	p.extension(404, "POST", strings.Replace(theExtension, "sc-extension", "flux", 1)+"/diagnose", "")
}

// TestWhatTheSurfaceRefuses: requests that are refused before anything is looked up,
// in the words of the documentation and of the clients.
func TestWhatTheSurfaceRefuses(t *testing.T) {
	p := newPlanned(t)
	for name, c := range map[string]struct{ path, body, code, says string }{
		"a server without a database": {
			diagnosed, `{"properties":{"targetService":{"type":"AzureResource","id":"` + planServer + `"},"authInfo":{"authType":"secret"}}}`,
			"TargetTypeNotSupported", "Target resource type MICROSOFT.DBFORPOSTGRESQL/FLEXIBLESERVERS is not supported.",
		},
		"a secret of a vault that is not named": {
			diagnosed, `{"properties":{"targetService":{"type":"AzureResource","id":"` + planServer + `/databases/d"},"authInfo":{"authType":"secret","secretInfo":{"secretType":"keyVaultSecretReference","name":"n"}}}}`,
			"InvalidArgument", "--vault-id must be provided to use secret-name",
		},
		"an extension for one namespace": {
			theExtension, `{"properties":{"extensionType":"microsoft.servicelinker.connection","scope":{"namespace":{"targetNamespace":"x"}}}}`,
			"InvalidArgument", "The extension is for the whole cluster, in the namespace sc-system.",
		},
		"a secret in the extension": {
			theExtension, `{"properties":{"extensionType":"microsoft.servicelinker.connection","configurationProtectedSettings":{"resources":"x"}}}`,
			"InvalidArgument", "The extension has no protected setting resources",
		},
	} {
		call := p.call
		if c.path == theExtension {
			call = p.extension
		}
		if text := call(400, "PUT", c.path, c.body).Body.String(); !strings.Contains(text, `"`+c.code+`"`) || !strings.Contains(text, c.says) {
			t.Errorf("%s: %s", name, text)
		}
	}
}
