package etcd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// lockDir makes the directory, for its owner only, and takes it for this process
// until the file is closed. The kernel gives the lock back when the process dies,
// however it dies.
func lockDir(dir string) (*os.File, error) {
	if err := effect.Do("make data directory", func() error { return os.MkdirAll(dir, 0o700) }); err != nil {
		return nil, fmt.Errorf("making the data directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("closing the data directory to others: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock of the data directory: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		_ = f.Close()
		return nil, fault.New(fault.Conflict, "", "The data directory %s is in use by another server (process %s).", dir, strings.TrimSpace(string(holder[:n]))).
			WithFix("end that server, or give this one another directory")
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("locking the data directory: %w", err)
	}
	return f, nil
}

// unlock gives the directory back.
func (b *Backend) unlock() {
	if b.lock != nil {
		_ = b.lock.Close()
	}
}
