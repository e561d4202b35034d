package cli

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) secretView() view[object] {
	return view[object]{
		name: func(o object) string { return nameOf(o, "id") },
		columns: append([]column[object]{
			derived("Name", func(o object) string { return nameOf(o, "id") }),
			derived("Version", func(o object) string { return versionOf(o, "id") }),
			field("Enabled", "attributes.enabled"),
			t.timeAt("Updated", "attributes.updated"),
			t.timeAt("Expires", "attributes.exp"),
			field("Content type", "contentType"),
		}, only(
			t.timeAt("Not before", "attributes.nbf"),
			field("Managed by a certificate", "managed"),
			field("Id", "id"),
			field("Value", "value"),
		)...),
	}
}

func (t *tool) secretCommand() *cobra.Command {
	return t.noun("secret", "Secrets of a vault",
		t.secretSet(), t.secretShow(), t.secretAttributes(),
		t.objectList("secrets", "List the secrets of a vault, without their values", t.secretView),
		t.objectVersions("secrets", "List the versions of a secret", t.secretView),
		t.objectDelete("secrets", "secret"), t.objectDeleted("secrets"), t.objectRecover("secrets", "secret"), t.objectPurge("secrets", "secret"),
	)
}

func (t *tool) secretSet() *cobra.Command {
	var file, encoding, contentType, expires, notBefore string
	var trim, disabled bool
	var tagFlags []string
	c := t.verb("set VAULT NAME", "Write a new version of a secret", `
keyfleet secret set prod1 db-password                    # asks on the terminal
keyfleet secret set prod1 db-password --file secret.txt
openssl rand -hex 32 | keyfleet secret set prod1 api-key --file - --trim
keyfleet secret set prod1 keystore --file store.p12 --encoding base64`, cobra.RangeArgs(1, 2),
		func(ctx context.Context, args []string) error {
			v, err := t.objectArgs(ctx, args)
			if err != nil {
				return err
			}
			value, err := t.secretValue(file, encoding, trim)
			if err != nil {
				return err
			}
			tags, err := tagsOf(tagFlags)
			if err != nil {
				return err
			}
			if encoding == "base64" {
				if tags == nil {
					tags = map[string]string{}
				}
				tags["file-encoding"] = encoding // as az writes and reads it
			}
			attrs := map[string]any{"enabled": !disabled}
			for name, flag := range map[string][2]string{"exp": {"expires", expires}, "nbf": {"not-before", notBefore}} {
				sec, err := seconds(flag[0], flag[1])
				if err != nil {
					return err
				}
				if sec != nil {
					attrs[name] = *sec
				}
			}
			body := map[string]any{"value": value, "attributes": attrs}
			if contentType != "" {
				body["contentType"] = contentType
			}
			if tags != nil {
				body["tags"] = tags
			}
			o, err := t.call(ctx, request(http.MethodPut, v.url("secrets"), client.VersionVaultData, body))
			if err != nil {
				return err
			}
			return changed(t, o.without("value"), t.secretView(), "Secret %s has the new version %s.", v, versionOf(o, "id"))
		})
	c.Long = `Write a new version of a secret. The value comes from a file, from standard
input (--file -) or from the terminal, never from the command line. It is taken
exactly as it is; --trim takes line breaks off its end.`
	f := c.Flags()
	f.StringVarP(&file, "file", "f", "", "file that holds the value; - is standard input")
	f.StringVar(&encoding, "encoding", "utf-8", "utf-8, or base64 for a file that is not text")
	f.BoolVar(&trim, "trim", false, "take line breaks off the end of the value")
	f.StringVar(&contentType, "content-type", "", "content type")
	f.StringVar(&expires, "expires", "", "time from which it should no longer be used, RFC 3339 or YYYY-MM-DD")
	f.StringVar(&notBefore, "not-before", "", "time from which it may be used")
	f.BoolVar(&disabled, "disabled", false, "it cannot be read until it is enabled")
	f.StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated")
	return c
}

// secretValue reads the value from where the flags say.
func (t *tool) secretValue(file, encoding string, trim bool) (string, error) {
	var b []byte
	var err error
	switch {
	case file != "":
		if b, err = t.readInput(file); err != nil {
			return "", fmt.Errorf("reading the value: %w", err)
		}
	case t.inTerminal():
		if b, err = t.askHidden("Value"); err != nil {
			return "", err
		}
	default:
		return "", usagef("the value is missing").withFix("add --file FILE, or --file - for standard input")
	}
	if trim {
		b = []byte(strings.TrimRight(string(b), "\r\n"))
	}
	switch encoding {
	case "utf-8":
		if !utf8.Valid(b) {
			return "", usagef("the value is not UTF-8 text").withFix("add --encoding base64")
		}
		return string(b), nil
	case "base64":
		return base64.StdEncoding.EncodeToString(b), nil
	}
	return "", usagef("--encoding %s is not known", encoding).withFix("use utf-8 or base64")
}

