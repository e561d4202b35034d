//go:build linux

package bed

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// makeKeys makes the key that opens every machine, and each machine's own.
func (b *builder) makeKeys(ctx context.Context) error {
	if err := sshKeygen(ctx, b.SSHKey, "keyfleet-bed-"+b.Name); err != nil {
		return err
	}
	for _, n := range b.Nodes {
		if err := os.MkdirAll(b.path("machine", n.Name), 0o755); err != nil {
			return err
		}
		if err := sshKeygen(ctx, b.hostKey(n), n.Name); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) hostKey(n Node) string { return b.path("machine", n.Name, "host_key") }

func sshKeygen(ctx context.Context, path, comment string) error {
	out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("making an ssh key: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// writeKnownHosts writes the machines' keys as a client sees them: the first
// master by the loopback port too.
func (b *builder) writeKnownHosts() error {
	var all strings.Builder
	for i, n := range b.Nodes {
		public, err := os.ReadFile(b.hostKey(n) + ".pub")
		if err != nil {
			return err
		}
		names := n.Name + "," + n.IP
		if i == 0 {
			names = fmt.Sprintf("[%s]:%d,%s", b.SSHHost, b.SSHPort, names)
		}
		fmt.Fprintf(&all, "%s %s", names, public)
	}
	return writeFile(b.KnownHosts, all.String(), 0o644)
}

// writeWrapper writes the commands that a person wants: kubectl, and with
// Services helm, in the bed's network, and ssh to any node.
func (b *builder) writeWrapper() error {
	clients := map[string]string{"kubectl": b.cache.Kubectl()}
	if b.Services {
		clients["helm"] = b.cache.Helm()
	}
	for name, program := range clients {
		// What they remember of an API goes by its address, and that is every bed's.
		script := fmt.Sprintf("#!/bin/sh\n# Needs root: it enters the bed's network.\nexport KUBECACHEDIR=%s\nexec ip netns exec %s %s --kubeconfig %s \"$@\"\n",
			b.path("cache"), namespace(b.Name, fabric), program, b.Kubeconfig)
		if err := writeFile(b.path(name), script, 0o755); err != nil {
			return err
		}
	}
	return writeFile(b.path("ssh"), fmt.Sprintf("#!/bin/sh\n# ssh NODE [COMMAND]\nexec ssh -F %s \"$@\"\n", b.path("ssh_config")), 0o755)
}
