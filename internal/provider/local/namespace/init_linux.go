package namespace

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/internal/effect"
)

// Files that a node's first process gets from [Start].
const (
	lockFD  = 3 // the node's lock; held until this process ends
	readyFD = 4 // pipe: one JSON report, then closed
)

// probeArg as second argument makes [Init] build everything and stop there.
const probeArg = "--probe"

// report is what the first process tells Start: a failed step, or none.
type report struct {
	Step  string        `json:"step,omitempty"`
	Error string        `json:"error,omitempty"`
	Errno syscall.Errno `json:"errno,omitempty"`
}

// Init is the first process of a node (PID 1 of its namespace): it builds the
// root and the network, starts the agent and starts it again when it dies,
// carries the bytes between the agent and the server, and reaps orphans. args
// is the node's folder, then optionally [probeArg]. It returns the exit status
// of the process; the kernel then ends every other process of the node.
func Init(args []string) int {
	runtime.LockOSThread() // capabilities are a thread's; the agent is forked from this one
	debug.SetGCPercent(25) // this process idles: keep its heap near 1 MB
	if len(args) == 0 || os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "keyfleet-agent local-init is started by the local provider, as first process of a node.")
		return 2
	}
	unix.CloseOnExec(lockFD)
	unix.CloseOnExec(readyFD)
	probe := len(args) > 1 && args[1] == probeArg
	n, err := setUp(Folder(args[0]))
	tell(err)
	if err != nil {
		fmt.Fprintln(os.Stderr, "local-init:", err)
		return 1
	}
	if probe {
		return 0
	}
	debug.FreeOSMemory() // what building needed is not needed again
	return supervise(n)
}

// setUp turns fresh namespaces into the node of folder f.
func setUp(f Folder) (Node, error) {
	if err := writePID(f); err != nil {
		return Node{}, err
	}
	n, err := f.Read()
	if err != nil {
		return n, err
	}
	// Everything built from here on lives in this process's namespaces and
	// ends with it, so there is nothing to undo.
	if err := buildRoot(f, n); err != nil {
		return n, err
	}
	if err := unix.Sethostname([]byte(n.ID)); err != nil {
		return n, &stepError{Step: "set host name", Err: err}
	}
	if err := setUpLoopback(); err != nil {
		return n, &stepError{Step: "set up the network", Err: err}
	}
	for _, port := range n.Ports {
		if err := forward(port); err != nil {
			return n, &stepError{Step: "forward to the server", Err: err}
		}
	}
	if n.HostRoot {
		if err := dropCapabilities(); err != nil {
			return n, &stepError{Step: "drop capabilities", Err: err}
		}
	}
	return n, nil
}

// writePID records this process as the machine outside sees it: /proc is
// still the outside one, and its "self" names us by the number that counts there.
func writePID(f Folder) error {
	pid, err := os.Readlink("/proc/self")
	if err != nil {
		return &stepError{Step: "read own process id", Err: err}
	}
	start, err := startTime(pid)
	if err != nil {
		return &stepError{Step: "read own start time", Err: err}
	}
	return WriteFile(f.path("pid"), []byte(pid+" "+start+"\n"), 0o600)
}

// startTime returns the start time of a process in clock ticks since boot,
// field 22 of /proc/PID/stat (proc_pid_stat(5)): with the number, it names a
// process for ever. A process that has ended and only waits to be collected is
// os.ErrProcessDone.
func startTime(pid string) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return "", err
	}
	// The command in field 2 may hold spaces and brackets; it ends at the last bracket.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("unexpected form of /proc/%s/stat", pid)
	}
	if state := fields[0]; state == "Z" || state == "X" {
		return "", os.ErrProcessDone
	}
	return fields[19], nil
}

// tell reports the outcome of setUp to Start, which may be gone by now: then
// nobody listens, the node goes on, and the next Start finds it running.
func tell(err error) {
	pipe := os.NewFile(readyFD, "ready")
	var r report
	if err != nil {
		r = report{Step: "start", Error: err.Error()}
		var step *stepError
		if errors.As(err, &step) {
			r.Step, r.Error = step.Step, step.Err.Error()
		}
		_ = errors.As(err, &r.Errno)
	}
	_ = json.NewEncoder(pipe).Encode(r)
	_ = pipe.Close()
}

// readReport reads what tell wrote; an empty pipe means that the process died.
func readReport(r io.Reader) error {
	var rep report
	if err := json.NewDecoder(r).Decode(&rep); err != nil {
		return fmt.Errorf("the node's first process ended before it was ready: %w", err)
	}
	if rep.Error == "" {
		return nil
	}
	return &stepError{Step: rep.Step, Err: &reported{text: rep.Error, errno: rep.Errno}}
}

