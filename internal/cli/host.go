package cli

import (
	"context"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"
)

func (t *tool) hostView() view[object] {
	return view[object]{
		name: func(o object) string { return o.str("id") },
		columns: []column[object]{
			field("Id", "id"), field("Hostname", "hostname"), field("State", "state"), field("Pool", "pool"),
			field("OS", "os"), field("Node", "node"), t.timeAt("Seen", "lastSeen"), field("Agent", "agent"),
		},
	}
}

func (t *tool) hostCommand() *cobra.Command {
	list := t.verb("list", "List the machines that joined", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, c.ARM("/keyfleet/v1/hosts"), "")
		if err != nil {
			return err
		}
		return many(t, all, t.hostView())
	})
	var yes bool
	remove := t.verb("remove HOST", "Forget a machine that joined; it gives back what it was given", "keyfleet host remove HOST --yes", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Host %s will leave", args[0]); err != nil {
			return err
		}
		if _, err := c.Do(ctx, request(http.MethodDelete, c.ARM("/keyfleet/v1/hosts/"+url.PathEscape(args[0])), "", nil)); err != nil {
			return err
		}
		return t.done("Host %s leaves.", args[0])
	})
	remove.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return t.noun("host", "Machines that joined, from which pools take nodes", list, remove)
}
