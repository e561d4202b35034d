// Package journal carries a long change through crashes: steps that are checked,
// done, and undone, with a durable record of how far it is.
//
// Idea: a change is a list of [Step]. Before a step touches anything the journal
// says so on disk, afterwards it says that it is done, and that is all that has
// to be remembered: what to do next is a pure function of list and record
// ([Next]). Resuming after a crash, trying again after a failure and rolling back
// are the same loop.
//
//	HASH {"at":"…","event":"started","step":"trust the new CA"}
//	HASH {"at":"…","event":"done","step":"trust the new CA"}
//
// HASH is the SHA-256 of the line before it and of the rest of its own line. Each
// line is durable before the next thing happens: synced in a file ([Open]), or
// kept by whoever replays it ([Replay]).
//
// Invariant: a step that touched anything is recorded as started. A journal whose
// chain of hashes is broken is refused; a last line that a crash left unfinished
// is dropped, for nothing has happened after it. Whole lines cut off from the end
// are not noticed.
//
// Consequence for the operator: after any interruption run the same command
// again; before the point of no return it can be rolled back, and after it the
// refusal says which step it was.
package journal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Step is one part of a change. All its functions may be called again after a
// crash at any point inside them, and must end in the same state.
type Step struct {
	Name string // unique in the list, and the same in every run
	// Check reports whether the step's effect is there, by looking at the world; or
	// that a later step has replaced it. nil: only the record tells.
	Check func(ctx context.Context) (bool, error)
	// Do brings the effect about. It is not called if Check says that it is there.
	Do func(ctx context.Context) error
	// Undo takes the effect back, also if Do got only half way. nil: there is
	// nothing to take back.
	Undo func(ctx context.Context) error
	// NoReturn says that once this step has started there is no way back.
	NoReturn bool
}

// Progress is one thing that happened in a run.
type Progress struct {
	Event string // "started", "done", "failed", "undoing", "undone", "finished"
	Step  string // empty for "finished"
	Err   error  // for "failed"
}

// Options of a run. The zero value is usable.
type Options struct {
	// Recheck looks again at steps that are recorded as done, and does those
	// again whose Check says that their effect is gone.
	Recheck  bool
	Progress func(Progress) // called as things happen; nil: nobody watches
}

