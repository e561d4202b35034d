package nodes_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/nodes"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	poolID = "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/ACR/providers/Microsoft.Batch/batchAccounts/acct1/pools/Sim"
	nodeID = "74773db5fe1b42ab9a4b6cf679d929da000000"
)

// world is the real edge with these routes, seen by the real client. Agents are played.
type world struct {
	t      *testing.T
	server *httptest.Server
	agent  func(stream net.Conn) // what the node does with a session
	logs   [][]node.LogUpload    // what is kept: the first at first, the next once asked

	mu      sync.Mutex
	records []access.Record // guarded by mu
	asked   int             // guarded by mu; how often the agent was asked for logs
}

// Append and InTx make world the audit recorder.
func (w *world) Append(_ context.Context, r access.Record) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.records = append(w.records, r)
	return nil
}

func (w *world) InTx(*store.Tx, access.Record) error { return nil }

// Verify makes world the token verifier: the token is the caller's name.
func (w *world) Verify(_ context.Context, token string, _ []string) (access.Principal, error) {
	if token == "owner" { // the system principal stands for somebody with every right
		return access.SystemPrincipal("owner"), nil
	}
	return access.Principal{Kind: access.Application, ObjectID: token, Name: token}, nil
}

// Open makes world the sessions.
func (w *world) Open(_ context.Context, agentID, kind string) (func(net.Conn), error) {
	if agentID != "agent-of-"+nodeID || kind != "shell" {
		w.t.Errorf("agent %s was called for %s", agentID, kind)
	}
	if w.agent == nil {
		return nil, fault.New(fault.Unavailable, "NodeNotConnected", "The agent is not connected.")
	}
	return func(caller net.Conn) { w.agent(caller) }, nil
}

