package remotetest

import (
	"net"
	"sync"
	"testing"
)

// Proxy is a line to a server that a test can cut.
type Proxy struct {
	Address string

	listener net.Listener
	target   string

	mu       sync.Mutex // guards what follows
	thaw     *sync.Cond
	pairs    map[net.Conn]net.Conn // client to server
	accepted int
	budget   int64 // bytes to the server until all is cut; negative: no limit
	frozen   bool
}

// NewProxy passes TCP on to target until the test ends. It listens on 127.0.0.1.
func NewProxy(t testing.TB, target string) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p := &Proxy{Address: l.Addr().String(), listener: l, target: target, pairs: map[net.Conn]net.Conn{}, budget: -1}
	p.thaw = sync.NewCond(&p.mu)
	go p.accept()
	t.Cleanup(func() {
		_ = l.Close()
		p.Freeze(false)
		p.Cut()
	})
	return p
}

// CutAfter cuts all connections, once, when n more bytes have gone to the server.
func (p *Proxy) CutAfter(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.budget = n
}

// Cut cuts all connections now. New ones are accepted.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut()
}

func (p *Proxy) cut() {
	for c, s := range p.pairs {
		_, _ = c.Close(), s.Close()
		delete(p.pairs, c)
	}
}

// Freeze makes the line pass nothing on, without closing anything, as a firewall
// does that has forgotten a connection; false ends it.
func (p *Proxy) Freeze(yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = yes
	p.thaw.Broadcast()
}

// Accepted is how many connections there have been, also to a server that was not there.
func (p *Proxy) Accepted() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		p.accepted++
		p.mu.Unlock()
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		p.mu.Lock()
		p.pairs[client] = server
		p.mu.Unlock()
		go p.pass(server, client, true)
		go p.pass(client, server, false)
	}
}

func (p *Proxy) pass(to, from net.Conn, upwards bool) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		if n = p.allow(n, upwards); n > 0 {
			_, werr := to.Write(buf[:n])
			if err == nil {
				err = werr
			}
		}
		if upwards {
			p.spend()
		}
		if err != nil {
			break
		}
	}
	_, _ = to.Close(), from.Close()
}

// allow says how many of n bytes may go on.
func (p *Proxy) allow(n int, upwards bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.frozen {
		p.thaw.Wait()
	}
	if !upwards || p.budget < 0 {
		return n
	}
	n = min(n, int(p.budget))
	p.budget -= int64(n)
	return n
}

// spend cuts the line when its bytes are used up.
func (p *Proxy) spend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.budget == 0 {
		p.budget = -1
		p.cut()
	}
}
