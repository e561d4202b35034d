package client

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/keyfleet"
)

// double answers for every name of a server over TLS. The client must dial it
// although none of the names resolves.
type double struct {
	srv *httptest.Server

	mu     sync.Mutex
	seen   []string       // "METHOD host path?query"
	bodies []string       // of the same requests
	tokens map[string]int // scope -> how often a token was asked for
	slept  []time.Duration
	handle func(w http.ResponseWriter, r *http.Request)
}

func newDouble(t *testing.T, handle func(w http.ResponseWriter, r *http.Request)) (*double, *Client) {
	t.Helper()
	d := &double{tokens: map[string]int{}, handle: handle}
	d.srv = httptest.NewUnstartedServer(d)
	d.srv.StartTLS() // the certificate of httptest is for example.com and *.example.com
	t.Cleanup(d.srv.Close)
	c, err := New(Config{
		Endpoints: keyfleet.Endpoints{
			ResourceManager: "https://arm.example.com", Login: "https://login.example.com",
			VaultSuffix: "example.com", BatchSuffix: "batch.example.com",
		},
		Tenant: "tenant1", ClientID: "app1", ClientSecret: "s3cret", Subscription: "sub1",
		CA:          pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d.srv.Certificate().Raw}),
		DialAddress: d.srv.Listener.Addr().String(),
		Sleep: func(_ context.Context, w time.Duration) error {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.slept = append(d.slept, w)
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return d, c
}

func (d *double) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	if r.Host == "login.example.com" {
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		_ = r.ParseForm()
		d.mu.Lock()
		d.tokens[r.PostForm.Get("scope")]++
		n := d.tokens[r.PostForm.Get("scope")]
		d.mu.Unlock()
		if r.PostForm.Get("client_secret") != "s3cret" {
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, `{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret provided."}`)
			return
		}
		fmt.Fprintf(w, `{"token_type":"Bearer","expires_in":3600,"access_token":"tok%d:%s"}`, n, r.PostForm.Get("scope"))
		return
	}
	d.mu.Lock()
	d.seen = append(d.seen, r.Method+" "+r.Host+" "+r.URL.RequestURI())
	d.bodies = append(d.bodies, string(body))
	d.mu.Unlock()
	d.handle(w, r)
}

func (d *double) sleeps() []time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.slept
}

func get(url string) Request { return Request{Method: http.MethodGet, URL: url, Version: "1"} }

func TestTokensAreForTheAudienceAndCached(t *testing.T) {
	d, c := newDouble(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%q", r.Header.Get("Authorization"))
	})
	tests := []struct {
		reason, url, scope string
	}{
		{"the management surface", c.ARM("/subscriptions"), "https://arm.example.com/.default"},
		{"a second call uses the cached token", c.ARM("/subscriptions"), "https://arm.example.com/.default"},
		{"the audience of a vault is the suffix of vaults", c.Vault("prod1", "/secrets/a"), "https://example.com/.default"},
		{"the audience of the Batch data plane ends in a slash, so its scope has two", c.Batch("a1.batch.example.com", "/pools"), "https://batch.example.com//.default"},
	}
	for _, tt := range tests {
		if strings.Contains(tt.url, "a1.batch") { // httptest's certificate covers one level only
			if got := c.batchResource() + "/.default"; got != tt.scope {
				t.Errorf("%s: scope %s, want %s", tt.reason, got, tt.scope)
			}
			continue
		}
		var got string
		if err := c.Call(t.Context(), get(tt.url), &got); err != nil {
			t.Fatalf("%s: %v", tt.reason, err)
		}
		if want := "Bearer tok1:" + tt.scope; got != want {
			t.Errorf("%s: sent %q, want %q", tt.reason, got, want)
		}
	}
	if n := d.tokens["https://arm.example.com/.default"]; n != 1 {
		t.Errorf("asked for an arm token %d times, want once", n)
	}
}

