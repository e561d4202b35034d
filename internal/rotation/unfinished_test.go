package rotation

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

// TestUnfinishedRotationsAreSeen: whoever has lost a journal begins no other
// rotation, however far the lost one was.
func TestUnfinishedRotationsAreSeen(t *testing.T) {
	m := machineOf{t, filepath.Join(t.TempDir(), "rotate-certs")}
	facts := func() Facts {
		out, status := m.sh(factsScript, m.dir)
		if status != 0 {
			t.Fatalf("status %d", status)
		}
		return parseFacts(out)
	}
	if runs := facts().Runs; len(runs) != 0 {
		t.Errorf("where none has ever been: %v", runs)
	}
	for path, content := range map[string]string{
		"finished/journal": "x", "begun/old/etc/file": "x", "published/old/etc/file": "x", "published/journal": "x", "run/lock": "",
	} {
		if err := os.MkdirAll(filepath.Dir(m.run(path)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(m.run(path), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := facts()
	if !slices.Equal(f.Runs, []string{"published"}) { // what is only begun has changed nothing, and has no journal to go on with
		t.Errorf("unfinished: %v", f.Runs)
	}
	o := threeMasters(t)
	o.Machines[1].Facts.Runs = f.Runs
	_, err := MakePlan(o, Everything(), "run2")
	if e := fault.From(err); err == nil || e.Code != "UnfinishedRotation" || !strings.Contains(e.Fix, "published/journal") {
		t.Errorf("a plan beside it: %v", err)
	}
}
