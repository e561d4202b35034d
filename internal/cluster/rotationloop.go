package cluster

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Job is a cluster whose certificates are rotated.
type Job struct {
	Cluster string // its id in the store: names the folder of its journals
	SSH     SSH
}

// Exit is how a program ended.
type Exit struct {
	Status int    // exit status; -1: it was killed
	Stderr string // its last part
}

// Program is "keyfleet rotate-certs", as a child process of this server. When ctx
// ends the child is told to end, and killed if it does not.
type Program interface {
	// Host names this machine, which keeps the journals.
	Host() string
	// Rotate runs the program; args come before those that say how the cluster is
	// reached. line is given each line that it prints.
	Rotate(ctx context.Context, j Job, args []string, line func(string)) (Exit, error)
	// Renew returns the kubeconfig with what outlives the rotation, after an API
	// server has accepted it.
	Renew(ctx context.Context, j Job, kubeconfig []byte) ([]byte, Exit, error)
	// Finished reports whether a run's journal says that it is finished. It is
	// fault.Conflict while a child that has outlived its server holds it, and
	// fault.NotFound if there is no such journal.
	Finished(j Job, run string) (bool, error)
}

// Rotations does what rotations ask for, one goroutine for each. Run it while this
// server leads. A rotation goes on where it was whenever a server begins to lead: the
// same command again resumes its run.
//
//	rotate --until soak ──> renew the kubeconfig ──> rotate to the end ──> renew it again
//
// The kubeconfig is renewed first while old and new are both accepted: so the manager
// never loses the cluster, and is not itself who keeps the old in use.
type Rotations struct {
	Service *Service
	Program Program
	Limit   time.Duration // longest time for one rotation; zero: twelve hours
	Pause   time.Duration // before a child that was killed is started again; zero: five seconds
	Log     *slog.Logger
}

// attempts is how often a child that was killed is started again.
const attempts = 5

// Describe implements reconcile.Runnable.
func (l Rotations) Describe() string { return "rotations of clusters' certificates" }

// Run implements reconcile.Runnable.
func (l Rotations) Run(ctx context.Context, st *store.Store) error {
	if l.Limit == 0 {
		l.Limit = 12 * time.Hour
	}
	if l.Pause == 0 {
		l.Pause = 5 * time.Second
	}
	g, ctx := errgroup.WithContext(ctx) // whoever runs us begins anew after an error, from what is recorded
	begun := map[string]bool{}          // by UID; each is driven to its recorded end once
	g.Go(func() error {
		return rotations.Follow(ctx, st, "", func(c store.Change[Rotation, RotationStatus]) error {
			if o := c.Object; o != nil && o.Status.State == RotationRunning && !begun[o.UID] {
				begun[o.UID] = true
				d := drive{Rotations: l, st: st, id: o.ID, job: Job{Cluster: o.ID[:strings.LastIndexByte(o.ID, '/')]}}
				g.Go(func() error { return d.run(ctx) }) // ends with the rotation, or with ctx
			}
			return nil
		})
	})
	return g.Wait()
}

// drive is one rotation that is under way.
type drive struct {
	Rotations
	st  *store.Store
	id  string
	job Job
	was *RotationObject // as it was read last
}

// run brings a rotation to its end and records that. An error is that it could not be recorded.
func (d *drive) run(ctx context.Context) error {
	if err := d.record(ctx, func(s *RotationStatus) {}); err != nil {
		return err
	}
	within, cancel := context.WithDeadlineCause(ctx, d.was.Created.Add(d.Limit), errLimit)
	defer cancel()
	p, err := d.advance(within)
	switch {
	case ctx.Err() != nil: // the server ends, or another one leads
		return nil
	case errors.Is(context.Cause(within), errLimit):
		p = &Problem{"RotationTookTooLong", "The rotation was ended after " + d.Limit.String() + ": " + d.was.Status.Step + " was the last that it did.", d.again()}
	case errors.Is(err, store.ErrFenced):
		return err
	case err != nil:
		d.Log.Error("a rotation has failed", "rotation", d.id, "error", err)
		e := fault.From(err)
		p = &Problem{e.Code, e.Message, e.Fix}
		if p.Message == "" { // not foreseen
			p = &Problem{"InternalError", "Something went wrong that was not foreseen; the log of the server has it.", d.again()}
		}
	}
	return d.record(ctx, func(s *RotationStatus) {
		s.State, s.Ended, s.Problem = RotationSucceeded, d.Service.cfg.Now().UTC(), p
		if s.Waiting = ""; p != nil {
			s.State = RotationFailed
		}
	})
}

