package cli

import (
	"context"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/keyfleet"
)

// contextInfo is a context without its credential.
type contextInfo struct {
	Name         string             `json:"name"`
	Current      bool               `json:"current"`
	Endpoints    keyfleet.Endpoints `json:"endpoints"`
	Tenant       string             `json:"tenant"`
	Subscription string             `json:"subscription,omitempty"`
	ClientID     string             `json:"clientId"`
	Group        string             `json:"group,omitempty"`
	Account      string             `json:"account,omitempty"`
}

func (tg *target) public(current string) contextInfo {
	return contextInfo{
		Name: tg.name, Current: tg.name == current, Endpoints: tg.Endpoints, Tenant: tg.Tenant,
		Subscription: tg.Subscription, ClientID: tg.ClientID, Group: tg.Group, Account: tg.Account,
	}
}

func (t *tool) contextView() view[contextInfo] {
	return view[contextInfo]{
		name: func(c contextInfo) string { return c.Name },
		columns: []column[contextInfo]{
			{head: "Current", cell: func(c contextInfo) string { return mark(c.Current) }},
			{head: "Name", cell: func(c contextInfo) string { return c.Name }},
			{head: "Server", cell: func(c contextInfo) string { return c.Endpoints.ResourceManager }},
			{head: "Subscription", cell: func(c contextInfo) string { return c.Subscription }},
			{head: "Group", cell: func(c contextInfo) string { return c.Group }},
			{head: "Account", cell: func(c contextInfo) string { return c.Account }},
			{head: "Tenant", cell: func(c contextInfo) string { return c.Tenant }, detail: true},
			{head: "Client id", cell: func(c contextInfo) string { return c.ClientID }, detail: true},
			{head: "Dialled at", cell: func(c contextInfo) string { return c.Endpoints.Listen }, detail: true},
			{head: "Login", cell: func(c contextInfo) string { return c.Endpoints.Login }, detail: true},
			{head: "Vaults", cell: func(c contextInfo) string { return "https://NAME." + c.Endpoints.VaultSuffix }, detail: true},
			{head: "Accounts", cell: func(c contextInfo) string { return "https://ACCOUNT.REGION." + c.Endpoints.BatchSuffix }, detail: true},
		},
	}
}

func mark(b bool) string {
	if b {
		return "*"
	}
	return ""
}

func (t *tool) contextCommand() *cobra.Command {
	list := t.verb("list", "List the contexts", "", cobra.NoArgs, func(context.Context, []string) error {
		c, err := t.readConfig()
		if err != nil {
			return err
		}
		var infos []contextInfo
		for _, n := range c.names() {
			infos = append(infos, c.Contexts[n].public(c.Current))
		}
		return many(t, infos, t.contextView())
	})
	use := t.verb("use NAME", "Make a context the current one", "keyfleet context use dev", cobra.ExactArgs(1), func(_ context.Context, args []string) error {
		c, err := t.readConfig()
		if err != nil {
			return err
		}
		tg := c.Contexts[args[0]]
		if tg == nil {
			return notFoundf("there is no context %q", args[0]).withFix("keyfleet context list")
		}
		c.Current = args[0]
		if err := t.writeConfig(c); err != nil {
			return err
		}
		return changed(t, tg.public(c.Current), t.contextView(), "The current context is %q.", args[0])
	})
	use.ValidArgsFunction = t.completeContexts
	show := t.verb("show", "Show the context that commands use now", "keyfleet context show\nkeyfleet context show -o json", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		tg, err := t.pick(ctx)
		if err != nil {
			return err
		}
		return one(t, tg.public(tg.name), t.contextView())
	})
	return t.noun("context", "Servers, and who you are there", list, use, show, t.contextSet())
}

func (t *tool) contextSet() *cobra.Command {
	var account string
	c := t.verb("set", "Set the defaults of a context", `
keyfleet context set --group rg1 --account acct1
keyfleet context set --context dev --subscription 042998e4-36dc-4b7d-8ce3-a7a2c4877d33`,
		cobra.NoArgs, func(_ context.Context, _ []string) error {
			c, err := t.readConfig()
			if err != nil {
				return err
			}
			name := c.Current
			if t.flags.context != "" {
				name = t.flags.context
			}
			tg := c.Contexts[name]
			if tg == nil {
				return notFoundf("there is no context %q", name).withFix("keyfleet login --from DIR")
			}
			if t.flags.subscription == "" && t.flags.group == "" && account == "" {
				return usagef("nothing to set").withFix("add --group, --account or --subscription")
			}
			if t.flags.subscription != "" {
				tg.Subscription = t.flags.subscription
			}
			if t.flags.group != "" {
				tg.Group = t.flags.group
			}
			if account != "" {
				tg.Account = account
			}
			if err := t.writeConfig(c); err != nil {
				return err
			}
			return changed(t, tg.public(c.Current), t.contextView(), "The defaults of %q are set.", name)
		})
	c.Flags().StringVar(&account, "account", "", "Batch account")
	return c
}
