package rotatecerts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
)

// parse reads flags as the command does.
func parse(t *testing.T, args ...string) *options {
	t.Helper()
	var o options
	f := pflag.NewFlagSet("rotate-certs", pflag.ContinueOnError)
	o.register(f)
	if err := f.Parse(args); err != nil {
		t.Fatal(err)
	}
	return &o
}

func environment(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

// complete does what the command does with its flags, and returns the warnings.
func complete(t *testing.T, o *options, vars map[string]string) (warnings string, err error) {
	t.Helper()
	t.Setenv("HOME", "/home/me")
	err = o.complete(environment(vars), func(format string, args ...any) { warnings += fmt.Sprintf(format, args...) + "\n" })
	return warnings, err
}

// TestTheExampleOfTheGuide takes the arguments of aks-engine's documentation as
// they stand there.
func TestTheExampleOfTheGuide(t *testing.T) {
	o := parse(
		t,
		"--location", "westus2",
		"--api-model", "_output/my-cluster/apimodel.json",
		"--linux-ssh-private-key", "~/.ssh/id_rsa",
		"--ssh-host", "my-cluster.westus2.cloudapp.azure.com",
		"--resource-group", "my-cluster",
		"--client-id", "12345678-XXXX-YYYY-ZZZZ-1234567890ab",
		"--client-secret", "12345678-XXXX-YYYY-ZZZZ-1234567890ab",
		"--subscription-id", "12345678-XXXX-YYYY-ZZZZ-1234567890ab",
		"--azure-env", "AzureStackCloud",
	)
	warnings, err := complete(t, o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.requireFor("aks-engine"); err != nil {
		t.Error(err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for what, pair := range map[string][2]string{
		"layout":    {o.layout, "aks-engine"},
		"SSH key":   {o.sshKey, "/home/me/.ssh/id_rsa"},
		"API model": {o.apiModel, filepath.Join(wd, "_output/my-cluster/apimodel.json")},
		"user":      {o.sshUser, "azureuser"},
		"run":       {o.dir, "/home/me/.local/state/keyfleet/rotate-certs/my-cluster.westus2.cloudapp.azure.com"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: %s, want %s", what, pair[0], pair[1])
		}
	}
	if !strings.Contains(warnings, "AZURE_CLIENT_SECRET") || strings.Contains(warnings, "1234") {
		t.Errorf("warnings:\n%s", warnings)
	}
}

func TestWhatIsRequired(t *testing.T) {
	const ssh = "--ssh-host h --linux-ssh-private-key k"
	const cluster = ssh + " --api-model m --location l --resource-group g"
	const aks = cluster + " --subscription-id s"
	for _, tc := range []struct {
		reason, args, layout string
		env                  map[string]string
		want                 string // flags that are missing
	}{
		{"kubeadm needs the way in only", ssh, "kubeadm", nil, ""},
		{"kubeadm, nothing given", "", "kubeadm", nil, "--ssh-host, --linux-ssh-private-key"},
		{"a layout not yet known needs the way in", ssh, "", nil, ""},
		{"aks-engine, nothing given", "", "aks-engine", nil, "--ssh-host, --linux-ssh-private-key, --api-model, --location, --resource-group, --subscription-id, --client-id, --client-secret"},
		{"found on the host, and no model was given", ssh, "aks-engine", nil, "--api-model, --location, --resource-group, --subscription-id, --client-id, --client-secret"},
		{"a client secret is the default", aks, "aks-engine", nil, "--client-id, --client-secret"},
		{"id and secret", aks + " --client-id i --client-secret x", "aks-engine", nil, ""},
		{"all three from the environment", cluster, "aks-engine", map[string]string{"AZURE_CLIENT_ID": "i", "AZURE_CLIENT_SECRET": "x", "AZURE_SUBSCRIPTION_ID": "s"}, ""},
		{"a client certificate", aks + " --auth-method client_certificate", "aks-engine", nil, "--client-id, --certificate-path, --private-key-path"},
		{"a client certificate, whole", aks + " --auth-method client_certificate --client-id i --certificate-path c --private-key-path k", "aks-engine", nil, ""},
		{"the login of az", aks + " --auth-method cli", "aks-engine", nil, ""},
		{"a code for a device", aks + " --auth-method device", "aks-engine", nil, ""},
		{"the cloud need not be named", aks + " --auth-method cli --azure-env AzureCloud", "aks-engine", nil, ""},
	} {
		o := parse(t, strings.Fields(tc.args)...)
		if err := o.credentials(environment(tc.env)); err != nil {
			t.Fatal(err)
		}
		err := o.requireFor(tc.layout)
		if tc.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tc.reason, err)
			}
			continue
		}
		var e *fault.Error
		if !errors.As(err, &e) || e.Code != "Usage" || e.Target != tc.want || e.Fix == "" {
			t.Errorf("%s: %v\nwant %s", tc.reason, err, tc.want)
			continue
		}
		for _, flag := range strings.Split(tc.want, ", ") {
			if !strings.Contains(e.Message, flag+": it is required") {
				t.Errorf("%s: %s is not named: %s", tc.reason, flag, e.Message)
			}
		}
		if strings.Contains(tc.want, "--client-secret") && !strings.Contains(e.Message, "AZURE_CLIENT_SECRET in the environment or --client-secret-file") {
			t.Errorf("%s: no other way is named: %s", tc.reason, e.Message)
		}
	}
}

func TestTheLayoutFollowsFromTheModel(t *testing.T) {
	for args, want := range map[string]string{"": "", "--api-model m": "aks-engine", "--layout kubeadm": "kubeadm", "--layout aks-engine": "aks-engine"} {
		o := parse(t, strings.Fields(args)...)
		if _, _ = complete(t, o, nil); o.layout != want {
			t.Errorf("%q: %q, want %q", args, o.layout, want)
		}
	}
}

func TestWordsAreChecked(t *testing.T) {
	const ssh = "--ssh-host h --linux-ssh-private-key k "
	for _, tc := range []struct{ reason, args, at, want string }{
		{"a layout", "--layout talos", "--layout", `"talos" is not a layout that we know: use kubeadm or aks-engine`},
		{"a way to log in", "--auth-method password", "--auth-method", "use client_secret or client_certificate or cli or device"},
		{"an identity system", "--identity-system ldap", "--identity-system", "use azure_ad or adfs"},
		{"a phase", "--until never", "--until", "use soak"},
		{"a form", "-o xml", "--output", "use text or json"},
		{"a model of a cluster that has none", "--layout kubeadm --api-model m", "--api-model", "leave out one"},
		{"a profile where none can be used", "--layout kubeadm --certificate-profile p", "--certificate-profile", "cannot be used with the layout kubeadm"},
		{"two secrets", "--client-secret hunter2 --client-secret-file f", "--client-secret-file", "given twice"},
		{"a secret's file that is not there", "--client-secret-file /nowhere/f", "--client-secret-file", "no such file"},
		{"a secret's file that is empty", "--client-secret-file /dev/null", "--client-secret-file", "is empty"},
		{"a host that is none", "--ssh-host a/b", "--ssh-host", "not the address of an SSH server"},
	} {
		_, err := complete(t, parse(t, strings.Fields(ssh+tc.args)...), nil)
		var e *fault.Error
		if !errors.As(err, &e) || e.Code != "Usage" || e.Target != tc.at || !strings.Contains(e.Message, tc.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v\nwant %q at %s", tc.reason, err, tc.want, tc.at)
		}
	}
}

func TestTheHostMayBeAURI(t *testing.T) {
	for _, host := range []string{"h", "h:2222", "me@h", "ssh://me@h:2222", "https://h:6443", "my-cluster.westus2.cloudapp.azure.com", "10.240.255.5", "[::1]:22"} {
		if _, err := complete(t, parse(t, "--ssh-host", host, "--linux-ssh-private-key", "k"), nil); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
}

func TestTheSecretMayBeInAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("hunter2\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := parse(t, "--ssh-host", "h", "--linux-ssh-private-key", "k", "--client-secret-file", file)
	warnings, err := complete(t, o, map[string]string{"AZURE_CLIENT_SECRET": "of the environment"})
	if err != nil || o.clientSecret != "hunter2" || warnings != "" {
		t.Errorf("the secret is %q (%v), warnings %q", o.clientSecret, err, warnings)
	}
}

func TestEveryPathIsMadeAbsolute(t *testing.T) {
	o := parse(t, "--ssh-host", "h", "--linux-ssh-private-key", "~/k", "--api-model", "~/m", "--certificate-profile", "~/p", "--certificate-path", "~/c",
		"--private-key-path", "~/pk", "--known-hosts", "~/kh,/etc/kh", "--run-dir", "~/r")
	_, _ = complete(t, o, nil) // some of what is required is missing
	got := []string{o.sshKey, o.apiModel, o.profile, o.certificatePath, o.privateKeyPath, o.knownHosts[0], o.knownHosts[1], o.dir}
	if want := "/home/me/k /home/me/m /home/me/p /home/me/c /home/me/pk /home/me/kh /etc/kh /home/me/r"; strings.Join(got, " ") != want {
		t.Errorf("%s\nwant\n%s", strings.Join(got, " "), want)
	}
}

func TestTheModelIsOfTheSameCluster(t *testing.T) {
	for _, tc := range []struct {
		flag, model string
		ok          bool
	}{
		{"westus2", "westus2", true},
		{"West US 2", "westus2", true},
		{"westus2", "West US 2", true},
		{"westus", "westus2", false},
		{"westus2", "", false},
	} {
		err := (&options{location: tc.flag}).matchesModel(&apimodel.Model{Location: tc.model})
		if (err == nil) != tc.ok || err != nil && !strings.Contains(err.Error(), "--location") {
			t.Errorf("--location %q and a model of %q: %v", tc.flag, tc.model, err)
		}
	}
}
