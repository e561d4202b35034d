package keyvaultext

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/fault"
)

// maxFetches bounds the fetches at one time.
const maxFetches = 8

// Service is the long-running part of the extension.
type Service struct {
	Settings   extension.KeyVaultSettings
	StatusFile string       // absolute path of N.status
	State      string       // folder of the service's own notes, which must exist
	Package    string       // NAME-VERSION of the installed package, for the log
	HintSocket string       // empty: polling only
	Timing     Timing       // usually DefaultTiming
	Log        *slog.Logger // required
	Ready      func()       // called once when polling has started and the first status is written; may be nil
}

// running is a Service at work. Its fields belong to the goroutine of Run.
type running struct {
	Service
	interval time.Duration
	vault    *vaultClient
	hints    *hintLine
	state    *os.Root
	status   *os.Root

	all      []progress
	stores   []*certificateStore // nil: not opened yet, or failed
	seen     []stored            // last delivery
	fetching []bool
	flying   int

	results  chan result
	hookDone chan hookNote
	queue    []hookJob // hooks to run, one at a time, in order of the switches
	hooking  bool

	written report
	since   time.Time // when written.status began
	work    sync.WaitGroup
}

type result struct {
	index  int
	got    fetched
	err    error
	byHint bool
}

type hookJob struct {
	index int
	note  hookNote
}

// Run delivers certificates until ctx ends. It returns an error only if it
// could not begin: failures with certificates are retried and reported.
func (s Service) Run(ctx context.Context) error {
	r, err := s.begin()
	if err != nil {
		return err
	}
	defer r.end()
	ctx, cancel := context.WithCancel(ctx)
	r.work.Go(func() { r.hints.run(ctx) })
	defer r.work.Wait()
	defer cancel()

	r.findLostHooks(ctx)
	r.writeStatus()
	if s.Ready != nil {
		s.Ready()
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(r.startDue(ctx, time.Now()))
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case res := <-r.results:
			r.finish(ctx, res)
		case note := <-r.hookDone:
			r.endHook(ctx, note)
		case value := <-r.hints.hints:
			r.Log.Info("hint received, fetching at once", "hint", value)
			for i := range r.all {
				r.all[i].hinted = true
			}
		}
	}
}

func (s Service) begin() (*running, error) {
	state, err := os.OpenRoot(s.State)
	if err != nil {
		return nil, fmt.Errorf("opening state folder: %w", err)
	}
	status, err := os.OpenRoot(filepath.Dir(s.StatusFile))
	if err != nil {
		state.Close()
		return nil, fmt.Errorf("opening status folder: %w", err)
	}
	n := len(s.Settings.Certificates)
	r := &running{
		Service: s, interval: pollingInterval(s.Settings, s.Timing), vault: newVaultClient(s.Settings, s.Timing),
		hints: newHintLine(s.HintSocket, s.Timing.HintRetry), state: state, status: status,
		all: make([]progress, n), stores: make([]*certificateStore, n), seen: make([]stored, n), fetching: make([]bool, n),
		results: make(chan result, n), hookDone: make(chan hookNote, 1), since: time.Now(),
	}
	if err := removeLeftovers(state); err != nil {
		s.Log.Warn("cleaning the state folder", "problem", err)
	}
	for i, c := range s.Settings.Certificates {
		if c.Version != "" {
			s.Log.Warn("the URL names a version, so this certificate is never renewed", "secret", c.URL, "fix", "leave the version out of the URL")
		}
		if len(c.ACLs) > 0 && !s.Settings.ACLEnabled {
			s.Log.Warn("acls are not applied, because aclEnabled is not true", "secret", c.URL)
		}
		if parent := blockedParent(c.Directory()); parent != "" && s.Settings.ACLEnabled && len(c.ACLs) > 0 {
			s.Log.Warn("the readers in acls cannot pass through a folder above the certificates", "folder", parent, "secret", c.URL)
		}
		if c.ReloadHook != nil {
			note := readHookNote(state, filepath.Join(c.Directory(), c.LinkName()))
			r.all[i].hook = &note
		}
	}
	s.Log.Info("polling started", "package", s.Package, "certificates", n, "pollingInterval", r.interval, "requireInitialSync", s.Settings.RequireInitialSync)
	return r, nil
}

