package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

// policyFlags are the parts of a certificate policy that have a flag.
type policyFlags struct {
	file        string
	subject     string
	dns         []string
	emails      []string
	keyType     string
	keySize     int
	curve       string
	reuseKey    bool
	notExport   bool
	form        string
	months      int
	issuer      string
	daysBefore  int
	percent     int
	noRenew     bool
	keyUsage    []string
	extKeyUsage []string
}

func (f *policyFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.file, "policy", "", "file with the whole policy as JSON; - is standard input. The flags below change it")
	fs.StringVar(&f.subject, "subject", "", "distinguished name (default: CN=NAME)")
	fs.StringSliceVar(&f.dns, "dns", nil, "DNS names, comma-separated")
	fs.StringSliceVar(&f.emails, "email", nil, "e-mail addresses, comma-separated")
	fs.StringVar(&f.keyType, "key-type", "", "RSA or EC (default: EC)")
	fs.IntVar(&f.keySize, "key-size", 0, "bits of an RSA key: 2048, 3072 or 4096 (default: 2048)")
	fs.StringVar(&f.curve, "curve", "", "curve of an EC key: P-256, P-384 or P-521 (default: P-256)")
	fs.BoolVar(&f.reuseKey, "reuse-key", false, "keep the key when renewing")
	fs.BoolVar(&f.notExport, "not-exportable", false, "the secret has the certificate without its key")
	fs.StringVar(&f.form, "form", "", "form of the secret: pem or pfx (default: pem)")
	fs.IntVar(&f.months, "validity", 0, "months that it is valid (default: 12)")
	fs.StringVar(&f.issuer, "issuer", "", "Self, or the name of an issuer (default: Self)")
	fs.IntVar(&f.daysBefore, "renew-days-before", 0, "renew this many days before it expires")
	fs.IntVar(&f.percent, "renew-percent", 0, "renew at this share of its life, 1 to 99 (default: 80)")
	fs.BoolVar(&f.noRenew, "no-renew", false, "never renew it")
	fs.StringSliceVar(&f.keyUsage, "key-usage", nil, "key usages, for instance digitalSignature,keyEncipherment")
	fs.StringSliceVar(&f.extKeyUsage, "eku", nil, "extended key usages as object ids")
	c.MarkFlagsMutuallyExclusive("renew-days-before", "renew-percent", "no-renew")
}

// apply puts the flags into a policy. A new policy gets the defaults; an
// existing one keeps what no flag names.
func (f *policyFlags) apply(p map[string]any, name string, fresh bool) {
	part := func(key string) map[string]any {
		m, ok := p[key].(map[string]any)
		if !ok {
			m = map[string]any{}
			p[key] = m
		}
		return m
	}
	set := func(m map[string]any, key string, given bool, value, def any) {
		if given {
			m[key] = value
		} else if _, there := m[key]; !there && fresh && def != nil {
			m[key] = def
		}
	}
	x509 := part("x509_props")
	set(x509, "subject", f.subject != "", f.subject, "CN="+name)
	set(x509, "validity_months", f.months != 0, f.months, 12)
	set(x509, "key_usage", len(f.keyUsage) > 0, f.keyUsage, nil)
	set(x509, "ekus", len(f.extKeyUsage) > 0, f.extKeyUsage, nil)
	if len(f.dns)+len(f.emails) > 0 {
		sans := map[string]any{}
		set(sans, "dns_names", len(f.dns) > 0, f.dns, nil)
		set(sans, "emails", len(f.emails) > 0, f.emails, nil)
		x509["sans"] = sans
	}
	f.applyKey(part("key_props"), set)
	form := map[string]string{"pem": "application/x-pem-file", "pfx": "application/x-pkcs12"}
	set(part("secret_props"), "contentType", f.form != "", form[f.form], form["pem"])
	set(part("issuer"), "name", f.issuer != "", f.issuer, "Self")
	renew := func(trigger string, n int) []any {
		return []any{map[string]any{"trigger": map[string]int{trigger: n}, "action": map[string]string{"action_type": "AutoRenew"}}}
	}
	switch {
	case f.daysBefore != 0:
		p["lifetime_actions"] = renew("days_before_expiry", f.daysBefore)
	case f.percent != 0:
		p["lifetime_actions"] = renew("lifetime_percentage", f.percent)
	case f.noRenew:
		p["lifetime_actions"] = []any{}
	default:
		set(p, "lifetime_actions", false, nil, renew("lifetime_percentage", 80))
	}
}

