//go:build !windows

package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/api/node"
)

// hangUpWait is how long a process may take to end after its caller has gone.
const hangUpWait = 2 * time.Second

// startProcess starts what the caller asked for, in a session of its own.
func startProcess(start node.SessionStart) (*process, error) {
	shell, err := shellOf()
	if err != nil {
		return nil, err
	}
	var cmd *exec.Cmd
	if len(start.Command) == 0 {
		cmd = exec.Command(shell)
		cmd.Args[0] = "-" + filepath.Base(shell) // a login shell, bash(1) INVOCATION
	} else {
		program, err := lookUp(start.Command[0])
		if err != nil {
			return nil, err
		}
		cmd = exec.Command(program, start.Command[1:]...)
		cmd.Args[0] = start.Command[0]
	}
	cmd.Dir, cmd.Env = home(), environment(start, shell)
	if start.Terminal {
		return startOnTerminal(cmd, start)
	}
	return startOnPipes(cmd)
}

// lookUp finds a program in the session's search path, which is not the agent's.
func lookUp(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for dir := range strings.SplitSeq(sessionPath, ":") {
		path := filepath.Join(dir, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: command not found", name)
}

func startOnTerminal(cmd *exec.Cmd, start node.SessionStart) (*process, error) {
	size := &pty.Winsize{Cols: start.Columns, Rows: start.Rows}
	if size.Cols == 0 || size.Rows == 0 {
		size.Cols, size.Rows = 80, 24
	}
	blocking, err := pty.StartWithSize(cmd, size)
	if err != nil {
		return nil, fmt.Errorf("starting %s on a terminal: %w", cmd.Args[0], err)
	}
	terminal, err := unblocked(blocking)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("opening a terminal: %w", err)
	}
	return &process{
		cmd: cmd, input: terminal, outputs: map[node.FrameKind]*os.File{node.FrameOutput: terminal}, ended: make(chan struct{}),
		resize: func(columns, rows uint16) {
			// An error means that the terminal is gone, and the session with it.
			_ = control(terminal, func(fd int) error {
				return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows})
			})
		},
		endInput: func() { _, _ = terminal.Write([]byte{4}) }, // what Ctrl-D sends
	}, nil
}

// unblocked makes a file whose reads can be interrupted from one of which they cannot.
func unblocked(f *os.File) (*os.File, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// control runs fn on a file's descriptor without making it blocking.
func control(f *os.File, fn func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := c.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

func startOnPipes(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	p := &process{cmd: cmd, outputs: map[node.FrameKind]*os.File{}, resize: func(uint16, uint16) {}, ended: make(chan struct{})}
	var theirs, ours []*os.File
	fail := func(err error) (*process, error) {
		closeAll(theirs)
		closeAll(ours)
		return nil, fmt.Errorf("starting %s: %w", cmd.Args[0], err)
	}
	inR, inW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	cmd.Stdin, p.input = inR, inW
	theirs, ours = append(theirs, inR), append(ours, inW)
	for _, out := range []struct {
		kind node.FrameKind
		to   *io.Writer
	}{{node.FrameOutput, &cmd.Stdout}, {node.FrameErrors, &cmd.Stderr}} {
		r, w, err := os.Pipe()
		if err != nil {
			return fail(err)
		}
		theirs, ours = append(theirs, w), append(ours, r)
		p.outputs[out.kind], *out.to = r, w
	}
	p.endInput = func() { _ = inW.Close() }
	if err := cmd.Start(); err != nil {
		return fail(err)
	}
	closeAll(theirs)
	return p, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// hangUp ends the process group of a session whose caller has gone, as a lost
// telephone line did.
func (p *process) hangUp() {
	select {
	case <-p.ended: // it ended by itself; what it left running may go on
		return
	default:
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGHUP)
	select {
	case <-p.ended:
	case <-time.After(hangUpWait):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
}

// exitStatus is the status as a shell would say it.
func exitStatus(state *os.ProcessState, err error) int {
	if state == nil {
		return 255
	}
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 255
	}
	return state.ExitCode()
}
