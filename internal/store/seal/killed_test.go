package seal_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestEveryKillConverges kills a real process before and after each outside effect
// of a first start with a rotation, and of a restore. Run again to the end, the
// store must be as if nobody had disturbed it.
func TestEveryKillConverges(t *testing.T) {
	if testing.Short() {
		t.Skip("left out with -short: it starts some hundred processes with an embedded etcd each")
	}
	bin := filepath.Join(t.TempDir(), "killed")
	if out, err := exec.Command("go", "build", "-tags", "killpoints", "-o", bin, "./testdata/killed").CombinedOutput(); err != nil {
		t.Fatalf("building the process to kill: %v\n%s", err, out)
	}
	const want = "0=text 0 generation 1\n1=text 1 generation 1\n2=text 2 generation 1\nkeyset of 1 keys,\n"
	whole := filepath.Join(t.TempDir(), "whole")
	if _, died := once(t, bin, "", whole); died {
		t.Fatal("died without being told to")
	}
	backup, err := os.ReadFile(whole + ".backup")
	if err != nil {
		t.Fatal(err)
	}
	points := 0
	for _, restoring := range []bool{false, true} {
		for _, when := range []string{"before", "after"} {
			for n, died := 1, true; died; n++ {
				dir := filepath.Join(t.TempDir(), "state")
				args := []string{dir}
				if restoring {
					args = []string{"restore", dir}
					if err := os.WriteFile(dir+".backup", backup, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if _, died = once(t, bin, fmt.Sprintf("%s:%d", when, n), args...); died {
					points++
				} else if n == 1 {
					t.Errorf("restoring %t: no effect was counted", restoring)
				}
				if _, again := once(t, bin, "", args...); again {
					t.Fatal("died without being told to")
				}
				if out, _ := once(t, bin, "", "dump", dir); out != want {
					t.Errorf("restoring %t, killed %s effect %d: the store holds\n%s", restoring, when, n, out)
				}
				if t.Failed() {
					return
				}
			}
		}
	}
	t.Logf("%d points", points)
}

// once runs the process, to be killed at a point or not.
func once(t *testing.T, bin, kill string, args ...string) (out string, died bool) {
	t.Helper()
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), "KEYFLEET_KILL_AT="+kill, "KEYFLEET_KILL_ONCE=", "KEYFLEET_EFFECT_LOG=")
	text, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == -1 {
		return "", true
	}
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, text)
	}
	return string(text), false
}
