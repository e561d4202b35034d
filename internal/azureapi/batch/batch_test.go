package batch_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/batch"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	sub     = "042998e4-36dc-4b7d-8ce3-a7a2c4877d33"
	arm     = "https://arm.keyfleet.internal:8443"
	data    = "https://acct1.westus2.batch.keyfleet.internal:8443"
	account = "/subscriptions/" + sub + "/resourceGroups/ACR/providers/Microsoft.Batch/batchAccounts/acct1"
	mgmt    = "?api-version=2021-01-01"
	plane   = "?api-version=2021-06-01.14.0"
)

// world is an edge over a real Fleet, with doubles where other capabilities would be.
type world struct {
	t        *testing.T
	api      *azureapi.API
	fleet    *pool.Fleet
	store    *store.Store
	provider *provider
	clientID string // of the one identity
	verdict  pool.Verdict
}

type records struct{}

func (records) Append(context.Context, access.Record) error { return nil }
func (records) InTx(*store.Tx, access.Record) error         { return nil }

type verifier struct{}

func (verifier) Verify(_ context.Context, token string, _ []string) (access.Principal, error) {
	if token == "" || token == "bad" {
		return access.Principal{}, fault.New(fault.Unauthenticated, "", "The token is not valid.")
	}
	return access.Principal{Kind: access.Application, Tenant: "t", ObjectID: token, ClientID: token}, nil
}

func (w *world) Resolve(_ context.Context, id string) (pool.Identity, error) {
	return pool.Identity{ResourceID: id, Tenant: "t", ClientID: w.clientID, ObjectID: "o1", Name: "testumaforpools"}, nil
}

func (w *world) Check(context.Context, access.Principal, string) (pool.Verdict, error) {
	return w.verdict, nil
}

func (w *world) Find(_, _, _ string, _ bool) (string, node.Package, error) {
	return "3.0.1", node.Package{SHA256: strings.Repeat("0", 64), Size: 1}, nil
}

type provider struct {
	mu    sync.Mutex
	nodes map[string]pool.Token
}

func (p *provider) Name() string          { return "double" }
func (p *provider) Offers(os string) bool { return os == "linux" }
func (p *provider) Start(_ context.Context, n pool.NodeSpec) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.nodes[n.ID] = n.Token
	return nil
}

func (p *provider) Stop(_ context.Context, id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.nodes, id)
	return nil
}
func (p *provider) Restart(context.Context, string) error        { return nil }
func (p *provider) Reimage(context.Context, pool.NodeSpec) error { return nil }
func (p *provider) List(context.Context) ([]pool.ProviderNode, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []pool.ProviderNode
	for id := range p.nodes {
		out = append(out, pool.ProviderNode{ID: id, Running: true})
	}
	return out, nil
}

func newWorld(t *testing.T) *world {
	t.Helper()
	m := store.NewMemory()
	t.Cleanup(func() { m.Close() })
	s, err := store.New(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, store: s, provider: &provider{nodes: map[string]pool.Token{}}, clientID: "b9f6dd56-d2d6-4967-99d7-8062d56fd84c", verdict: pool.Verdict{Answer: "yes"}}
	w.assign("owner", access.Owner.ID, "/")
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	w.fleet = pool.New(pool.Config{
		Store: s, Gate: access.NewGate(access.Config{Store: s, Recorder: records{}}), Identities: w, Packages: w, Secrets: w, Providers: []pool.Provider{w.provider},
	})
	w.api, err = azureapi.New(azureapi.Config{
		Endpoints: azureapi.Endpoints{Domain: "keyfleet.internal", Port: ":8443", Aliases: []azureapi.Alias{{Suffix: "batch.azure.com", Surface: azureapi.Batch}}},
		Routes:    batch.Routes(batch.Config{Fleet: w.fleet, CAHash: "sha256:00"}), Verifier: verifier{}, Tenant: "t", Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	if a := w.do("PUT", arm+account+mgmt, `{"location":"westus2"}`); a.status != http.StatusAccepted {
		t.Fatalf("creating the account: %+v", a)
	}
	return w
}

func (w *world) assign(oid, role, scope string) {
	w.t.Helper()
	err := w.store.Update(w.t.Context(), func(tx *store.Tx) error {
		o := &store.Object[access.Assignment, struct{}]{Spec: access.Assignment{Name: oid, Scope: scope, Principal: oid, RoleID: role}}
		o.ID = oid + "/" + oid
		return access.Assignments.Insert(tx, o)
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// control runs the controllers until the test ends.
func (w *world) control() {
	ctx, cancel := context.WithCancel(w.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.fleet.PoolController().Run(ctx, w.store) })
	wg.Go(func() { _ = w.fleet.NodeController().Run(ctx, w.store) })
	w.t.Cleanup(func() { cancel(); wg.Wait() })
}

// answer is what a request got.
type answer struct {
	status int
	header http.Header
	text   string
	body   map[string]any
}

// at walks into the body: at("properties", "vmSize").
func (a answer) at(path ...any) any {
	var v any = a.body
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			l, _ := v.([]any)
			if p >= len(l) {
				return nil
			}
			v = l[p]
		}
	}
	return v
}

func (w *world) do(method, url, body string, headers ...string) answer {
	w.t.Helper()
	r := httptest.NewRequest(method, url, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer owner")
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	rec := httptest.NewRecorder()
	w.api.ServeHTTP(rec, r)
	a := answer{status: rec.Code, header: rec.Result().Header, text: rec.Body.String()}
	_ = json.Unmarshal(rec.Body.Bytes(), &a.body)
	return a
}

// until asks again until ok, for at most ten seconds.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%s did not come", what)
		}
	}
}

