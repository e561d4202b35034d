package remote

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
)

// command is one program to be run by /bin/sh on a machine.
type command struct {
	root  bool
	text  string
	stdin io.Reader // what the program reads; nil: nothing
	limit int64     // of standard output
	wait  time.Duration
}

// outcome is how a command ended.
type outcome struct {
	stdout []byte
	stderr string // its last part
	status int
	took   time.Duration
}

// The command line that sshd sees is the same for every program; the program comes
// on standard input, as its length and its base64. Only a program that is there
// with its last byte begins, however the line broke. All programs of this package
// begin with the same environment.
const (
	environment = "env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C"
	bootstrap   = environment + ` /bin/sh -c 'IFS= read -r n && k=$(head -c "$n") && test "${#k}" -eq "$n" && eval "$(printf %s "$k" | base64 -d)"'`
)

// exec runs a command. The error is a *lost if the connection broke; a status
// other than 0 is no error here.
func (l *link) exec(ctx context.Context, c command) (*outcome, error) {
	select {
	case l.sessions <- struct{}{}:
		defer func() { <-l.sessions }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	client, err := l.get(ctx)
	if err != nil {
		return nil, err
	}
	session, err := l.open(ctx, client)
	if err != nil {
		return nil, err
	}
	defer closeLater(session)

	// What the login shell and sudo print of their own accord ends where our mark is.
	mark := "keyfleet-" + rand.Text()
	announce := "echo " + mark + "; echo " + mark + " >&2\n"
	if l.machine.windows {
		announce = windowsMark(mark)
	}
	program := base64.StdEncoding.EncodeToString([]byte(announce + c.text))
	stdin := io.Reader(strings.NewReader(fmt.Sprintf("%d\n%s", len(program), program)))
	if c.stdin != nil {
		g := &gate{r: c.stdin}
		defer g.shut()
		stdin = io.MultiReader(stdin, g)
	}
	out, errOut := newCapped(c.limit+int64(len(mark)+1)), &tail{}
	session.Stdout, session.Stderr = out, errOut
	in, err := session.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("opening standard input: %w", err)
	}
	if err := l.start(ctx, client, session, c.root); err != nil {
		return nil, err
	}
	began := time.Now()
	go func() {
		_, _ = io.Copy(in, stdin) // a part is not enough for the program, and it will say so
		_ = in.Close()
	}()
	status, err := l.await(ctx, session, out.over, c.wait)
	if err != nil {
		return nil, err
	}
	_, stdout, ran := strings.Cut(out.buf.String(), mark+"\n")
	if !ran {
		return nil, l.didNotRun(c.root, status, errOut.String())
	}
	stderr := errOut.String()
	if _, after, found := strings.Cut(stderr, mark+"\n"); found {
		stderr = after
	}
	return &outcome{stdout: []byte(stdout), stderr: stderr, status: status, took: time.Since(began)}, nil
}

// open opens a session.
func (l *link) open(ctx context.Context, client *ssh.Client) (*ssh.Session, error) {
	return within(ctx, l, client, client.NewSession, closeLater)
}

// start begins the one command line. As long as it fails, nothing has run.
func (l *link) start(ctx context.Context, client *ssh.Client, session *ssh.Session, root bool) error {
	line := bootstrap
	if l.machine.windows {
		line = windowsLine()
	} else if root && l.machine.user != "root" {
		line = "sudo -n " + bootstrap
	}
	_, err := within(ctx, l, client, func() (struct{}, error) { return struct{}{}, session.Start(line) }, func(struct{}) {})
	return err
}

func closeLater(s *ssh.Session) {
	go func() { _ = s.Close() }() // which may wait for a peer that does not read
}

// within bounds a question to the other side, which the library does not. An answer
// that comes too late is dropped; a connection that gives none is given up.
func within[T any](ctx context.Context, l *link, client *ssh.Client, ask func() (T, error), drop func(T)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	answers := make(chan answer, 1)
	go func() {
		v, err := ask()
		answers <- answer{v, err}
	}()
	timer := time.NewTimer(l.timeout)
	defer timer.Stop()
	var none T
	select {
	case a := <-answers:
		if a.err == nil {
			return a.value, nil
		}
		var busy *ssh.OpenChannelError
		if !errors.As(a.err, &busy) {
			l.forget(client)
		}
		return none, &lost{m: l.machine, err: a.err}
	case <-timer.C:
		l.forget(client)
		return none, &lost{m: l.machine, err: fmt.Errorf("no answer within %v", l.timeout)}
	case <-ctx.Done():
		go func() { // ends with the connection at the latest
			if a := <-answers; a.err == nil {
				drop(a.value)
			}
		}()
		return none, ctx.Err()
	}
}

// await waits for the end of a command.
func (l *link) await(ctx context.Context, session *ssh.Session, over <-chan struct{}, wait time.Duration) (int, error) {
	ended := make(chan error, 1)
	go func() { ended <- session.Wait() }()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case err := <-ended:
		var exit *ssh.ExitError
		switch {
		case isClosed(over):
			return 0, l.tooMuch()
		case err == nil:
			return 0, nil
		case errors.As(err, &exit):
			return exit.ExitStatus(), nil
		}
		return 0, &lost{m: l.machine, begun: true, err: err}
	case <-over:
		return 0, l.tooMuch()
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-timer.C:
		return 0, &lost{m: l.machine, begun: true, err: fmt.Errorf("no answer within %v", wait)}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (l *link) tooMuch() error {
	return fault.New(fault.TooLarge, "", "A script on %s printed more than %d MiB.", l.machine.name, maxOutput>>20).
		WithFix("this is a mistake in Keyfleet, please report it")
}

// didNotRun explains why a program did not even begin.
func (l *link) didNotRun(root bool, status int, stderr string) error {
	m := l.machine
	if m.windows {
		return l.didNotRunWindows(status, stderr)
	}
	if root && m.user != "root" && strings.Contains(stderr, "sudo") {
		return fault.New(fault.Denied, "", "%s may not act as root on %s (%s) without being asked for a password: %s", m.user, m.name, m.address, lastLines(stderr, 2)).
			WithFix(`put "%s ALL=(ALL) NOPASSWD:ALL" into /etc/sudoers.d/keyfleet there, or log in as root`, m.user)
	}
	return fault.New(fault.Denied, "", "%s (%s) lets %s in but does not run commands (exit status %d): %s", m.name, m.address, m.user, status, lastLines(stderr, 2)).
		WithFix("give %s a login shell there, and no ForceCommand in sshd_config", m.user)
}

// gate is a reader that is left alone once it is shut, so that an attempt that has
// failed does not read what its successor reads.
type gate struct {
	mu     sync.Mutex
	r      io.Reader
	closed bool
}

func (g *gate) Read(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return 0, io.ErrClosedPipe
	}
	return g.r.Read(p)
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

// capped keeps output up to a limit and tells when there is more.
type capped struct {
	buf  strings.Builder
	left int64
	over chan struct{}
	once sync.Once
}

func newCapped(limit int64) *capped { return &capped{left: limit, over: make(chan struct{})} }

func (c *capped) Write(p []byte) (int, error) {
	if c.left -= int64(len(p)); c.left < 0 {
		c.once.Do(func() { close(c.over) })
		return 0, errors.New("too much output")
	}
	return c.buf.Write(p)
}

// tail keeps the last part of what is written.
type tail struct{ buf []byte }

const tailSize = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if len(t.buf) > 2*tailSize {
		t.buf = append([]byte(nil), t.buf[len(t.buf)-tailSize:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.buf) }

// lastLines returns the last n lines that are not empty.
func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
