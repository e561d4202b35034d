package remote

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote/remotetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// eventually waits until something is so.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	if !inTime(so) {
		t.Fatalf("in two minutes not: %s", what)
	}
}

// inTime waits until something is so, and reports whether it is.
func inTime(so func() bool) bool {
	for deadline := time.Now().Add(2 * time.Minute); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// once does something beside the test when a file is there. The end of the test waits
// for it.
func once(t *testing.T, path string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if !inTime(func() bool { return exists(path) }) {
			t.Errorf("in two minutes no %s", path)
			return
		}
		do()
	}()
	t.Cleanup(func() { <-done })
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// The line is cut in the middle of an upload, at several points and on either side
// of the jump host. Every state that can be seen is the old file or the new one.
func TestUploadSurvivesACutLine(t *testing.T) {
	b := newBed(t)
	h := b.host()
	content := make([]byte, 200_000)
	_, _ = rand.Read(content)
	path := filepath.Join(b.dir, "f")
	for i, after := range []int64{0, 300, 5_000, 150_000, 202_000} {
		old := []byte{byte(i)}
		if err := os.WriteFile(path, old, 0o644); err != nil {
			t.Fatal(err)
		}
		line := b.toTarget
		if i%2 == 0 {
			line = b.toJump
		}
		before := line.Accepted()
		line.CutAfter(after)
		done := make(chan error)
		go func() { done <- h.Put(t.Context(), path, bytes.NewReader(content), 0o600) }()
		for open := true; open; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatalf("cut after %d bytes: %v", after, err)
				}
				open = false
			case <-time.After(5 * time.Millisecond):
				if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, old) && !bytes.Equal(got, content) {
					t.Errorf("cut after %d bytes: %d bytes can be seen, %v", after, len(got), err)
				}
			}
		}
		if line.Accepted() == before {
			t.Errorf("the line was not cut after %d bytes", after)
		}
		eventually(t, "nothing left behind", func() bool { return len(remains(path)) == 0 })
		wantFile(t, path, content, 0o600)
	}
}

func TestAScriptIsRepeatedOnlyIfItOnlyLooks(t *testing.T) {
	b := newBed(t)
	h := b.host()
	runs, goOn := filepath.Join(b.dir, "runs"), filepath.Join(b.dir, "go")
	s := rotation.Script{
		Name: "wait", Args: []string{runs, goOn}, Quiet: true,
		Text: `echo x >>"$1"; n=$(wc -l <"$1"); [ "$n" -gt 1 ] || until [ -e "$2" ]; do sleep 0.05; done; echo done`,
	}
	once(t, runs, b.toTarget.Cut)
	if out, err := h.Run(t.Context(), s); err != nil || string(out) != "done\n" || readFile(t, runs) != "x\nx\n" {
		t.Errorf("a quiet script: %q, %v", out, err)
	}
	_ = os.Remove(runs)
	once(t, runs, b.toTarget.Cut)
	s.Quiet = false
	_, err := h.Run(t.Context(), s)
	want(t, err, fault.Unavailable, "wait", "master-1", "outcome is not known", b.cfg.Log)
	if readFile(t, runs) != "x\n" {
		t.Error("it was run again")
	}
	// It has not noticed anything, and its output is in the log.
	writeFile(t, goOn, "")
	eventually(t, "the end in the log", func() bool { return strings.Contains(b.log(), "wait: exit status 0") })
	if !strings.Contains(b.log(), "\ndone\n") {
		t.Errorf("the log is\n%s", b.log())
	}
	// Lost before it began: it can be begun later, and is run once.
	_ = os.Remove(runs)
	b.toTarget.Cut()
	s.Text = `echo x >>"$1"`
	if _, err := h.Run(t.Context(), s); err != nil || readFile(t, runs) != "x\n" {
		t.Errorf("after the line was cut: %v, %q", err, readFile(t, runs))
	}
}

// A script with only a part of its input does not begin.
func TestAScriptDoesNotBeginWithHalfItsInput(t *testing.T) {
	b := newBed(t)
	h := b.host()
	seen := filepath.Join(b.dir, "seen")
	b.toTarget.CutAfter(100_000)
	_, err := h.Run(t.Context(), rotation.Script{Name: "count", Text: `wc -c >>"$1"`, Args: []string{seen}, Input: make([]byte, 500_000)})
	want(t, err, fault.Unavailable, "outcome is not known")
	time.Sleep(200 * time.Millisecond)
	if exists(seen) {
		t.Errorf("it has begun: %s", readFile(t, seen))
	}
}

