package keyvaultext_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/keyvaultext"
	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
)

// TestKilledAtEveryEffect kills the real service before and after each of its
// outside effects, while it delivers a first version, then a second and a
// third, which retires the first, runs the reload hook for each, and takes
// over leftovers. After every kill it is started again, and the end is the
// same; a reader that loops never sees a mixed, partial or missing file.
func TestKilledAtEveryEffect(t *testing.T) {
	program := binary(t, "killpoints")
	effects, reads := killRun(t, program, "")
	if len(effects) < 20 {
		t.Fatalf("the operation has only %d effects: %v", len(effects), effects)
	}
	points, step := 0, 1
	if testing.Short() {
		step = 5
		t.Logf("short: only every fifth of %d effects", len(effects))
	}
	for i := 0; i < len(effects); i += step {
		for _, when := range []string{"before", "after"} {
			points++
			_, r := killRun(t, program, fmt.Sprintf("%s:%d", when, i+1))
			reads += r
			if t.Failed() {
				t.Fatalf("killed %s effect %d, %q", when, i+1, effects[i])
			}
		}
	}
	kinds := slices.Compact(slices.Sorted(slices.Values(effects)))
	t.Logf("covered %d kill points: %d effects of %d kinds, before and after each; the reader saw %d files, each with its key", points, len(effects), len(kinds), reads)
	for _, kind := range []string{
		"write certificate file", "rename certificate file", "create certificate link", "switch certificate link",
		"write reload hook note", "rename reload hook note", "run reload hook", "remove old certificate file", "remove leftover file",
		"write status file", "rename status file", "create certificate directory", "write service identity",
	} {
		if !slices.Contains(kinds, kind) {
			t.Errorf("the effect %q was not covered", kind)
		}
	}
}

// killRun goes through the operation once and dies at the given point, once.
// It returns the effects of the service's undisturbed life.
func killRun(t *testing.T, program, at string) (effects []string, reads int64) {
	t.Helper()
	vault := keyvaulttest.Start(t)
	v := vault.Renew(host, secret, keyvaulttest.PEM) // there before the start, so that every run has the same effects
	n := newNode(t, vault, program)
	trace := filepath.Join(n.dir, "trace")
	log := filepath.Join(n.dir, "effects")
	n.settings(true, `,"keepVersions":2`, hooked(n, "/bin/sh", "-c", "readlink "+n.store+"/web.pem >> "+trace))
	state := filepath.Join(n.dir, "lib", keyvaultext.HandlerName+".state")
	must(t, os.MkdirAll(state, 0o700))
	must(t, os.WriteFile(filepath.Join(state, ".keyfleet-left"), nil, 0o600)) // an earlier kill

	s := &keptAlive{n: n, env: []string{"KEYFLEET_EFFECT_LOG=" + log, "KEYFLEET_KILL_AT=" + at, "KEYFLEET_KILL_ONCE=" + filepath.Join(n.dir, "once")}}
	s.start()
	defer s.stop()
	stop := n.reader("web.pem")
	var targets []string
	for i := range 3 {
		if i > 0 {
			v = vault.Renew(host, secret, keyvaulttest.PEM)
		}
		s.until("version "+v.ID, func() bool { return strings.Contains(n.target("web.pem"), v.ID) })
		targets = append(targets, n.target("web.pem"))
		s.until("the hook of this version, with its result noted", func() bool {
			notes, _ := filepath.Glob(filepath.Join(state, "hook-*.json"))
			if len(notes) != 1 {
				return false
			}
			var note struct {
				Version  string
				Pending  bool
				ExitCode int
			}
			data, _ := os.ReadFile(notes[0])
			return json.Unmarshal(data, &note) == nil && note.Version == v.ID && !note.Pending && note.ExitCode == 0
		})
		s.until("success with the hook's result", func() bool {
			st := n.status().Status
			return st.Status == extension.StatusSuccess && len(st.Substatus) == 1 && strings.Contains(st.Substatus[0].FormattedMessage.Message, v.ID+", ")
		})
	}
	s.until("two files", func() bool {
		files, _ := filepath.Glob(filepath.Join(n.store, "*.PEM"))
		return len(files) == 2
	})
	reads = stop()
	if at != "" {
		// The last effect is what was waited for above: it shows before the service dies of it.
		s.until("the service's death at "+at, func() bool {
			_, err := os.Stat(filepath.Join(n.dir, "once"))
			return err == nil
		})
	}
	checkEnd(t, n, trace, targets, at)
	for line := range strings.Lines(readText(log)) {
		_, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		effects = append(effects, name)
	}
	return effects, reads
}

// checkEnd compares the end state with that of an undisturbed run.
func checkEnd(t *testing.T, n *node, trace string, targets []string, at string) {
	t.Helper()
	for _, dir := range []string{n.store, filepath.Join(n.base, "status"), filepath.Join(n.dir, "lib", keyvaultext.HandlerName+".state")} {
		if left, _ := filepath.Glob(filepath.Join(dir, ".keyfleet-*")); len(left) > 0 {
			t.Errorf("leftovers: %v", left)
		}
	}
	runs := strings.Split(strings.TrimSpace(readText(trace)), "\n")
	if once := slices.Compact(slices.Clone(runs)); !slices.Equal(once, targets) {
		t.Errorf("the hook saw %v, the link was switched to %v", runs, targets)
	}
	if extra := len(runs) - len(targets); extra > 1 || at == "" && extra != 0 {
		t.Errorf("the hook ran %d times for %d switches", len(runs), len(targets))
	}
}

