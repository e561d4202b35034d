package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
)

// loginFlags are the ways to say where the server is and who we are.
type loginFlags struct {
	from       string
	name       string
	server     string
	address    string
	ca         string
	tenant     string
	clientID   string
	secretFile string
}

func (t *tool) loginCommand() *cobra.Command {
	var f loginFlags
	c := t.verb("login", "Log in to a server and make it the current context", `
keyfleet login --from /var/lib/keyfleet
keyfleet login --server https://arm.keyfleet.internal:8443 --address 10.0.0.7:8443 --ca ca.crt --client-id ID --client-secret-file secret.txt
KEYFLEET_CLIENT_SECRET=... keyfleet login --server https://arm.example.net --client-id ID`,
		cobra.NoArgs, func(ctx context.Context, _ []string) error { return t.login(ctx, f) })
	c.Long = `Log in to a server and make it the current context.

--from reads admin.json of a server on this machine. --server asks a server for
its endpoints. The client secret is read from --client-secret-file, from the
environment (KEYFLEET_CLIENT_SECRET) or from the terminal, never from the command
line, where other users and the shell's history would see it. What is needed
later is kept in the configuration file with mode 0600.`
	c.Flags().StringVar(&f.from, "from", "", "data directory of a server on this machine")
	c.Flags().StringVar(&f.name, "name", "", "name of the context (default: the directory's or the server's name)")
	c.Flags().StringVar(&f.server, "server", t.env("KEYFLEET_SERVER"), "URL of the server's arm host")
	c.Flags().StringVar(&f.address, "address", t.env("KEYFLEET_ADDRESS"), "host:port to dial for all of the server's names (default: resolve them)")
	c.Flags().StringVar(&f.ca, "ca", t.env("KEYFLEET_CA"), "PEM file of the server's CA (default: the system's)")
	c.Flags().StringVar(&f.tenant, "tenant", t.env("KEYFLEET_TENANT"), "tenant id (default: the one that the server names)")
	c.Flags().StringVar(&f.clientID, "client-id", t.env("KEYFLEET_CLIENT_ID"), "client id of the application to log in as")
	c.Flags().StringVar(&f.secretFile, "client-secret-file", "", "file that holds the client secret; - is standard input")
	return c
}

func (t *tool) login(ctx context.Context, f loginFlags) error {
	var tg *target
	var err error
	switch {
	case f.from != "":
		tg, err = targetFrom(f.from)
		if f.name == "" {
			f.name = "default"
		}
	case f.server != "":
		var secret keyfleet.Secret
		if secret, err = t.readClientSecret(f.secretFile); err == nil {
			tg, err = t.discover(ctx, f, secret)
		}
		if u, uerr := url.Parse(f.server); uerr == nil && f.name == "" {
			f.name = strings.TrimPrefix(u.Hostname(), "arm.")
		}
	default:
		return usagef("--from or --server is needed").withFix("keyfleet login --from DIR")
	}
	if err != nil {
		return err
	}
	if err := t.tryLogin(ctx, tg); err != nil {
		return err
	}
	c, err := t.readConfig()
	if err != nil {
		return err
	}
	if old := c.Contexts[f.name]; old != nil && tg.Group == "" && tg.Account == "" {
		tg.Group, tg.Account = old.Group, old.Account
	}
	c.Contexts[f.name], c.Current, tg.name = tg, f.name, f.name
	if err := t.writeConfig(c); err != nil {
		return err
	}
	return changed(t, tg.public(c.Current), t.contextView(), "Logged in to %s as %s; the context is %q.", tg.Endpoints.ResourceManager, tg.ClientID, f.name)
}

// tryLogin proves the credential, and finds the subscription where none is named.
func (t *tool) tryLogin(ctx context.Context, tg *target) error {
	c, err := client.New(t.config(tg))
	if err != nil {
		return err
	}
	defer c.Close()
	subs, err := c.Subscriptions(ctx)
	if err != nil {
		return err
	}
	if tg.Subscription == "" && len(subs) == 1 {
		tg.Subscription = subs[0].SubscriptionID
	}
	return nil
}

// readClientSecret reads the secret from a file, the environment or the terminal.
func (t *tool) readClientSecret(file string) (keyfleet.Secret, error) {
	if file != "" {
		b, err := t.readInput(file)
		if err != nil {
			return "", fmt.Errorf("reading the client secret: %w", err)
		}
		return keyfleet.Secret(strings.TrimSpace(string(b))), nil
	}
	if s := t.env("KEYFLEET_CLIENT_SECRET"); s != "" {
		return keyfleet.Secret(s), nil
	}
	b, err := t.askHidden("Client secret")
	return keyfleet.Secret(strings.TrimSpace(string(b))), err
}

// askHidden asks on the terminal without showing what is typed.
func (t *tool) askHidden(what string) ([]byte, error) {
	f, ok := t.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil, usagef("%s is needed and there is no terminal to ask on", strings.ToLower(what)).withFix("name a file that holds it, or - for standard input")
	}
	fmt.Fprintf(t.err, "%s: ", what)
	b, err := term.ReadPassword(int(f.Fd()))
	fmt.Fprintln(t.err)
	return b, err
}

