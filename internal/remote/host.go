package remote

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// Host is one machine, on which everything is done as root.
type Host struct {
	name string
	link *link
	log  string
	work string
}

const (
	maxOutput = 8 << 20
	maxInput  = 1 << 20
	maxText   = 100 << 10 // Linux takes 128 KiB as one argument
	grace     = 20 * time.Second
)

func newHost(name string, l *link, cfg Config) *Host {
	log := cfg.Log
	if l != nil && l.machine.windows {
		log = windowsLog
	}
	return &Host{name: name, link: l, log: log, work: cfg.WorkDir}
}

// Name is the name of the node.
func (h *Host) Name() string { return h.name }

// Run runs a script; see [rotation.Host]. A lost connection is made again, and the
// script run again if it is Quiet; if it is neither Quiet nor Finishes and may have
// begun, the error is fault.Unavailable and says that its outcome is not known.
// Text and Args hold up to 100 KiB, Input up to 1 MiB, the output up to 8 MiB. A
// script must not leave processes behind that hold its output open.
func (h *Host) Run(ctx context.Context, s rotation.Script) ([]byte, error) {
	if err := checkScript(s); err != nil {
		return nil, err
	}
	if h.link.machine.windows {
		return h.runWindows(ctx, s)
	}
	if s.Finishes {
		return h.finish(ctx, s)
	}
	var out *outcome
	err := persist(ctx, trials, s.Quiet, func() (err error) {
		out, err = h.root(ctx, command{text: direct(s, h.log, h.work), wait: limitOf(s) + grace})
		return err
	})
	if err != nil {
		return nil, h.failed(s.Name, s.Quiet, err)
	}
	return h.result(s, out)
}

// root runs a command as root.
func (h *Host) root(ctx context.Context, c command) (*outcome, error) {
	c.root, c.limit = true, maxOutput+1<<10 // room for the line of state of a unit
	return h.link.exec(ctx, c)
}

// failed is the error of something of which we have no result; safe says that it
// does not matter whether it has happened.
func (h *Host) failed(what string, safe bool, err error) error {
	var l *lost
	if errors.As(err, &l) && l.begun && !safe {
		return fault.New(fault.Unavailable, "", "The connection to %s was lost while it did this: %s. Its outcome is not known.", h.name, what).
			WithFix("run the command again, which looks at what was done; %s there has the output", h.log).Because(l.err)
	}
	return fmt.Errorf("%s on %s: %w", what, h.name, plain(err))
}

// result makes of an outcome what Run returns.
func (h *Host) result(s rotation.Script, out *outcome) ([]byte, error) {
	status := out.status
	if status == 0 {
		return out.stdout, nil
	}
	if timedOut(status, out.took, limitOf(s)) {
		status = -1
	}
	return nil, &rotation.ScriptError{Host: h.name, Script: s.Name, Status: status, Output: lastLines(out.stderr, 20)}
}

// timedOut tells the statuses of timeout(1) from the same ones of a script, which
// had to come before the time was over.
func timedOut(status int, took, limit time.Duration) bool {
	return (status == 124 || status == 137 || status == 143) && took >= time.Duration(seconds(limit))*time.Second
}

func checkScript(s rotation.Script) error {
	size := len(s.Text)
	for _, a := range s.Args {
		size += len(a)
	}
	switch {
	case strings.ContainsRune(s.Text, 0) || strings.ContainsRune(strings.Join(s.Args, ""), 0):
		return fault.New(fault.Invalid, "", "The script %q holds a zero byte, which no shell can.", s.Name)
	case size > maxText:
		return fault.New(fault.TooLarge, "", "The script %q and its arguments are longer than %d KiB.", s.Name, maxText>>10).
			WithFix("put what is long into a file with Put")
	case len(s.Input) > maxInput:
		return fault.New(fault.TooLarge, "", "The input of the script %q is longer than %d KiB.", s.Name, maxInput>>10).
			WithFix("put it into a file with Put")
	case s.Finishes && !isUnit(s.Unit):
		return fault.New(fault.Invalid, "", "The script %q finishes, so it needs the name of a unit: letters, digits and dashes, not %q.", s.Name, s.Unit)
	}
	return nil
}

func isUnit(name string) bool {
	for _, r := range name {
		if r != '-' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') {
			return false
		}
	}
	return name != "" && len(name) <= 200 && name[0] != '-'
}
