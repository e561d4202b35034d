// Package agent is what makes a machine a node: it enrols, follows its goal
// state, runs extensions by the VM extension handler contract, answers the
// identity endpoint and reports.
//
// Idea: the agent owns no policy. It holds one watch, fetches the goal state it
// is told of, brings the node there and says what it sees. Everything on disk
// is either the contract's (packages, settings, status files) or in one private
// state directory, and every write is a rename, so the answer to a crash at any
// point is to start again: what is done is seen on disk, what is half done is
// done again.
//
//	watchLoop ── "rev N" ──► followLoop ── goal state ──► convergeLoop ── commands ──► handlers
//	                             │  └── hints ──► extension sockets          │
//	                             ▼                                          ▼
//	                         goal.json          statusLoop ── status files ──► reportLoop ──► server
//	renewLoop: the agent's own certificate      IMDS: tokens of the pool's identities
//
// Invariant: the last good goal state is served whether or not the server is
// there; nothing is taken away because the server cannot be reached or does not
// know the node. The agent's private key never leaves the machine. Tokens are
// in memory only and never logged. A package is run only after its SHA-256 was
// checked, and unpacked only into its own folder.
//
// Consequence for the operator: an extension that fails says so in its status,
// with the contract's code, the last lines it printed and the time of the next
// attempt; restarting the agent is always safe and enables every extension again.
package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// ErrReboot is returned by Run when the server asked for a reboot and no
// RebootCommand is set: who started the agent must restart the node.
var ErrReboot = errors.New("the server asked for a reboot of this node")

// firstContact is how long a starting agent waits for the server's goal state
// before it goes on with the one it kept.
const firstContact = 3 * time.Second

// Agent is a node's agent. Make it with [New].
type Agent struct {
	cfg    Config
	srv    *server // set by connect
	imds   net.Listener
	hints  *hints
	tokens *tokens
	bootID string
	booted time.Time

	thumbprint string // of the transport certificate

	ctx     context.Context // of Run
	wg      sync.WaitGroup  // sessions
	fetch   chan struct{}   // capacity 1: fetch the goal state
	work    chan struct{}   // capacity 1: look what is to be done
	news    chan struct{}   // capacity 1: report
	contact chan struct{}   // closed when the server first answered with a goal state
	heard   sync.Once       // closes contact

	mu        sync.Mutex // guards what follows
	goal      *node.GoalState
	instances map[string]*instance // by extension name
	action    actionState
	links     []string        // paths of delivered certificates
	uploads   map[string]bool // extensions whose logs are to be uploaded
}

// New checks the configuration, makes the agent's directories and opens the
// identity endpoint. It does not speak to the server.
func New(cfg Config) (*Agent, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, tokens: newTokens(),
		fetch: make(chan struct{}, 1), work: make(chan struct{}, 1), news: make(chan struct{}, 1), contact: make(chan struct{}),
		instances: map[string]*instance{}, uploads: map[string]bool{},
	}
	a.hints = newHints(a.delivered, a.revive)
	a.bootID, a.booted = boot()
	if err := a.openState(); err != nil {
		return nil, err
	}
	if err := errors.Join(a.loadAction(), a.loadLinks()); err != nil {
		return nil, err
	}
	var err error
	if a.imds, err = listenIMDS(cfg); err != nil {
		return nil, err
	}
	return a, nil
}

// Close releases what New took. It may be called while Run runs, which then ends with an error.
func (a *Agent) Close() error {
	a.hints.closeAll()
	if a.imds != nil {
		if err := a.imds.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("closing identity endpoint: %w", err)
		}
	}
	return nil
}

// Run enrols if need be and runs the node until ctx ends (nil), the server asks
// for a reboot ([ErrReboot]), or the agent cannot become a node (why, and what to do).
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	a.ctx = ctx
	var loops sync.WaitGroup
	defer func() {
		cancel()
		loops.Wait()
		a.wg.Wait()
	}()
	loops.Go(func() { a.serveIMDS(ctx) }) // answers "not yet" until there is a goal state
	if err := a.Enrol(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	loops.Go(func() { a.followLoop(ctx) })
	loops.Go(func() { a.watchLoop(ctx) })
	loops.Go(func() { a.renewLoop(ctx) })
	select {
	case <-a.contact:
	case <-time.After(firstContact):
		if err := a.loadGoal(); err != nil {
			return err
		}
	case <-ctx.Done():
		return nil
	}
	loops.Go(func() { a.statusLoop(ctx) })
	loops.Go(func() { a.reportLoop(ctx) })
	return a.convergeLoop(ctx)
}

// revive enables an extension again whose process went away by itself: its
// enable command starts what it needs.
func (a *Agent) revive(name string) {
	a.mu.Lock()
	in := a.instances[name]
	dead := in != nil && in.enabled >= 0
	if dead {
		in.enabled = -1
	}
	a.mu.Unlock()
	if dead {
		a.cfg.Log.Warn("an extension's process went away; enabling it again", "extension", name)
		signal(a.work)
	}
}

// Enrol makes this machine a node of the server, unless it is one already. It
// tries until it succeeds, trying again cannot help, or ctx ends. Run does it too.
func (a *Agent) Enrol(ctx context.Context) error {
	if err := a.prepare(); err != nil {
		return err
	}
	return a.connect(ctx)
}

// prepare makes what handlers need besides the server: keys and the trust file.
func (a *Agent) prepare() error {
	_, thumb, err := a.transport()
	if err != nil {
		return fmt.Errorf("preparing the key for protected settings: %w", err)
	}
	a.thumbprint = thumb
	ca, err := readIfThere(a.statePath(caFile))
	if err != nil || ca == nil {
		return err
	}
	return a.writeTrust(ca)
}

// Node is the node's id; empty before the node is enrolled.
func (a *Agent) Node() string {
	if a.srv == nil {
		return ""
	}
	if id := a.srv.id.Load(); id != nil {
		return id.Node
	}
	return ""
}
