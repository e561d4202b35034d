package handlerdriver_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
)

// WAAgentVariable names a folder in which Debian's waagent package is unpacked
// (dpkg -x); without it the installed package is used.
const WAAgentVariable = "KEYFLEET_TEST_WAAGENT"

// waagent is the extension code of the real Azure Linux agent at work.
type waagent struct {
	t     *testing.T
	in    io.WriteCloser
	lines *bufio.Scanner
}

type answer struct {
	HandlerState, HandlerStatus, HandlerMessage string
	Status, Message, Operation                  string
	Substatus                                   int
}

// startWAAgent starts waagent.py in a mount namespace in which /var/lib and
// /var/log are empty, so that nothing of this machine is touched.
func startWAAgent(t *testing.T, env []string, zip, settings string) *waagent {
	t.Helper()
	root := os.Getenv(WAAgentVariable)
	packages := filepath.Join("/", root, "usr/lib/python3/dist-packages")
	if _, err := os.Stat(filepath.Join(packages, "azurelinuxagent")); err != nil {
		t.Skipf("left out: the Azure Linux agent is not here; apt-get install waagent, or unpack the package and set %s to the folder", WAAgentVariable)
	}
	if os.Geteuid() != 0 {
		t.Skip("left out: a mount namespace for the Azure Linux agent needs root")
	}
	script, err := filepath.Abs("waagent.py")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `mount --make-rprivate / && mount -t tmpfs none /var/lib && mount -t tmpfs none /var/log && mkdir -p /var/lib/waagent /var/log/azure && exec /usr/bin/python3 "$@"`,
		"sh", script, zip, handlerName, "3.0.1", settings, filepath.Join("/", root, "etc/waagent.conf"))
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH=" + packages, "PYTHONDONTWRITEBYTECODE=1"}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the Azure Linux agent ended with %v", err)
		}
		out.Close()
	})
	return &waagent{t, in, bufio.NewScanner(out)}
}

func (w *waagent) do(words ...string) answer {
	w.t.Helper()
	fmt.Fprintln(w.in, strings.Join(words, " "))
	if !w.lines.Scan() {
		w.t.Fatalf("no answer to %v: %v", words, w.lines.Err())
	}
	var a answer
	if err := json.Unmarshal(w.lines.Bytes(), &a); err != nil {
		w.t.Fatalf("answer to %v: %v: %s", words, err, w.lines.Text())
	}
	return a
}

// TestUnderTheAzureLinuxAgent lets the real agent's goal state processing
// install, enable, reconfigure, update and remove the real package. What it
// asks of Azure's wire server is answered by an object in waagent.py.
func TestUnderTheAzureLinuxAgent(t *testing.T) {
	m := newMachine(t)
	settings := filepath.Join(t.TempDir(), "settings.json")
	text := fmt.Sprintf(`{"secretsManagementSettings": {"pollingIntervalInS": "10", "certificateStoreLocation": %q, "requireInitialSync": true,
		"observedCertificates": ["https://%s/secrets/%s"]}, "authenticationSettings": {"msiEndpoint": %q, "msiClientId": %q}}`,
		m.store, vaultHost, secretName, m.vault.Identity(), keyvaulttest.ClientID)
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	w := startWAAgent(t, append(m.vault.Environment(), "KEYFLEET_KEYVAULT_TIME_SCALE=0.05"), m.zip, settings)
	removed := false
	defer func() {
		if !removed {
			w.do("remove") // the service must not outlive the test
		}
	}()
	a := w.do("goal")
	if a.HandlerState != "Enabled" || a.HandlerStatus != "Ready" || a.Status != "transitioning" || !strings.Contains(a.Message, "SecretNotFound") && !strings.Contains(a.Message, "not fetched yet") {
		t.Fatalf("after the goal state: %+v", a)
	}
	v := m.vault.Renew(vaultHost, secretName, keyvaulttest.PKCS12)
	m.eventually("delivery", func() bool { return m.shows(v) })
	m.eventually("success in what the agent would report", func() bool {
		a = w.do("status")
		return a.Status == "success" && strings.HasPrefix(a.Message, "Successfully started Key Vault extension service. ") && a.Operation == "Service start." && a.Substatus == 0
	})
	v = m.vault.Renew(vaultHost, secretName, keyvaulttest.PEM)
	m.eventually("renewal by polling", func() bool { return m.shows(v) })

	started := time.Now()
	if a = w.do("goal"); a.HandlerStatus != "Ready" {
		t.Errorf("the same goal state again, as after a restart of the agent: %+v", a)
	}
	w.do("settings", settings)
	w.do("goal")
	w.do("version", "3.0.2", settings)
	if a = w.do("goal"); a.HandlerState != "Enabled" || a.HandlerStatus != "Ready" {
		t.Errorf("after the update: %+v", a)
	}
	t.Logf("restart, new settings and update took the agent %s", time.Since(started).Round(time.Millisecond))
	v = m.vault.Renew(vaultHost, secretName, keyvaulttest.PEM)
	m.eventually("renewal after the update", func() bool { return m.shows(v) })
	removed = true
	if a = w.do("remove"); a.HandlerState != "NotInstalled" {
		t.Errorf("after removal: %+v", a)
	}
	if !m.shows(v) {
		t.Error("removal must leave the certificates")
	}
}