func finishing(b *bed, unit string) (s rotation.Script, begun, goOn string) {
	begun, goOn = filepath.Join(b.dir, unit+"-begun"), filepath.Join(b.dir, unit+"-go")
	return rotation.Script{
		Name: "restart etcd", Finishes: true, Unit: unit, Timeout: 2 * time.Minute,
		Args: []string{begun, goOn}, Input: []byte("secret input"),
		Text: `echo x >>"$1"; cat; echo working >&2; until [ -e "$2" ]; do sleep 0.05; done; echo; wc -l <"$1"`,
	}, begun, goOn
}

func TestAScriptThatFinishesSurvivesACutLine(t *testing.T) {
	b := newBed(t)
	h := b.host()
	s, begun, goOn := finishing(b, "kf-test-cut")
	once(t, begun, func() {
		for _, line := range []*remotetest.Proxy{b.toTarget, b.toJump} {
			before := line.Accepted()
			line.Cut()
			if !inTime(func() bool { return line.Accepted() > before }) {
				t.Error("it was not dialled again")
			}
		}
		_ = os.WriteFile(goOn, nil, 0o600)
	})
	out, err := h.Run(t.Context(), s)
	if err != nil || string(out) != "secret input\n1\n" {
		t.Fatalf("%q, %v", out, err)
	}
	if log := b.log(); !strings.Contains(log, "restart etcd: exit status 0") || !strings.Contains(log, "working") {
		t.Errorf("the log is\n%s", log)
	}
	if left, _ := filepath.Glob(b.cfg.WorkDir + "/run/*"); len(left) != 1 || filepath.Base(left[0]) != "lock" {
		t.Errorf("this was left behind: %v", left)
	}
}

// The runner is killed: ctx ends. Another one, with a connection of its own, finds
// the script under way, and a third, when all is over, its result; it ran once.
func TestASecondRunAttaches(t *testing.T) {
	b := newBed(t)
	s, begun, goOn := finishing(b, "kf-test-attach")
	ctx, cancel := context.WithCancel(t.Context())
	once(t, begun, cancel)
	first := b.host()
	if _, err := first.Run(ctx, s); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "goes on there as unit kf-test-attach") {
		t.Fatalf("the first: %v", err)
	}
	other := s
	other.Text = "echo another"
	_, err := first.Run(t.Context(), other)
	want(t, err, fault.Conflict, "kf-test-attach")

	ctx, cancel = context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := b.host().Run(ctx, s); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("the second: %v", err)
	}
	if err := os.WriteFile(goOn, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its end", func() bool { return exists(b.cfg.WorkDir + "/run/kf-test-attach/status") })
	if exists(b.cfg.WorkDir + "/run/kf-test-attach/input") {
		t.Error("its input is still there")
	}
	if out, err := b.host().Run(t.Context(), s); err != nil || string(out) != "secret input\n1\n" {
		t.Errorf("the third: %q, %v", out, err)
	}
}

