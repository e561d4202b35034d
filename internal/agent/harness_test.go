package agent

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/nodeapi"
	"keyfleet.dev/keyfleet/internal/pki"
)

const nodeHost = "node.keyfleet.test"

// testServer is a real node edge over real TLS on loopback, on a fleet of one
// node that the test moves by hand.
type testServer struct {
	t    *testing.T
	ca   *pki.CA
	addr string
	edge *nodeapi.Edge
	http *http.Server
	logs nodeapi.LogDir

	mu       sync.Mutex
	tokens   map[string]string // join token -> key hash that spent it
	goal     node.GoalState
	gone     bool
	lost     int // answers of enrolments to lose
	reports  []node.StatusReport
	news     chan struct{}
	renewals int
	asked    []node.TokenRequest
	packages map[string][]byte
	follow   func(string, int64)
	fetches  int
}

func newTestServer(t *testing.T, edge nodeapi.Config) *testServer {
	t.Helper()
	ca, err := pki.NewCA("test CA", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s := &testServer{
		t: t, ca: ca, tokens: map[string]string{"good": ""}, news: make(chan struct{}, 1000), packages: map[string][]byte{},
		logs: nodeapi.LogDir(t.TempDir()),
		goal: node.GoalState{Revision: 1, Node: "node1", Extensions: []node.Extension{}, Poll: 300},
	}
	edge.Nodes, edge.Authority, edge.Tokens, edge.Packages, edge.Logs = s, ca, s, s, s.logs
	s.edge = nodeapi.New(edge)
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := ca.IssueServer([]string{nodeHost}, key.Public(), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(chain, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	s.listen("127.0.0.1:0", nodeapi.TLS(&tls.Config{Certificates: []tls.Certificate{pair}}, ca.Pool()))
	ctx, cancel := context.WithCancel(context.Background())
	var run sync.WaitGroup
	run.Go(func() { _ = s.edge.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		run.Wait()
		s.edge.Close()
		s.http.Close()
	})
	return s
}

func (s *testServer) listen(addr string, conf *tls.Config) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = l.Addr().String()
	s.http = &http.Server{Handler: s.edge, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	go s.http.Serve(tls.NewListener(l, conf))
}

// The pool operations.

func (s *testServer) Enrol(_ context.Context, req node.EnrolRequest, keyHash string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	spent, ok := s.tokens[req.Token]
	if !ok || spent != "" && spent != keyHash {
		return "", fault.New(fault.Unauthenticated, "JoinTokenRefused", "The join token does not count.")
	}
	s.tokens[req.Token] = keyHash
	if s.lost > 0 {
		s.lost--
		return "", fault.New(fault.Unavailable, "AnswerLost", "The answer is lost.").After(time.Millisecond)
	}
	return "node1", nil
}

func (s *testServer) Renew(context.Context, string, string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.renewals++
	return nil
}

func (s *testServer) Goal(_ context.Context, id string) (node.GoalState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fetches++
	if s.gone || id != "node1" {
		return node.GoalState{}, fault.New(fault.NotFound, "NodeNotFound", "There is no node %s.", id)
	}
	return s.goal, nil
}

func (s *testServer) FollowGoals(ctx context.Context, fn func(string, int64)) error {
	s.mu.Lock()
	s.follow = fn
	s.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (s *testServer) Report(_ context.Context, _ string, r node.StatusReport) error {
	s.mu.Lock()
	s.reports = append(s.reports, r)
	s.mu.Unlock()
	s.news <- struct{}{}
	return nil
}

func (s *testServer) Token(_ context.Context, _ string, req node.TokenRequest) (node.TokenResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, req)
	now := time.Now()
	return node.TokenResponse{AccessToken: "token-of-" + req.ClientID, ClientID: req.ClientID, Resource: req.Resource, NotBefore: now, ExpiresOn: now.Add(time.Hour)}, nil
}

type seekCloser struct{ *bytes.Reader }

func (seekCloser) Close() error { return nil }

func (s *testServer) Open(_ context.Context, sum string) (io.ReadSeekCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.packages[sum]
	if !ok {
		return nil, fault.New(fault.NotFound, "PackageNotFound", "There is no such package.")
	}
	return seekCloser{bytes.NewReader(b)}, nil
}

// change changes the goal state and tells the agent.
func (s *testServer) change(fn func(g *node.GoalState)) {
	s.mu.Lock()
	s.goal.Extensions = slices.Clone(s.goal.Extensions)
	fn(&s.goal)
	s.goal.Revision++
	rev, follow := s.goal.Revision, s.follow
	s.mu.Unlock()
	if follow != nil {
		follow("node1", rev)
	}
}

// addPackage offers a package made of files, and returns its reference.
func (s *testServer) addPackage(files map[string]string) *node.Package {
	s.t.Helper()
	b := zipOf(s.t, files)
	sum := sha256.Sum256(b)
	p := &node.Package{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(b))}
	s.mu.Lock()
	s.packages[p.SHA256] = b
	s.mu.Unlock()
	return p
}

// waitReport waits until a report satisfies want and returns it.
func (s *testServer) waitReport(what string, want func(r node.StatusReport) bool) node.StatusReport {
	s.t.Helper()
	deadline := time.After(2 * time.Minute)
	for {
		s.mu.Lock()
		var last *node.StatusReport
		if n := len(s.reports); n > 0 {
			last = &s.reports[n-1]
		}
		s.mu.Unlock()
		if last != nil && want(*last) {
			return *last
		}
		select {
		case <-s.news:
		case <-deadline:
			text, _ := json.MarshalIndent(last, "", " ")
			s.t.Fatalf("no report with %s; the last one is %s", what, text)
		}
	}
}

// waitStatus waits until an extension is reported with this status.
func (s *testServer) waitStatus(name, status string) node.ExtensionStatus {
	s.t.Helper()
	var out node.ExtensionStatus
	s.waitReport(name+" "+status, func(r node.StatusReport) bool {
		for _, x := range r.Extensions {
			if x.Name == name && x.Status == status {
				out = x
				return true
			}
		}
		return false
	})
	return out
}

// config is a configuration for an agent of this server, in short directories:
// the paths of Unix sockets are limited.
func (s *testServer) config() Config {
	s.t.Helper()
	dir, err := os.MkdirTemp("", "kf")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return Config{
		Server: "https://" + nodeHost, Address: s.addr, CAHash: s.ca.Hash(), Token: "good",
		LibDir: filepath.Join(dir, "lib"), LogDir: filepath.Join(dir, "log"), HostsFile: filepath.Join(dir, "hosts"),
		IMDSListen: l, Version: "test", Log: log,
		Timeouts: Timeouts{Poll: 10 * time.Millisecond, Report: time.Second, Retry: 50 * time.Millisecond, Unreadable: 200 * time.Millisecond},
	}
}

// startAgent runs an agent until stop is called (or the test ends), which returns what Run returned.
func startAgent(t *testing.T, cfg Config) (a *Agent, stop func() error) {
	t.Helper()
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var once sync.Once
	var result error
	stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case result = <-done:
			case <-time.After(time.Minute):
				t.Error("the agent did not end")
			}
			if err := a.Close(); err != nil {
				t.Error(err)
			}
		})
		return result
	}
	t.Cleanup(func() { _ = stop() })
	return a, stop
}