func TestARefusedTokenIsReplacedOnce(t *testing.T) {
	d, c := newDouble(t, func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer tok2") {
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, `{"error":{"code":"ExpiredAuthenticationToken","message":"The token ended."}}`)
		}
	})
	if err := c.Call(t.Context(), get(c.ARM("/x")), nil); err != nil {
		t.Fatal(err)
	}
	if len(d.seen) != 2 {
		t.Errorf("requests: %v, want the first and one more", d.seen)
	}
}

func TestChallengeNeverSendsATokenToAnotherHost(t *testing.T) {
	tests := []struct {
		reason, host, header, want, err string
	}{
		{"the host is under the resource's", "v1.vault.azure.cn", `Bearer authorization="https://login.x/t", resource="https://vault.azure.cn"`, "https://vault.azure.cn", ""},
		{"the port is part of the host", "v1.vault.x:8443", `Bearer authorization="https://l/t", resource="https://vault.x:8443"`, "https://vault.x:8443", ""},
		{"casing does not matter", "V1.Vault.X", `bearer Authorization="https://l/t", Resource="https://vault.x"`, "https://vault.x", ""},
		{"another host's token", "evil.example", `Bearer authorization="https://l/t", resource="https://vault.x"`, "", "another host"},
		{"a suffix that is no label boundary", "evilvault.x", `Bearer authorization="https://l/t", resource="https://vault.x"`, "", "another host"},
		{"a port that differs", "v1.vault.x:444", `Bearer authorization="https://l/t", resource="https://vault.x:8443"`, "", "another host"},
		{"not over TLS", "v1.vault.x", `Bearer resource="http://vault.x"`, "", "unusable resource"},
		{"no resource", "v1.vault.x", `Bearer authorization="https://l/t"`, "", "did not say"},
		{"no bearer", "v1.vault.x", `Basic realm="x"`, "", "did not say"},
	}
	for _, tt := range tests {
		got, err := challengeResource(http.Header{"Www-Authenticate": {tt.header}}, tt.host)
		if got != tt.want || (err == nil) != (tt.err == "") || (err != nil && !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: %q, %v; want %q, %q", tt.reason, got, err, tt.want, tt.err)
		}
	}
}

