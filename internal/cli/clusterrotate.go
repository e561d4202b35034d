package cli

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/client"
)

const (
	rotationWait = 2 * time.Hour // the default soak may take one alone
	rotationLook = 2 * time.Second
)

func (t *tool) clusterRotate() *cobra.Command {
	var o kubernetes.RotationOptions
	c := t.verb("rotate-certs NAME", "Replace the certificates, keys and CAs of a cluster; the same command again goes on with a run that stopped", `
keyfleet cluster rotate-certs prod
keyfleet cluster rotate-certs prod --only leaves --no-wait`, cobra.ExactArgs(1), nil)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		return t.rotateCluster(cmd.Context(), args[0], o, wait())
	}
	f := c.Flags()
	f.StringSliceVar(&o.Only, "only", nil, "what to rotate: cluster-ca, etcd-ca, front-proxy-ca, service-account-keys, leaves (default: everything)")
	f.StringVar(&o.Soak, "soak", "", "longest time to wait until the old is unused (default: the longest token lifetime, at most 1h)")
	f.BoolVar(&o.RestartPods, "restart-pods", false, "restart the owners of pods that use the old")
	f.BoolVar(&o.Complete, "complete", false, "retire the old although it is still in use")
	return c
}

func (t *tool) rotateCluster(ctx context.Context, name string, want kubernetes.RotationOptions, wait bool) error {
	o, err := t.findCluster(ctx, name)
	if err != nil {
		return err
	}
	resp, err := t.client.Do(ctx, request(http.MethodPost, t.client.ARM(o.str("id")+"/rotateClusterCertificates"), client.VersionClusters, want))
	if err != nil {
		return err
	}
	t.warnings(resp)
	back := "keyfleet cluster show " + o.name()
	operation := resp.Header.Get("Azure-AsyncOperation")
	if !wait || operation == "" {
		t.say("To see how it stands: %s", back)
		return t.done("The certificates of cluster %s are being rotated.", o.name())
	}
	var op object
	err = t.waiting(ctx, rotationWait, back, func(ctx context.Context, p *progress) error {
		return t.client.Poll(ctx, rotationLook, func(ctx context.Context) (bool, error) {
			var err error
			if op, err = t.call(ctx, client.Request{Method: http.MethodGet, URL: operation}); err != nil {
				return false, err
			}
			p.show("Cluster %s: %s", o.name(), rotationText(op.str("percentComplete"), op.str("properties.step"), op.str("properties.waiting")))
			return op.str("status") != "InProgress", nil
		})
	})
	if err != nil {
		return err
	}
	if op.str("status") != "Succeeded" {
		e := &cliError{code: op.str("error.code"), message: op.str("error.message"), fix: back, exit: client.ExitFailed}
		for _, d := range op.objects("error.details") {
			if d.str("code") == "Fix" {
				e.fix = d.str("message")
			}
		}
		return e
	}
	took := op.time("endTime").Sub(op.time("startTime")).Round(time.Second)
	return t.done("The certificates of cluster %s are rotated, in %s; its kubeconfig is renewed, and was seen to be accepted.", o.name(), took)
}

// rotationText is a line about a rotation that runs.
func rotationText(percent, step, waiting string) string {
	switch {
	case waiting != "":
		return percent + " %, " + waiting
	case step == "":
		return "beginning"
	}
	return percent + " %, " + step
}

// rotationCell tells of a cluster's last rotation.
func (t *tool) rotationCell(o object) string {
	r := func(member string) string { return o.str("properties.rotation." + member) }
	switch r("state") {
	case "":
		return ""
	case "Running":
		return "running: " + rotationText(r("percent"), r("step"), r("waiting"))
	case "Succeeded":
		return "succeeded " + t.when(o.time("properties.rotation.ended"))
	}
	text := "failed " + t.when(o.time("properties.rotation.ended")) + ": " + r("error.message")
	for _, d := range o.objects("properties.rotation.error.details") {
		text += "; " + d.str("message")
	}
	return text
}

// sshCell tells whether certificates can be rotated.
func sshCell(o object) string {
	if o.str("properties.ssh.host") == "" {
		return "not configured"
	}
	return fmt.Sprintf("configured, %s@%s", o.str("properties.ssh.user"), o.str("properties.ssh.host"))
}

// sshFlags are those of the access over SSH.
type sshFlags struct{ host, user, key, known string }

func (f *sshFlags) declare(fs *pflag.FlagSet) {
	fs.StringVar(&f.host, "ssh-host", "", "HOST[:PORT] of a control plane node, for cluster rotate-certs; all others are reached through it")
	fs.StringVar(&f.user, "ssh-user", "", "login user on all nodes, who may become root without a password (default: azureuser)")
	fs.StringVar(&f.key, "ssh-key-file", "", "file with the private key of that user, without a passphrase")
	fs.StringVar(&f.known, "ssh-known-hosts-file", "", "file with the host keys of all nodes, as of OpenSSH")
}

// access reads what the flags name; nil: none was given.
func (t *tool) access(f sshFlags) (*kubernetes.SSHAccess, error) {
	if f == (sshFlags{}) {
		return nil, nil
	}
	for _, need := range []struct{ flag, value string }{{"--ssh-host", f.host}, {"--ssh-key-file", f.key}, {"--ssh-known-hosts-file", f.known}} {
		if need.value == "" {
			return nil, usagef("%s is missing: SSH access is given as a whole", need.flag).withFix("give --ssh-host, --ssh-user, --ssh-key-file and --ssh-known-hosts-file")
		}
	}
	key, err := t.readBody(f.key)
	if err != nil {
		return nil, err
	}
	known, err := t.readBody(f.known)
	if err != nil {
		return nil, err
	}
	return &kubernetes.SSHAccess{Host: f.host, User: cmp.Or(f.user, "azureuser"), PrivateKey: string(key), KnownHosts: string(known)}, nil
}
