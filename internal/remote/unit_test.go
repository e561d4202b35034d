//go:build linux

package remote

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// TestTwoWaitForOneScript: two processes may wait for one script and clear its result
// away when they have it. Each has all of it then, or is told that the other has it.
func TestTwoWaitForOneScript(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err == nil && os.Getuid() != 0 {
		t.Skip("where process 1 is systemd, units are begun by root")
	}
	dir := t.TempDir()
	h := &Host{name: "here", work: dir, log: filepath.Join(dir, "log")}
	s := rotation.Script{Name: "count", Quiet: true, Finishes: true, Unit: "kf-test-two-" + filepath.Base(filepath.Dir(dir)), Text: "seq 1 20000; echo end"}
	s.Unit = strings.ToLower(s.Unit)
	sh := func(program string) string {
		out, err := exec.Command("/bin/sh", "-c", program).Output()
		if err != nil {
			t.Errorf("%v after %.80q", err, out)
		}
		return string(out)
	}
	const rounds = 25
	shared := 0
	for range rounds {
		results := make([]string, 2)
		var both sync.WaitGroup
		for _, token := range []string{"a", "b"} { // the second joins the first
			if got := strings.TrimSpace(sh(h.unitPlace(s) + h.unitStart(s, scriptID(s), token))); got != "a" {
				t.Fatalf("%s began or joined %q", token, got)
			}
		}
		for i := range results {
			both.Go(func() {
				place := h.unitPlace(s) + unitOf("a")
				results[i] = sh(place + unitWait)
				sh(place + unitClear)
			})
		}
		both.Wait()
		whole := 0
		for _, r := range results {
			line, out, _ := strings.Cut(r, "\n")
			switch {
			case line == "collected" && out == "":
			case strings.HasPrefix(line, "ended 0 ") && strings.HasPrefix(out, "1\n2\n") && strings.HasSuffix(out, "\n20000\nend\n"):
				whole++
			default:
				t.Fatalf("%q and %d bytes: neither the result nor that it has gone", line, len(out))
			}
		}
		if whole == 0 {
			t.Fatal("nobody has the result")
		}
		if whole == 2 {
			shared++
		}
	}
	t.Logf("both had the result %d times of %d", shared, rounds)
}