func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer authorization="https://login.x/t", resource="https://vault.x"`, "v1.vault.x")
	f.Add(`Bearer resource=`, "")
	f.Fuzz(func(t *testing.T, header, host string) {
		res, err := challengeResource(http.Header{"Www-Authenticate": {header}}, host)
		if err == nil && !strings.HasPrefix(strings.ToLower(res), "https://") {
			t.Errorf("%q for %q gave the resource %q", header, host, res)
		}
	})
}

func TestErrorBodiesOfAllProtocols(t *testing.T) {
	tests := []struct {
		reason  string
		status  int
		headers map[string]string
		body    string
		want    Error
		exit    int
	}{
		{
			"ARM with target and fix", 400,
			map[string]string{"x-ms-request-id": "r1", "x-ms-correlation-request-id": "c1"},
			`{"error":{"code":"InvalidPropertyValue","message":"Bad.","target":"properties.vmSize","details":[{"code":"Reason","message":"No such size."},{"code":"Fix","message":"use another"}]}}`,
			Error{Status: 400, Code: "InvalidPropertyValue", Message: "Bad.", Target: "properties.vmSize", Fix: "use another", Details: []Detail{{Code: "Reason", Message: "No such size."}}, RequestID: "r1", CorrelationID: "c1"},
			ExitFailed,
		},
		{
			"Key Vault with an inner code", 403, nil,
			`{"error":{"code":"Forbidden","message":"No.","innererror":{"code":"AccessDenied"}}}`,
			Error{Status: 403, Code: "Forbidden", Inner: "AccessDenied", Message: "No."},
			ExitDenied,
		},
		{
			"Batch data plane; the ids in its text are left out", 404,
			map[string]string{"request-id": "r2"},
			`{"odata.metadata":"x","code":"PoolNotFound","message":{"lang":"en-US","value":"The specified pool does not exist.\nRequestId:r2\nTime:2026"},"values":[{"key":"PropertyName","value":"id"}]}`,
			Error{Status: 404, Code: "PoolNotFound", Message: "The specified pool does not exist.", RequestID: "r2", Target: "id"},
			ExitNotFound,
		},
		{
			"OAuth", 401, nil, `{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret."}`,
			Error{Status: 401, Code: "invalid_client", Message: "AADSTS7000215: Invalid client secret."},
			ExitLogin,
		},
		{
			"the node edge", 409, nil, `{"code":"TokenUsed","message":"Used.","fix":"ask for another"}`,
			Error{Status: 409, Code: "TokenUsed", Message: "Used.", Fix: "ask for another"},
			ExitConflict,
		},
		{
			"no body: the status speaks", 503,
			map[string]string{"Retry-After": "7"},
			``,
			Error{Status: 503, Code: "ServiceUnavailable", Message: "GET https://arm.example.com/x was answered with status 503.", RetryAfter: 7 * time.Second},
			ExitFailed,
		},
		{
			"not JSON", 502, nil, `<html>`,
			Error{Status: 502, Code: "BadGateway", Message: "GET https://arm.example.com/x was answered with status 502."},
			ExitFailed,
		},
		{
			"the header's code where the body has none", 412,
			map[string]string{"x-ms-error-code": "PreconditionFailed"},
			`{}`,
			Error{Status: 412, Code: "PreconditionFailed", Message: "GET https://arm.example.com/x was answered with status 412."},
			ExitConflict,
		},
	}
	for _, tt := range tests {
		_, c := newDouble(t, func(w http.ResponseWriter, _ *http.Request) {
			for k, v := range tt.headers {
				w.Header().Set(k, v)
			}
			w.WriteHeader(tt.status)
			fmt.Fprint(w, tt.body)
		})
		err := c.Call(t.Context(), get(c.ARM("/x?api-version=1")), nil)
		var got *Error
		if !errors.As(err, &got) {
			t.Fatalf("%s: %v is no *Error", tt.reason, err)
		}
		tt.want.Operation = "GET https://arm.example.com/x"
		if len(got.Details) == 0 {
			got.Details = nil
		}
		if diff := cmp.Diff(&tt.want, got, cmp.FilterPath(func(p cmp.Path) bool {
			return p.String() == "header" || p.String() == "refused"
		}, cmp.Ignore())); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.reason, diff)
		}
		if got.Exit() != tt.exit {
			t.Errorf("%s: exit code %d, want %d", tt.reason, got.Exit(), tt.exit)
		}
	}
}

func FuzzErrorBody(f *testing.F) {
	f.Add([]byte(`{"error":{"code":"A","message":"b","details":[{"code":"Fix","message":"c"}]}}`))
	f.Add([]byte(`{"code":"PoolNotFound","message":{"lang":"en-US","value":"x\nRequestId:1"},"values":[{"key":"a","value":"b"}]}`))
	f.Add([]byte(`{"error":"invalid_client","error_description":"AADSTS7000215"}`))
	f.Add([]byte(`{"error":[],"message":7}`))
	req := httptest.NewRequest(http.MethodGet, "https://arm.example.com/x", nil)
	f.Fuzz(func(t *testing.T, body []byte) {
		e := decodeError(req, &http.Response{StatusCode: 400, Header: http.Header{}}, body)
		if e.Code == "" || e.Message == "" {
			t.Errorf("%q gave an error without code or message: %+v", body, e)
		}
	})
}