func (f *policyFlags) applyKey(key map[string]any, set func(m map[string]any, key string, given bool, value, def any)) {
	typ := strings.ToUpper(f.keyType)
	switch {
	case typ == "" && f.curve != "":
		typ = "EC"
	case typ == "" && f.keySize != 0:
		typ = "RSA"
	}
	if typ != "" { // another type makes the other's size meaningless
		delete(key, "crv")
		delete(key, "key_size")
	}
	set(key, "kty", typ != "", typ, "EC")
	switch key["kty"] {
	case "EC":
		set(key, "crv", f.curve != "", f.curve, "P-256")
		if typ != "" && f.curve == "" {
			key["crv"] = "P-256"
		}
	case "RSA":
		set(key, "key_size", f.keySize != 0, f.keySize, 2048)
		if typ != "" && f.keySize == 0 {
			key["key_size"] = 2048
		}
	}
	set(key, "exportable", f.notExport, false, true)
	set(key, "reuse_key", f.reuseKey, true, false)
}

// policy reads --policy and applies the flags.
func (t *tool) newPolicy(f *policyFlags, name string) (map[string]any, error) {
	if f.form != "" && f.form != "pem" && f.form != "pfx" {
		return nil, usagef("--form %s is not known", f.form).withFix("use pem or pfx")
	}
	p := map[string]any{}
	if f.file != "" {
		b, err := t.readInput(f.file)
		if err != nil {
			return nil, fmt.Errorf("reading the policy: %w", err)
		}
		if err := json.Unmarshal(b, &p); err != nil {
			return nil, usagef("%s is not a policy as JSON: %v", f.file, err).withFix("keyfleet certificate policy VAULT NAME -o json shows one")
		}
		if inner, ok := p["policy"].(map[string]any); ok { // the body of a create request
			p = inner
		}
	}
	f.apply(p, name, true)
	return p, nil
}

func (t *tool) certificatePolicy() *cobra.Command {
	var f policyFlags
	c := t.verb("policy VAULT NAME", "Show a certificate's policy, or change what flags name", `
keyfleet certificate policy prod1 web -o json
keyfleet certificate policy prod1 web --renew-days-before 30`, cobra.RangeArgs(1, 2), nil)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		v, err := t.objectArgs(ctx, args)
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, v.url("certificates", "policy"), client.VersionVaultData, nil))
		if err != nil {
			return err
		}
		if anyChanged(cmd) {
			p := o.without("id", "attributes").doc
			if f.file != "" {
				p = map[string]any{}
				b, err := t.readInput(f.file)
				if err != nil {
					return fmt.Errorf("reading the policy: %w", err)
				}
				if err := json.Unmarshal(b, &p); err != nil {
					return usagef("%s is not a policy as JSON: %v", f.file, err)
				}
			}
			f.apply(p, v.name, false)
			if o, err = t.call(ctx, request(http.MethodPatch, v.url("certificates", "policy"), client.VersionVaultData, p)); err != nil {
				return err
			}
		}
		wrapped := object{doc: map[string]any{"policy": o.doc, "id": o.str("id")}} // so that one set of columns serves both
		return one(t, o, view[object]{
			name: func(object) string { return v.name },
			columns: []column[object]{
				derived("Subject", func(object) string { return wrapped.str("policy.x509_props.subject") }),
				derived("Names", func(object) string { return strings.Join(wrapped.strs("policy.x509_props.sans.dns_names"), ", ") }),
				derived("Issuer", func(object) string { return wrapped.str("policy.issuer.name") }),
				derived("Key", func(object) string { return keyWords(wrapped) }),
				derived("Valid", func(object) string {
					if n := wrapped.num("policy.x509_props.validity_months"); n > 0 {
						return plural(int(n), "month")
					}
					return ""
				}),
				derived("Renewal", func(object) string { return renewalWords(wrapped) }),
				derived("Form of the secret", func(object) string { return wrapped.str("policy.secret_props.contentType") }),
			},
		})
	}
	f.add(c)
	return c
}

// anyChanged reports whether one of the command's own flags was given.
func anyChanged(c *cobra.Command) bool {
	changed := false
	own := c.LocalNonPersistentFlags()
	for _, name := range []string{
		"policy", "subject", "dns", "email", "key-type", "key-size", "curve", "reuse-key", "not-exportable", "form",
		"validity", "issuer", "renew-days-before", "renew-percent", "no-renew", "key-usage", "eku",
	} {
		changed = changed || own.Changed(name)
	}
	return changed
}
