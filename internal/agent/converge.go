package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// The codes of the agent's own findings, as the handler contract has them.
const (
	codeGeneric          = 1000
	codeDownload         = 1001
	codeNoManifest       = 1002
	codeManifest         = 1003
	codePackage          = 1004
	codeUnpack           = 1005
	codeInstall          = 1007
	codeUpdate           = 1008
	codeEnable           = 1009
	codeDisable          = 1010
	heartbeatLife        = 600 * time.Second
	maxRetryFactor       = 180
	longestConvergeSleep = time.Hour
)

// finding is what the agent itself found about an extension: a step that
// failed. While there is one, it is the extension's status.
type finding struct {
	code      int
	operation string
	message   string
	log       []string
	at        time.Time
}

func (f *finding) Error() string { return f.operation + ": " + f.message }

// instance is what the agent knows of one extension of the goal state.
type instance struct {
	ext     node.Extension
	handler *handler // nil until its package is unpacked

	enabled  int // sequence number that this version was enabled with by this run of the agent; -1: none
	finding  *finding
	skipped  string    // name of the failed extension because of which it was not started
	waiting  string    // name of the extension whose success it waits for
	since    time.Time // when that waiting began
	failures int
	next     time.Time // when a failed step is tried again

	file  seenStatus                  // what the status file says
	certs map[string]node.Certificate // what the extension said it delivered, by secret and path
}

func newInstance() *instance {
	return &instance{enabled: -1, certs: map[string]node.Certificate{}}
}

