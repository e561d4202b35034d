package rotatecerts

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// call runs the command as a person without a terminal would.
func call(t *testing.T, env map[string]string, args ...string) (status int, out, errs string) {
	t.Helper()
	t.Setenv("HOME", t.TempDir())
	var o, e bytes.Buffer
	status = Main(context.Background(), args, Streams{Out: &o, Err: &e, Env: func(name string) string { return env[name] }})
	return status, o.String(), e.String()
}

func TestUsage(t *testing.T) {
	key := filepath.Join(t.TempDir(), "id")
	if err := os.WriteFile(key, []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		reason string
		args   string
		status int
		want   string
	}{
		{"nothing is said", "", 2, "--ssh-host: it is required"},
		{"no key", "--ssh-host h", 2, "--linux-ssh-private-key: it is required"},
		{"an unknown flag", "--nonsense", 2, "unknown flag"},
		{"an unknown layout", "--layout talos --ssh-host h --linux-ssh-private-key k", 2, `"talos" is not a layout`},
		{"an aks-engine cluster without its flags", "--api-model m.json --ssh-host h --linux-ssh-private-key k", 2, "--resource-group: it is required"},
		{
			"an API model that is not there", "--api-model /nowhere/m.json --ssh-host h --linux-ssh-private-key k --location l --subscription-id s --resource-group g --auth-method cli",
			1, "The API model cannot be read",
		},
		{"an unknown phase", "--until never --ssh-host h --linux-ssh-private-key k", 2, `"never" is not known`},
		{"an unknown part", "--only leaves,roots --ssh-host h --linux-ssh-private-key k", 2, "--only: roots is not known: use cluster-ca"},
		{"an unknown form", "-o xml --ssh-host h --linux-ssh-private-key k", 2, `"xml" is not known`},
		{"a key that is not there", "--ssh-host h --linux-ssh-private-key /nowhere/id", 1, "The SSH key cannot be read"},
		{"a key that is none", "--ssh-host h --linux-ssh-private-key " + key, 1, "The SSH key cannot be read"},
		{"nothing to go on with", "status --ssh-host h --linux-ssh-private-key " + key, 1, "No unfinished run"},
		{"an argument", "now --ssh-host h", 2, "unknown command"},
	} {
		status, _, errs := call(t, nil, strings.Fields(tc.args)...)
		if status != tc.status || !strings.Contains(errs, tc.want) {
			t.Errorf("%s: exit status %d, want %d and %q:\n%s", tc.reason, status, tc.status, tc.want, errs)
		}
		if status == 2 && !strings.Contains(errs, "Fix   keyfleet rotate-certs --help") {
			t.Errorf("%s: no way out:\n%s", tc.reason, errs)
		}
	}
}

func TestSecretOnTheCommandLineIsWarnedOf(t *testing.T) {
	_, _, errs := call(t, nil, "--client-secret", "hunter2", "--ssh-host", "h", "--linux-ssh-private-key", "/nowhere/id")
	if !strings.Contains(errs, "AZURE_CLIENT_SECRET") || strings.Contains(errs, "hunter2") {
		t.Errorf("a secret as a flag:\n%s", errs)
	}
	_, _, errs = call(t, map[string]string{"AZURE_CLIENT_SECRET": "hunter2"}, "--ssh-host", "h", "--linux-ssh-private-key", "/nowhere/id")
	if strings.Contains(errs, "Warning") {
		t.Errorf("a secret in the environment:\n%s", errs)
	}
}

func TestCloudFlagsAreAcceptedAndSaidToBeUnused(t *testing.T) {
	_, _, errs := call(t, nil, "--location", "westus2", "--resource-group", "g", "--subscription-id", "12345678-XXXX-YYYY-ZZZZ-1234567890ab",
		"--client-id", "12345678-XXXX-YYYY-ZZZZ-1234567890ab", "--azure-env", "AzureStackCloud", "--ssh-host", "h", "--linux-ssh-private-key", "/nowhere/id")
	if n := strings.Count(errs, "Nothing here needs the cloud's API"); n != 1 {
		t.Errorf("said %d times:\n%s", n, errs)
	}
}

func TestPathsAreExpanded(t *testing.T) {
	for path, want := range map[string]string{"~/.ssh/id_rsa": "/home/me/.ssh/id_rsa", "~": "/home/me", "/a/~": "/a/~", "~you/x": "~you/x", "x": "x"} {
		if got := expand(path, "/home/me"); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
}

func TestEveryHostHasAFolderOfItsOwn(t *testing.T) {
	for host, want := range map[string]string{"cp1.example.org": "cp1.example.org", "ssh://me@h:2222": "ssh___me_h_2222", "[::1]:22": "1__22", "../x": "x"} {
		if got := safeName(host); got != want {
			t.Errorf("%s is %s, want %s", host, got, want)
		}
	}
}

// TestStatus shows an unfinished run, and an unfinished run is found again.
func TestStatus(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "run1"), 0o700); err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(filepath.Join(dir, "run1", "journal"))
	if err != nil {
		t.Fatal(err)
	}
	p := rotation.Plan{Run: "run1", Steps: []rotation.Step{{Phase: rotation.Prepare, Verb: rotation.Make}, {Phase: rotation.Retire, Verb: rotation.Clean, NoReturn: true}}}
	if err := rotation.Keep(j, p, rotation.Observation{}); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	args := []string{"status", "--run-dir", dir, "--ssh-host", "h", "--linux-ssh-private-key", "k"}
	status, out, errs := call(t, nil, args...)
	for _, want := range []string{"run1", "0 of 2 done", "prepare: make new CAs and keys", "rollback is possible until: retire: clean up"} {
		if status != 0 || !strings.Contains(out, want) {
			t.Errorf("exit status %d, no %q in:\n%s%s", status, want, out, errs)
		}
	}
	if status, out, errs = call(t, nil, append(args, "-o", "json")...); status != 0 || !strings.Contains(out, `"steps": 2`) {
		t.Errorf("as JSON: exit status %d:\n%s%s", status, out, errs)
	}
}