// Run does what is left to do: forward, or back if a rollback was begun. It
// stops at the first error, which is recorded; calling Run again goes on there.
func (j *Journal) Run(ctx context.Context, steps []Step, o Options) error {
	if err := j.fits(steps); err != nil {
		return err
	}
	if o.Recheck && !j.state.Back {
		if err := j.recheck(ctx, steps); err != nil {
			return err
		}
	}
	for {
		a := Next(steps, j.state)
		if a.Verb == Nothing {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := j.act(ctx, a, steps, o); err != nil {
			return err
		}
	}
}

// Rollback turns a change back and runs it. It is refused with fault.Conflict
// after a step that has no way back, or when the change is finished.
func (j *Journal) Rollback(ctx context.Context, steps []Step, o Options) error {
	if err := j.fits(steps); err != nil {
		return err
	}
	if !j.state.Back {
		if err := mayTurnBack(steps, j.state); err != nil {
			return err
		}
		if err := j.append(Record{Event: "turned back"}); err != nil {
			return err
		}
	}
	return j.Run(ctx, steps, o)
}

func mayTurnBack(steps []Step, s State) error {
	if s.Finished {
		return fault.New(fault.Conflict, "", "The change is finished; there is nothing to roll back.").
			WithFix("start a new change that leads where you want to go")
	}
	for _, st := range steps {
		if st.NoReturn && s.Steps[st.Name] != "" && s.Steps[st.Name] != Undone {
			return fault.New(fault.Conflict, "", "Step %q has begun, and after it there is no way back.", st.Name).
				WithFix("run the change again to finish it")
		}
	}
	return nil
}

// fits makes sure that the record belongs to this list.
func (j *Journal) fits(steps []Step) error {
	seen := map[string]bool{}
	for _, st := range steps {
		if st.Name == "" || st.Do == nil || seen[st.Name] {
			return fmt.Errorf("journal: step %q has no name of its own, or nothing to do", st.Name)
		}
		seen[st.Name] = true
	}
	for name, status := range j.state.Steps {
		if status != Undone && !seen[name] {
			return fault.New(fault.Conflict, "", "The journal %s is of another change: it has a step %q, which this one does not.", j.path, name).
				WithFix("go on with the version and the settings that began it")
		}
	}
	return nil
}

// act performs one action and records it.
func (j *Journal) act(ctx context.Context, a Action, steps []Step, o Options) error {
	tell := func(p Progress) {
		if o.Progress != nil {
			o.Progress(p)
		}
	}
	if a.Verb == Finish {
		if err := j.append(Record{Event: "finished"}); err != nil {
			return err
		}
		tell(Progress{Event: "finished"})
		return nil
	}
	st := steps[slices.IndexFunc(steps, func(s Step) bool { return s.Name == a.Step })]
	begun, ended, work := Started, Done, st.do
	if a.Verb == Undo {
		begun, ended, work = Undoing, Undone, st.undo
	}
	if err := j.append(Record{Event: string(begun), Step: st.Name}); err != nil {
		return err
	}
	tell(Progress{Event: string(begun), Step: st.Name})
	if err := work(ctx); err != nil {
		tell(Progress{Event: "failed", Step: st.Name, Err: err})
		failed := j.append(Record{Event: "failed", Step: st.Name, Text: err.Error()})
		return errors.Join(fmt.Errorf("step %q: %w", st.Name, err), failed)
	}
	if err := j.append(Record{Event: string(ended), Step: st.Name}); err != nil {
		return err
	}
	tell(Progress{Event: string(ended), Step: st.Name})
	return nil
}

// do makes the step's effect be there, and looks that it is.
func (s Step) do(ctx context.Context) error {
	there, err := s.check(ctx)
	if there || err != nil {
		return err
	}
	if err := s.Do(ctx); err != nil {
		return err
	}
	if s.Check == nil {
		return nil
	}
	if there, err = s.check(ctx); err == nil && !there {
		err = errors.New("it was done, but its effect is not there")
	}
	return err
}

func (s Step) check(ctx context.Context) (bool, error) {
	if s.Check == nil {
		return false, nil
	}
	there, err := s.Check(ctx)
	if err != nil {
		return false, fmt.Errorf("checking: %w", err)
	}
	return there, nil
}

func (s Step) undo(ctx context.Context) error {
	if s.Undo == nil {
		return nil
	}
	return s.Undo(ctx)
}

// recheck reopens steps that are recorded as done and are not.
func (j *Journal) recheck(ctx context.Context, steps []Step) error {
	for _, st := range steps {
		if j.state.Steps[st.Name] != Done || st.Check == nil {
			continue
		}
		there, err := st.check(ctx)
		if err != nil {
			return fmt.Errorf("step %q: %w", st.Name, err)
		}
		if !there {
			if err := j.append(Record{Event: "reopened", Step: st.Name}); err != nil {
				return err
			}
		}
	}
	return nil
}

// Status is how far a step is. The empty Status means that nothing was touched.
type Status string

// The statuses.
const (
	Started Status = "started" // may be done in part
	Done    Status = "done"
	Undoing Status = "undoing" // may be taken back in part
	Undone  Status = "undone"
)

// State is what a journal's records come to.
type State struct {
	Steps    map[string]Status
	Back     bool // a rollback was begun
	Finished bool // all is done, or all is undone
	Failure  string
	Began    time.Time // zero: nothing has happened yet
	Changed  time.Time
}

// apply adds one record to the state.
func (s *State) apply(r Record) {
	if s.Began.IsZero() {
		s.Began = r.At
	}
	s.Changed = r.At
	if r.Event != "failed" {
		s.Failure = ""
	}
	switch r.Event {
	case string(Started), string(Done), string(Undoing), string(Undone):
		s.Steps[r.Step] = Status(r.Event)
	case "reopened":
		s.Steps[r.Step], s.Finished = Started, false
	case "failed":
		s.Failure = r.Text
	case "turned back":
		s.Back = true
	case "finished":
		s.Finished = true
	}
}

// Verb is what to do.
type Verb int

// The verbs.
const (
	Nothing Verb = iota // the change is finished
	Do
	Undo
	Finish // all is done or undone: record it
)

// Action is what comes next, and at which step.
type Action struct {
	Verb Verb
	Step string
}

// Next decides what comes next: forward, the first step that is not done; back,
// the last one that was touched and is not undone.
func Next(steps []Step, s State) Action {
	if s.Finished {
		return Action{}
	}
	if !s.Back {
		for _, st := range steps {
			if s.Steps[st.Name] != Done {
				return Action{Do, st.Name}
			}
		}
		return Action{Verb: Finish}
	}
	for _, st := range slices.Backward(steps) {
		if status := s.Steps[st.Name]; status != "" && status != Undone {
			return Action{Undo, st.Name}
		}
	}
	return Action{Verb: Finish}
}