var errLimit = errors.New("the rotation takes too long")

// again is the command that goes on with the same run.
func (d *drive) again() string {
	return "keyfleet cluster rotate-certs " + clusterName(d.was) + " goes on with it"
}

// advance does what is left to do. A Problem is a rotation that has stopped.
func (d *drive) advance(ctx context.Context) (*Problem, error) {
	ssh, err := sshAccess.Get(d.st.View(ctx), d.job.Cluster)
	if err != nil {
		return nil, err
	}
	d.job.SSH = ssh.Spec
	s := d.was.Status
	if here := d.Program.Host(); s.Run != "" && s.Host != here {
		if _, err := d.Program.Finished(d.job, s.Run); errors.Is(err, fault.NotFound) {
			return &Problem{
				"JournalElsewhere", "The journal of the run " + s.Run + " is on the machine " + s.Host + ", and this server runs on " + here + ".",
				"start the server on " + s.Host + ", or copy its rotations folder here; then " + d.again(),
			}, nil
		}
	}
	o := d.was.Spec.Options
	args := o.args()
	soak, p, err := d.rotate(ctx, append(args, "--until", "soak"), true)
	if p != nil || err != nil {
		return p, err
	}
	if soak {
		if _, err := d.renew(ctx); err != nil { // one that cannot be renewed is tried again at the end
			return nil, err
		}
		if o.Complete {
			args = append([]string{"complete"}, args...)
		}
		if _, p, err = d.rotate(ctx, args, false); p != nil || err != nil {
			return p, err
		}
	}
	return d.renew(ctx)
}

// args are the flags that say the same to rotate-certs.
func (o Options) args() []string {
	var args []string
	if len(o.Only) > 0 {
		args = append(args, "--only="+strings.Join(o.Only, ","))
	}
	if o.Soak > 0 {
		args = append(args, "--soak="+o.Soak.String())
	}
	if o.RestartPods {
		args = append(args, "--restart-pods")
	}
	return args
}

// rotate runs the program until it is done, or, with toSoak, until the old is all that
// is left to retire: that is then true.
func (d *drive) rotate(ctx context.Context, args []string, toSoak bool) (soak bool, p *Problem, err error) {
	exit, err := d.insist(ctx, func() (Exit, error) {
		if over, err := d.finished(ctx); over || err != nil {
			return Exit{}, err
		}
		return d.child(ctx, args)
	})
	if err != nil {
		return false, nil, err
	}
	switch v := judge(exit); {
	case v == done:
		return false, nil, nil
	case v == inSoak && toSoak:
		return true, nil, nil
	}
	return false, d.problem(exit), nil
}

// insist calls a child that was killed again, a few times, and one that finds another
// at work, which outlived its server, until that has ended.
func (d *drive) insist(ctx context.Context, call func() (Exit, error)) (Exit, error) {
	for killed := 0; ; {
		exit, err := call()
		if err != nil || ctx.Err() != nil {
			return exit, errors.Join(err, ctx.Err())
		}
		switch v := judge(exit); {
		case v == wasKilled && killed < attempts:
			killed++
			d.Log.Warn("rotate-certs was killed and is started again", "rotation", d.id, "times", killed)
		case v != busy:
			return exit, nil
		}
		if err := pause(ctx, d.Pause); err != nil {
			return exit, err
		}
	}
}

// finished reports whether the run that this rotation began is finished, so that
// another command would begin the next one. It waits for a child that outlived its server.
func (d *drive) finished(ctx context.Context) (bool, error) {
	for {
		if d.was.Status.Run == "" {
			return false, nil
		}
		over, err := d.Program.Finished(d.job, d.was.Status.Run)
		switch {
		case errors.Is(err, fault.Conflict):
			if err := pause(ctx, d.Pause); err != nil {
				return false, err
			}
		case errors.Is(err, fault.NotFound):
			return false, nil
		default:
			return over, err
		}
	}
}

