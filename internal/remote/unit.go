package remote

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// A script that finishes runs apart from any connection: as a transient unit of
// systemd, or where process 1 is something else in a session of its own. What is
// known about it is in its folder, below WorkDir:
//
//	run/UNIT/
//	    id       which script it is: SHA-256 of text, arguments and time limit
//	    token    which beginning of it
//	    runner   the program that runs it
//	    input    0600; shredded at the end
//	    running  locked by the runner from beginning to end, whoever dies
//	    begun    the runner has the lock
//	    stdout, stderr
//	    status   exit status and seconds; written before the lock is let go
//
// A result that nobody fetched is that of the same script only; for another one
// of that unit it is thrown away, and while it runs the other one is refused.
//
// So "not locked and no status" means that it was ended from outside. The folder
// goes when its result has been read, and Run returns only then: no later Run gets that
// result, unless our own process dies in between. Of several processes that wait, those
// that read after the first has cleared it away are told that it was taken.

// flight is a script that finishes, and that somebody in this process waits for.
type flight struct {
	id   string
	done chan struct{}
	out  []byte
	err  error
}

// finish runs a script as a unit. Callers with the same unit share the result.
func (h *Host) finish(ctx context.Context, s rotation.Script) ([]byte, error) {
	id := scriptID(s)
	for {
		f, first := h.link.board(s.Unit, id)
		if first {
			f.out, f.err = h.runUnit(ctx, s, id)
			h.link.leave(s.Unit, f)
			return f.out, f.err
		}
		if f.id != id {
			return nil, h.otherScript(s)
		}
		select {
		case <-ctx.Done():
			return nil, h.goesOn(s, ctx.Err())
		case <-f.done:
		}
		gaveUp := errors.Is(f.err, context.Canceled) || errors.Is(f.err, context.DeadlineExceeded)
		if !gaveUp {
			return bytes.Clone(f.out), f.err
		}
	}
}

func (l *link) board(unit, id string) (f *flight, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.units[unit]; f != nil {
		return f, false
	}
	f = &flight{id: id, done: make(chan struct{})}
	l.units[unit] = f
	return f, true
}

func (l *link) leave(unit string, f *flight) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.units, unit)
	close(f.done)
}

