package agent

import (
	"context"
	"errors"
	"os"
	"slices"
	"strconv"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// removeUnwanted removes handlers and extensions that the goal state does not
// have any more, dependants first.
func (a *Agent) removeUnwanted(ctx context.Context, g *node.GoalState) (again time.Duration, err error) {
	onDisk, err := a.handlersOnDisk()
	if err != nil {
		return a.cfg.Timeouts.Retry, err
	}
	started := a.startOrder()
	slices.SortStableFunc(onDisk, func(x, y *handler) int { return slices.Index(started, y.name) - slices.Index(started, x.name) })
	var errs []error
	for _, h := range onDisk {
		wanted := map[string]bool{} // extensions of this handler, by name
		version := ""
		for _, x := range g.Extensions {
			if handlerName(x) == h.name {
				wanted[x.Name], version = true, x.Version
			}
		}
		switch {
		case len(wanted) == 0:
			errs = append(errs, a.removeHandler(ctx, h))
		case version == h.version || version == "":
			errs = append(errs, a.removeInstances(ctx, h, wanted))
		case a.handler(h.name, version).state("") != node.NotInstalled: // an update that was cut short after its last step
			errs = append(errs, a.removeHandler(ctx, h))
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
	return a.cfg.Timeouts.Retry, errors.Join(errs...)
}

// removeHandler disables, uninstalls and removes a handler. What its commands
// answer is logged and changes nothing: a handler that cannot be run must not
// stay for ever.
func (a *Agent) removeHandler(ctx context.Context, h *handler) error {
	a.cfg.Log.Info("removing extension handler", "handler", h.name, "version", h.version)
	if err := h.load(); err == nil && h.state("") != node.NotInstalled {
		if err := h.writeEnvironment(); err != nil {
			return err
		}
		if h.state("") == node.Enabled {
			a.disableAll(ctx, h)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := h.setState("", node.Installed); err != nil {
				return err
			}
		}
		a.run(ctx, h, command{operation: "uninstall", line: h.commands.UninstallCommand, timeout: a.cfg.Timeouts.Enable, env: a.instanceEnv(h, "", 0)})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := h.setState("", node.NotInstalled); err != nil {
			return err
		}
	}
	return a.removeFiles(h)
}

// disableAll disables every enabled extension of a handler, and returns the
// outcomes by extension ("" where there is one only).
func (a *Agent) disableAll(ctx context.Context, h *handler) map[string]outcome {
	outs := map[string]outcome{}
	if !h.commands.SupportsMultipleExtensions {
		outs[""] = a.disable(ctx, h, "")
		return outs
	}
	for _, n := range h.instances() {
		if h.state(n) == node.Enabled {
			outs[n] = a.disable(ctx, h, n)
		}
	}
	return outs
}

func (a *Agent) disable(ctx context.Context, h *handler, instance string) outcome {
	return a.run(ctx, h, command{
		operation: "disable", line: h.commands.DisableCommand, timeout: a.cfg.Timeouts.Install, env: a.instanceEnv(h, instance, lastSequence(h, instance)),
	})
}

// lastSequence is the newest sequence number in the handler's settings files.
// Numbers may go down; the newest file counts.
func lastSequence(h *handler, instance string) int {
	entries, err := os.ReadDir(h.config(""))
	if err != nil {
		return 0
	}
	best, when := 0, time.Time{}
	for _, e := range entries {
		n, ok := sequenceOf(e.Name(), instance)
		fi, err := e.Info()
		if ok && err == nil && !fi.ModTime().Before(when) {
			best, when = n, fi.ModTime()
		}
	}
	return best
}

// sequenceOf takes the number out of "[INSTANCE.]N.settings".
func sequenceOf(file, instance string) (int, bool) {
	rest := file
	if instance != "" {
		if len(file) <= len(instance)+1 || file[:len(instance)+1] != instance+"." {
			return 0, false
		}
		rest = file[len(instance)+1:]
	}
	const ext = ".settings"
	if len(rest) <= len(ext) || rest[len(rest)-len(ext):] != ext {
		return 0, false
	}
	n, err := strconv.Atoi(rest[:len(rest)-len(ext)])
	return n, err == nil && n >= 0
}

// removeInstances disables the extensions of a handler that are not wanted any more.
func (a *Agent) removeInstances(ctx context.Context, h *handler, wanted map[string]bool) error {
	if err := h.load(); err != nil || !h.commands.SupportsMultipleExtensions {
		return nil // a broken manifest is reported by ready
	}
	var errs []error
	for _, n := range h.instances() {
		if wanted[n] {
			continue
		}
		if h.state(n) == node.Enabled {
			a.disable(ctx, h, n)
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		errs = append(errs, h.dropInstance(n))
	}
	return errors.Join(errs...)
}
