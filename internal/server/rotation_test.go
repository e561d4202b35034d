package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
)

const rotatedID = "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/rg1/providers/Microsoft.ContainerService/managedClusters/prod"

// rotationWorld is a registered cluster with SSH access, and in place of keyfleet a
// shell script, which is really run. It is given $calls, a file with a line for each
// call, and $run, the folder of journals.
type rotationWorld struct {
	t       *testing.T
	store   *store.Store
	service *cluster.Service
	program rotateCerts
	dir     string
	limit   time.Duration
}

// preamble says how often the script was called, and with what.
const preamble = `#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
n=$(wc -l < "$(dirname "$0")/calls")
for a in "$@"; do case "$a" in
--run-dir=*) run=${a#--run-dir=};;
--kubeconfig=*) kubeconfig=${a#--kubeconfig=};;
--linux-ssh-private-key=*) key=${a#--linux-ssh-private-key=};;
esac; done
`

// good is a rotation that has nobody to wait for: three calls, of which the second
// goes to the end.
const good = `
if [ -n "$kubeconfig" ]; then exit 0; fi
echo "Rotation 20261129-055651-634d, journal $run/20261129-055651-634d/journal"
case "$*" in *--until*) echo "   1.3s  11/92  done   prepare: make new CAs and keys (0.2s)"; exit 11;; esac
echo "        ---- point of no return ----"
echo "   9.3s  92/92  done   retire: clean up (0.2s)"
`

func newRotationWorld(t *testing.T, script string) *rotationWorld {
	t.Helper()
	backend := store.NewMemory()
	t.Cleanup(func() { backend.Close() })
	st, err := store.New(t.Context(), backend)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Path: filepath.Join(t.TempDir(), "audit.jsonl"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Close)
	w := &rotationWorld{t: t, store: st, dir: t.TempDir(), limit: time.Hour}
	program := filepath.Join(w.dir, "keyfleet")
	if err := os.WriteFile(program, []byte(preamble+script), 0o700); err != nil {
		t.Fatal(err)
	}
	w.program = newRotateCerts(program, w.dir)
	w.service = cluster.New(cluster.Config{Store: st, Gate: access.NewGate(access.Config{Store: st, Recorder: log}), CanRotate: w.program.ready})
	if _, _, err := w.service.Register(w.system(), cluster.Registration{ID: rotatedID, Location: "westus2", Kubeconfig: kubeconfigOf("old"), SSH: testSSH(t)}); err != nil {
		t.Fatal(err)
	}
	return w
}

func kubeconfigOf(token string) []byte {
	return []byte(`{"apiVersion":"v1","kind":"Config","current-context":"prod","contexts":[{"name":"prod","context":{"cluster":"prod","user":"prod"}}],` +
		`"clusters":[{"name":"prod","cluster":{"server":"https://10.0.0.1:6443"}}],"users":[{"name":"prod","user":{"token":"` + token + `"}}]}`)
}

func testSSH(t *testing.T) *cluster.SSH {
	t.Helper()
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	text, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &cluster.SSH{Host: "cp1.example.org:22", User: "ops", Key: text, KnownHosts: []byte("cp1.example.org ssh-ed25519 AAAA\n")}
}

func (w *rotationWorld) system() context.Context { return access.AsSystem(w.t.Context(), "test") }

func (w *rotationWorld) rotate(o cluster.Options) *cluster.RotationObject {
	w.t.Helper()
	r, err := w.service.Rotate(w.system(), rotatedID, o)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// serve runs the loop as a server that leads does, until the returned function ends it.
func (w *rotationWorld) serve() (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	ended := make(chan struct{})
	go func() { // ends with ctx
		defer close(ended)
		l := cluster.Rotations{Service: w.service, Program: w.program, Pause: 10 * time.Millisecond, Limit: w.limit, Log: slog.New(slog.DiscardHandler)}
		_ = l.Run(ctx, w.store)
	}()
	stop = func() { cancel(); <-ended }
	w.t.Cleanup(stop)
	return stop
}

// await looks at a rotation until it is as wanted.
func (w *rotationWorld) await(uid, what string, wanted func(cluster.RotationStatus) bool) cluster.RotationStatus {
	w.t.Helper()
	var s cluster.RotationStatus
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		r, err := w.service.Rotation(w.system(), rotatedID, uid)
		if err != nil {
			w.t.Fatal(err)
		}
		if s = r.Status; wanted(s) {
			return s
		}
	}
	w.t.Fatalf("not %s within a minute: %+v, calls:\n%s", what, s, strings.Join(w.calls(), "\n"))
	return s
}

