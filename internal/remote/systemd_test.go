package remote

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/remote/remotetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// On a machine where process 1 is systemd a script that finishes is a unit, and
// goes on when sshd with all its sessions is ended. The machine is given by
// KEYFLEET_TEST_MACHINE (user@address:port) and KEYFLEET_TEST_MACHINE_KEY (a file).
func TestAScriptThatFinishesIsAUnitOfSystemd(t *testing.T) {
	at, key := os.Getenv("KEYFLEET_TEST_MACHINE"), os.Getenv("KEYFLEET_TEST_MACHINE_KEY")
	if at == "" || key == "" {
		t.Skip("KEYFLEET_TEST_MACHINE and KEYFLEET_TEST_MACHINE_KEY name no machine with systemd")
	}
	user, address, err := ParseAddress(at)
	if err != nil {
		t.Fatal(err)
	}
	line := remotetest.NewProxy(t, address)
	j, err := Dial(t.Context(), Config{
		Address: line.Address, User: user, Key: []byte(readFile(t, key)), KnownHosts: []string{filepath.Join(t.TempDir(), "known_hosts")},
		Confirm: func([]Fingerprint) (bool, error) { return true, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	h := j.Host("master-0")
	look := func(text string) string {
		t.Helper()
		out, err := h.Run(t.Context(), rotation.Script{Name: "look", Quiet: true, Text: text})
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	s := rotation.Script{
		Name: "sleep", Finishes: true, Unit: "kf-test-systemd", Input: []byte("in"), Timeout: 30 * time.Second,
		Text: `cat; id -u; pwd; umask; echo "$HOME"; grep -o kf-test-systemd /proc/self/cgroup | sort -u; sleep 3`,
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 2 { // the name is free again afterwards
			out, err := h.Run(t.Context(), s)
			if err != nil || string(out) != "in0\n/\n0077\n/root\nkf-test-systemd\n" {
				t.Errorf("%q, %v", out, err)
			}
		}
	}()
	eventually(t, "the unit", func() bool { return look("systemctl is-active kf-test-systemd || :") == "active" })
	if _, err := h.Run(t.Context(), rotation.Script{
		Name: "end all of sshd", Finishes: true, Unit: "kf-test-sshd", Text: "systemctl stop ssh; pkill -9 sshd || :; sleep 1; systemctl start ssh",
	}); err != nil {
		t.Error(err)
	}
	<-done
	if line.Accepted() < 2 {
		t.Error("the connection was not ended")
	}
	if left := look("ls /var/lib/keyfleet/rotate-certs/run; systemctl list-units --all --no-legend 'kf-test-*'"); left != "lock" {
		t.Errorf("this was left behind: %s", left)
	}
	if log := look("cat /var/log/azure/rotate-certs.log"); !strings.Contains(log, "sleep: exit status 0 after 3 s") {
		t.Errorf("the log is\n%s", log)
	}
}
