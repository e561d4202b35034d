package rotatecerts

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"time"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// show prints a plan.
func (c *command) show(p rotation.Plan) error {
	if c.o.output == "json" {
		return c.json(p)
	}
	p.Describe(c.Out)
	return nil
}

func (c *command) json(v any) error {
	enc := json.NewEncoder(c.Out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// progress prints a line for each step that ends.
func (c *command) progress(p rotation.Plan) func(journal.Progress) {
	number := map[string]int{}
	for i, s := range p.Steps {
		number[s.Name()] = i + 1
	}
	began, step := time.Now(), time.Now()
	noReturn := p.NoReturn()
	return func(ev journal.Progress) {
		switch ev.Event {
		case "started", "undoing":
			step = time.Now()
			if ev.Event == "started" && ev.Step == noReturn {
				fmt.Fprintln(c.lines(), "        ---- point of no return ----")
			}
			return
		case "finished":
			return
		}
		fmt.Fprintf(c.lines(), "%6.1fs %3d/%d  %-6s %s (%.1fs)\n", time.Since(began).Seconds(), number[ev.Step], len(p.Steps), ev.Event, ev.Step, time.Since(step).Seconds())
	}
}

// Status is how far a run is.
type Status struct {
	Run      string `json:"run"`
	Journal  string `json:"journal"`
	Done     int    `json:"done"`
	Steps    int    `json:"steps"`
	Next     string `json:"next,omitempty"`
	Back     bool   `json:"rollingBack"`
	Failure  string `json:"failure,omitempty"`
	NoReturn string `json:"noReturn"`
	Passed   bool   `json:"noReturnPassed"`
}

// status shows how far the unfinished run is. It needs no connection.
func (c *command) status(context.Context) error {
	if err := c.o.complete(c.Env, func(string, ...any) {}); err != nil {
		return err
	}
	path, j, err := c.unfinished()
	if err != nil {
		return err
	}
	if j == nil {
		return c.nothingUnfinished()
	}
	defer j.Close()
	p, _, _, err := rotation.Kept(j)
	if err != nil {
		return err
	}
	state := j.State()
	s := Status{Run: p.Run, Journal: path, Steps: len(p.Steps), Back: state.Back, Failure: state.Failure, NoReturn: p.NoReturn()}
	for _, step := range p.Steps {
		switch {
		case state.Steps[step.Name()] == journal.Done:
			s.Done++
		case s.Next == "":
			s.Next = step.Name()
		}
	}
	s.Passed = state.Steps[s.NoReturn] != ""
	if c.o.output == "json" {
		return c.json(s)
	}
	fmt.Fprintf(c.Out, "Run       %s\nJournal   %s\nSteps     %d of %d done\nNext      %s\n", s.Run, s.Journal, s.Done, s.Steps, s.Next)
	if s.Failure != "" {
		fmt.Fprintf(c.Out, "Failure   %s\n", s.Failure)
	}
	way := "rollback is possible until: " + s.NoReturn
	if s.Passed {
		way = "the point of no return is passed"
	}
	fmt.Fprintf(c.Out, "Way back  %s\n", way)
	return nil
}

// Report is what is printed at the end of a run.
type Report struct {
	Run      string            `json:"run"`
	Seconds  float64           `json:"seconds"` // of this call
	Finished bool              `json:"finished"`
	Back     bool              `json:"rolledBack"`
	Steps    int               `json:"steps"`
	Measured Measured          `json:"measured"` // while this call ran
	Changes  []rotation.Change `json:"certificates"`
	Refused  []string          `json:"refused"` // what was proven
	Hash     string            `json:"journalHash"`
}

// report prints what was done. The machines are looked at once more: it tells what
// is there, not what should be.
func (c *command) report(ctx context.Context, e *rotation.Engine, measured Measured, took time.Duration) error {
	state := e.Journal.State()
	r := Report{Run: e.Plan.Run, Seconds: took.Seconds(), Finished: state.Finished, Back: state.Back, Steps: len(e.Plan.Steps), Measured: measured, Hash: e.Journal.Hash()}
	after, err := rotation.Observe(ctx, e.Layout, e.Plan.Nodes, e.Hosts, time.Now())
	if err == nil {
		r.Changes, err = rotation.Compare(e.Observed, after)
	}
	if err != nil {
		c.warn("The rotation is done; what is on the machines now could not be looked at: %v.", err)
	}
	if !r.Back {
		if r.Refused, err = e.Proofs(); err != nil {
			return err
		}
	}
	if c.o.output == "json" {
		return c.json(r)
	}
	r.describe(c.Out, "rotated: "+e.Plan.Scope.String(), took)
	return nil
}

// describe writes the report for people.
func (r Report) describe(w io.Writer, what string, took time.Duration) {
	if r.Back {
		what = "rolled back"
	}
	fmt.Fprintf(w, "\nDone in %s, %s.\n\n", took.Round(time.Second), what)
	r.Measured.Describe(w)
	if len(r.Changes) > 0 {
		fmt.Fprintf(w, "\nCertificates: serial before, serial now, end\n")
	}
	for _, ch := range r.Changes {
		if ch.Same() && r.Back {
			continue
		}
		fmt.Fprintf(w, "  %-12s %-36s %-18s %-18s %s\n", ch.Node, path.Base(path.Dir(ch.File))+"/"+path.Base(ch.File), brief(ch.Before), brief(ch.After), end(ch.After))
	}
	if len(r.Refused) > 0 {
		fmt.Fprintf(w, "\nProven:\n")
	}
	for _, text := range r.Refused {
		fmt.Fprintf(w, "  %s\n", text)
	}
	fmt.Fprintf(w, "\nJournal hash %s\n", r.Hash)
}

// brief is the beginning of a serial number, which is enough to tell two apart.
func brief(c *rotation.Certificate) string {
	if c == nil {
		return "-"
	}
	if len(c.Serial) > 16 {
		return c.Serial[:16]
	}
	return c.Serial
}

func end(c *rotation.Certificate) string {
	if c == nil {
		return ""
	}
	return c.NotAfter.UTC().Format(time.DateOnly)
}
