package remote

import (
	"encoding/base64"
	"fmt"
	"path"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// The shell programs are written for any POSIX shell with the tools of coreutils
// and util-linux. Values come in as assignments in front, quoted; a value is never
// part of a program's text.

// quote makes a string one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// assign makes assignments of names and values in turn.
func assign(pairs ...string) string {
	var b strings.Builder
	for i := 0; i+1 < len(pairs); i += 2 {
		b.WriteString(pairs[i] + "=" + quote(pairs[i+1]) + "\n")
	}
	return b.String()
}

// setArgs makes $1, $2, ...
func setArgs(args []string) string {
	var b strings.Builder
	b.WriteString("set --")
	for _, a := range args {
		b.WriteString(" " + quote(a))
	}
	return b.String() + "\n"
}

// seconds rounds up, since not every timeout(1) knows fractions.
func seconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }

func limitOf(s rotation.Script) time.Duration {
	if s.Timeout > 0 {
		return s.Timeout
	}
	return time.Minute
}

// direct is the program that runs a script while we wait. The input has come with
// it, so a script never takes the end of a broken connection for that of its input.
// It passes from shell to shell through pipes and is in no argument.
func direct(s rotation.Script, log, work string) string {
	return job(s, log, work) +
		assign("input", base64.StdEncoding.EncodeToString(s.Input)) +
		`printf %s "$input" | base64 -d | script "$@"` + "\n"
}

// job defines the shell function "script", which runs a script within its time and
// with its output in the log.
func job(s rotation.Script, log, work string) string {
	name := strings.Join(strings.Fields(s.Name), " ") // one line of the log
	head := assign(
		"text", s.Text, "name", name, "limit", fmt.Sprint(seconds(limitOf(s))),
		"log", log, "logdir", path.Dir(log), "work", work,
	) + setArgs(s.Args) + jobStart
	if s.Quiet {
		return head + "script() { timed \"$@\"; }\n"
	}
	return head + jobLogged
}

const jobStart = `umask 077
cd /
uptime() { IFS=. read -r up rest </proc/uptime; echo "$up"; }
timed() { timeout -k 5 "$limit" /bin/sh -euc "$text" keyfleet "$@"; }
`

// Both outputs go to the log as they come, and on to us. tee goes on writing the
// log when we are gone; the script, whose output goes to tee, notices nothing.
const jobLogged = `say() { printf '=== %s %s%s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$name" "$1" >>"$log"; }
script() {
	mkdir -p "$logdir" "$work/run" && say '' && chmod 600 "$log" &&
		pipes=$(mktemp -d "$work/run/pipes.XXXXXX") && mkfifo "$pipes/out" "$pipes/err" || {
		echo "keyfleet: nothing was run, because $log or $work cannot be written" >&2
		return 125
	}
	(trap '' PIPE; exec tee -a "$log" <"$pipes/out") &
	(trap '' PIPE; exec tee -a "$log" <"$pipes/err" >&2) &
	start=$(uptime)
	timed "$@" >"$pipes/out" 2>"$pipes/err"
	status=$?
	wait
	rm -rf "$pipes"
	[ -z "$(tail -c 1 "$log")" ] || echo >>"$log"
	say ": exit status $status after $(($(uptime) - start)) s"
	return "$status"
}
`
