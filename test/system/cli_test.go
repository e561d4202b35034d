package system

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/test/stack"
)

// TestScriptsOfTheCommandLine runs the scripts of package cli that are written
// for a real server, against one.
func TestScriptsOfTheCommandLine(t *testing.T) {
	t.Parallel()
	s := start(t, stack.Config{})
	cmd := exec.CommandContext(s.ctx, "go", "test", "-count=1", "-run", "^TestRealServer$", "-v", "./internal/cli")
	cmd.Dir = stack.Root(t)
	cmd.Env = append(os.Environ(), "KEYFLEET_TEST_SERVER="+s.Dir, "KEYFLEET_FROM=", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestRealServer/") {
		t.Errorf("the scripts: %v\n%s", err, out)
	}
}

// answer is what a run of keyfleet left behind.
type answer struct {
	out, err string
	exit     int
}

// terminal is a person who has logged in, in a home of their own.
type terminal struct {
	f    *fleet
	home string
}

func (f *fleet) terminal(t *testing.T) terminal { return terminal{f, t.TempDir()} }

// keyfleet runs the command line.
func (k terminal) keyfleet(args ...string) answer {
	k.f.T.Helper()
	var out, errs strings.Builder
	cmd := exec.CommandContext(k.f.ctx, filepath.Join(k.f.Bin, "keyfleet"), args...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "KEYFLEET_") && !strings.HasPrefix(v, "XDG_") && !strings.HasPrefix(v, "HOME=") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "HOME="+k.home, "KEYFLEET_FROM="+k.f.Dir, "KEYFLEET_GROUP=rg", "KEYFLEET_ACCOUNT="+accountName)
	cmd.Stdout, cmd.Stderr = &out, &errs
	var ee *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &ee) {
		k.f.T.Fatalf("keyfleet %s: %v", strings.Join(args, " "), err)
	}
	return answer{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// says fails unless the run ended with the exit code and its output holds every text.
func (a answer) says(t *testing.T, exit int, texts ...string) {
	t.Helper()
	if a.exit != exit {
		t.Errorf("exit %d, want %d\n%s%s", a.exit, exit, a.out, a.err)
	}
	for _, text := range texts {
		if !strings.Contains(a.out+a.err, text) {
			t.Errorf("%q is not said:\n%s%s", text, a.out, a.err)
		}
	}
}

// file writes a pool body into the home.
func (k terminal) file(t *testing.T, name string, pool object) string {
	t.Helper()
	text, err := json.Marshal(pool)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(k.home, name)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestExplainNamesTheFirstBrokenLink: a pool whose identity may not read the
// vault is accepted, and everything that a person may ask names vault and fix.
func TestExplainNamesTheFirstBrokenLink(t *testing.T) {
	t.Parallel()
	f := startFleet(t, stack.Config{})
	f.vault(f.group, "closed")
	f.certificate("closed", "web", nil)
	k := f.terminal(t)
	body := k.file(t, "pool.json", f.poolBody(1, f.extension(f.Client.Vault("closed", "/secrets/web"))))
	const fix = "keyfleet vault set-policy closed"

	k.keyfleet("pool", "create", "sim", "--file", body, "--strict").says(t, 1, "closed", fix)
	f.isGone(t, "sim")
	k.keyfleet("pool", "what-if", "sim", "--file", body).says(t, 0, "would be created", "warning", "closed", fix)
	k.keyfleet("pool", "what-if", "sim", "--file", body, "--exit-code").says(t, 10, fix)
	f.isGone(t, "sim")
	k.keyfleet("pool", "create", "sim", "--file", body, "--no-wait").says(t, 0, "closed")

	stack.Eventually(t, 2*time.Minute, "the node is explained", func(context.Context) error {
		a := k.keyfleet("node", "explain", "sim", "0")
		if a.exit != 0 {
			return errors.New(a.err)
		}
		_, chain, _ := strings.Cut(a.out, "\n\n")
		first, _, _ := strings.Cut(chain, "\n")
		if !strings.Contains(a.out, "Cause  secrets: ") || !strings.Contains(a.out, fix) || !strings.HasPrefix(strings.TrimSpace(first), "broken") || !strings.Contains(first, "closed") {
			return errors.New(a.out)
		}
		return nil
	})
	k.keyfleet("doctor").says(t, 11, "sim")

	// The fix, as it was said, mends it.
	a := k.keyfleet("node", "explain", "sim", "0")
	_, line, _ := strings.Cut(a.out, "Fix    keyfleet ")
	line, _, _ = strings.Cut(line, "\n")
	k.keyfleet(strings.Fields(line)...).says(t, 0)
	f.idle(accountName, "westus2", "sim", 1)
	k.keyfleet("node", "explain", "sim", "0").says(t, 0, "is idle.")
}

// isGone fails if there is a pool of the name.
func (f *fleet) isGone(t *testing.T, name string) {
	t.Helper()
	f.terminal(t).keyfleet("pool", "show", name).says(t, 3)
}

// TestCommandLineOnARunningPool looks at a healthy pool by every command that
// looks, and checks what the exit codes say.
func TestCommandLineOnARunningPool(t *testing.T) {
	t.Parallel()
	f := startFleet(t, stack.Config{})
	f.certificate("vault1", "web", nil)
	f.put(f.poolPath("sim"), "2021-01-01", f.poolBody(1, f.extension(f.Client.Vault("vault1", "/secrets/web"))), nil)
	node := f.idle(accountName, "westus2", "sim", 1)[0]
	k := f.terminal(t)

	k.keyfleet("node", "list", "sim").says(t, 0, node, "idle")
	k.keyfleet("extension", "show", "sim", node, "kv", "--query", "instanceView.statuses[0].displayStatus", "-o", "tsv").says(t, 0, "Provisioning succeeded")
	k.keyfleet("node", "shell", "sim", node, "--", "cat", "/etc/hostname-that-is-not-there").says(t, 1, "hostname-that-is-not-there")
	k.keyfleet("node", "shell", "sim", node, "--", "/bin/sh", "-c", "exit 42").says(t, 42)
	stack.Eventually(t, 2*time.Minute, "the extension's logs are brought", func(context.Context) error {
		if a := k.keyfleet("node", "logs", "sim", node); a.exit != 0 || !strings.Contains(a.out, "vault1") {
			return errors.New(a.out + a.err)
		}
		return nil
	})
	k.keyfleet("certificate", "deliveries", "vault1", "web").says(t, 0, node)
	k.keyfleet("doctor").says(t, 0, "server")
	k.keyfleet("hosts", "sync", "--print").says(t, 0, "127.0.0.1 vault1.vault.keyfleet.internal", "127.0.0.1 "+accountName+".westus2.batch.keyfleet.internal", "127.0.0.1 arm.keyfleet.internal")
	k.keyfleet("version").says(t, 0)

	k.keyfleet("pool", "show", "nothing").says(t, 3, "nothing")
	k.keyfleet("pool", "show").says(t, 2)
	k.keyfleet("secret", "show", "vault1", "nothing").says(t, 3, "SecretNotFound")
	k.keyfleet("vault", "create", "vault1", "--location", "elsewhere").says(t, 6)
	bad := k.file(t, "bad.json", f.poolBody(1, object{"name": "x", "publisher": "Contoso", "type": "Nothing"}))
	k.keyfleet("pool", "create", "bad", "--file", bad).says(t, 1, "extensions[0].type", "Contoso")
	k.keyfleet("pool", "wait", "sim", "--timeout", "10s").says(t, 0)
	f.Kill()
	k.keyfleet("pool", "list").says(t, 1, "keyfleet-server")
	if err := f.Run(); err != nil {
		t.Fatal(err)
	}
	f.call(http.MethodGet, f.Client.ARM(f.poolPath("sim")), "2021-01-01", nil, nil)
}
