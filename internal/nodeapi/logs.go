package nodeapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// The bounds of kept logs.
const (
	tailLimit    = 256 << 10 // bytes kept of a file
	logBodyLimit = 2 << 20   // bytes of an upload: JSON may escape each byte of a tail
	logFiles     = 16        // files kept for an extension of a node
	logExts      = 32        // extensions kept for a node
)

// logs keeps an uploaded log tail.
func (e *Edge) logs(w http.ResponseWriter, r *http.Request, id string) error {
	var up node.LogUpload
	if err := decode(w, r, logBodyLimit, &up); err != nil {
		return err
	}
	if len(up.Tail) > tailLimit {
		return fault.New(fault.TooLarge, "TailTooLarge", "A log tail has at most %d bytes.", tailLimit).At("tail")
	}
	if !fileName(up.Extension) || !fileName(up.File) {
		return fault.New(fault.Invalid, "InvalidName", "Names of extensions and log files are letters, digits, dots, dashes and underscores.")
	}
	if e.cfg.Logs != nil {
		if err := e.cfg.Logs.Put(r.Context(), id, up); err != nil {
			return err
		}
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// fileName reports whether s can be the name of a file here: no separators, no leading dot.
func fileName(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' {
		return false
	}
	for _, c := range s {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-_. ", c)
		if !ok {
			return false
		}
	}
	return true
}

// LogDir keeps log tails as files NODE/EXTENSION/FILE.json in a directory, at
// most 16 files an extension and 32 extensions a node. The directory is the
// server's alone.
type LogDir string

// Put replaces what is kept of this file.
func (d LogDir) Put(_ context.Context, nodeID string, up node.LogUpload) error {
	if !nodeName(nodeID) || !fileName(up.Extension) || !fileName(up.File) {
		return fault.New(fault.Invalid, "InvalidName", "These names cannot be kept.")
	}
	nodeDir := filepath.Join(string(d), nodeID)
	dir := filepath.Join(nodeDir, up.Extension)
	name := up.File + ".json"
	if full(nodeDir, up.Extension, logExts) || full(dir, name, logFiles) {
		return fault.New(fault.TooLarge, "TooManyLogs", "No more log files are kept for this node.")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	body, err := json.Marshal(up)
	if err != nil {
		return err
	}
	return effect.Do("keep log tail", func() error {
		tmp, err := os.CreateTemp(dir, ".new-*")
		if err != nil {
			return err
		}
		defer os.Remove(tmp.Name())
		if _, err = tmp.Write(body); err == nil {
			err = tmp.Close()
		} else {
			tmp.Close()
		}
		if err != nil {
			return err
		}
		return os.Rename(tmp.Name(), filepath.Join(dir, name))
	})
}

// full reports whether dir holds limit entries already, and name is none of them.
func full(dir, name string, limit int) bool {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) < limit {
		return false
	}
	return !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == name })
}

// List returns the kept tails of a node's extension (of all with extension empty), by extension and file.
func (d LogDir) List(_ context.Context, nodeID, extension string) ([]node.LogUpload, error) {
	if !nodeName(nodeID) || extension != "" && !fileName(extension) {
		return nil, fault.New(fault.Invalid, "InvalidName", "There can be no logs of these names.")
	}
	pattern := "*"
	if extension != "" {
		pattern = extension
	}
	paths, err := filepath.Glob(filepath.Join(string(d), nodeID, pattern, "*.json"))
	if err != nil {
		return nil, err
	}
	slices.Sort(paths)
	var out []node.LogUpload
	for _, p := range paths {
		body, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var up node.LogUpload
		if err == nil {
			err = json.Unmarshal(body, &up)
		}
		if err != nil {
			return nil, fmt.Errorf("reading kept log: %w", err)
		}
		out = append(out, up)
	}
	return out, nil
}

// Remove forgets a node's logs.
func (d LogDir) Remove(_ context.Context, nodeID string) error {
	if !nodeName(nodeID) {
		return nil
	}
	return effect.Do("remove kept logs", func() error { return os.RemoveAll(filepath.Join(string(d), nodeID)) })
}