func (w *rotationWorld) ended(uid string) cluster.RotationStatus {
	w.t.Helper()
	s := w.await(uid, "ended", func(s cluster.RotationStatus) bool { return s.State != cluster.RotationRunning })
	for _, place := range w.program.private {
		if left, _ := filepath.Glob(place + "*"); len(left) > 0 {
			w.t.Errorf("secrets are left in %v", left)
		}
	}
	return s
}

func (w *rotationWorld) calls() []string {
	text, _ := os.ReadFile(filepath.Join(w.dir, "calls"))
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// finish writes the journal of a finished run.
func (w *rotationWorld) finish(run string) {
	w.t.Helper()
	path := filepath.Join(w.program.dir, folder(cluster.Job{Cluster: strings.ToLower("042998e4-36dc-4b7d-8ce3-a7a2c4877d33/rg1/prod")}), run, "journal")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		w.t.Fatal(err)
	}
	j, err := journal.Open(path)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := errors.Join(j.Run(w.t.Context(), nil, journal.Options{}), j.Close()); err != nil {
		w.t.Fatal(err)
	}
}

// TestRotation: the run is led to its end in two parts, with the kubeconfig renewed
// between them and afterwards; its progress shows; no secret is in an argument.
func TestRotation(t *testing.T) {
	w := newRotationWorld(t, `
[ "$(stat -c %a "$key")" = 600 ] && [ "$(stat -c %a "$(dirname "$key")")" = 700 ] || exit 3
if [ -n "$kubeconfig" ]; then sed -i "s/token: .*/token: new$n/" "$kubeconfig"; exit 0; fi
`+good)
	r := w.rotate(cluster.Options{Only: []string{"cluster-ca"}, Soak: time.Minute, RestartPods: true})
	if again := w.rotate(cluster.Options{Only: []string{"cluster-ca"}, Soak: time.Minute, RestartPods: true}); again.UID != r.UID {
		t.Error("the same request again began another rotation")
	}
	if _, err := w.service.Rotate(w.system(), rotatedID, cluster.Options{}); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "a rotation of its certificates is running") {
		t.Errorf("another rotation beside it: %v, want a conflict", err)
	}
	if _, err := w.service.Delete(w.system(), rotatedID); !errors.Is(err, fault.Conflict) {
		t.Errorf("deleting the cluster meanwhile: %v, want a conflict", err)
	}
	w.serve()
	s := w.ended(r.UID)
	if s.State != cluster.RotationSucceeded || s.Run != "20261129-055651-634d" || s.Done != 92 || !s.NoReturn || s.Kubeconfig != "accepted" {
		t.Errorf("it ended as %+v", s)
	}
	calls := w.calls()
	wanted := []string{"rotate-certs --only=cluster-ca --soak=1m0s --restart-pods --until soak ", "rotate-certs kubeconfig ", "rotate-certs --only=cluster-ca --soak=1m0s --restart-pods --layout", "rotate-certs kubeconfig "}
	if len(calls) != len(wanted) {
		t.Fatalf("calls:\n%s", strings.Join(calls, "\n"))
	}
	for i, c := range calls {
		if !strings.HasPrefix(c, wanted[i]) || !strings.Contains(c, "--ssh-host=cp1.example.org:22 --ssh-user=ops") || strings.Contains(c, "PRIVATE") {
			t.Errorf("call %d: %s, want %s", i+1, c, wanted[i])
		}
	}
	text, err := w.service.UserCredential(w.system(), rotatedID)
	if err != nil || !strings.Contains(string(text), "token: new4") {
		t.Errorf("the registered kubeconfig: %v\n%s", err, text)
	}
	if existed, err := w.service.Delete(w.system(), rotatedID); err != nil || !existed {
		t.Errorf("deleting the cluster afterwards: %v", err)
	}
}

