package rotatecerts

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// keeps makes the journal of a run; change may put something into it.
func keeps(t *testing.T, dir, run string, change func(*journal.Journal) error) {
	t.Helper()
	path := filepath.Join(dir, run, "journal")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		if err := change(j); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestUnfinished: the newest run that has a plan and no end is gone on with; what
// died before it had a plan is forgotten; what cannot be read stops us, for another
// rotation beside it would be wrong.
func TestUnfinished(t *testing.T) {
	plan := func(j *journal.Journal) error {
		return rotation.Keep(j, rotation.Plan{Run: "r"}, rotation.Observation{})
	}
	over := func(j *journal.Journal) error {
		if err := plan(j); err != nil {
			return err
		}
		return j.Run(t.Context(), nil, journal.Options{})
	}
	dir := t.TempDir()
	c := &command{o: options{dir: dir}}
	found := func() string {
		t.Helper()
		path, j, err := c.unfinished()
		if err != nil {
			t.Fatal(err)
		}
		if j == nil {
			return ""
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		return filepath.Base(filepath.Dir(path))
	}
	if got := found(); got != "" {
		t.Errorf("found %q in an empty folder", got)
	}
	keeps(t, dir, "1-open", plan)
	keeps(t, dir, "2-over", over)
	keeps(t, dir, "3-no-plan", nil)
	keeps(t, dir, "4-no-plan", func(j *journal.Journal) error { return j.Set("observed", rotation.Observation{}) })
	if err := os.WriteFile(filepath.Join(dir, "4-no-plan", "spool-1"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := found(); got != "1-open" {
		t.Errorf("found %q", got)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range left {
		left[i], _ = filepath.Rel(dir, left[i])
	}
	if want := []string{"1-open/journal", "2-over/journal", "4-no-plan/spool-1"}; !slices.Equal(left, want) {
		t.Errorf("left are %v, want %v", left, want)
	}
	keeps(t, dir, "5-unreadable", func(j *journal.Journal) error { return j.Set("plan", "of another version") })
	if _, j, err := c.unfinished(); j != nil || err == nil || !strings.Contains(err.Error(), "5-unreadable") {
		t.Errorf("a plan that cannot be read: %v", err)
	}
}
