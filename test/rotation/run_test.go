//go:build linux

package rotation

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// longest is how long one call of rotate-certs may take.
const longest = 30 * time.Minute

// run is a call of rotate-certs that is under way.
type run struct {
	c     *cluster
	cmd   *exec.Cmd
	ended chan struct{} // closed when the process has ended and all it printed is read
	err   error         // set before ended is closed

	mu    sync.Mutex // guards what follows
	lines []string
	more  chan struct{} // closed when there is another line
}

// start calls rotate-certs; at, if there is one, is told of each line that it prints.
func (c *cluster) start(at func(line string), args ...string) *run {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), longest)
	cmd := exec.CommandContext(ctx, c.bin, append([]string{"rotate-certs"}, args...)...)
	cmd.Args = append(cmd.Args, "--ssh-host", "ssh://"+c.SSHUser+"@"+c.door,
		"--linux-ssh-private-key", c.SSHKey, "--known-hosts", c.known, "--run-dir", c.dir)
	cmd.Args = append(cmd.Args, c.flags...)
	cmd.Env = append(os.Environ(), c.env...)
	out, in := io.Pipe()
	cmd.Stdout, cmd.Stderr = in, in
	r := &run{c: c, cmd: cmd, ended: make(chan struct{}), more: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		cancel()
		c.t.Fatal(err)
	}
	go func() { // ends with the command
		r.err = cmd.Wait()
		_ = in.Close()
	}()
	go func() { // ends with the one above
		defer cancel()
		defer close(r.ended)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			r.note(lines.Text(), at)
		}
	}()
	c.t.Cleanup(func() { // a test that failed half way leaves nothing running
		_ = cmd.Process.Kill()
		<-r.ended
	})
	return r
}

func (r *run) note(line string, at func(string)) {
	r.c.t.Log(line)
	if at != nil {
		at(line)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, line)
	close(r.more)
	r.more = make(chan struct{})
}

// await waits until a line holds the text, and fails if the call ends before.
func (r *run) await(text string) {
	r.c.t.Helper()
	for seen := 0; ; {
		r.mu.Lock()
		lines, more := r.lines, r.more
		r.mu.Unlock()
		for ; seen < len(lines); seen++ {
			if strings.Contains(lines[seen], text) {
				return
			}
		}
		select {
		case <-more:
		case <-r.ended:
			if !strings.Contains(r.output(), text) {
				r.c.t.Fatalf("it ended, and never said %q:\n%s", text, r.output())
			}
		}
	}
}

// output is what it has printed.
func (r *run) output() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.lines, "\n")
}

// steps are those that it has reported as done, in order.
func (r *run) steps() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, line := range r.lines {
		if _, step, ok := strings.Cut(line, "  done   "); ok {
			step, _, _ = strings.Cut(step, " (")
			out = append(out, step)
		}
	}
	return out
}

// signal sends a signal to it.
func (r *run) signal(s syscall.Signal) {
	r.c.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		r.c.t.Fatal(err)
	}
}

// wait waits for its end and returns the exit status, -1 if it was killed.
func (r *run) wait() int {
	r.c.t.Helper()
	<-r.ended
	return exit(r.c.t, r.err)
}

// kill kills it, as a power cut would.
func (r *run) kill() {
	r.c.t.Helper()
	r.signal(syscall.SIGKILL)
	if status := r.wait(); status != -1 {
		r.c.t.Fatalf("it was to be killed and ended with status %d", status)
	}
}

// rotate calls rotate-certs and waits for its end; at is told of each line.
func (c *cluster) rotate(at func(line string), args ...string) error {
	c.t.Helper()
	r := c.start(at, args...)
	<-r.ended
	return r.err
}

// call calls rotate-certs, waits for its end and returns the exit status and what it printed.
func (c *cluster) call(args ...string) (status int, output string) {
	c.t.Helper()
	r := c.start(nil, args...)
	return r.wait(), r.output()
}

// diesAt makes calls die, once, at a point of package effect; "": never again.
func (c *cluster) diesAt(point string) {
	if c.env = nil; point != "" {
		c.env = []string{"KEYFLEET_KILL_AT=" + point}
	}
}

// effect is the name of what a step does on its machine, for diesAt.
func effect(s rotation.Step) string { return s.Name() }

// first returns the first step of a plan that is as wanted.
func first(t *testing.T, p rotation.Plan, wanted func(rotation.Step) bool) rotation.Step {
	t.Helper()
	i := slices.IndexFunc(p.Steps, wanted)
	if i < 0 {
		t.Fatal("no step of the plan is as wanted")
	}
	return p.Steps[i]
}

// plan is the plan of the unfinished run, or of one that would begin now.
func (c *cluster) plan() rotation.Plan {
	c.t.Helper()

	var text strings.Builder
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.bin, "rotate-certs", "plan", "-o", "json", "--ssh-host", "ssh://"+c.SSHUser+"@"+c.door,
		"--linux-ssh-private-key", c.SSHKey, "--known-hosts", c.known, "--run-dir", c.dir)
	cmd.Args = append(cmd.Args, c.flags...)
	cmd.Stdout, cmd.Stderr = &text, os.Stderr
	if err := cmd.Run(); err != nil {
		c.t.Fatalf("planning: %v", err)
	}
	var p rotation.Plan
	if err := json.Unmarshal([]byte(text.String()), &p); err != nil {
		c.t.Fatal(err)
	}
	return p
}

// newest is the journal of the newest run, "" if there is none.
func (c *cluster) newest() string {
	c.t.Helper()
	paths, err := filepath.Glob(filepath.Join(c.dir, "*", "journal"))
	if err != nil {
		c.t.Fatal(err)
	}
	if len(paths) == 0 {
		return ""
	}
	return slices.Max(paths)
}

// state is how far the newest run is. Nobody may be at work on it.
func (c *cluster) state() journal.State {
	c.t.Helper()
	path := c.newest()
	if path == "" {
		return journal.State{}
	}
	j, err := journal.Open(path)
	if err != nil {
		c.t.Fatal(err)
	}
	defer j.Close()
	return j.State()
}

// runName is the name of the newest run.
func (c *cluster) runName() string {
	c.t.Helper()
	path := c.newest()
	if path == "" {
		c.t.Fatalf("no run in %s", c.dir)
	}
	return filepath.Base(filepath.Dir(path))
}

// finished reports whether the newest run is finished.
func (c *cluster) finished() bool {
	c.t.Helper()
	return c.state().Finished
}