// maxInput bounds what is read from files and standard input.
const maxInput = 4 << 20

// readInput reads a file, or standard input for "-".
func (t *tool) readInput(name string) ([]byte, error) {
	r := t.in
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err == nil && len(b) > maxInput {
		err = fmt.Errorf("%s is larger than %d bytes", name, maxInput)
	}
	return b, err
}

// metadata is the part of GET /metadata/endpoints?api-version=2022-09-01 that we use.
type metadata struct {
	ResourceManager string `json:"resourceManager"`
	Batch           string `json:"batch"`
	Authentication  struct {
		LoginEndpoint string `json:"loginEndpoint"`
	} `json:"authentication"`
	Suffixes struct {
		KeyVaultDNS string `json:"keyVaultDns"`
	} `json:"suffixes"`
}

// discover asks a server for its endpoints.
func (t *tool) discover(ctx context.Context, f loginFlags, secret keyfleet.Secret) (*target, error) {
	if f.clientID == "" {
		return nil, usagef("--client-id is needed with --server").withFix("keyfleet login --server %s --client-id ID", f.server)
	}
	base := strings.TrimRight(f.server, "/")
	if u, err := url.Parse(base); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, usagef("%q is not the https URL of a server", f.server)
	}
	tg := &target{ClientID: f.clientID, ClientSecret: secret, Tenant: f.tenant, Subscription: t.flags.subscription, Group: t.flags.group}
	if f.ca != "" {
		b, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("reading the CA of the server: %w", err)
		}
		tg.CA = string(b)
	}
	tg.Endpoints = keyfleet.Endpoints{ResourceManager: base, Login: base, Listen: f.address}
	if tg.Tenant == "" {
		tg.Tenant = "common" // until the server has named its own
	}
	c, err := client.New(t.config(tg))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var m metadata
	if err := c.Call(ctx, client.Request{Method: http.MethodGet, URL: base + "/metadata/endpoints", Version: "2022-09-01", Open: true}, &m); err != nil {
		return nil, err
	}
	login := strings.TrimRight(m.Authentication.LoginEndpoint, "/")
	vault := strings.TrimPrefix(m.Suffixes.KeyVaultDNS, ".")
	batch := strings.Trim(strings.TrimPrefix(m.Batch, "https://"), "/")
	if login == "" || vault == "" {
		return nil, &cliError{code: "NotKeyfleet", message: fmt.Sprintf("%s does not describe its endpoints as a Keyfleet server does.", base), fix: "name the server's arm host", exit: client.ExitFailed}
	}
	tg.Endpoints = keyfleet.Endpoints{ResourceManager: base, Login: login, VaultSuffix: vault, BatchSuffix: batch, Listen: f.address}
	tg.Endpoints.Node = "https://node." + strings.TrimPrefix(vault, "vault.")
	if f.tenant == "" {
		if tg.Tenant = c.AskTenant(ctx); tg.Tenant == "" {
			return nil, usagef("the server does not name its tenant").withFix("add --tenant ID")
		}
	}
	return tg, nil
}

// targetFromEnv is the context that KEYFLEET_SERVER and its companions describe.
func (t *tool) targetFromEnv(ctx context.Context, server string) (*target, error) {
	secret := t.env("KEYFLEET_CLIENT_SECRET")
	if secret == "" {
		return nil, &cliError{code: "NotLoggedIn", message: "KEYFLEET_SERVER is set and KEYFLEET_CLIENT_SECRET is not.", fix: "set both, or neither and use a context", exit: client.ExitLogin}
	}
	tg, err := t.discover(ctx, loginFlags{
		server: server, address: t.env("KEYFLEET_ADDRESS"), ca: t.env("KEYFLEET_CA"),
		tenant: t.env("KEYFLEET_TENANT"), clientID: t.env("KEYFLEET_CLIENT_ID"),
	}, keyfleet.Secret(secret))
	if err != nil {
		return nil, err
	}
	tg.name = "KEYFLEET_SERVER"
	if tg.Subscription == "" {
		if err := t.tryLogin(ctx, tg); err != nil {
			return nil, err
		}
	}
	return tg, nil
}

func (t *tool) logoutCommand() *cobra.Command {
	return t.verb("logout [CONTEXT]", "Forget a context and its credential", "keyfleet logout\nkeyfleet logout dev",
		cobra.MaximumNArgs(1), func(_ context.Context, args []string) error {
			c, err := t.readConfig()
			if err != nil {
				return err
			}
			name := c.Current
			if t.flags.context != "" {
				name = t.flags.context
			}
			if len(args) == 1 {
				name = args[0]
			}
			if name == "" || c.Contexts[name] == nil {
				return notFoundf("there is no context %q", name).withFix("keyfleet context list")
			}
			delete(c.Contexts, name)
			if c.Current == name {
				c.Current = ""
			}
			if err := t.writeConfig(c); err != nil {
				return err
			}
			return t.done("Logged out of %q.", name)
		})
}
