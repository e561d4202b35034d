package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/store"
)

// The kill test runs this test program, built with the tag killpoints, as a
// child that makes changes and reads under audit, and kills it before and after
// each of its effects. A second run goes on where the first died.
const (
	childEnv    = "KEYFLEET_AUDIT_TEST_DIR" // set: be the child, with this folder
	changesMade = 12
	readsMade   = 6
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// durable is the memory backend with a journal: one line a commit, replayed on
// open, so that revisions are the same again. A commit is in the journal before
// anybody can see it: the process may be killed by another of its goroutines.
type durable struct {
	*store.Memory
	mu      sync.Mutex // held over a commit, so that the journal has them in their order
	journal *os.File
}

// commit is a line of the journal. One that met a conflict meets it again.
type commit struct {
	Guards []store.Guard
	Writes []store.Write
}

func openDurable(path string) (*durable, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	d := &durable{Memory: store.NewMemory(), journal: f}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	whole := bytes.LastIndexByte(text, '\n') + 1 // what follows was being written when it died
	if err := f.Truncate(int64(whole)); err != nil {
		return nil, err
	}
	for line := range bytes.Lines(text[:whole]) {
		var c commit
		if err := json.Unmarshal(line, &c); err != nil {
			return nil, err
		}
		if _, err := d.Memory.Commit(context.Background(), c.Guards, c.Writes); err != nil && !errors.Is(err, store.ErrConflict) {
			return nil, err
		}
	}
	return d, nil
}

func (d *durable) Commit(ctx context.Context, g []store.Guard, w []store.Write) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	line, err := json.Marshal(commit{g, w})
	if err != nil {
		return 0, err
	}
	if _, err := d.journal.Write(append(line, '\n')); err != nil {
		return 0, err
	}
	return d.Memory.Commit(context.WithoutCancel(ctx), g, w)
}

// child makes what is missing of the changes and reads, writes each confirmed
// read to a file, and ends when all records are exported.
func child(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	d, err := openDurable(filepath.Join(dir, "store"))
	if err != nil {
		return err
	}
	s, err := store.New(ctx, d)
	if err != nil {
		return err
	}
	l, err := Open(Config{Path: filepath.Join(dir, "audit.jsonl"), MaxSize: 3000})
	if err != nil {
		return err
	}
	defer l.Close()
	acks, err := os.OpenFile(filepath.Join(dir, "acks"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	ectx, stop := context.WithCancel(ctx)
	defer stop()
	go func() { done <- (&Exporter{Log: l, Linger: time.Millisecond}).Run(ectx, s) }()
	for i := range changesMade {
		if o, err := things.Lookup(s.View(ctx), fmt.Sprintf("%04d", i)); err != nil || o != nil {
			if err != nil {
				return err
			}
			continue
		}
		if err := change(ctx, l, s, i); err != nil {
			return err
		}
		if i%(changesMade/readsMade) == 0 {
			if err := l.Append(ctx, rec(i)); err != nil {
				return err
			}
			fmt.Fprintln(acks, rec(i).Resource)
		}
	}
	for {
		left, err := Records.List(s.View(ctx), "")
		if err != nil {
			return err
		}
		if len(left) == 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	stop()
	return <-done
}

func TestKillAtEveryEffect(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("kill points need SIGKILL")
	}
	prog := filepath.Join(t.TempDir(), "child")
	if out, err := exec.Command("go", "test", "-c", "-tags", "killpoints", "-o", prog, ".").CombinedOutput(); err != nil {
		t.Fatalf("building the child: %v\n%s", err, out)
	}
	run := func(dir string, env ...string) error {
		cmd := exec.Command(prog)
		cmd.Env = append(os.Environ(), append(env, childEnv+"="+dir)...)
		cmd.Stderr = os.Stderr
		return cmd.Run()
	}
	plain := t.TempDir()
	log := filepath.Join(plain, "effects")
	if err := run(plain, "KEYFLEET_EFFECT_LOG="+log); err != nil {
		t.Fatalf("the undisturbed run: %v", err)
	}
	check(t, "undisturbed", plain)
	effects, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	n, step := strings.Count(string(effects), "\n"), 1
	if testing.Short() {
		step = 7
	}
	killed := 0
	for i := 1; i <= n; i += step {
		for _, when := range []string{"before", "after"} {
			dir := t.TempDir()
			at := when + ":" + strconv.Itoa(i)
			if err := run(dir, "KEYFLEET_KILL_AT="+at); err == nil {
				continue // batching differs from run to run: this one had fewer effects
			}
			killed++
			if err := run(dir); err != nil {
				t.Fatalf("killed %s: the next run fails: %v", at, err)
			}
			check(t, "killed "+at, dir)
		}
	}
	t.Logf("%d effects, killed at %d points", n, killed)
	if killed < n/step {
		t.Errorf("only %d kills for %d effects", killed, n)
	}
}

// check looks at the end state: the chain holds, every change has exactly one
// record, in order, and every confirmed read has one.
func check(t *testing.T, what, dir string) {
	t.Helper()
	path := filepath.Join(dir, "audit.jsonl")
	if _, _, err := VerifyFiles(path); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	var want []string
	for i := range changesMade {
		want = append(want, fmt.Sprintf("/things/%04d", i))
	}
	if got := lines(t, path, "things/write"); !slices.Equal(got, want) {
		t.Errorf("%s: changes on record: %v", what, got)
	}
	acks, err := os.ReadFile(filepath.Join(dir, "acks"))
	if err != nil {
		t.Fatal(err)
	}
	reads := lines(t, path, "secrets/get")
	for _, a := range strings.Fields(string(acks)) {
		if !slices.Contains(reads, a) {
			t.Errorf("%s: the confirmed read %s is not on record", what, a)
		}
	}
	if gaps := lines(t, path, "Keyfleet/audit/gap"); len(gaps) > 0 {
		t.Errorf("%s: a gap is on record", what)
	}
}
