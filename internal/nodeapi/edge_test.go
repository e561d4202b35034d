package nodeapi

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

const host = "node.keyfleet.test"

// fleet is a fake of the pool operations.
type fleet struct {
	mu     sync.Mutex
	goals  map[string]node.GoalState
	asked  []access.Principal // who asked for goal states
	report []node.StatusReport
	follow func(string, int64)
	ready  chan struct{} // closed when follow is there
}

func (f *fleet) Enrol(_ context.Context, req node.EnrolRequest, keyHash string) (string, error) {
	if len(keyHash) != 64 {
		return "", fmt.Errorf("key hash %q", keyHash)
	}
	switch req.Token {
	case "good":
		return "node1", nil
	case "panic":
		panic("a bug")
	case "broken":
		return "", fmt.Errorf("store: secret detail")
	}
	return "", fault.New(fault.Unauthenticated, "JoinTokenRefused", "The join token does not count.").WithFix("make another")
}

func (f *fleet) Renew(_ context.Context, id, _ string) error {
	_, err := f.Goal(context.Background(), id)
	return err
}

func (f *fleet) Goal(ctx context.Context, id string) (node.GoalState, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, _ := access.From(ctx)
	f.asked = append(f.asked, c.Principal)
	g, ok := f.goals[id]
	if !ok {
		return g, fault.New(fault.NotFound, "NodeNotFound", "There is no such node.")
	}
	return g, nil
}

func (f *fleet) FollowGoals(ctx context.Context, fn func(string, int64)) error {
	f.mu.Lock()
	f.follow = fn
	close(f.ready)
	f.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (f *fleet) Report(_ context.Context, id string, r node.StatusReport) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.report = append(f.report, r)
	return nil
}

func (f *fleet) Token(_ context.Context, id string, req node.TokenRequest) (node.TokenResponse, error) {
	if req.ClientID == "unknown" {
		return node.TokenResponse{}, fault.New(fault.Invalid, "IdentityNotFound", "The pool has no such identity.")
	}
	return node.TokenResponse{AccessToken: "of-" + id, Resource: req.Resource}, nil
}

// bed is an edge behind real TLS.
type bed struct {
	t     *testing.T
	ca    *pki.CA
	edge  *Edge
	fleet *fleet
	addr  string
	logs  LogDir
	pkgs  PackageDir
}