func scriptID(s rotation.Script) string {
	sum := sha256.New()
	for _, part := range append([]string{s.Text, limitOf(s).String()}, s.Args...) {
		_, _ = fmt.Fprintf(sum, "%d:%s", len(part), part)
	}
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// runUnit begins or joins the unit, waits for its end and fetches the result.
func (h *Host) runUnit(ctx context.Context, s rotation.Script, id string) ([]byte, error) {
	place := h.unitPlace(s)
	begun, err := h.ask(ctx, s, "beginning", place+h.unitStart(s, id, rand.Text()))
	if err != nil {
		return nil, err
	}
	token := strings.TrimSpace(string(begun.stdout))
	if token == "other" {
		return nil, h.otherScript(s)
	}
	place += unitOf(token)
	var state []string
	var end *outcome
	for len(state) == 0 || state[0] == "running" {
		if end, err = h.ask(ctx, s, "waiting for", place+unitWait); err != nil {
			return nil, err
		}
		line, rest, _ := bytes.Cut(end.stdout, []byte("\n"))
		state, end.stdout = strings.Fields(string(line)), rest
	}
	if state[0] == "collected" {
		return nil, fault.New(fault.Conflict, "", "Somebody else waited for %q on %s and has taken its result.", s.Name, h.name).
			WithFix("look whether another keyfleet runs; its output is in %s there", h.log).Because(rotation.ErrResultTaken)
	}
	if _, err := h.ask(ctx, s, "clearing away", place+unitClear); err != nil {
		return nil, err
	}
	return h.unitResult(s, state, end)
}

// unitPlace begins all programs about a unit, unitStart is the one that begins or joins
// it, and unitOf says which beginning of it the others are about.
func (h *Host) unitPlace(s rotation.Script) string {
	return assign("unit", s.Unit, "dir", h.work+"/run/"+s.Unit, "work", h.work, "lock", h.work+"/run/lock") + unitCommon
}

func (h *Host) unitStart(s rotation.Script, id, token string) string {
	runner := assign("dir", h.work+"/run/"+s.Unit) + job(s, h.log, h.work) + unitRunner
	return assign("id", id, "token", token, "runner", runner,
		"input", base64.StdEncoding.EncodeToString(s.Input), "environment", environment) + unitBegin
}

func unitOf(token string) string { return assign("token", token, "most", fmt.Sprint(maxOutput)) }

// unitResult makes of the state of a unit what Run returns.
func (h *Host) unitResult(s rotation.Script, state []string, end *outcome) ([]byte, error) {
	var took, size int
	if state[0] != "ended" {
		why := "perhaps by a restart of the machine"
		if text := strings.TrimSpace(string(end.stderr)); text != "" {
			why = text
		}
		return nil, fault.New(fault.Unavailable, "", "%q on %s was ended before its end (%s). Its outcome is not known.", s.Name, h.name, why).
			WithFix("run the command again, which looks at what was done; %s there has the output", h.log)
	}
	if _, err := fmt.Sscan(strings.Join(state[1:], " "), &end.status, &took, &size); err != nil {
		return nil, fmt.Errorf("reading the result of %q on %s: %w", s.Name, h.name, err)
	}
	if size > maxOutput {
		return nil, fault.New(fault.TooLarge, "", "The script %q on %s printed %d bytes; %d are allowed.", s.Name, h.name, size, maxOutput)
	}
	end.took = time.Duration(took) * time.Second
	return h.result(s, end)
}

// ask runs one of the programs below until an answer comes. Each may run any
// number of times.
func (h *Host) ask(ctx context.Context, s rotation.Script, what, program string) (*outcome, error) {
	var out *outcome
	err := persist(ctx, untilDone, true, func() (err error) {
		out, err = h.root(ctx, command{text: program, wait: time.Minute + grace})
		return err
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, h.goesOn(s, err)
	case err != nil:
		return nil, h.failed(s.Name, true, err)
	}
	_, err = h.result(rotation.Script{Name: what + " " + s.Name, Timeout: time.Hour}, out)
	return out, err
}

func (h *Host) goesOn(s rotation.Script, err error) error {
	return fmt.Errorf("%s on %s, which goes on there as unit %s if it has begun: %w", s.Name, h.name, s.Unit, err)
}

func (h *Host) otherScript(s rotation.Script) error {
	return fault.New(fault.Conflict, "", "Another script runs on %s as unit %s, so %q cannot begin.", h.name, s.Unit, s.Name).
		WithFix("wait for its end, or look who began it: systemctl status %s", s.Unit)
}

// held must be asked before it is looked for status: then no status is missed. full
// says that the disk is full, for a program on a full disk cannot leave that behind,
// and the shell's own word for it is "I/O error": so files are written by cat.
const unitCommon = `umask 077
cd /
held() { [ -e "$dir/running" ] && ! flock -n -s 9 9<"$dir/running" 2>/dev/null; }
is() { [ "$(cat "$dir/$1" 2>/dev/null)" = "$2" ]; }
full() { df -Pk "$dir" 2>/dev/null | awk 'NR == 2 && $4 < 16 { print "No space left on device: " $6 " is full" }' >&2; }
# One waiter reads while another clears: what goes, goes at once.
discard() {
	[ ! -e "$dir/input" ] || shred -u "$dir/input" || :
	rm -rf "$work/run/.gone"
	mv "$dir" "$work/run/.gone"
	rm -rf "$work/run/.gone"
}
`

const unitBegin = `set -eu
mkdir -p "$work/run"
exec 8>>"$lock"
flock 8
if [ -d "$dir" ]; then
	if held; then
		if is id "$id"; then cat "$dir/token"; else echo other; fi
		exit 0
	elif [ -s "$dir/status" ] && is id "$id"; then
		cat "$dir/token"
		exit 0
	fi
	discard
fi
mkdir "$dir"
trap discard EXIT
echo "$id" | cat >"$dir/id"
echo "$token" | cat >"$dir/token"
printf %s "$input" | base64 -d >"$dir/input"
printf %s "$runner" | cat >"$dir/runner"
if [ -d /run/systemd/system ]; then
	systemctl reset-failed "$unit.service" 2>/dev/null || :
	systemd-run --quiet --unit="$unit" $environment /bin/sh "$dir/runner" 8>&- >&2
else
	setsid /bin/sh "$dir/runner" 8>&- </dev/null >/dev/null 2>&1 &
fi
i=0
until [ -e "$dir/begun" ]; do
	i=$((i + 1))
	if [ "$i" -gt 300 ]; then
		echo "unit $unit did not begin within 30 s" >&2
		full
		exit 1
	fi
	sleep 0.1
done
trap - EXIT
echo "$token"
`

const unitRunner = `exec 9>>"$dir/running" && flock 9 || exit 1
: >"$dir/begun"
exec <"$dir/input" >"$dir/stdout" 2>"$dir/stderr"
first=$(uptime)
script "$@" 9>&-
code=$?
took=$(($(uptime) - first))
shred -u "$dir/input" || rm -f "$dir/input"
echo "$code $took" >"$dir/status.new" && sync -- "$dir/status.new" && mv "$dir/status.new" "$dir/status"
`

// unitWait waits ten seconds and no longer, so that a dead connection is noticed.
// Another waiter may clear the folder away at any time, so the result is what was
// open when the token was still ours.
const unitWait = `ended() {
	is token "$token" && read -r code took <&3 || return 1
	size=$(stat -L -c %s /dev/fd/4)
	echo "ended $code $took $size"
	tail -c 16384 <&5 >&6
	[ "$code" = 0 ] || full 2>&6
	[ "$size" -gt "$most" ] || cat <&4
}
exec 6>&2
i=0
while is token "$token" && held; do
	i=$((i + 1))
	if [ "$i" -gt 100 ]; then
		echo running
		exit 0
	fi
	sleep 0.1
done
if { ended 3<"$dir/status" 4<"$dir/stdout" 5<"$dir/stderr"; } 2>/dev/null; then
	exit 0
elif is token "$token"; then
	echo died
	full
else
	echo collected
fi
`

const unitClear = `exec 8>>"$lock"
flock 8
if is token "$token"; then discard; fi
`
