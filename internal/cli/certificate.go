package cli

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/client"
)

// certificateView shows certificates. What the server says of their renewal
// stands in the member "renewal", which addRenewals puts there for tables.
func (t *tool) certificateView() view[object] {
	return view[object]{
		name: func(o object) string { return nameOf(o, "id") },
		columns: append([]column[object]{
			derived("Name", func(o object) string { return nameOf(o, "id") }),
			derived("Version", func(o object) string { return orElse(versionOf(o, "id"), o.str("renewal.version")) }),
			t.timeAt("Expires", "attributes.exp"),
			derived("Renews", t.renews),
			field("Enabled", "attributes.enabled"),
			derived("Problem", renewalProblem),
		}, only(
			field("Subject", "policy.x509_props.subject"),
			derived("Names", func(o object) string { return strings.Join(o.strs("policy.x509_props.sans.dns_names"), ", ") }),
			field("Issuer", "policy.issuer.name"),
			derived("Key", keyWords),
			derived("Renewal", renewalWords),
			t.timeAt("Not before", "attributes.nbf"),
			t.timeAt("Created", "attributes.created"),
			field("Form of the secret", "policy.secret_props.contentType"),
			field("Thumbprint", "x5t"),
			field("Id", "id"),
			field("Secret id", "sid"),
		)...),
	}
}

// versionView shows the versions of a certificate.
func (t *tool) versionView() view[object] {
	return view[object]{
		name: func(o object) string { return versionOf(o, "id") },
		columns: []column[object]{
			derived("Name", func(o object) string { return nameOf(o, "id") }),
			derived("Version", func(o object) string { return versionOf(o, "id") }),
			t.timeAt("Created", "attributes.created"), t.timeAt("Expires", "attributes.exp"),
			field("Enabled", "attributes.enabled"), field("Thumbprint", "x5t"),
		},
	}
}

func keyWords(o object) string {
	s, size := o.str("policy.key_props.kty"), o.str("policy.key_props.key_size")
	if c := o.str("policy.key_props.crv"); c != "" {
		size = c
	}
	return strings.TrimSpace(s + " " + size)
}

// autoRenew returns the AutoRenew action of a policy.
func autoRenew(o object) (action object, ok bool) {
	for _, a := range o.objects("policy.lifetime_actions") {
		if strings.EqualFold(a.str("action.action_type"), "AutoRenew") {
			return a, true
		}
	}
	return object{}, false
}

func renewalWords(o object) string {
	a, ok := autoRenew(o)
	switch {
	case o.at("policy") == nil:
		return ""
	case !ok:
		return "none; it expires"
	case a.num("trigger.days_before_expiry") > 0:
		return fmt.Sprintf("%d days before it expires", a.num("trigger.days_before_expiry"))
	}
	return fmt.Sprintf("at %d %% of its life", a.num("trigger.lifetime_percentage"))
}

// renews says when a certificate renews; empty where it is not known.
func (t *tool) renews(o object) string {
	switch {
	case o.at("renewal") == nil:
		return ""
	case o.at("renewal.nextRenewal") == nil:
		return "never"
	}
	return t.when(o.time("renewal.nextRenewal"))
}

// renewalProblem says why a certificate does not renew; empty if it does.
func renewalProblem(o object) string {
	if o.str("renewal.failing") != "true" && o.str("renewal.stalled") != "true" {
		return ""
	}
	s := o.str("renewal.reason") + ": " + o.str("renewal.message")
	if at := o.str("renewal.nextAttempt"); at != "" {
		return s + " Next attempt " + at + "."
	}
	return s
}

func (t *tool) certificateCommand() *cobra.Command {
	return t.noun("certificate", "Certificates of a vault",
		t.certificateCreate(), t.certificateShow(), t.certificateList(),
		t.objectVersions("certificates", "List the versions of a certificate", t.versionView),
		t.certificatePolicy(), t.certificateRenew(), t.certificateDeliveries(), t.certificateDownload(),
		t.objectDelete("certificates", "certificate"), t.objectDeleted("certificates"),
		t.objectRecover("certificates", "certificate"), t.objectPurge("certificates", "certificate"),
	)
}

func (t *tool) certificateShow() *cobra.Command {
	var version string
	c := t.verb("show VAULT NAME", "Show a certificate: what it says, when it expires, when it renews", `
keyfleet certificate show prod1 web
keyfleet certificate show prod1 web --query sid -o tsv`, cobra.RangeArgs(1, 2),
		func(ctx context.Context, args []string) error {
			v, err := t.objectArgs(ctx, args)
			if err != nil {
				return err
			}
			if version != "" {
				v.version = version
			}
			o, err := t.call(ctx, request(http.MethodGet, v.url("certificates"), client.VersionVaultData, nil))
			if err != nil {
				return err
			}
			if err := t.addRenewals(ctx, v.vault, []object{o}); err != nil {
				return err
			}
			return one(t, o, t.certificateView())
		})
	c.Flags().StringVar(&version, "version", "", "version (default: the newest)")
	return c
}