func TestTwoThatWaitShareTheResult(t *testing.T) {
	b := newBed(t)
	s, begun, goOn := finishing(b, "kf-test-share")
	h := b.host()
	done := make(chan error)
	for range 2 {
		go func() {
			out, err := h.Run(t.Context(), s)
			if err == nil && string(out) != "secret input\n1\n" {
				err = fmt.Errorf("it printed %q", out)
			}
			done <- err
		}()
	}
	eventually(t, "its beginning", func() bool { return exists(begun) })
	if err := os.WriteFile(goOn, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestTheFailureOfAScriptThatFinishes(t *testing.T) {
	h := newBed(t).host()
	s := rotation.Script{Name: "renew", Finishes: true, Unit: "kf-test-fail", Text: "echo why >&2; exit 7"}
	for range 2 { // its result is returned once, so it runs each time
		_, err := h.Run(t.Context(), s)
		var failed *rotation.ScriptError
		if !errors.As(err, &failed) || failed.Status != 7 || failed.Output != "why" || failed.Script != "renew" {
			t.Errorf("the error is %+v", err)
		}
	}
	s.Text, s.Timeout = "sleep 60", time.Second
	_, err := h.Run(t.Context(), s)
	var failed *rotation.ScriptError
	if !errors.As(err, &failed) || failed.Status != -1 {
		t.Errorf("the error is %v", err)
	}
}

// The machine restarts in the middle: who waits is told that nobody knows, and who
// comes later begins anew.
func TestAScriptThatWasEndedFromOutside(t *testing.T) {
	b := newBed(t)
	h := b.host()
	s, begun, goOn := finishing(b, "kf-test-killed")
	kill := func() {
		eventually(t, "its beginning", func() bool { return exists(begun) })
		killRunner(t, b.cfg.WorkDir+"/run/kf-test-killed/runner")
	}
	done := make(chan error)
	go func() {
		_, err := h.Run(t.Context(), s)
		done <- err
	}()
	kill()
	want(t, <-done, fault.Unavailable, "ended before its end", "outcome is not known")

	_ = os.Remove(begun)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := h.Run(ctx, s)
		done <- err
	}()
	eventually(t, "its beginning", func() bool { return exists(begun) })
	cancel()
	<-done
	kill()
	_ = os.Remove(begun)
	if err := os.WriteFile(goOn, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := h.Run(t.Context(), s); err != nil || string(out) != "secret input\n1\n" {
		t.Errorf("begun anew: %q, %v", out, err)
	}
}

// killRunner kills the process of a runner, with those that are about to become
// programs of it, and returns when they are gone.
func killRunner(t *testing.T, runner string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	runs := func(proc string) bool {
		line, err := os.ReadFile(proc + "/cmdline") // empty once it is dead
		return err == nil && string(line) == "/bin/sh\x00"+runner+"\x00"
	}
	killed := false
	for _, proc := range all {
		if !runs(proc) {
			continue
		}
		killed = true
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil {
			t.Fatal(err)
		}
		if p, err := os.FindProcess(pid); err != nil || p.Kill() != nil {
			t.Errorf("the runner, process %d, cannot be killed", pid)
		}
		eventually(t, "its death", func() bool { return !runs(proc) })
	}
	if !killed {
		t.Error("no process runs it")
	}
}

func TestASilentConnectionIsNoticed(t *testing.T) {
	b := newBed(t)
	b.cfg.keepAlive = 3 * time.Second
	h := b.host()
	begun, goOn := filepath.Join(b.dir, "begun"), filepath.Join(b.dir, "go")
	once(t, begun, func() {
		b.toJump.Freeze(true) // closes nothing: whoever gives it up does so for its silence
		if !inTime(func() bool { c, _ := h.link.current(); return c == nil }) {
			t.Error("nobody has noticed")
		}
		b.toJump.Cut() // what was sent meanwhile does not arrive later
		b.toJump.Freeze(false)
		_ = os.WriteFile(goOn, nil, 0o600)
	})
	out, err := h.Run(t.Context(), rotation.Script{
		Name: "x", Quiet: true, Timeout: 5 * time.Minute, Args: []string{begun, goOn},
		Text: `[ -e "$1" ] || { touch "$1"; until [ -e "$2" ]; do sleep 0.05; done; }; echo ok`,
	})
	if err != nil || string(out) != "ok\n" || b.toJump.Accepted() < 2 {
		t.Errorf("%q over %d connections, %v", out, b.toJump.Accepted(), err)
	}
}

func TestAnSSHDThatRestarts(t *testing.T) {
	b := newBed(t)
	h := b.host()
	b.target.Stop()
	b.toTarget.Cut()
	before := b.toTarget.Accepted()
	done := make(chan error, 1)
	go func() {
		_, err := h.Run(t.Context(), rotation.Script{Name: "x", Text: "true"})
		done <- err
	}()
	eventually(t, "an attempt", func() bool { return b.toTarget.Accepted() > before })
	b.target.Restart()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A key that disappears from known_hosts, and one that changes, count from the next
// connection on.
func TestKnownHostsCountsAtEachConnection(t *testing.T) {
	b := newBed(t)
	h := b.host()
	known := b.jump.KnownHostsLine(b.toJump.Address)
	writeFile(t, b.cfg.KnownHosts[0], known)
	b.toTarget.Cut()
	_, err := h.Run(t.Context(), rotation.Script{Name: "x", Quiet: true, Text: "true"})
	want(t, err, fault.Denied, "x on master-1", "not in known_hosts any more", "ssh-ed25519 SHA256:")
	writeFile(t, b.cfg.KnownHosts[0], known+strings.TrimSpace(knownAs(b.toTarget.Address)+" "+strings.SplitN(known, " ", 2)[1]))
	_, err = h.Run(t.Context(), rotation.Script{Name: "x", Quiet: true, Text: "true"})
	want(t, err, fault.Conflict, "has changed")
}

func TestNothingWorksAfterClose(t *testing.T) {
	b := newBed(t)
	j := b.dial()
	h := j.Host("jump")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Run(t.Context(), rotation.Script{Name: "x", Text: "true"}); err == nil {
		t.Error("a script ran")
	}
	if _, err := j.DialContext(t.Context(), "tcp", b.target.Address); err == nil {
		t.Error("a connection was made")
	}
}