func documented(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "testdata", "requests", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDocumentedLinuxBodies(t *testing.T) {
	for name, client := range map[string]string{
		"000-put-pool-linux.json": "b9f6dd56-d2d6-4967-99d7-8062d56fd84c",
		"001-put-pool-linux.json": "885b1a3d-f13c-4030-afcf-9f05044d78dc",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.clientID = client
			body := documented(t, name)
			url := arm + account + "/pools/Test" + mgmt
			put := w.do("PUT", url, body)
			if put.status != http.StatusOK { // never 201: clients take it for a failure
				t.Fatalf("PUT: %d %s", put.status, put.text)
			}
			if put.at("properties", "allocationState") != "Resizing" || put.at("properties", "provisioningState") != "Succeeded" {
				t.Errorf("the PUT answers %v, %v", put.at("properties", "allocationState"), put.at("properties", "provisioningState"))
			}
			etag := put.header.Get("ETag")
			if !strings.HasPrefix(etag, `W/"0x`) || put.at("etag") != etag {
				t.Errorf("ETag %s, etag %v", etag, put.at("etag"))
			}
			get := w.do("GET", url, "")
			if get.status != http.StatusOK || get.text != put.text {
				t.Errorf("GET: %d, not as the PUT answered: %s", get.status, cmp.Diff(put.body, get.body))
			}
			covers(t, "", sent(t, body), get.body)
			if strings.Contains(get.text, "protectedSettings") {
				t.Error("protected settings are answered")
			}
			again := w.do("PUT", url, body)
			if again.status != http.StatusOK || again.header.Get("ETag") != etag {
				t.Errorf("the same PUT again: %d, ETag %s after %s", again.status, again.header.Get("ETag"), etag)
			}
			back := w.do("PUT", url, get.text) // what was answered, sent back
			if back.status != http.StatusOK || back.header.Get("ETag") != etag {
				t.Errorf("the answer sent back: %d %s", back.status, back.text)
			}
			var full map[string]any
			if err := json.Unmarshal([]byte(body), &full); err != nil {
				t.Fatal(err)
			}
			patch, err := json.Marshal(map[string]any{"properties": map[string]any{
				"deploymentConfiguration": full["properties"].(map[string]any)["deploymentConfiguration"], "metadata": []any{map[string]any{"name": "a", "value": "b"}},
			}})
			if err != nil {
				t.Fatal(err)
			}
			if p := w.do("PATCH", url, string(patch)); p.status != http.StatusOK || p.at("properties", "metadata", 0, "name") != "a" {
				t.Errorf("a PATCH that sends the deployment configuration back unchanged: %d %s", p.status, p.text)
			}
		})
	}
}

// sent is a request body without what is not answered.
func sent(t *testing.T, body string) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(body), &m); err != nil {
		t.Fatal(err)
	}
	delete(m, "name") // the path names the pool
	vm := m["properties"].(map[string]any)["deploymentConfiguration"].(map[string]any)["virtualMachineConfiguration"].(map[string]any)
	delete(vm["extensions"].([]any)[0].(map[string]any), "protectedSettings")
	return m
}

// covers checks that got has everything that want has, with the same values.
func covers(t *testing.T, path string, want, got any) {
	t.Helper()
	switch v := want.(type) {
	case map[string]any:
		g, _ := got.(map[string]any)
		for k := range v {
			covers(t, path+"."+k, v[k], g[k])
		}
	case []any:
		g, _ := got.([]any)
		if len(g) != len(v) {
			t.Errorf("%s has %d elements, was sent with %d", path, len(g), len(v))
			return
		}
		for i := range v {
			covers(t, path, v[i], g[i])
		}
	default:
		if want != got {
			t.Errorf("%s is %v, was sent as %v", path, got, want)
		}
	}
}

