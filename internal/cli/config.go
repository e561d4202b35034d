package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sort"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
)

// configFile is ~/.config/keyfleet/config.yaml. It holds credentials, so it is
// written with mode 0600 and refused with a wider one:
//
//	current: dev
//	contexts:
//	  dev:
//	    endpoints: {resourceManager: https://arm.keyfleet.internal:8443, ...}
//	    tenant: 72f9...
//	    subscription: 0429...
//	    clientId: b9f6...
//	    clientSecret: ...
//	    ca: |
//	      -----BEGIN CERTIFICATE-----
//	    group: rg1          (default of -g when something is created)
//	    account: acct1      (default of --account)
type configFile struct {
	Current  string             `json:"current"`
	Contexts map[string]*target `json:"contexts"`
}

// target is a context: a server, and who we are there.
type target struct {
	Endpoints    keyfleet.Endpoints `json:"endpoints"`
	Tenant       string             `json:"tenant"`
	Subscription string             `json:"subscription,omitempty"`
	ClientID     string             `json:"clientId"`
	ClientSecret keyfleet.Secret    `json:"clientSecret,omitempty"`
	CA           string             `json:"ca,omitempty"`
	Group        string             `json:"group,omitempty"`
	Account      string             `json:"account,omitempty"`

	name string // of the context; "KEYFLEET_FROM" or "KEYFLEET_SERVER" where the environment is the context
}

// configPath is where the configuration is.
func (t *tool) configPath() (string, error) {
	if p := t.env("KEYFLEET_CONFIG"); p != "" {
		return p, nil
	}
	if d := t.env("XDG_CONFIG_HOME"); d != "" {
		return filepath.Join(d, "keyfleet", "config.yaml"), nil
	}
	home := t.env("HOME")
	if home == "" {
		var err error
		if home, err = os.UserHomeDir(); err != nil {
			return "", fmt.Errorf("finding the configuration: %w", err)
		}
	}
	return filepath.Join(home, ".config", "keyfleet", "config.yaml"), nil
}

