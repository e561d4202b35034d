package rotation

import (
	"context"
	"io"
	"io/fs"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

// refusing is a machine on which a script was begun by a runner that was replaced: who
// waits for it is told of the fence as often as refusals says, and then, if taken, that
// the other has the result. ours says whose the lock is.
type refusing struct {
	refusals    int
	taken, ours bool
	runs        *int
}

func (refusing) Name() string { return "master-0" }

func (refusing) Put(context.Context, string, io.Reader, fs.FileMode) error { return nil }

func (f refusing) Run(_ context.Context, s Script) ([]byte, error) {
	if s.Text == fence {
		if f.ours {
			return nil, nil
		}
		return nil, &ScriptError{Status: fencedStatus}
	}
	if *f.runs++; *f.runs <= f.refusals {
		return nil, &ScriptError{Status: fencedStatus}
	}
	if f.taken {
		return nil, fault.New(fault.Conflict, "Taken", "Somebody else has the result.").Because(ErrResultTaken)
	}
	return []byte("done"), nil
}

// TestFenceOfAnotherRunnerIsNotOurs: two runners may wait for one script. That the one
// which began it was replaced says nothing about the other.
func TestFenceOfAnotherRunnerIsNotOurs(t *testing.T) {
	for _, tc := range []struct {
		reason   string
		refusals int
		taken    bool
		ours     bool
		finishes bool
		runs     int
		code     string
	}{
		{"begun by the runner that we replaced", 1, false, true, true, 2, ""},
		{"we were replaced", 9, false, false, true, 1, "TakenOver"},
		{"again and again", 9, false, true, true, 3, "TakenOver"},
		{"a script that nobody else waits for", 1, false, true, false, 1, "TakenOver"},
		{"we were replaced, and the other has the result", 0, true, false, true, 1, "TakenOver"},
		{"the runner that we replaced has the result", 0, true, true, true, 1, "Taken"},
	} {
		runs := 0
		e := &Engine{Layout: Kubeadm(), Hosts: map[string]Host{"master-0": refusing{tc.refusals, tc.taken, tc.ours, &runs}}}
		_, err := e.change(t.Context(), "master-0", Script{Name: "x", Text: "y", Finishes: tc.finishes})
		code := ""
		if err != nil {
			code = fault.From(err).Code
		}
		if code != tc.code || runs != tc.runs {
			t.Errorf("%s: %q after %d runs, want %q after %d", tc.reason, code, runs, tc.code, tc.runs)
		}
	}
}