func (t *tool) certificateList() *cobra.Command {
	c := t.verb("list VAULT", "List the certificates of a vault, when they expire and when they renew", "keyfleet certificate list prod1", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			c, err := t.connect(ctx)
			if err != nil {
				return err
			}
			all, err := t.list(ctx, c.Vault(args[0], "/certificates"), client.VersionVaultData)
			if err != nil {
				return err
			}
			if err := t.addRenewals(ctx, args[0], all); err != nil {
				return err
			}
			return many(t, all, t.certificateView())
		})
	c.ValidArgsFunction = t.completeVaults
	return c
}

// addRenewals asks for tables, eight at a time, how the renewal of each
// certificate stands: the vault's own answers do not say.
func (t *tool) addRenewals(ctx context.Context, vault string, items []object) error {
	if f := t.form(); f != "table" && f != "tsv" {
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, item := range items {
		g.Go(func() error {
			r, err := t.renewal(ctx, vault, nameOf(item, "id"))
			var e *client.Error
			if errors.As(err, &e) && (e.Status == http.StatusNotFound || e.Status == http.StatusForbidden) {
				return nil // deleted meanwhile, or may be listed and not read
			}
			if err == nil {
				item.doc["renewal"] = r.doc
			}
			return err
		})
	}
	return g.Wait()
}

// renewal says how a certificate's renewal stands.
func (t *tool) renewal(ctx context.Context, vault, name string) (object, error) {
	u := t.client.ARM("/keyfleet/v1/vaults/" + url.PathEscape(vault) + "/certificates/" + url.PathEscape(name))
	return t.call(ctx, request(http.MethodGet, u, "", nil))
}

func (t *tool) certificateCreate() *cobra.Command {
	var f policyFlags
	var tagFlags []string
	c := t.verb("create VAULT NAME", "Create a certificate, or a new version of it by another policy", `
keyfleet certificate create prod1 web --dns web.example.net,www.example.net
keyfleet certificate create prod1 web --issuer Self --key-type RSA --validity 1 --renew-percent 50
keyfleet certificate create prod1 web --policy policy.json`, cobra.RangeArgs(1, 2), nil)
	c.Long = `Create a certificate. Without flags: CN=NAME, an EC key on P-256, 12 months,
signed by itself, renewed at 80 % of its life, secret in PEM form.`
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		v, err := t.objectArgs(ctx, args)
		if err != nil {
			return err
		}
		p, err := t.newPolicy(&f, v.name)
		if err != nil {
			return err
		}
		tags, err := tagsOf(tagFlags)
		if err != nil {
			return err
		}
		body := map[string]any{"policy": p, "attributes": map[string]bool{"enabled": true}}
		if tags != nil {
			body["tags"] = tags
		}
		op, err := t.call(ctx, request(http.MethodPost, v.url("certificates", "create"), client.VersionVaultData, body))
		if err != nil {
			return err
		}
		if !wait() {
			return changed(t, op, t.pendingView(), "Certificate %s is being created.", v)
		}
		return t.awaitCertificate(ctx, v, "is there")
	}
	f.add(c)
	c.Flags().StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated")
	return c
}

func (t *tool) pendingView() view[object] {
	return objectView(field("Id", "id"), field("Status", "status"), field("Details", "status_details"), field("Issuer", "issuer.name"))
}

// awaitCertificate follows the pending operation and shows the certificate.
func (t *tool) awaitCertificate(ctx context.Context, v vaultObject, word string) error {
	err := t.waiting(ctx, 2*time.Minute, fmt.Sprintf("keyfleet certificate show %s %s", v.vault, v.name), func(ctx context.Context, p *progress) error {
		return t.client.Poll(ctx, 200*time.Millisecond, func(ctx context.Context) (bool, error) {
			op, err := t.call(ctx, request(http.MethodGet, v.url("certificates", "pending"), client.VersionVaultData, nil))
			if err != nil {
				return false, err
			}
			p.show("Certificate %s: %s", v, op.str("status")+"  "+op.str("status_details"))
			switch op.str("status") {
			case "inProgress":
				return false, nil
			case "completed":
				return true, nil
			}
			return false, &cliError{
				code: orElse(op.str("error.code"), "CertificateFailed"), exit: client.ExitFailed,
				message: fmt.Sprintf("Certificate %s was not created: %s.", v, strings.TrimSuffix(orElse(op.str("error.message"), op.str("status")), ".")),
			}
		})
	})
	if err != nil {
		return err
	}
	o, err := t.call(ctx, request(http.MethodGet, v.url("certificates"), client.VersionVaultData, nil))
	if err != nil {
		return err
	}
	return changed(t, o, t.certificateView(), "Certificate %s %s: version %s, expires %s.", v, word, versionOf(o, "id"), t.when(o.time("attributes.exp")))
}

