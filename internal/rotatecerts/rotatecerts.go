// Package rotatecerts is the command "keyfleet rotate-certs".
//
// Idea: it puts together what a rotation needs (SSH, the Kubernetes API, etcd,
// a journal on this machine) and shows what happens. The rotation itself is
// package rotation.
//
//	DIR/RUN/journal    of each run; the newest that is not finished is gone on with
//
// Invariant: a command that finds an unfinished run goes on with it, and never
// begins another.
//
// Consequence for the operator: whatever happened, the same command again is
// the way on; "status" says where it stands.
package rotatecerts

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/etcdadmin"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/kube"
	"keyfleet.dev/keyfleet/internal/remote"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// ExitSoak is the exit status of a run that stopped because the old is still in use.
const ExitSoak = 11

// Streams are where the command reads and writes.
type Streams struct {
	Out, Err io.Writer
	Env      func(string) string
	// Ask asks a question whose answer is yes or no; nil: there is no terminal.
	Ask func(question string) (bool, error)
	// Passphrase asks for that of an SSH key; nil: there is no terminal.
	Passphrase func(path string) ([]byte, error)
}

// Terminal are the streams of this process.
func Terminal() Streams {
	s := Streams{Out: os.Stdout, Err: os.Stderr, Env: os.Getenv}
	if term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd())) {
		s.Ask = func(question string) (bool, error) {
			fmt.Fprintf(os.Stderr, "%s [y/N] ", question)
			line, err := bufio.NewReader(os.Stdin).ReadString('\n')
			return strings.EqualFold(strings.TrimSpace(line), "y"), err
		}
		s.Passphrase = func(path string) ([]byte, error) {
			fmt.Fprintf(os.Stderr, "Passphrase of %s: ", path)
			defer fmt.Fprintln(os.Stderr)
			return term.ReadPassword(int(os.Stdin.Fd()))
		}
	}
	return s
}

// Main runs the command with its arguments (without "rotate-certs") and returns
// the exit status.
func Main(ctx context.Context, args []string, s Streams) int {
	c := &command{Streams: s}
	root := c.root()
	root.SetArgs(args)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	return c.fail(err)
}

// command is one call of rotate-certs.
type command struct {
	Streams
	o       options
	profile apimodel.Profile // see given
}

func (c *command) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "rotate-certs",
		Short: "Replace every certificate, key and CA of a running Kubernetes cluster",
		Long: `Replace every certificate, key and CA of a running Kubernetes cluster, without
losing a request where there are several control plane nodes. Everything is
reached over SSH through --ssh-host; no server and no cloud is needed.

After an interruption run the same command again. Before the point of no return
"rollback" brings back what was.`,
		Example: `  keyfleet rotate-certs --ssh-host cp1.example.org --linux-ssh-private-key ~/.ssh/id_ed25519 --dry-run
  keyfleet rotate-certs --ssh-host cp1.example.org --linux-ssh-private-key ~/.ssh/id_ed25519`,
		Args: none, SilenceErrors: true, SilenceUsage: true,
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "keyfleet rotate-certs"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.o.dryRun {
				return c.plan(cmd.Context())
			}
			return c.run(cmd.Context())
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage("the command line", "%s", err) })
	c.o.register(root.PersistentFlags())
	verb := func(use, short string, run func(context.Context) error) {
		root.AddCommand(&cobra.Command{Use: use, Short: short, Args: none, RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context()) }})
	}
	verb("plan", "Show what a run would do, and change nothing", c.plan)
	verb("status", "Show how far the last run is", c.status)
	verb("resume", "Go on with an unfinished run", c.resume)
	verb("rollback", "Take back an unfinished run, before its point of no return", c.rollback)
	verb("complete", "Retire the old although it is still in use", c.finish)
	root.AddCommand(c.kubeconfigCommand())
	root.CompletionOptions.DisableDefaultCmd = true
	return root
}

// none refuses arguments.
func none(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("the command line", "unknown command %q", args[0])
	}
	return nil
}

