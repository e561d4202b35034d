package apimodel

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// Reference says in which vault an entry of a profile is kept: a secret, or a
// certificate, whose key and chain are in the secret of the same name. It is
// written as one of
//
//	"https://VAULT/secrets/NAME/VERSION"          VERSION may be left out everywhere
//	"https://VAULT/certificates/NAME/VERSION"
//	"/subscriptions/S/resourceGroups/G/providers/Microsoft.KeyVault/vaults/VAULT/secrets/NAME/VERSION"
//	{"vaultID": "/subscriptions/S/.../vaults/VAULT", "secretName": "NAME", "version": "VERSION"}
//
// of which the last two are aks-engine's own and do not say in which cloud the
// vault is.
type Reference struct {
	Host    string // of the vault, with its port; empty: Vault says its name
	Vault   string // name of the vault in a cloud that is not named
	Kind    string // "secrets" or "certificates"
	Name    string
	Version string // empty: the newest
}

// References are the entries that a file does not hold, by name.
type References map[string]Reference

// URL is where the secret is. suffix is that of vaults in the cloud, for instance
// "vault.azure.net"; it is asked for where the reference names no host.
func (r Reference) URL(suffix string) (string, error) {
	host := r.Host
	if host == "" {
		if suffix == "" {
			return "", fmt.Errorf("it is not known in which cloud the vault %s is", r.Vault)
		}
		host = r.Vault + "." + suffix
	}
	u := "https://" + host + "/secrets/" + r.Name
	if r.Version != "" {
		u += "/" + r.Version
	}
	return u, nil
}

// parseEntry reads the value of an entry: a reference, or text.
func parseEntry(value jsontext.Value) (*Reference, string, error) {
	if value.Kind() == '{' {
		r, err := parseObject(value)
		return r, "", err
	}
	var text string
	if err := json.Unmarshal(value, &text); err != nil {
		return nil, "", errors.New("it is neither text nor an object")
	}
	switch s := strings.TrimSpace(text); {
	case s == "":
		return nil, "", nil
	case strings.HasPrefix(s, "https://"), strings.HasPrefix(s, "http://"):
		r, err := parseURL(s)
		return r, "", err
	case strings.HasPrefix(s, "/subscriptions/"):
		r, err := parseID(s)
		return r, "", err
	}
	return nil, text, nil
}

// A URL may hold a password, so the errors here do not repeat it.
func parseURL(s string) (*Reference, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("it is not a URL")
	}
	if u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("the URL of a secret begins with https://VAULT/ and has no user, no query and no fragment")
	}
	parts := strings.Split(strings.Trim(u.Path, "/"), "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] != "secrets" && parts[0] != "certificates" {
		return nil, errors.New("the URL does not end with /secrets/NAME or /certificates/NAME")
	}
	r := &Reference{Host: strings.ToLower(u.Host), Kind: parts[0], Name: parts[1]}
	if len(parts) == 3 {
		r.Version = parts[2]
	}
	return r, r.check()
}

// parseID reads a resource id that ends with /secrets/NAME, as aks-engine does.
func parseID(s string) (*Reference, error) {
	vault, name, ok := strings.Cut(s, "/secrets/")
	if !ok {
		return nil, errors.New("the id does not end with /secrets/NAME")
	}
	name, version, _ := strings.Cut(name, "/")
	return newReference(vault, name, version)
}

func parseObject(value jsontext.Value) (*Reference, error) {
	var o struct {
		VaultID       string `json:"vaultID"`
		SecretName    string `json:"secretName"`
		Version       string `json:"version"`
		SecretVersion string `json:"secretVersion"`
	}
	if err := jsonstrict.Decode(value, &o); err != nil {
		return nil, errors.New("an object has the members vaultID, secretName and version, all of them texts")
	}
	if o.Version == "" {
		o.Version = o.SecretVersion
	}
	return newReference(o.VaultID, o.SecretName, o.Version)
}

func newReference(vaultID, name, version string) (*Reference, error) {
	parts := strings.Split(strings.Trim(vaultID, "/"), "/")
	if len(parts) != 8 || !strings.EqualFold(parts[5], "Microsoft.KeyVault") || !strings.EqualFold(parts[6], "vaults") {
		return nil, errors.New("the id of the vault is not /subscriptions/SUBSCRIPTION/resourceGroups/GROUP/providers/Microsoft.KeyVault/vaults/VAULT")
	}
	r := &Reference{Vault: strings.ToLower(parts[7]), Kind: "secrets", Name: name, Version: version}
	return r, r.check()
}

// check lets nothing into a URL that could lead elsewhere.
func (r *Reference) check() error {
	for _, part := range []struct{ what, value, pattern string }{
		{"vault", r.Vault, `^[0-9a-z-]{0,127}$`},
		{"host", r.Host, `^[0-9a-z.:\[\]-]{0,255}$`},
		{"secret", r.Name, `^[0-9A-Za-z-]{1,127}$`},
		{"version", r.Version, `^[0-9A-Za-z]{0,64}$`},
	} {
		if !regexp.MustCompile(part.pattern).MatchString(part.value) {
			return fmt.Errorf("%q cannot be the name of a %s", clip(part.value), part.what)
		}
	}
	if r.Vault == "" && r.Host == "" {
		return errors.New("it names no vault")
	}
	return nil
}