// child runs the program once, and records its progress beside it: a store that is
// slow for a moment does not hold up the rotation.
func (d *drive) child(ctx context.Context, args []string) (Exit, error) {
	type end struct {
		exit Exit
		err  error
	}
	latest, ended := make(chan Progress, 1), make(chan end, 1)
	first := d.was.Status.Progress
	go func() { // ends with the child
		p := first
		exit, err := d.Program.Rotate(ctx, d.job, args, func(line string) {
			if !p.take(line) {
				return
			}
			select {
			case <-latest: // it was not read yet
			default:
			}
			latest <- p
		})
		ended <- end{exit, err}
	}()
	var failed error
	for {
		select {
		case p := <-latest:
			failed = errors.Join(failed, d.progress(ctx, p))
		case e := <-ended:
			select {
			case p := <-latest:
				failed = errors.Join(failed, d.progress(ctx, p))
			default:
			}
			if ctx.Err() != nil {
				return e.exit, ctx.Err()
			}
			return e.exit, errors.Join(e.err, failed)
		}
	}
}

func (d *drive) progress(ctx context.Context, p Progress) error {
	if ctx.Err() != nil {
		return nil
	}
	return d.record(ctx, func(s *RotationStatus) { s.Progress, s.Host = p, d.Program.Host() })
}

// renew brings the registered kubeconfig up to date. One that cannot be renewed is a
// Problem, and shows.
func (d *drive) renew(ctx context.Context) (*Problem, error) {
	tx := d.st.View(ctx)
	o, err := Clusters.Get(tx, d.job.Cluster)
	if err != nil {
		return nil, err
	}
	l, err := logins.Get(tx, d.job.Cluster)
	if err != nil {
		return nil, err
	}
	name, group := nameAndGroup(o)
	before, err := l.Spec.Kubeconfig.Document(name)
	if err != nil {
		return nil, err
	}
	var after []byte
	exit, err := d.insist(ctx, func() (exit Exit, err error) {
		after, exit, err = d.Program.Renew(ctx, d.job, before)
		return exit, err
	})
	if err != nil {
		return nil, err
	}
	var p *Problem
	if exit.Status != 0 {
		why := d.problem(exit)
		p = &Problem{
			"KubeconfigNotRenewed", "The registered kubeconfig could not be renewed: " + why.Message,
			"keyfleet cluster register " + name + " --group " + group + " --kubeconfig FILE, with one that was made after the rotation",
		}
	} else if !bytes.Equal(before, after) {
		if err := d.takeKubeconfig(ctx, o, l, after); err != nil {
			return nil, err
		}
	}
	return p, d.record(ctx, func(s *RotationStatus) {
		if s.Kubeconfig = "accepted"; p != nil {
			s.Kubeconfig = p.Message
		}
	})
}

// takeKubeconfig stores a renewed kubeconfig, unless another one was registered meanwhile.
func (d *drive) takeKubeconfig(ctx context.Context, o *Object, was *store.Object[login, struct{}], text []byte) error {
	k, err := ParseKubeconfig(text, d.Service.cfg.Now())
	if err != nil {
		return err
	}
	op := access.Op{Action: actionWrite, Resource: o.Spec.ID, Detail: "the kubeconfig was renewed"}
	return d.Service.cfg.Gate.Change(access.AsSystem(ctx, "rotations"), d.st, op, func(tx *store.Tx) error {
		now, err := logins.Get(tx, o.ID)
		if err != nil || now.Generation != was.Generation || now.UID != was.UID {
			return err
		}
		k.Server, k.ServerName, k.Namespace = now.Spec.Kubeconfig.Server, now.Spec.Kubeconfig.ServerName, now.Spec.Kubeconfig.Namespace
		now.Spec.Kubeconfig = k
		return logins.Put(tx, now)
	})
}

// record changes the status. Failures that pass are waited out.
func (d *drive) record(ctx context.Context, change func(*RotationStatus)) error {
	for {
		err := d.st.Update(ctx, func(tx *store.Tx) error {
			o, err := rotations.Get(tx, d.id)
			if err != nil {
				return err
			}
			change(&o.Status)
			d.was = o
			return rotations.PutStatus(tx, o)
		})
		if err == nil || ctx.Err() != nil || errors.Is(err, store.ErrFenced) || errors.Is(err, fault.NotFound) {
			return err
		}
		d.Log.Warn("the state of a rotation could not be recorded", "rotation", d.id, "error", err)
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
