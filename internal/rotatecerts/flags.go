package rotatecerts

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote"
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
	clientSecretFile                    string
	knownHosts, only, recipients        []string
	soak                                time.Duration
	restartPods, takeOver, dryRun       bool
	userFromModel                       bool // no --ssh-user was given
}

func (o *options) register(f *pflag.FlagSet) {
	f.StringVarP(&o.apiModel, "api-model", "m", "", "path of the API model (apimodel.json) of an aks-engine cluster")
	f.StringVar(&o.sshHost, "ssh-host", "", "host or URI of a control plane node; all others are reached through it")
	f.StringVar(&o.sshKey, "linux-ssh-private-key", "", "path of the private SSH key of the Linux nodes")
	f.StringVarP(&o.location, "location", "l", "", "Azure location of the cluster")
	f.StringVarP(&o.subscription, "subscription-id", "s", "", "Azure subscription of the cluster")
	f.StringVarP(&o.group, "resource-group", "g", "", "Azure resource group of the cluster")
	f.StringVar(&o.clientID, "client-id", "", "service principal's client id")
	f.StringVar(&o.clientSecret, "client-secret", "", "service principal's secret; better in AZURE_CLIENT_SECRET or --client-secret-file")
	f.StringVar(&o.clientSecretFile, "client-secret-file", "", "path of a file with the service principal's secret")
	f.StringVar(&o.azureEnv, "azure-env", "AzurePublicCloud", "name of the cloud")
	f.StringVar(&o.profile, "certificate-profile", "", "path of a JSON file with the new certificates")
	f.BoolVar(&o.force, "force", false, "go on without the proofs that need an API server, while none answers; brings back a cluster whose certificates have ended")
	f.StringVar(&o.authMethod, "auth-method", "client_secret", "how the service principal logs in: client_secret, client_certificate, cli or device")
	f.StringVar(&o.certificatePath, "certificate-path", "", "path of the service principal's certificate")
	f.StringVar(&o.privateKeyPath, "private-key-path", "", "path of the key of that certificate")
	f.StringVar(&o.identitySystem, "identity-system", "azure_ad", "azure_ad or adfs")
	f.StringVar(&o.language, "language", "en-us", "language of error messages")
	f.BoolVar(&o.debug, "debug", false, "more output")

	f.StringVar(&o.layout, "layout", "", "layout of the cluster: kubeadm or aks-engine (default: aks-engine with --api-model, else looked for)")
	f.StringVar(&o.sshUser, "ssh-user", "", "login user, who may become root without a password (default: that of the API model, else azureuser)")
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

// The layouts that --layout knows.
const (
	kubeadm   = "kubeadm"
	aksEngine = "aks-engine"
)

// complete checks the flags and fills in what follows from others and from the
// environment. warn gets a line for each thing that deserves one.
func (o *options) complete(env func(string) string, warn func(string, ...any)) error {
	home, err := os.UserHomeDir()
	if err != nil {
		return fmt.Errorf("finding the home folder: %w", err)
	}
	if o.layout == "" && o.apiModel != "" {
		o.layout = aksEngine
	}
	o.warn(warn)
	if err := o.checkWords(); err != nil {
		return err
	}
	if err := o.paths(env, home); err != nil {
		return err
	}
	if err := o.credentials(env); err != nil {
		return err
	}
	if o.sshUser == "" {
		o.sshUser, o.userFromModel = "azureuser", true
	}
	return o.requireFor(o.layout)
}

// warn says what of the flags is unwise or in vain.
func (o *options) warn(warn func(string, ...any)) {
	if o.clientSecret != "" {
		warn("Warning: a secret on the command line can be seen by every user of this machine; set AZURE_CLIENT_SECRET or use --client-secret-file instead.")
	}
	if o.profile == "" && (o.location != "" || o.subscription != "" || o.group != "" || o.clientID != "") {
		warn("Nothing here needs the cloud's API: location, subscription, resource group and service principal are not used.")
	}
}

// checkWords checks each flag that takes one of a few words, and those that
// contradict each other.
func (o *options) checkWords() error {
	for _, w := range []struct {
		flag, value, kind string
		known             []string
	}{
		{"--layout", o.layout, "a layout that we know", []string{"", kubeadm, aksEngine}},
		{"--auth-method", o.authMethod, "known", []string{"client_secret", "client_certificate", "cli", "device"}},
		{"--identity-system", o.identitySystem, "known", []string{"azure_ad", "adfs"}},
		{"--until", o.until, "known", []string{"", "soak"}},
		{"--output", o.output, "known", []string{"text", "json"}},
	} {
		if !slices.Contains(w.known, w.value) {
			return usage(w.flag, "%q is not %s: use %s", w.value, w.kind, strings.TrimPrefix(strings.Join(w.known, " or "), " or "))
		}
	}
	if _, unknown := rotation.ParseScope(o.only); len(unknown) > 0 {
		return usage("--only", "%s is not known: use %s", strings.Join(unknown, ", "), strings.Join(rotation.ScopeWords(), ", "))
	}
	if o.layout == kubeadm && o.apiModel != "" {
		return usage("--api-model", "a cluster of the layout kubeadm has none: leave out one of --api-model and --layout")
	}
	if o.clientSecret != "" && o.clientSecretFile != "" {
		return usage("--client-secret-file", "the secret is given twice: leave --client-secret out")
	}
	if o.sshHost != "" {
		if _, _, err := remote.ParseAddress(o.sshHost); err != nil {
			return usage("--ssh-host", "%s", fault.From(err).Message)
		}
	}
	return nil
}

// paths makes all of them absolute: the example of aks-engine's page quotes ~,
// which a shell then leaves alone.
func (o *options) paths(env func(string) string, home string) error {
	if len(o.knownHosts) == 0 {
		o.knownHosts = []string{"~/.ssh/known_hosts"}
	}
	if o.dir == "" {
		state := env("XDG_STATE_HOME")
		if state == "" {
			state = "~/.local/state"
		}
		o.dir = filepath.Join(state, "keyfleet", "rotate-certs", safeName(o.sshHost))
	}
	all := []*string{&o.apiModel, &o.profile, &o.sshKey, &o.certificatePath, &o.privateKeyPath, &o.clientSecretFile, &o.dir}
	for i := range o.knownHosts {
		all = append(all, &o.knownHosts[i])
	}
	for _, path := range all {
		if *path == "" {
			continue
		}
		absolute, err := filepath.Abs(expand(*path, home))
		if err != nil {
			return fmt.Errorf("finding %s: %w", *path, err)
		}
		*path = absolute
	}
	return nil
}

// credentials takes what was not given as a flag from the environment, and the
// secret from its file.
func (o *options) credentials(env func(string) string) error {
	if o.clientSecretFile != "" {
		secret, err := os.ReadFile(o.clientSecretFile)
		if err != nil {
			return usage("--client-secret-file", "%s", err)
		}
		if o.clientSecret = strings.TrimSpace(string(secret)); o.clientSecret == "" {
			return usage("--client-secret-file", "%s is empty", o.clientSecretFile)
		}
	}
	for flag, name := range map[*string]string{&o.clientID: "AZURE_CLIENT_ID", &o.clientSecret: "AZURE_CLIENT_SECRET", &o.subscription: "AZURE_SUBSCRIPTION_ID"} {
		if *flag == "" {
			*flag = env(name)
		}
	}
	return nil
}

// requireFor checks that all is there that a layout needs; "" is one that is
// not known yet. It is asked again when the layout has been found.
func (o *options) requireFor(layout string) error {
	type required struct{ flag, value, or string }
	all := []required{{flag: "--ssh-host", value: o.sshHost}, {flag: "--linux-ssh-private-key", value: o.sshKey}}
	if layout == kubeadm && o.profile != "" {
		return usage("--certificate-profile", "a profile of new certificates cannot be used with the layout kubeadm yet")
	}
	if layout == aksEngine {
		all = append(all, required{flag: "--api-model", value: o.apiModel}, required{flag: "--location", value: o.location},
			required{flag: "--resource-group", value: o.group}, required{"--subscription-id", o.subscription, "AZURE_SUBSCRIPTION_ID in the environment"})
		if o.authMethod == "client_secret" || o.authMethod == "client_certificate" {
			all = append(all, required{"--client-id", o.clientID, "AZURE_CLIENT_ID in the environment"})
		}
		if o.authMethod == "client_secret" {
			all = append(all, required{"--client-secret", o.clientSecret, "AZURE_CLIENT_SECRET in the environment or --client-secret-file"})
		}
		if o.authMethod == "client_certificate" {
			all = append(all, required{flag: "--certificate-path", value: o.certificatePath}, required{flag: "--private-key-path", value: o.privateKeyPath})
		}
	}
	var flags, missing []string
	for _, r := range all {
		if r.value != "" {
			continue
		}
		text := r.flag + ": it is required"
		if r.or != "" {
			text += ", or " + r.or
		}
		flags, missing = append(flags, r.flag), append(missing, text)
	}
	if len(missing) == 0 {
		return nil
	}
	return fault.New(fault.Invalid, "Usage", "%s.", strings.Join(missing, "; ")).At(strings.Join(flags, ", ")).WithFix("%s", help)
}

// matchesModel checks that the flags and the API model are about one cluster.
func (o *options) matchesModel(m *apimodel.Model) error {
	if region(o.location) != region(m.Location) {
		return usage("--location", "%q was given, and the API model is of a cluster in %q: one of the two is of another cluster", o.location, m.Location)
	}
	return nil
}

// region is the name of a location as aks-engine compares it: "West US 2" is westus2.
func region(location string) string {
	return strings.ToLower(strings.Join(strings.Fields(location), ""))
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

const help = "keyfleet rotate-certs --help"

// usage is an error of the command line.
func usage(flag, format string, args ...any) error {
	return fault.New(fault.Invalid, "Usage", "%s: %s.", flag, fmt.Sprintf(format, args...)).At(flag).WithFix("%s", help)
}
