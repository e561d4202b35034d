package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
)

// olderVersion is another version of the handler that is installed, nil if there is none.
func (a *Agent) olderVersion(h *handler) (*handler, *finding) {
	onDisk, err := a.handlersOnDisk()
	if err != nil {
		return nil, &finding{code: codeUpdate, operation: "Update", message: err.Error()}
	}
	for _, o := range onDisk {
		if o.name == h.name && o.version != h.version {
			return o, nil
		}
	}
	return nil, nil
}

// updatingFile in the new version's config folder names the old version while an update is under way.
const updatingFile = "UpdatingFrom"

// update replaces a handler's version by the contract's steps: old disable,
// status files copied, new update (for a downgrade the old one's), old
// uninstall, old removed, new install if the manifest wants it. After a crash
// it is run again from the first step that is not recorded as done; old is nil
// when it was removed already.
func (a *Agent) update(ctx context.Context, old, h *handler, x node.Extension) *finding {
	fail := func(err error) *finding {
		return &finding{code: codeUpdate, operation: "Update", message: "The update could not be carried out: " + err.Error() + "."}
	}
	env := map[string]string{}
	if old != nil {
		if err := writeFile("update record", h.config(updatingFile), []byte(old.version), 0o600); err != nil {
			return fail(err)
		}
		if err := old.load(); err != nil {
			a.cfg.Log.Warn("the old version's manifest cannot be read; it is removed without its commands", "handler", old.name, "version", old.version, "error", err)
			old.commands = h.commands
			if err := old.setState("", node.NotInstalled); err != nil {
				return fail(err)
			}
		}
		if f := a.retire(ctx, old, h, x, env); f != nil {
			return f
		}
		if err := a.removeFiles(old); err != nil {
			return fail(err)
		}
	}
	if h.commands.UpdatesWithInstall() {
		if f := a.install(ctx, h, x, env); f != nil {
			return f
		}
	} else if err := h.setState("", node.Installed); err != nil {
		return fail(err)
	}
	err := effect.Do("remove update record", func() error { return os.Remove(h.config(updatingFile)) })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	return nil
}

// retire runs the old version's part of an update; env gets what install must know.
func (a *Agent) retire(ctx context.Context, old, h *handler, x node.Extension, env map[string]string) *finding {
	goOn := bool(h.commands.ContinueOnUpdateFailure)
	disableCodes := map[string]outcome{}
	if old.state("") == node.Enabled {
		disableCodes = a.disableAll(ctx, old)
		for _, out := range disableCodes {
			if out.err != nil && !goOn {
				return failed(codeDisable, "Disable", old.commands.DisableCommand, out)
			}
		}
		if err := old.setState("", node.Installed); err != nil {
			return &finding{code: codeUpdate, operation: "Update", message: err.Error()}
		}
	}
	if err := copyStatus(old, h); err != nil {
		return &finding{code: codeUpdate, operation: "Update", message: err.Error()}
	}
	if old.state("") == node.NotInstalled {
		return nil // a crash came after its uninstall
	}
	runner, line := h, h.commands.UpdateCommand
	if compareVersions(h.version, old.version) < 0 {
		runner, line = old, old.commands.UpdateCommand
	}
	vars := a.instanceEnv(h, "", x.Sequence)
	vars[envUpdatingFrom], vars[envNewVersion] = old.version, h.version
	disableEnv(h, disableCodes, vars)
	if out := a.run(ctx, runner, command{operation: "update", line: line, timeout: a.cfg.Timeouts.Install, env: vars}); out.err != nil && !goOn {
		return failed(codeUpdate, "Update", line, out)
	}
	out := a.run(ctx, old, command{operation: "uninstall", line: old.commands.UninstallCommand, timeout: a.cfg.Timeouts.Enable, env: a.instanceEnv(old, "", 0)})
	if out.err != nil && !goOn {
		return failed(codeUpdate, "Uninstall", old.commands.UninstallCommand, out)
	}
	env[envUninstall], env[envUpdatingFrom] = strconv.Itoa(out.exit), old.version
	disableEnv(h, disableCodes, env)
	if err := old.setState("", node.NotInstalled); err != nil {
		return &finding{code: codeUpdate, operation: "Update", message: err.Error()}
	}
	return nil
}

// disableEnv tells how the old version's disable commands ended: a number, or
// JSON by extension for a handler that supports several.
func disableEnv(h *handler, codes map[string]outcome, env map[string]string) {
	if !h.commands.SupportsMultipleExtensions {
		if out, ok := codes[""]; ok {
			env[envDisable] = strconv.Itoa(out.exit)
		}
		return
	}
	byName := map[string]int{}
	for n, out := range codes {
		byName[n] = out.exit
	}
	text, _ := json.Marshal(byName) // a map of strings and numbers always encodes
	env[envDisable+"S_MULTIPLE_EXTENSIONS"] = string(text)
}

// copyStatus copies the old version's status files, so that a status exists until the new version wrote its own.
func copyStatus(old, h *handler) error {
	return effect.Do("copy status files", func() error {
		from := os.DirFS(old.dir)
		paths, err := fs.Glob(from, "status/*.status")
		if err != nil {
			return err
		}
		for _, p := range paths {
			data, err := fs.ReadFile(from, p)
			if err != nil {
				return fmt.Errorf("copying status files: %w", err)
			}
			if err := os.WriteFile(h.dir+"/"+p, data, 0o600); err != nil {
				return fmt.Errorf("copying status files: %w", err)
			}
		}
		return nil
	})
}
