package namespace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Check builds a node without an agent in a temporary folder and takes it down
// again: what it says is what Start would meet. agent is the path of the
// keyfleet-agent program. The error is a *fault.Error with the exact reason and
// what to change.
func Check(ctx context.Context, agent string) error {
	if _, err := exec.LookPath(agent); err != nil {
		return fault.New(fault.Unavailable, "AgentMissing", "The program keyfleet-agent is not at %s.", agent).
			WithFix("Build it (make build) or name it with --agent.").Because(err)
	}
	dir, err := os.MkdirTemp("", "keyfleet-check-")
	if err != nil {
		return fmt.Errorf("making a temporary folder: %w", err)
	}
	defer os.RemoveAll(dir)
	f, socketDir := Folder(filepath.Join(dir, "check")), filepath.Join(dir, "run")
	if err := os.Mkdir(socketDir, 0o700); err != nil {
		return fmt.Errorf("making a temporary folder: %w", err)
	}
	n := Node{ID: "check", Agent: agent, SocketDir: socketDir, Ports: []int{443}, HostRoot: os.Geteuid() == 0}
	if err := f.Prepare(n); err != nil {
		return err
	}
	lock, err := f.tryLock()
	if err != nil {
		return err
	}
	defer lock.Release()
	return Explain(f.launch(ctx, n, lock, nil, probeArg))
}

// facts are what this machine says about its rules for namespaces.
type facts struct {
	Root          bool
	MaxUserNS     string // user.max_user_namespaces
	Unprivileged  string // kernel.unprivileged_userns_clone (Debian's patch)
	AppArmor      string // kernel.apparmor_restrict_unprivileged_userns (Ubuntu 23.10 and later)
	Container     bool   // this process is itself in a container
	SysAdmin      bool   // this process has CAP_SYS_ADMIN
	SeccompFilter bool   // system calls of this process are filtered
}

func readFacts() facts {
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	f := facts{
		Root:         os.Geteuid() == 0,
		MaxUserNS:    read("/proc/sys/user/max_user_namespaces"),
		Unprivileged: read("/proc/sys/kernel/unprivileged_userns_clone"),
		AppArmor:     read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
	}
	for _, mark := range []string{"/.dockerenv", "/run/.containerenv"} {
		if _, err := os.Stat(mark); err == nil {
			f.Container = true
		}
	}
	for line := range strings.Lines(read("/proc/self/status")) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "Seccomp":
			f.SeccompFilter = value == "2"
		case "CapEff":
			var caps uint64
			_, _ = fmt.Sscanf(value, "%x", &caps)
			f.SysAdmin = caps&(1<<unix.CAP_SYS_ADMIN) != 0
		}
	}
	return f
}

// Explain turns an error of [Start] into a fault that names the rule of this
// machine that forbids local nodes, and the fix. Other errors, and nil, come
// back as they are.
func Explain(err error) error {
	var step *stepError
	if !errors.As(err, &step) {
		return err
	}
	return explain(step, readFacts())
}

// explain decides from the failed step and the machine's rules.
func explain(step *stepError, m facts) error {
	refuse := func(reason, fix string) error {
		return fault.New(fault.Unavailable, "LocalNodesForbidden", "This machine does not let Keyfleet make nodes from namespaces: %s (%s).", reason, step).
			WithFix("%s", fix).Because(step.Err)
	}
	const container = "Start the container with --privileged, or run Keyfleet on the machine itself."
	denied := errors.Is(step.Err, unix.EPERM) || errors.Is(step.Err, unix.EACCES)
	switch {
	case step.Step == "create namespaces" && errors.Is(step.Err, unix.ENOSPC) && m.MaxUserNS == "0",
		!m.Root && m.MaxUserNS == "0":
		return refuse("user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=15000, or run the server as root.")
	case step.Step == "create namespaces" && errors.Is(step.Err, unix.ENOSPC):
		return refuse("a limit on the number of namespaces is reached", "Raise the limits user.max_*_namespaces, or stop other containers.")
	case !m.Root && m.Unprivileged == "0":
		return refuse("kernel.unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1, or run the server as root.")
	case !m.Root && m.AppArmor == "1" && denied:
		return refuse("AppArmor takes all rights from user namespaces of ordinary users (kernel.apparmor_restrict_unprivileged_userns is 1)",
			"sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or run the server as root.")
	case m.Root && !m.SysAdmin && denied:
		return refuse("this root user lacks CAP_SYS_ADMIN, as in most containers", container)
	case step.Step == "mount proc" && denied:
		return refuse("parts of /proc are hidden here, so the kernel allows no second one", container)
	case step.Step == "create namespaces" && denied && (m.Container || m.SeccompFilter):
		return refuse("the system calls of this container are filtered (seccomp)", container)
	case step.Step == "change the root" && errors.Is(step.Err, unix.EINVAL):
		return refuse("the root of this machine cannot be changed (it is an initial RAM disk)", "Run Keyfleet from a root file system on a disk.")
	case step.Step == "create namespaces" && denied:
		return refuse("the kernel refuses to create them (this may be a chroot, or a security module)",
			"Run the server as root on the machine itself, outside a chroot.")
	}
	return fault.New(fault.Unavailable, "LocalNodeFailed", "A node could not be built on this machine: %s.", step).
		WithFix("Run keyfleet doctor for a full check of this machine.").Because(step.Err)
}
