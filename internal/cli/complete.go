package cli

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/client"
)

// completeLimit bounds what the shell waits for names: a person is typing. Where the
// server is far away KEYFLEET_COMPLETION_LIMIT may allow more.
func (t *tool) completeLimit() time.Duration {
	if d, err := time.ParseDuration(t.env("KEYFLEET_COMPLETION_LIMIT")); err == nil {
		return d
	}
	return 300 * time.Millisecond
}

// completer answers with names from the server; failure is no names.
func (t *tool) completer(cmd *cobra.Command, toComplete string, names func(ctx context.Context) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	base := cmd.Context()
	if base == nil {
		base = context.Background()
	}
	ctx, cancel := context.WithTimeout(base, t.completeLimit())
	defer cancel()
	all, err := names(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var fit []string
	for _, n := range all {
		if strings.HasPrefix(n, toComplete) {
			fit = append(fit, n)
		}
	}
	return fit, cobra.ShellCompDirectiveNoFileComp
}

func (t *tool) completeFlags(root *cobra.Command) {
	_ = root.RegisterFlagCompletionFunc("output", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return outputs, cobra.ShellCompDirectiveNoFileComp
	})
	_ = root.RegisterFlagCompletionFunc("context", t.completeContexts)
	_ = root.RegisterFlagCompletionFunc("group", func(cmd *cobra.Command, _ []string, s string) ([]string, cobra.ShellCompDirective) {
		return t.completer(cmd, s, func(ctx context.Context) ([]string, error) {
			c, err := t.connect(ctx)
			if err != nil {
				return nil, err
			}
			groups, err := c.Groups(ctx, t.target.Subscription)
			names := make([]string, len(groups))
			for i := range groups {
				names[i] = groups[i].Name
			}
			return names, err
		})
	})
}

func (t *tool) completeContexts(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
	return t.completer(cmd, s, func(context.Context) ([]string, error) {
		c, err := t.readConfig()
		if err != nil {
			return nil, err
		}
		return c.names(), nil
	})
}

// completeResources completes the first argument with resources of a type.
func (t *tool) completeResources(cmd *cobra.Command, args []string, s, provider, typ, version string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return t.completer(cmd, s, func(ctx context.Context) ([]string, error) {
		all, err := t.listResources(ctx, provider, typ, version)
		return namesOf(all), err
	})
}

func namesOf(all []object) []string {
	names := make([]string, len(all))
	for i := range all {
		names[i] = all[i].name()
	}
	return names
}

func (t *tool) completeVaults(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
	return t.completeResources(cmd, args, s, keyVault, vaults, client.VersionVaults)
}

func (t *tool) completeIdentities(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
	return t.completeResources(cmd, args, s, managedIdentity, identities, client.VersionIdentities)
}

func (t *tool) completePools(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return t.completer(cmd, s, func(ctx context.Context) ([]string, error) {
		flag, _ := cmd.Flags().GetString("account")
		acct, err := t.account(ctx, flag)
		if err != nil {
			return nil, err
		}
		all, err := t.list(ctx, t.client.ARM(acct.str("id")+"/pools"), client.VersionBatch)
		return namesOf(all), err
	})
}

func (t *tool) completeNodes(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return t.completePools(cmd, args, s)
	}
	return t.completer(cmd, s, func(ctx context.Context) ([]string, error) {
		flag, _ := cmd.Flags().GetString("account")
		id, err := t.poolID(ctx, flag, args[0])
		if err != nil {
			return nil, err
		}
		rid, err := arm.ParseID(id)
		if err != nil {
			return nil, err
		}
		all, err := t.poolNodes(ctx, rid)
		return namesOf(all), err
	})
}
