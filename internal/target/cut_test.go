//go:build linux

package target_test

import (
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/target"
)

// cutter stands between a client and a server and does something at the n-th
// message of the client, counted over all its connections. A message is what one
// read gets: a statement, a request, a step of a handshake.
type cutter struct {
	at     int    // 1 is the first message; 0: never
	before func() // called before the message is passed on; nil: nothing
	cut    bool   // after that all connections end: at once if drop, else when the server has answered
	drop   bool

	mu    sync.Mutex
	seen  int
	fired bool
	dead  chan struct{}
	conns []net.Conn
}

// through returns the server as it is reached through the cutter.
func (c *cutter) through(t *testing.T, s target.Server) target.Server {
	t.Helper()
	c.dead = make(chan struct{})
	s.TLS.Name = s.Host
	s.Host, s.Port = "127.0.0.1", c.listen(t, net.JoinHostPort(s.Host, itoa(s.Port)))
	if s.Management != "" {
		u, err := url.Parse(s.Management)
		if err != nil {
			t.Fatal(err)
		}
		u.Host = net.JoinHostPort("127.0.0.1", itoa(c.listen(t, u.Host)))
		s.Management = u.String()
	}
	return s
}

func (c *cutter) listen(t *testing.T, to string) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(); c.end() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go c.serve(conn, to)
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// serve passes on one connection.
func (c *cutter) serve(client net.Conn, to string) {
	defer client.Close()
	server, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer server.Close()
	c.mu.Lock()
	c.conns = append(c.conns, client, server)
	c.mu.Unlock()
	select {
	case <-c.dead:
		return
	default:
	}
	answered := make(chan struct{}, 1)
	go func() {
		defer client.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			if err != nil {
				return
			}
			c.mu.Lock()
			swallow := c.fired && c.cut
			c.mu.Unlock()
			if swallow {
				answered <- struct{}{}
				return
			}
			if _, err := client.Write(buf[:n]); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := client.Read(buf)
		if err != nil || !c.pass(server, buf[:n], answered) {
			return
		}
	}
}

// pass passes a message on, unless the connection ends with it.
func (c *cutter) pass(server net.Conn, message []byte, answered <-chan struct{}) bool {
	c.mu.Lock()
	c.seen++
	now := c.seen == c.at
	c.fired = c.fired || now
	c.mu.Unlock()
	if now && c.before != nil {
		c.before()
	}
	if !now || !c.cut {
		_, err := server.Write(message)
		return err == nil
	}
	if !c.drop {
		if _, err := server.Write(message); err == nil {
			select {
			case <-answered:
			case <-time.After(300 * time.Millisecond): // no message has an answer of its own
			}
		}
	}
	c.end()
	return false
}

// end ends all connections, those that come as well.
func (c *cutter) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.dead:
	default:
		close(c.dead)
	}
	for _, conn := range c.conns {
		_ = conn.Close()
	}
}

func (c *cutter) done() (fired bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fired
}