// readConfig reads the configuration; one that does not exist is empty.
func (t *tool) readConfig() (*configFile, error) {
	path, err := t.configPath()
	if err != nil {
		return nil, err
	}
	c := &configFile{Contexts: map[string]*target{}}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		return nil, &cliError{
			code: "ConfigTooOpen", message: fmt.Sprintf("%s holds credentials and others may read it (mode %04o).", path, info.Mode().Perm()),
			fix: "chmod 600 " + path, exit: client.ExitFailed,
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	if err := yaml.UnmarshalStrict(b, c); err != nil {
		return nil, &cliError{code: "ConfigInvalid", message: fmt.Sprintf("%s cannot be read: %v.", path, err), fix: "correct it, or remove it and log in again", exit: client.ExitFailed}
	}
	for name, tg := range c.Contexts {
		if tg == nil {
			return nil, &cliError{code: "ConfigInvalid", message: fmt.Sprintf("The context %q in %s is empty.", name, path), fix: "keyfleet logout " + name, exit: client.ExitFailed}
		}
		tg.name = name
	}
	return c, nil
}

// writeConfig replaces the configuration at once, readable by its owner only.
func (t *tool) writeConfig(c *configFile) error {
	path, err := t.configPath()
	if err != nil {
		return err
	}
	b, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	if err := replaceFile(path, b, 0o600); err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	return nil
}

// replaceFile writes a file beside the old one and renames it over it.
func replaceFile(path string, b []byte, mode os.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".keyfleet-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(b); err != nil {
		_ = f.Close()
		return err
	}
	if err = errors.Join(f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func (c *configFile) names() []string {
	names := make([]string, 0, len(c.Contexts))
	for n := range c.Contexts {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// pick finds the context that this run is about. The environment comes first,
// because it is how scripts say what they mean; then --context, then the current one.
func (t *tool) pick(ctx context.Context) (*target, error) {
	if t.flags.context == "" {
		if dir := t.env("KEYFLEET_FROM"); dir != "" {
			return targetFrom(dir)
		}
		if server := t.env("KEYFLEET_SERVER"); server != "" {
			return t.targetFromEnv(ctx, server)
		}
	}
	c, err := t.readConfig()
	if err != nil {
		return nil, err
	}
	name := t.flags.context
	if name == "" {
		name = c.Current
	}
	if name == "" {
		return nil, &cliError{code: "NotLoggedIn", message: "You are not logged in to a server.", fix: "keyfleet login --from DIR", exit: client.ExitLogin}
	}
	tg := c.Contexts[name]
	if tg == nil {
		return nil, notFoundf("there is no context %q", name).withFix("keyfleet context list")
	}
	return tg, nil
}

// targetFrom is the context that a server's data directory describes.
func targetFrom(dir string) (*target, error) {
	a, err := client.ReadAdmin(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFoundf("there is no admin.json in %s", dir).withFix("name the --data-dir of a server that has been started")
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, &cliError{code: "NotReadable", message: fmt.Sprintf("%s may only be read by the user that runs the server.", filepath.Join(dir, "admin.json")), fix: "log in as that user, or as root", exit: client.ExitDenied}
	}
	if err != nil {
		return nil, err
	}
	tg := &target{
		Endpoints: a.Endpoints, Tenant: a.Tenant, Subscription: a.Subscription,
		ClientID: a.ClientID, ClientSecret: a.ClientSecret, name: "KEYFLEET_FROM",
	}
	if a.CAFile != "" {
		ca, err := os.ReadFile(a.CAFile)
		if err != nil {
			return nil, fmt.Errorf("reading the CA of the server: %w", err)
		}
		tg.CA = string(ca)
	}
	return tg, nil
}

// config is what the client of this context needs.
func (t *tool) config(tg *target) client.Config {
	return client.Config{
		Endpoints: tg.Endpoints, Tenant: tg.Tenant, Subscription: tg.Subscription,
		ClientID: tg.ClientID, ClientSecret: tg.ClientSecret, CA: []byte(tg.CA), UserAgent: "keyfleet/" + t.version,
	}
}

// connect makes the client of this run, once.
func (t *tool) connect(ctx context.Context) (*client.Client, error) {
	if t.client != nil {
		return t.client, nil
	}
	tg, err := t.pick(ctx)
	if err != nil {
		return nil, err
	}
	cp := *tg
	if s := t.flags.subscription; s != "" {
		cp.Subscription = s
	}
	if s := t.flags.group; s != "" {
		cp.Group = s
	}
	if s := t.env("KEYFLEET_ACCOUNT"); s != "" {
		cp.Account = s
	}
	if cp.ClientSecret == "" {
		return nil, &cliError{code: "NotLoggedIn", message: fmt.Sprintf("The context %q has no credential.", cp.name), fix: "keyfleet login --from DIR", exit: client.ExitLogin}
	}
	c, err := client.New(t.config(&cp))
	if err != nil {
		return nil, err
	}
	t.target, t.client = &cp, c
	return c, nil
}

// subscription is the subscription of this run: the flag's, the context's, or
// the only one that the caller sees. connect must have succeeded.
func (t *tool) subscription(ctx context.Context) (string, error) {
	if t.target.Subscription != "" {
		return t.target.Subscription, nil
	}
	subs, err := t.client.Subscriptions(ctx)
	if err != nil {
		return "", err
	}
	switch len(subs) {
	case 0:
		return "", &cliError{
			code: "NoSubscription", message: "You see no subscription: nothing was granted to you yet.", exit: client.ExitDenied,
			fix: "an Owner types: keyfleet role assign --object-id OID --role Reader",
		}
	case 1:
		t.target.Subscription = subs[0].SubscriptionID
		return subs[0].SubscriptionID, nil
	}
	return "", usagef("you see %d subscriptions; which one?", len(subs)).
		withFix("add --subscription ID, or keyfleet context set --subscription ID")
}
