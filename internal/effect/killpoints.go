//go:build killpoints && !windows

package effect

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// The environment of a process under test:
//
//	KEYFLEET_KILL_PROGRAM only the program of that name counts, logs and dies; empty: every one
//	KEYFLEET_EFFECT_LOG   file to which every effect appends "N name\n" before it happens
//	KEYFLEET_KILL_AT      "before:N", "after:N", "before:NAME" or "after:NAME" (first effect of
//	                      that name); empty: never
//	KEYFLEET_KILL_ONCE    file made just before dying; if it exists, the process does not die again
//	KEYFLEET_KILL_ORDER   file that may appear at any time, with "before:NAME#K" or "after:NAME#K": the
//	                      K-th effect of that name since then; it is renamed to FILE.done just before dying
var state struct {
	sync.Mutex
	n     int
	order string         // that is being followed
	since map[string]int // effects by name since it was given
}

// Do performs one outside effect, and dies before or after it if told so.
func Do(name string, fn func() error) error {
	if only := os.Getenv("KEYFLEET_KILL_PROGRAM"); only != "" && filepath.Base(os.Args[0]) != only {
		return fn()
	}
	n, order, named := count(name)
	if p := os.Getenv("KEYFLEET_EFFECT_LOG"); p != "" {
		if f, err := os.OpenFile(p, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			fmt.Fprintf(f, "%d %s\n", n, name)
			f.Close()
		}
	}
	die("before", n, name)
	obey("before", order, named)
	err := fn()
	die("after", n, name)
	obey("after", order, named)
	return err
}

// count counts an effect, and returns the order that is in force and what the
// effect is called in it.
func count(name string) (n int, order, named string) {
	state.Lock()
	defer state.Unlock()
	state.n++
	if p := os.Getenv("KEYFLEET_KILL_ORDER"); p != "" {
		text, _ := os.ReadFile(p) // not there: no order
		if order = string(text); order != state.order || state.since == nil {
			state.order, state.since = order, map[string]int{}
		}
		state.since[name]++
		named = name + "#" + strconv.Itoa(state.since[name])
	}
	return state.n, order, named
}

// obey dies if the order says so.
func obey(when, order, named string) {
	if order == "" || order != when+":"+named {
		return
	}
	if p := os.Getenv("KEYFLEET_KILL_ORDER"); os.Rename(p, p+".done") == nil {
		kill()
	}
}

func die(when string, n int, name string) {
	at, what, ok := strings.Cut(os.Getenv("KEYFLEET_KILL_AT"), ":")
	if !ok || at != when || (what != strconv.Itoa(n) && what != name) {
		return
	}
	if once := os.Getenv("KEYFLEET_KILL_ONCE"); once != "" {
		f, err := os.OpenFile(once, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return
		}
		f.Close()
	}
	kill()
}

func kill() {
	_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
	// The first process of a PID namespace cannot kill itself; leaving at once is the same.
	syscall.Exit(128 + int(syscall.SIGKILL))
}

// Variable reports whether an environment variable is this package's, and so
// goes on to child processes.
func Variable(name string) bool {
	return strings.HasPrefix(name, "KEYFLEET_KILL_") || strings.HasPrefix(name, "KEYFLEET_EFFECT_")
}
