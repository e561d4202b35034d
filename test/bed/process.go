//go:build linux

package bed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// enterScript puts the shell into control groups, writes down its process id and
// start time, and becomes the command. So a process is accounted for before it
// is what it is, and nobody has to be alive to do it afterwards.
// Arguments: FILE ("" for none), GROUP..., --, COMMAND...
const enterScript = `record=$1; shift
while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done
shift
[ -z "$record" ] || { echo "$$ $(cut -d' ' -f22 /proc/$$/stat)" >"$record.new" && mv "$record.new" "$record"; }
exec "$@"`

// entered is the argument list that runs argv by way of [enterScript].
func entered(recordFile string, groups []string, argv ...string) []string {
	args := append([]string{"sh", "-ec", enterScript, "sh", recordFile}, groups...)
	return append(append(args, "--"), argv...)
}

// start starts a process of the bed that outlives this one, as the machine's or
// as one of the fabric. It is recorded in process/NAME and prints to log/NAME.log.
// It has the files as its descriptors from 3 on.
func (c *Cluster) start(machine, name string, argv, env []string, files ...*os.File) error {
	groups, err := makeGroup(c.Name, machine)
	if err != nil {
		return err
	}
	for _, dir := range []string{"process", "log"} {
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return err
		}
	}
	log, err := os.OpenFile(c.logFile(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := entered(c.path("process", name), groups, argv...)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, env...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = log, log, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // an interrupt from the terminal is for Up, which ends it in order
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", name, err)
	}
	go func() { _ = cmd.Wait() }() // ends with the process; without it Down in this process would leave a zombie
	return nil
}

func (c *Cluster) logFile(name string) string { return c.path("log", name+".log") }

// process is one that a bed started, named so that it cannot be mistaken for a
// later one with the same number.
type process struct {
	pid   int
	start string // clock ticks after boot, field 22 of /proc/PID/stat
}

// readProcess reads what [enterScript] wrote.
func readProcess(file string) (process, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return process{}, err
	}
	var p process
	if _, err := fmt.Sscan(string(b), &p.pid, &p.start); err != nil {
		return process{}, fmt.Errorf("reading %s: %w", file, err)
	}
	return p, nil
}

// alive reports whether the process is still the one that was started.
func (p process) alive() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
	if err != nil {
		return false
	}
	_, rest, ok := strings.Cut(string(b), ") ") // after the name, which may hold anything
	f := strings.Fields(rest)
	return ok && len(f) > 19 && f[0] != "Z" && f[19] == p.start
}

// kill ends the process if it is still the one that was started.
func (p process) kill() error {
	if !p.alive() {
		return nil
	}
	if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("ending process %d: %w", p.pid, err)
	}
	return nil
}

// recorded are the processes that the folder knows.
func recorded(dir string) ([]process, error) {
	files, err := filepath.Glob(filepath.Join(dir, "process", "*"))
	if err != nil {
		return nil, err
	}
	var all []process
	for _, file := range files {
		if p, err := readProcess(file); err == nil { // a half-written file's process is in the bed's control group
			all = append(all, p)
		}
	}
	return all, nil
}

// leader is the first process of a machine: the only child of its systemd-nspawn.
func (c *Cluster) leader(node string) (int, error) {
	p, err := readProcess(filepath.Join(c.Dir, "process", node))
	if err != nil {
		return 0, fmt.Errorf("finding machine %s: %w", node, err)
	}
	if !p.alive() {
		return 0, fmt.Errorf("machine %s has ended", node)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.pid, p.pid))
	if err != nil {
		return 0, fmt.Errorf("finding machine %s: %w", node, err)
	}
	for _, word := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			continue
		}
		if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.TrimSpace(string(name)) == "systemd" {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("machine %s has not booted", node)
}
