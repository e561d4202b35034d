package keyvaultext

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"keyfleet.dev/keyfleet/internal/effect"
)

// The service holds an exclusive lock on lockName in the state folder while it
// lives; the file says who it is. A lock ends with its process, so it never
// needs cleaning. The enable command takes it and hands it over to the service that
// it starts: there is no moment in which a service runs and nobody sees it, also when
// the command dies.
const lockName = "service.pid"

// identity tells one running service from another.
type identity struct {
	PID int    `json:"pid"`
	Key string `json:"key"` // of everything that needs a restart when it changes
}

const (
	stopGrace  = 15 * time.Second // for a service to end by itself; then it is killed
	startGrace = 60 * time.Second // for a service to report that polling has started
	lockPeriod = 10 * time.Millisecond
)

// serviceKey is a hash of what makes a service this one: settings, sequence,
// binary, and the environment that it reads.
func serviceKey(executable string, parts ...string) (string, error) {
	h := sha256.New()
	f, err := os.Open(executable)
	if err != nil {
		return "", fmt.Errorf("reading the extension's binary: %w", err)
	}
	defer f.Close()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("reading the extension's binary: %w", err)
	}
	for _, p := range parts {
		fmt.Fprintf(h, "\n%d:%s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// takeLock takes the service lock; it waits for a predecessor until the deadline.
// Closing the file gives the lock back.
func takeLock(state string, deadline time.Time) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(state, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening service lock: %w", err)
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("taking service lock: another service is running: %w", err)
		}
		time.Sleep(lockPeriod)
	}
}

// sign writes who we are into the lock that we hold.
func sign(lock *os.File, key string) error {
	data, err := json.Marshal(identity{PID: os.Getpid(), Key: key})
	if err != nil {
		return fmt.Errorf("encoding service identity: %w", err)
	}
	err = effect.Do("write service identity", func() error {
		if err := lock.Truncate(0); err != nil {
			return err
		}
		_, err := lock.WriteAt(append(data, '\n'), 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("writing service identity: %w", err)
	}
	return nil
}

// runningService returns the identity of the service that holds the lock; ok is false
// if none does. A service that has just started may still be anonymous (PID 0).
func runningService(state string) (id identity, ok bool, err error) {
	f, err := os.Open(filepath.Join(state, lockName))
	if errors.Is(err, fs.ErrNotExist) {
		return identity{}, false, nil
	}
	if err != nil {
		return identity{}, false, fmt.Errorf("opening service lock: %w", err)
	}
	defer f.Close()
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if err == nil {
		return identity{}, false, nil // ours for the moment until Close: nobody else holds it
	}
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return identity{}, false, fmt.Errorf("testing service lock: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, 4<<10))
	if err != nil || json.Unmarshal(data, &id) != nil || !isOurs(id.PID) {
		return identity{}, true, nil
	}
	return id, true, nil
}

// isOurs guards against a number in the file that has become another process.
func isOurs(pid int) bool {
	if pid <= 1 || pid == os.Getpid() {
		return false
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return false
	}
	other, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	return err == nil && programName(other) == programName(self)
}

// programName is the base name; the kernel marks a replaced binary " (deleted)".
func programName(path string) string {
	const mark = " (deleted)"
	base := filepath.Base(path)
	if len(base) > len(mark) && base[len(base)-len(mark):] == mark {
		base = base[:len(base)-len(mark)]
	}
	return base
}

// stopService ends the running service, if there is one, and returns when its lock is free.
func stopService(state string) error {
	soft := time.Now().Add(stopGrace)
	hard := soft.Add(stopGrace)
	asked := 0
	killed := false
	for time.Now().Before(hard) {
		id, ok, err := runningService(state)
		if err != nil || !ok {
			return err
		}
		sig := syscall.Signal(0)
		if id.PID != 0 && id.PID != asked {
			sig, asked = syscall.SIGTERM, id.PID
		} else if id.PID != 0 && time.Now().After(soft) && !killed {
			sig, killed = syscall.SIGKILL, true
		}
		if sig != 0 {
			if err := effect.Do("stop service", func() error { return syscall.Kill(id.PID, sig) }); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("stopping the running service: %w", err)
			}
		}
		time.Sleep(lockPeriod)
	}
	return errors.New("stopping the running service: it does not end")
}

// Files that the enable command hands over to the service.
const (
	readyFile = 3 // a pipe on which the service says that polling has started
	lockFile  = 4 // the service lock, held
)

// startService starts the service in a session of its own, so that it outlives
// the agent, hands the lock over to it, and returns when it says that polling has started.
func startService(executable string, args, environment []string, lock *os.File, errorLog string) error {
	defer lock.Close() // the service has it, or nobody
	if err := os.MkdirAll(filepath.Dir(errorLog), 0o755); err != nil {
		return fmt.Errorf("creating log folder: %w", err)
	}
	stderr, err := os.OpenFile(errorLog, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("opening %s: %w", errorLog, err)
	}
	defer stderr.Close()
	ready, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("making a pipe: %w", err)
	}
	defer ready.Close()
	cmd := exec.Command(executable, args...)
	cmd.Dir, cmd.Env = "/", environment
	cmd.Stdout, cmd.Stderr = stderr, stderr
	cmd.ExtraFiles = []*os.File{w, lock} // readyFile, lockFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = effect.Do("start service", cmd.Start)
	w.Close()
	if err != nil {
		return fmt.Errorf("starting service: %w", err)
	}
	lock.Close() // or it would be ours as long as we wait
	_ = ready.SetReadDeadline(time.Now().Add(startGrace))
	said := make([]byte, 16)
	n, err := ready.Read(said)
	if string(said[:n]) == "ready\n" {
		return cmd.Process.Release()
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		_ = cmd.Wait() // it has closed the pipe: it is ending
	}
	return fmt.Errorf("starting service: it did not begin to poll: %s", tail(stderr))
}

func tail(f *os.File) string {
	buffer := make([]byte, 2048)
	size, _ := f.Seek(0, io.SeekEnd)
	n, _ := f.ReadAt(buffer, max(0, size-int64(len(buffer))))
	return firstNonEmpty(oneLine(string(buffer[:n])), "it said nothing")
}

// handedOver takes what the enable command has handed over: a function that tells it
// that polling has started, and the service lock. Reload hooks get neither.
func handedOver() (ready func(), lock *os.File) {
	syscall.CloseOnExec(readyFile)
	syscall.CloseOnExec(lockFile)
	w := os.NewFile(readyFile, "ready")
	return func() {
		_, _ = w.WriteString("ready\n") // an enable command that was killed does not listen
		w.Close()
	}, os.NewFile(lockFile, lockName)
}
