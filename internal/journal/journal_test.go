package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/fault"
)

// world is what steps change: names that are there, and what happened.
type world struct {
	there map[string]bool
	log   []string
	fail  string // "do NAME" or "undo NAME" that fails
}

func newWorld() *world { return &world{there: map[string]bool{}} }

// step is a Step on the world.
func (w *world) step(name string) Step {
	act := func(what string, there bool) func(context.Context) error {
		return func(context.Context) error {
			w.log = append(w.log, what+" "+name)
			if w.fail == what+" "+name {
				return errors.New("told to fail")
			}
			w.there[name] = there
			return nil
		}
	}
	return Step{
		Name: name, Do: act("do", true), Undo: act("undo", false),
		Check: func(context.Context) (bool, error) { return w.there[name], nil },
	}
}

func (w *world) steps(names ...string) []Step {
	var out []Step
	for _, n := range names {
		out = append(out, w.step(n))
	}
	return out
}

func openAt(t testing.TB, path string) *Journal {
	t.Helper()
	j, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	return j
}

func reopen(t testing.TB, j *Journal) *Journal {
	t.Helper()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	return openAt(t, j.path)
}

func TestNext(t *testing.T) {
	steps := newWorld().steps("a", "b", "c")
	status := func(s ...Status) map[string]Status {
		return map[string]Status{"a": s[0], "b": s[1], "c": s[2]}
	}
	for _, tc := range []struct {
		reason string
		state  State
		want   Action
	}{
		{"nothing has happened", State{}, Action{Do, "a"}},
		{"a crash inside a step repeats it", State{Steps: status(Done, Started, "")}, Action{Do, "b"}},
		{"a step between done ones is made up for", State{Steps: status(Done, "", Done)}, Action{Do, "b"}},
		{"all is done", State{Steps: status(Done, Done, Done)}, Action{Verb: Finish}},
		{"all is recorded", State{Steps: status(Done, Done, Done), Finished: true}, Action{}},
		{"back: what was begun is undone first", State{Back: true, Steps: status(Done, Started, "")}, Action{Undo, "b"}},
		{"back: a crash while undoing repeats it", State{Back: true, Steps: status(Done, Undoing, Undone)}, Action{Undo, "b"}},
		{"back: then the one before", State{Back: true, Steps: status(Done, Undone, "")}, Action{Undo, "a"}},
		{"back: all is undone", State{Back: true, Steps: status(Undone, Undone, "")}, Action{Verb: Finish}},
		{"back: nothing was touched", State{Back: true}, Action{Verb: Finish}},
	} {
		if got := Next(steps, tc.state); got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.reason, got, tc.want)
		}
	}
}

