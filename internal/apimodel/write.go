package apimodel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// WriteFile puts text in place of a file, whole or not at all, with the owner
// and mode of the file before it; a new one is its owner's only. A symbolic link
// stays, and what it leads to is replaced.
func WriteFile(path string, text []byte) error {
	target, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		target, err = path, nil
	}
	if err == nil {
		err = replace(target, text)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func replace(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // mode 0600: it holds keys
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = alike(f, path)
	if err == nil {
		_, err = f.Write(text)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// alike gives a file the owner and mode of another, if that is there.
func alike(f *os.File, path string) error {
	old, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !old.Mode().IsRegular() {
		return errors.New("it is not a file")
	}
	now, err := f.Stat()
	if err != nil {
		return err
	}
	have, wantOwner := now.Sys().(*syscall.Stat_t), old.Sys().(*syscall.Stat_t)
	if have.Uid != wantOwner.Uid || have.Gid != wantOwner.Gid {
		if err := f.Chown(int(wantOwner.Uid), int(wantOwner.Gid)); err != nil {
			return fmt.Errorf("keeping its owner: %w", err)
		}
	}
	return f.Chmod(old.Mode().Perm())
}
