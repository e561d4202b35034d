package keyvaultext

import (
	"bufio"
	"context"
	"net"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
)

// hintLine is the connection to the agent's hint socket. Without a socket it
// does nothing, and the service only polls.
type hintLine struct {
	path  string
	retry time.Duration
	hints chan string // values that differ from the one before; the owner reads

	mu         sync.Mutex
	deliveries map[string]extension.Delivery // by settings path: the last of each certificate
	unsent     map[string]bool
	wake       chan struct{} // capacity 1: there is something unsent
}

func newHintLine(path string, retry time.Duration) *hintLine {
	return &hintLine{
		path: path, retry: retry, hints: make(chan string, 1),
		deliveries: map[string]extension.Delivery{}, unsent: map[string]bool{}, wake: make(chan struct{}, 1),
	}
}

// deliver reports the state of one certificate; it never blocks.
func (h *hintLine) deliver(key string, d extension.Delivery) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.deliveries[key] == d {
		return
	}
	h.deliveries[key], h.unsent[key] = d, true
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// run keeps the connection until ctx ends.
func (h *hintLine) run(ctx context.Context) {
	if h.path == "" {
		return
	}
	last := ""
	wait := h.retry / 16
	for ctx.Err() == nil {
		conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", h.path)
		if err == nil {
			wait = h.retry / 16
			last = h.talk(ctx, conn, last)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(wait*2, h.retry)
	}
}

// talk serves one connection and returns the last hint heard.
func (h *hintLine) talk(ctx context.Context, conn net.Conn, last string) string {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var sender sync.WaitGroup
	defer sender.Wait()
	defer cancel()
	h.mu.Lock()
	for key := range h.deliveries {
		h.unsent[key] = true
	}
	h.mu.Unlock()
	sender.Go(func() {
		defer cancel()
		h.send(ctx, conn)
	})
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 512), 4<<10)
	for lines.Scan() {
		value, ok := extension.ParseHint(lines.Text())
		if !ok || value == last {
			continue
		}
		last = value
		select { // the owner needs to know that there was one, not all of them
		case h.hints <- value:
		default:
		}
	}
	return last
}

func (h *hintLine) send(ctx context.Context, conn net.Conn) {
	for {
		h.mu.Lock()
		var lines []byte
		for key := range h.unsent {
			lines = append(lines, extension.EncodeDelivery(h.deliveries[key])...)
		}
		clear(h.unsent)
		h.mu.Unlock()
		if len(lines) > 0 {
			_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
			if _, err := conn.Write(lines); err != nil {
				return // everything is sent again on the next connection
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		}
	}
}
