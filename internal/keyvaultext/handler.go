package keyvaultext

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
)

// Exit codes of the handler's commands. 51 and 53 are the contract's words for
// "this system is not supported" and "the settings are wrong"; agents show
// them beside the status file.
const (
	ExitSuccess     = 0
	ExitFailure     = 1
	ExitUsage       = 2
	ExitUnsupported = 51
	ExitSettings    = 53
)

// Handler is one installed package: what an agent's commands act on.
type Handler struct {
	Base       string    // the package's folder, with HandlerEnvironment.json
	Executable string    // this program
	Out        io.Writer // what the agent keeps as the command's output

	folders extension.Folders
}

// NewHandler finds the package's folder: the one above the program's bin
// folder, or what the agent says, or the current one.
func NewHandler(out io.Writer) (*Handler, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this program: %w", err)
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	cwd, _ := os.Getwd()
	candidates := []string{filepath.Dir(filepath.Dir(self)), os.Getenv("AZURE_GUEST_AGENT_EXTENSION_PATH"), cwd}
	for _, base := range candidates {
		data, err := os.ReadFile(filepath.Join(base, "HandlerEnvironment.json"))
		if base == "" || err != nil {
			continue
		}
		env, err := extension.ParseHandlerEnvironment(data)
		if err != nil {
			return nil, err
		}
		return &Handler{Base: base, Executable: self, Out: out, folders: env.Folders}, nil
	}
	return nil, fmt.Errorf("finding HandlerEnvironment.json: it is in none of %s", strings.Join(candidates, ", "))
}

// state is the folder for the service's own notes. It lies beside the package,
// not in it, so that notes outlive an update and two versions exclude each other.
func (h *Handler) state() string {
	return filepath.Join(filepath.Dir(h.Base), HandlerName+".state")
}

func (h *Handler) logFolder() string {
	return firstNonEmpty(h.folders.LogFolder, filepath.Join(h.Base, "log"))
}

// sequence is the settings that a command is about: N of N.settings and N.status.
type sequence string

// newest returns the agent's sequence number, or the newest settings file by
// time: numbers may go down.
func (h *Handler) newest() (sequence, error) {
	number := os.Getenv("ConfigSequenceNumber")
	if name := os.Getenv("ConfigExtensionName"); number != "" && name != "" && !strings.ContainsAny(name, `/\`) {
		if s := sequence(name + "." + number); h.exists(s) {
			return s, nil
		}
	}
	if s := sequence(number); number != "" && !strings.ContainsAny(number, `/\`) && h.exists(s) {
		return s, nil
	}
	files, err := filepath.Glob(filepath.Join(h.folders.ConfigFolder, "*.settings"))
	if err != nil || len(files) == 0 {
		return "", fmt.Errorf("finding settings: there is no .settings file in %s", h.folders.ConfigFolder)
	}
	var best string
	var at time.Time
	for _, f := range files {
		if info, err := os.Stat(f); err == nil && (best == "" || info.ModTime().After(at)) {
			best, at = f, info.ModTime()
		}
	}
	return sequence(strings.TrimSuffix(filepath.Base(best), ".settings")), nil
}

func (h *Handler) exists(s sequence) bool {
	_, err := os.Stat(h.settingsFile(s))
	return err == nil
}

func (h *Handler) settingsFile(s sequence) string {
	return filepath.Join(h.folders.ConfigFolder, string(s)+".settings")
}

func (h *Handler) statusFile(s sequence) string {
	return filepath.Join(h.folders.StatusFolder, string(s)+".status")
}

// settings reads and checks the settings of s. raw is what they are made of.
func (h *Handler) settings(s sequence) (out extension.KeyVaultSettings, raw string, err error) {
	data, err := os.ReadFile(h.settingsFile(s))
	if err != nil {
		return out, "", fmt.Errorf("reading settings: %w", err)
	}
	file, err := extension.ParseHandlerSettings(data)
	if err != nil {
		return out, "", err
	}
	out, err = extension.ParseKeyVaultSettings(file.PublicSettings)
	return out, string(file.PublicSettings), err
}

// fail writes a status file that says why enable has failed, and returns the exit code.
func (h *Handler) fail(s sequence, exit int, message string) int {
	fmt.Fprintln(h.Out, message)
	r := report{status: extension.StatusError, code: extension.Code(exit), message: message}
	now := time.Now()
	dir, err := os.OpenRoot(h.folders.StatusFolder)
	if err != nil {
		fmt.Fprintln(h.Out, "opening status folder:", err)
		return exit
	}
	defer dir.Close()
	if err := replaceFile(dir, filepath.Base(h.statusFile(s)), "status file", r.statusFile(now, now).Encode(), nil); err != nil {
		fmt.Fprintln(h.Out, "writing status file:", err)
	}
	return exit
}

// settingsMessage lists every problem of the settings.
func settingsMessage(err error) string {
	var all extension.SettingsErrors
	if !errors.As(err, &all) {
		return "Failed to parse the configuration settings: " + oneLine(err.Error()) + "."
	}
	return "Failed to parse the configuration settings: " + all.Error()
}