func TestRetries(t *testing.T) {
	tests := []struct {
		reason, method string
		status         int
		after          string
		requests       int
		sleeps         []time.Duration
	}{
		{"503 of a GET is repeated until the waits are used up", "GET", 503, "", 4, retryWaits[:]},
		{"503 of a POST is not: it may have been done", "POST", 503, "", 1, nil},
		{"429 of a POST is: it was refused before anything was done", "POST", 429, "", 4, retryWaits[:]},
		{"the server's pause counts when it is longer", "GET", 429, "5", 4, []time.Duration{5 * time.Second, 5 * time.Second, 5 * time.Second}},
		{"a pause beyond reason is the caller's to take", "GET", 429, "3600", 1, nil},
		{"a refusal stays one", "PUT", 409, "", 1, nil},
		{"500 says nothing about a second attempt", "GET", 500, "", 1, nil},
	}
	for _, tt := range tests {
		d, c := newDouble(t, func(w http.ResponseWriter, _ *http.Request) {
			if tt.after != "" {
				w.Header().Set("Retry-After", tt.after)
			}
			w.WriteHeader(tt.status)
		})
		err := c.Call(t.Context(), Request{Method: tt.method, URL: c.ARM("/x"), Version: "1", Body: map[string]int{"a": 1}}, nil)
		var e *Error
		if !errors.As(err, &e) || e.Status != tt.status {
			t.Errorf("%s: %v", tt.reason, err)
		}
		if len(d.seen) != tt.requests {
			t.Errorf("%s: %d requests, want %d", tt.reason, len(d.seen), tt.requests)
		}
		if diff := cmp.Diff(tt.sleeps, d.sleeps()); diff != "" {
			t.Errorf("%s: pauses (-want +got)\n%s", tt.reason, diff)
		}
		for _, b := range d.bodies {
			if b != `{"a":1}` {
				t.Errorf("%s: an attempt sent the body %q", tt.reason, b)
			}
		}
	}
}

func TestWaitFollowsBothForms(t *testing.T) {
	polls := 0
	d, c := newDouble(t, nil)
	d.handle = func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/start-location":
			w.Header().Set("Location", "https://arm.example.com/op/1")
			w.Header().Set("Retry-After", "2")
			w.WriteHeader(http.StatusAccepted)
		case "/op/1": // each poll may name the next place
			w.Header().Set("Location", "https://arm.example.com/op/2")
			w.WriteHeader(http.StatusAccepted)
		case "/op/2":
			fmt.Fprint(w, `{"name":"done"}`)
		case "/start-async", "/start-failing":
			w.Header().Set("Azure-AsyncOperation", "https://arm.example.com/status"+strings.TrimPrefix(r.URL.Path, "/start"))
			w.WriteHeader(http.StatusCreated)
		case "/status-async":
			polls++
			fmt.Fprintf(w, `{"status":%q}`, []string{"InProgress", "InProgress", "Succeeded"}[polls-1])
		case "/status-failing":
			fmt.Fprint(w, `{"status":"Failed","error":{"code":"AllocationFailed","message":"No host is free.","details":[{"code":"Fix","message":"join one"}]}}`)
		}
	}
	wait := func(path string, seen func(string)) (*Response, error) {
		resp, err := c.Do(t.Context(), Request{Method: http.MethodPut, URL: c.ARM(path)})
		if err != nil {
			t.Fatal(err)
		}
		return c.Wait(t.Context(), resp, seen)
	}
	resp, err := wait("/start-location", nil)
	var body struct{ Name string }
	if err != nil || resp.Into(&body) != nil || body.Name != "done" {
		t.Errorf("Location: %v, %+v", err, body)
	}
	if diff := cmp.Diff([]time.Duration{2 * time.Second, pollEvery}, d.sleeps()); diff != "" {
		t.Errorf("Location: pauses (-want +got)\n%s", diff)
	}
	var seen []string
	if _, err := wait("/start-async", func(s string) { seen = append(seen, s) }); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"InProgress", "InProgress", "Succeeded"}, seen); diff != "" {
		t.Errorf("Azure-AsyncOperation: states (-want +got)\n%s", diff)
	}
	_, err = wait("/start-failing", nil)
	var e *Error
	if !errors.As(err, &e) || e.Code != "AllocationFailed" || e.Fix != "join one" {
		t.Errorf("a failed operation gave %#v", err)
	}
}