func newBed(t *testing.T, cfg Config) *bed {
	t.Helper()
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{goals: map[string]node.GoalState{}, ready: make(chan struct{})}
	for i := range 3 {
		id := fmt.Sprintf("node%d", i+1)
		f.goals[id] = node.GoalState{Revision: int64(10 + i), Node: id}
	}
	b := &bed{t: t, ca: ca, fleet: f, logs: LogDir(t.TempDir()), pkgs: PackageDir(t.TempDir())}
	cfg.Nodes, cfg.Authority, cfg.Tokens, cfg.Packages, cfg.Logs = f, ca, f, b.pkgs, b.logs
	b.edge = New(cfg)
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.IssueServer([]string{host}, key.Public(), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	srv := &http.Server{Handler: b.edge, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	go srv.Serve(tls.NewListener(l, TLS(&tls.Config{Certificates: []tls.Certificate{pair(t, chain, key)}}, ca.Pool())))
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { _ = b.edge.Run(ctx) })
	<-f.ready
	t.Cleanup(func() {
		cancel()
		run.Wait()
		b.edge.Close()
		srv.Close()
	})
	return b
}

func pair(t testing.TB, chain []byte, key crypto.Signer) tls.Certificate {
	t.Helper()
	text, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p, err := tls.X509KeyPair(chain, text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// agentCert is a client certificate of ca with this common name and URI.
func agentCert(t testing.TB, ca *pki.CA, cn, uri string, life time.Duration) *tls.Certificate {
	t.Helper()
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	var uris []*url.URL
	if uri != "" {
		uris = []*url.URL{u}
	}
	chain, err := ca.IssueClient(cn, uris, &x509.CertificateRequest{PublicKey: key.Public()}, time.Now(), life)
	if err != nil {
		t.Fatal(err)
	}
	c := pair(t, chain, key)
	return &c
}

// client is an HTTP client with a certificate (nil: none).
func (b *bed) client(cert *tls.Certificate) *http.Client {
	conf := &tls.Config{RootCAs: b.ca.Pool(), ServerName: host}
	if cert != nil {
		// Sent also where it is of a CA that the server does not name.
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	tr := &http.Transport{TLSClientConfig: conf}
	b.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func (b *bed) node(id string) *http.Client {
	return b.client(agentCert(b.t, b.ca, id, "keyfleet://node/"+id, time.Hour))
}

// call sends a request and returns status, body and header.
func (b *bed) call(c *http.Client, method, path, body string, header ...string) (int, string, http.Header) {
	b.t.Helper()
	req, err := http.NewRequest(method, "https://"+b.addr+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, err.Error(), nil
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return resp.StatusCode, string(text), resp.Header
}

func csr(t testing.TB, kind pki.Kind) string {
	t.Helper()
	key, err := pki.NewKey(kind)
	if err != nil {
		t.Fatal(err)
	}
	text, err := pki.NewCSR(key, pki.Template{Subject: "CN=i decide who i am"})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestWhoMayAsk: every route, by every kind of caller. A route without a row
// would be found by the last case.
func TestWhoMayAsk(t *testing.T) {
	b := newBed(t, Config{})
	other, err := pki.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	callers := []struct {
		name string
		c    *http.Client
		want int // for the routes that need a node; 0: the handshake fails
	}{
		{"no certificate", b.client(nil), 401},
		{"certificate of another CA", b.client(agentCert(t, other, "node1", "keyfleet://node/node1", time.Hour)), 0},
		{"expired certificate", b.client(agentCert(t, b.ca, "node1", "keyfleet://node/node1", -time.Minute)), 0},
		{"certificate without URI", b.client(agentCert(t, b.ca, "node1", "", time.Hour)), 401},
		{"URI and name disagree", b.client(agentCert(t, b.ca, "node2", "keyfleet://node/node1", time.Hour)), 401},
		{"URI of something else", b.client(agentCert(t, b.ca, "node1", "keyfleet://server/node1", time.Hour)), 401},
		{"id that is a path", b.client(agentCert(t, b.ca, "../node1", "keyfleet://node/../node1", time.Hour)), 401},
		{"node that is gone", b.node("node9"), 404},
	}
	routes := []struct{ method, path, body string }{
		{"GET", "/v1/goal", ""},
		{"GET", "/v1/watch", ""},
		{"POST", "/v1/renew", `{"csr":` + quote(csr(t, pki.P256)) + `}`},
		{"GET", "/v1/packages/" + strings.Repeat("a", 64), ""},
	}
	for _, c := range callers {
		for _, r := range routes {
			if got, body, _ := b.call(c.c, r.method, r.path, r.body); got != c.want {
				t.Errorf("%s: %s %s answers %d %s, want %d", c.name, r.method, r.path, got, body, c.want)
			}
		}
	}
	for _, path := range []string{"/v1/status", "/v1/token", "/v1/logs", "/v1/sessions/x", "/v1/renew"} {
		if got, body, _ := b.call(b.client(nil), "POST", path, "{}"); got != 401 {
			t.Errorf("no certificate: POST %s answers %d %s", path, got, body)
		}
	}
	if got, _, _ := b.call(b.node("node1"), "GET", "/v1/other", ""); got != 404 {
		t.Errorf("a route that does not exist answers %d", got)
	}
	if got, body, _ := b.call(b.client(nil), "GET", "/v1/ca", ""); got != 200 || body != string(b.ca.PEM()) {
		t.Errorf("the CA is open: %d %s", got, body)
	}
}

func quote(s string) string { b, _ := json.Marshal(s); return string(b) }

func TestEnrol(t *testing.T) {
	b := newBed(t, Config{})
	good := csr(t, pki.P256)
	transport := func(kind pki.Kind) string {
		key, err := pki.NewKey(kind)
		if err != nil {
			t.Fatal(err)
		}
		der, err := pki.SelfSign(pki.Template{Subject: "CN=x", NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}, key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pki.EncodeChain(der))
	}
	cases := []struct {
		name, token, csr, transport string
		status                      int
		code                        string
	}{
		{"a node", "good", good, transport(pki.RSA2048), 200, ""},
		{"no token", "", good, "", 401, "JoinTokenMissing"},
		{"wrong token", "bad", good, "", 401, "JoinTokenRefused"},
		{"no CSR", "good", "", "", 400, "InvalidCSR"},
		{"CSR that is a certificate", "good", transport(pki.P256), "", 400, "InvalidCSR"},
		{"CSR with a changed key", "good", strings.Replace(good, good[60:64], "AAAA", 1), "", 400, "InvalidCSR"},
		{"RSA key", "good", csr(t, pki.RSA2048), "", 400, "InvalidCSR"},
		{"transport key that cannot encrypt", "good", good, transport(pki.P256), 400, "InvalidTransportCertificate"},
		{"a bug", "panic", good, "", 500, "InternalError"},
		{"a fault inside", "broken", good, "", 500, "InternalError"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			req, _ := json.Marshal(node.EnrolRequest{Token: c.token, CSR: c.csr, Transport: c.transport, OS: "linux"})
			status, body, h := b.call(b.client(nil), "POST", "/v1/enrol", string(req))
			if status != c.status || !strings.Contains(body, c.code) {
				t.Fatalf("answer %d %s, want %d %s", status, body, c.status, c.code)
			}
			if strings.Contains(body, "secret detail") || h.Get("X-Request-Id") == "" {
				t.Errorf("answer %s %v", body, h)
			}
			if status != 200 {
				return
			}
			var resp node.EnrolResponse
			if err := json.Unmarshal([]byte(body), &resp); err != nil {
				t.Fatal(err)
			}
			chain, err := pki.ParseChain([]byte(resp.Certificate))
			if err != nil {
				t.Fatal(err)
			}
			leaf := chain[0]
			if resp.Node != "node1" || leaf.Subject.String() != "CN=node1" || leaf.URIs[0].String() != "keyfleet://node/node1" {
				t.Errorf("the server names the node, not the CSR: %s %v", leaf.Subject, leaf.URIs)
			}
			if d := time.Until(leaf.NotAfter); d > 24*time.Hour || d < 23*time.Hour {
				t.Errorf("certificate for %s", d)
			}
		})
	}
	big := strings.Repeat("x", bodyLimit+1)
	if status, _, _ := b.call(b.client(nil), "POST", "/v1/enrol", `{"token":"`+big+`"}`); status != 413 {
		t.Errorf("a body over the limit is answered %d", status)
	}
}

// TestAdmission: over its rate, the edge answers 429 and when to return.
func TestAdmission(t *testing.T) {
	b := newBed(t, Config{EnrolRate: 2, AcceptRate: 0.001})
	req, _ := json.Marshal(node.EnrolRequest{Token: "bad", CSR: csr(t, pki.P256)})
	var got []int
	var h http.Header
	c := b.client(nil)
	for range 4 {
		var status int
		status, _, h = b.call(c, "POST", "/v1/enrol", string(req))
		got = append(got, status)
	}
	if got[0] != 401 || got[3] != 429 || h.Get("Retry-After") == "" {
		t.Errorf("answers %v, Retry-After %q", got, h.Get("Retry-After"))
	}
	w := b.watch("node1")
	defer w.Close()
	if status, _, h := b.call(b.node("node2"), "GET", "/v1/watch", ""); status != 429 || h.Get("Retry-After") == "" {
		t.Errorf("a second watch at once is answered %d", status)
	}
}

func TestGoal(t *testing.T) {
	b := newBed(t, Config{})
	c := b.node("node1")
	status, body, h := b.call(c, "GET", "/v1/goal", "")
	var g node.GoalState
	if err := json.Unmarshal([]byte(body), &g); err != nil || status != 200 || g.Node != "node1" || h.Get("ETag") != `"10"` {
		t.Fatalf("%d %s %v", status, body, h)
	}
	for tag, want := range map[string]int{`"10"`: 304, `W/"10"`: 304, `"9", "10"`: 304, `"9"`: 200, `10`: 200} {
		if status, _, _ := b.call(c, "GET", "/v1/goal", "", "If-None-Match", tag); status != want {
			t.Errorf("If-None-Match %s: %d, want %d", tag, status, want)
		}
	}
	if p := b.fleet.asked[0]; p.Kind != access.Node || p.Node != "node1" {
		t.Errorf("the operation ran as %+v", p)
	}
}

func TestStatusAndToken(t *testing.T) {
	b := newBed(t, Config{})
	c := b.node("node1")
	if status, body, _ := b.call(c, "POST", "/v1/status", `{"revision":10,"extensions":[],"later":1}`); status != 204 {
		t.Errorf("a report of a later agent: %d %s", status, body)
	}
	if status, _, _ := b.call(c, "POST", "/v1/status", `{"revision":10,"revision":11}`); status != 400 {
		t.Errorf("a name twice: %d", status)
	}
	if status, body, _ := b.call(c, "POST", "/v1/token", `{"resource":"r"}`); status != 200 || !strings.Contains(body, "of-node1") {
		t.Errorf("token: %d %s", status, body)
	}
	for body, code := range map[string]string{
		`{}`: "ResourceMissing", `{"resource":"r","clientId":"unknown"}`: "IdentityNotFound", `{"resource":"r","clientId":"a","objectId":"b"}`: "IdentityAmbiguous",
	} {
		if status, text, _ := b.call(c, "POST", "/v1/token", body); status != 400 || !strings.Contains(text, code) {
			t.Errorf("%s: %d %s", body, status, text)
		}
	}
}

func TestPackages(t *testing.T) {
	b := newBed(t, Config{})
	put := func(text string) string {
		sum := sha256.Sum256([]byte(text))
		name := hex.EncodeToString(sum[:])
		if err := os.WriteFile(filepath.Join(string(b.pkgs), name+".zip"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	mine, others := put("0123456789"), put("of another node")
	b.fleet.goals["node1"] = node.GoalState{Extensions: []node.Extension{{Package: &node.Package{SHA256: mine}}, {}}}
	c := b.node("node1")
	if status, body, _ := b.call(c, "GET", "/v1/packages/"+mine, ""); status != 200 || body != "0123456789" {
		t.Errorf("whole: %d %s", status, body)
	}
	if status, body, _ := b.call(c, "GET", "/v1/packages/"+mine, "", "Range", "bytes=4-"); status != 206 || body != "456789" {
		t.Errorf("the rest: %d %s", status, body)
	}
	for _, p := range []string{others, strings.ToUpper(mine), "x", "..%2f..%2fetc%2fpasswd"} {
		if status, _, _ := b.call(c, "GET", "/v1/packages/"+p, ""); status != 404 {
			t.Errorf("%s: %d", p, status)
		}
	}
}

func TestLogs(t *testing.T) {
	b := newBed(t, Config{})
	c := b.node("node1")
	up := func(ext, file, tail string) int {
		body, _ := json.Marshal(node.LogUpload{Extension: ext, File: file, Tail: tail})
		status, _, _ := b.call(c, "POST", "/v1/logs", string(body))
		return status
	}
	if got := up("KVExtensions", "akvvm.log", "old"); got != 204 {
		t.Fatalf("upload: %d", got)
	}
	if got := up("KVExtensions", "akvvm.log", strings.Repeat("\x01", tailLimit)); got != 204 {
		t.Errorf("the largest tail, which JSON makes six times as long: %d", got)
	}
	for _, bad := range [][3]string{{"../x", "f", ""}, {"x", "../f", ""}, {"x", ".hidden", ""}, {"", "f", ""}} {
		if got := up(bad[0], bad[1], bad[2]); got != 400 {
			t.Errorf("%q: %d", bad, got)
		}
	}
	if got := up("x", "f", strings.Repeat("x", tailLimit+1)); got != 413 {
		t.Errorf("over the limit: %d", got)
	}
	for i := range logFiles + 5 {
		up("many", fmt.Sprintf("f%d", i), "x")
	}
	all, err := b.logs.List(t.Context(), "node1", "")
	if err != nil || len(all) != 1+logFiles || len(all[0].Tail) != tailLimit {
		t.Errorf("kept %d files, %v", len(all), err)
	}
	if got, err := b.logs.List(t.Context(), "node2", ""); err != nil || len(got) != 0 {
		t.Errorf("another node's logs: %v, %v", got, err)
	}
	if err := b.logs.Remove(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	if all, _ := b.logs.List(t.Context(), "node1", ""); len(all) != 0 {
		t.Errorf("left: %v", all)
	}
}

// watch opens a watch as an agent does and returns its connection, with the head read.
func (b *bed) watch(id string) net.Conn {
	b.t.Helper()
	cert := agentCert(b.t, b.ca, id, "keyfleet://node/"+id, time.Hour)
	return b.watchAs(cert)
}

func (b *bed) watchAs(cert *tls.Certificate) net.Conn {
	b.t.Helper()
	conn, err := tls.Dial("tcp", b.addr, &tls.Config{RootCAs: b.ca.Pool(), ServerName: host, Certificates: []tls.Certificate{*cert}})
	if err != nil {
		b.t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET /v1/watch HTTP/1.1\r\nHost: %s\r\n\r\n", host)
	head := readUntil(b.t, conn, "\r\n\r\n")
	if !strings.HasPrefix(head, "HTTP/1.1 200 ") {
		b.t.Fatalf("watch answered %q", head)
	}
	return conn
}

// readUntil reads byte by byte, so that nothing is lost between calls.
func readUntil(t *testing.T, conn net.Conn, end string) string {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	var got []byte
	for !bytes.HasSuffix(got, []byte(end)) {
		var c [1]byte
		if _, err := io.ReadFull(conn, c[:]); err != nil {
			t.Fatalf("read %q, then %v", got, err)
		}
		got = append(got, c[0])
	}
	return string(got)
}

func TestWatch(t *testing.T) {
	b := newBed(t, Config{})
	one, two := b.watch("node1"), b.watch("node2")
	defer one.Close()
	defer two.Close()
	for _, c := range []net.Conn{one, two} {
		if got := readUntil(t, c, "\n"); got != "retry 1\n" {
			t.Errorf("first line %q", got)
		}
	}
	b.fleet.follow("node1", 11)
	b.fleet.follow("node9", 12) // nobody watches: nothing happens
	if got := readUntil(t, one, "\n"); got != "rev 11\n" {
		t.Errorf("got %q", got)
	}
	if !b.edge.Announce("node2", "ABC", "shell") || b.edge.Announce("node9", "ABC", "shell") || !b.edge.AskLogs("node2") {
		t.Error("Announce and AskLogs report who watches")
	}
	if got := readUntil(t, two, "\n"); got != "session ABC shell\n" {
		t.Errorf("node2 got %q", got) // and not the revision of node1
	}
	if got := readUntil(t, two, "\n"); got != "logs\n" {
		t.Errorf("node2 got %q", got)
	}
	again := b.watch("node1") // the agent was started anew
	defer again.Close()
	if _, err := io.ReadAll(one); err != nil {
		t.Errorf("the older watch ends with %v", err)
	}
	readUntil(t, again, "\n")
	b.edge.Close()
	if rest, _ := io.ReadAll(again); !strings.HasPrefix(string(rest), "retry ") {
		t.Errorf("a stopping server says how to spread the return: %q", rest)
	}
	if n := b.edge.Watching(); n != 0 {
		t.Errorf("%d watches after Close", n)
	}
	if status, _, _ := b.call(b.node("node1"), "GET", "/v1/watch", ""); status != 503 {
		t.Errorf("a watch after Close: %d", status)
	}
}

// TestWatchPing: an idle watch is pinged, and a peer that is gone is noticed by it.
func TestWatchPing(t *testing.T) {
	b := newBed(t, Config{Ping: 20 * time.Millisecond})
	w := b.watch("node1")
	readUntil(t, w, "\n")
	if got := readUntil(t, w, "\n"); got != "ping\n" {
		t.Errorf("got %q", got)
	}
	w.Close()
	for deadline := time.Now().Add(20 * time.Second); b.edge.Watching() != 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the watch of a closed connection is still held")
		}
	}
}

// TestWaitWatching returns when the agent has come.
func TestWaitWatching(t *testing.T) {
	b := newBed(t, Config{})
	done := make(chan error, 1)
	go func() { done <- b.edge.WaitWatching(t.Context(), "node2") }()
	b.watch("node1").Close()
	defer b.watch("node2").Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestWatchersAreMerged: a slow peer gets the last revision, not all of them, and bounded lines.
func TestWatchersAreMerged(t *testing.T) {
	h := newHub()
	w := &watcher{wake: make(chan struct{}, 1)}
	h.add("n", w)
	for i := range 100 {
		h.revision("n", int64(i+1))
		h.line("n", fmt.Sprintf("session %d shell\n", i))
	}
	text, over := w.take()
	if over || strings.Count(text, "rev ") != 1 || !strings.HasPrefix(text, "rev 100\n") || strings.Count(text, "\n") != 1+maxLines || !strings.Contains(text, "session 99 ") {
		t.Errorf("%q", text)
	}
	if text, _ := w.take(); text != "" {
		t.Errorf("taken twice: %q", text)
	}
}

// TestWatchMemory holds 1,000 watches over real TLS and measures what each
// costs this process on the server's side.
func TestWatchMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("left out: 1,000 TLS handshakes take some 15 s")
	}
	if raceDetector {
		t.Skip("left out: the race detector's own memory would be measured")
	}
	const count = 1000
	b := newBed(t, Config{AcceptRate: 1e6})
	for i := range count {
		id := fmt.Sprintf("node%d", i+1)
		b.fleet.goals[id] = node.GoalState{Node: id}
	}
	conns := make(chan net.Conn, count)
	t.Cleanup(func() {
		close(conns)
		for c := range conns {
			c.Close()
		}
	})
	// The peers live in another process' stead: bare sockets whose TLS state is
	// dropped once the watch is admitted, so that only the server's is counted.
	open := func(i int) {
		id := fmt.Sprintf("node%d", i+1)
		raw, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Error(err)
			return
		}
		cert := agentCert(t, b.ca, id, "keyfleet://node/"+id, time.Hour)
		c := tls.Client(raw, &tls.Config{RootCAs: b.ca.Pool(), ServerName: host, Certificates: []tls.Certificate{*cert}})
		fmt.Fprintf(c, "GET /v1/watch HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		if line, err := bufio.NewReaderSize(c, 64).ReadString('\n'); err != nil || !strings.Contains(line, "200") {
			t.Errorf("watch %d: %q %v", i, line, err)
		}
		conns <- raw
	}
	for i := range 10 { // what the first connections make for all
		open(i)
	}
	before, routines := memory(), runtime.NumGoroutine()
	var wg sync.WaitGroup
	for part := range 2 {
		wg.Go(func() {
			for i := 10 + part; i < count; i += 2 {
				open(i)
			}
		})
	}
	wg.Wait()
	for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > routines+count && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
	}
	each := (memory() - before) / (count - 10)
	perConn := float64(runtime.NumGoroutine()-routines) / (count - 10)
	t.Logf("%d watches: %.1f KiB and %.2f goroutines each (heap and stacks of server and bare peer sockets)", b.edge.Watching(), float64(each)/1024, perConn)
	if b.edge.Watching() != count {
		t.Errorf("%d watches are held", b.edge.Watching())
	}
	if each > 24<<10 || perConn > 1.01 {
		t.Errorf("a watch costs %d bytes and %.2f goroutines; the limits are 24 KiB and 1", each, perConn)
	}
}

// memory is what this process holds in heap and stacks after a collection.
func memory() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

// FuzzEnrolRequest: no body of an agent makes the edge panic or answer 500.
func FuzzEnrolRequest(f *testing.F) {
	f.Add([]byte(`{"token":"bad","hostname":"h","csr":` + quote(csr(f, pki.P256)) + `,"os":"linux","agent":"1"}`))
	f.Add([]byte(`{"token":"good","csr":"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"}`))
	f.Add([]byte(`{"token":"x","transport":"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----","csr":""}`))
	f.Add([]byte(`{"revision":1,"extensions":[{"name":"a","log":["x"]}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var req node.EnrolRequest
		if json.Unmarshal(body, &req) == nil {
			_, _, err := parseCSR(req.CSR)
			if err != nil && fault.KindOf(err) != fault.Invalid {
				t.Errorf("CSR refused with %v", err)
			}
			if err := checkTransport(req.Transport); err != nil && fault.KindOf(err) != fault.Invalid {
				t.Errorf("transport certificate refused with %v", err)
			}
		}
	})
}
