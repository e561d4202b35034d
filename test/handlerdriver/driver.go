// Package handlerdriver runs an extension package by the VM extension handler
// contract, as WALinuxAgent does, without being an agent.
//
// Idea: an extension that only works under its own project's agent is no
// extension. This driver was written from the contract alone and shares no
// code with Keyfleet's agent or its wire types: what the package does here it
// can do under any agent that follows the contract.
//
// Invariant: nothing of this package imports internal/agent or api/...; the
// environment of a command holds what the contract names and what the caller
// adds, nothing of Keyfleet.
//
// Consequence for the operator: none; it is a test.
//
// Sources: WALinuxAgent 2.15, azurelinuxagent/ga/exthandlers.py (behaviour);
// the design document of the azure-linux-extensions project.
package handlerdriver

import (
	"archive/zip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Driver is one machine's extension folder (/var/lib/waagent) and log folder.
type Driver struct {
	Lib string   // packages are unpacked into Lib/NAME-VERSION
	Log string   // handlers log to Log/NAME
	Env []string // added to every command's environment
}

// Handler is an installed package.
type Handler struct {
	Name, Version string
	Base          string
	driver        *Driver
	manifest      manifest
	sequence      int
}

type manifest struct {
	HandlerManifest map[string]any `json:"handlerManifest"`
}

// Result is how a command went.
type Result struct {
	Exit   int
	Output string
	Took   time.Duration
}

// Command timeouts of the contract.
var timeouts = map[string]time.Duration{
	"install": 900 * time.Second, "update": 900 * time.Second, "disable": 900 * time.Second,
	"enable": 300 * time.Second, "uninstall": 300 * time.Second,
}

// Unpack unpacks a zip as NAME-VERSION and writes what a handler finds there:
// the manifest in the root, HandlerEnvironment.json, config and status folders.
func (d *Driver) Unpack(zipFile, name, version string) (*Handler, error) {
	h := &Handler{Name: name, Version: version, Base: filepath.Join(d.Lib, name+"-"+version), driver: d}
	if err := unzip(zipFile, h.Base); err != nil {
		return nil, err
	}
	data, err := h.findManifest()
	if err != nil {
		return nil, err
	}
	var all []manifest
	if err := json.Unmarshal(data, &all); err != nil || len(all) == 0 {
		return nil, fmt.Errorf("reading HandlerManifest.json: %w", err)
	}
	h.manifest = all[0]
	for _, sub := range []string{"config", "status"} {
		if err := os.MkdirAll(filepath.Join(h.Base, sub), 0o700); err != nil {
			return nil, err
		}
	}
	logs := filepath.Join(d.Log, name)
	if err := os.MkdirAll(filepath.Join(logs, "events"), 0o700); err != nil {
		return nil, err
	}
	// Written as Python's json.dumps does, with blanks; some handlers read it by text.
	environment := fmt.Sprintf(`[{"name": %q, "version": 1.0, "handlerEnvironment": {"logFolder": %q, "configFolder": %q, "statusFolder": %q, "heartbeatFile": %q, "eventsFolder": %q}}]`,
		name, logs, filepath.Join(h.Base, "config"), filepath.Join(h.Base, "status"), filepath.Join(h.Base, "heartbeat.log"), filepath.Join(logs, "events"))
	return h, os.WriteFile(filepath.Join(h.Base, "HandlerEnvironment.json"), []byte(environment), 0o600)
}

func unzip(file, to string) error {
	z, err := zip.OpenReader(file)
	if err != nil {
		return fmt.Errorf("opening package: %w", err)
	}
	defer z.Close()
	for _, entry := range z.File {
		if !filepath.IsLocal(entry.Name) {
			return fmt.Errorf("the package holds %q", entry.Name)
		}
		path := filepath.Join(to, entry.Name)
		if entry.FileInfo().IsDir() {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := extract(entry, path); err != nil {
			return err
		}
	}
	return nil
}

// extract makes every file executable for its owner, whatever the zip says.
func extract(entry *zip.File, path string) error {
	in, err := entry.Open()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return fmt.Errorf("unpacking %s: %w", entry.Name, err)
	}
	return out.Close()
}

// findManifest looks for the manifest anywhere and copies it to the root.
func (h *Handler) findManifest() ([]byte, error) {
	var found string
	err := filepath.WalkDir(h.Base, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Name() == "HandlerManifest.json" && found == "" {
			found = path
		}
		return err
	})
	if err != nil || found == "" {
		return nil, fmt.Errorf("finding HandlerManifest.json: %w", err)
	}
	data, err := os.ReadFile(found)
	if err != nil {
		return nil, err
	}
	return data, os.WriteFile(filepath.Join(h.Base, "HandlerManifest.json"), data, 0o600)
}

