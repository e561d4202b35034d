package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
)

// A handler is one version of an extension type on this node: the package's
// folder, with what the contract keeps in it.
//
//	LibDir/NAME-VERSION/                 the unpacked package, 0700
//	  HandlerManifest.json               copied here from wherever the package has it
//	  HandlerEnvironment.json            where the handler finds its folders
//	  config/HandlerState                NotInstalled, Installed, Enabled
//	  config/EXT.HandlerState            of one extension, if the handler supports several
//	  config/UpdatingFrom                old version, while an update is under way
//	  config/[EXT.]N.settings            0600
//	  status/[EXT.]N.status              written by the handler
//	  [EXT.]keyfleet-hint.sock           see hints.go
//	LibDir/NAME__VERSION.zip             the package
//	LogDir/NAME/                         logs; CommandExecution.log is the agent's
type handler struct {
	name     string // PUBLISHER.TYPE
	version  string
	dir      string
	logDir   string
	commands extension.HandlerCommands // zero until loaded
}

// The forms of names that become parts of file names.
var (
	handlerForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._]{0,199}$`)
	versionForm = regexp.MustCompile(`^[0-9]{1,9}(\.[0-9]{1,9}){0,5}$`)
	nameForm    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
)

// checkNames refuses an extension whose names cannot be file names.
func checkNames(x node.Extension) error {
	if !handlerForm.MatchString(handlerName(x)) || !versionForm.MatchString(x.Version) {
		return fmt.Errorf("the publisher, type and version %q, %q, %q cannot be the name of a folder", x.Publisher, x.Type, x.Version)
	}
	if !nameForm.MatchString(x.Name) {
		return fmt.Errorf("the name %q cannot be the name of a file", x.Name)
	}
	return nil
}

func handlerName(x node.Extension) string { return x.Publisher + "." + x.Type }

func (a *Agent) handler(name, version string) *handler {
	return &handler{
		name: name, version: version, dir: filepath.Join(a.cfg.LibDir, name+"-"+version), logDir: filepath.Join(a.cfg.LogDir, name),
	}
}

func (h *handler) config(name string) string { return filepath.Join(h.dir, "config", name) }

// instanceName is the name of an extension in the handler's files: empty
// unless the handler supports several extensions.
func (h *handler) instanceName(x string) string {
	if h.commands.SupportsMultipleExtensions {
		return x
	}
	return ""
}

func dotted(instance, rest string) string {
	if instance == "" {
		return rest
	}
	return instance + "." + rest
}

// state reads HandlerState of the handler (instance "") or of one extension.
func (h *handler) state(instance string) string {
	b, _ := os.ReadFile(h.config(dotted(instance, "HandlerState"))) // absent is not installed
	switch s := strings.TrimSpace(string(b)); s {
	case node.Installed, node.Enabled:
		return s
	}
	return node.NotInstalled
}

func (h *handler) setState(instance, state string) error {
	if h.state(instance) == state && exists(h.config(dotted(instance, "HandlerState"))) {
		return nil
	}
	return writeFile("handler state "+state, h.config(dotted(instance, "HandlerState")), []byte(state), 0o600)
}

// load reads the manifest. The error's text says what is wrong with the file.
func (h *handler) load() error {
	data, err := os.ReadFile(filepath.Join(h.dir, "HandlerManifest.json"))
	if err != nil {
		return err
	}
	m, err := extension.ParseHandlerManifest(data)
	if err != nil {
		return err
	}
	h.commands = m.HandlerManifest
	return nil
}

// writeEnvironment makes the handler's folders and HandlerEnvironment.json.
func (h *handler) writeEnvironment() error {
	events := filepath.Join(h.logDir, "events")
	for _, d := range []struct {
		path string
		mode fs.FileMode
	}{
		{h.dir, 0o700}, {h.config(""), 0o700}, {filepath.Join(h.dir, "status"), 0o700}, {h.logDir, 0o755}, {events, 0o700},
	} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return fmt.Errorf("making the handler's folders: %w", err)
		}
	}
	removeLeftovers(h.dir)
	removeLeftovers(h.config(""))
	env := extension.HandlerEnvironment{Name: h.name, Version: 1, Folders: extension.Folders{
		LogFolder: h.logDir, ConfigFolder: h.config(""), StatusFolder: filepath.Join(h.dir, "status"),
		HeartbeatFile: filepath.Join(h.dir, "heartbeat.log"), EventsFolder: events,
	}}.Encode()
	path := filepath.Join(h.dir, "HandlerEnvironment.json")
	if old, _ := os.ReadFile(path); bytes.Equal(old, env) {
		return nil
	}
	return writeFile("handler environment", path, env, 0o600)
}

// writeSettings writes the settings file of an extension. It is written before
// every enable: handlers take the newest by modification time, and wipe
// protected settings after use.
func (h *handler) writeSettings(x node.Extension, thumbprint string) error {
	path := h.config(dotted(h.instanceName(x.Name), strconv.Itoa(x.Sequence)+".settings"))
	var data []byte // no settings: an empty file
	if x.Settings != nil || x.ProtectedSettings != "" {
		s := extension.HandlerSettings{PublicSettings: x.Settings}
		if x.ProtectedSettings != "" {
			s.ProtectedSettings, s.ProtectedSettingsCertThumbprint = &x.ProtectedSettings, &thumbprint
		}
		data = s.Encode()
	}
	return writeFile("settings", path, data, 0o600)
}

func (h *handler) statusPath(x string, sequence int) string {
	return filepath.Join(h.dir, "status", dotted(h.instanceName(x), strconv.Itoa(sequence)+".status"))
}

func (h *handler) heartbeatPath() string { return filepath.Join(h.dir, "heartbeat.log") }

// instances are the names of the extensions of a handler that supports several, as its files have them.
func (h *handler) instances() []string {
	paths, _ := filepath.Glob(h.config("*.HandlerState")) // the pattern is well formed
	var out []string
	for _, p := range paths {
		out = append(out, strings.TrimSuffix(filepath.Base(p), ".HandlerState"))
	}
	return out
}

// dropInstance removes what the handler's folders have of one extension.
func (h *handler) dropInstance(instance string) error {
	return effect.Do("remove files of extension", func() error {
		var errs []error
		for _, dir := range []string{"status", "config"} { // HandlerState, in config, goes last
			paths, _ := filepath.Glob(filepath.Join(h.dir, dir, instance+".[0-9]*"))
			for _, p := range paths {
				errs = append(errs, os.Remove(p))
			}
		}
		errs = append(errs, os.Remove(h.config(instance+".HandlerState")))
		return errors.Join(errs...)
	})
}

// remove removes the handler's folder and package. The folder is renamed
// first, so that a crash leaves nothing that looks like a handler.
func (a *Agent) removeFiles(h *handler) error {
	return effect.Do("remove handler", func() error {
		gone := h.dir + tmpSuffix
		if err := os.RemoveAll(gone); err != nil {
			return err
		}
		if err := os.Rename(h.dir, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		zip := a.packagePath(h)
		if err := os.Remove(zip); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return os.RemoveAll(gone)
	})
}

// packagePath is where the handler's package is kept.
func (a *Agent) packagePath(h *handler) string {
	return filepath.Join(a.cfg.LibDir, h.name+"__"+h.version+".zip")
}

// handlersOnDisk are the handlers that earlier runs unpacked, by name and version.
func (a *Agent) handlersOnDisk() ([]*handler, error) {
	entries, err := os.ReadDir(a.cfg.LibDir)
	if err != nil {
		return nil, fmt.Errorf("looking for handlers: %w", err)
	}
	var out []*handler
	for _, e := range entries {
		i := strings.LastIndexByte(e.Name(), '-')
		if !e.IsDir() || i < 0 || !handlerForm.MatchString(e.Name()[:i]) || !versionForm.MatchString(e.Name()[i+1:]) {
			continue
		}
		h := a.handler(e.Name()[:i], e.Name()[i+1:])
		if exists(h.config("HandlerState")) {
			out = append(out, h)
		}
	}
	slices.SortFunc(out, func(x, y *handler) int {
		if c := strings.Compare(x.name, y.name); c != 0 {
			return c
		}
		return compareVersions(x.version, y.version)
	})
	return out, nil
}

// compareVersions compares dotted numbers.
func compareVersions(a, b string) int {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	for i := range max(len(x), len(y)) {
		if c := number(x, i) - number(y, i); c != 0 {
			return c
		}
	}
	return 0
}

func number(parts []string, i int) int {
	if i >= len(parts) {
		return 0
	}
	n, _ := strconv.Atoi(parts[i]) // not a number counts as 0
	return n
}
