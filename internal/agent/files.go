package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"keyfleet.dev/keyfleet/internal/effect"
)

// writeFile replaces a file as a whole, durably: a temporary file in the same
// directory, fsync, rename, fsync of the directory. what names the effect.
func writeFile(what, path string, data []byte, mode fs.FileMode) error {
	err := effect.Do("write "+what, func() error {
		tmp := path + "." + rand.Text()[:8] + tmpSuffix
		if err := writeSynced(tmp, data, mode); err != nil {
			_ = os.Remove(tmp)
			return err
		}
		if err := os.Rename(tmp, path); err != nil {
			_ = os.Remove(tmp)
			return err
		}
		return syncDir(filepath.Dir(path))
	})
	if err != nil {
		return fmt.Errorf("writing %s: %w", what, err)
	}
	return nil
}

// tmpSuffix ends the names of files that are not finished; what a crash left is removed at the next start.
const tmpSuffix = ".kftmp"

func writeSynced(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := errors.Join(f.Chmod(mode), f.Sync()); err != nil { // Chmod: the umask may have taken bits away
		f.Close()
		return err
	}
	return f.Close()
}

// removeLeftovers removes unfinished files of earlier runs from dir.
func removeLeftovers(dir string) { removeLeft(filepath.Join(dir, "*"+tmpSuffix)) }

func removeLeft(pattern string) {
	left, _ := filepath.Glob(pattern) // the pattern is well formed
	for _, p := range left {
		_ = os.RemoveAll(p) // tried again at the next start
	}
}

// readIfThere reads a file; nil without an error when there is none.
func readIfThere(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// exists reports whether something is at path; what cannot be looked at counts as absent.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
