package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/api/node"
)

// WindowSize is the size of a terminal in characters.
type WindowSize struct{ Columns, Rows uint16 }

// Terminal is the caller's end of a shell on a node.
type Terminal struct {
	Command []string  // program and arguments; none: a login shell
	In      io.Reader // its standard input; nil: empty. It is read ahead, and a blocked Read outlives the call
	Out     io.Writer // its output; must be set
	Err     io.Writer // its errors; nil: Out. With TTY everything comes to Out

	TTY     bool              // run it on a terminal; the caller's own must be in raw mode then
	Term    string            // the caller's TERM
	Size    WindowSize        // with TTY
	Resized <-chan WindowSize // with TTY: later sizes; nil: none
}

// upgradeTimeout bounds the time until the node has answered: the server waits 10 s for it.
const upgradeTimeout = 30 * time.Second

// Shell runs a command or a login shell on a node of a pool (a resource id) and
// returns its exit status. It ends when the command ends, the server ends the
// session, or ctx ends. A refusal is a *[Error]; a command that could not be
// started is an error too.
func (c *Client) Shell(ctx context.Context, poolID, nodeID string, t Terminal) (exit int, err error) {
	u := c.ARM("/keyfleet/v1" + poolID + "/nodes/" + url.PathEscape(nodeID) + "/shell")
	conn, err := c.upgrade(ctx, u, node.SessionProtocol)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	w := &frameWriter{to: conn}
	start, err := json.Marshal(node.SessionStart{Command: t.Command, Terminal: t.TTY, Term: t.Term, Columns: t.Size.Columns, Rows: t.Size.Rows})
	if err != nil {
		return 0, fmt.Errorf("starting the session: %w", err)
	}
	if err := w.write(node.FrameStart, start); err != nil {
		return 0, fmt.Errorf("starting the session: %w", err)
	}
	over := make(chan struct{})
	defer close(over)
	go w.sendInput(t.In)
	go w.sendSizes(t.Resized, over)
	exit, err = receive(conn, t)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return exit, err
}

// receive writes what the node sends until the exit status comes.
func receive(conn io.Reader, t Terminal) (int, error) {
	if t.Err == nil {
		t.Err = t.Out
	}
	var buf []byte
	for {
		kind, payload, err := node.ReadFrame(conn, &buf)
		if err != nil {
			return 0, fmt.Errorf("the session was cut off: %w", err)
		}
		switch kind {
		case node.FrameOutput:
			_, err = t.Out.Write(payload)
		case node.FrameErrors:
			_, err = t.Err.Write(payload)
		case node.FrameExit:
			return node.ParseExit(payload)
		case node.FrameFailure:
			return 0, fmt.Errorf("the node could not run it: %s", payload)
		}
		if err != nil {
			return 0, fmt.Errorf("writing the node's output: %w", err)
		}
	}
}

// frameWriter sends frames from several goroutines, one at a time.
type frameWriter struct {
	mu sync.Mutex
	to io.Writer
}

func (w *frameWriter) write(kind node.FrameKind, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return node.WriteFrame(w.to, kind, payload)
}

// sendInput ends when the input does, or when the connection is closed and something more is read.
func (w *frameWriter) sendInput(in io.Reader) {
	buf := make([]byte, 16<<10)
	for in != nil {
		n, err := in.Read(buf)
		if n > 0 && w.write(node.FrameInput, buf[:n]) != nil {
			return
		}
		if err != nil {
			break
		}
	}
	_ = w.write(node.FrameEnd, nil)
}

func (w *frameWriter) sendSizes(sizes <-chan WindowSize, over <-chan struct{}) {
	for {
		select {
		case <-over:
			return
		case s, ok := <-sizes:
			if !ok || w.write(node.FrameResize, node.ResizePayload(s.Columns, s.Rows)) != nil {
				return
			}
		}
	}
}

// upgrade asks the server to turn a POST into a byte stream of the protocol.
func (c *Client) upgrade(ctx context.Context, target, protocol string) (net.Conn, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, fmt.Errorf("calling the server: %w", err)
	}
	tok, err := c.tokens.get(ctx, c.resource(u), "")
	if err != nil {
		return nil, err
	}
	conn, err := c.upgradeOnce(ctx, u, protocol, tok)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusUnauthorized {
		if tok, err = c.tokens.get(ctx, c.resource(u), tok); err != nil {
			return nil, err
		}
		return c.upgradeOnce(ctx, u, protocol, tok)
	}
	return conn, err
}

func (c *Client) upgradeOnce(ctx context.Context, u *url.URL, protocol string, tok keyfleet.Secret) (net.Conn, error) {
	hr, err := c.httpRequest(ctx, Request{Method: http.MethodPost, URL: u.String()}, nil, tok)
	if err != nil {
		return nil, err
	}
	hr.Header.Set("Connection", "Upgrade")
	hr.Header.Set("Upgrade", protocol)
	conn, err := c.dialTLS(ctx, u)
	if err != nil {
		return nil, c.unreachable(ctx, hr, err)
	}
	_ = conn.SetDeadline(time.Now().Add(upgradeTimeout))
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	r := bufio.NewReader(conn)
	var resp *http.Response
	if err = hr.Write(conn); err == nil {
		resp, err = http.ReadResponse(r, hr)
	}
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		b, rerr := io.ReadAll(io.LimitReader(resp.Body, maxBody))
		if err = rerr; err == nil {
			_ = conn.Close()
			stop()
			return nil, decodeError(hr, resp, b)
		}
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		return nil, c.unreachable(ctx, hr, err)
	}
	_ = conn.SetDeadline(time.Time{})
	return &streamConn{Conn: conn, r: r}, nil
}

// dialTLS opens a connection to the server that speaks HTTP/1.1: only that can be upgraded.
func (c *Client) dialTLS(ctx context.Context, u *url.URL) (net.Conn, error) {
	port := u.Port()
	if port == "" {
		port = "443"
	}
	raw, err := c.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, err
	}
	conf := c.TLSConfig()
	conf.ServerName, conf.NextProtos = u.Hostname(), []string{"http/1.1"}
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return conn, nil
}

// streamConn is a connection whose first bytes may still be buffered.
type streamConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *streamConn) Read(p []byte) (int, error) { return c.r.Read(p) }
