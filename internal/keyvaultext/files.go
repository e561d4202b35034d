package keyvaultext

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"keyfleet.dev/keyfleet/internal/effect"
)

// Temporary files carry this prefix; what a killed process left is removed by
// removeLeftovers.
const tempPrefix = ".keyfleet-"

// replaceFile makes name in dir hold data: written and synced beside it, then
// renamed over it. A reader sees the old or the new file. prepare, if not nil,
// is called on the temporary file before its name is given away.
func replaceFile(dir *os.Root, name, what string, data []byte, prepare func(*os.File) error) error {
	temp := tempPrefix + name
	err := effect.Do("write "+what, func() error {
		if err := dir.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the leftover %s: %w", temp, err)
		}
		return writeNew(dir, temp, data, prepare)
	})
	if err != nil {
		return err
	}
	return effect.Do("rename "+what, func() error {
		if err := dir.Rename(temp, name); err != nil {
			return fmt.Errorf("renaming %s: %w", temp, err)
		}
		return syncDirectory(dir)
	})
}

func writeNew(dir *os.Root, name string, data []byte, prepare func(*os.File) error) error {
	f, err := dir.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("creating %s: %w", name, err)
	}
	_, err = f.Write(data)
	if err == nil && prepare != nil {
		err = prepare(f)
	}
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		_ = dir.Remove(name) // what is left is removed at the next start
		return fmt.Errorf("writing %s: %w", name, err)
	}
	return nil
}

// syncDirectory makes renames in dir last. Windows has no such call and needs none.
func syncDirectory(dir *os.Root) error {
	d, err := dir.Open(".")
	if err != nil {
		return fmt.Errorf("opening directory to sync it: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("syncing directory: %w", err)
	}
	return nil
}

// removeLeftovers removes temporary files of a process that was killed.
func removeLeftovers(dir *os.Root) error {
	names, err := namesIn(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, tempPrefix) {
			continue
		}
		err := effect.Do("remove leftover file", func() error { return dir.Remove(name) })
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the leftover %s: %w", name, err)
		}
	}
	return nil
}

func namesIn(dir *os.Root) ([]string, error) {
	d, err := dir.Open(".")
	if err != nil {
		return nil, fmt.Errorf("listing directory: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("listing directory: %w", err)
	}
	return names, nil
}

// holds reports whether name is a regular file with exactly this content.
func holds(dir *os.Root, name string, data []byte) bool {
	info, err := dir.Lstat(name)
	if err != nil || !info.Mode().IsRegular() || info.Size() != int64(len(data)) {
		return false
	}
	f, err := dir.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	return err == nil && bytes.Equal(got, data)
}