func TestDocumentedWindowsBodiesAreNotJSON(t *testing.T) {
	for name, want := range map[string][]string{
		// The comma after the extension's settings object, its last member.
		"000-put-pool-windows.json": {"line 41, column 26", "','", "expected no comma"},
		// The URL is taken for a property name, and no colon follows.
		"001-put-pool-windows.json": {"line 32, column 41", "expected ':' and a value after the property name"},
	} {
		w := newWorld(t)
		a := w.do("PUT", arm+account+"/pools/test2"+mgmt, documented(t, name))
		message, _ := a.at("error", "message").(string)
		if a.status != http.StatusBadRequest || a.at("error", "code") != "InvalidRequestContent" {
			t.Errorf("%s: %d %s", name, a.status, a.text)
		}
		for _, s := range want {
			if !strings.Contains(message, s) {
				t.Errorf("%s: %q does not say %q", name, message, s)
			}
		}
		if g := w.do("GET", arm+account+"/pools/test2"+mgmt, ""); g.status != http.StatusNotFound {
			t.Errorf("%s: something was created: %d", name, g.status)
		}
	}
}

func TestMendedWindowsBodyIsAcceptedAndItsResizeErrorSaysWhy(t *testing.T) {
	w := newWorld(t)
	w.control()
	body := strings.NewReplacer("},\n                    }", "}\n                    }", "},\n    },", "}\n    },").Replace(documented(t, "000-put-pool-windows.json"))
	if a := w.do("PUT", arm+account+"/pools/win"+mgmt, body); a.status != http.StatusOK {
		t.Fatalf("%d %s", a.status, a.text)
	}
	var a answer
	w.until("the end of the resize", func() bool {
		a = w.do("GET", arm+account+"/pools/win"+mgmt, "")
		return a.at("properties", "allocationState") == "Steady"
	})
	message, _ := a.at("properties", "resizeOperationStatus", "errors", 0, "message").(string)
	if !strings.Contains(message, "No provider of this server offers Windows nodes") {
		t.Errorf("resize error: %q", message)
	}
}