func TestListReadsEveryPage(t *testing.T) {
	_, c := newDouble(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("$skiptoken") == "" {
			fmt.Fprintf(w, `{"value":[1,2],"nextLink":"https://arm.example.com/list?api-version=1&$skiptoken=x"}`)
			return
		}
		fmt.Fprint(w, `{"value":[3]}`)
	})
	got, err := List[int](t.Context(), c, get(c.ARM("/list")))
	if diff := cmp.Diff([]int{1, 2, 3}, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}

func TestServersThatCannotBeReached(t *testing.T) {
	d, c := newDouble(t, func(http.ResponseWriter, *http.Request) {})
	addr := d.srv.Listener.Addr().String()

	untrusting := c.cfg
	untrusting.CA = nil
	c2, err := New(untrusting)
	if err != nil {
		t.Fatal(err)
	}
	err = c2.Call(t.Context(), get(c2.ARM("/x")), nil)
	var e *Error
	if !errors.As(err, &e) || e.Code != "ServerNotTrusted" || e.Fix == "" {
		t.Errorf("a server with an unknown CA: %v", err)
	}

	d.srv.Close()
	err = c.Call(t.Context(), get(c.ARM("/x")), nil)
	if !errors.As(err, &e) || e.Code != "ServerUnreachable" || !strings.Contains(e.Message, addr) || e.Exit() != ExitFailed {
		t.Errorf("a server that is gone: %v", err)
	}
	if len(d.sleeps()) != 0 {
		t.Errorf("a refused connection was tried again after %v: a person waits for this answer", d.sleeps())
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	cfg := Config{ClientSecret: "s3cret"}
	tok := Token{Value: "tok"}
	for _, s := range []string{fmt.Sprint(cfg), fmt.Sprintf("%+v", cfg), fmt.Sprintf("%#v", cfg), fmt.Sprintf("%q %x", cfg.ClientSecret, tok.Value), fmt.Sprintf("%+v", tok)} {
		if strings.Contains(s, "s3cret") || strings.Contains(s, "tok") && strings.Contains(s, "Value:tok") || strings.Contains(s, "733363726574") {
			t.Errorf("a secret is visible in %q", s)
		}
	}
}

func TestAdminFile(t *testing.T) {
	dir := t.TempDir()
	a := keyfleet.Admin{
		Endpoints: keyfleet.Endpoints{ResourceManager: "https://arm.x", Login: "https://login.x", Listen: "[::]:8443"},
		Tenant:    "t", Subscription: "s", ClientID: "c", ClientSecret: "s3cret", CAFile: "ca.crt",
	}
	b, err := json.Marshal(a)
	if err != nil || !strings.Contains(string(b), `"clientSecret":"s3cret"`) {
		t.Fatalf("admin.json must hold the secret itself: %s, %v", b, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "admin.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadAdmin(dir)
	if err != nil {
		t.Fatal(err)
	}
	a.CAFile = filepath.Join(dir, "ca.crt")
	if diff := cmp.Diff(a, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if _, err := ReadAdmin(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory without admin.json: %v", err)
	}
}

func TestDialAddress(t *testing.T) {
	tests := []struct{ reason, dial, listen, want string }{
		{"nothing known: names are resolved", "", "", ""},
		{"the listen address", "", "127.0.0.1:8443", "127.0.0.1:8443"},
		{"an explicit address wins", "10.0.0.7:443", "127.0.0.1:8443", "10.0.0.7:443"},
		{"a server on every address is on this machine", "", "0.0.0.0:8443", "127.0.0.1:8443"},
		{"the same for IPv6", "", "[::]:8443", "127.0.0.1:8443"},
		{"the same without a host", "", ":8443", "127.0.0.1:8443"},
	}
	for _, tt := range tests {
		if got := dialAddress(Config{DialAddress: tt.dial, Endpoints: keyfleet.Endpoints{Listen: tt.listen}}); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.reason, got, tt.want)
		}
	}
}

func TestWarnings(t *testing.T) {
	r := &Response{Header: http.Header{"Warning": {`299 keyfleet "The secret \"web\" cannot be read."`, `odd`}}}
	if diff := cmp.Diff([]string{`The secret "web" cannot be read.`, "odd"}, r.Warnings()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
