package cli

import (
	"context"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) subscriptionCommand() *cobra.Command {
	vw := view[object]{
		name: func(o object) string { return o.str("subscriptionId") },
		columns: []column[object]{
			field("Id", "subscriptionId"), field("Name", "displayName"), field("State", "state"), field("Tenant", "tenantId"),
		},
	}
	base := func(ctx context.Context) (string, error) {
		c, err := t.connect(ctx)
		if err != nil {
			return "", err
		}
		return c.ARM("/subscriptions"), nil
	}
	list := t.verb("list", "List the subscriptions that you see", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		u, err := base(ctx)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, u, client.VersionSubscriptions)
		if err != nil {
			return err
		}
		return many(t, all, vw)
	})
	show := t.verb("show [ID]", "Show a subscription", "", cobra.MaximumNArgs(1), func(ctx context.Context, args []string) error {
		u, err := base(ctx)
		if err != nil {
			return err
		}
		id := append(args, t.target.Subscription)[0]
		o, err := t.call(ctx, request(http.MethodGet, u+"/"+id, client.VersionSubscriptions, nil))
		if err != nil {
			return err
		}
		return one(t, o, vw)
	})
	var name string
	create := t.verb("create ID", "Create a subscription with an id of your choice", "keyfleet subscription create 042998e4-36dc-4b7d-8ce3-a7a2c4877d33 --name lab",
		cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
			c, err := t.connect(ctx)
			if err != nil {
				return err
			}
			body := map[string]any{"subscriptionId": args[0], "displayName": name}
			o, err := t.call(ctx, request(http.MethodPost, c.ARM("/keyfleet/v1/subscriptions"), "", body))
			if err != nil {
				return err
			}
			return changed(t, o, vw, "Subscription %s is there.", args[0])
		})
	create.Flags().StringVar(&name, "name", "", "display name")
	return t.noun("subscription", "Subscriptions", list, show, create)
}

func (t *tool) groupView() view[object] {
	return objectView(field("Name", "name"), field("Location", "location"), field("State", "properties.provisioningState")).
		with(only(field("Id", "id"))...)
}

func (t *tool) groupCommand() *cobra.Command {
	return t.noun("group", "Resource groups", t.groupCreate(),
		t.verb("list", "List the resource groups of the subscription", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
			c, err := t.connect(ctx)
			if err != nil {
				return err
			}
			sub, err := t.subscription(ctx)
			if err != nil {
				return err
			}
			all, err := t.list(ctx, c.ARM("/subscriptions/"+sub+"/resourcegroups"), client.VersionResources)
			if err != nil {
				return err
			}
			return many(t, all, t.groupView())
		}),
		t.verb("show NAME", "Show a resource group", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
			u, err := t.groupURL(ctx, args[0])
			if err != nil {
				return err
			}
			o, err := t.call(ctx, request(http.MethodGet, u, client.VersionResources, nil))
			if err != nil {
				return err
			}
			return one(t, o, t.groupView())
		}),
		t.groupDelete(),
	)
}

func (t *tool) groupURL(ctx context.Context, name string) (string, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return "", err
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return "", err
	}
	return c.ARM(client.GroupID(sub, name)), nil
}

func (t *tool) groupCreate() *cobra.Command {
	var location string
	var tagFlags []string
	c := t.verb("create NAME", "Create a resource group", "keyfleet group create rg1 --location westus2", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			u, err := t.groupURL(ctx, args[0])
			if err != nil {
				return err
			}
			tags, err := tagsOf(tagFlags)
			if err != nil {
				return err
			}
			o, err := t.call(ctx, request(http.MethodPut, u, client.VersionResources, map[string]any{"location": location, "tags": tags}))
			if err != nil {
				return err
			}
			return changed(t, o, t.groupView(), "Resource group %s is there.", args[0])
		})
	c.Flags().StringVarP(&location, "location", "l", "local", "location; any word")
	c.Flags().StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated")
	return c
}

func (t *tool) groupDelete() *cobra.Command {
	var yes bool
	c := t.verb("delete NAME", "Delete a resource group and everything in it", "keyfleet group delete rg1 --yes", cobra.ExactArgs(1), nil)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		u, err := t.groupURL(ctx, args[0])
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Resource group %s and everything in it will be deleted", args[0]); err != nil {
			return err
		}
		return t.deleteURL(ctx, u, client.VersionResources, wait(), "Resource group "+args[0], "keyfleet group show "+args[0])
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

// deleteURL deletes a resource and follows the operation that this starts.
func (t *tool) deleteURL(ctx context.Context, url, version string, wait bool, what, back string) error {
	c, err := t.connect(ctx)
	if err != nil {
		return err
	}
	resp, err := c.Do(ctx, request(http.MethodDelete, url, version, nil))
	if err != nil {
		return err
	}
	t.warnings(resp)
	if resp.Status == http.StatusNoContent {
		return t.done("%s does not exist; there is nothing to delete.", what)
	}
	if resp.Status != http.StatusAccepted {
		return t.done("%s is deleted.", what)
	}
	if !wait {
		return t.done("%s is being deleted.", what)
	}
	err = t.waiting(ctx, defaultWait, back, func(ctx context.Context, p *progress) error {
		p.show("%s: deleting", what)
		if _, err := c.Wait(ctx, resp, func(s string) { p.show("%s: deleting (%s)", what, s) }); err != nil && !client.IsNotFound(err) {
			return err
		}
		return c.Poll(ctx, time.Second, func(ctx context.Context) (bool, error) { // seen to be gone, not only said to be
			_, err := c.Do(ctx, request(http.MethodGet, url, version, nil))
			if client.IsNotFound(err) {
				return true, nil
			}
			return false, err
		})
	})
	if err != nil {
		return err
	}
	return t.done("%s is deleted.", what)
}
