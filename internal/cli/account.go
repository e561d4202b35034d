package cli

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

const (
	batch         = "Microsoft.Batch"
	batchAccounts = "batchAccounts"
)

func (t *tool) accountView() view[object] {
	return objectView(
		field("Name", "name"), derived("Group", object.group), field("Location", "location"),
		field("State", "properties.provisioningState"), field("Endpoint", "properties.accountEndpoint"),
	).with(only(field("Pool quota", "properties.poolQuota"), field("Id", "id"))...)
}

func (t *tool) accountCommand() *cobra.Command {
	list := t.verb("list", "List the Batch accounts of the subscription", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := t.listResources(ctx, batch, batchAccounts, client.VersionBatch)
		if err != nil {
			return err
		}
		return many(t, all, t.accountView())
	})
	show := t.verb("show NAME", "Show a Batch account", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		o, err := t.find(ctx, batch, batchAccounts, "account", args[0], client.VersionBatch)
		if err != nil {
			return err
		}
		return one(t, o, t.accountView())
	})
	return t.noun("account", "Batch accounts, which hold pools", t.accountCreate(), list, show, t.accountDelete())
}

func (t *tool) accountCreate() *cobra.Command {
	var location string
	var tagFlags []string
	c := t.verb("create NAME", "Create a Batch account", "keyfleet account create acct1 --group rg1 --location westus2", cobra.ExactArgs(1), nil)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		u, loc, err := t.newResource(ctx, location, batch, batchAccounts, args[0])
		if err != nil {
			return err
		}
		tags, err := tagsOf(tagFlags)
		if err != nil {
			return err
		}
		resp, err := t.client.Do(ctx, request(http.MethodPut, u, client.VersionBatch, map[string]any{"location": loc, "tags": tags}))
		if err != nil {
			return err
		}
		if !wait() && resp.Status == http.StatusAccepted {
			return t.done("Account %s is being created.", args[0])
		}
		err = t.waiting(ctx, defaultWait, "keyfleet account show "+args[0], func(ctx context.Context, p *progress) error {
			_, err := t.client.Wait(ctx, resp, func(s string) { p.show("Account %s: %s", args[0], s) })
			return err
		})
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, u, client.VersionBatch, nil))
		if err != nil {
			return err
		}
		return changed(t, o, t.accountView(), "Account %s is there: https://%s", args[0], o.str("properties.accountEndpoint"))
	}
	c.Flags().StringVarP(&location, "location", "l", "", "location (default: the group's)")
	c.Flags().StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated")
	return c
}

func (t *tool) accountDelete() *cobra.Command {
	var yes bool
	c := t.verb("delete NAME", "Delete a Batch account and its pools", "", cobra.ExactArgs(1), nil)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		o, err := t.find(ctx, batch, batchAccounts, "account", args[0], client.VersionBatch)
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Account %s and its pools will be deleted", args[0]); err != nil {
			return err
		}
		return t.deleteURL(ctx, t.client.ARM(o.str("id")), client.VersionBatch, wait(), "Account "+args[0], "keyfleet account show "+args[0])
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

// accountFlag adds --account to a command that works in an account.
func accountFlag(c *cobra.Command) *string {
	return c.Flags().String("account", "", "Batch account; default: that of the context, or the only one")
}

// account finds the Batch account that a command works in: the flag's, the
// context's, or the only one of the subscription.
func (t *tool) account(ctx context.Context, name string) (object, error) {
	if _, err := t.connect(ctx); err != nil {
		return object{}, err
	}
	if name == "" {
		name = t.target.Account
	}
	if name != "" {
		return t.find(ctx, batch, batchAccounts, "account", name, client.VersionBatch)
	}
	all, err := t.listResources(ctx, batch, batchAccounts, client.VersionBatch)
	if err != nil {
		return object{}, err
	}
	switch len(all) {
	case 0:
		return object{}, notFoundf("there is no Batch account").withFix("keyfleet account create acct1")
	case 1:
		return all[0], nil
	}
	names := make([]string, len(all))
	for i := range all {
		names[i] = all[i].name()
	}
	return object{}, usagef("there are %d Batch accounts: %s", len(all), strings.Join(names, ", ")).
		withFix("add --account NAME, or keyfleet context set --account NAME")
}

// poolID is the resource id of a pool, which may be given as one.
func (t *tool) poolID(ctx context.Context, account, pool string) (string, error) {
	if strings.HasPrefix(pool, "/") {
		_, err := t.connect(ctx)
		return pool, err
	}
	acct, err := t.account(ctx, account)
	if err != nil {
		return "", err
	}
	return acct.str("id") + "/pools/" + pool, nil
}

// pollPool is how often a pool is looked at while somebody waits for it.
const pollPool = 500 * time.Millisecond
