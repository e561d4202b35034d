package rotatecerts

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// options are the flags, as they were given.
type options struct {
	// Those of the documented command.
	apiModel, sshHost, sshKey, location, subscription, group string
	clientID, clientSecret, azureEnv, profile                string
	force                                                    bool
	// Those that it has and the page leaves out.
	authMethod, certificatePath, privateKeyPath, identitySystem, language string
	debug                                                                 bool
	// Ours.
	layout, sshUser, dir, until, output string
	knownHosts, only, recipients        []string
	soak                                time.Duration
	restartPods, takeOver, dryRun       bool
}

func (o *options) register(f *pflag.FlagSet) {
	f.StringVarP(&o.apiModel, "api-model", "m", "", "path of the API model (apimodel.json) of an aks-engine cluster")
	f.StringVar(&o.sshHost, "ssh-host", "", "host or URI of a control plane node; all others are reached through it")
	f.StringVar(&o.sshKey, "linux-ssh-private-key", "", "path of the private SSH key of the Linux nodes")
	f.StringVarP(&o.location, "location", "l", "", "Azure location of the cluster")
	f.StringVarP(&o.subscription, "subscription-id", "s", "", "Azure subscription of the cluster")
	f.StringVarP(&o.group, "resource-group", "g", "", "Azure resource group of the cluster")
	f.StringVar(&o.clientID, "client-id", "", "service principal's client id")
	f.StringVar(&o.clientSecret, "client-secret", "", "service principal's secret; better in AZURE_CLIENT_SECRET")
	f.StringVar(&o.azureEnv, "azure-env", "AzurePublicCloud", "name of the cloud")
	f.StringVar(&o.profile, "certificate-profile", "", "path of a JSON file with the new certificates")
	f.BoolVar(&o.force, "force", false, "accepted; skips nothing in this version")
	f.StringVar(&o.authMethod, "auth-method", "client_secret", "how the service principal logs in: client_secret, client_certificate, cli or device")
	f.StringVar(&o.certificatePath, "certificate-path", "", "path of the service principal's certificate")
	f.StringVar(&o.privateKeyPath, "private-key-path", "", "path of the key of that certificate")
	f.StringVar(&o.identitySystem, "identity-system", "azure_ad", "azure_ad or adfs")
	f.StringVar(&o.language, "language", "en-us", "language of error messages")
	f.BoolVar(&o.debug, "debug", false, "more output")

	f.StringVar(&o.layout, "layout", "", "layout of the cluster: kubeadm (default: looked for)")
	f.StringVar(&o.sshUser, "ssh-user", "azureuser", "login user, who may become root without a password")
	f.StringSliceVar(&o.knownHosts, "known-hosts", nil, "files of trusted host keys; new ones go into the first (default ~/.ssh/known_hosts)")
	f.StringSliceVar(&o.only, "only", nil, "what to rotate: "+strings.Join(rotation.ScopeWords(), ", ")+" (default: everything)")
	f.StringVar(&o.dir, "run-dir", "", "folder of the journal (default: below the user's state folder, by host)")
	f.StringArrayVar(&o.recipients, "journal-recipient", nil, "a further age or SSH public key that may open the journal")
	f.DurationVar(&o.soak, "soak", 0, "longest time to wait until the old is unused (default: the longest token lifetime, at most 1h)")
	f.StringVar(&o.until, "until", "", "stop before this phase's end: soak")
	f.BoolVar(&o.restartPods, "restart-pods", false, "restart the owners of pods that use the old")
	f.BoolVar(&o.takeOver, "take-over", false, "take the lock of another runner that is still at work")
	f.BoolVar(&o.dryRun, "dry-run", false, "show the plan and change nothing")
	f.StringVarP(&o.output, "output", "o", "text", "form of the answer: text or json")
}

// complete checks the flags and fills in what follows from others and from the
// environment. warn gets a line for each thing that deserves one.
func (o *options) complete(env func(string) string, warn func(string, ...any)) error {
	if o.clientSecret != "" {
		warn("Warning: a secret on the command line can be seen by every user of this machine; set AZURE_CLIENT_SECRET instead.")
	}
	for flag, value := range map[*string]string{&o.clientID: "AZURE_CLIENT_ID", &o.clientSecret: "AZURE_CLIENT_SECRET", &o.subscription: "AZURE_SUBSCRIPTION_ID"} {
		if *flag == "" {
			*flag = env(value)
		}
	}
	if o.apiModel != "" || o.layout == "aks-engine" {
		return fault.New(fault.Invalid, "LayoutNotSupported", "Clusters of the layout aks-engine cannot be rotated by this version.").At("--api-model").
			WithFix("see docs/roadmap.md; clusters made by kubeadm can: leave --api-model out")
	}
	if o.layout != "" && o.layout != "kubeadm" {
		return usage("--layout", "%q is not a layout that we know: use kubeadm", o.layout)
	}
	if o.profile != "" {
		return usage("--certificate-profile", "a profile of new certificates cannot be used with the layout kubeadm yet")
	}
	if o.until != "" && o.until != "soak" {
		return usage("--until", "%q is not known: use soak", o.until)
	}
	if o.output != "text" && o.output != "json" {
		return usage("--output", "%q is not known: use text or json", o.output)
	}
	for _, required := range []struct{ flag, value string }{{"--ssh-host", o.sshHost}, {"--linux-ssh-private-key", o.sshKey}} {
		if required.value == "" {
			return usage(required.flag, "it is required")
		}
	}
	if o.location != "" || o.subscription != "" || o.group != "" || o.clientID != "" {
		warn("Nothing here needs the cloud's API: location, subscription, resource group and service principal are not used.")
	}
	if o.force {
		warn("--force skips nothing in this version: a cluster whose API servers do not answer is refused.")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return fmt.Errorf("finding the home folder: %w", err)
	}
	o.sshKey = expand(o.sshKey, home)
	if len(o.knownHosts) == 0 {
		o.knownHosts = []string{filepath.Join(home, ".ssh", "known_hosts")}
	}
	for i := range o.knownHosts {
		o.knownHosts[i] = expand(o.knownHosts[i], home)
	}
	if o.dir == "" {
		state := env("XDG_STATE_HOME")
		if state == "" {
			state = filepath.Join(home, ".local", "state")
		}
		o.dir = filepath.Join(state, "keyfleet", "rotate-certs", safeName(o.sshHost))
	}
	o.dir = expand(o.dir, home)
	return nil
}

// expand replaces a leading ~, which a shell leaves alone inside quotes.
func expand(path, home string) string {
	if path == "~" || strings.HasPrefix(path, "~/") {
		return filepath.Join(home, strings.TrimPrefix(path, "~"))
	}
	return path
}

// safeName makes a folder's name of a host.
func safeName(host string) string {
	return strings.Trim(strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '-', r == '_':
			return r
		}
		return '_'
	}, host), "_.")
}

// usage is an error of the command line.
func usage(flag, format string, args ...any) error {
	return fault.New(fault.Invalid, "Usage", "%s: %s.", flag, fmt.Sprintf(format, args...)).At(flag).WithFix("keyfleet rotate-certs --help")
}
