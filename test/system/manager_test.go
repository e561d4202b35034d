//go:build linux

package system

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/test/stack"
)

// TestServerRunsManager: a server looks after clusters by a child of its own, which is
// there only while a cluster is registered, is started again when it dies, has its
// login in no argument, no variable and no file, and never outlives the server.
func TestServerRunsManager(t *testing.T) {
	r := &registered{kube: kubetest.Start(t), home: t.TempDir()}
	r.system = start(t, stack.Config{Child: true})
	r.connect(t)
	r.group("rg")
	if ids := r.children(t); len(ids) > 0 {
		t.Errorf("a server without clusters has the children %v", ids)
	}
	kubeconfig := filepath.Join(r.home, "kubeconfig")
	if err := os.WriteFile(kubeconfig, r.kube.TokenKubeconfig(t, r.managerAccount(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	r.keyfleet(t, 0, "cluster", "register", "prod", "--kubeconfig", kubeconfig)
	r.becomes(t, "Succeeded", "")
	first := r.child(t, 0)
	r.loginIsNowhere(t, first)

	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second := r.child(t, first)
	r.Kill()
	r.gone(t, second)
	if err := r.Run(); err != nil {
		t.Fatal(err)
	}
	third := r.child(t, 0)
	r.becomes(t, "Succeeded", "")
	r.keyfleet(t, 0, "cluster", "delete", "prod", "--yes")
	r.gone(t, third)
}

// children are the processes whose parent is the server.
func (r *registered) children(t *testing.T) []int {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// pid (name) state ppid: the name may have blanks and brackets.
		_, rest, _ := strings.Cut(string(text[strings.LastIndexByte(string(text), ')'):]), " ")
		if f := strings.Fields(rest); len(f) > 1 && f[0] != "Z" && f[1] == strconv.Itoa(r.PID()) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, pid)
		}
	}
	return out
}

// child waits for the one child of the server that is not the old one.
func (r *registered) child(t *testing.T, old int) (pid int) {
	t.Helper()
	stack.Eventually(t, time.Minute, "the server has a manager", func(context.Context) error {
		ids := slices.DeleteFunc(r.children(t), func(p int) bool { return p == old })
		if len(ids) != 1 {
			return fmt.Errorf("the server has the children %v", ids)
		}
		pid = ids[0]
		return nil
	})
	return pid
}

// gone waits until a process has ended.
func (r *registered) gone(t *testing.T, pid int) {
	t.Helper()
	stack.Eventually(t, time.Minute, "the manager has ended", func(context.Context) error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(text), "keyfleet-connector") {
			return errors.New("it runs")
		}
		return nil
	})
}

// loginIsNowhere looks for a client secret in what the system shows of a process, and
// in the server's folder, where only the first administrator's is.
func (r *registered) loginIsNowhere(t *testing.T, pid int) {
	t.Helper()
	for _, file := range []string{"cmdline", "environ"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "keyfleet") && file == "cmdline" {
			t.Errorf("%q is not the manager", text)
		}
		if strings.Contains(string(text), "kf_") {
			t.Errorf("a client secret is in its %s", file)
		}
	}
	if err := filepath.WalkDir(r.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == "admin.json" {
			return nil // files of the store come and go
		}
		text, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(text), `"clientSecret"`) {
			t.Errorf("a login is in %s", path)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
