//go:build !windows

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// sessionCaller is the caller's end of a session under test.
type sessionCaller struct {
	t    *testing.T
	conn net.Conn
	done chan error // of serveSession
	buf  []byte
}

func openSession(t *testing.T, start node.SessionStart) *sessionCaller {
	t.Helper()
	ours, theirs := net.Pipe()
	c := &sessionCaller{t: t, conn: ours, done: make(chan error, 1)}
	go func() { c.done <- serveSession(context.Background(), theirs) }()
	t.Cleanup(func() { ours.Close() })
	ours.SetDeadline(time.Now().Add(20 * time.Second))
	text, err := json.Marshal(start)
	if err != nil {
		t.Fatal(err)
	}
	c.send(node.FrameStart, text)
	return c
}

func (c *sessionCaller) send(kind node.FrameKind, payload []byte) {
	c.t.Helper()
	if err := node.WriteFrame(c.conn, kind, payload); err != nil {
		c.t.Fatal(err)
	}
}

// until reads frames until the output holds text, or the session is over.
func (c *sessionCaller) until(text string) (out, errs string, status int, over bool) {
	c.t.Helper()
	for {
		kind, payload, err := node.ReadFrame(c.conn, &c.buf)
		if err != nil {
			c.t.Fatalf("the session ended without a status: %v; so far %q, %q", err, out, errs)
		}
		switch kind {
		case node.FrameOutput:
			out += string(payload)
			if text != "" && strings.Contains(out, text) {
				return out, errs, 0, false
			}
		case node.FrameErrors:
			errs += string(payload)
		case node.FrameExit:
			status, err := node.ParseExit(payload)
			if err != nil {
				c.t.Fatal(err)
			}
			return out, errs, status, true
		case node.FrameFailure:
			return out, "failure: " + string(payload), -1, true
		}
	}
}

// TestCommand: a command's output, errors, input and status come through.
func TestCommand(t *testing.T) {
	for _, c := range []struct {
		reason    string
		command   []string
		input     string
		out, errs string
		status    int
	}{
		{"output", []string{"echo", "hello"}, "", "hello\n", "", 0},
		{"errors have their own way", []string{"sh", "-c", "echo bad >&2; exit 3"}, "", "", "bad\n", 3},
		{"input arrives and ends", []string{"cat"}, "from the caller", "from the caller", "", 0},
		{"a signal is 128 and its number", []string{"sh", "-c", "kill -TERM $$"}, "", "", "", 128 + 15},
		{"no terminal was asked for", []string{"sh", "-c", "test -t 0 || echo none"}, "", "none\n", "", 0},
		{"what it leaves behind does not hold the session", []string{"sh", "-c", "sleep 30 & echo left"}, "", "left\n", "", 0},
		{"an unknown command is a failure", []string{"no-such-program"}, "", "", "failure: no-such-program: command not found", -1},
	} {
		s := openSession(t, node.SessionStart{Command: c.command})
		if c.status >= 0 {
			go func() { // the process may end before it has read this
				_ = node.WriteFrame(s.conn, node.FrameInput, []byte(c.input))
				_ = node.WriteFrame(s.conn, node.FrameEnd, nil)
			}()
		}
		out, errs, status, _ := s.until("")
		if out != c.out || errs != c.errs || status != c.status {
			t.Errorf("%s: got %q, %q, %d; want %q, %q, %d", c.reason, out, errs, status, c.out, c.errs, c.status)
		}
	}
}

// TestTerminal: a shell on a terminal has its size, follows it, and ends with the caller's exit.
func TestTerminal(t *testing.T) {
	s := openSession(t, node.SessionStart{Terminal: true, Term: "xterm", Columns: 132, Rows: 43, Command: []string{"sh"}})
	go func() { // frames are written while output is read
		_ = node.WriteFrame(s.conn, node.FrameInput, []byte("stty size; echo TERM=$TERM\n"))
	}()
	s.until("TERM=xterm")
	go func() {
		_ = node.WriteFrame(s.conn, node.FrameResize, node.ResizePayload(100, 30))
		_ = node.WriteFrame(s.conn, node.FrameInput, []byte("stty size\n"))
	}()
	s.until("30 100")
	go func() { _ = node.WriteFrame(s.conn, node.FrameInput, []byte("exit 7\n")) }()
	if _, _, status, over := s.until(""); !over || status != 7 {
		t.Errorf("the shell ended with %d, %t", status, over)
	}
	if err := <-s.done; err != nil {
		t.Errorf("the session ended with %v", err)
	}
}

// TestLoginShell: without a command there is a login shell on the terminal.
func TestLoginShell(t *testing.T) {
	s := openSession(t, node.SessionStart{Terminal: true, Term: "dumb"})
	go func() { _ = node.WriteFrame(s.conn, node.FrameInput, []byte("echo shell=$0; exit\n")) }()
	out, _, status, _ := s.until("")
	if !strings.Contains(out, "shell=-") || status != 0 {
		t.Errorf("the shell said %q and ended with %d", out, status)
	}
}

// TestCallerGoesAway: when the caller hangs up, what it ran ends too.
func TestCallerGoesAway(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		pidFile := filepath.Join(t.TempDir(), "pid")
		s := openSession(t, node.SessionStart{Terminal: terminal, Command: []string{"sh", "-c", "trap '' HUP; echo $$ >" + pidFile + "; echo ready; exec sleep 600"}})
		s.until("ready")
		b, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		s.conn.Close()
		select {
		case <-s.done:
		case <-time.After(time.Minute):
			t.Fatalf("terminal %t: the session goes on without its caller", terminal)
		}
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("terminal %t: the process %d is still there (%v)", terminal, pid, err)
		}
	}
}

// TestBadStart: a session that does not begin with a start frame runs nothing.
func TestBadStart(t *testing.T) {
	for _, c := range []struct {
		reason  string
		kind    node.FrameKind
		payload string
	}{
		{"another frame first", node.FrameInput, "rm -rf /"},
		{"no JSON", node.FrameStart, "{"},
	} {
		ours, theirs := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- serveSession(context.Background(), theirs) }()
		if err := node.WriteFrame(ours, c.kind, []byte(c.payload)); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err == nil {
			t.Errorf("%s: the session was served", c.reason)
		}
		ours.Close()
	}
}