func (t *tool) inTerminal() bool {
	f, ok := t.in.(interface{ Fd() uintptr })
	return ok && term.IsTerminal(int(f.Fd()))
}

// namesValue recognises a query that asks for the value by its name.
var namesValue = regexp.MustCompile(`(^|[^A-Za-z0-9_])value($|[^A-Za-z0-9_])`)

func (t *tool) secretShow() *cobra.Command {
	var version, toFile string
	var reveal bool
	c := t.verb("show VAULT NAME", "Show a secret, its value only with --reveal", `
keyfleet secret show prod1 db-password
keyfleet secret show prod1 db-password --query value -o tsv
keyfleet secret show prod1 keystore --to-file store.p12
keyfleet secret show https://prod1.vault.keyfleet.internal:8443/secrets/db-password --reveal`, cobra.RangeArgs(1, 2),
		func(ctx context.Context, args []string) error {
			v, err := t.objectArgs(ctx, args)
			if err != nil {
				return err
			}
			if version != "" {
				v.version = version
			}
			o, err := t.call(ctx, request(http.MethodGet, v.url("secrets"), client.VersionVaultData, nil))
			if err != nil {
				return err
			}
			if toFile != "" {
				return t.saveSecret(o, toFile)
			}
			if !reveal && !namesValue.MatchString(t.flags.query) {
				o = o.without("value")
			}
			return one(t, o, t.secretView())
		})
	c.Flags().BoolVar(&reveal, "reveal", false, "show the value too")
	c.Flags().StringVar(&version, "version", "", "version (default: the newest)")
	c.Flags().StringVar(&toFile, "to-file", "", "write the value into a new file with mode 0600 instead of showing it")
	return c
}

// saveSecret writes the value into a file that did not exist, decoded if it is tagged as base64 or is a PFX.
func (t *tool) saveSecret(o object, path string) error {
	b := []byte(o.str("value"))
	if o.str("tags.file-encoding") == "base64" || o.str("contentType") == "application/x-pkcs12" {
		raw, err := base64.StdEncoding.DecodeString(o.str("value"))
		if err != nil {
			return fmt.Errorf("decoding the value: %w", err)
		}
		b = raw
	}
	return t.newFile(path, b)
}

func (t *tool) secretAttributes() *cobra.Command {
	var enabled, contentType, expires, notBefore string
	var tagFlags []string
	c := t.verb("set-attributes VAULT NAME", "Change what is said about a secret, not its value", `
keyfleet secret set-attributes prod1 db-password --enabled false
keyfleet secret set-attributes prod1 db-password --expires 2027-01-31`, cobra.RangeArgs(1, 2),
		func(ctx context.Context, args []string) error {
			v, err := t.objectArgs(ctx, args)
			if err != nil {
				return err
			}
			attrs, body := map[string]any{}, map[string]any{}
			switch enabled {
			case "":
			case "true", "false":
				attrs["enabled"] = enabled == "true"
			default:
				return usagef("--enabled %s is neither true nor false", enabled)
			}
			for name, flag := range map[string][2]string{"exp": {"expires", expires}, "nbf": {"not-before", notBefore}} {
				sec, err := seconds(flag[0], flag[1])
				if err != nil {
					return err
				}
				if sec != nil {
					attrs[name] = *sec
				}
			}
			if len(attrs) > 0 {
				body["attributes"] = attrs
			}
			if contentType != "" {
				body["contentType"] = contentType
			}
			if tags, err := tagsOf(tagFlags); err != nil {
				return err
			} else if tags != nil {
				body["tags"] = tags
			}
			if len(body) == 0 {
				return usagef("nothing to change").withFix("add --enabled, --expires, --not-before, --content-type or --tag")
			}
			o, err := t.call(ctx, request(http.MethodPatch, v.url("secrets"), client.VersionVaultData, body))
			if err != nil {
				return err
			}
			return changed(t, o.without("value"), t.secretView(), "Secret %s is changed.", v)
		})
	f := c.Flags()
	f.StringVar(&enabled, "enabled", "", "true or false")
	f.StringVar(&contentType, "content-type", "", "content type")
	f.StringVar(&expires, "expires", "", "time from which it should no longer be used, RFC 3339 or YYYY-MM-DD")
	f.StringVar(&notBefore, "not-before", "", "time from which it may be used")
	f.StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated; replaces all tags")
	return c
}
