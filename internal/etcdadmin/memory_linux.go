package etcdadmin

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// memoryFile makes a file that is on no disk.
func memoryFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("etcd", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making a file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), "etcd"), nil
}

// reopen opens a file in memory a second time.
func reopen(f *os.File) (*os.File, error) {
	again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a file in memory: %w", err)
	}
	return again, nil
}
