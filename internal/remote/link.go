package remote

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
)

// link is the SSH connection to one machine, made again when it was lost.
type link struct {
	machine machine
	timeout time.Duration // of dialling, and of opening a channel
	every   time.Duration // between two signs of life
	connect func(ctx context.Context) (*ssh.Client, error)

	dialling chan struct{} // holds a token while somebody dials; a mutex could not be left when ctx ends
	sessions chan struct{} // holds a token for each open session

	mu     sync.Mutex // guards what follows
	client *ssh.Client
	closed bool
	units  map[string]*flight // by name
}

// sshd allows ten sessions on a connection unless it is told otherwise.
const maxSessions = 8

func newLink(m machine, cfg Config, connect func(context.Context) (*ssh.Client, error)) *link {
	return &link{
		machine: m, timeout: cfg.Timeout, every: cfg.keepAlive, connect: connect,
		dialling: make(chan struct{}, 1), sessions: make(chan struct{}, maxSessions),
		units: map[string]*flight{},
	}
}

// lost is the error of a connection that broke or could not be made: trying again
// may help. begun says that what was asked for may have happened.
type lost struct {
	m     machine
	begun bool
	err   error
}

func (e *lost) Error() string {
	return fmt.Sprintf("the connection to %s (%s) failed: %v", e.m.name, e.m.address, e.err)
}
func (e *lost) Unwrap() error { return e.err }

// unreachable is the error of a machine that could not be dialled.
func unreachable(m machine, err error) error { return &lost{m: m, err: err} }

// plain turns the errors of this package into what callers outside see.
func plain(err error) error {
	var l *lost
	var unknown *unknownKey
	if errors.As(err, &unknown) { // not at first, when it is asked about
		p := unknown.print
		return fault.New(fault.Denied, "", "The host key of %s (%s) is not in known_hosts any more: %s %s.", p.Name, p.Address, p.Type, p.SHA256).
			WithFix("find out who took it out, and begin again")
	}
	if !errors.As(err, &l) {
		return err
	}
	return fault.New(fault.Unavailable, "", "%s (%s) cannot be reached over SSH.", l.m.name, l.m.address).Because(l.err)
}

// waits says how long to wait before attempt n+1, or that there is none.
type waits func(n int) (time.Duration, bool)

// trials is for what may fail. A machine that restarts its sshd is back by the
// end; one that reboots is not, and the step is tried again later.
func trials(n int) (time.Duration, bool) {
	pauses := []time.Duration{200 * time.Millisecond, time.Second, 3 * time.Second, 10 * time.Second}
	if n >= len(pauses) {
		return 0, false
	}
	return pauses[n], true
}

// untilDone is for what goes on over there meanwhile.
func untilDone(n int) (time.Duration, bool) {
	if d, more := trials(n); more {
		return d, true
	}
	return 10 * time.Second, true
}

// persist calls f again while its error is a *lost; if f may have begun, only if
// doing it twice is safe.
func persist(ctx context.Context, w waits, safe bool, f func() error) error {
	for n := 0; ; n++ {
		err := f()
		var l *lost
		if !errors.As(err, &l) || l.begun && !safe {
			return err
		}
		pause, more := w(n)
		if !more {
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// get returns the connection, and dials if there is none. Only one caller dials.
func (l *link) get(ctx context.Context) (*ssh.Client, error) {
	select {
	case l.dialling <- struct{}{}:
		defer func() { <-l.dialling }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c, err := l.current(); c != nil || err != nil {
		return c, err
	}
	attempt, cancel := context.WithTimeout(ctx, l.timeout)
	defer cancel()
	c, err := l.connect(attempt)
	var failed *lost
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case attempt.Err() != nil && errors.As(err, &failed):
		return nil, unreachable(failed.m, fmt.Errorf("no answer within %v", l.timeout))
	default:
		return nil, err
	}
	return l.adopt(c)
}

func (l *link) current() (*ssh.Client, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, l.isClosed()
	}
	return l.client, nil
}

func (l *link) isClosed() error {
	return fmt.Errorf("using the connection to %s: %w", l.machine.name, net.ErrClosed)
}

// adopt makes a new connection the one that is used.
func (l *link) adopt(c *ssh.Client) (*ssh.Client, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = c.Close()
		return nil, l.isClosed()
	}
	l.client = c
	gone := make(chan struct{})
	go func() {
		_ = c.Wait()
		l.forget(c)
		close(gone)
	}()
	go stayAlive(c, l.every, gone)
	return c, nil
}

// forget gives up a connection; the next caller dials.
func (l *link) forget(c *ssh.Client) {
	l.mu.Lock()
	if l.client == c {
		l.client = nil
	}
	l.mu.Unlock()
	go func() { _ = c.Close() }() // which may wait for a peer that does not read
}

func (l *link) close() {
	l.mu.Lock()
	c := l.client
	l.client, l.closed = nil, true
	l.mu.Unlock()
	if c != nil {
		_ = c.Close()
	}
}

// stayAlive asks the other side for a sign of life, which also keeps firewalls from
// forgetting the connection. The third miss in a row ends it.
func stayAlive(c *ssh.Client, every time.Duration, gone <-chan struct{}) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	answer := make(chan struct{}, 1)
	asked, missed := false, 0
	for {
		select {
		case <-gone:
			return
		case <-answer:
			asked, missed = false, 0
		case <-tick.C:
			if asked {
				if missed++; missed == 3 {
					_ = c.Close()
					return
				}
				continue
			}
			asked = true
			go func() {
				_, _, _ = c.SendRequest("keepalive@openssh.com", true, nil) // no is an answer, too
				answer <- struct{}{}
			}()
		}
	}
}