// Settings writes config/N.settings for the next N.
func (h *Handler) Settings(public string) error {
	h.sequence++
	text := fmt.Sprintf(`{"runtimeSettings": [{"handlerSettings": {"protectedSettingsCertThumbprint": null, "publicSettings": %s, "protectedSettings": null}}]}`, public)
	return os.WriteFile(filepath.Join(h.Base, "config", fmt.Sprintf("%d.settings", h.sequence)), []byte(text), 0o600)
}

// Run runs one of the manifest's commands.
func (h *Handler) Run(ctx context.Context, command string, env ...string) (Result, error) {
	line, _ := h.manifest.HandlerManifest[command+"Command"].(string)
	if line == "" {
		return Result{}, fmt.Errorf("the manifest has no %sCommand", command)
	}
	out, err := os.CreateTemp(h.driver.Log, command+"-")
	if err != nil {
		return Result{}, err
	}
	defer out.Close()
	ctx, cancel := context.WithTimeout(ctx, timeouts[command])
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", filepath.Join(h.Base, line))
	cmd.Dir = h.Base
	cmd.Env = append([]string{
		"AZURE_GUEST_AGENT_EXTENSION_PATH=" + h.Base, "AZURE_GUEST_AGENT_EXTENSION_VERSION=" + h.Version,
		"AZURE_GUEST_AGENT_WIRE_PROTOCOL_ADDRESS=168.63.129.16", "AZURE_GUEST_AGENT_UNINSTALL_CMD_EXIT_CODE=NOT_RUN",
		"AZURE_GUEST_AGENT_DISABLE_CMD_EXIT_CODE=NOT_RUN", `AZURE_GUEST_AGENT_EXTENSION_SUPPORTED_FEATURES=[{"Key": "ExtensionTelemetryPipeline", "Value": "1.0"}]`,
		fmt.Sprintf("ConfigSequenceNumber=%d", h.sequence),
	}, append(h.driver.Env, env...)...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	started := time.Now()
	err = cmd.Run()
	text, _ := os.ReadFile(out.Name())
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return Result{}, fmt.Errorf("running %s: %w", command, err)
	}
	return Result{Exit: cmd.ProcessState.ExitCode(), Output: string(text), Took: time.Since(started)}, nil
}

// Status is what an agent takes from a status file.
type Status struct {
	Status, Operation, Message string
	Code                       float64
	Substatus                  []any
}

// Status reads status/N.status of the present sequence; a missing file is transitioning.
func (h *Handler) Status() (Status, error) {
	data, err := os.ReadFile(filepath.Join(h.Base, "status", fmt.Sprintf("%d.status", h.sequence)))
	if errors.Is(err, os.ErrNotExist) {
		return Status{Status: "transitioning"}, nil
	}
	if err != nil {
		return Status{}, err
	}
	var all []map[string]any
	if err := json.Unmarshal(data, &all); err != nil || len(all) == 0 {
		return Status{}, fmt.Errorf("status file %q: %w", data, err)
	}
	for _, member := range []string{"status", "timestampUTC", "version"} {
		if _, ok := all[0][member]; !ok {
			return Status{}, fmt.Errorf("status file lacks %s: %s", member, data)
		}
	}
	body, _ := all[0]["status"].(map[string]any)
	message, _ := body["formattedMessage"].(map[string]any)
	s := Status{}
	s.Status, _ = body["status"].(string)
	s.Operation, _ = body["operation"].(string)
	s.Message, _ = message["message"].(string)
	s.Code, _ = body["code"].(float64)
	s.Substatus, _ = body["substatus"].([]any)
	if !strings.Contains(" transitioning warning error success ", " "+s.Status+" ") || s.Operation == "" {
		return Status{}, fmt.Errorf("status file is not by the contract: %s", data)
	}
	return s, nil
}

// Update replaces old by h in the contract's order: old.disable, new.update,
// old.uninstall, old's folder removed, new.install, new.enable. The caller has
// written h's settings.
func (h *Handler) Update(ctx context.Context, old *Handler) error {
	steps := []struct {
		on      *Handler
		command string
	}{{old, "disable"}, {h, "update"}, {old, "uninstall"}, {h, "install"}, {h, "enable"}}
	for _, s := range steps {
		r, err := s.on.Run(ctx, s.command, "AZURE_GUEST_AGENT_UPDATING_FROM_VERSION="+old.Version, "VERSION="+h.Version)
		if err != nil {
			return err
		}
		if r.Exit != 0 {
			return fmt.Errorf("%s of %s: exit code %d: %s", s.command, s.on.Version, r.Exit, r.Output)
		}
		if s.command == "uninstall" {
			if err := os.RemoveAll(old.Base); err != nil {
				return fmt.Errorf("removing the old version: %w", err)
			}
		}
	}
	return nil
}
