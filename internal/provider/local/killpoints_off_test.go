//go:build !killpoints

package local_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// initEnv is the environment of first processes: nothing, without kill points.
func initEnv() []string { return nil }

// TestKillPoints builds these tests with kill points and runs those that kill,
// as this user and, when that is root, as an ordinary user too.
func TestKillPoints(t *testing.T) {
	switch {
	case testing.Short():
		t.Skip("it takes half a minute")
	case os.Getenv(againAsUser) != "":
		t.Skip("root's run does it, for this user too")
	}
	exe := filepath.Join(t.TempDir(), "killpoints.test")
	build := exec.Command("go", "test", "-c", "-tags", "killpoints", "-o", exe, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the tests with kill points: %v\n%s", err, out)
	}
	out, err := exec.Command(exe, "-test.v", "-test.run", "Killed|AsOrdinaryUser").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, line := range bytes.Split(out, []byte("\n")) {
		if bytes.Contains(line, []byte("killed at")) {
			t.Logf("%s", bytes.TrimSpace(line))
		}
	}
	if !bytes.Contains(out, []byte("server killed at")) {
		t.Fatalf("nothing was killed:\n%s", out)
	}
}
