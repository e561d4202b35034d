package cli

import (
	"context"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

const federatedCredentials = "/federatedIdentityCredentials"

func (t *tool) federatedView() view[object] {
	return objectView(
		field("Name", "name"), derived("Subject", func(o object) string {
			if e := o.str("properties.claimsMatchingExpression.value"); e != "" {
				return e
			}
			return o.str("properties.subject")
		}), field("Issuer", "properties.issuer"), derived("Audiences", func(o object) string { return strings.Join(o.strs("properties.audiences"), ", ") }),
	).with(only(field("Id", "id"))...)
}

// federatedCommand is about the tokens of other issuers that a managed identity trusts.
func (t *tool) federatedCommand() *cobra.Command {
	var identity string
	at := func(ctx context.Context, name string) (string, error) {
		o, err := t.findIdentity(ctx, identity)
		if err != nil {
			return "", err
		}
		return t.client.ARM(o.str("id") + federatedCredentials + name), nil
	}
	list := t.verb("list", "List whose tokens an identity trusts", "keyfleet identity federated-credential list --identity shop", cobra.NoArgs,
		func(ctx context.Context, _ []string) error {
			u, err := at(ctx, "")
			if err != nil {
				return err
			}
			all, err := t.list(ctx, u, client.VersionIdentities)
			if err != nil {
				return err
			}
			return many(t, all, t.federatedView())
		})
	show := t.verb("show NAME", "Show a federated credential", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := at(ctx, "/"+args[0])
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, u, client.VersionIdentities, nil))
		if err != nil {
			return err
		}
		return one(t, o, t.federatedView())
	})
	var yes bool
	del := t.verb("delete NAME", "Trust these tokens no longer", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := at(ctx, "/"+args[0])
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Whoever logs in by the federated credential %s of %s cannot any more", args[0], identity); err != nil {
			return err
		}
		return t.deleteURL(ctx, u, client.VersionIdentities, true, "Federated credential "+args[0], "keyfleet identity federated-credential list --identity "+identity)
	})
	del.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	create := t.federatedCreate(at)
	c := t.noun("federated-credential", "Whose tokens a managed identity trusts: pods of a cluster, pipelines", create, list, show, del)
	for _, verb := range c.Commands() {
		verb.Flags().StringVar(&identity, "identity", "", "name or resource id of the managed identity (required)")
		_ = verb.MarkFlagRequired("identity")
		_ = verb.RegisterFlagCompletionFunc("identity", t.completeIdentities)
	}
	return c
}

func (t *tool) federatedCreate(at func(ctx context.Context, name string) (string, error)) *cobra.Command {
	var issuer, cluster, subject, matching string
	var audiences []string
	c := t.verb("create NAME", "Let the bearers of another issuer's tokens act as an identity", `
keyfleet identity federated-credential create web --identity shop --cluster prod --subject system:serviceaccount:shop:web
keyfleet identity federated-credential create teams --identity shop --cluster prod --matching "claims['sub'] matches 'system:serviceaccount:team-*:web'"
keyfleet identity federated-credential create ci --identity deploy --issuer https://token.example.org --subject repo:shop/web:ref:refs/heads/main`,
		cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
			u, err := at(ctx, "/"+args[0])
			if err != nil {
				return err
			}
			properties := map[string]any{"audiences": audiences}
			if issuer != "" {
				properties["issuer"] = issuer
			}
			if cluster != "" {
				o, err := t.findCluster(ctx, cluster)
				if err != nil {
					return err
				}
				properties["cluster"] = o.str("id")
			}
			if subject != "" {
				properties["subject"] = subject
			}
			if matching != "" {
				properties["claimsMatchingExpression"] = map[string]any{"value": matching, "languageVersion": 1}
			}
			o, err := t.call(ctx, request(http.MethodPut, u, client.VersionIdentities, map[string]any{"properties": properties}))
			if err != nil {
				return err
			}
			return changed(t, o, t.federatedView(), "Federated credential %s is there.", args[0])
		})
	c.Flags().StringVar(&cluster, "cluster", "", "name or resource id of the registered cluster that is the issuer")
	c.Flags().StringVar(&issuer, "issuer", "", "instead of a cluster: URL of the issuer, to the letter as in the claim iss")
	c.Flags().StringVar(&subject, "subject", "", "the claim sub, to the letter; for a pod: system:serviceaccount:NAMESPACE:NAME")
	c.Flags().StringVar(&matching, "matching", "", "instead of a subject: an expression over claims, with * and ? in patterns")
	c.Flags().StringArrayVar(&audiences, "audience", []string{"api://AzureADTokenExchange"}, "the claim aud; may be repeated")
	c.MarkFlagsOneRequired("cluster", "issuer")
	c.MarkFlagsMutuallyExclusive("cluster", "issuer")
	c.MarkFlagsOneRequired("subject", "matching")
	c.MarkFlagsMutuallyExclusive("subject", "matching")
	return c
}
