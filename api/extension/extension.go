// Package extension holds the wire types of the VM extension handler contract
// (the files between an agent and an extension handler) and the settings of
// the Key Vault extension. It is a leaf: it does no input or output.
//
// Idea: both sides of the contract, and the pool's validation, read the same
// bytes through the same code. Whatever an agent in the field writes is
// accepted (booleans and numbers as strings, null members, an empty settings
// file); what we write is the form that existing handlers depend on, down to
// the blanks between JSON tokens.
//
// Invariant: parsing never panics and never fills in what was not said, except
// for the defaults that a field's comment names.
//
// Consequence for the operator: a settings document gets the same verdict when
// a pool is created and on the node, with every problem listed by field.
//
// Sources: the extension design document of the azure-linux-extensions
// project; the behaviour of WALinuxAgent 2.15; the Key Vault extension pages
// for Linux and Windows.
package extension

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Bool is a boolean that may be written as true, "true" or "True", as
// manifests and settings in the field do.
type Bool bool

// UnmarshalJSON accepts a boolean, or a string that says one; null is false.
func (b *Bool) UnmarshalJSON(data []byte) error {
	switch strings.ToLower(strings.Trim(string(data), `"`)) {
	case "true":
		*b = true
	case "false", "null", "":
		*b = false
	default:
		return fmt.Errorf("%s is not a boolean", data)
	}
	return nil
}

// Version is a document version, which handlers write as a number (1.0) or as
// a string ("1.0"). Encoded, it is the text as it stands: a Version made from
// `"1.0"` with quotes stays a string.
type Version string

// UnmarshalJSON accepts a number or a string.
func (v *Version) UnmarshalJSON(data []byte) error {
	var s string
	if json.Unmarshal(data, &s) == nil {
		*v = Version(s)
		return nil
	}
	var n json.Number
	if err := json.Unmarshal(data, &n); err != nil {
		return fmt.Errorf("version %.40s is neither a number nor a string", data)
	}
	*v = Version(n)
	return nil
}

// HandlerManifest is the object in the array of HandlerManifest.json.
type HandlerManifest struct {
	Name            string          `json:"name,omitempty"`
	Version         Version         `json:"version,omitempty"`
	HandlerManifest HandlerCommands `json:"handlerManifest"`
	ResourceLimits  *ResourceLimits `json:"resourceLimits,omitempty"`
}

// HandlerCommands says how a handler is run. Commands are paths in the
// package, with arguments; the agent runs them with /bin/sh in the package's folder.
type HandlerCommands struct {
	InstallCommand             string `json:"installCommand"`
	UninstallCommand           string `json:"uninstallCommand"`
	UpdateCommand              string `json:"updateCommand"`
	EnableCommand              string `json:"enableCommand"`
	DisableCommand             string `json:"disableCommand"`
	RebootAfterInstall         Bool   `json:"rebootAfterInstall"`
	ReportHeartbeat            Bool   `json:"reportHeartbeat"`
	UpdateMode                 string `json:"updateMode,omitempty"` // UpdateWithInstall; empty means the same
	ContinueOnUpdateFailure    Bool   `json:"continueOnUpdateFailure,omitempty"`
	SupportsMultipleExtensions Bool   `json:"supportsMultipleExtensions,omitempty"`
	SupportsPolicy             Bool   `json:"supportsPolicy,omitempty"`
}

// UpdatesWithInstall reports whether an update runs install after update.
func (c HandlerCommands) UpdatesWithInstall() bool {
	return c.UpdateMode == "" || c.UpdateMode == "UpdateWithInstall"
}

// ResourceLimits bounds a handler's cgroup.
type ResourceLimits struct {
	CPUQuotaPercentage int             `json:"cpuQuotaPercentage,omitempty"`
	MemoryQuotaInMB    int             `json:"memoryQuotaInMB,omitempty"`
	Services           json.RawMessage `json:"services,omitempty"`
}

// ParseHandlerManifest reads HandlerManifest.json: an array whose first
// element counts. The five commands must be there.
func ParseHandlerManifest(data []byte) (HandlerManifest, error) {
	var all []HandlerManifest
	if err := json.Unmarshal(trimBOM(data), &all); err != nil {
		return HandlerManifest{}, fmt.Errorf("reading handler manifest: %w", err)
	}
	if len(all) == 0 {
		return HandlerManifest{}, errors.New("reading handler manifest: the array is empty")
	}
	c := all[0].HandlerManifest
	for _, command := range []struct{ name, value string }{
		{"installCommand", c.InstallCommand},
		{"uninstallCommand", c.UninstallCommand},
		{"updateCommand", c.UpdateCommand},
		{"enableCommand", c.EnableCommand},
		{"disableCommand", c.DisableCommand},
	} {
		if strings.TrimSpace(command.value) == "" {
			return HandlerManifest{}, fmt.Errorf("reading handler manifest: %s is missing", command.name)
		}
	}
	return all[0], nil
}

// HandlerEnvironment is the object in the array of HandlerEnvironment.json.
type HandlerEnvironment struct {
	Name    string  `json:"name,omitempty"`
	Version float64 `json:"version"`
	Folders Folders `json:"handlerEnvironment"`
}

// Folders tells a handler where its files are. The order is part of the
// contract: shims find logFolder by text and need something after it.
type Folders struct {
	LogFolder     string `json:"logFolder"`
	ConfigFolder  string `json:"configFolder"`
	StatusFolder  string `json:"statusFolder"`
	HeartbeatFile string `json:"heartbeatFile"`
	EventsFolder  string `json:"eventsFolder,omitempty"`
}