// node brings a pool of one node up and lets its agent report.
func (w *world) node(body, status, message string) string {
	w.t.Helper()
	w.control()
	if a := w.do("PUT", arm+account+"/pools/test1"+mgmt, body); a.status != http.StatusOK {
		w.t.Fatalf("PUT: %d %s", a.status, a.text)
	}
	var id string
	w.until("the node", func() bool {
		l := w.do("GET", data+"/pools/test1/nodes"+plane, "")
		id, _ = l.at("value", 0, "id").(string)
		return l.at("value", 0, "state") == "starting"
	})
	w.provider.mu.Lock()
	token := w.provider.nodes[id].Reveal()
	w.provider.mu.Unlock()
	if _, err := w.fleet.Enrol(w.t.Context(), node.EnrolRequest{Token: token, OS: "linux"}, "k"); err != nil {
		w.t.Fatal(err)
	}
	g, err := w.fleet.Goal(w.t.Context(), id)
	if err != nil {
		w.t.Fatal(err)
	}
	err = w.fleet.Report(w.t.Context(), id, node.StatusReport{Revision: g.Revision, Agent: "1.0", BootID: "b", Booted: time.Now(), Extensions: []node.ExtensionStatus{{
		Name: g.Extensions[0].Name, Status: status, Message: message, Code: 9, Substatus: []node.Substatus{{Name: "hook", Status: "success"}},
	}}})
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

func TestExtensionAnswerHasTheMembersOfTheDocumentedOne(t *testing.T) {
	w := newWorld(t)
	w.clientID = "885b1a3d-f13c-4030-afcf-9f05044d78dc"
	id := w.node(documented(t, "001-put-pool-linux.json"), "success", "Successfully started Key Vault extension service. 2026-11-21T10:00:00Z")
	a := w.do("GET", data+"/pools/test1/nodes/"+id+"/extensions/secretext?api-version=2010-01-01", "")
	if a.status != http.StatusOK {
		t.Fatalf("%d %s", a.status, a.text)
	}
	var want map[string]any
	if err := json.Unmarshal([]byte(documented(t, "001-get-node-extension-response.json")), &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(shape(want), shape(a.body)); diff != "" {
		t.Errorf("members, nesting or types differ from the documented answer:\n%s", diff)
	}
	same := [][]any{
		{"instanceView", "statuses", 0, "code"},
		{"instanceView", "statuses", 0, "level"},
		{"instanceView", "statuses", 0, "displayStatus"},
		{"vmExtension", "publisher"},
		{"vmExtension", "type"},
		{"vmExtension", "autoUpgradeMinorVersion"},
	}
	for _, path := range same {
		if d := (answer{body: want}).at(path...); d != a.at(path...) {
			t.Errorf("%v is %v, documented %v", path, a.at(path...), d)
		}
	}
	if got := a.at("odata.metadata"); got != data+"/$metadata#extensions/@Element" {
		t.Errorf("odata.metadata: %v", got)
	}
	settings, _ := a.at("vmExtension", "settings").(string)
	var asked, given any
	if err := json.Unmarshal([]byte(settings), &given); err != nil {
		t.Fatalf("settings are no JSON text: %v", err)
	}
	put := sent(t, documented(t, "001-put-pool-linux.json"))
	asked = (answer{body: put}).at("properties", "deploymentConfiguration", "virtualMachineConfiguration", "extensions", 0, "settings")
	if diff := cmp.Diff(asked, given); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(settings, "\r\n") {
		t.Error("the lines of settings do not end in CR LF")
	}

	later := w.do("GET", data+"/pools/test1/nodes/"+id+"/extensions/SECRETEXT"+plane, "")
	if later.at("provisioningState") != "Succeeded" || later.at("instanceView", "subStatuses", 0, "code") != "ComponentStatus/hook/succeeded" {
		t.Errorf("with a real api-version: %s", later.text)
	}
	list := w.do("GET", data+"/pools/test1/nodes/"+id+"/extensions"+plane, "")
	if list.at("value", 0, "vmExtension", "name") != "batchNodeExtension" || list.at("value", 1, "vmExtension", "name") != "secretext" {
		t.Errorf("the list: %s", list.text)
	}
	if a := w.do("GET", data+"/pools/test1/nodes/"+id+"/extensions/none"+plane, ""); a.status != http.StatusNotFound || a.at("code") != "ExtensionNotFound" {
		t.Errorf("an extension that is not there: %d %s", a.status, a.text)
	}
}

// shape is a document with its values replaced by their types.
func shape(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for k, e := range v {
			out[k] = shape(e)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = shape(e)
		}
		return out
	case string:
		return "string"
	case float64:
		return "number"
	case bool:
		return "boolean"
	}
	return "null"
}

func TestFailingExtensionMakesTheNodeUnusableWithAReason(t *testing.T) {
	w := newWorld(t)
	id := w.node(documented(t, "000-put-pool-linux.json"), "error", "no such secret")
	a := w.do("GET", data+"/pools/test1/nodes/"+id+plane, "")
	if a.at("state") != "unusable" || a.at("errors", 0, "code") != "VMExtensionFailed" || a.at("errors", 0, "errorDetails", 0, "value") != "KVExtensions" {
		t.Errorf("%s", a.text)
	}
	x := w.do("GET", data+"/pools/test1/nodes/"+id+"/extensions/KVExtensions"+plane, "")
	if x.at("instanceView", "statuses", 0, "code") != "ProvisioningState/failed/9" || x.at("instanceView", "statuses", 0, "level") != 2.0 {
		t.Errorf("%s", x.text)
	}
}

func TestDataPlaneOfAPool(t *testing.T) {
	w := newWorld(t)
	w.control()
	add := w.do("POST", data+"/pools"+plane, `{"id":"p1","vmSize":"standard_d2","virtualMachineConfiguration":{"imageReference":{"publisher":"canonical","offer":"ubuntuserver","sku":"20.04-lts"},"nodeAgentSKUId":"batch.node.ubuntu 20.04"},"targetDedicatedNodes":"1"}`,
		"Content-Type", "application/json; odata=minimalmetadata")
	if add.status != http.StatusCreated || add.text != "" || add.header.Get("Location") != data+"/pools/p1" {
		t.Fatalf("add: %d %s", add.status, add.text)
	}
	if tag := add.header.Get("ETag"); !strings.HasPrefix(tag, "0x") {
		t.Errorf("the ETag of the data plane is bare: %s", tag)
	}
	w.until("a steady pool", func() bool {
		return w.do("GET", data+"/pools/p1"+plane, "").at("allocationState") == "steady"
	})
	get := w.do("GET", data+"/pools/p1"+plane, "")
	if get.header.Get("Content-Type") != "application/json; odata=minimalmetadata" || get.at("currentDedicatedNodes") != 1.0 || get.at("odata.metadata") != data+"/$metadata#pools/@Element" {
		t.Errorf("%s %s", get.header.Get("Content-Type"), get.text)
	}
	steps := []struct {
		why, method, path, body string
		status                  int
		code                    string
	}{
		{"adding it again", "POST", "/pools", `{"id":"P1","vmSize":"x"}`, 409, "PoolExists"},
		{"an add without an id", "POST", "/pools", `{}`, 400, "MissingRequiredProperty"},
		{"HEAD of a pool", "HEAD", "/pools/p1", "", 200, ""},
		{"HEAD of none", "HEAD", "/pools/none", "", 404, ""},
		{"a number as a string, as az 2.74 sends it", "POST", "/pools/p1/resize", `{"targetDedicatedNodes":"2"}`, 202, ""},
		{"autoscale", "POST", "/pools/p1/enableautoscale", `{}`, 400, "InvalidPropertyValue"},
		{"no autoscale", "POST", "/pools/p1/disableautoscale", "", 200, ""},
		{"metadata", "PATCH", "/pools/p1", `{"metadata":[{"name":"a","value":"b"}]}`, 200, ""},
		{"a start task", "PATCH", "/pools/p1", `{"startTask":{"commandLine":"x"}}`, 400, "InvalidPropertyValue"},
		{"a reboot of no node", "POST", "/pools/p1/nodes/x/reboot", "", 404, "NodeNotFound"},
		{"removing no nodes", "POST", "/pools/p1/removenodes", `{"nodeList":[]}`, 400, "InvalidPropertyValue"},
		{"a page size of nothing", "GET", "/pools?maxresults=0", "", 400, "InvalidQueryParameterValue"},
	}
	for _, s := range steps {
		sep := strings.Replace(plane, "?", map[bool]string{true: "&", false: "?"}[strings.Contains(s.path, "?")], 1)
		a := w.do(s.method, data+s.path+sep, s.body)
		if a.status != s.status || (s.code != "" && a.at("code") != s.code) {
			t.Errorf("%s: %d %s", s.why, a.status, a.text)
		}
		if s.status >= 400 && s.method != "HEAD" && (a.at("odata.metadata") == nil || a.at("message", "lang") != "en-US") {
			t.Errorf("%s: not the data plane's error body: %s", s.why, a.text)
		}
	}
	w.until("two nodes", func() bool {
		p := w.do("GET", data+"/pools/p1"+plane, "")
		return p.at("currentDedicatedNodes") == 2.0 && p.at("allocationState") == "steady"
	})
	bad := w.do("POST", data+"/pools/p1/resize"+plane, `{"targetDedicatedNodes":1,"resizeTimeout":"PT1M"}`)
	if bad.status != http.StatusBadRequest || bad.at("values", 0, "value") != "resizeTimeout" {
		t.Errorf("a resize with a bad timeout: %d %s", bad.status, bad.text)
	}
	first := w.do("GET", data+"/pools/p1/nodes"+plane+"&maxresults=1", "")
	next, _ := first.at("odata.nextLink").(string)
	second := w.do("GET", next, "")
	if first.at("value", 0, "id") == second.at("value", 0, "id") || second.at("odata.nextLink") != nil || second.at("value", 0, "id") == nil {
		t.Errorf("pages: %s and %s", first.text, second.text)
	}
	n, _ := second.at("value", 0, "id").(string)
	if a := w.do("POST", data+"/pools/p1/removenodes"+plane, `{"nodeList":["`+n+`"]}`); a.status != http.StatusAccepted {
		t.Errorf("removenodes: %d %s", a.status, a.text)
	}
	w.until("a steady pool", func() bool {
		return w.do("GET", data+"/pools/p1"+plane, "").at("allocationState") == "steady"
	})
	if a := w.do("DELETE", data+"/pools/p1"+plane, ""); a.status != http.StatusAccepted {
		t.Errorf("delete: %d %s", a.status, a.text)
	}
	w.until("the pool's end", func() bool { return w.do("HEAD", data+"/pools/p1"+plane, "").status == http.StatusNotFound })
}

func TestWarningsAndStrictness(t *testing.T) {
	w := newWorld(t)
	w.verdict = pool.Verdict{Answer: "no", Code: "SecretNotFound", Message: "A secret with (name/id) authcertforumatesting was not found.", Fix: "create it", Pinned: true}
	body, url := documented(t, "000-put-pool-linux.json"), arm+account+"/pools/test2"+mgmt
	for _, how := range [][]string{{"Prefer", "handling=strict"}, {"Keyfleet-Strict", "true"}} {
		if a := w.do("PUT", url, body, how...); a.status != http.StatusBadRequest || len(a.body["error"].(map[string]any)["details"].([]any)) < 2 {
			t.Errorf("strict by %s: %d %s", how[0], a.status, a.text)
		}
	}
	if a := w.do("GET", url, ""); a.status != http.StatusNotFound {
		t.Errorf("a refused pool is there: %d", a.status)
	}
	what := w.do("POST", arm+"/keyfleet/v1"+account+"/pools/test2/whatif", body)
	if what.status != http.StatusOK || what.at("created") != true || what.at("accepted") != true || what.at("warnings", 0, "code") != "SecretNotFound" || what.at("warnings", 1, "code") != "PinnedVersion" {
		t.Errorf("what-if: %d %s", what.status, what.text)
	}
	a := w.do("PUT", url, body)
	warnings := a.header.Values("Warning")
	if a.status != http.StatusOK || len(warnings) != 2 || !strings.HasPrefix(warnings[0], `299 keyfleet "SecretNotFound: `) {
		t.Fatalf("%d %q", a.status, warnings)
	}
	for _, s := range []string{"https://testkvchinanorth2s.vault.azure.cn/secrets/authcertforumatesting/8f5f3f491afd48cb99286ba2aacd39af", "observedCertificates[0]"} {
		if !strings.Contains(warnings[0], s) {
			t.Errorf("%s does not name %s as the body wrote it", warnings[0], s)
		}
	}
}

func TestRefusals(t *testing.T) {
	const vm = `"vmSize":"x","deploymentConfiguration":{"virtualMachineConfiguration":{"imageReference":{"publisher":"p","offer":"o","sku":"s"},"nodeAgentSkuId":"n"`
	tests := []struct{ why, body, version, target string }{
		{"cloud services", `{"properties":{"vmSize":"x","deploymentConfiguration":{"cloudServiceConfiguration":{"osFamily":"6"}}}}`, "2021-01-01", "properties.deploymentConfiguration.cloudServiceConfiguration"},
		{"autoscale", `{"properties":{` + vm + `}},"scaleSettings":{"autoScale":{"formula":"$x=1"}}}}`, "2021-01-01", "properties.scaleSettings.autoScale"},
		{"a start task", `{"properties":{` + vm + `}},"startTask":{"commandLine":"x"}}}`, "2021-01-01", "properties.startTask"},
		{"Batch certificates", `{"properties":{` + vm + `}},"certificates":[{"id":"x"}]}}`, "2021-01-01", "properties.certificates"},
		{"containers", `{"properties":{` + vm + `,"containerConfiguration":{"type":"DockerCompatible"}}}}}`, "2021-01-01", "properties.deploymentConfiguration.virtualMachineConfiguration.containerConfiguration"},
		{
			"authenticationSettings beside settings", `{"properties":{` + vm + `,"extensions":[{"name":"kv","publisher":"Microsoft.Azure.KeyVault","type":"KeyVaultForLinux","authenticationSettings":{},"settings":{"secretsManagementSettings":{"observedCertificates":["https://v.vault.x/secrets/s"]}}}]}}}}`,
			"2021-01-01", "properties.deploymentConfiguration.virtualMachineConfiguration.extensions[0].authenticationSettings",
		},
		{"an osDisk before 2021-06-01", `{"properties":{` + vm + `,"osDisk":{"ephemeralOSDiskSettings":{"placement":"CacheDisk"}}}}}}`, "2021-01-01", "properties.deploymentConfiguration.virtualMachineConfiguration.osDisk"},
		{"a communication mode before 2022-10-01", `{"properties":{` + vm + `}},"targetNodeCommunicationMode":"Classic"}}`, "2022-01-01", "properties.targetNodeCommunicationMode"},
		{"automatic upgrades before 2023-05-01", `{"properties":{` + vm + `,"extensions":[{"name":"oms","publisher":"Microsoft.EnterpriseCloud.Monitoring","type":"OmsAgentForLinux","enableAutomaticUpgrade":true}]}}}}`, "2022-10-01", "properties.deploymentConfiguration.virtualMachineConfiguration.extensions[0].enableAutomaticUpgrade"},
		{"a misspelt member", `{"properties":{` + vm + `}},"vmsize":"x"}}`, "2021-01-01", "properties.vmsize"},
		{"a number where a string should be", `{"properties":{"vmSize":5}}`, "2021-01-01", "properties.vmSize"},
	}
	w := newWorld(t)
	for _, tt := range tests {
		a := w.do("PUT", arm+account+"/pools/p?api-version="+tt.version, tt.body)
		found := a.at("error", "target") == tt.target
		details, _ := a.at("error", "details").([]any)
		for _, d := range details {
			found = found || d.(map[string]any)["target"] == tt.target
		}
		if a.status != http.StatusBadRequest || !found {
			t.Errorf("%s: %d %s", tt.why, a.status, a.text)
		}
	}
	for why, extra := range map[string]string{"empty lists and nulls": `,"certificates":[],"applicationPackages":null,"userAccounts":[],"startTask":{}`} {
		if a := w.do("PUT", arm+account+"/pools/p"+mgmt, `{"properties":{`+vm+`}}`+extra+`}}`); a.status != http.StatusOK {
			t.Errorf("%s: %d %s", why, a.status, a.text)
		}
	}
	if a := w.do("PUT", arm+account+"/pools/p?api-version=2019-08-01", "{}"); a.status != http.StatusBadRequest || !strings.Contains(a.text, "2023-05-01") {
		t.Errorf("an unknown api-version: %d %s", a.status, a.text)
	}
}

func TestAccounts(t *testing.T) {
	w := newWorld(t)
	a := w.do("PUT", arm+strings.Replace(account, "acct1", "acct2", 1)+mgmt, `{"location":"West US 2","tags":{"a":"b"}}`)
	loc := a.header.Get("Location")
	if a.status != http.StatusAccepted || !strings.Contains(loc, "/operationResults/") || a.header.Get("Retry-After") == "" {
		t.Fatalf("%d %s", a.status, loc)
	}
	done := w.do("GET", loc, "")
	if done.status != http.StatusOK || done.at("properties", "accountEndpoint") != "acct2.westus2.batch.keyfleet.internal:8443" || done.at("properties", "provisioningState") != "Succeeded" {
		t.Errorf("the operation's result: %d %s", done.status, done.text)
	}
	tests := []struct {
		why, method, path, body string
		status                  int
		code                    string
	}{
		{"the same again", "PUT", account, `{"location":"westus2"}`, 200, ""},
		{"another location", "PUT", account, `{"location":"eastus"}`, 409, "InvalidResourceLocation"},
		{"a name that is taken elsewhere", "PUT", strings.Replace(account, "/ACR/", "/other/", 1), `{"location":"westus2"}`, 409, "AccountAlreadyTaken"},
		{"a bad name", "PUT", strings.Replace(account, "acct1", "Acct-1", 1), `{"location":"westus2"}`, 400, "InvalidResourceName"},
		{"no location", "PUT", strings.Replace(account, "acct1", "acct3", 1), `{}`, 400, "LocationRequired"},
		{"an own storage account", "PUT", strings.Replace(account, "acct1", "acct3", 1), `{"location":"westus2","properties":{"autoStorage":{"storageAccountId":"x"}}}`, 400, "InvalidPropertyValue"},
		{"keys", "POST", account + "/listKeys", "", 409, "SharedKeyNotAllowed"},
		{"an absent account", "GET", strings.Replace(account, "acct1", "none", 1), "", 404, "ResourceNotFound"},
		{"a pool of an absent account", "PUT", strings.Replace(account, "acct1", "none", 1) + "/pools/p", `{}`, 404, "ResourceNotFound"},
		{"the list", "GET", "/subscriptions/" + sub + "/providers/Microsoft.Batch/batchAccounts", "", 200, ""},
		{"deleting it", "DELETE", account, "", 200, ""},
		{"deleting it again", "DELETE", account, "", 204, ""},
	}
	for _, tt := range tests {
		a := w.do(tt.method, arm+tt.path+mgmt, tt.body)
		if a.status != tt.status || (tt.code != "" && a.at("error", "code") != tt.code) {
			t.Errorf("%s: %d %s", tt.why, a.status, a.text)
		}
	}
	if a := w.do("GET", data+"/pools"+plane, ""); a.status != http.StatusNotFound || a.at("code") != "AccountNotFound" {
		t.Errorf("the data plane of an account that is gone: %d %s", a.status, a.text)
	}
}

func TestEveryRouteRefusesAStranger(t *testing.T) {
	w := newWorld(t)
	for _, r := range w.api.Routes() {
		path := strings.NewReplacer("{subscription}", sub, "{group}", "ACR", "{account}", "acct1", "{pool}", "p1", "{node}", "n", "{extension}", "e",
			"{operation}", "delete-p1-0", "{publisher}", "P", "{type}", "T", "{host}", "h").Replace(r.Path)
		base, version := arm, ""
		if r.Surface == azureapi.Batch {
			base = data
		}
		if len(r.Versions) > 0 {
			version = "?api-version=" + r.Versions[len(r.Versions)-1]
		}
		body := map[bool]string{true: `{"id":"p1","location":"westus2","pool":"` + account + `/pools/p1","nodeList":["n"]}`, false: "{}"}[r.Method == "POST" || r.Method == "PUT"]
		if strings.HasSuffix(r.Path, "/{account}") && r.Method == "PUT" {
			body = `{"location":"westus2"}`
		}
		switch {
		case strings.HasSuffix(r.Path, "/pools") && r.Method == "POST":
			body = `{"id":"p1"}`
		case strings.HasSuffix(r.Path, "removenodes"):
			body = `{"nodeList":["n"]}`
		case strings.HasSuffix(r.Path, "jointokens"):
			body = `{"pool":"` + account + `/pools/p1"}`
		case r.Method == "POST":
			body = "{}"
		}
		if a := w.do(r.Method, base+path+version, body, "Authorization", "Bearer bad"); a.status != http.StatusUnauthorized {
			t.Errorf("%s %s without a token: %d", r.Method, r.Path, a.status)
		}
		if a := w.do(r.Method, base+path+version, body, "Authorization", "Bearer stranger"); a.status != http.StatusForbidden {
			t.Errorf("%s %s by a caller without roles: %d %s", r.Method, r.Path, a.status, a.text)
		}
	}
}

func TestDeletionIsPolled(t *testing.T) {
	w := newWorld(t)
	w.control()
	url := arm + account + "/pools/a-b" + mgmt
	if a := w.do("DELETE", url, ""); a.status != http.StatusNoContent {
		t.Errorf("no pool: %d", a.status)
	}
	if a := w.do("PUT", url, documented(t, "000-put-pool-linux.json")); a.status != http.StatusOK {
		t.Fatal(a.text)
	}
	a := w.do("DELETE", url, "", "If-Match", `W/"0x1"`)
	if a.status != http.StatusPreconditionFailed {
		t.Errorf("with another ETag: %d", a.status)
	}
	a = w.do("DELETE", url, "")
	loc := a.header.Get("Location")
	if a.status != http.StatusAccepted || !strings.Contains(loc, "/poolOperationResults/delete-a-b-") {
		t.Fatalf("%d %s", a.status, loc)
	}
	seen := []int{}
	w.until("the end", func() bool {
		s := w.do("GET", loc, "").status
		if !slices.Contains(seen, s) {
			seen = append(seen, s)
		}
		return s == http.StatusNoContent
	})
	for _, s := range seen {
		if s != http.StatusAccepted && s != http.StatusNoContent {
			t.Errorf("the poller was answered %d", s)
		}
	}
}

func TestJoinTokenAndHosts(t *testing.T) {
	w := newWorld(t)
	if a := w.do("PUT", arm+account+"/pools/p"+mgmt, documented(t, "000-put-pool-linux.json")); a.status != 200 {
		t.Fatal(a.text)
	}
	a := w.do("POST", arm+"/keyfleet/v1/jointokens", `{"pool":"`+account+`/pools/P","expiresIn":"2h"}`)
	token, _ := a.at("token").(string)
	if a.status != http.StatusOK || len(token) < 40 || a.at("server") != "https://node.keyfleet.internal:8443" || a.at("caHash") != "sha256:00" {
		t.Fatalf("%d %s", a.status, a.text)
	}
	id, err := w.fleet.Enrol(t.Context(), node.EnrolRequest{Token: token, Hostname: "m1", OS: "linux"}, "k")
	if err != nil {
		t.Fatal(err)
	}
	if l := w.do("GET", arm+"/keyfleet/v1/hosts", ""); l.at("value", 0, "id") != id || l.at("value", 0, "state") != "free" || l.at("value", 0, "hostname") != "m1" {
		t.Errorf("hosts: %s", l.text)
	}
	if d := w.do("DELETE", arm+"/keyfleet/v1/hosts/"+id, ""); d.status != http.StatusNoContent {
		t.Errorf("removing the host: %d %s", d.status, d.text)
	}
	for _, body := range []string{`{"pool":"x"}`, `{"pool":"` + account + `/pools/p","expiresIn":"soon"}`, `{"pool":"` + account + `/pools/p","expiresIn":"48h"}`} {
		if a := w.do("POST", arm+"/keyfleet/v1/jointokens", body); a.status != http.StatusBadRequest {
			t.Errorf("%s: %d", body, a.status)
		}
	}
	if a := w.do("PUT", arm+"/keyfleet/v1/extensiontypes/Contoso/Backup", `{"os":"linux"}`); a.status != http.StatusOK {
		t.Errorf("a further type: %d %s", a.status, a.text)
	}
	if a := w.do("GET", arm+"/keyfleet/v1/extensiontypes", ""); !strings.Contains(a.text, `"Contoso"`) {
		t.Errorf("types: %s", a.text)
	}
}