// reported is an error of the node's first process, as it said it.
type reported struct {
	text  string
	errno syscall.Errno // 0: none
}

func (e *reported) Error() string { return e.text }

func (e *reported) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// takenAway are the capabilities that a root node must not have: with them it
// could change the kernel, the clock, the disks or the mounts of this machine.
// In a user namespace they mean nothing and are left.
var takenAway = []uintptr{
	unix.CAP_SYS_MODULE, unix.CAP_SYS_RAWIO, unix.CAP_SYS_TIME, unix.CAP_SYS_BOOT, unix.CAP_SYS_ADMIN, unix.CAP_MKNOD,
	unix.CAP_SYSLOG, unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_MAC_ADMIN, unix.CAP_MAC_OVERRIDE, unix.CAP_AUDIT_CONTROL,
	unix.CAP_AUDIT_READ, unix.CAP_WAKE_ALARM, unix.CAP_BLOCK_SUSPEND, unix.CAP_DAC_READ_SEARCH, unix.CAP_LINUX_IMMUTABLE,
}

// dropCapabilities takes them from the bounding set, so that no program
// started from this thread can get them (capabilities(7)).
func dropCapabilities() error {
	for _, c := range takenAway {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: older kernels know fewer
			return err
		}
	}
	return nil
}

// restartDelay is how long to wait before the agent is started again, given
// how long it lived and how long the last wait was.
func restartDelay(lived, last time.Duration) time.Duration {
	const first, most, healthy = 50 * time.Millisecond, 10 * time.Second, 30 * time.Second
	if last == 0 || lived > healthy {
		return first
	}
	return min(2*last, most)
}

// grace is how long the agent may take to end when the node is restarted.
const grace = 3 * time.Second

// supervise keeps the agent running until the node is told to end (SIGTERM).
func supervise(n Node) int {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	var (
		agent   int
		started time.Time
		delay   time.Duration
		ending  bool
		start   = time.After(0)
		giveUp  <-chan time.Time
	)
	for {
		select {
		case <-start:
			started = time.Now()
			var err error
			if agent, err = startAgent(n); err != nil {
				fmt.Fprintln(os.Stderr, "local-init: starting the agent:", err)
				delay = restartDelay(0, delay)
				start = time.After(delay)
			}
		case <-giveUp:
			return 0
		case s := <-signals:
			if s != syscall.SIGCHLD {
				ending, giveUp = true, time.After(grace)
				if agent == 0 || syscall.Kill(agent, syscall.SIGTERM) != nil {
					return 0
				}
				continue
			}
			status, ended := reap(agent)
			if !ended {
				continue
			}
			agent = 0
			if ending {
				return 0
			}
			if status.Exited() && status.ExitStatus() == exitReboot {
				fmt.Fprintln(os.Stderr, "local-init: restarting the node")
				if err := reboot(); err != nil {
					fmt.Fprintln(os.Stderr, "local-init: restarting the node:", err)
				}
				start = time.After(0)
				continue
			}
			delay = restartDelay(time.Since(started), delay)
			fmt.Fprintf(os.Stderr, "local-init: the agent ended (%s); starting it again in %s\n", describe(status), delay)
			start = time.After(delay)
		}
	}
}

// exitReboot is the exit status with which the agent asks for a restart of the node.
const exitReboot = 75

// reboot does to a node what a reboot does to a machine: every process ends,
// and what starts next finds another boot id. The files stay.
func reboot() error {
	// From PID 1 "-1" means every other process of the node (kill(2)).
	if err := syscall.Kill(-1, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return os.WriteFile(bootIDPath, []byte(newUUID()+"\n"), 0o444) // in place: the file is mounted over the kernel's
}

// startAgent starts the agent in a session of its own.
func startAgent(n Node) (pid int, err error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	env := append([]string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8",
	}, n.Env...)
	err = effect.Do("start agent", func() error {
		pid, err = syscall.ForkExec(agentPath, append([]string{agentPath}, n.Args...), &syscall.ProcAttr{
			Dir: "/", Env: env, Files: []uintptr{null.Fd(), 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
		})
		return err
	})
	return pid, err
}

// reap collects every child that has ended, orphans of the node included, and
// says whether the agent was among them.
func reap(agent int) (status syscall.WaitStatus, ended bool) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return status, ended
		}
		if pid == agent {
			status, ended = ws, true
		}
	}
}

func describe(ws syscall.WaitStatus) string {
	if ws.Signaled() {
		return "signal " + ws.Signal().String()
	}
	return fmt.Sprintf("status %d", ws.ExitStatus())
}
