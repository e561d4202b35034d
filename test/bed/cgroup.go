//go:build linux

package bed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchies are the mount points of control groups on this machine: several
// where version 1 is in use, one otherwise.
type hierarchies struct {
	dirs    []string
	unified bool // version 2 alone. UNTESTED: written after its documentation, never run
}

func findHierarchies() (hierarchies, error) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return hierarchies{}, err
	}
	h := hierarchies{unified: true}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // device, mount point, type, options
		if len(f) < 3 || !strings.HasPrefix(f[2], "cgroup") {
			continue
		}
		if f[2] == "cgroup" {
			h.unified = false
		}
		if !slices.Contains(h.dirs, f[1]) {
			h.dirs = append(h.dirs, f[1])
		}
	}
	if len(h.dirs) == 0 {
		return h, errors.New("no control groups are mounted on this machine")
	}
	return h, nil
}

// groupOf is the directory of a bed's groups, in every hierarchy.
func groupOf(bed string) string { return "keyfleet-bed." + bed }

// makeGroup makes the group of one machine of a bed in every hierarchy and
// returns the directories.
func makeGroup(bed, machine string) ([]string, error) {
	h, err := findHierarchies()
	if err != nil {
		return nil, err
	}
	var made []string
	for _, top := range h.dirs {
		parent := filepath.Join(top, groupOf(bed))
		for _, dir := range []string{parent, filepath.Join(parent, machine)} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return nil, fmt.Errorf("making a control group: %w", err)
			}
			if err := openGroup(dir); err != nil {
				return nil, fmt.Errorf("setting up the control group %s: %w", dir, err)
			}
		}
		if h.unified {
			if err := delegate(top, parent); err != nil {
				return nil, err
			}
		}
		made = append(made, filepath.Join(parent, machine))
	}
	return made, nil
}

// openGroup gives a group of the cpuset hierarchy what its parent has: until
// then no process can enter it.
func openGroup(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		own := filepath.Join(dir, name)
		if b, err := os.ReadFile(own); errors.Is(err, fs.ErrNotExist) || strings.TrimSpace(string(b)) != "" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // version 2: an empty set is inherited
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(own, b, 0o644); err != nil {
			return err
		}
	}
	clone := filepath.Join(dir, "cgroup.clone_children")
	if _, err := os.Stat(filepath.Join(dir, "cpuset.cpus")); err != nil {
		return nil
	}
	if _, err := os.Stat(clone); err != nil {
		return nil
	}
	return os.WriteFile(clone, []byte("1"), 0o644)
}

// delegate hands the controllers of version 2 down to the machines. UNTESTED.
func delegate(top, parent string) error {
	b, err := os.ReadFile(filepath.Join(top, "cgroup.controllers"))
	if err != nil {
		return err
	}
	var enable []string
	for _, c := range strings.Fields(string(b)) {
		enable = append(enable, "+"+c)
	}
	for _, dir := range []string{top, parent} {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(strings.Join(enable, " ")), 0o644); err != nil {
			return fmt.Errorf("delegating control groups in %s: %w", dir, err)
		}
	}
	return nil
}

// groupTrees are the bed's directories in every hierarchy, deepest first; none
// when the bed has no groups.
func groupTrees(bed string) ([]string, error) {
	h, err := findHierarchies()
	if err != nil {
		return nil, err
	}
	var all []string
	for _, top := range h.dirs {
		root := filepath.Join(top, groupOf(bed))
		err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // a group may go while we look
			}
			if err == nil && d.IsDir() {
				all = append(all, name)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("reading control groups: %w", err)
		}
	}
	slices.Reverse(all)
	return all, nil
}

// members are the processes in the groups, of all machines of the bed.
func members(groups []string) ([]int, error) {
	seen := map[int]bool{}
	for _, dir := range groups {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, word := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil && pid > 0 {
				seen[pid] = true
			}
		}
	}
	var pids []int
	for pid := range seen {
		pids = append(pids, pid)
	}
	return pids, nil
}

// thaw lets go what a test has frozen: in version 1 a frozen process does not die.
func thaw(groups []string) error {
	for _, dir := range groups {
		state := filepath.Join(dir, "freezer.state")
		if b, err := os.ReadFile(state); err != nil || strings.TrimSpace(string(b)) == "THAWED" {
			continue
		}
		if err := os.WriteFile(state, []byte("THAWED"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("thawing %s: %w", dir, err)
		}
	}
	return nil
}

// endGroups kills what is in the bed's groups until nothing is, and removes the
// groups. SIGKILL at once: the disks are about to be removed too.
func endGroups(ctx context.Context, bed string) error {
	for {
		groups, err := groupTrees(bed)
		if err != nil || len(groups) == 0 {
			return err
		}
		if err := thaw(groups); err != nil {
			return err
		}
		pids, err := members(groups)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("ending process %d: %w", pid, err)
			}
		}
		if len(pids) == 0 {
			for _, dir := range groups {
				_ = os.Remove(dir) // busy while the kernel buries the dead: the next round gets it
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("ending the processes of bed %s, %d are left: %w", bed, len(pids), ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