func (r *running) end() {
	for _, s := range r.stores {
		if s != nil {
			s.close()
		}
	}
	r.state.Close()
	r.status.Close()
	r.Log.Info("service stopped")
}

// startDue starts the fetches that are due and returns how long to wait for the next.
func (r *running) startDue(ctx context.Context, now time.Time) time.Duration {
	wait := r.interval
	for i := range r.all {
		p := &r.all[i]
		switch {
		case r.fetching[i]:
			continue
		case p.hinted || !p.next.After(now):
			if r.flying >= maxFetches {
				continue // a result comes and brings us here again
			}
			byHint := p.hinted && p.next.After(now)
			p.hinted, r.fetching[i] = false, true
			r.flying++
			r.work.Go(func() {
				got, err := r.vault.get(ctx, r.Settings.Certificates[i])
				r.results <- result{i, got, err, byHint} // has room for one of every certificate
			})
		default:
			wait = min(wait, p.next.Sub(now))
		}
	}
	return wait
}

// finish takes what a fetch brought, delivers it and reports.
func (r *running) finish(ctx context.Context, res result) {
	r.fetching[res.index] = false
	r.flying--
	if ctx.Err() != nil {
		return
	}
	c := r.Settings.Certificates[res.index]
	o := outcome{byHint: res.byHint}
	if res.err == nil {
		res.err = r.deliver(ctx, res.index, res.got)
		o.local = res.err != nil && isLocal(res.err)
	}
	if res.err != nil {
		o.problem = fault.From(res.err)
		if o.problem.Message == "" { // not foreseen
			o.problem = fault.New(fault.Internal, "InternalError", "%s", oneLine(res.err.Error()))
		}
	}
	before := r.all[res.index]
	r.all[res.index] = before.after(o, time.Now(), r.interval, r.Timing, rand.Float64())
	if o.problem != nil {
		r.Log.Error("certificate not delivered", "secret", c.URL, "code", o.problem.Code, "problem", o.problem.Message, "fix", o.problem.Fix,
			"failures", r.all[res.index].failures, "nextTry", r.all[res.index].next.UTC().Format(time.RFC3339), "cause", o.problem.Err)
	} else if before.problem != nil {
		r.Log.Info("certificate is fetched again", "secret", c.URL)
	}
	r.reportDelivery(res.index)
	r.writeStatus()
	if o.problem == nil && !before.synced && !slices.ContainsFunc(r.all, func(p progress) bool { return !p.synced }) {
		debug.FreeOSMemory() // the first synchronisation needs the most; what follows is small
	}
}

// isLocal tells failures of this machine from faults of the secret's content.
func isLocal(err error) bool {
	switch fault.From(err).Code {
	case "CertificateStoreError", "UnsafeDirectory", "NoSuchAccount", "LinkIsFile":
		return true
	}
	return false
}

// deliver checks a fetched secret and puts it into its store.
func (r *running) deliver(ctx context.Context, i int, got fetched) error {
	c := r.Settings.Certificates[i]
	b, err := parseBundle(got.contentType, got.value)
	if err != nil {
		return err
	}
	if r.stores[i] == nil {
		if r.stores[i], err = openStore(c, r.Settings); err != nil {
			return err
		}
	}
	note := hookNote{Link: r.stores[i].link(), Version: got.version, Pending: true, Time: time.Now().UTC()}
	done, err := r.stores[i].put(got.version, b, func() error {
		if c.ReloadHook == nil {
			return nil
		}
		if err := writeHookNote(r.state, note); err != nil {
			return storeFault(r.State, err, "check the space and the health of the file system")
		}
		return nil
	})
	if err != nil {
		r.stores[i].close()
		r.stores[i] = nil // the directory may be made anew; open it again
		if !done.switched {
			return err
		}
	}
	r.seen[i] = done
	if done.switched {
		// The words "certificate file name" are those people search the log for.
		r.Log.Info("certificate delivered", "certificate file name", done.file, "link", done.link, "version", got.version, "secret", c.URL,
			"notAfter", b.leaf.NotAfter.UTC().Format(time.RFC3339))
		if c.ReloadHook != nil {
			r.enqueue(ctx, hookJob{i, note})
		}
	}
	for _, name := range done.removed {
		r.Log.Info("old certificate file removed", "certificate file name", name)
	}
	return err
}

