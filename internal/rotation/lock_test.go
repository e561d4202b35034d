package rotation

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// machineOf is the part of a machine that locks are about: the folder of all rotations.
type machineOf struct {
	t   *testing.T
	dir string
}

// sh runs a script as a machine would and returns its exit status.
func (m machineOf) sh(script string, args ...string) (out string, status int) {
	m.t.Helper()
	cmd := exec.Command("/bin/sh", append([]string{"-c", "set -eu\n" + script, "sh"}, args...)...)
	text, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return strings.TrimSpace(string(text)), exit.ExitCode()
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimSpace(string(text)), 0
}

func (m machineOf) run(name string) string { return filepath.Join(m.dir, name) }

// lock takes the lock for a run, as somebody with a token.
func (m machineOf) lock(run, token, take, who string) string {
	m.t.Helper()
	out, status := m.sh(lockScript, m.run(run), token, take, who)
	if status != 0 {
		m.t.Fatalf("taking the lock: status %d", status)
	}
	return out
}

// may reports whether a runner may still change something.
func (m machineOf) may(run, token string) bool {
	m.t.Helper()
	out, status := m.sh(fence+"echo changed", m.run(run), token)
	if status != 0 && status != fencedStatus || (out == "changed") != (status == 0) {
		m.t.Fatalf("the fence: %q, status %d", out, status)
	}
	return status == 0
}

// age makes the lock of a run look as if its holder had done nothing for so long.
func (m machineOf) age(run string, by time.Duration) {
	m.t.Helper()
	then := time.Now().Add(-by)
	if err := os.Chtimes(filepath.Join(m.run(run), "holder"), then, then); err != nil {
		m.t.Fatal(err)
	}
}

func TestLockIsForOneRunner(t *testing.T) {
	m := machineOf{t, filepath.Join(t.TempDir(), "rotate-certs")}
	if out := m.lock("run1", "a1", "no", "ann@a"); out != "taken" || !m.may("run1", "a1") {
		t.Fatalf("a free lock: %q", out)
	}
	if out := m.lock("run1", "b1", "no", "bob@b"); out != "held ann@a" || !m.may("run1", "a1") || m.may("run1", "b1") {
		t.Errorf("the lock of a runner at work: %q", out)
	}
	if out := m.lock("run1", "a2", "no", "ann@a"); out != "taken" || m.may("run1", "a1") || !m.may("run1", "a2") {
		t.Errorf("the lock of our own former runner: %q", out)
	}
	if out := m.lock("run1", "b2", "yes", "bob@b"); out != "taken" || m.may("run1", "a2") || !m.may("run1", "b2") {
		t.Errorf("taking over: %q", out)
	}
	if _, status := m.sh(releaseScript, m.run("run1"), "a2"); status != 0 || !m.may("run1", "b2") {
		t.Error("who was replaced gives the lock of another back")
	}
	if _, status := m.sh(releaseScript, m.run("run1"), "b2"); status != 0 || m.may("run1", "b2") {
		t.Error("a lock that was given back is still held")
	}
	if out := m.lock("run1", "a3", "no", "ann@a"); out != "taken" {
		t.Errorf("a lock that was given back: %q", out)
	}
}

func TestLockEndsWhenItsHolderIsSilent(t *testing.T) {
	m := machineOf{t, filepath.Join(t.TempDir(), "rotate-certs")}
	m.lock("run1", "a1", "no", "ann@a")
	m.age("run1", 80*time.Second)
	if out := m.lock("run1", "b1", "no", "bob@b"); out != "held ann@a" {
		t.Errorf("after 80 s: %q", out)
	}
	if !m.may("run1", "a1") { // which is a sign of life
		t.Error("the holder may not go on after 80 s")
	}
	m.age("run1", 80*time.Second)
	m.may("run1", "a1")
	if out := m.lock("run1", "b1", "no", "bob@b"); out != "held ann@a" {
		t.Errorf("just after a step of its holder: %q", out)
	}
	m.age("run1", 100*time.Second)
	if out := m.lock("run1", "b1", "no", "bob@b"); out != "taken" || m.may("run1", "a1") || !m.may("run1", "b1") {
		t.Errorf("after 100 s: %q", out)
	}
}

// TestLockIsForOneRun: who begins another run on the same machine is another
// runner, too; and takes over from the first in the same sense.
func TestLockIsForOneRun(t *testing.T) {
	for _, how := range []struct {
		what, take string
		silent     time.Duration
	}{{"told to take over", "yes", 0}, {"its holder is silent", "no", 100 * time.Second}} {
		m := machineOf{t, filepath.Join(t.TempDir(), "rotate-certs")}
		m.lock("run1", "a1", "no", "ann@a")
		if out := m.lock("run2", "b1", "no", "bob@b"); out != "held ann@a" {
			t.Errorf("another run while one is at work: %q", out)
		}
		m.age("run1", how.silent)
		if out := m.lock("run2", "b1", how.take, "bob@b"); out != "taken" || !m.may("run2", "b1") {
			t.Errorf("%s: %q", how.what, out)
		}
		if m.may("run1", "a1") {
			t.Errorf("%s: the runner of the other run goes on", how.what)
		}
	}
}
