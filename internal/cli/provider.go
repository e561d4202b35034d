package cli

import (
	"context"
	"net/http"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) providerCommand() *cobra.Command {
	vw := view[object]{
		name:    func(o object) string { return o.str("namespace") },
		columns: []column[object]{field("Namespace", "namespace"), field("State", "registrationState")},
	}.with(only(
		each("Types", "resourceTypes", func(rt object) string { return rt.str("resourceType") }),
	)...)
	at := func(ctx context.Context, path string) (string, error) {
		c, err := t.connect(ctx)
		if err != nil {
			return "", err
		}
		sub, err := t.subscription(ctx)
		if err != nil {
			return "", err
		}
		return c.ARM("/subscriptions/" + sub + "/providers" + path), nil
	}
	list := t.verb("list", "List the resource providers, and whether the subscription is registered for them", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		u, err := at(ctx, "")
		if err != nil {
			return err
		}
		all, err := t.list(ctx, u, client.VersionResources)
		if err != nil {
			return err
		}
		return many(t, all, vw)
	})
	show := t.verb("show NAMESPACE", "Show a resource provider", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := at(ctx, "/"+args[0])
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, u, client.VersionResources, nil))
		if err != nil {
			return err
		}
		return one(t, o, vw)
	})
	turn := func(word, short, example string) *cobra.Command {
		return t.verb(word+" NAMESPACE", short, example, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
			u, err := at(ctx, "/"+args[0]+"/"+word)
			if err != nil {
				return err
			}
			o, err := t.call(ctx, request(http.MethodPost, u, client.VersionResources, nil))
			if err != nil {
				return err
			}
			state := "registered"
			if o.str("registrationState") != "Registered" {
				state = "not registered"
			}
			return changed(t, o, vw, "%s is %s.", o.str("namespace"), state)
		})
	}
	return t.noun("provider", "Resource providers: what a subscription may make", list, show,
		turn("register", "Let the subscription make what a provider has", "keyfleet provider register Microsoft.KubernetesConfiguration"),
		turn("unregister", "Let the subscription make nothing more of what a provider has", ""))
}
