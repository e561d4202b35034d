package rotation

import (
	"os/exec"
	"strings"
	"testing"
)

// TestScriptsAreWellFormed: every script for Linux is one that its shell can read.
func TestScriptsAreWellFormed(t *testing.T) {
	d := Kubeadm().dialect(Node{})
	for name, text := range map[string]string{
		"facts": d.facts, "look": d.look, "back up": d.backUp, "stage": d.stage, "place": d.place, "placed": d.placed, "started": d.started,
		"lock": d.lock, "release": d.release, "clean": d.clean, "keys": keysScript, "restart": restartScript, "afresh": afreshScript, "unit": unitScript, "audit": auditScript,
	} {
		cmd := exec.Command("/bin/sh", "-n")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("the script %q: %v\n%s", name, err, out)
		}
	}
}
