package local

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/provider/local/namespace"
)

// SocketDir is the folder of the server's socket in a data directory. Nodes see
// the folder, so a socket that a restarted server makes anew is theirs at once.
func SocketDir(dataDir string) string { return filepath.Join(dataDir, "run") }

// ListenUnix listens on SocketDir(dataDir)/server.sock, mode 0600. It takes the
// place of a socket that nobody answers at; a server that answers is a fault.
//
// A Unix socket's address holds 108 bytes (unix(7)) and a data directory may be
// deeper than that, so the folder is opened and named by its descriptor.
func ListenUnix(dataDir string) (net.Listener, error) {
	dir := SocketDir(dataDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the socket's folder: %w", err)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the socket's folder: %w", err)
	}
	short := "/proc/self/fd/" + strconv.Itoa(fd) + "/" + namespace.SocketName
	var l *net.UnixListener
	err = effect.Do("listen on server socket", func() error {
		if conn, err := net.Dial("unix", short); err == nil {
			_ = conn.Close()
			return fault.New(fault.Conflict, "DataDirInUse", "Another server answers on %s.", filepath.Join(dir, namespace.SocketName)).
				WithFix("Stop it, or use another --data-dir.")
		}
		if err := os.Remove(short); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("removing an old socket: %w", err)
		}
		var err error
		if l, err = net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"}); err != nil {
			return fmt.Errorf("listening on the server's socket: %w", err)
		}
		return os.Chmod(short, 0o600)
	})
	if err != nil {
		if l != nil {
			_ = l.Close()
		}
		_ = unix.Close(fd)
		return nil, err
	}
	return &unixListener{UnixListener: l, dir: fd}, nil
}

// unixListener keeps the folder open as long as the listener's name needs it.
type unixListener struct {
	*net.UnixListener
	dir  int
	once sync.Once
}

// Close stops listening and removes the socket.
func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() { _ = unix.Close(l.dir) })
	return err
}
