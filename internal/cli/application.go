package cli

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/spf13/cobra"
)

func (t *tool) applicationView() view[object] {
	return view[object]{
		name: func(o object) string { return o.str("appId") },
		columns: append([]column[object]{
			field("Name", "displayName"), field("Client id", "appId"), field("Object id", "id"),
			derived("Secrets", func(o object) string { return strconv.Itoa(len(o.objects("secrets"))) }),
		}, only(derived("Secret ids", func(o object) string {
			var out []string
			for _, s := range o.objects("secrets") {
				line := s.str("keyId") + "  " + s.str("hint") + "..."
				if at := s.time("endDateTime"); !at.IsZero() {
					line += "  until " + t.when(at)
				}
				out = append(out, line)
			}
			return lines(out...)
		}))...),
	}
}

// applicationURL is the URL of the applications, or of what parts name below.
func (t *tool) applicationURL(ctx context.Context, parts ...string) (string, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return "", err
	}
	u := "/keyfleet/v1/applications"
	for _, p := range parts {
		u += "/" + url.PathEscape(p)
	}
	return c.ARM(u), nil
}

func (t *tool) applicationCommand() *cobra.Command {
	list := t.verb("list", "List the applications", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		u, err := t.applicationURL(ctx)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, u, "")
		if err != nil {
			return err
		}
		return many(t, all, t.applicationView())
	})
	show := t.verb("show CLIENT-ID", "Show an application and its secrets' ids", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := t.applicationURL(ctx, args[0])
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, u, "", nil))
		if err != nil {
			return err
		}
		return one(t, o, t.applicationView())
	})
	var yes bool
	del := t.verb("delete CLIENT-ID", "Delete an application and its roles", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := t.applicationURL(ctx, args[0])
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Application %s will be deleted with its roles", args[0]); err != nil {
			return err
		}
		return t.deleteURL(ctx, u, "", true, "Application "+args[0], "keyfleet application list")
	})
	del.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return t.noun("application", "Applications: clients with secrets", t.applicationCreate(), list, show, del, t.applicationSecret())
}

// secretOut says where a new client secret goes: it can never be read again.
type secretOut struct {
	file   string
	reveal bool
}

func (s *secretOut) add(c *cobra.Command) {
	c.Flags().StringVar(&s.file, "to-file", "", "write the client secret into a new file with mode 0600")
	c.Flags().BoolVar(&s.reveal, "reveal", false, "show the client secret")
	c.MarkFlagsOneRequired("to-file", "reveal")
	c.MarkFlagsMutuallyExclusive("to-file", "reveal")
}

// deliver hands over the secret of an answer, and shows the answer.
func (t *tool) deliver(o object, s secretOut, format string, args ...any) error {
	secret := o.str("secretText")
	if s.file != "" {
		quiet := *t
		quiet.flags.output = "none"
		if err := quiet.newFile(s.file, []byte(secret+"\n")); err != nil {
			return err
		}
		o = o.without("secretText")
	}
	vw := view[object]{name: func(o object) string { return orElse(o.str("appId"), o.str("keyId")) }, columns: []column[object]{
		field("Name", "displayName"), field("Client id", "appId"), field("Object id", "id"), field("Secret id", "keyId"), field("Client secret", "secretText"),
	}}
	if s.reveal || t.form() != "table" {
		return one(t, o, vw)
	}
	return t.done(format, args...)
}

func (t *tool) applicationCreate() *cobra.Command {
	var clientID, expires string
	var out secretOut
	c := t.verb("create NAME", "Create an application with a client secret", "keyfleet application create ci --to-file ci-secret.txt", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := t.applicationURL(ctx)
		if err != nil {
			return err
		}
		body := map[string]any{"displayName": args[0]}
		if clientID != "" {
			body["appId"] = clientID
		}
		if err := addExpiry(body, expires); err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodPost, u, "", body))
		if err != nil {
			return err
		}
		return t.deliver(o, out, "Application %s is there: client id %s, object id %s; its secret is in %s.", args[0], o.str("appId"), o.str("id"), out.file)
	})
	c.Flags().StringVar(&clientID, "client-id", "", "client id it shall have (default: a new one)")
	c.Flags().StringVar(&expires, "expires", "", "when its secret ends, RFC 3339 or YYYY-MM-DD (default: never)")
	out.add(c)
	return c
}

func addExpiry(body map[string]any, expires string) error {
	sec, err := seconds("expires", expires)
	if err != nil || sec == nil {
		return err
	}
	body["endDateTime"] = rfc3339(*sec)
	return nil
}

func (t *tool) applicationSecret() *cobra.Command {
	var expires string
	var out secretOut
	add := t.verb("add CLIENT-ID", "Make a further client secret for an application", "keyfleet application secret add CLIENT-ID --to-file new-secret.txt", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := t.applicationURL(ctx, args[0], "secrets")
		if err != nil {
			return err
		}
		body := map[string]any{}
		if err := addExpiry(body, expires); err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodPost, u, "", body))
		if err != nil {
			return err
		}
		return t.deliver(o, out, "The new secret %s is in %s.", o.str("keyId"), out.file)
	})
	add.Flags().StringVar(&expires, "expires", "", "when it ends, RFC 3339 or YYYY-MM-DD (default: never)")
	out.add(add)
	remove := t.verb("remove CLIENT-ID KEY-ID", "Remove a client secret of an application", "", cobra.ExactArgs(2), func(ctx context.Context, args []string) error {
		u, err := t.applicationURL(ctx, args[0], "secrets", args[1])
		if err != nil {
			return err
		}
		if _, err := t.client.Do(ctx, request(http.MethodDelete, u, "", nil)); err != nil {
			return err
		}
		return t.done("The secret %s is removed.", args[1])
	})
	return t.noun("secret", "Client secrets of an application", add, remove)
}
