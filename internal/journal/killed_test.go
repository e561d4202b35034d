//go:build unix

package journal

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestEveryKillConverges kills a real process before and after each of its
// outside effects, forward and back, once and again in the run that follows. Run
// to the end afterwards, the files must be those of a run that nobody disturbed.
func TestEveryKillConverges(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "killed")
	if out, err := exec.Command("go", "build", "-tags", "killpoints", "-o", bin, "./testdata/killed").CombinedOutput(); err != nil {
		t.Fatalf("building the process to kill: %v\n%s", err, out)
	}
	points := 0
	for _, tc := range []struct {
		name  string
		files []string // made before, beside "old"
		back  bool     // roll back after a first run, which fails
		want  map[string]string
	}{
		{"forward", nil, false, map[string]string{"new": "42", "passed": "yes", "flag": "up"}},
		{"forward over a point of no return", []string{"noreturn"}, false, map[string]string{"new": "42", "passed": "yes", "flag": "up", "noreturn": ""}},
		{"back", []string{"fail"}, true, map[string]string{"old": "before", "fail": ""}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, when := range []string{"before", "after"} {
				for n := 1; ; n++ {
					k := process{t: t, bin: bin, dir: prepare(t, tc.files), back: tc.back}
					if tc.back {
						k.once("", false) // up to the step that fails
					}
					if died := k.once(fmt.Sprintf("%s:%d", when, n), tc.back); !died {
						if n == 1 {
							t.Error("no effect was counted")
						}
						break
					}
					points++
					k.once(fmt.Sprintf("%s:%d", when, 1+n%3), tc.back) // die again while recovering
					k.once("", tc.back)
					if d := cmp.Diff(tc.want, k.files()); d != "" {
						t.Errorf("killed %s effect %d (-want +got):\n%s", when, n, d)
					}
				}
			}
		})
	}
	t.Logf("%d points, each with a second kill", points)
}

// process runs the helper on a directory.
type process struct {
	t    *testing.T
	bin  string
	dir  string
	back bool
}

func prepare(t *testing.T, files []string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "old"), []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// once runs the process, to be killed at a point or not, and reports whether it was.
func (p process) once(kill string, back bool) (died bool) {
	p.t.Helper()
	args := []string{p.dir}
	if back {
		args = []string{"-back", p.dir}
	}
	cmd := exec.Command(p.bin, args...)
	cmd.Env = append(os.Environ(), "KEYFLEET_KILL_AT="+kill, "KEYFLEET_KILL_ONCE=", "KEYFLEET_EFFECT_LOG=")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case errors.As(err, &exit) && exit.ExitCode() == -1:
		return true
	case p.back && strings.Contains(string(out), "told to fail"):
		return false // the run before the rollback
	}
	p.t.Fatalf("the process failed: %v\n%s", err, out)
	return false
}

// files returns the content of all files but the journal.
func (p process) files() map[string]string {
	p.t.Helper()
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		p.t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		if e.Name() == "journal" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(p.dir, e.Name()))
		if err != nil {
			p.t.Fatal(err)
		}
		out[e.Name()] = string(b)
	}
	return out
}