// fail prints an error and returns the exit status.
func (c *command) fail(err error) int {
	var soak *rotation.SoakError
	if errors.As(err, &soak) {
		fmt.Fprintf(c.Err, "Stopped before retiring: %s.\n  Next  run it again when they are gone, with --restart-pods to restart them, or \"complete\" to retire all the same\n", soak)
		return ExitSoak
	}
	var e *fault.Error
	if !errors.As(err, &e) {
		fmt.Fprintf(c.Err, "Error: %v\n  Fix   when the cause is gone, run the same command again: it goes on where it stopped\n", err)
		return 1
	}
	fmt.Fprintf(c.Err, "%s: %s\n", strings.TrimSpace("Error "+e.Code), e.Message)
	if whole := err.Error(); whole != e.Error() {
		fmt.Fprintf(c.Err, "  Where %s\n", strings.SplitN(whole, ": "+e.Message, 2)[0])
	}
	if e.Err != nil {
		fmt.Fprintf(c.Err, "  Why   %v\n", e.Err)
	}
	if e.Fix != "" {
		fmt.Fprintf(c.Err, "  Fix   %s\n", e.Fix)
	}
	if e.Code == "Usage" {
		return 2
	}
	return 1
}

func (c *command) warn(format string, args ...any) { fmt.Fprintf(c.Err, format+"\n", args...) }

// newPlan makes the plan of a run that begins now.
func (c *command) newPlan(ctx context.Context, s *session) (rotation.Plan, rotation.Observation, error) {
	scope, _ := rotation.ParseScope(c.o.only) // checked with the other flags
	o, dead, err := c.look(ctx, s)
	if err != nil {
		return rotation.Plan{}, o, err
	}
	if dead {
		recovery, err := rotation.RecoveryScope(o)
		if err != nil {
			return rotation.Plan{}, o, err
		}
		if len(c.o.only) == 0 {
			scope = rotation.Scope{}
		}
		scope = scope.With(recovery)
	}
	p, err := rotation.MakePlan(o, scope, newRun(time.Now()))
	return p, o, err
}

// newRun names a run: the time, and four random digits.
func newRun(now time.Time) string {
	b := make([]byte, 2)
	rand.Read(b)
	return now.UTC().Format("20060102-150405-") + hex.EncodeToString(b)
}

// plan shows what a run would do.
func (c *command) plan(ctx context.Context) error {
	s, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	if _, j, err := c.unfinished(); err != nil {
		return err
	} else if j != nil {
		p, _, ok, err := rotation.Kept(j)
		if err := errors.Join(err, j.Close()); err != nil {
			return err
		}
		if ok {
			c.warn("A run is unfinished; this is its plan.")
			return c.show(p)
		}
	}
	p, _, err := c.newPlan(ctx, s)
	if err != nil {
		return err
	}
	return c.show(p)
}

// unfinished opens the journal of the newest run that is not finished; nil if there
// is none. One without a plan is removed: its runner died before it had begun anything.
func (c *command) unfinished() (path string, j *journal.Journal, err error) {
	paths, err := filepath.Glob(filepath.Join(c.o.dir, "*", "journal"))
	if err != nil {
		return "", nil, err
	}
	slices.Sort(paths)
	for _, path := range slices.Backward(paths) {
		j, err := journal.Open(path)
		if err != nil {
			return "", nil, err
		}
		_, _, planned, err := rotation.Kept(j)
		if err == nil && planned && !j.State().Finished {
			return path, j, nil
		}
		if err != nil {
			err = fmt.Errorf("reading the plan in %s: %w", path, err)
		}
		if err := errors.Join(err, j.Close()); err != nil {
			return "", nil, err
		}
		if !planned {
			_ = os.Remove(path)
			_ = os.Remove(filepath.Dir(path)) // stays if there is anything else in it
		}
	}
	return "", nil, nil
}

// run begins a rotation, or goes on with one.
func (c *command) run(ctx context.Context) error { return c.drive(ctx, true, (*rotation.Engine).Run) }

func (c *command) resume(ctx context.Context) error {
	return c.drive(ctx, false, (*rotation.Engine).Run)
}

func (c *command) rollback(ctx context.Context) error {
	return c.drive(ctx, false, (*rotation.Engine).Rollback)
}

// finish retires the old although it is in use.
func (c *command) finish(ctx context.Context) error {
	return c.drive(ctx, false, func(e *rotation.Engine, ctx context.Context) error {
		e.Complete = true
		return e.Run(ctx)
	})
}

