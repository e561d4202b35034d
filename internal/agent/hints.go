package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
)

// hints gives extensions hints that something they observe has changed, over
// one Unix socket each (docs/extension-hints.md), and hears from them what they delivered.
//
// A hint is a value, not an event: a new connection gets the present one at
// once, and a value that changed twice before it was written is written once.
type hints struct {
	deliver func(name string, d extension.Delivery) // called for every delivery line
	lost    func(name string)                       // called when an extension that was connected stayed away for hintGrace
	wg      sync.WaitGroup                          // accept and connection goroutines

	mu     sync.Mutex // guards what follows and the points in it
	points map[string]*hintPoint
}

// hintPoint is the socket of one extension.
type hintPoint struct {
	path     string
	listener *net.UnixListener
	value    string
	conns    map[*hintConn]bool
	gone     chan struct{} // closed with the socket
}

// hintConn is one connection of an extension.
type hintConn struct {
	conn net.Conn
	wake chan struct{} // capacity 1: the value changed
	done chan struct{} // closed when the connection's reader ended
}

const (
	hintSocket     = "keyfleet-hint.sock"
	maxSocketPath  = 103 // sun_path less its final 0, on every system that has Unix sockets
	maxHintConns   = 8
	maxDelivery    = 64 << 10 // bytes of a delivery line
	maxCertificate = 1000     // certificates that one extension may report
	hintTimeout    = 5 * time.Second
	hintGrace      = 2 * time.Second // for an extension to connect again before it counts as dead
)

func newHints(deliver func(string, extension.Delivery), lost func(string)) *hints {
	return &hints{deliver: deliver, lost: lost, points: map[string]*hintPoint{}}
}

// open makes the socket of an extension in its package's folder, which only
// root can enter. An open socket at the same path stays as it is.
func (h *hints) open(name, dir, instance, value string) error {
	path := filepath.Join(dir, dotted(instance, hintSocket))
	if len(path) > maxSocketPath {
		return fmt.Errorf("the path %s is too long for a socket", path)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.points[name]; p != nil {
		if p.path == path && exists(path) {
			p.set(value)
			return nil
		}
		p.close()
		delete(h.points, name)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing old hint socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("opening hint socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("making the hint socket private: %w", err)
	}
	p := &hintPoint{path: path, listener: l, value: clean(value), conns: map[*hintConn]bool{}, gone: make(chan struct{})}
	h.points[name] = p
	h.wg.Go(func() { h.accept(name, p) })
	return nil
}

// clean makes a hint one word of a line.
func clean(value string) string { return strings.Join(strings.Fields(value), "_") }

// path is the socket of an extension; "" if it has none.
func (h *hints) path(name string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.points[name]; p != nil {
		return p.path
	}
	return ""
}

// set changes the value of an extension's hint; without a socket it does nothing.
func (h *hints) set(name, value string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.points[name]; p != nil {
		p.set(value)
	}
}

func (p *hintPoint) set(value string) {
	if value = clean(value); value == p.value {
		return
	}
	p.value = value
	for c := range p.conns {
		signal(c.wake)
	}
}

// close closes an extension's socket.
func (h *hints) close(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.points[name]; p != nil {
		p.close()
		delete(h.points, name)
	}
}

func (p *hintPoint) close() {
	p.listener.Close() // also removes the socket
	close(p.gone)
	for c := range p.conns {
		c.conn.Close()
	}
}

// closeAll closes all sockets and waits for their goroutines.
func (h *hints) closeAll() {
	h.mu.Lock()
	for name, p := range h.points {
		p.close()
		delete(h.points, name)
	}
	h.mu.Unlock()
	h.wg.Wait()
}

// accept takes connections of one extension until its socket is closed.
func (h *hints) accept(name string, p *hintPoint) {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return
		}
		c := &hintConn{conn: conn, wake: make(chan struct{}, 1), done: make(chan struct{})}
		h.mu.Lock()
		if h.points[name] != p || len(p.conns) >= maxHintConns {
			h.mu.Unlock()
			conn.Close()
			continue
		}
		p.conns[c] = true
		h.mu.Unlock()
		h.wg.Go(func() { h.write(name, p, c) })
		h.wg.Go(func() { h.read(name, c) })
	}
}

// write sends the present value, and then every change, until the connection ends.
func (h *hints) write(name string, p *hintPoint, c *hintConn) {
	defer func() {
		c.conn.Close()
		h.mu.Lock()
		delete(p.conns, c)
		last := len(p.conns) == 0
		h.mu.Unlock()
		if last {
			h.miss(name, p)
		}
	}()
	sent, first := "", true
	for {
		h.mu.Lock()
		value := p.value
		h.mu.Unlock()
		if value != "" && (first || value != sent) {
			_ = c.conn.SetWriteDeadline(time.Now().Add(hintTimeout)) // a failure shows in Write
			if _, err := c.conn.Write([]byte("hint " + value + "\n")); err != nil {
				return
			}
			sent, first = value, false
		}
		select {
		case <-c.wake:
		case <-c.done:
			return
		}
	}
}

// miss waits whether the extension connects again, and says so if it does not:
// its process died, and nobody else on the node would start it again.
func (h *hints) miss(name string, p *hintPoint) {
	t := time.NewTimer(hintGrace)
	defer t.Stop()
	select {
	case <-p.gone:
		return
	case <-t.C:
	}
	h.mu.Lock()
	away := h.points[name] == p && len(p.conns) == 0
	h.mu.Unlock()
	if away {
		h.lost(name)
	}
}

// read takes delivery lines until the connection ends. A line that is none is passed over.
func (h *hints) read(name string, c *hintConn) {
	defer close(c.done)
	sc := bufio.NewScanner(c.conn)
	sc.Buffer(make([]byte, 0, 512), maxDelivery)
	for sc.Scan() {
		if d, err := extension.ParseDelivery(sc.Bytes()); err == nil {
			h.deliver(name, d)
		}
	}
}
