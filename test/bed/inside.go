//go:build linux

package bed

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dial connects from inside the bed's network, so it reaches the load balancer,
// every node and every pod. The host of addr may be a node's name. The socket
// stays in that network; the caller's goroutine never leaves its own.
func (c *Cluster) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if n, err := c.Node(host); err == nil {
		host = n.IP
	}
	if net.ParseIP(host) == nil { // the names of this machine's network mean nothing in there
		return nil, fmt.Errorf("dialling in bed %s: %q is neither an address nor a node", c.Name, host)
	}
	var conn net.Conn
	err = c.inside(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(host, port))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dialling %s in bed %s: %w", addr, c.Name, err)
	}
	return conn, nil
}

// inside runs do in the bed's network, on a goroutine of its own: its thread may
// have to be thrown away.
func (c *Cluster) inside(do func() error) error {
	done := make(chan error, 1)
	go func() { done <- inNetwork(namespacePath(c.Name, fabric), do) }()
	return <-done
}

// inNetwork runs do on a thread that is in the network namespace. A thread that
// cannot be put back stays locked, and the runtime ends it with the goroutine.
func inNetwork(path string, do func() error) error {
	inside, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("opening the bed's network: %w", err)
	}
	defer inside.Close()
	runtime.LockOSThread()
	outside, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer outside.Close()
	if err := unix.Setns(int(inside.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering the bed's network: %w", err)
	}
	err = do()
	if unix.Setns(int(outside.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}

// Exec runs a shell script as root on the node and returns what it printed to
// standard output. It does not use the network, so it also works when the
// certificates, or sshd, do not. When ctx ends before the script, so does the
// script.
func (c *Cluster) Exec(ctx context.Context, node, script string) (string, error) {
	cmd, err := c.command(ctx, node, script)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("running a script on %s: %w\n%s", node, err, tail(stderr.String(), 10))
	}
	return stdout.String(), nil
}

// command is a script on the node, not yet started.
func (c *Cluster) command(ctx context.Context, node, script string) (*exec.Cmd, error) {
	leader, err := c.leader(node)
	if err != nil {
		return nil, err
	}
	groups, err := execGroups(c.Name, node)
	if err != nil {
		return nil, err
	}
	args := entered("", groups, "nsenter", "--target", strconv.Itoa(leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd",
		"--", "env", "-i", "HOME=/root", "LANG=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"KUBECONFIG="+c.adminKubeconfig(), "bash", "-c", script)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) } // nsenter and what it runs
	cmd.WaitDelay = time.Second                                                    // a daemon that the script left may hold the pipes
	return cmd, nil
}

// execGroups are the groups that a script on the node joins. In version 2 the
// machine's own group may not hold processes, and the script stays outside.
func execGroups(bed, node string) ([]string, error) {
	h, err := findHierarchies()
	if err != nil || h.unified {
		return nil, err
	}
	var groups []string
	for _, top := range h.dirs {
		groups = append(groups, filepath.Join(top, groupOf(bed), node))
	}
	return groups, nil
}

// place writes a file to the machine's disk, from a template.
func (b *builder) place(n Node, path, template string, s scene) error {
	text, err := render(template, s)
	if err != nil {
		return err
	}
	return b.put(n, path, text, 0o644)
}

// put writes a file to the machine's disk. The machine is running, and what is
// written to an overlay's layers behind its back it need not see: so it goes
// through the machine's own root.
func (b *builder) put(n Node, path, text string, mode os.FileMode) error {
	leader, err := b.leader(n.Name)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(fmt.Sprintf("/proc/%d/root", leader), path), text, mode)
}

// StepError is a step that failed on one machine.
type StepError struct {
	Machine string
	Step    string
	Log     string // the last lines of what it printed
	Err     error
}

func (e *StepError) Error() string {
	s := fmt.Sprintf("%s, %s: %v", e.Machine, e.Step, e.Err)
	if e.Log != "" {
		s += "; its last lines:\n" + e.Log
	}
	return s
}

// Unwrap returns the reason.
func (e *StepError) Unwrap() error { return e.Err }

// run runs a script as a step of Up; what it prints goes to log/NODE.STEP.log.
func (b *builder) run(ctx context.Context, node, step, script string) error {
	name := b.logFile(node + "." + strings.ReplaceAll(step, " ", "-"))
	log, err := os.Create(name)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd, err := b.command(ctx, node, script)
	if err != nil {
		return &StepError{Machine: node, Step: step, Err: err}
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause // rather than that the script was killed
		}
		printed, _ := os.ReadFile(name) // the reason counts, with or without
		return &StepError{Machine: node, Step: step, Log: tail(string(printed), 25), Err: err}
	}
	return nil
}

// until repeats the script until it succeeds: a step that waits.
func (b *builder) until(ctx context.Context, within time.Duration, node, step, script string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not within %s", within))
	defer cancel()
	for {
		printed, err := b.Exec(ctx, node, script)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return &StepError{Machine: node, Step: step, Log: tail(printed, 25), Err: fmt.Errorf("%w (last: %w)", context.Cause(ctx), err)}
		case <-time.After(200 * time.Millisecond):
		}
	}
}