func TestRunDoesEachStepOnceAndGoesOnAfterAFailure(t *testing.T) {
	w := newWorld()
	w.there["b"] = true // somebody did this one already
	w.fail = "do c"
	j := openAt(t, filepath.Join(t.TempDir(), "j"))
	steps := w.steps("a", "b", "c", "d")
	if err := j.Run(t.Context(), steps, Options{}); err == nil || err.Error() != `step "c": told to fail` {
		t.Errorf("the first run: %v", err)
	}
	if s := j.State(); s.Failure != "told to fail" || s.Steps["c"] != Started || s.Finished {
		t.Errorf("after a failure: %+v", s)
	}
	j = reopen(t, j)
	w.fail = ""
	var seen []string
	err := j.Run(t.Context(), steps, Options{Progress: func(p Progress) { seen = append(seen, p.Event+" "+p.Step) }})
	if err != nil || !j.State().Finished || j.State().Failure != "" {
		t.Errorf("the second run: %v, %+v", err, j.State())
	}
	if d := cmp.Diff([]string{"do a", "do c", "do c", "do d"}, w.log); d != "" {
		t.Errorf("what happened (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"started c", "done c", "started d", "done d", "finished "}, seen); d != "" {
		t.Errorf("progress of the second run (-want +got):\n%s", d)
	}
	if err := reopen(t, j).Run(t.Context(), steps, Options{}); err != nil || len(w.log) != 4 {
		t.Errorf("running a finished change: %v, %v", err, w.log)
	}
}

func TestEffectThatIsNotThereIsAFailure(t *testing.T) {
	w := newWorld()
	s := w.step("a")
	s.Do = func(context.Context) error { return nil }
	j := openAt(t, filepath.Join(t.TempDir(), "j"))
	if err := j.Run(t.Context(), []Step{s}, Options{}); err == nil || !strings.Contains(err.Error(), "its effect is not there") {
		t.Errorf("a step without effect: %v", err)
	}
}

func TestRollbackUndoesInReverse(t *testing.T) {
	w := newWorld()
	w.fail = "do c"
	j := openAt(t, filepath.Join(t.TempDir(), "j"))
	steps := w.steps("a", "b", "c", "d")
	steps[1].Undo = nil // nothing to take back
	_ = j.Run(t.Context(), steps, Options{})
	w.fail = "undo a"
	if err := j.Rollback(t.Context(), steps, Options{}); err == nil {
		t.Error("the rollback hides a failure")
	}
	w.fail, w.log = "", nil
	if err := reopen(t, j).Run(t.Context(), steps, Options{}); err != nil { // Run goes on with the rollback
		t.Error(err)
	}
	if d := cmp.Diff([]string{"undo a"}, w.log); d != "" {
		t.Errorf("what the second try did (-want +got):\n%s", d)
	}
	if w.there["a"] || !w.there["b"] || w.there["c"] {
		t.Errorf("afterwards there is %v", w.there)
	}
}

func TestNoWayBack(t *testing.T) {
	for _, tc := range []struct {
		reason string
		fail   string
		want   bool // rollback allowed
	}{
		{"before the step", "do a", true},
		{"in the step", "do b", false},
		{"after the step", "do c", false},
		{"when all is done", "", false},
	} {
		w := newWorld()
		w.fail = tc.fail
		j := openAt(t, filepath.Join(t.TempDir(), "j"))
		steps := w.steps("a", "b", "c")
		steps[1].NoReturn = true
		_ = j.Run(t.Context(), steps, Options{})
		err := j.Rollback(t.Context(), steps, Options{})
		if tc.want && err != nil || !tc.want && (!errors.Is(err, fault.Conflict) || fault.From(err).Fix == "") {
			t.Errorf("%s: %v, expected a way back: %t", tc.reason, err, tc.want)
		}
	}
}

func TestRecheckDoesAgainWhatIsGone(t *testing.T) {
	w := newWorld()
	j := openAt(t, filepath.Join(t.TempDir(), "j"))
	steps := w.steps("a", "b", "c")
	if err := j.Run(t.Context(), steps, Options{}); err != nil {
		t.Fatal(err)
	}
	w.there["b"], w.log = false, nil
	if err := j.Run(t.Context(), steps, Options{}); err != nil || len(w.log) != 0 {
		t.Errorf("without Recheck: %v, %v", w.log, err)
	}
	if err := j.Run(t.Context(), steps, Options{Recheck: true}); err != nil || !slices.Equal(w.log, []string{"do b"}) || !j.State().Finished {
		t.Errorf("with Recheck: %v, %v", w.log, err)
	}
}

func TestJournalOfAnotherChangeIsRefused(t *testing.T) {
	w := newWorld()
	j := openAt(t, filepath.Join(t.TempDir(), "j"))
	if err := j.Run(t.Context(), w.steps("a", "b"), Options{}); err != nil {
		t.Fatal(err)
	}
	if err := j.Run(t.Context(), w.steps("a", "x"), Options{}); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), `"b"`) {
		t.Errorf("another list: %v", err)
	}
	for _, bad := range [][]Step{w.steps("a", "b", "b"), w.steps("a", "b", ""), {{Name: "a"}}} {
		if err := j.Run(t.Context(), bad, Options{}); err == nil {
			t.Errorf("a list that is none was run: %+v", bad)
		}
	}
}

