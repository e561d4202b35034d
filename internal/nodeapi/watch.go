package nodeapi

import (
	"context"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// A held watch costs the TLS connection, one goroutine and one watcher; the
// buffers of net/http are given back by returning from its handler and going
// on in a goroutine of our own.

// writeTimeout is how long one line may take; a peer that takes longer is gone.
const writeTimeout = 10 * time.Second

// watchHead is the answer's head. There is no length: the body ends with the connection.
const watchHead = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"

// serveWatch admits a watch and takes its connection over.
func (e *Edge) serveWatch(w http.ResponseWriter, r *http.Request, id string) error {
	if e.closed.Err() != nil {
		return fault.New(fault.Unavailable, "ServerStopping", "The server is stopping.").After(2 * time.Second)
	}
	if e.hub.len() >= e.cfg.MaxWatches {
		return fault.New(fault.Unavailable, "TooManyWatches", "This server holds as many watches as it may.").After(30 * time.Second)
	}
	if !e.watch.Allow() {
		return tooMany("Too many agents connect at once.", e.spread())
	}
	if _, err := e.cfg.Nodes.Goal(r.Context(), id); err != nil {
		return err // a node that is gone must not hold a watch
	}
	hj, ok := w.(http.Hijacker)
	if !ok {
		return fault.New(fault.Invalid, "HTTP11Required", "A watch needs HTTP/1.1.").WithFix("connect to the node host, which speaks HTTP/1.1 only")
	}
	conn, buffered, err := hj.Hijack()
	if err != nil {
		return err
	}
	if buffered.Reader.Buffered() > 0 { // a pipelined request: not ours to answer
		conn.Close()
		return nil
	}
	wt := &watcher{wake: make(chan struct{}, 1)}
	if !e.hub.add(id, wt) {
		conn.Close() // Close came in between
		return nil
	}
	go e.hold(conn, id, wt, watchHead+"retry "+strconv.Itoa(e.spread())+"\n")
	return nil
}

// spread is over how many seconds agents should spread a reconnect: one for
// each 100 watches, so that a restart brings about 100 handshakes a second.
func (e *Edge) spread() int { return min(max(1, e.hub.len()/100), 60) }

// hold owns a watch's connection until the peer, a newer watch of the node, or
// Close ends it.
func (e *Edge) hold(conn net.Conn, id string, wt *watcher, head string) {
	defer e.hub.remove(id, wt)
	defer conn.Close()
	if !send(conn, head) {
		return
	}
	timer := time.NewTimer(e.jittered(e.cfg.Ping))
	defer timer.Stop()
	for {
		var text string
		select {
		case <-e.closed.Done():
			send(conn, "retry "+strconv.Itoa(e.spread())+"\n")
			return
		case <-wt.wake:
			var over bool
			if text, over = wt.take(); over {
				return
			}
		case <-timer.C:
			text = "ping\n"
		}
		if text != "" && !send(conn, text) {
			return
		}
		timer.Reset(e.jittered(e.cfg.Ping))
	}
}

func send(conn net.Conn, text string) bool {
	_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout)) // a failure shows in Write
	_, err := conn.Write([]byte(text))
	return err == nil
}

// jittered returns d +-20 %.
func (e *Edge) jittered(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

// Announce sends the node's agent the line "session ID KIND": it should open
// the session. False: no agent of this node is watching.
func (e *Edge) Announce(nodeID, sessionID, kind string) bool {
	return e.hub.line(nodeID, "session "+sessionID+" "+kind+"\n")
}

// AskLogs asks the node's agent to upload the tails of its extensions' logs
// now. False: no agent of this node is watching.
func (e *Edge) AskLogs(nodeID string) bool { return e.hub.line(nodeID, "logs\n") }

// WaitWatching waits until the node's agent holds a watch, or ctx ends.
func (e *Edge) WaitWatching(ctx context.Context, nodeID string) error {
	for {
		ch, ok := e.hub.arrival(nodeID)
		if ok {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// hub knows who watches. A node has one watch; a newer one replaces it.
type hub struct {
	held sync.WaitGroup // one for each watch that was added and not removed

	mu       sync.Mutex // guards what follows
	watchers map[string]*watcher
	arrived  chan struct{} // closed and renewed when a watch is added
	closed   bool          // no more watches are added
}

func newHub() *hub {
	return &hub{watchers: map[string]*watcher{}, arrived: make(chan struct{})}
}

// watcher is what is waiting to be sent over one watch. Revisions are merged, other lines kept in order.
type watcher struct {
	wake chan struct{} // capacity 1

	mu    sync.Mutex // guards what follows
	rev   int64      // to be told; 0: none
	lines []string   // to be sent; at most maxLines
	over  bool       // a newer watch of this node came
}

// maxLines bounds what waits for an agent that does not read; the oldest lines fall out.
const maxLines = 16

func (h *hub) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.watchers)
}

func (h *hub) add(id string, w *watcher) bool {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return false
	}
	h.held.Add(1)
	old := h.watchers[id]
	h.watchers[id] = w
	close(h.arrived)
	h.arrived = make(chan struct{})
	h.mu.Unlock()
	if old != nil {
		old.tell(func() { old.over = true })
	}
	return true
}

// drain refuses further watches and waits for those there are.
func (h *hub) drain() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.held.Wait()
}

func (h *hub) remove(id string, w *watcher) {
	defer h.held.Done()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watchers[id] == w {
		delete(h.watchers, id)
	}
}

// arrival reports whether the node watches, and returns a channel that is closed when any watch is added.
func (h *hub) arrival(id string) (<-chan struct{}, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.watchers[id]
	return h.arrived, ok
}

func (h *hub) get(id string) *watcher {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.watchers[id]
}

// revision tells a node's watch of a changed goal state.
func (h *hub) revision(id string, rev int64) {
	if w := h.get(id); w != nil {
		w.tell(func() { w.rev = rev })
	}
}

// line sends a line over a node's watch.
func (h *hub) line(id, text string) bool {
	w := h.get(id)
	if w == nil {
		return false
	}
	w.tell(func() {
		if len(w.lines) == maxLines {
			w.lines = w.lines[1:]
		}
		w.lines = append(w.lines, text)
	})
	return true
}

// tell changes what waits and wakes the watch's goroutine.
func (w *watcher) tell(change func()) {
	w.mu.Lock()
	change()
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default: // it is awake already and will see the change
	}
}

// take returns what waits as text; over: the watch was replaced.
func (w *watcher) take() (text string, over bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rev != 0 {
		text = "rev " + strconv.FormatInt(w.rev, 10) + "\n"
	}
	text += strings.Join(w.lines, "")
	w.rev, w.lines = 0, nil
	return text, w.over
}
