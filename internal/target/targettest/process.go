//go:build linux

package targettest

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// process is a running program of a server.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how; after done
}

// stopTimeout is how long a program may take to end when it is asked to.
const stopTimeout = 20 * time.Second

// run starts a program that stays, as nobody if we are root, in the server's
// folder. What it prints is part of the server's log.
func (s *Server) run(p programs, env []string, path string, args ...string) error {
	cmd, err := s.command(context.Background(), p, env, path, args...)
	if err != nil {
		return err
	}
	file := filepath.Join(s.Dir, filepath.Base(path)+".out")
	out, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	s.logs = append(s.logs, file)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", path, err)
	}
	running := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		running.err = cmd.Wait()
		close(running.done)
	}()
	s.processes = append(s.processes, running)
	return nil
}

// once runs a program to its end.
func (s *Server) once(ctx context.Context, p programs, path string, args ...string) error {
	cmd, err := s.command(ctx, p, nil, path, args...)
	if err != nil {
		return err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("running %s: %w: %s", filepath.Base(path), err, out)
	}
	return nil
}

// command prepares a program that dies with us.
func (s *Server) command(ctx context.Context, p programs, env []string, path string, args ...string) (*exec.Cmd, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir, cmd.Env = s.Dir, append(p.environment(s.Dir), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = stopTimeout
	uid, gid, err := servant()
	if err != nil || uid == os.Getuid() {
		return cmd, err
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	return cmd, filepath.WalkDir(s.Dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
}

// servant is the user as which servers run.
func servant() (uid, gid int, err error) {
	if os.Getuid() != 0 {
		return os.Getuid(), os.Getgid(), nil
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		return 0, 0, fmt.Errorf("finding the user for servers: %w", err)
	}
	if uid, err = strconv.Atoi(nobody.Uid); err == nil {
		gid, err = strconv.Atoi(nobody.Gid)
	}
	return uid, gid, err
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop asks the program to end, and ends its group when it does not.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // also what it left behind
	<-p.done
}

// write writes a file of the server's folder.
func (s *Server) write(name, content string, mode fs.FileMode) (path string, err error) {
	path = filepath.Join(s.Dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", fmt.Errorf("writing %s: %w", name, err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		return "", fmt.Errorf("writing %s: %w", name, err)
	}
	return path, nil
}

// freePort returns a port of the address at which nothing listens now. It is below
// those that the system gives to outgoing connections: one of these could take it
// before the server does.
func freePort(host string) (port int, err error) {
	for range 50 {
		port = 20000 + rand.IntN(12000)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("finding a free port: %w", err)
}
