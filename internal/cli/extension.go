package cli

import (
	"context"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) extensionView() view[object] {
	return view[object]{
		name: func(o object) string { return o.str("vmExtension.name") },
		columns: append([]column[object]{
			field("Name", "vmExtension.name"),
			derived("Type", func(o object) string { return o.str("vmExtension.publisher") + "." + o.str("vmExtension.type") }),
			field("Version", "vmExtension.typeHandlerVersion"),
			derived("State", func(o object) string { return firstStatus(o, "displayStatus") }),
			derived("Message", func(o object) string { return firstStatus(o, "message") }),
		}, only(
			derived("Code", func(o object) string { return firstStatus(o, "code") }),
			derived("Substatus", substatusLines),
			derived("Settings", func(o object) string { return parsedSettings(o.str("vmExtension.settings")) }),
		)...),
	}
}

func firstStatus(o object, name string) string {
	for _, s := range o.objects("instanceView.statuses") {
		return s.str(name)
	}
	return ""
}

func substatusLines(o object) string {
	var out []string
	for _, s := range o.objects("instanceView.subStatuses") {
		out = append(out, lines(s.str("code")+": "+s.str("message")))
	}
	return strings.Join(out, "\n")
}

func (t *tool) extensionCommand() *cobra.Command {
	x := &clusterExtensions{t: t}
	list := x.flag(t.verb("list POOL NODE", "List the extensions of a node, or of a cluster, with their state", `
keyfleet extension list sim 000001
keyfleet extension list --cluster prod`, x.args(2), nil), false)
	account := accountFlag(list)
	list.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		if x.cluster != "" {
			return x.list(ctx)
		}
		u, err := t.nodeURL(ctx, *account, args)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, u+"/extensions", client.VersionBatchData)
		if err != nil {
			return err
		}
		return many(t, all, t.extensionView())
	}
	show := x.flag(t.verb("show [POOL NODE] NAME", "Show an extension of a node or of a cluster: how it stands, and its settings", `
keyfleet extension show sim 000001 KVExtensions -o json
keyfleet extension show sc-extension --cluster prod -o json`, x.args(3), nil), false)
	showAccount := accountFlag(show)
	show.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		if x.cluster != "" {
			return x.show(ctx, args[0])
		}
		u, err := t.nodeURL(ctx, *showAccount, args[:2])
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, u+"/extensions/"+url.PathEscape(args[2]), client.VersionBatchData, nil))
		if err != nil {
			return err
		}
		return one(t, o, t.extensionView())
	}
	list.ValidArgsFunction, show.ValidArgsFunction = t.completeNodes, t.completeNodes
	types := t.noun("type", "Extension types that pools may name", t.extensionTypes(), t.extensionTypeAdd(), t.extensionTypeRemove())
	return t.noun("extension", "Extensions on nodes and in clusters, and the types there are", list, show, x.update(), x.remove(), types)
}

func (t *tool) extensionTypeView() view[object] {
	return view[object]{
		name:    func(o object) string { return o.str("publisher") + "/" + o.str("type") },
		columns: []column[object]{field("Publisher", "publisher"), field("Type", "type"), derived("OS", func(o object) string { return orElse(o.str("os"), "any") })},
	}
}

func (t *tool) extensionTypes() *cobra.Command {
	return t.verb("list", "List the extension types that pools may name", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, c.ARM("/keyfleet/v1/extensiontypes"), "")
		if err != nil {
			return err
		}
		return many(t, all, t.extensionTypeView())
	})
}

func (t *tool) extensionTypeURL(ctx context.Context, args []string) (string, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return "", err
	}
	return c.ARM("/keyfleet/v1/extensiontypes/" + url.PathEscape(args[0]) + "/" + url.PathEscape(args[1])), nil
}

func (t *tool) extensionTypeAdd() *cobra.Command {
	var system string
	c := t.verb("add PUBLISHER TYPE", "Let pools name a further extension type", "keyfleet extension type add Contoso.Backup BackupForLinux --os linux", cobra.ExactArgs(2),
		func(ctx context.Context, args []string) error {
			u, err := t.extensionTypeURL(ctx, args)
			if err != nil {
				return err
			}
			if _, err := t.client.Do(ctx, request(http.MethodPut, u, "", map[string]string{"os": system})); err != nil {
				return err
			}
			return t.done("Pools may name %s/%s.", args[0], args[1])
		})
	c.Flags().StringVar(&system, "os", "", "linux or windows; default: both")
	return c
}

func (t *tool) extensionTypeRemove() *cobra.Command {
	return t.verb("remove PUBLISHER TYPE", "Take an added type away; pools that have it keep it", "", cobra.ExactArgs(2), func(ctx context.Context, args []string) error {
		u, err := t.extensionTypeURL(ctx, args)
		if err != nil {
			return err
		}
		if _, err := t.client.Do(ctx, request(http.MethodDelete, u, "", nil)); err != nil {
			return err
		}
		return t.done("%s/%s is no longer an addition.", args[0], args[1])
	})
}
