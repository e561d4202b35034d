package cli

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) auditView() view[object] {
	return view[object]{
		name: func(o object) string { return o.str("seq") },
		columns: []column[object]{
			t.timeAt("Time", "record.time"), field("Outcome", "record.outcome"),
			derived("Who", func(o object) string {
				return orElse(o.str("record.name"), orElse(o.str("record.clientId"), o.str("record.objectId")))
			}),
			field("Action", "record.action"), field("Resource", "record.resource"), field("Detail", "record.detail"), field("Request", "record.requestId"),
		},
	}
}

func (t *tool) auditCommand() *cobra.Command {
	return t.noun("audit", "Who did what", t.auditList(), t.auditVerify())
}

func (t *tool) auditList() *cobra.Command {
	var since time.Duration
	var principal, action, resource, outcome, requestID string
	var limit int
	c := t.verb("list", "List audit records, the newest last", `
keyfleet audit list --since 1h --outcome denied
keyfleet audit list --resource prod1/secrets/web --action 'secrets/*'`, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		q := url.Values{}
		for name, v := range map[string]string{"principal": principal, "action": action, "resource": resource, "outcome": outcome, "request": requestID} {
			if v != "" {
				q.Set(name, v)
			}
		}
		if since != 0 {
			q.Set("since", t.now().Add(-since).UTC().Format(time.RFC3339))
		}
		if limit != 0 {
			q.Set("limit", strconv.Itoa(limit))
		}
		req := request(http.MethodGet, c.ARM("/keyfleet/v1/audit"), "", nil)
		req.Query = q
		all, err := client.List[object](ctx, c, req)
		if err != nil {
			return err
		}
		return many(t, all, t.auditView())
	})
	f := c.Flags()
	f.DurationVar(&since, "since", 0, "only of this last time, for instance 1h")
	f.StringVar(&principal, "principal", "", "object id, client id or name")
	f.StringVar(&action, "action", "", "action; * stands for any run of characters")
	f.StringVar(&resource, "resource", "", "the resource, or what it lies under")
	f.StringVar(&outcome, "outcome", "", "allowed or denied")
	f.StringVar(&requestID, "request", "", "request or correlation id")
	f.IntVar(&limit, "limit", 0, "at most so many, the newest (default 100, at most 1000)")
	return c
}

func (t *tool) auditVerify() *cobra.Command {
	return t.verb("verify", "Check the hash chain of the audit files", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodPost, c.ARM("/keyfleet/v1/audit/verify"), "", nil))
		if err != nil {
			return err
		}
		return changed(t, o, view[object]{
			name:    func(o object) string { return o.str("last.seq") },
			columns: []column[object]{field("First", "first.seq"), field("Last", "last.seq"), field("Hash", "last.hash")},
		}, "The chain is whole: records %s to %s.", o.str("first.seq"), o.str("last.seq"))
	})
}
