package etcdadmin

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// wire makes the connections and remembers why the last one to each member
// failed: gRPC keeps no more of it than a text.
type wire struct {
	dialer rotation.Dialer
	credentials.TransportCredentials

	mu       sync.Mutex // guards the fields below
	events   int        // counts connections and failures, to tell what came first
	failures map[string]failure
}

// failure is why a connection failed, and when.
type failure struct {
	event int
	err   error
}

func newWire(d rotation.Dialer, as rotation.Credential) (*wire, error) {
	if len(as.Cert) == 0 {
		return nil, fault.New(fault.Invalid, "", "The credential has no client certificate, which etcd asks for.")
	}
	secure, err := as.TLS()
	if err != nil {
		return nil, err
	}
	return &wire{dialer: d, TransportCredentials: credentials.NewTLS(secure), failures: map[string]failure{}}, nil
}

func (w *wire) dial(ctx context.Context, member string) (net.Conn, error) {
	c, err := w.dialer.DialContext(ctx, "tcp", member)
	if err != nil {
		w.failed(member, err)
	}
	return c, err
}

// ClientHandshake implements credentials.TransportCredentials. etcd's client
// gives the member's address as authority.
func (w *wire) ClientHandshake(ctx context.Context, member string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := w.TransportCredentials.ClientHandshake(ctx, member, raw)
	if err != nil {
		w.failed(member, err)
		return nil, nil, err
	}
	return &conn{Conn: c, wire: w, member: member, born: w.event()}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (w *wire) Clone() credentials.TransportCredentials { return w }

// event numbers what happens.
func (w *wire) event() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events++
	return w.events
}

func (w *wire) failed(member string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events++
	w.failures[member] = failure{w.events, err}
}

// works forgets failures from before a connection that works: one that an older
// connection says nothing of stays.
func (w *wire) works(member string, born int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failures[member].event < born {
		delete(w.failures, member)
	}
}

func (w *wire) failure(member string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failures[member].err
}

// conn tells the wire how it ends: a server of TLS 1.3 refuses a client
// certificate after the handshake, in the first thing that it sends.
type conn struct {
	net.Conn
	wire   *wire
	member string
	born   int  // event of the wire
	spoken bool // something was read; known to gRPC's one reading goroutine
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && !c.spoken {
		c.spoken = true
		c.wire.works(c.member, c.born)
	}
	if err != nil && !errors.Is(err, net.ErrClosed) { // closed by ourselves
		c.wire.failed(c.member, err)
	}
	return n, err
}

// Write implements net.Conn. If the server has closed the connection, it may have
// said why, and gRPC would close it without reading that.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err == nil || errors.Is(err, net.ErrClosed) {
		return n, err
	}
	reason := err
	if c.SetReadDeadline(time.Now().Add(100*time.Millisecond)) == nil {
		_, said := c.Conn.Read(make([]byte, 1))
		if refusal := (*net.OpError)(nil); errors.As(said, &refusal) && refusal.Op == "remote error" { // an alert of TLS
			reason = said
		}
	}
	c.wire.failed(c.member, reason)
	return n, err
}
