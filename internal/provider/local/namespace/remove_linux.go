package namespace

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"keyfleet.dev/keyfleet/internal/effect"
)

// wipeMark is a file that says that the folder is being emptied: whoever finds
// it finishes that first, so no node ever starts from half of its files.
const wipeMark = "wipe"

// parts are what a node may have written, and what it was started from.
var parts = []string{"waagent", "log", "tmp", "node.json", "pid", "console.log"}

// Wipe empties the folder of a node that does not run, as for a new one.
func Wipe(f Folder) error {
	if err := WriteFile(f.path(wipeMark), nil, 0o600); err != nil {
		return err
	}
	return finishWipe(f)
}

// finishWipe does what a wipe mark promises; without one it does nothing.
func finishWipe(f Folder) error {
	if _, err := os.Lstat(f.path(wipeMark)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, part := range parts {
		if err := effect.Do("remove node's "+part, func() error { return removeAll(f.path(part)) }); err != nil {
			return err
		}
	}
	return effect.Do("remove wipe mark", func() error { return os.Remove(f.path(wipeMark)) })
}

// Remove removes the folder of a node that does not run. The parts go first:
// an interrupted removal leaves a folder that is listed, so it is done again.
func Remove(f Folder) error {
	for _, part := range parts {
		if err := effect.Do("remove node's "+part, func() error { return removeAll(f.path(part)) }); err != nil {
			return err
		}
	}
	return effect.Do("remove node folder", func() error { return removeAll(string(f)) })
}

// removeAll is os.RemoveAll that also gets through folders which their owner
// made unwritable, as extension packages may do; only an ordinary user meets that.
func removeAll(path string) error {
	err := os.RemoveAll(path)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	err = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() && (err != nil || d.Type().IsDir()) {
			if cerr := os.Chmod(p, 0o700); cerr != nil {
				return cerr
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("making %s removable: %w", path, err)
	}
	return os.RemoveAll(path)
}