// List makes world the kept logs.
func (w *world) List(_ context.Context, _, extension string) ([]node.LogUpload, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []node.LogUpload
	for _, l := range w.logs[min(w.asked, len(w.logs)-1)] {
		if extension == "" || l.Extension == extension {
			out = append(out, l)
		}
	}
	return out, nil
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, logs: [][]node.LogUpload{nil}}
	s, err := store.New(t.Context(), store.NewMemory())
	if err != nil {
		t.Fatal(err)
	}
	api, err := azureapi.New(azureapi.Config{
		Endpoints: azureapi.Endpoints{Domain: "example.com"}, Verifier: w, Log: slog.New(slog.DiscardHandler),
		Routes: nodes.Routes(nodes.Config{
			Gate: access.NewGate(access.Config{Store: s, Recorder: w}), Sessions: w, Logs: w,
			AskLogs: func(string) bool { w.mu.Lock(); defer w.mu.Unlock(); w.asked++; return true },
			AgentOf: func(_ context.Context, pool, id string) (string, error) {
				if pool != poolID {
					t.Errorf("the pool came as %s", pool)
				}
				if id != nodeID {
					return "", fault.New(fault.NotFound, "NodeNotFound", "The pool has no node %s.", id)
				}
				return "agent-of-" + id, nil
			},
			Explain: func(_ context.Context, pool, id string) (any, error) {
				return map[string]string{"pool": pool, "node": id}, nil
			},
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.server = httptest.NewTLSServer(api) // its certificate is for *.example.com
	t.Cleanup(w.server.Close)
	return w
}

func (w *world) client(caller string) *client.Client {
	w.t.Helper()
	c, err := client.New(client.Config{
		Endpoints:   keyfleet.Endpoints{ResourceManager: "https://arm.example.com", Login: "https://login.example.com"},
		CA:          pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.server.Certificate().Raw}),
		DialAddress: w.server.Listener.Addr().String(),
		TokenSource: func(context.Context, string) (client.Token, error) {
			return client.Token{Value: keyfleet.Secret(caller), Expires: time.Now().Add(time.Hour)}, nil
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// play is an agent that answers what it was asked for, echoes all input and sizes, and ends with status 3.
func play(stream net.Conn) {
	defer stream.Close()
	var buf []byte
	_, start, err := node.ReadFrame(stream, &buf)
	if err != nil {
		return
	}
	_ = node.WriteFrame(stream, node.FrameOutput, append([]byte("start "), start...))
	for {
		kind, payload, err := node.ReadFrame(stream, &buf)
		switch {
		case err != nil:
			return
		case kind == node.FrameInput:
			_ = node.WriteFrame(stream, node.FrameErrors, payload)
		case kind == node.FrameEnd:
			_ = node.WriteFrame(stream, node.FrameExit, node.ExitPayload(3))
			return
		}
	}
}

// TestShell: an owner's command reaches the node, its output and status come back, and the record says who was where.
func TestShell(t *testing.T) {
	w := newWorld(t)
	w.agent = play
	var out, errs bytes.Buffer
	input := strings.Repeat("all of the input\n", 10000)
	status, err := w.client("owner").Shell(t.Context(), poolID, nodeID, client.Terminal{
		Command: []string{"cat", "/var/lib/waagent/x"}, In: strings.NewReader(input), Out: &out, Err: &errs,
	})
	if err != nil || status != 3 {
		t.Fatalf("the command ended with %d, %v", status, err)
	}
	if got := out.String(); got != `start {"command":["cat","/var/lib/waagent/x"],"terminal":false}` {
		t.Errorf("the node was told %s", got)
	}
	if errs.String() != input {
		t.Errorf("of %d bytes of input came back %d", len(input), errs.Len())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.records) != 1 {
		t.Fatalf("there are %d records", len(w.records))
	}
	r := w.records[0]
	want := access.Record{Outcome: "allowed", Action: "Keyfleet/nodes/shell/action", Resource: poolID, Detail: "node " + nodeID, Name: "owner"}
	got := access.Record{Outcome: r.Outcome, Action: r.Action, Resource: r.Resource, Detail: r.Detail, Name: r.Name}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the record (-want +got):\n%s", diff)
	}
}

// TestShellRefused: refusals are answers with a code, made before a connection is turned over.
func TestShellRefused(t *testing.T) {
	for _, c := range []struct {
		reason, caller, node string
		agent                func(net.Conn)
		status               int
		code                 string
	}{
		{"a caller without a role", "nobody", nodeID, play, http.StatusForbidden, "AuthorizationFailed"},
		{"a caller without a role learns nothing about nodes", "nobody", "other", play, http.StatusForbidden, "AuthorizationFailed"},
		{"a node that the pool does not have", "owner", "other", play, http.StatusNotFound, "NodeNotFound"},
		{"a node that is not connected", "owner", nodeID, nil, http.StatusServiceUnavailable, "NodeNotConnected"},
	} {
		w := newWorld(t)
		w.agent = c.agent
		_, err := w.client(c.caller).Shell(t.Context(), poolID, c.node, client.Terminal{Out: io.Discard})
		var e *client.Error
		if !errors.As(err, &e) || e.Status != c.status || e.Code != c.code {
			t.Errorf("%s: %v", c.reason, err)
		}
		if c.caller == "nobody" && (len(w.records) != 1 || w.records[0].Outcome != "denied") {
			t.Errorf("%s: the records are %v", c.reason, w.records)
		}
	}
}

// TestShellCutOff: a session that ends without a status is an error, not a success.
func TestShellCutOff(t *testing.T) {
	w := newWorld(t)
	w.agent = func(stream net.Conn) { _ = stream.Close() }
	if status, err := w.client("owner").Shell(t.Context(), poolID, nodeID, client.Terminal{Out: io.Discard}); err == nil {
		t.Errorf("a session that was cut off ended with %d", status)
	}
	w.agent = func(stream net.Conn) {
		_ = node.WriteFrame(stream, node.FrameFailure, []byte("no shell here"))
		_ = stream.Close()
	}
	if _, err := w.client("owner").Shell(t.Context(), poolID, nodeID, client.Terminal{Out: io.Discard}); err == nil || !strings.Contains(err.Error(), "no shell here") {
		t.Errorf("the node's reason is lost: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w.agent = func(stream net.Conn) { cancel(); _, _ = io.Copy(io.Discard, stream) }
	if _, err := w.client("owner").Shell(ctx, poolID, nodeID, client.Terminal{Out: io.Discard}); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who gave up got %v", err)
	}
}

// TestShellNeedsUpgrade: a plain POST is told what is missing.
func TestShellNeedsUpgrade(t *testing.T) {
	w := newWorld(t)
	c := w.client("owner")
	_, err := c.Do(t.Context(), client.Request{Method: http.MethodPost, URL: c.ARM("/keyfleet/v1" + poolID + "/nodes/" + nodeID + "/shell")})
	var e *client.Error
	if !errors.As(err, &e) || e.Code != "UpgradeRequired" || e.Fix == "" {
		t.Errorf("got %v", err)
	}
}

// TestLogs: the agent is asked, and what it then sends is answered.
func TestLogs(t *testing.T) {
	w := newWorld(t)
	w.logs = [][]node.LogUpload{
		{{Extension: "KVExtensions", File: "old.log", Tail: "old"}},
		{{Extension: "KVExtensions", File: "new.log", Tail: "new"}, {Extension: "other", File: "o.log", Tail: "o"}},
	}
	c := w.client("owner")
	resp, err := c.Do(t.Context(), client.Request{Method: http.MethodGet, URL: c.ARM("/keyfleet/v1" + poolID + "/nodes/" + nodeID + "/logs?extension=KVExtensions")})
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Value []node.LogUpload }
	if err := json.Unmarshal(resp.Body, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]node.LogUpload{{Extension: "KVExtensions", File: "new.log", Tail: "new"}}, got.Value); diff != "" {
		t.Errorf("logs (-want +got):\n%s", diff)
	}
	if _, err := w.client("nobody").Do(t.Context(), client.Request{Method: http.MethodGet, URL: c.ARM("/keyfleet/v1" + poolID + "/nodes/" + nodeID + "/logs")}); err == nil {
		t.Error("a caller without a role got logs")
	}
}

// TestExplain: the pool's and the node's names reach the explanation in the caller's casing and in ours.
func TestExplain(t *testing.T) {
	w := newWorld(t)
	c := w.client("owner")
	resp, err := c.Do(t.Context(), client.Request{Method: http.MethodGet, URL: c.ARM("/keyfleet/v1" + poolID + "/nodes/" + strings.ToUpper(nodeID) + "/explain")})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"node":"` + nodeID + `","pool":"` + poolID + `"}`; string(resp.Body) != want {
		t.Errorf("got %s, want %s", resp.Body, want)
	}
}
