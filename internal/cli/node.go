package cli

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/client"
)

func (t *tool) nodeView() view[object] {
	return view[object]{
		name: func(o object) string { return o.str("id") },
		columns: append([]column[object]{
			field("Id", "id"), field("State", "state"),
			t.timeAt("Since", "stateTransitionTime"), t.timeAt("Booted", "lastBootTime"),
			derived("Problem", func(o object) string {
				for _, e := range o.objects("errors") {
					return e.str("code") + ": " + e.str("message")
				}
				return ""
			}),
		}, only(
			field("Scheduling", "schedulingState"), t.timeAt("Allocated", "allocationTime"), field("Size", "vmSize"),
			field("Agent", "nodeAgentInfo.version"), field("Url", "url"),
		)...),
	}
}

func (t *tool) nodeCommand() *cobra.Command {
	return t.noun("node", "Nodes of a pool", t.nodeList(), t.nodeShow(),
		t.nodeOrder("reboot", "Restart a node; its extensions start again"),
		t.nodeOrder("reimage", "Give a node a new file system; everything on it is lost"),
		t.nodeRemove(), t.nodeShell(), t.nodeLogs(), t.nodeExplain(), t.nodeJoinToken())
}

// poolBase is the URL of a pool on its account's data plane.
func (t *tool) poolBase(ctx context.Context, account, pool string) (string, error) {
	if id, err := arm.ParseID(pool); err == nil && strings.HasPrefix(pool, "/") {
		return t.poolURL(ctx, id)
	}
	acct, err := t.account(ctx, account)
	if err != nil {
		return "", err
	}
	return t.client.Batch(t.endpoint(acct), "/pools/"+url.PathEscape(pool)), nil
}

// poolURL is poolBase for a pool's resource id.
func (t *tool) poolURL(ctx context.Context, id arm.ID) (string, error) {
	if len(id.Names) != 2 {
		return "", usagef("%s is not the id of a pool", id)
	}
	acct, err := t.call(ctx, request(http.MethodGet, t.client.ARM(client.ResourceID(id.Subscription, id.ResourceGroup, batch, batchAccounts, id.Names[0])), client.VersionBatch, nil))
	if err != nil {
		return "", err
	}
	return t.client.Batch(t.endpoint(acct), "/pools/"+url.PathEscape(id.Name())), nil
}

// endpoint is the host of an account's data plane. The port of the server is
// part of it where the server names one.
func (t *tool) endpoint(acct object) string { return acct.str("properties.accountEndpoint") }

func (t *tool) poolNodes(ctx context.Context, id arm.ID) ([]object, error) {
	base, err := t.poolURL(ctx, id)
	if err != nil {
		return nil, err
	}
	return t.list(ctx, base+"/nodes", client.VersionBatchData)
}

func (t *tool) nodeList() *cobra.Command {
	var state string
	c := t.verb("list POOL", "List the nodes of a pool", "keyfleet node list sim\nkeyfleet node list sim --state unusable -o name", cobra.ExactArgs(1), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		base, err := t.poolBase(ctx, *account, args[0])
		if err != nil {
			return err
		}
		all, err := t.list(ctx, base+"/nodes", client.VersionBatchData)
		if err != nil {
			return err
		}
		var out []object
		for _, n := range all {
			if state == "" || strings.EqualFold(n.str("state"), state) {
				out = append(out, n)
			}
		}
		return many(t, out, t.nodeView())
	}
	c.Flags().StringVar(&state, "state", "", "only nodes in this state")
	c.ValidArgsFunction = t.completePools
	return c
}

func (t *tool) nodeShow() *cobra.Command {
	c := t.verb("show POOL NODE", "Show a node", "", cobra.ExactArgs(2), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		u, err := t.nodeURL(ctx, *account, args)
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, u, client.VersionBatchData, nil))
		if err != nil {
			return err
		}
		return one(t, o, t.nodeView())
	}
	c.ValidArgsFunction = t.completeNodes
	return c
}

// nodeURL is the URL of a node. A node may be named by the last digits of its
// id, as long as only one fits.
func (t *tool) nodeURL(ctx context.Context, account string, args []string) (string, error) {
	base, err := t.poolBase(ctx, account, args[0])
	if err != nil {
		return "", err
	}
	id, err := t.nodeID(ctx, base, args[1])
	return base + "/nodes/" + url.PathEscape(id), err
}

