package nodeapi

import (
	"bufio"
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
)

// SwitchboardConfig is what a Switchboard needs. Announce must be set before the first Open.
type SwitchboardConfig struct {
	// Announce sends "session ID KIND" over the agent's watch; false: it watches
	// nothing here. It is [Edge.Announce].
	Announce func(agentID, sessionID, kind string) bool
	Answer   time.Duration // how long an agent may take to come; zero: 10 s
	Idle     time.Duration // a session without a byte for so long ends; zero: 30 min
	Limit    int           // sessions at once; zero: 100
	Log      *slog.Logger  // nil: nothing is logged
}

// Switchboard connects a caller who wants to be on a node with the node's
// agent. The caller waits, the agent is told over its watch and comes with a
// request of its own, and from then on bytes go through, unread, until one of
// the two ends or nothing was said for long enough.
//
// A session is opened for one agent and can be taken by that agent only, once.
type Switchboard struct {
	cfg SwitchboardConfig

	mu      sync.Mutex
	waiting map[string]*call // guarded by mu; session id -> who waits for which agent
	open    int              // guarded by mu; sessions that wait or run
}

// call is a session that waits for its agent.
type call struct {
	agent string
	line  chan net.Conn // capacity 1
	gone  bool          // guarded by Switchboard.mu; the caller gave up
}

// NewSwitchboard returns a switchboard without sessions.
func NewSwitchboard(cfg SwitchboardConfig) *Switchboard {
	if cfg.Answer == 0 {
		cfg.Answer = 10 * time.Second
	}
	if cfg.Idle == 0 {
		cfg.Idle = 30 * time.Minute
	}
	if cfg.Limit == 0 {
		cfg.Limit = 100
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Switchboard{cfg: cfg, waiting: map[string]*call{}}
}

// session is a connection to an agent that waits for, or has, its caller.
type session struct {
	id     string
	agent  string
	conn   net.Conn
	board  *Switchboard
	unused *time.Timer // ends a session that is not joined: the caller's upgrade failed
	once   sync.Once
}

// Open calls an agent and waits until it comes. Kind is "shell". The function
// it returns passes bytes between the caller's connection and the agent's until
// one side ends or both were silent for the idle time, then closes both; it
// must be called soon, or the agent is let go. Faults: Unavailable where the
// agent is not connected, Timeout where it does not come.
func (b *Switchboard) Open(ctx context.Context, agentID, kind string) (join func(caller net.Conn), err error) {
	id := rand.Text()
	c := &call{agent: agentID, line: make(chan net.Conn, 1)}
	b.mu.Lock()
	if b.open >= b.cfg.Limit {
		b.mu.Unlock()
		return nil, fault.New(fault.TooMany, "TooManySessions", "This server holds as many sessions as it may (%d).", b.cfg.Limit).After(time.Minute)
	}
	b.open++
	b.waiting[id] = c
	b.mu.Unlock()
	conn, err := b.await(ctx, id, kind, c)
	if err != nil {
		b.forget(id, c)
		b.done()
		return nil, err
	}
	s := &session{id: id, agent: agentID, conn: conn, board: b}
	s.unused = time.AfterFunc(b.cfg.Answer, s.close)
	return s.join, nil
}

func (b *Switchboard) await(ctx context.Context, id, kind string, c *call) (net.Conn, error) {
	if !b.cfg.Announce(c.agent, id, kind) {
		return nil, fault.New(fault.Unavailable, "NodeNotConnected", "The agent of node %s is not connected to this server.", c.agent).
			WithFix("See why: keyfleet node explain POOL %s", c.agent)
	}
	late := time.NewTimer(b.cfg.Answer)
	defer late.Stop()
	select {
	case conn := <-c.line:
		return conn, nil
	case <-late.C:
		return nil, fault.New(fault.Timeout, "NodeDidNotAnswer", "The agent of node %s did not come within %s.", c.agent, b.cfg.Answer).
			WithFix("Try again; if that fails: keyfleet node explain POOL %s", c.agent)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// forget withdraws a call. An agent that came in the same moment is sent away.
func (b *Switchboard) forget(id string, c *call) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.waiting, id)
	c.gone = true
	select {
	case conn := <-c.line:
		_ = conn.Close()
	default:
	}
}

func (b *Switchboard) done() {
	b.mu.Lock()
	b.open--
	b.mu.Unlock()
}

// take removes the call that an agent answers; nil if there is none for it.
func (b *Switchboard) take(agentID, id string) *call {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.waiting[id]
	if c == nil || c.agent != agentID {
		return nil
	}
	delete(b.waiting, id)
	return c
}

// ServeNode upgrades the request of an agent that comes for a session.
func (b *Switchboard) ServeNode(w http.ResponseWriter, _ *http.Request, agentID, id string) error {
	c := b.take(agentID, id)
	if c == nil {
		return fault.New(fault.NotFound, "SessionNotFound", "There is no session of this id for this node, or it was given up.")
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return fault.New(fault.Invalid, "HTTP11Required", "A session needs HTTP/1.1.").Because(err)
	}
	_ = conn.SetDeadline(time.Time{})
	head := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + node.SessionProtocol + "\r\n\r\n"
	if _, err := io.WriteString(conn, head); err != nil {
		_ = conn.Close()
		return nil // the agent went away; the caller's wait ends by time
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.gone {
		_ = conn.Close()
		return nil
	}
	c.line <- &hijacked{Conn: conn, r: rw.Reader}
	return nil
}

// hijacked is a connection whose first bytes may still be buffered.
type hijacked struct {
	net.Conn
	r *bufio.Reader
}

func (c *hijacked) Read(p []byte) (int, error) { return c.r.Read(p) }

// close ends the session; it may be called again.
func (s *session) close() {
	s.once.Do(func() {
		_ = s.conn.Close()
		s.board.done()
	})
}

// join is what Open returns.
func (s *session) join(caller net.Conn) {
	defer s.close()
	defer caller.Close()
	if !s.unused.Stop() {
		return
	}
	start := time.Now()
	var idled atomic.Bool
	end := func() { _ = caller.Close(); _ = s.conn.Close() }
	idle := time.AfterFunc(s.board.cfg.Idle, func() { idled.Store(true); end() })
	defer idle.Stop()
	pass := func(to io.Writer, from io.Reader) {
		buf := make([]byte, 16<<10)
		for {
			n, err := from.Read(buf)
			if n > 0 {
				idle.Reset(s.board.cfg.Idle)
				if _, werr := to.Write(buf[:n]); werr != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	var both sync.WaitGroup
	both.Go(func() { pass(s.conn, caller); end() })
	pass(caller, s.conn)
	end()
	both.Wait()
	s.board.cfg.Log.Info("session ended", "session", s.id, "node", s.agent, "took", time.Since(start).Round(time.Millisecond), "idle", idled.Load())
}