func orElse(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

func (t *tool) certificateDownload() *cobra.Command {
	var file, version string
	var withKey bool
	c := t.verb("download VAULT NAME", "Write a certificate into a file, with its key only when asked", `
keyfleet certificate download prod1 web --file web.pem
keyfleet certificate download prod1 web --file web-with-key.pem --with-key`, cobra.RangeArgs(1, 2),
		func(ctx context.Context, args []string) error {
			v, err := t.objectArgs(ctx, args)
			if err != nil {
				return err
			}
			if version != "" {
				v.version = version
			}
			if withKey {
				o, err := t.call(ctx, request(http.MethodGet, v.url("secrets"), client.VersionVaultData, nil))
				if err != nil {
					return err
				}
				return t.saveSecret(o, file)
			}
			o, err := t.call(ctx, request(http.MethodGet, v.url("certificates"), client.VersionVaultData, nil))
			if err != nil {
				return err
			}
			der, err := base64.StdEncoding.DecodeString(o.str("cer"))
			if err != nil {
				return fmt.Errorf("decoding the certificate: %w", err)
			}
			out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
			if file == "-" {
				_, err := t.out.Write(out)
				return err
			}
			return t.newFile(file, out)
		})
	c.Flags().StringVarP(&file, "file", "f", "", "file to write; it must not exist. - is standard output (not with --with-key)")
	c.Flags().StringVar(&version, "version", "", "version (default: the newest)")
	c.Flags().BoolVar(&withKey, "with-key", false, "the secret: key and chain, in the form that the policy says")
	_ = c.MarkFlagRequired("file")
	return c
}

// readBody reads a request body from a file or standard input.
func (t *tool) readBody(name string) ([]byte, error) {
	b, err := t.readInput(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, notFoundf("there is no file %s", strconv.Quote(name))
	}
	if err != nil {
		return nil, fmt.Errorf("reading the body: %w", err)
	}
	return b, nil
}

func (t *tool) certificateRenew() *cobra.Command {
	c := t.verb("renew VAULT NAME", "Renew a certificate now, by its policy", "keyfleet certificate renew prod1 web", cobra.RangeArgs(1, 2), nil)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		v, err := t.objectArgs(ctx, args)
		if err != nil {
			return err
		}
		u := t.client.ARM("/keyfleet/v1/vaults/" + url.PathEscape(v.vault) + "/certificates/" + url.PathEscape(v.name) + "/renew")
		op, err := t.call(ctx, request(http.MethodPost, u, "", nil))
		if err != nil {
			return err
		}
		if !wait() {
			return changed(t, op, t.pendingView(), "Certificate %s is being renewed.", v)
		}
		return t.awaitCertificate(ctx, v, "is renewed")
	}
	return c
}

func (t *tool) certificateDeliveries() *cobra.Command {
	return t.verb("deliveries VAULT NAME", "Say which nodes have a certificate, and which version", "keyfleet certificate deliveries prod1 web", cobra.RangeArgs(1, 2),
		func(ctx context.Context, args []string) error {
			v, err := t.objectArgs(ctx, args)
			if err != nil {
				return err
			}
			u := t.client.ARM("/keyfleet/v1/vaults/" + url.PathEscape(v.vault) + "/certificates/" + url.PathEscape(v.name) + "/deliveries")
			o, err := t.call(ctx, request(http.MethodGet, u, "", nil))
			if err != nil {
				return err
			}
			newest := o.str("version")
			vw := view[object]{
				name: func(o object) string { return o.str("node") },
				columns: []column[object]{
					derived("Pool", func(o object) string { return lastPart(o.str("pool")) }),
					field("Node", "node"), field("Version", "version"),
					derived("Newest", func(o object) string { return strconv.FormatBool(o.str("version") == newest) }),
					t.timeAt("Since", "since"),
					derived("Took", func(o object) string {
						sec, err := strconv.ParseFloat(o.str("seconds"), 64)
						if err != nil {
							return ""
						}
						return time.Duration(sec * float64(time.Second)).Round(time.Millisecond).String()
					}),
					field("Path", "path"),
				},
			}
			if f := t.form(); f != "table" && f != "tsv" && f != "name" {
				return t.data(o)
			}
			return many(t, o.objects("nodes"), vw)
		})
}