// TestRotationEnds: whatever the program does, the operation ends, says so in the
// program's words, and how to go on.
func TestRotationEnds(t *testing.T) {
	cases := []struct {
		name, script  string
		options       cluster.Options
		code, message string // empty: it succeeds
		fix           string
	}{
		{name: "it has nothing to wait for", script: `[ -n "$kubeconfig" ] || echo "Rotation r, journal x"; exit 0`},
		{name: "the old is in use", script: `[ -n "$kubeconfig" ] && exit 0
echo "Stopped before retiring: the old certificates are still in use by default/web." >&2; exit 11`, code: "OldStillInUse", message: "in use by default/web", fix: "--complete"},
		{name: "and is retired all the same", script: `case "$2" in complete|kubeconfig) exit 0;; esac; exit 11`, options: cluster.Options{Complete: true}},
		{
			name: "its own error", script: `echo "Error NoAPIServer: No API server is ready." >&2; echo "  Why   connection refused" >&2; echo "  Fix   repair it" >&2; exit 1`,
			code: "NoAPIServer", message: "No API server is ready. (connection refused)", fix: "repair it; then keyfleet cluster rotate-certs prod goes on with it",
		},
		{name: "a usage error", script: `echo "Error Usage: --ssh-host: it is bad." >&2; exit 2`, code: "Usage", message: "--ssh-host: it is bad."},
		{name: "an exit status that nobody knows", script: `exit 77`, code: "RotationFailed", message: "status 77"},
		{name: "garbage, much of it", script: `head -c 300000 /dev/urandom; head -c 300000 /dev/urandom >&2; exit 1`, code: "RotationFailed"},
		{name: "one line without an end", script: `[ -n "$kubeconfig" ] && exit 0; head -c 300000 /dev/zero; exit 0`},
		{name: "killed each time", script: `kill -9 $$`, code: "RotationKilled"},
		{name: "killed twice", script: `[ $n -gt 2 ] || kill -9 $$
` + good},
		{
			name: "a kubeconfig that no API server accepts", script: `[ -n "$kubeconfig" ] || { echo "Rotation r, journal x"; exit 0; }
echo "Error KubeconfigNotAccepted: No API server was seen to accept it." >&2; exit 1`,
			code: "KubeconfigNotRenewed", message: "No API server was seen to accept it.", fix: "keyfleet cluster register prod --group rg1 --kubeconfig FILE",
		},
		{name: "a kubeconfig that is none afterwards", script: `[ -z "$kubeconfig" ] || echo "x: [" > "$kubeconfig"; exit 0`, code: "InvalidKubeconfig"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := newRotationWorld(t, c.script)
			r := w.rotate(c.options)
			w.serve()
			s := w.ended(r.UID)
			switch {
			case c.code == "" && s.State != cluster.RotationSucceeded:
				t.Errorf("it ended as %+v: %+v", s, s.Problem)
			case c.code == "":
			case s.State != cluster.RotationFailed || s.Problem.Code != c.code || !strings.Contains(s.Problem.Message, c.message) || !strings.Contains(s.Problem.Fix, c.fix):
				t.Errorf("it ended as %s with %+v, want %s %q, fix %q", s.State, s.Problem, c.code, c.message, c.fix)
			}
			if again := w.rotate(c.options); again.UID == r.UID {
				t.Error("it cannot be gone on with")
			}
		})
	}
}

