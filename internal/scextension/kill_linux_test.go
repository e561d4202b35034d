package scextension

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// TestKilledAtEveryEffect kills the real operator before and after each of its
// effects while a connection is made, changed, repaired twice and removed, and
// another one made and removed with its objects kept. After every kill it is started
// again, and the end is the same: nothing is left, doubled or counted twice.
func TestKilledAtEveryEffect(t *testing.T) {
	b := newBed(t)
	b.install(t)
	b.classes(t)
	b.Write(t, "kubeconfig", b.Kubeconfig(t))
	program := filepath.Join(t.TempDir(), "keyfleet-connector")
	build := exec.Command("go", "build", "-tags", "killpoints", "-o", program, "keyfleet.dev/keyfleet/cmd/keyfleet-connector")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v\n%s", err, out)
	}
	effects := killRun(t, b, program, 0, "")
	points, step := 0, 1
	if testing.Short() {
		step = 5
		t.Logf("short: only every fifth of %d effects", len(effects))
	}
	for i := 0; i < len(effects); i += step {
		for _, when := range []string{"before", "after"} {
			points++
			killRun(t, b, program, points, fmt.Sprintf("%s:%d", when, i+1))
			if t.Failed() {
				t.Fatalf("killed %s effect %d, %q", when, i+1, effects[i])
			}
		}
	}
	found := slices.Compact(slices.Sorted(slices.Values(effects)))
	t.Logf("covered %d kill points: %d effects of %d kinds, before and after each", points, len(effects), len(found))
	for _, name := range []string{
		"create Secret", "create ServiceAccount", "create SecretProviderClass", "update Secret", "update ServiceAccount",
		"delete Secret", "delete ServiceAccount", "delete SecretProviderClass", "note what was applied", "let the desired state go",
	} {
		if !slices.Contains(found, name) {
			t.Errorf("the effect %q was not covered: %v", name, effects)
		}
	}
}

// killRun goes through all of it once, in a namespace of its own, and dies at the
// given point, once. It returns the effects of an undisturbed life.
func killRun(t *testing.T, b *bed, program string, n int, at string) []string {
	t.Helper()
	dir := t.TempDir()
	log, once := filepath.Join(dir, "effects"), filepath.Join(dir, "once")
	s := &restarted{t: t, args: []string{program, "operator", "--kubeconfig", b.Path("kubeconfig"), "--probes", "", "--lease", "3s", "--identity", "same"}, env: []string{
		"KEYFLEET_EFFECT_LOG=" + log, "KEYFLEET_KILL_AT=" + at, "KEYFLEET_KILL_ONCE=" + once,
	}}
	s.start()
	defer s.stop()
	namespace := fmt.Sprintf("kill-%d", n)
	b.namespace(t, namespace)
	until := func(d wire.Desired, repaired int) {
		t.Helper()
		s.until(fmt.Sprintf("revision %s, repair %d", d.Revision, repaired), func() bool {
			a := b.applied(t, d)
			return a.Revision == d.Revision && a.Problem == nil && a.Repaired == repaired && len(a.Objects) == len(named(d)) && b.holds(t, secretOf(d), d.Secret.Data)
		})
	}
	d := whole("kill", namespace, map[string]string{"A": "1"})
	b.order(t, d)
	until(d, 0)

	old := []object{accountOf(d), classOf(d)}
	d.Secret.Data = map[string]string{"B": "2"}
	d.ServiceAccount = &wire.AccountObject{Name: "account-2", Annotations: d.ServiceAccount.Annotations}
	d.ProviderClass = &wire.ProviderObject{Name: "class-2", Spec: d.ProviderClass.Spec}
	d = revised(d)
	b.order(t, d)
	until(d, 0)
	for _, o := range old {
		if b.live(t, o) != nil {
			t.Errorf("%s is still there", o)
		}
	}
	b.discard(t, secretOf(d))
	until(d, 1)
	b.edit(t, accountOf(d), `{"metadata":{"annotations":{"azure.workload.identity/client-id":"x"}}}`)
	until(d, 2)
	if got := b.live(t, accountOf(d)).GetAnnotations()[identityClient]; got != "client-1" {
		t.Errorf("the account has %s", got)
	}
	b.cancel(t, d, wire.RemoveDelete)
	s.until("the connection is gone", func() bool { return b.state(t, d) == nil })
	for _, o := range named(d) {
		if b.live(t, o) != nil {
			t.Errorf("%s is still there", o)
		}
	}
	kept := linker("kept", namespace, map[string]string{"K": "v"})
	b.order(t, kept)
	until(kept, 0)
	b.cancel(t, kept, wire.RemoveKeep)
	s.until("the connection is gone", func() bool { return b.state(t, kept) == nil })
	if u := b.live(t, secretOf(kept)); u == nil || len(u.GetLabels()) > 0 || !b.holds(t, secretOf(kept), kept.Secret.Data) {
		t.Errorf("what was kept is %v", u)
	}
	if at != "" { // the last effect shows before the process dies of it
		s.until("its death at "+at, func() bool { _, err := os.Stat(once); return err == nil })
	}
	var effects []string
	text, _ := os.ReadFile(log)
	for line := range strings.Lines(string(text)) {
		_, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		effects = append(effects, name)
	}
	return effects
}

// restarted runs a program and starts it again whenever it has died.
type restarted struct {
	t         *testing.T
	args, env []string
	cmd       *exec.Cmd
	done      chan struct{}
}

func (s *restarted) start() {
	s.t.Helper()
	s.cmd = exec.Command(s.args[0], s.args[1:]...)
	s.cmd.Env = append(os.Environ(), s.env...)
	s.cmd.Stderr = output{}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	cmd, done := s.cmd, make(chan struct{})
	s.done = done
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
}

func (s *restarted) until(what string, holds func() bool) {
	s.t.Helper()
	eventually(s.t, what, func() bool {
		select {
		case <-s.done:
			s.start()
		default:
		}
		return holds()
	})
}

func (s *restarted) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(time.Minute):
		_ = s.cmd.Process.Kill()
		s.t.Error("the operator does not end on SIGTERM")
	}
}