// drive opens all that a rotation needs and lets it go.
func (c *command) drive(ctx context.Context, begin bool, act func(*rotation.Engine, context.Context) error) error {
	s, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	path, j, err := c.unfinished()
	if err != nil {
		return err
	}
	if j == nil {
		if !begin {
			return c.nothingUnfinished()
		}
		if path, j, err = c.start(ctx, s); err != nil {
			return err
		}
	}
	defer j.Close()
	p, o, ok, err := rotation.Kept(j)
	if err != nil || !ok {
		return errors.Join(err, errors.New("the journal has no plan"))
	}
	if err := s.reach(ctx, p.Nodes); err != nil {
		return err
	}
	e := c.engine(s, p, o, j, path)
	if err := c.model(ctx, s, e); err != nil {
		return err
	}
	fmt.Fprintf(c.lines(), "Rotation %s, journal %s\n", p.Run, path)
	measured, took, err := c.act(ctx, e, act)
	if err != nil {
		return err
	}
	return c.report(ctx, e, measured, took)
}

// act lets the engine go, while people watch.
func (c *command) act(ctx context.Context, e *rotation.Engine, act func(*rotation.Engine, context.Context) error) (Measured, time.Duration, error) {
	began := time.Now()
	var size func() (width, height int)
	if c.o.output == "text" {
		size = sizeOf(c.Out, c.Env)
	}
	w := c.watch(ctx, e.Plan, e.Journal.State(), e.Dial, e.Layout.EtcdPort, size)
	e.Progress = w.progress(e.Progress)
	err := act(e, ctx)
	measured := w.stop()
	if err != nil { // what the run has cost up to here
		measured.Describe(c.lines())
	}
	return measured, time.Since(began), err
}

// lines is where progress is told: beside an answer in JSON it is no part of it.
func (c *command) lines() io.Writer {
	if c.o.output == "json" {
		return c.Err
	}
	return c.Out
}

// start plans a run and makes its journal.
func (c *command) start(ctx context.Context, s *session) (string, *journal.Journal, error) {
	p, o, err := c.newPlan(ctx, s)
	if err != nil {
		return "", nil, err
	}
	if err := c.checkGiven(ctx, s, o); err != nil {
		return "", nil, err
	}
	p.Describe(c.lines())
	fmt.Fprintln(c.lines())
	path := filepath.Join(c.o.dir, p.Run, "journal")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", nil, fmt.Errorf("making the folder of the run: %w", err)
	}
	j, err := journal.Open(path)
	if err != nil {
		return "", nil, err
	}
	return path, j, rotation.Keep(j, p, o)
}

func (c *command) engine(s *session, p rotation.Plan, o rotation.Observation, j *journal.Journal, path string) *rotation.Engine {
	return &rotation.Engine{
		Layout: o.Layout, Plan: p, Observed: o, Hosts: s.hosts, Connect: kube.Connector(s.jump), Etcd: etcdadmin.Opener(s.jump), Kubelet: kube.Kubelets(s.jump), Dial: s.jump,
		Journal: j, Copy: func() ([]byte, error) { return os.ReadFile(path) }, Seal: s.sealer.Seal, Open: s.sealer.Open,
		Spool: func(write func(io.Writer) error) (io.ReadSeekCloser, error) {
			return spool(filepath.Dir(path), s.sealer, write)
		},
		Who: who(path), TakeOver: c.o.takeOver, Soak: c.o.soak, RestartPods: c.o.restartPods, UntilSoak: c.o.until == "soak", Force: c.o.force,
		Progress: c.progress(p), Note: func(format string, args ...any) { fmt.Fprintf(c.lines(), "        "+format+"\n", args...) }, Now: time.Now,
	}
}

// spool writes sealed into a file that has no name any more, and rewinds it.
func spool(dir string, sealer *remote.Sealer, write func(io.Writer) error) (io.ReadSeekCloser, error) {
	f, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, fmt.Errorf("making a file: %w", err)
	}
	err = os.Remove(f.Name())
	if err == nil {
		err = sealInto(f, sealer, write)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func sealInto(f io.Writer, sealer *remote.Sealer, write func(io.Writer) error) error {
	w, err := sealer.Writer(f)
	if err != nil {
		return err
	}
	if err := write(w); err != nil {
		return err
	}
	return w.Close()
}

// who names this runner: the same for the same journal.
func who(path string) string {
	name := "somebody"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return name + "@" + host + " " + path
}

// nothingUnfinished says that there is no run to go on with, and where one may be.
func (c *command) nothingUnfinished() error {
	return fault.New(fault.NotFound, "NothingUnfinished", "No unfinished run is in %s.", c.o.dir).
		WithFix("name the folder with --run-dir; a copy of the journal is on every master in /var/lib/keyfleet/rotate-certs/RUN/journal: put it into DIR/RUN/journal")
}