func readText(path string) string {
	data, _ := os.ReadFile(path)
	return string(data)
}

// keptAlive runs the service and starts it again whenever it has died.
type keptAlive struct {
	n    *node
	env  []string
	cmd  *exec.Cmd
	done chan struct{}
}

func (s *keptAlive) start() {
	s.n.t.Helper()
	s.cmd = exec.Command(s.n.program, "run", "--base", s.n.base, "--sequence", "1")
	s.cmd.Env = append(append([]string{}, s.n.env...), s.env...)
	s.cmd.Stderr = os.Stderr
	must(s.n.t, s.cmd.Start())
	done := make(chan struct{})
	s.done = done
	go func() {
		_ = s.cmd.Wait()
		close(done)
	}()
}

func (s *keptAlive) until(what string, condition func() bool) {
	s.n.t.Helper()
	s.n.eventually(what, func() bool {
		select {
		case <-s.done:
			s.start()
		default:
		}
		return condition()
	})
}

func (s *keptAlive) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(time.Minute):
		_ = s.cmd.Process.Kill()
		s.n.t.Error("the service did not end on SIGTERM")
	}
}

// TestCommandsKilledAtEveryEffect kills each of the handler's commands before
// and after each of its effects. Running the command again leads to the same
// end as an undisturbed run: one service with the newest settings, or none.
func TestCommandsKilledAtEveryEffect(t *testing.T) {
	program := binary(t, "killpoints")
	vault := keyvaulttest.Start(t)
	v := vault.Renew(host, secret, keyvaulttest.PEM)
	cases := []struct {
		command, effect string
		services        int
	}{
		{"update", "mark update", 1},
		{"enable", "end update", 1},
		{"enable", "stop service", 1},
		{"enable", "start service", 1},
		{"disable", "stop service", 0},
		{"uninstall", "stop service", 0},
		{"uninstall", "remove state folder", 0},
	}
	for _, c := range cases {
		for _, when := range []string{"before", "after"} {
			n := newNode(t, vault, program)
			n.settings(false, "", quoted(urlOf))
			n.enable()
			n.delivers(link, v)
			n.settings(true, "", quoted(urlOf))
			if c.effect == "end update" {
				n.command("update")
			}
			if code, _ := n.command(c.command, "KEYFLEET_KILL_AT="+when+":"+c.effect, "KEYFLEET_KILL_ONCE="+filepath.Join(n.dir, "once")); code == 0 {
				t.Fatalf("%s was not killed %s %q", c.command, when, c.effect)
			}
			if code, out := n.command(c.command); code != 0 {
				t.Fatalf("%s again, after a kill %s %q: %s", c.command, when, c.effect, out)
			}
			if c.services == 1 {
				n.enable()
				n.eventually("success", func() bool { return n.status().Status.Status == extension.StatusSuccess })
			}
			pids := servicesOf(n)
			if len(pids) != c.services || c.services == 1 && pids[0] != n.servicePID() {
				t.Errorf("%s killed %s %q: services %v, the lock names %d", c.command, when, c.effect, pids, n.servicePID())
			}
			if !strings.Contains(n.target(link), v.ID) {
				t.Errorf("%s killed %s %q: the certificate is gone", c.command, when, c.effect)
			}
		}
	}
	t.Logf("covered %d kill points of the handler's commands", 2*len(cases))
}

// TestServiceIsSeenAsSoonAsItIsStarted: an enable command dies when it has started the
// service, which has not said who it is yet. The next command ends it all the same.
func TestServiceIsSeenAsSoonAsItIsStarted(t *testing.T) {
	program := binary(t, "killpoints")
	vault := keyvaulttest.Start(t)
	vault.Renew(host, secret, keyvaulttest.PEM)
	for range 10 {
		n := newNode(t, vault, program)
		n.settings(false, "", quoted(urlOf))
		if code, _ := n.command("enable", "KEYFLEET_KILL_AT=after:start service"); code == 0 {
			t.Fatal("enable was not killed")
		}
		if code, out := n.command("disable"); code != 0 {
			t.Fatalf("disable: %s", out)
		}
		if pids := servicesOf(n); len(pids) > 0 {
			t.Fatalf("after disable these services run: %v", pids)
		}
	}
}

// servicesOf finds the processes that run the node's service, by their arguments.
func servicesOf(n *node) []int {
	var out []int
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if argv := readText(f); strings.Contains(argv, "run\x00--base\x00"+n.base+"\x00") {
			var pid int
			if _, err := fmt.Sscanf(f, "/proc/%d/cmdline", &pid); err == nil {
				out = append(out, pid)
			}
		}
	}
	return out
}
