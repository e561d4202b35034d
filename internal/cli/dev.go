package cli

import (
	"context"
	"net/http"
	"time"

	"github.com/spf13/cobra"
)

func (t *tool) clockView() view[object] {
	return view[object]{
		name:    func(o object) string { return o.str("policyTime") },
		columns: []column[object]{t.timeAt("Policy time", "policyTime"), field("Ahead by", "offset")},
	}
}

func (t *tool) devCommand() *cobra.Command {
	clock := t.verb("clock", "Show policy time and how far it is ahead", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, c.ARM("/keyfleet/v1/dev/clock"), "", nil))
		if err != nil {
			return err
		}
		return one(t, o, t.clockView())
	})
	advance := t.verb("advance DURATION", "Move policy time ahead, so that renewals fall due", "keyfleet dev advance 720h", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		d, err := time.ParseDuration(args[0])
		if err != nil || d <= 0 {
			return usagef("%q is no duration", args[0]).withFix("keyfleet dev advance 720h")
		}
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodPost, c.ARM("/keyfleet/v1/dev/clock"), "", map[string]string{"advance": d.String()}))
		if err != nil {
			return err
		}
		return changed(t, o, t.clockView(), "Policy time is %s, %s ahead of real time.", t.when(o.time("policyTime")), o.str("offset"))
	})
	advance.Long = `Move policy time ahead, so that renewals fall due. This works on a server that was
started with --dev, and moves the vaults' decisions on renewals only: TLS, tokens,
agents' certificates, retention and audit stay on real time.`
	return t.noun("dev", "For trying out, on a server started with --dev", clock, advance)
}
