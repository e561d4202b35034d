package remote

import (
	"io"
	"net"
	"sync"
)

// tunnel is a connection through the jump host. The channels of SSH know no
// deadlines, which TLS and HTTP need; a net.Pipe does, so there is one in between.
type tunnel struct {
	net.Conn // our end of the pipe
	far      net.Addr
}

// farAddr is an address that only the jump host can resolve.
type farAddr string

func (farAddr) Network() string  { return "tcp" }
func (a farAddr) String() string { return string(a) }

func newTunnel(channel net.Conn, address string) net.Conn {
	near, inner := net.Pipe()
	// What was read or written has been passed on before an end is told of the
	// other's end, for the pipe holds nothing back.
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(inner, channel)
		_ = inner.Close()
	})
	both.Go(func() {
		_, _ = io.Copy(channel, inner)
		_ = channel.Close()
	})
	return &tunnel{Conn: near, far: farAddr(address)}
}

func (t *tunnel) RemoteAddr() net.Addr { return t.far }
