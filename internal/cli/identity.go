package cli

import (
	"context"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

const (
	managedIdentity = "Microsoft.ManagedIdentity"
	identities      = "userAssignedIdentities"
)

func (t *tool) identityView() view[object] {
	return objectView(
		field("Name", "name"), derived("Group", object.group), field("Client id", "properties.clientId"), field("Object id", "properties.principalId"),
	).with(only(field("Location", "location"), field("Tenant", "properties.tenantId"), field("Id", "id"))...)
}

// findIdentity finds a managed identity by its name or resource id.
func (t *tool) findIdentity(ctx context.Context, name string) (object, error) {
	if strings.HasPrefix(name, "/") {
		c, err := t.connect(ctx)
		if err != nil {
			return object{}, err
		}
		return t.call(ctx, request(http.MethodGet, c.ARM(name), client.VersionIdentities, nil))
	}
	return t.find(ctx, managedIdentity, identities, "identity", name, client.VersionIdentities)
}

func (t *tool) identityCommand() *cobra.Command {
	list := t.verb("list", "List the managed identities of the subscription", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := t.listResources(ctx, managedIdentity, identities, client.VersionIdentities)
		if err != nil {
			return err
		}
		return many(t, all, t.identityView())
	})
	show := t.verb("show NAME", "Show a managed identity", "keyfleet identity show pool-id --query properties.clientId -o tsv", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			o, err := t.findIdentity(ctx, args[0])
			if err != nil {
				return err
			}
			return one(t, o, t.identityView())
		})
	var yes bool
	del := t.verb("delete NAME", "Delete a managed identity", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		o, err := t.findIdentity(ctx, args[0])
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Identity %s will be deleted, and what it may read with it", o.name()); err != nil {
			return err
		}
		return t.deleteURL(ctx, t.client.ARM(o.str("id")), client.VersionIdentities, true, "Identity "+o.name(), "keyfleet identity list")
	})
	del.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	show.ValidArgsFunction, del.ValidArgsFunction = t.completeIdentities, t.completeIdentities
	return t.noun("identity", "User-assigned managed identities", t.identityCreate(), list, show, del, t.federatedCommand())
}

func (t *tool) identityCreate() *cobra.Command {
	var location, clientID string
	var tagFlags []string
	c := t.verb("create NAME", "Create a managed identity", `
keyfleet identity create pool-id --group rg1
keyfleet identity create pool-id --client-id 885b1a3d-f13c-4030-afcf-9f05044d78dc`, cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			u, loc, err := t.newResource(ctx, location, managedIdentity, identities, args[0])
			if err != nil {
				return err
			}
			tags, err := tagsOf(tagFlags)
			if err != nil {
				return err
			}
			body := map[string]any{"location": loc, "tags": tags}
			if clientID != "" {
				body["properties"] = map[string]string{"clientId": clientID}
			}
			o, err := t.call(ctx, request(http.MethodPut, u, client.VersionIdentities, body))
			if err != nil {
				return err
			}
			return changed(t, o, t.identityView(), "Identity %s is there; its client id is %s.", args[0], o.str("properties.clientId"))
		})
	c.Flags().StringVarP(&location, "location", "l", "", "location (default: the group's)")
	c.Flags().StringVar(&clientID, "client-id", "", "client id it shall have, for settings that name one already (administrators only)")
	c.Flags().StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated")
	return c
}
