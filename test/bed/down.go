//go:build linux

package bed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// registry is the list of beds on this machine: a file NAME per bed that holds
// the path of its folder. It is in /run because what it speaks of ends when the
// machine does.
const registry = "/run/keyfleet-bed"

// sysctlFile holds the settings of the kernel from before the first bed.
const sysctlFile = "sysctls.json"

// inotifyInstances is how many watches of files one user may have. A machine
// takes thirty and all are root's: with the usual 128 the second bed's kubelets
// would not start, and programs would not see new certificates at once.
const (
	inotifyInstances = "fs/inotify/max_user_instances"
	enoughInstances  = 8192
)

// sysctls are the settings of the one kernel that beds change: kubelet the first
// three, [claim] the last.
func sysctls() []string {
	return []string{"kernel/panic", "kernel/panic_on_oops", "vm/overcommit_memory", inotifyInstances}
}

// claim makes the bed's folder and takes its name, before anything else is made.
func claim(name, dir string) error {
	if os.Getuid() != 0 {
		return errors.New("a bed needs root: it makes namespaces, control groups and mounts")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return errors.Join(err, fmt.Errorf("the folder %s is not empty: is the bed up, or was it left behind? take it down first", dir))
	}
	lock, err := lockRegistry()
	if err != nil {
		return err
	}
	defer lock.Close()
	if other, err := os.ReadFile(filepath.Join(registry, name)); err == nil {
		_ = os.Remove(dir) // empty, and of no use
		return fmt.Errorf("there is a bed %s already, in %s: take it down first", name, other)
	}
	if names, err := registered(); err != nil || len(names) == 0 {
		if err := errors.Join(err, saveSysctls()); err != nil {
			return err
		}
	}
	if err := writeJSON(filepath.Join(dir, recordFile), record{Name: name}); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(registry, name), []byte(dir), 0o644); err != nil {
		return err
	}
	return allowWatches()
}

func allowWatches() error {
	file := filepath.Join("/proc/sys", inotifyInstances)
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading a setting of the kernel: %w", err)
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && now >= enoughInstances {
		return nil
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(enoughInstances)), 0o644); err != nil {
		return fmt.Errorf("allowing more watches of files: %w", err)
	}
	return nil
}

// Down ends everything that the bed in the folder started, removes everything
// that it made, and the folder. It may be called again, and after an Up that was
// killed; without a folder it does nothing. It ends nothing gently: a bed has
// nothing to lose.
func Down(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	name, err := bedIn(dir)
	if err != nil || name == "" {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	processes, err := recorded(dir)
	if err != nil {
		return err
	}
	for _, p := range processes {
		if err := p.kill(); err != nil {
			return err
		}
	}
	if err := endGroups(ctx, name); err != nil {
		return err
	}
	if err := removeNamespaces(ctx, name); err != nil {
		return err
	}
	if err := removeFolder(dir); err != nil {
		return err
	}
	return release(name, dir)
}

// removeNamespaces removes the network namespaces that carry the bed's name.
func removeNamespaces(ctx context.Context, name string) error {
	all, err := filepath.Glob(namespacePath(name, "*"))
	if err != nil {
		return err
	}
	for _, path := range all {
		if err := ip(ctx, "netns delete "+filepath.Base(path)); err != nil {
			return err
		}
	}
	return nil
}

// removeFolder removes the bed's folder, the record last: a Down that is
// interrupted can be repeated.
func removeFolder(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if e.Name() == recordFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("removing the bed's folder: %w", err)
		}
	}
	return nil
}

// release gives the name back; the last bed of the machine restores the kernel's
// settings.
func release(name, dir string) error {
	lock, err := lockRegistry()
	if err != nil {
		return err
	}
	defer lock.Close()
	entry := filepath.Join(registry, name)
	if b, err := os.ReadFile(entry); err == nil && string(b) == dir {
		if err := os.Remove(entry); err != nil {
			return err
		}
	}
	names, err := registered()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		if err := restoreSysctls(); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

func lockRegistry() (*os.File, error) {
	if err := os.MkdirAll(registry, 0o755); err != nil {
		return nil, err
	}
	return lockFile(filepath.Join(registry, ".lock"))
}

// registered are the names of the beds that are, or may be, up.
func registered() ([]string, error) {
	entries, err := os.ReadDir(registry)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if checkName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// registeredIn is the name of the bed that said it would live in the folder.
func registeredIn(dir string) (string, error) {
	names, err := registered()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for _, name := range names {
		if b, err := os.ReadFile(filepath.Join(registry, name)); err == nil && string(b) == dir {
			return name, nil
		}
	}
	return "", nil
}

func saveSysctls() error {
	values := map[string]string{}
	for _, name := range sysctls() {
		b, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			return fmt.Errorf("reading a setting of the kernel: %w", err)
		}
		values[name] = strings.TrimSpace(string(b))
	}
	return writeJSON(filepath.Join(registry, sysctlFile), values)
}

func restoreSysctls() error {
	file := filepath.Join(registry, sysctlFile)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	values := map[string]string{}
	if err := json.Unmarshal(b, &values); err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	for name, value := range values {
		if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644); err != nil {
			return fmt.Errorf("restoring a setting of the kernel: %w", err)
		}
	}
	return os.Remove(file)
}