// TestRotationHangs: a child that never ends is ended, with the limit and with the server.
func TestRotationHangs(t *testing.T) {
	const hangs = `echo "Rotation r, journal x"; exec sleep 3600`
	t.Run("the limit", func(t *testing.T) {
		w := newRotationWorld(t, hangs)
		w.limit = 2 * time.Second
		r := w.rotate(cluster.Options{})
		w.serve()
		if s := w.ended(r.UID); s.State != cluster.RotationFailed || s.Problem.Code != "RotationTookTooLong" {
			t.Errorf("it ended as %+v: %+v", s, s.Problem)
		}
	})
	t.Run("the server", func(t *testing.T) {
		w := newRotationWorld(t, `trap '' TERM; echo $$ > "$(dirname "$0")/pid"; `+`echo "Rotation r, journal x"; exec sleep 3600`)
		w.program.grace = time.Second
		r := w.rotate(cluster.Options{})
		stop := w.serve()
		w.await(r.UID, "begun", func(s cluster.RotationStatus) bool { return s.Run != "" })
		stop()
		pid, err := os.ReadFile(filepath.Join(w.dir, "pid"))
		if err != nil {
			t.Fatal(err)
		}
		if err := exec.Command("kill", "-0", strings.TrimSpace(string(pid))).Run(); err == nil {
			t.Error("the child lives on")
		}
		if o, err := w.service.Rotation(w.system(), rotatedID, r.UID); err != nil || o.Status.State != cluster.RotationRunning {
			t.Errorf("a rotation whose server ended is %+v, %v; want that it goes on", o, err)
		}
	})
}

// TestRotationGoesOn: the server that leads next gives the same command again; it does
// not begin another rotation where the run was finished and nobody was there to note it.
func TestRotationGoesOn(t *testing.T) {
	w := newRotationWorld(t, `
if [ -n "$kubeconfig" ]; then exit 0; fi
echo "Rotation r1, journal x"
[ $n -gt 1 ] || exec sleep 3600
case "$*" in *--until*) exit 11;; esac
`)
	r := w.rotate(cluster.Options{})
	stop := w.serve()
	w.await(r.UID, "begun", func(s cluster.RotationStatus) bool { return s.Run == "r1" })
	stop()
	w.serve()
	if s := w.ended(r.UID); s.State != cluster.RotationSucceeded || len(w.calls()) != 5 {
		t.Errorf("it ended as %+v after:\n%s", s, strings.Join(w.calls(), "\n"))
	}

	w = newRotationWorld(t, `[ -n "$kubeconfig" ] || { echo "Rotation r1, journal x"; exec sleep 3600; }`)
	r = w.rotate(cluster.Options{})
	stop = w.serve()
	w.await(r.UID, "begun", func(s cluster.RotationStatus) bool { return s.Run == "r1" })
	stop()
	w.finish("r1")
	w.serve()
	if s := w.ended(r.UID); s.State != cluster.RotationSucceeded || len(w.calls()) != 2 {
		t.Errorf("it ended as %+v after:\n%s", s, strings.Join(w.calls(), "\n"))
	}
}

// TestRotationWaitsForItsOwn: a child that outlived its server keeps the journal
// locked; it is waited for, however long it takes.
func TestRotationWaitsForItsOwn(t *testing.T) {
	w := newRotationWorld(t, fmt.Sprintf(`[ $n -gt 9 ] || { echo "Error: The journal x is in use by another process." >&2; exit 1; }
%s`, good))
	r := w.rotate(cluster.Options{})
	w.serve()
	if s := w.ended(r.UID); s.State != cluster.RotationSucceeded {
		t.Errorf("it ended as %+v: %+v", s, s.Problem)
	}
}

// TestRotationNeedsItsProgram: who asks is told at once.
func TestRotationNeedsItsProgram(t *testing.T) {
	w := newRotationWorld(t, good)
	if err := os.Remove(w.program.program); err != nil {
		t.Fatal(err)
	}
	_, err := w.service.Rotate(w.system(), rotatedID, cluster.Options{})
	if e := fault.From(err); e.Code != "RotateCertsNotInstalled" || !strings.Contains(e.Fix, w.program.program) {
		t.Errorf("%v, fix %q", err, e.Fix)
	}
}
