// Package cli is the command line: keyfleet NOUN VERB.
//
// Idea: every command is one row of a noun's file: it reads arguments, makes
// one or two calls with package client, and hands the answer to one of two
// functions, [one] and [many], which know every output form. What a person sees
// besides the answer goes through this file.
//
// Invariant: standard output holds the answer and nothing else, in a form that
// -o fixes; a secret is taken from the command line only where Azure's own command line
// takes it (connection create), with a warning; its value leaves only when it was
// asked for by name (--reveal, --query value, --to-file).
//
// Consequence for the operator: scripts can rely on exit codes, on JSON keys
// that are the API's, and on columns that are only ever added at the end.
//
// The rules of this user interface:
//
//   - The answer goes to standard output; progress, warnings, questions and errors go to standard error.
//   - Table is the default form, piped or not: what a person sees is what a
//     script gets until it asks for another form. Scripts use -o tsv, json or name.
//   - A command that changes something says in one line what is now so. With
//     -o json, yaml, tsv or name it prints the object instead.
//   - A command that starts long work waits for it and shows where it is; --no-wait does not.
//     Ctrl-C while waiting detaches: the work goes on, and the way back is printed.
//   - Progress is one line that is rewritten on a terminal, and lines with time
//     stamps elsewhere; only changes are printed, and nothing of work that takes
//     less than half a second. NO_COLOR is obeyed. All of it is ASCII.
//   - Messages are whole sentences that start with a capital and end with a
//     full stop. Commands to type stand alone on their line, so that they can be copied.
//   - An error has the fixed form of errors.go: code, message, why, fix, ids.
//   - Destroying for good (purge, delete of what has no soft delete) asks on a
//     terminal and needs --yes elsewhere.
//   - Times are local with their zone on a terminal's table, and RFC 3339 in UTC in every other form.
//   - Text that came from the server is printed without control characters.
package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"

	"golang.org/x/term"

	"keyfleet.dev/keyfleet/client"
)

// Streams is what the tool is connected to. A nil field is that of the process.
type Streams struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer
	Env func(string) string

	Version string // of the program; empty: "dev"
	// RotateCerts is the command rotate-certs, which needs no server and reads its
	// own flags; it returns the exit status.
	RotateCerts func(ctx context.Context, args []string) int
}

// tool is one run of the command line.
type tool struct {
	in     io.Reader
	out    io.Writer
	err    io.Writer
	env    func(string) string
	now    func() time.Time
	outTTY bool
	errTTY bool

	version string
	rotate  func(ctx context.Context, args []string) int // the command rotate-certs
	flags   globals
	target  *target        // what the context names; set by connect
	client  *client.Client // set by connect
}

// globals are the flags of every command.
type globals struct {
	output       string
	query        string
	context      string
	subscription string
	group        string
	timeout      time.Duration
}

func newTool(s Streams) *tool {
	t := &tool{in: s.In, out: s.Out, err: s.Err, env: s.Env, now: time.Now, version: s.Version, rotate: s.RotateCerts}
	if t.version == "" {
		t.version = "dev"
	}
	if t.in == nil {
		t.in = os.Stdin
	}
	if t.out == nil {
		t.out = os.Stdout
	}
	if t.err == nil {
		t.err = os.Stderr
	}
	if t.env == nil {
		t.env = os.Getenv
	}
	t.outTTY, t.errTTY = isTerminal(t.out), isTerminal(t.err)
	return t
}

func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// say writes a line for the person to standard error.
func (t *tool) say(format string, args ...any) {
	fmt.Fprintln(t.err, clean(fmt.Sprintf(format, args...)))
}

// warn writes a warning to standard error.
func (t *tool) warn(format string, args ...any) {
	fmt.Fprintln(t.err, t.colour("33", "Warning")+": "+clean(fmt.Sprintf(format, args...)))
}

// warnings passes on what the server warned of.
func (t *tool) warnings(r *client.Response) {
	for _, w := range r.Warnings() {
		t.warn("%s", w)
	}
}

// colour wraps s in an SGR sequence where standard error is a terminal that wants it.
func (t *tool) colour(sgr, s string) string {
	if !t.errTTY || t.env("NO_COLOR") != "" || t.env("TERM") == "dumb" {
		return s
	}
	return "\x1b[" + sgr + "m" + s + "\x1b[0m"
}

// clean takes control characters out of text that came from elsewhere; it keeps line breaks.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return r
		}
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return -1
		}
		return r
	}, s)
}

// confirm asks before something that cannot be undone.
func (t *tool) confirm(yes bool, format string, args ...any) error {
	if yes {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	f, ok := t.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return usagef("%s needs to be confirmed, and there is no terminal to ask on", what).withFix("add --yes")
	}
	fmt.Fprintf(t.err, "%s. This cannot be undone. Go on? [y/N] ", clean(what))
	line, _ := bufio.NewReader(t.in).ReadString('\n')
	if s := strings.ToLower(strings.TrimSpace(line)); s == "y" || s == "yes" {
		return nil
	}
	return &cliError{code: "NotConfirmed", message: "Nothing was changed.", exit: client.ExitFailed}
}

// progress shows where long work is.
type progress struct {
	t     *tool
	start time.Time
	last  string
	open  bool // a line on the terminal is not ended yet
}

func (t *tool) progress() *progress { return &progress{t: t, start: t.now()} }

// quick is how long work may take before progress is shown.
const quick = 500 * time.Millisecond

// show shows a state. The same text again shows nothing new.
func (p *progress) show(format string, args ...any) {
	if p.t.now().Sub(p.start) < quick {
		return
	}
	s := strings.Join(strings.Fields(clean(fmt.Sprintf(format, args...))), " ")
	if p.t.errTTY {
		fmt.Fprintf(p.t.err, "\r\x1b[K%s  (%s)", s, p.t.now().Sub(p.start).Round(time.Second))
		p.open = true
		return
	}
	if s != p.last {
		fmt.Fprintf(p.t.err, "%s %s\n", p.t.now().UTC().Format("15:04:05Z"), s)
	}
	p.last = s
}

// end ends the line of progress.
func (p *progress) end() {
	if p.open {
		fmt.Fprint(p.t.err, "\r\x1b[K")
		p.open = false
	}
}

// waiting runs fn with the time that --timeout allows, or def without it, and
// turns its end into exit code 7: the work goes on, and back is the command that shows it.
func (t *tool) waiting(ctx context.Context, def time.Duration, back string, fn func(ctx context.Context, p *progress) error) error {
	d := t.flags.timeout
	if d == 0 {
		d = def
	}
	wctx, cancel := context.WithTimeoutCause(ctx, d, errWaited)
	defer cancel()
	p := t.progress()
	err := fn(wctx, p)
	p.end()
	switch {
	case err == nil:
		return nil
	case context.Cause(ctx) != nil: // Ctrl-C
		return &cliError{code: "Detached", message: "Stopped waiting. The work goes on.", fix: back, exit: exitDetached}
	case context.Cause(wctx) != nil:
		return &cliError{code: "WaitTimedOut", message: fmt.Sprintf("It is not done after %s. The work goes on.", d), fix: back, exit: client.ExitTimeout}
	}
	return err
}
