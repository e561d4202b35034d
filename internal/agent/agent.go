package agent

import (
	"context"
	"errors"
)

// ErrReboot is returned by Run when the server asked for a reboot and no RebootCommand is set.
var ErrReboot = errors.New("the server asked for a reboot of this node")

// ErrReleased is returned by Run when the server released this host and everything it was given is removed.
var ErrReleased = errors.New("this host was released")

// Agent is a node's agent.
type Agent struct{ cfg Config }

// New returns an agent.
func New(cfg Config) (*Agent, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	return &Agent{cfg: cfg}, nil
}

// Run runs the agent until ctx ends.
func (a *Agent) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// Close releases what New took.
func (a *Agent) Close() error { return nil }