func TestValuesOutliveTheProcess(t *testing.T) {
	j := openAt(t, filepath.Join(t.TempDir(), "j"))
	for _, v := range []int{1, 2} {
		if err := j.Set("serial", v); err != nil {
			t.Fatal(err)
		}
	}
	j = reopen(t, j)
	var n int
	if ok, err := j.Get("serial", &n); !ok || err != nil || n != 2 {
		t.Errorf("serial is %d, %t, %v", n, ok, err)
	}
	if ok, err := j.Get("none", &n); ok || err != nil {
		t.Errorf("a value that was not set: %t, %v", ok, err)
	}
	if ok, err := j.Get("serial", new(string)); ok || err == nil {
		t.Error("decoded a number into a string")
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	w := newWorld()
	steps := w.steps("a", "b")
	j := openAt(t, path)
	if _, err := Open(path); !errors.Is(err, fault.Conflict) {
		t.Errorf("opened twice: %v", err)
	}
	if err := j.Run(t.Context(), steps, Options{}); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(whole), "\n")
	last := strings.LastIndex(strings.TrimSuffix(string(whole), "\n"), "\n") + 1
	for _, tc := range []struct {
		reason  string
		content string
		kept    int // lines; -1: refused
	}{
		{"untouched", string(whole), 5},
		{"empty", "", 0},
		{"a last line without its end", string(whole[:len(whole)-1]), 4},
		{"a last line that is half there", string(whole[:last+40]), 4},
		{"a last line of zeros", string(whole[:last]) + strings.Repeat("\x00", 100), 4},
		{"a last line with a hole of zeros", string(whole[:last+10]) + strings.Repeat("\x00", 20) + string(whole[last+30:]), 4},
		{"a line changed", strings.Replace(string(whole), `"step":"a"`, `"step":"A"`, 1), -1},
		{"the last line changed", strings.Replace(string(whole), `"finished"`, `"finishet"`, 1), -1},
		{"a line left out", strings.Join(slices.Delete(slices.Clone(lines), 1, 2), ""), -1},
		{"two lines exchanged", lines[1] + lines[0] + strings.Join(lines[2:], ""), -1},
		{"a line twice", lines[0] + string(whole), -1},
		{"a hash changed", otherDigit(whole[0]) + string(whole[1:]), -1},
		{"something else", "hello\n", -1},
	} {
		if err := os.WriteFile(path, []byte(tc.content), 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := Open(path)
		if tc.kept < 0 {
			if !errors.Is(err, fault.Invalid) {
				t.Errorf("%s: %v, expected fault.Invalid", tc.reason, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tc.reason, err)
			continue
		}
		if err := j.Run(t.Context(), steps, Options{}); err != nil || !j.State().Finished {
			t.Errorf("%s: going on: %v, %+v", tc.reason, err, j.State())
		}
		_ = j.Close()
		if again, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(again), strings.Join(lines[:tc.kept], "")) {
			t.Errorf("%s: kept lines were changed: %v", tc.reason, err)
		}
	}
}

// otherDigit is a hexadecimal digit that is not this one.
func otherDigit(digit byte) string {
	if digit == '0' {
		return "1"
	}
	return "0"
}

// TestAnyFailuresConverge runs a change under random failures and processes that
// come and go, forward or back, and looks at the world in the end.
func TestAnyFailuresConverge(t *testing.T) {
	dir := t.TempDir()
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		path := filepath.Join(dir, fmt.Sprint(run))
		w := newWorld()
		names := []string{"a", "b", "c", "d"}[:rapid.IntRange(1, 4).Draw(t, "steps")]
		steps := w.steps(names...)
		back := false
		for range rapid.IntRange(0, 6).Draw(t, "runs") {
			w.fail = rapid.SampledFrom([]string{"do ", "undo "}).Draw(t, "what") + rapid.SampledFrom(names).Draw(t, "where")
			j, err := Open(path)
			if err != nil {
				t.Fatal(err)
			}
			if rapid.IntRange(0, 4).Draw(t, "turn back") == 0 && !j.State().Finished {
				back = true
				_ = j.Rollback(context.Background(), steps, Options{})
			} else {
				_ = j.Run(context.Background(), steps, Options{})
			}
			_ = j.Close()
		}
		w.fail = ""
		j, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		if err := j.Run(context.Background(), steps, Options{}); err != nil || !j.State().Finished {
			t.Fatalf("the last run: %v, %+v", err, j.State())
		}
		for _, n := range names {
			if w.there[n] == back {
				t.Fatalf("back: %t, and there is %v after %v", back, w.there, w.log)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	path := filepath.Join(f.TempDir(), "j")
	w := newWorld()
	w.fail = "do b"
	j, err := Open(path)
	if err != nil {
		f.Fatal(err)
	}
	_ = j.Set("serial", 7)
	_ = j.Run(context.Background(), w.steps("a", "b"), Options{})
	_ = j.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:len(whole)-5])
	f.Add([]byte("x y\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		records, last, kept, err := parse(content)
		if err != nil {
			return
		}
		if kept < 0 || kept > len(content) || (kept == 0) != (len(records) == 0) || (len(records) == 0) != (last == "") {
			t.Errorf("%d records in %d bytes of %d, hash %q", len(records), kept, len(content), last)
		}
		again, sameLast, sameKept, err := parse(content[:kept])
		if err != nil || len(again) != len(records) || sameLast != last || sameKept != kept {
			t.Errorf("what was kept reads otherwise: %v", err)
		}
	})
}

// TestReplay: lines that are kept elsewhere carry a change through any crash, and
// are refused when one was changed.
func TestReplay(t *testing.T) {
	var lines []string
	var keep func(string) error
	done := map[string]int{}
	steps := []Step{
		{Name: "one", Do: func(context.Context) error { done["one"]++; return nil }},
		{Name: "two", Do: func(context.Context) error { done["two"]++; return nil }},
	}
	for died := 0; died < 10; died++ {
		written := 0
		keep = func(line string) error {
			if written == 2 { // of a life: begin a step and end it
				return errors.New("the store is away")
			}
			written++
			lines = append(lines, line)
			return nil
		}
		j, err := Replay("x", lines, func(line string) error { return keep(line) })
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Run(t.Context(), steps, Options{}); err == nil {
			if !j.State().Finished || died < 2 || done["two"] == 0 {
				t.Errorf("finished after %d deaths: %+v, %v", died, j.State(), done)
			}
			break
		}
	}
	lines[1] = strings.Replace(lines[1], "one", "two", 1)
	if _, err := Replay("x", lines, keep); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a changed line: %v", err)
	}
}