// reportDelivery tells the agent, if it listens, what this certificate's state is.
func (r *running) reportDelivery(i int) {
	c, p := r.Settings.Certificates[i], r.all[i]
	d := extension.Delivery{Secret: c.URL, Pinned: c.Version != "", Path: r.seen[i].link, Since: r.seen[i].since}
	if m := storedName.FindStringSubmatch(r.seen[i].file); m != nil {
		d.Version = r.seen[i].file[len(m[1])+1:][:32]
	}
	if p.problem != nil {
		d.Problem = explainProblem(c, p.problem)
	}
	r.hints.deliver(c.Path, d)
}

// findLostHooks queues the hooks that a kill has prevented: noted as pending
// for the version that the link already names.
func (r *running) findLostHooks(ctx context.Context) {
	for i, c := range r.Settings.Certificates {
		if c.ReloadHook == nil || !r.all[i].hook.Pending {
			continue
		}
		target, err := os.Readlink(filepath.Join(c.Directory(), c.LinkName()))
		if err != nil {
			continue // the link never moved; delivering the version writes a new note
		}
		if m := storedName.FindStringSubmatch(filepath.Base(target)); m == nil || filepath.Base(target)[len(m[1])+1:][:32] != r.all[i].hook.Version {
			continue
		}
		r.Log.Info("running a reload hook that was interrupted", "link", r.all[i].hook.Link, "version", r.all[i].hook.Version)
		r.enqueue(ctx, hookJob{i, *r.all[i].hook})
	}
}

func (r *running) enqueue(ctx context.Context, job hookJob) {
	r.all[job.index].hook = &job.note
	r.queue = append(r.queue, job)
	r.startHook(ctx)
}

func (r *running) startHook(ctx context.Context) {
	if r.hooking || len(r.queue) == 0 {
		return
	}
	r.hooking = true
	job := r.queue[0]
	hook := *r.Settings.Certificates[job.index].ReloadHook
	r.work.Go(func() {
		note := job.note
		exitCode, message, err := runHook(ctx, hook)
		if err == nil {
			note.Pending, note.ExitCode, note.Message, note.Time = false, exitCode, message, time.Now().UTC()
		} else {
			note.Message = oneLine(err.Error())
		}
		r.hookDone <- note // has room: only one hook runs
	})
}

// endHook notes a hook's result, unless a later switch has its own note already.
func (r *running) endHook(ctx context.Context, note hookNote) {
	job := r.queue[0]
	r.queue, r.hooking = r.queue[1:], false
	if ctx.Err() != nil {
		return // it stays pending and runs at the next start
	}
	if note.Pending {
		r.Log.Error("reload hook could not be run", "link", note.Link, "problem", note.Message)
	} else {
		level := slog.LevelInfo
		if note.ExitCode != 0 {
			level = slog.LevelError
		}
		r.Log.Log(ctx, level, "reload hook ended", "link", note.Link, "version", note.Version, "exitCode", note.ExitCode, "result", note.Message)
	}
	later := slices.ContainsFunc(r.queue, func(j hookJob) bool { return j.index == job.index })
	if !later {
		r.all[job.index].hook = &note
		if err := writeHookNote(r.state, note); err != nil {
			r.Log.Error("noting the reload hook's result", "problem", err)
		}
	}
	r.writeStatus()
	r.startHook(ctx)
}

// writeStatus writes the status file if it would say something new.
func (r *running) writeStatus() {
	next := overall(r.Settings, r.all, r.Timing)
	same := next.status == r.written.status && next.code == r.written.code && next.message == r.written.message && slices.Equal(next.substatus, r.written.substatus)
	if same {
		return
	}
	now := time.Now()
	if next.status != r.written.status {
		r.since = now
	}
	if err := replaceFile(r.status, filepath.Base(r.StatusFile), "status file", next.statusFile(r.since, now).Encode(), nil); err != nil {
		r.Log.Error("writing the status file", "problem", err)
		return // tried again at the next change or poll
	}
	if next.status != r.written.status {
		r.Log.Info("status", "status", next.status, "message", next.message)
	}
	r.written = next
}
