// Package rotation replaces every key, certificate and CA of a running Kubernetes
// cluster while it goes on working.
//
// Idea: a machine holds, in a private folder, a tree of files for each stage: as
// they were, with old and new trusted, with the new in use, with the old gone. The trees
// are made and checked before anything is touched. From then on a step only
// copies files from one tree to where they belong and restarts what reads them
// only at its start; going back is copying from the tree before. What the cluster
// looks like is data ([Layout]), what to do is a plan made from a look at it
// ([MakePlan], pure), and the plan is carried out on a journal.
//
//	prepare   new CAs and keys, sealed in the journal; trees on every machine
//	trust     everybody accepts old and new            proven by a canary on every API server
//	switch    everybody presents the new               proven by what is served
//	soak      until nobody uses the old any more
//	retire    nobody accepts the old                   its first step is the point of no return; proven by refusals
//
// A new CA is certified by the old one too, and what it issues comes with that
// certificate until the old retires: who knows only the old CA accepts it, so
// etcd restarts once and pods not at all. While an API server restarts, the packet
// filter of its machine leads new connections to a neighbour.
//
// Where the certificates have ended already, nothing can overlap: a recovery takes
// the same trees, places the last of them everywhere and starts the control plane
// afresh (recover.go). Windows workers are machines with another dialect (windows.go).
//
// Invariant: new material is made once for a run and stored, sealed, before the
// first machine changes; every step can be done again; at most one master is
// away at a time; nothing is retired that a proof has not shown to be replaced.
//
// Consequence for the operator: after any interruption run the same command
// again; before the point of no return "rollback" brings back what was.
//
// The package knows neither SSH nor a Kubernetes client: see cluster.go.
package rotation

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/journal"
)

// Engine carries out a rotation. Fill it in and call [Engine.Run].
type Engine struct {
	Layout   Layout
	Plan     Plan
	Observed Observation // what the plan was made from
	Hosts    map[string]Host
	Connect  Connect
	Etcd     OpenEtcd
	Kubelet  AskKubelet
	Dial     Dialer // into the cluster's network
	Journal  *journal.Journal
	// Copy returns the journal as it is on disk, for the masters.
	Copy func() ([]byte, error)
	// Seal encrypts to the operator; Open is its reverse.
	Seal func(plain []byte) ([]byte, error)
	Open func(sealed []byte) ([]byte, error)
	// Spool keeps what write writes, sealed, and returns it from the start.
	Spool func(write func(w io.Writer) error) (io.ReadSeekCloser, error)
	// Profile is the certificate profile of the cluster's API model, by entry, and
	// SaveProfile changes entries there; both nil where there is none.
	Profile     map[string][]byte
	SaveProfile func(ctx context.Context, entries map[string][]byte) error
	// Given are entries of a certificate profile with the new CA and certificates, which
	// the operator gives; nil: they are made.
	Given map[string][]byte
	// Who names this runner to others: user and machine.
	Who string
	// TakeOver takes the lock of a runner that is still at work.
	TakeOver bool
	// Force goes on without the proofs that need an API server, while none answers.
	Force bool
	// Soak is how long to wait at most for the old to be unused; zero: the longest
	// lifetime of a token in use, at most an hour.
	Soak time.Duration
	// RestartPods restarts the owners of pods that use the old.
	RestartPods bool
	// UntilSoak stops before the old is retired, always.
	UntilSoak bool
	// Complete retires the old although it is in use.
	Complete bool
	Progress func(journal.Progress)
	Note     func(format string, args ...any) // a line for whoever watches; never a secret
	Now      func() time.Time

	token    string // ours at the fence of every machine
	material *Material
}

// names of values in the journal.
const (
	planValue     = "plan"
	materialValue = "material"
	observedValue = "observed"
	proofsValue   = "proofs"
	renewedValue  = "renewed"       // certificates that were renewed for others, see renew.go
	switchedValue = "switched"      // when the last API server began to sign with the new key
	backValue     = "switched back" // when they began to sign with the old key again, on the way back
)

// Keep stores plan and observation in a new journal.
func Keep(j *journal.Journal, p Plan, o Observation) error {
	return errors.Join(j.Set(observedValue, o), j.Set(planValue, p))
}

// Kept returns what Keep stored; ok is false if the journal has no plan yet.
func Kept(j *journal.Journal) (p Plan, o Observation, ok bool, err error) {
	ok, err = j.Get(planValue, &p)
	if err != nil || !ok {
		return p, o, false, err
	}
	_, err = j.Get(observedValue, &o)
	return p, o, true, err
}

// Made reports whether a run's new material is in its journal.
func Made(j *journal.Journal) (bool, error) {
	var sealed []byte
	return j.Get(materialValue, &sealed)
}

// SoakError says that the old is still in use, or that the run was told to stop
// before it retires.
type SoakError struct{ Users []string }

func (e *SoakError) Error() string {
	if len(e.Users) == 0 {
		return "stopped before the old certificates are retired, as asked"
	}
	return fmt.Sprintf("the old certificates are still in use by %s", strings.Join(e.Users, ", "))
}

// Run does what is left of the plan.
func (e *Engine) Run(ctx context.Context) error {
	if err := e.begin(ctx); err != nil {
		return err
	}
	if err := e.Journal.Run(ctx, e.steps(), journal.Options{Progress: e.Progress}); err != nil {
		return err
	}
	e.release(ctx)
	return nil
}

// Rollback takes back what was done, if there is a way back.
func (e *Engine) Rollback(ctx context.Context) error {
	if err := e.begin(ctx); err != nil {
		return err
	}
	if err := e.Journal.Rollback(ctx, e.steps(), journal.Options{Progress: e.Progress}); err != nil {
		return err
	}
	e.release(ctx)
	return nil
}

