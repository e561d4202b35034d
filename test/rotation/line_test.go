//go:build linux

package rotation

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// line is a TCP line to the SSH host on which every connection is cut when so and
// so many bytes have gone to the host.
type line struct {
	listener net.Listener
	target   string
	budget   func(n int) int64 // of the n-th connection, from 0

	mu    sync.Mutex // guards what follows
	open  map[net.Conn]bool
	made  int
	cuts  int
	whole bool // nothing is cut any more
}

// over is the cluster as it is reached over a line that is cut.
func (c *cluster) over(t *testing.T, budget func(n int) int64) (*cluster, *line) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &line{listener: listener, target: c.door, budget: budget, open: map[net.Conn]bool{}}
	t.Cleanup(l.close)
	go l.accept() // ends with the listener
	d := c.in(t)
	d.door = listener.Addr().String()
	dir, err := os.MkdirTemp("", "line-") // the name of a test may hold a comma, which parts files in the flag
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d.known = filepath.Join(dir, "known_hosts")
	was, err := os.ReadFile(c.known)
	if err != nil {
		t.Fatal(err)
	}
	is := strings.ReplaceAll(string(was), known(c.door), known(d.door))
	if err := os.WriteFile(d.known, []byte(is), 0o600); err != nil {
		t.Fatal(err)
	}
	return d, l
}

// known is how known_hosts writes host:port.
func known(door string) string {
	host, port, _ := net.SplitHostPort(door)
	return "[" + host + "]:" + port
}

// mend ends the cutting, and returns how often it was done.
func (l *line) mend() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.whole = true
	return l.cuts
}

func (l *line) close() {
	_ = l.listener.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.open {
		_ = c.Close()
	}
}

func (l *line) accept() {
	for {
		client, err := l.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", l.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		l.mu.Lock()
		left := l.budget(l.made)
		l.made++
		l.open[client], l.open[server] = true, true
		l.mu.Unlock()
		go l.pass(client, server, -1)
		go l.pass(server, client, left)
	}
}

// pass copies until an end closes, or so many bytes have gone; then it closes both.
func (l *line) pass(to, from net.Conn, left int64) {
	buf := make([]byte, 2048)
	for left != 0 {
		n, err := from.Read(buf)
		if left > 0 && int64(n) >= left && l.cut() {
			n, left = int(left), 0
		} else if left > 0 {
			left = max(left-int64(n), 1)
		}
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_, _ = to.Close(), from.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, to)
	delete(l.open, from)
}

// cut counts a cut, if there are cuts still.
func (l *line) cut() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.whole {
		return false
	}
	l.cuts++
	return true
}
