package agent

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/nodeapi"
)

var identities = []node.Identity{
	{ResourceID: "/subscriptions/s/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/one", ClientID: "b9f6dd56-d2d6-4967-99d7-8062d56fd84c", ObjectID: "o1"},
	{ResourceID: "/subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/two", ClientID: "c2", ObjectID: "o2"},
}

// imdsAgent is an agent whose IMDS handler is called directly.
func imdsAgent(t *testing.T, of []node.Identity) (*Agent, *testServer) {
	t.Helper()
	s := newTestServer(t, nodeapi.Config{})
	s.goal.Identities = of
	a, err := New(s.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	if err := a.Enrol(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.fetchGoal(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a, s
}

func imdsRequest(query string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "http://169.254.169.254/metadata/identity/oauth2/token?"+query, nil)
	r.Header.Set("Metadata", "true")
	r.RemoteAddr = "127.0.0.1:5000"
	return r
}

const tokenQuery = "api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.cn"

// TestIMDSRules: each request that must be refused, with what the clients look
// at; 404 is never an answer about identities, since clients try those again.
func TestIMDSRules(t *testing.T) {
	a, s := imdsAgent(t, identities)
	cases := []struct {
		name   string
		query  string
		change func(r *http.Request)
		status int
		code   string // of the error; for 200 the client id
	}{
		{"client id", tokenQuery + "&client_id=" + identities[0].ClientID, nil, 200, identities[0].ClientID},
		{"client id in other casing", tokenQuery + "&client_id=" + strings.ToUpper(identities[0].ClientID), nil, 200, identities[0].ClientID},
		{"object id", tokenQuery + "&object_id=o2", nil, 200, "c2"},
		{"resource id", tokenQuery + "&msi_res_id=" + strings.ToLower(identities[1].ResourceID), nil, 200, "c2"},
		{"resource id by the newer name", tokenQuery + "&mi_res_id=" + identities[1].ResourceID, nil, 200, "c2"},
		{"newer version", strings.Replace(tokenQuery, "2018-02-01", "2021-12-13", 1) + "&client_id=c2", nil, 200, "c2"},
		{"Metadata: True", tokenQuery + "&client_id=c2", func(r *http.Request) { r.Header.Set("Metadata", "True") }, 200, "c2"},
		{"trailing slash", tokenQuery + "&client_id=c2", func(r *http.Request) { r.URL.Path += "/" }, 200, "c2"},
		{"no Metadata header, as clients probe", tokenQuery, func(r *http.Request) { r.Header.Del("Metadata") }, 400, "bad_request_102"},
		{"Metadata: false", tokenQuery, func(r *http.Request) { r.Header.Set("Metadata", "false") }, 400, "bad_request_102"},
		{"Metadata twice", tokenQuery, func(r *http.Request) { r.Header.Add("Metadata", "true") }, 400, "bad_request_102"},
		{"forwarded", tokenQuery + "&client_id=c2", func(r *http.Request) { r.Header.Set("X-Forwarded-For", "10.0.0.1") }, 400, "invalid_request"},
		{"forwarded, empty header", tokenQuery + "&client_id=c2", func(r *http.Request) { r.Header["X-Forwarded-For"] = []string{""} }, 400, "invalid_request"},
		{"other host: DNS rebinding", tokenQuery, func(r *http.Request) { r.Host = "evil.example" }, 400, "invalid_request"},
		{"browser", tokenQuery, func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }, 403, "forbidden"},
		{"page", tokenQuery, func(r *http.Request) { r.Header.Set("Referer", "https://evil.example/x") }, 403, "forbidden"},
		{"another machine or a container", tokenQuery, func(r *http.Request) { r.RemoteAddr = "198.51.100.7:80" }, 403, "forbidden"},
		{"POST", tokenQuery, func(r *http.Request) { r.Method = http.MethodPost }, 405, "method_not_allowed"},
		{"no api-version", "resource=x", nil, 400, "invalid_request"},
		{"api-version that is none", "api-version=latest&resource=x", nil, 400, "invalid_request"},
		{"api-version before identities", "api-version=2017-04-02&resource=x", nil, 400, "invalid_request"},
		{"no resource", "api-version=2018-02-01", nil, 400, "invalid_request"},
		{"name twice", tokenQuery + "&client_id=c2&client_id=c2", nil, 400, "invalid_request"},
		{"name twice in other casing", tokenQuery + "&client_id=c2&Client_Id=c2", nil, 400, "invalid_request"},
		{"two ways to name one", tokenQuery + "&client_id=c2&object_id=o2", nil, 400, "invalid_request"},
		{"empty name", tokenQuery + "&client_id=", nil, 400, "invalid_request"},
		{"unknown identity", tokenQuery + "&client_id=nobody", nil, 400, "Identity not found"},
		{"none named of two", tokenQuery, nil, 400, "Multiple user assigned identities exist"},
		{"broken query", tokenQuery + "&x=%zz", nil, 400, "invalid_request"},
		{"other path", tokenQuery, func(r *http.Request) { r.URL.Path = "/metadata/attested/document" }, 404, "not_found"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := imdsRequest(c.query)
			if c.change != nil {
				c.change(r)
			}
			w := httptest.NewRecorder()
			a.imdsHandler().ServeHTTP(w, r) // a handler of its own each time: rates are another test
			body := w.Body.String()
			if w.Code != c.status || !strings.Contains(body, c.code) {
				t.Errorf("answer %d %s, want %d and %s", w.Code, body, c.status, c.code)
			}
			if w.Header().Get("Content-Type") != "application/json; charset=utf-8" || !json.Valid(w.Body.Bytes()) {
				t.Errorf("clients decode every answer: %s %s", w.Header().Get("Content-Type"), body)
			}
			if w.Code != 200 && strings.Contains(body, "token-of") {
				t.Error("a refusal carries a token")
			}
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.asked) != 2 {
		t.Errorf("the server was asked for %d tokens; two identities and one resource need 2, the rest is kept", len(s.asked))
	}
}

// TestIMDSAnswer checks the form of a token's answer: every number is a string.
func TestIMDSAnswer(t *testing.T) {
	a, _ := imdsAgent(t, identities[:1])
	w := httptest.NewRecorder()
	a.imdsHandler().ServeHTTP(w, imdsRequest(tokenQuery)) // the only identity need not be named
	var got map[string]string                             // decoding fails on anything but strings
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatalf("%v in %s", err, w.Body)
	}
	for _, k := range []string{"access_token", "client_id", "expires_in", "expires_on", "ext_expires_in", "not_before", "resource", "token_type"} {
		if got[k] == "" {
			t.Errorf("%s is missing", k)
		}
	}
	if got["resource"] != "https://vault.azure.cn" || got["token_type"] != "Bearer" {
		t.Errorf("answer %v", got)
	}
}

// TestIMDSNoIdentity: a pool without identities.
func TestIMDSNoIdentity(t *testing.T) {
	a, _ := imdsAgent(t, nil)
	w := httptest.NewRecorder()
	a.imdsHandler().ServeHTTP(w, imdsRequest(tokenQuery))
	if w.Code != 400 || !strings.Contains(w.Body.String(), "Identity not found") {
		t.Errorf("answer %d %s", w.Code, w.Body)
	}
}

// TestIMDSRate: the 21st request of a moment is told to come back.
func TestIMDSRate(t *testing.T) {
	a, _ := imdsAgent(t, identities[:1])
	h := a.imdsHandler()
	last := 0
	for range 30 {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, imdsRequest(tokenQuery))
		if last = w.Code; last == http.StatusTooManyRequests {
			if w.Header().Get("Retry-After") == "" {
				t.Error("429 without Retry-After")
			}
			break
		}
	}
	if last != http.StatusTooManyRequests {
		t.Errorf("the last of 30 requests at once was answered %d", last)
	}
}

