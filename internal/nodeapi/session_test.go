package nodeapi_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/nodeapi"
)

// exchange is a switchboard with the server that agents come to. The test
// decides what an agent does when it is called.
type exchange struct {
	*nodeapi.Switchboard
	t      *testing.T
	server *httptest.Server
	called func(agentID, sessionID, kind string) bool
}

func newExchange(t *testing.T, cfg nodeapi.SwitchboardConfig) *exchange {
	x := &exchange{t: t}
	cfg.Announce = func(agentID, sessionID, kind string) bool { return x.called(agentID, sessionID, kind) }
	x.Switchboard = nodeapi.NewSwitchboard(cfg)
	x.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		agent, id, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		if err := x.ServeNode(w, r, agent, id); err != nil {
			http.Error(w, fault.From(err).Code, http.StatusNotFound)
		}
	}))
	t.Cleanup(x.server.Close)
	return x
}

// come is an agent's request for a session; conn is nil if it was refused with code.
func (x *exchange) come(agentID, sessionID string) (conn net.Conn, r *bufio.Reader, code string) {
	conn, err := net.Dial("tcp", x.server.Listener.Addr().String())
	if err != nil {
		x.t.Error(err)
		return nil, nil, ""
	}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(conn, "POST /"+agentID+"/"+sessionID+" HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: "+node.SessionProtocol+"\r\nContent-Length: 0\r\n\r\n")
	r = bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		x.t.Error(err)
		return nil, nil, ""
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(resp.Body)
		conn.Close()
		return nil, nil, strings.TrimSpace(string(b))
	}
	return conn, r, ""
}

// TestSession: bytes go both ways, and the end of one side is the end of the other.
func TestSession(t *testing.T) {
	for _, first := range []string{"agent", "caller"} {
		x := newExchange(t, nodeapi.SwitchboardConfig{})
		agentDone := make(chan string, 1)
		x.called = func(agentID, id, kind string) bool {
			if agentID != "n0" || kind != "shell" {
				t.Errorf("agent %s was called for %s", agentID, kind)
			}
			go func() {
				conn, r, code := x.come(agentID, id)
				if conn == nil {
					t.Errorf("the agent was refused: %s", code)
					agentDone <- ""
					return
				}
				defer conn.Close()
				line, _ := r.ReadString('\n')
				io.WriteString(conn, "heard "+line)
				if first == "caller" {
					io.Copy(io.Discard, r) // until the switchboard ends it
				}
				agentDone <- line
			}()
			return true
		}
		join, err := x.Open(t.Context(), "n0", "shell")
		if err != nil {
			t.Fatal(err)
		}
		ours, theirs := net.Pipe()
		joined := make(chan struct{})
		go func() { join(theirs); close(joined) }()
		ours.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(ours, "hello\n")
		r := bufio.NewReader(ours)
		if line, err := r.ReadString('\n'); err != nil || line != "heard hello\n" {
			t.Errorf("the caller read %q, %v", line, err)
		}
		if first == "caller" {
			ours.Close()
		} else if _, err := r.ReadByte(); err == nil {
			t.Error("the agent's end did not end the caller's side")
		}
		<-joined
		if line := <-agentDone; line != "hello\n" {
			t.Errorf("the agent read %q", line)
		}
	}
}

// TestSessionRefused: each way that a session does not come about has its own answer.
func TestSessionRefused(t *testing.T) {
	x := newExchange(t, nodeapi.SwitchboardConfig{Answer: 50 * time.Millisecond})
	x.called = func(string, string, string) bool { return false }
	if _, err := x.Open(t.Context(), "n0", "shell"); !errors.Is(err, fault.Unavailable) || fault.From(err).Code != "NodeNotConnected" {
		t.Errorf("an agent that is not connected: %v", err)
	}
	x.called = func(string, string, string) bool { return true }
	if _, err := x.Open(t.Context(), "n0", "shell"); !errors.Is(err, fault.Timeout) {
		t.Errorf("an agent that does not come: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	x.called = func(string, string, string) bool { cancel(); return true }
	if _, err := x.Open(ctx, "n0", "shell"); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who gave up: %v", err)
	}
}

// TestSessionIsForOneAgentOnce: another agent, a guessed id, a second request
// and a late one find no session.
func TestSessionIsForOneAgentOnce(t *testing.T) {
	x := newExchange(t, nodeapi.SwitchboardConfig{Answer: 10 * time.Second})
	var id atomic.Value
	x.called = func(agentID, sessionID, _ string) bool {
		id.Store(sessionID)
		for _, c := range []struct{ reason, agent, session string }{
			{"another node's agent", "n1", sessionID},
			{"a guessed session", agentID, "ABCDEFGH"},
		} {
			if conn, _, code := x.come(c.agent, c.session); conn != nil || code != "SessionNotFound" {
				t.Errorf("%s was let in (%s)", c.reason, code)
			}
		}
		go func() {
			if conn, _, _ := x.come(agentID, sessionID); conn != nil {
				conn.Close()
			}
		}()
		return true
	}
	join, err := x.Open(t.Context(), "n0", "shell")
	if err != nil {
		t.Fatal(err)
	}
	if conn, _, code := x.come("n0", id.Load().(string)); conn != nil || code != "SessionNotFound" {
		t.Errorf("a second request was let in (%s)", code)
	}
	ours, theirs := net.Pipe()
	defer ours.Close()
	join(theirs)
}

// TestSessionLimitsAndIdle: sessions are counted, silence ends one, and its place is free again.
func TestSessionLimitsAndIdle(t *testing.T) {
	x := newExchange(t, nodeapi.SwitchboardConfig{Limit: 1, Idle: 50 * time.Millisecond})
	x.called = func(agentID, id, _ string) bool {
		go func() {
			if conn, r, _ := x.come(agentID, id); conn != nil {
				io.Copy(io.Discard, r) // says nothing
				conn.Close()
			}
		}()
		return true
	}
	for range 2 { // the second time shows that the place was given back
		join, err := x.Open(t.Context(), "n0", "shell")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := x.Open(t.Context(), "n0", "shell"); !errors.Is(err, fault.TooMany) {
			t.Errorf("a session over the limit: %v", err)
		}
		ours, theirs := net.Pipe()
		join(theirs) // returns when both were silent for the idle time
		if _, err := ours.Read(make([]byte, 1)); err == nil {
			t.Error("the caller of a silent session was not let go")
		}
	}
}
