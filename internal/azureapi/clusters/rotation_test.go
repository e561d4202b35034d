package clusters_test

import (
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/pki"
)

// ssh is the member that gives SSH access, with the comma before it.
func ssh(t *testing.T) string {
	t.Helper()
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	text, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	member, err := json.Marshal(map[string]string{"host": "cp1", "user": "ops", "privateKey": string(text), "knownHosts": "cp1 ssh-ed25519 AAAA"})
	if err != nil {
		t.Fatal(err)
	}
	return `,"ssh":` + string(member)
}

// TestRotateClusterCertificates: the recorded contract of a long operation of Azure's,
// on a server where nobody leads: it is accepted, and stays in progress.
func TestRotateClusterCertificates(t *testing.T) {
	s := newServer(t)
	register(t, s, 201, ssh(t))
	got := s.call(t, 200, "GET", prod+api, "")
	text, _ := json.Marshal(got)
	if strings.Contains(string(text), "PRIVATE") || strings.Contains(string(text), "AAAA") || !strings.Contains(string(text), `"ssh":{"host":"cp1","user":"ops"}`) {
		t.Fatalf("the cluster: %s", text)
	}
	s.call(t, 200, "PUT", prod+api, string(text)) // what a client got, it may send back

	post := func(body string) (status int, operation, answer string) {
		r := httptest.NewRequest("POST", "https://arm.keyfleet.internal:8443"+prod+"/rotateClusterCertificates"+api, strings.NewReader(body))
		r.Header.Set("Authorization", "Bearer t")
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if l := w.Header().Get("Location"); w.Code == 202 && l != w.Header().Get("Azure-AsyncOperation") {
			t.Errorf("Location is %s", l)
		}
		return w.Code, w.Header().Get("Azure-AsyncOperation"), w.Body.String()
	}
	status, operation, answer := post("")
	if status != 202 || operation == "" {
		t.Fatalf("%d: %s", status, answer)
	}
	if status, again, _ := post(""); status != 202 || again != operation {
		t.Errorf("the second time: %d, %s, want %s", status, again, operation)
	}
	if status, _, answer := post(`{"only":["leaves"]}`); status != 409 || !strings.Contains(answer, "a rotation of its certificates is running") {
		t.Errorf("another one beside it: %d: %s", status, answer)
	}
	for _, bad := range []string{`{"only":["x"]}`, `{"soak":"soon"}`, `{"force":true}`} {
		if status, _, answer := post(bad); status != 400 {
			t.Errorf("%s: %d: %s", bad, status, answer)
		}
	}
	op := s.call(t, 200, "GET", strings.TrimPrefix(operation, "https://arm.keyfleet.internal:8443"), "")
	if op["status"] != "InProgress" || op["percentComplete"] != 0.0 || op["resourceId"] != prod {
		t.Errorf("the operation: %v", op)
	}
	for _, path := range []string{prod + api, group + "/providers/Microsoft.ContainerService/managedClusters" + api} {
		text, _ := json.Marshal(s.call(t, 200, "GET", path, ""))
		if !strings.Contains(string(text), `"provisioningState":"Updating"`) {
			t.Errorf("GET %s: %s", path, text)
		}
	}
	s.call(t, 409, "DELETE", prod+api, "")
	s.call(t, 404, "GET", strings.Replace(strings.TrimPrefix(operation, "https://arm.keyfleet.internal:8443"), "operations/", "operations/x", 1), "")
}

// TestRotationNeedsSSH: the refusal has the command that mends it.
func TestRotationNeedsSSH(t *testing.T) {
	s := newServer(t)
	register(t, s, 201, "")
	text, _ := json.Marshal(s.call(t, 409, "POST", prod+"/rotateClusterCertificates"+api, ""))
	for _, want := range []string{"SSHAccessNotConfigured", "keyfleet cluster register prod --group rg1 --ssh-host HOST --ssh-user USER --ssh-key-file FILE"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the refusal does not say %q: %s", want, text)
		}
	}
}