func TestBucket(t *testing.T) {
	b, now := newBucket(2), time.Unix(0, 0)
	for i, want := range []bool{true, true, false} {
		if b.take(now) != want {
			t.Errorf("request %d: not %v", i, want)
		}
	}
	if !b.take(now.Add(500 * time.Millisecond)) {
		t.Error("half a second gives one request at 2/s")
	}
	if b.take(now.Add(500 * time.Millisecond)) {
		t.Error("and only one")
	}
}

// TestIMDSInstance: the little that is known of the instance.
func TestIMDSInstance(t *testing.T) {
	a, _ := imdsAgent(t, nil)
	r := imdsRequest("api-version=2021-02-01")
	r.URL.Path = "/metadata/instance"
	w := httptest.NewRecorder()
	a.imdsHandler().ServeHTTP(w, r)
	var got struct{ Compute struct{ Name, OSType string } }
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != 200 || got.Compute.Name == "" {
		t.Errorf("answer %d %s", w.Code, w.Body)
	}
}

// TestIMDSOverTheNetwork asks the served endpoint as a program on the node would.
func TestIMDSOverTheNetwork(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	s.goal.Identities = identities[:1]
	cfg := s.config()
	startAgent(t, cfg)
	var body []byte
	waitFor(t, "the endpoint gives a token", func() bool {
		req, err := http.NewRequest(http.MethodGet, "http://"+cfg.IMDSListen.Addr().String()+"/metadata/identity/oauth2/token?"+tokenQuery, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Metadata", "true")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ = io.ReadAll(resp.Body)
		return resp.StatusCode == 200 // before the first goal state it is 503, which clients try again
	})
	if !strings.Contains(string(body), "token-of-"+identities[0].ClientID) {
		t.Errorf("answer %s", body)
	}
}

// TestTokensAreForgotten: a token asked for under old identities is not kept under new ones.
func TestTokensAreForgotten(t *testing.T) {
	tk := newTokens()
	now := time.Now()
	k := tokenKey{"c", "r"}
	asked := 0
	ask := func() (node.TokenResponse, error) {
		asked++
		tk.forget() // the goal state changes while the server answers
		return node.TokenResponse{ExpiresOn: now.Add(time.Hour)}, nil
	}
	for range 2 {
		if _, err := tk.get(k, now, ask); err != nil {
			t.Fatal(err)
		}
	}
	if asked != 2 {
		t.Errorf("asked %d times, want 2", asked)
	}
	soon := func() (node.TokenResponse, error) {
		asked++
		return node.TokenResponse{ExpiresOn: now.Add(4 * time.Minute)}, nil
	}
	for range 2 {
		if _, err := tk.get(k, now, soon); err != nil {
			t.Fatal(err)
		}
	}
	if asked != 4 {
		t.Errorf("a token with four minutes left was given out again")
	}
	away := func() (node.TokenResponse, error) { return node.TokenResponse{}, errors.New("connection refused") }
	if _, err := tk.get(k, now.Add(3*time.Minute), away); err != nil {
		t.Errorf("the server is away, and the token has a minute left: %v", err)
	}
	if _, err := tk.get(k, now.Add(5*time.Minute), away); err == nil {
		t.Error("a token that has run out was given out")
	}
	denied := func() (node.TokenResponse, error) { return node.TokenResponse{}, &answerError{Status: 403} }
	if _, err := tk.get(k, now.Add(3*time.Minute), denied); err == nil {
		t.Error("the server said no, and the old token was given out")
	}
}

func FuzzIMDSQuery(f *testing.F) {
	f.Add(tokenQuery, "/metadata/identity/oauth2/token")
	f.Add(tokenQuery+"&msi_res_id=%2Fsubscriptions%2Fx", "/metadata/identity/oauth2/token")
	f.Add("api-version=2018-02-01&resource=https://management.azure.com/&client_id=b9f6dd56-d2d6-4967-99d7-8062d56fd84c", "/metadata/identity/oauth2/token/")
	f.Add("format=text&api-version=2021-02-01", "/metadata/instance/compute/name")
	f.Fuzz(func(t *testing.T, query, path string) {
		r := imdsRequest("")
		r.URL.RawQuery, r.URL.Path = query, path
		q, e := parseIMDS(r)
		if e != nil {
			if e.Status != 400 || e.Description == "" {
				t.Errorf("refused with %+v", e)
			}
			return
		}
		id, e := chooseIdentity(identities, q.identity)
		if e == nil && !strings.EqualFold(id.ClientID, q.identity.ClientID) && !strings.EqualFold(id.ObjectID, q.identity.ObjectID) &&
			!strings.EqualFold(strings.TrimRight(id.ResourceID, "/"), strings.TrimRight(q.identity.ResourceID, "/")) {
			t.Errorf("%q chose %s, which it does not name", query, id.ClientID)
		}
	})
}