func (t *tool) nodeID(ctx context.Context, base, name string) (string, error) {
	if len(name) > 12 { // a whole id needs no look
		return name, nil
	}
	nodes, err := t.list(ctx, base+"/nodes", client.VersionBatchData)
	if err != nil {
		return "", err
	}
	var fit []string
	for _, n := range nodes {
		id := n.str("id")
		if strings.EqualFold(id, name) {
			return id, nil
		}
		if strings.HasSuffix(id, strings.ToLower(name)) {
			fit = append(fit, id)
		}
	}
	switch len(fit) {
	case 0:
		return "", notFoundf("the pool has no node %q", name).withFix("keyfleet node list %s", base[strings.LastIndexByte(base, '/')+1:])
	case 1:
		return fit[0], nil
	}
	return "", usagef("%q fits %d nodes: %s", name, len(fit), strings.Join(fit, ", ")).withFix("write more of the id")
}

// nodeOrder makes the verbs reboot and reimage.
func (t *tool) nodeOrder(verb, short string) *cobra.Command {
	c := t.verb(verb+" POOL NODE", short, fmt.Sprintf("keyfleet node %s sim 000001", verb), cobra.ExactArgs(2), nil)
	account := accountFlag(c)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		u, err := t.nodeURL(ctx, *account, args)
		if err != nil {
			return err
		}
		before, err := t.call(ctx, request(http.MethodGet, u, client.VersionBatchData, nil))
		if err != nil {
			return err
		}
		if _, err := t.client.Do(ctx, request(http.MethodPost, u+"/"+verb, client.VersionBatchData, map[string]any{})); err != nil {
			return err
		}
		if !wait() {
			return t.done("Node %s: %s is ordered.", before.str("id"), verb)
		}
		return t.awaitNode(ctx, u, before, verb, args[0])
	}
	c.ValidArgsFunction = t.completeNodes
	return c
}

// awaitNode waits until the node has booted anew and has settled.
func (t *tool) awaitNode(ctx context.Context, u string, before object, verb, pool string) error {
	id := before.str("id")
	var o object
	err := t.waiting(ctx, defaultWait, "keyfleet node show "+pool+" "+id, func(ctx context.Context, p *progress) error {
		return t.client.Poll(ctx, pollPool, func(ctx context.Context) (bool, error) {
			var err error
			if o, err = t.call(ctx, request(http.MethodGet, u, client.VersionBatchData, nil)); err != nil {
				return false, err
			}
			p.show("Node %s: %s", id, o.str("state"))
			return settled[o.str("state")] && o.str("lastBootTime") != before.str("lastBootTime"), nil
		})
	})
	if err != nil {
		return err
	}
	if s := o.str("state"); s != "idle" && s != "running" {
		return &cliError{code: "NodeNotReady", message: fmt.Sprintf("Node %s is %s after the %s.", id, s, verb), fix: fmt.Sprintf("keyfleet node explain %s %s", pool, id), exit: client.ExitFailed}
	}
	return changed(t, o, t.nodeView(), "Node %s is %s again.", id, o.str("state"))
}

func (t *tool) nodeRemove() *cobra.Command {
	var yes bool
	c := t.verb("remove POOL NODE...", "Remove nodes; the pool gets smaller by as many", "keyfleet node remove sim 000002 000003 --yes", cobra.MinimumNArgs(2), nil)
	c.Aliases = []string{"delete"}
	account := accountFlag(c)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		base, err := t.poolBase(ctx, *account, args[0])
		if err != nil {
			return err
		}
		var ids []string
		for _, a := range args[1:] {
			id, err := t.nodeID(ctx, base, a)
			if err != nil {
				return err
			}
			ids = append(ids, id)
		}
		if err := t.confirm(yes, "%s of pool %s will be removed", plural(len(ids), "node"), args[0]); err != nil {
			return err
		}
		if _, err := t.client.Do(ctx, request(http.MethodPost, base+"/removenodes", client.VersionBatchData, map[string]any{"nodeList": ids})); err != nil {
			return err
		}
		if !wait() {
			return t.done("%s of pool %s will be removed.", plural(len(ids), "node"), args[0])
		}
		id, err := t.poolID(ctx, *account, args[0])
		if err != nil {
			return err
		}
		return t.awaitPool(ctx, id, "steady")
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.ValidArgsFunction = t.completeNodes
	return c
}