// zipOf makes a zip of files in the order of their names.
func zipOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	var names []string
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		w, err := z.Create(n)
		if err == nil {
			_, err = io.WriteString(w, files[n])
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// script is an extension whose commands are one shell script. It writes a line
// for every call to calls, then runs body, in which $1 is the operation.
func script(calls, body, manifest string) map[string]string {
	m := `[{"name":"test","version":1.0,"handlerManifest":{` +
		`"installCommand":"bin/h.sh install","uninstallCommand":"bin/h.sh uninstall","updateCommand":"bin/h.sh update",` +
		`"enableCommand":"bin/h.sh enable","disableCommand":"bin/h.sh disable","rebootAfterInstall":false,"reportHeartbeat":false` + manifest + `}}]`
	return map[string]string{
		"HandlerManifest.json": m,
		"manifest.xml":         "<ExtensionImage/>",
		"bin/h.sh": "#!/bin/bash\n" +
			"echo \"$AZURE_GUEST_AGENT_EXTENSION_VERSION $1 ${ConfigExtensionName:+$ConfigExtensionName }$ConfigSequenceNumber\" >> " + calls + "\n" +
			"status() { f=status/${ConfigExtensionName:+$ConfigExtensionName.}$ConfigSequenceNumber.status\n" +
			"  echo \"[{\\\"status\\\":{\\\"code\\\":0,\\\"formattedMessage\\\":{\\\"lang\\\":\\\"en\\\",\\\"message\\\":\\\"$2\\\"},\\\"operation\\\":\\\"$3\\\",\\\"status\\\":\\\"$1\\\"},\\\"timestampUTC\\\":\\\"2021-03-03T23:12:23Z\\\",\\\"version\\\":\\\"1.0\\\"}]\" > $f.tmp\n" +
			"  mv $f.tmp $f; }\n" + body + "\n",
	}
}

const succeed = `[ "$1" = enable ] && status success ready start; true`

// ext is an extension of the goal state.
func ext(name, typ, version string, p *node.Package) node.Extension {
	return node.Extension{Name: name, Publisher: "Test.Pub", Type: typ, Version: version, TypeHandlerVersion: version, Package: p, Sequence: 1, Settings: json.RawMessage(`{"a":1}`)}
}

func readLines(t *testing.T, path string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\n"), "\n")
}

// waitFor polls a condition that has no other sign.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("it did not happen that %s", what)
}
