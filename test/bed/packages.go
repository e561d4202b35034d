//go:build linux

package bed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// tool is a command of this machine that a bed needs, and the Debian package that has it.
type tool struct {
	command string
	debian  string
}

func tools() []tool {
	return []tool{
		{"systemd-nspawn", "systemd-container"},
		{"mmdebstrap", "mmdebstrap"},
		{"haproxy", "haproxy"},
		{"ip", "iproute2"},
		{"nsenter", "util-linux"},
		{"ssh", "openssh-client"},
	}
}

func missingPackages() []string {
	var missing []string
	for _, t := range tools() {
		if _, err := exec.LookPath(t.command); err != nil {
			missing = append(missing, t.debian)
		}
	}
	return missing
}

// installPackages installs what is missing with this machine's own apt.
func installPackages(ctx context.Context, log io.Writer) error {
	if os.Getuid() != 0 {
		return errors.New("a bed needs root: it makes namespaces, control groups and mounts")
	}
	missing := missingPackages()
	if len(missing) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("this machine has no apt-get: install what provides the commands of %s", strings.Join(missing, ", "))
	}
	fmt.Fprintf(log, "%-11s installing %s\n", "packages", strings.Join(missing, " "))
	install := append([]string{"install", "-y", "-q", "--no-install-recommends"}, missing...)
	if _, err := aptGet(ctx, install...); err == nil {
		return nil
	}
	if out, err := aptGet(ctx, "update", "-q"); err != nil { // the lists may be old or absent
		return fmt.Errorf("updating the package lists: %w\n%s", err, tail(out, 10))
	}
	if out, err := aptGet(ctx, install...); err != nil {
		return fmt.Errorf("installing %s: %w\n%s", strings.Join(missing, " "), err, tail(out, 10))
	}
	return nil
}

func aptGet(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	out, err := cmd.CombinedOutput()
	return string(out), err
}