// Encode renders the file with Python's separators (": " and ", "), which
// shims that search it by text depend on.
func (e HandlerEnvironment) Encode() []byte {
	if e.Version == 0 {
		e.Version = 1
	}
	out := pythonSpaced(mustJSON([]HandlerEnvironment{e}))
	return bytes.Replace(out, []byte(`"version": 1,`), []byte(`"version": 1.0,`), 1)
}

// ParseHandlerEnvironment reads HandlerEnvironment.json as any agent writes it.
func ParseHandlerEnvironment(data []byte) (HandlerEnvironment, error) {
	var all []struct {
		Name    string  `json:"name"`
		Version Version `json:"version"`
		Folders Folders `json:"handlerEnvironment"`
	}
	if err := json.Unmarshal(trimBOM(data), &all); err != nil {
		return HandlerEnvironment{}, fmt.Errorf("reading handler environment: %w", err)
	}
	if len(all) == 0 {
		return HandlerEnvironment{}, errors.New("reading handler environment: the array is empty")
	}
	version, err := strconv.ParseFloat(string(all[0].Version), 64)
	if err != nil {
		version = 1
	}
	e := HandlerEnvironment{Name: all[0].Name, Version: version, Folders: all[0].Folders}
	if e.Folders.ConfigFolder == "" || e.Folders.StatusFolder == "" {
		return HandlerEnvironment{}, errors.New("reading handler environment: configFolder or statusFolder is missing")
	}
	return e, nil
}

// HandlerSettings is what one .settings file says. The zero value is an
// extension without settings (an empty file).
type HandlerSettings struct {
	PublicSettings                  json.RawMessage `json:"publicSettings"`                  // null: none
	ProtectedSettings               *string         `json:"protectedSettings"`               // base64 of CMS DER; nil: none
	ProtectedSettingsCertThumbprint *string         `json:"protectedSettingsCertThumbprint"` // SHA-1, upper-case hex
}

type settingsFile struct {
	RuntimeSettings []struct {
		HandlerSettings HandlerSettings `json:"handlerSettings"`
	} `json:"runtimeSettings"`
}

// Encode renders the .settings file; all three keys are always written,
// because handlers look for them.
func (s HandlerSettings) Encode() []byte {
	if len(s.PublicSettings) == 0 {
		s.PublicSettings = json.RawMessage("null")
	}
	f := settingsFile{}
	f.RuntimeSettings = append(f.RuntimeSettings, struct {
		HandlerSettings HandlerSettings `json:"handlerSettings"`
	}{s})
	return mustJSON(f)
}

// ParseHandlerSettings reads a .settings file; an empty file is no settings.
func ParseHandlerSettings(data []byte) (HandlerSettings, error) {
	data = bytes.TrimSpace(trimBOM(data))
	if len(data) == 0 {
		return HandlerSettings{}, nil
	}
	var f settingsFile
	if err := json.Unmarshal(data, &f); err != nil {
		return HandlerSettings{}, fmt.Errorf("reading settings file: %w", err)
	}
	if len(f.RuntimeSettings) == 0 {
		return HandlerSettings{}, errors.New("reading settings file: runtimeSettings is empty")
	}
	return f.RuntimeSettings[0].HandlerSettings, nil
}

// Heartbeat is what a handler with reportHeartbeat writes; older than ten
// minutes it counts as unresponsive.
type Heartbeat struct {
	Status  string `json:"status"` // ready, notready
	Code    Code   `json:"code"`
	Message string `json:"Message"`
}

// EncodeHeartbeat renders a heartbeat file.
func EncodeHeartbeat(h Heartbeat) []byte {
	return mustJSON([]map[string]any{{"version": json.RawMessage("1.0"), "heartbeat": h}})
}

// ParseHeartbeat reads a heartbeat file, in its plain and its formattedMessage form.
func ParseHeartbeat(data []byte) (Heartbeat, error) {
	var all []struct {
		Heartbeat struct {
			Heartbeat
			Formatted FormattedMessage `json:"formattedMessage"`
		} `json:"heartbeat"`
	}
	if err := json.Unmarshal(trimBOM(data), &all); err != nil {
		return Heartbeat{}, fmt.Errorf("reading heartbeat: %w", err)
	}
	if len(all) == 0 {
		return Heartbeat{}, errors.New("reading heartbeat: the array is empty")
	}
	h := all[0].Heartbeat.Heartbeat
	if h.Message == "" {
		h.Message = all[0].Heartbeat.Formatted.Message
	}
	return h, nil
}

// mustJSON encodes plain structs of this package, which cannot fail, without
// escaping <, > and &.
func mustJSON(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic("encoding " + fmt.Sprintf("%T", v) + ": " + err.Error()) // a RawMessage that is no JSON: a bug of the caller
	}
	return bytes.TrimRight(b.Bytes(), "\n")
}

// pythonSpaced puts a blank after every colon and comma outside strings.
func pythonSpaced(compact []byte) []byte {
	out := make([]byte, 0, len(compact)+len(compact)/8)
	inString, escaped := false, false
	for _, c := range compact {
		out = append(out, c)
		switch {
		case escaped:
			escaped = false
		case inString && c == '\\':
			escaped = true
		case c == '"':
			inString = !inString
		case !inString && (c == ':' || c == ','):
			out = append(out, ' ')
		}
	}
	return out
}

// trimBOM removes the byte order mark that Windows tools put before JSON.
func trimBOM(data []byte) []byte { return bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")) }
