package namespace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/internal/effect"
)

// startTimeout bounds the time from the first process to a built node.
const startTimeout = 20 * time.Second

// File is a file that the node finds when it starts, for instance a join token.
type File struct {
	Path    string // below /var/lib/waagent
	Content []byte
}

// Start begins the node of folder f, unless it is running already. It returns
// when the node is built and its agent is being started. files are written,
// 0600, before anything runs; env goes to the first process only.
func Start(ctx context.Context, f Folder, n Node, files []File, env []string) error {
	if err := effect.Do("make node folder", func() error { return os.MkdirAll(string(f), 0o700) }); err != nil {
		return fmt.Errorf("making the node's folder: %w", err)
	}
	lock, err := f.lockUnlessRunning(ctx)
	if err != nil || lock == nil {
		return err
	}
	if err := f.startLocked(ctx, n, files, env, lock); err != nil {
		lock.Release()
		return err
	}
	lock.handOver()
	return nil
}

// lockUnlessRunning takes the node's lock; nil without an error means that the
// node's first process lives. A lock that is held by something else is waited
// for: a process that is just being started, or one that is just ending.
func (f Folder) lockUnlessRunning(ctx context.Context) (*Lock, error) {
	wait := time.NewTicker(lockLook)
	defer wait.Stop()
	for late := time.Now().Add(startTimeout); ; {
		lock, err := f.tryLock()
		if lock != nil || err != nil {
			return lock, err
		}
		if _, err := f.PID(); err == nil {
			return nil, nil
		}
		if time.Now().After(late) {
			return nil, fmt.Errorf("waiting for the node's lock: %w", context.DeadlineExceeded)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the node's lock: %w", ctx.Err())
		case <-wait.C:
		}
	}
}

// lockLook is the time between looks at a lock that somebody holds.
const lockLook = 2 * time.Millisecond

func (f Folder) startLocked(ctx context.Context, n Node, files []File, env []string, lock *Lock) error {
	if err := finishWipe(f); err != nil {
		return fmt.Errorf("finishing to empty the node's folder: %w", err)
	}
	n.HostRoot = os.Geteuid() == 0
	if err := f.Prepare(n); err != nil {
		return err
	}
	for _, file := range files {
		path := filepath.Join(f.WAAgent(), file.Path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("making the agent's folder: %w", err)
		}
		if err := WriteFile(path, file.Content, 0o600); err != nil {
			return fmt.Errorf("writing %s for the agent: %w", file.Path, err)
		}
	}
	return f.launch(ctx, n, lock, env)
}