// convergeLoop brings the node to its goal state: once for every goal state,
// whenever a status changed that others depend on, and when a retry is due.
func (a *Agent) convergeLoop(ctx context.Context) error {
	for {
		again, err := a.converge(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		t := time.NewTimer(again)
		select {
		case <-a.work:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// converge does what is due now, and returns when to look again. Only an order
// to reboot is an error; failures of extensions are findings.
func (a *Agent) converge(ctx context.Context) (time.Duration, error) {
	a.mu.Lock()
	g := a.goal
	a.mu.Unlock()
	if g == nil {
		return longestConvergeSleep, nil
	}
	if err := a.act(ctx, g); err != nil {
		return 0, err
	}
	a.adopt(g)
	if again, err := a.removeUnwanted(ctx, g); err != nil {
		a.cfg.Log.Error("extensions could not be removed", "error", err)
		return again, nil
	}
	sorted, problems := order(g.Extensions)
	a.rememberOrder(sorted)
	for _, x := range sorted {
		if ctx.Err() != nil || a.superseded(g) {
			return 0, nil
		}
		a.advance(ctx, x, problems[x.Name])
	}
	return a.nextLook(), nil
}

// superseded reports whether a newer goal state has come.
func (a *Agent) superseded(g *node.GoalState) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.goal != g
}

// adopt makes instances for the extensions of the goal state and drops those it no longer has.
func (a *Agent) adopt(g *node.GoalState) {
	a.mu.Lock()
	defer a.mu.Unlock()
	wanted := map[string]bool{}
	for _, x := range g.Extensions {
		wanted[x.Name] = true
		in := a.instances[x.Name]
		if in == nil || handlerName(in.ext) != handlerName(x) {
			in = newInstance()
			a.instances[x.Name] = in
		}
		moved := in.ext.Sequence != x.Sequence || in.ext.Version != x.Version
		if moved {
			in.enabled = -1
		}
		if moved || in.ext.Problem != x.Problem { // what failed before may succeed now
			in.finding, in.failures, in.next = nil, 0, time.Time{}
		}
		in.ext = x
	}
	for name := range a.instances {
		if !wanted[name] {
			delete(a.instances, name)
			a.hints.close(name)
		}
	}
}

// nextLook is when the next retry or dependency timeout is due.
func (a *Agent) nextLook() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	d := longestConvergeSleep
	for _, in := range a.instances {
		if !in.next.IsZero() {
			d = min(d, time.Until(in.next))
		}
		if in.waiting != "" {
			d = min(d, time.Until(in.since.Add(a.cfg.Timeouts.Dependency)))
		}
	}
	return max(d, 10*time.Millisecond)
}

// advance brings one extension as far as it can get now.
func (a *Agent) advance(ctx context.Context, x node.Extension, problem string) {
	in, due := a.due(x, time.Now())
	if !due {
		return
	}
	if problem != "" {
		a.settle(ctx, in, &finding{code: codeGeneric, operation: "Order", message: "The extension cannot be ordered: " + problem + "."})
		return
	}
	if err := checkNames(x); err != nil && x.Package != nil {
		a.settle(ctx, in, &finding{code: codeGeneric, operation: "Check", message: "The extension is not accepted: " + err.Error() + "."})
		return
	}
	if !a.pass(in, x, time.Now()) {
		return
	}
	h, f := a.ready(ctx, x)
	if f == nil {
		f = a.enable(ctx, h, in, x)
	}
	a.settle(ctx, in, f)
}

// due reports whether the extension has something to be done now.
func (a *Agent) due(x node.Extension, now time.Time) (*instance, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	in := a.instances[x.Name]
	if in == nil || !in.next.IsZero() && now.Before(in.next) {
		return in, false
	}
	return in, in.enabled != x.Sequence || in.finding != nil
}

// pass asks the dependencies; false: the extension is not to be started now.
func (a *Agent) pass(in *instance, x node.Extension, now time.Time) bool {
	known := map[string]node.ExtensionStatus{}
	for _, s := range a.statuses(now) {
		known[s.Name] = s
	}
	g := dependencies(x, known)
	a.mu.Lock()
	defer a.mu.Unlock()
	before := in.skipped
	if g.waiting != "" {
		if in.waiting != g.waiting {
			in.waiting, in.since = g.waiting, now
		}
		if now.Sub(in.since) >= a.cfg.Timeouts.Dependency {
			g = gate{failed: g.waiting}
		}
	}
	in.skipped = g.failed
	if g.open {
		in.waiting = ""
	}
	if in.skipped != before {
		signal(a.news)
	}
	return g.open
}

// settle records what came of a step. A failure is tried again after a minute,
// then after twice as long, up to a quarter of an hour; a change of the goal
// state tries at once.
func (a *Agent) settle(ctx context.Context, in *instance, f *finding) {
	if f != nil && ctx.Err() != nil {
		return // the agent is being stopped: this is no failure of the extension
	}
	now := time.Now()
	a.mu.Lock()
	if f == nil {
		in.failures, in.next = 0, time.Time{}
	} else {
		in.failures++
		base := a.cfg.Timeouts.Retry
		wait := retryAfter(in.failures-1, base, maxRetryFactor*base, 1)
		in.next, f.at = now.Add(wait), now
		f.message += fmt.Sprintf(" Attempt %d; the next one is at %s.", in.failures, in.next.UTC().Format(time.RFC3339))
	}
	in.finding = f
	name := in.ext.Name
	a.mu.Unlock()
	if f != nil {
		a.cfg.Log.Warn("extension failed", "extension", name, "operation", f.operation, "code", f.code, "message", f.message)
		a.askUpload(name)
	}
	signal(a.news)
}

// ready makes sure that the extension's handler is unpacked and installed, in
// the version of the goal state.
func (a *Agent) ready(ctx context.Context, x node.Extension) (*handler, *finding) {
	if x.Package == nil {
		msg := x.Problem
		if msg == "" {
			msg = "The server has no package for it."
		}
		return nil, &finding{code: codeDownload, operation: "Download", message: msg}
	}
	if x.Problem != "" {
		return nil, &finding{code: codeGeneric, operation: "Check", message: x.Problem}
	}
	h := a.handler(handlerName(x), x.Version)
	if f := a.bring(ctx, h, *x.Package); f != nil {
		return nil, f
	}
	if err := h.load(); err != nil {
		code := codeManifest
		if errors.Is(err, fs.ErrNotExist) {
			code = codeNoManifest
		}
		return nil, &finding{code: code, operation: "Read manifest", message: err.Error()}
	}
	if f := a.checkShared(h, x); f != nil {
		return nil, f
	}
	if err := h.writeEnvironment(); err != nil {
		return nil, &finding{code: codeGeneric, operation: "Prepare", message: err.Error()}
	}
	if h.state("") != node.NotInstalled {
		return h, nil
	}
	old, f := a.olderVersion(h)
	if f == nil && (old != nil || exists(h.config(updatingFile))) {
		f = a.update(ctx, old, h, x)
	} else if f == nil {
		f = a.install(ctx, h, x, nil)
	}
	if f != nil {
		return nil, f
	}
	return h, nil
}

// bring downloads and unpacks the handler's package, unless that was done.
func (a *Agent) bring(ctx context.Context, h *handler, p node.Package) *finding {
	if exists(h.config("HandlerState")) {
		return nil
	}
	if err := a.download(ctx, h, p); err != nil {
		return &finding{code: codeDownload, operation: "Download", message: "The package could not be downloaded: " + err.Error() + "."}
	}
	if err := a.unpack(h); err != nil {
		code := codeUnpack
		if errors.Is(err, errNoManifest) {
			code = codeNoManifest
		}
		return &finding{code: code, operation: "Unpack", message: "The package could not be unpacked: " + err.Error() + "."}
	}
	return nil
}

// checkShared refuses a second extension of a handler that supports one only.
func (a *Agent) checkShared(h *handler, x node.Extension) *finding {
	if h.commands.SupportsMultipleExtensions {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, other := range a.instances {
		if name < x.Name && handlerName(other.ext) == h.name {
			return &finding{code: codeGeneric, operation: "Check", message: fmt.Sprintf(
				"The handler %s supports one extension only, and %q uses it already.", h.name, name)}
		}
	}
	return nil
}

// install runs the install command.
func (a *Agent) install(ctx context.Context, h *handler, x node.Extension, env map[string]string) *finding {
	vars := a.instanceEnv(h, "", x.Sequence)
	for k, v := range env {
		vars[k] = v
	}
	out := a.run(ctx, h, command{operation: "install", line: h.commands.InstallCommand, timeout: a.cfg.Timeouts.Install, env: vars})
	if out.err != nil {
		return failed(codeInstall, "Install", h.commands.InstallCommand, out)
	}
	if err := h.setState("", node.Installed); err != nil {
		return &finding{code: codeInstall, operation: "Install", message: err.Error()}
	}
	if h.commands.RebootAfterInstall {
		a.cfg.Log.Info("the handler asks for a reboot after its installation; reboot the node when it suits", "handler", h.name, "version", h.version)
	}
	return nil
}

// enable writes the settings and runs the enable command: once for every
// sequence number, and once after every start of the agent.
func (a *Agent) enable(ctx context.Context, h *handler, in *instance, x node.Extension) *finding {
	if err := a.hints.open(x.Name, h.dir, h.instanceName(x.Name), x.Hint); err != nil {
		a.cfg.Log.Warn("no hints for this extension; it polls", "extension", x.Name, "error", err)
	}
	if err := h.writeSettings(x, a.thumbprint); err != nil {
		return &finding{code: codeEnable, operation: "Enable", message: err.Error()}
	}
	a.mu.Lock()
	in.handler = h
	a.mu.Unlock()
	out := a.run(ctx, h, command{
		operation: "enable", line: h.commands.EnableCommand, timeout: a.cfg.Timeouts.Enable, env: a.instanceEnv(h, x.Name, x.Sequence),
	})
	if out.err != nil {
		return failed(codeEnable, "Enable", h.commands.EnableCommand, out)
	}
	err := h.setState("", node.Enabled)
	if n := h.instanceName(x.Name); err == nil && n != "" {
		err = h.setState(n, node.Enabled)
	}
	if err != nil {
		return &finding{code: codeEnable, operation: "Enable", message: err.Error()}
	}
	a.mu.Lock()
	in.enabled = x.Sequence
	a.mu.Unlock()
	return nil
}

func failed(code int, operation, line string, out outcome) *finding {
	return &finding{code: code, operation: operation, log: out.log, message: fmt.Sprintf("%s failed (%s): %s.", operation, line, out.err)}
}

// rememberOrder keeps the names of handlers in the order they were started, so
// that they can be removed in reverse also after the goal state forgot them.
func (a *Agent) rememberOrder(sorted []node.Extension) {
	old := a.startOrder()
	now := slices.DeleteFunc(slices.Clone(old), func(name string) bool {
		return slices.ContainsFunc(sorted, func(x node.Extension) bool { return handlerName(x) == name })
	})
	for _, x := range sorted {
		if n := handlerName(x); !slices.Contains(now, n) {
			now = append(now, n)
		}
	}
	if slices.Equal(old, now) {
		return
	}
	text, err := json.Marshal(now)
	if err == nil {
		err = writeFile("start order", a.statePath("order.json"), text, 0o600)
	}
	if err != nil {
		a.cfg.Log.Error("the order of extensions could not be kept", "error", err)
	}
}

func (a *Agent) startOrder() []string {
	var names []string
	if text, err := os.ReadFile(a.statePath("order.json")); err == nil {
		_ = json.Unmarshal(text, &names) // unreadable: no order
	}
	return names
}