// release gives back the locks that begin took, where no step has done so. All is
// done by now: that a machine cannot be reached any more is no failure, or the same
// command would be given again and begin another rotation. Its lock ends by itself.
func (e *Engine) release(ctx context.Context) {
	for _, n := range e.Plan.Nodes {
		if _, err := e.Hosts[n.Name].Run(ctx, Script{Name: "give back the lock", Text: e.on(n.Name).release, Args: []string{e.dirOn(n.Name), e.token}, Quiet: true}); err != nil {
			e.note("the lock of %s could not be given back, and ends by itself: %v", n.Name, err)
		}
	}
}

// begin takes the locks of the machines that are reached, and opens what a former run made.
func (e *Engine) begin(ctx context.Context) error {
	if e.Journal.State().Finished {
		return nil
	}
	e.token = rand.Text()
	for _, n := range e.Plan.Nodes {
		if err := e.lock(ctx, n.Name); err != nil {
			return err
		}
	}
	var sealed []byte
	ok, err := e.Journal.Get(materialValue, &sealed)
	if err != nil || !ok {
		return err
	}
	return e.unseal(sealed)
}

func (e *Engine) unseal(sealed []byte) error {
	plain, err := e.Open(sealed)
	if err != nil {
		return fmt.Errorf("opening the material of the rotation: %w", err)
	}
	e.material = new(Material)
	if err := json.Unmarshal(plain, e.material); err != nil {
		return fmt.Errorf("reading the material of the rotation: %w", err)
	}
	return nil
}

// lock makes us the runner of one machine. The former runner's steps are
// refused there from now on.
func (e *Engine) lock(ctx context.Context, node string) error {
	take := "no"
	if e.TakeOver {
		take = "yes"
	}
	out, err := e.Hosts[node].Run(ctx, Script{Name: "take the lock", Text: e.on(node).lock, Args: []string{e.dirOn(node), e.token, take, e.Who}, Quiet: true})
	if err != nil {
		return fmt.Errorf("taking the lock of %s: %w", node, err)
	}
	if held, who, _ := strings.Cut(strings.TrimSpace(string(out)), " "); held == "held" {
		return fault.New(fault.Conflict, "Locked", "Another runner is at work on %s: %s.", node, who).
			WithFix("wait for it; if it is gone for good, its lock ends 90 s after its last step, or give --take-over")
	}
	return nil
}

// dir is the folder of this rotation on every machine that runs Linux.
func (e *Engine) dir() string { return baseDir + "/" + e.Plan.Run }

// steps turns the plan into steps of the journal.
func (e *Engine) steps() []journal.Step {
	var out []journal.Step
	for _, s := range e.Plan.Steps {
		out = append(out, e.step(s))
	}
	return out
}

// note tells whoever watches.
func (e *Engine) note(format string, args ...any) {
	if e.Note != nil {
		e.Note(format, args...)
	}
}

// change runs a script that changes a machine, behind the fence. The input of one
// that Finishes is the neighbour of the machine.
func (e *Engine) change(ctx context.Context, node string, s Script) ([]byte, error) {
	if s.Finishes {
		s.Args, s.Input = append([]string{e.dirOn(node)}, s.Args...), []byte(e.token+" "+string(s.Input)+"\n")
	} else {
		s.Args = append([]string{e.dirOn(node), e.token}, s.Args...)
	}
	for again := 0; ; again++ {
		var out []byte
		err := effect.Do(s.Name+" on "+node, func() (err error) {
			out, err = e.Hosts[node].Run(ctx, s)
			return err
		})
		taken := errors.Is(err, ErrResultTaken)
		if !taken && !metFence(err) {
			return out, err
		}
		// What we waited for may have been begun by the runner that we replaced: then it
		// met the fence in that one's name, or that one has the result.
		ours := false
		if s.Finishes && again < 2 {
			var failed error
			if ours, failed = e.holds(ctx, node); failed != nil {
				return nil, failed
			}
		}
		if !ours {
			return nil, fault.New(fault.Conflict, "TakenOver", "Another runner has taken over this rotation on %s.", node).WithFix("leave it to that one, or run this command again")
		}
		if taken {
			return nil, err
		}
	}
}

// holds reports whether we are the runner of a machine.
func (e *Engine) holds(ctx context.Context, node string) (bool, error) {
	_, err := e.Hosts[node].Run(ctx, Script{Name: "look at the lock", Text: fence, Args: []string{e.dirOn(node), e.token}, Quiet: true})
	if metFence(err) {
		return false, nil
	}
	return err == nil, err
}

func metFence(err error) bool {
	var failed *ScriptError
	return errors.As(err, &failed) && failed.Status == fencedStatus
}

// Describe writes the plan for people.
func (p Plan) Describe(w io.Writer) {
	fmt.Fprintf(w, "Rotation %s of a %s cluster of %d nodes: %s.\n", p.Run, p.Layout, len(p.Nodes), p.Scope)
	fmt.Fprintf(w, "Expected unavailability of the API: %s.\n", p.Impact)
	for _, text := range p.Warnings {
		fmt.Fprintf(w, "Warning: %s\n", text)
	}
	phase := Phase("")
	for i, s := range p.Steps {
		if s.Phase != phase {
			phase = s.Phase
			fmt.Fprintf(w, "\n%s\n", phase)
		}
		if s.NoReturn {
			fmt.Fprintf(w, "  ---- point of no return: until here \"keyfleet rotate-certs rollback\" brings back what was ----\n")
		}
		fmt.Fprintf(w, "  %3d  %s\n", i+1, strings.TrimPrefix(s.Name(), string(s.Phase)+": "))
	}
}