// launch starts the first process with the lock and waits for its report.
func (f Folder) launch(ctx context.Context, n Node, lock *Lock, env []string, args ...string) error {
	console, err := os.OpenFile(f.Console(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("opening the node's console: %w", err)
	}
	defer console.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("making a pipe: %w", err)
	}
	defer r.Close()
	cmd := exec.Command(n.Agent, append([]string{"local-init", string(f)}, args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", console, console
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/"}, env...)
	cmd.ExtraFiles = []*os.File{lock.file, w} // lockFD, readyFD
	cmd.SysProcAttr = namespaces(n.HostRoot)
	err = effect.Do("start node", cmd.Start)
	_ = w.Close()
	if err != nil {
		return &stepError{Step: "create namespaces", Err: err}
	}
	ended := make(chan struct{})
	go func() { // ends with the node, which may outlive every caller but this process
		_ = cmd.Wait()
		close(ended)
	}()
	deadline := time.Now().Add(startTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = r.SetReadDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := readReport(r); err != nil {
		_ = cmd.Process.Kill()
		<-ended
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	return nil
}

// namespaces says which namespaces a node has of its own. An ordinary user
// gets a user namespace with one entry: the user is root in it. That is all a
// user may map without help, and all that is needed: every file of the node
// then belongs to the user, who can also remove it.
func namespaces(hostRoot bool) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Setsid:     true, // a Ctrl-C for the server is none for its nodes
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
	}
	if !hostRoot {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return attr
}

// Lock is a node's lock, held.
//
// It must be released in so many words. Closing the file is not enough: while
// another node is started, the child that is about to become its first process
// has a copy of every open file of this process, for as long as it takes to
// run its program, and a flock lasts as long as the last copy (flock(2)).
type Lock struct{ file *os.File }

// Release gives the lock up, whoever has copies of the file.
func (l *Lock) Release() {
	_ = unix.Flock(int(l.file.Fd()), unix.LOCK_UN) // cannot fail on a lock that is held
	_ = l.file.Close()
}

// handOver lets go of the file and leaves the lock to the first process.
func (l *Lock) handOver() { _ = l.file.Close() }

// tryLock takes the node's lock; nil without an error means that somebody holds it.
func (f Folder) tryLock() (*Lock, error) {
	lock, err := os.OpenFile(f.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the node's lock: %w", err)
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return &Lock{lock}, nil
	}
	_ = lock.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("locking the node: %w", err)
}

// Running reports whether the node's first process lives. A folder without a
// lock file is not running; nothing is made by asking.
func (f Folder) Running() (bool, error) {
	if _, err := os.Stat(f.path("lock")); errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	lock, err := f.tryLock()
	if lock != nil {
		lock.Release()
	}
	return lock == nil && err == nil, err
}

// PID returns the number of the node's first process on this machine, after
// making sure that it is that process and no later one of the same number.
// It is os.ErrProcessDone where there is none.
func (f Folder) PID() (int, error) {
	b, err := os.ReadFile(f.path("pid"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, os.ErrProcessDone
	}
	if err != nil {
		return 0, fmt.Errorf("reading the node's process id: %w", err)
	}
	number, start, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	pid, err := strconv.Atoi(number)
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("reading %s: %q is no process", f.path("pid"), number)
	}
	if now, err := startTime(number); err != nil || now != start {
		return 0, os.ErrProcessDone
	}
	return pid, nil
}

// Kill ends the node's first process, and so every process of the node. It
// returns when all are gone, holding the node's lock, which the caller releases
// when done with the folder. If polite, the agent is asked to end first.
func Kill(ctx context.Context, f Folder, polite bool) (lock *Lock, err error) {
	wait := time.NewTicker(lockLook)
	defer wait.Stop()
	for {
		if lock, err = f.tryLock(); lock != nil || err != nil {
			return lock, err
		}
		// The lock is held. Its holder may not have written its number yet,
		// or may be just ending: look again until one or the other is done.
		if err := f.signal(ctx, polite); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the node to end: %w", ctx.Err())
		case <-wait.C:
		}
	}
}

// signal ends the first process through a descriptor of it, which cannot come
// to mean another process, and waits until it and its whole tree are gone:
// the kernel reports the first process of a PID namespace as ended only when
// nothing else is left in it (pid_namespaces(7)).
func (f Folder) signal(ctx context.Context, polite bool) error {
	pid, err := f.PID()
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("opening the node's process: %w", err)
	}
	defer unix.Close(fd)
	if again, err := f.PID(); err != nil || again != pid {
		return os.ErrProcessDone
	}
	if polite {
		if err := effect.Do("ask node to end", func() error { return unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0) }); err == nil {
			if gone(ctx, fd, grace+time.Second) {
				return nil
			}
		}
	}
	err = effect.Do("kill node", func() error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing the node: %w", err)
	}
	if !gone(ctx, fd, startTimeout) {
		return fmt.Errorf("waiting for the node to end: %w", context.DeadlineExceeded)
	}
	return nil
}

// gone waits until the process of a descriptor has ended; false when ctx or the time ends first.
func gone(ctx context.Context, pidfd int, most time.Duration) bool {
	for end := time.Now().Add(most); time.Now().Before(end) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		if err == nil && n == 1 {
			return true
		}
	}
	return false
}
