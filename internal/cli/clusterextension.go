package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/client"
)

// versionExtensions is the api-version of extensions of clusters.
const versionExtensions = "2023-05-01"

// servicelinkerKind is the kind of extension that there is for clusters.
const servicelinkerKind = "microsoft.servicelinker.connection"

// clusterExtensionView is of an extension as [flat] makes it.
func (t *tool) clusterExtensionView() view[object] {
	return objectView(
		field("Name", "name"), field("Type", "extensionType"), field("State", "provisioningState"), field("Version", "currentVersion"),
		derived("Code", func(o object) string { return lastStatus(o).str("code") }),
	).with(only(
		derived("Message", func(o object) string { return orElse(o.str("errorInfo.message"), lastStatus(o).str("message")) }),
		derived("Fix", func(o object) string { return detail(o, "errorInfo.details", "Fix") }),
		derived("Level", func(o object) string { return lastStatus(o).str("level") }),
		derived("Since", func(o object) string { return t.when(lastStatus(o).time("time")) }),
		derived("Release", func(o object) string {
			if o.str("release.name") == "" {
				return ""
			}
			return fmt.Sprintf("%s/%s revision %s: %s, %s", o.str("release.namespace"), o.str("release.name"), o.str("release.revision"), o.str("release.chart"), o.str("release.status"))
		}),
		derived("Settings", func(o object) string {
			all, _ := o.at("configurationSettings").(map[string]any)
			var out []string
			for name, value := range all {
				out = append(out, fmt.Sprintf("%s=%v", name, value))
			}
			slices.Sort(out)
			return lines(out...)
		}),
		field("Id", "id"),
	)...)
}

// detail is the message of an error's detail.
func detail(o object, path, code string) string {
	for _, d := range o.objects(path) {
		if d.str("code") == code {
			return d.str("message")
		}
	}
	return ""
}

func lastStatus(o object) object {
	all := o.objects("statuses")
	if len(all) == 0 {
		return object{}
	}
	return all[len(all)-1]
}

// flat is an extension as az k8s-extension prints it: its properties beside id and
// name, so that a script that reads "statuses" or "provisioningState" reads it here too.
func flat(o object) object {
	out := o.without("properties")
	properties, _ := o.at("properties").(map[string]any)
	for name, v := range properties {
		out.doc[name] = v
	}
	out.doc["resourceGroup"] = o.group()
	out.raw, _ = json.Marshal(out.doc) // of what was just decoded
	return out
}

// clusterExtensions are the extensions of the cluster that --cluster names.
type clusterExtensions struct {
	t       *tool
	cluster string
}

// flag adds --cluster to a verb.
func (x *clusterExtensions) flag(c *cobra.Command, required bool) *cobra.Command {
	usage := "name or resource id of the cluster"
	if required {
		usage += " (required)"
	}
	c.Flags().StringVar(&x.cluster, "cluster", "", usage)
	if required {
		_ = c.MarkFlagRequired("cluster")
	}
	_ = c.RegisterFlagCompletionFunc("cluster", x.t.completeClusters)
	return c
}

// args checks how many arguments there are: with --cluster none names pool and node.
func (x *clusterExtensions) args(onNode int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		want := onNode
		if x.cluster != "" {
			want -= 2
		}
		return cobra.ExactArgs(want)(cmd, args)
	}
}

// url is that of an extension, or of all for an empty name.
func (x *clusterExtensions) url(ctx context.Context, name string) (string, error) {
	cluster := x.cluster
	if !strings.HasPrefix(cluster, "/") {
		o, err := x.t.findCluster(ctx, cluster)
		if err != nil {
			return "", err
		}
		cluster = o.str("id")
	}
	c, err := x.t.connect(ctx)
	if err != nil {
		return "", err
	}
	u := c.ARM(strings.TrimRight(cluster, "/") + "/providers/" + kubernetes.ExtensionType)
	if name != "" {
		u += "/" + url.PathEscape(name)
	}
	return u, nil
}

func (x *clusterExtensions) list(ctx context.Context) error {
	u, err := x.url(ctx, "")
	if err != nil {
		return err
	}
	all, err := x.t.list(ctx, u, versionExtensions)
	if err != nil {
		return err
	}
	for i := range all {
		all[i] = flat(all[i])
	}
	return many(x.t, all, x.t.clusterExtensionView())
}

func (x *clusterExtensions) show(ctx context.Context, name string) error {
	u, err := x.url(ctx, name)
	if err != nil {
		return err
	}
	o, err := x.t.call(ctx, request(http.MethodGet, u, versionExtensions, nil))
	if err != nil {
		return err
	}
	return one(x.t, flat(o), x.t.clusterExtensionView())
}

// back is the command that shows an extension.
func (x *clusterExtensions) back(name string) string {
	return "keyfleet extension show " + name + " --cluster " + x.cluster
}

// update changes the settings of an extension, or installs it; the others stay.
func (x *clusterExtensions) update() *cobra.Command {
	const flag = "configuration-settings"
	var settings []string
	c := x.t.verb("update NAME", "Change the settings of a cluster's extension, or install it before the first connection does", `
keyfleet extension update sc-extension --cluster prod --configuration-settings webhook.enabled=true operator.replicas=2
keyfleet extension update sc-extension --cluster prod --configuration-settings operator.replicas=`, cobra.MinimumNArgs(1), nil)
	c.Aliases = []string{"create"}
	c.Long = `Change the settings of a cluster's extension, or install it before the first
connection does. Settings that are not named stay as they are; NAME= takes one
away. They are the values of the chart, and everybody who may read Secrets of
sc-system can read them: no secrets.`
	c.Flags().StringArrayVar(&settings, flag, nil, "NAME=VALUE: values of the chart that become others; more may follow")
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, name := cmd.Context(), args[0]
		if cmd.Flags().Changed(flag) { // as with az, further words belong to it
			settings = append(settings, args[1:]...)
			args = args[:1]
		}
		change, err := settingsOf(settings)
		if err != nil {
			return err
		}
		if len(args) > 1 || strings.Contains(name, "=") {
			return usagef("there are words beside the extension's name").withFix("keyfleet extension update sc-extension --cluster NAME --%s NAME=VALUE", flag)
		}
		u, err := x.url(ctx, name)
		if err != nil {
			return err
		}
		o, err := x.put(ctx, u, change)
		if err == nil && wait() {
			o, err = x.await(ctx, u, name)
		}
		if err != nil {
			return err
		}
		return changed(x.t, flat(o), x.t.clusterExtensionView(), "Extension %s is %s.", name, o.str("properties.provisioningState"))
	}
	return x.flag(c, true)
}

// settingsOf parses words of the form NAME=VALUE.
func settingsOf(all []string) (map[string]string, error) {
	out := map[string]string{}
	for _, word := range all {
		name, value, ok := strings.Cut(word, "=")
		if !ok || name == "" {
			return nil, usagef("a setting is not of the form NAME=VALUE").withFix("--configuration-settings webhook.enabled=true")
		}
		out[name] = value
	}
	return out, nil
}

// put writes the extension as it is, with the settings that change.
func (x *clusterExtensions) put(ctx context.Context, u string, change map[string]string) (object, error) {
	p := kubernetes.ExtensionProperties{ExtensionType: servicelinkerKind, Settings: map[string]string{}}
	resp, err := x.t.client.Do(ctx, request(http.MethodGet, u, versionExtensions, nil))
	if err == nil {
		var there kubernetes.ClusterExtension
		if err = resp.Into(&there); err == nil {
			p.AutoUpgrade, p.ReleaseTrain, p.Version = there.Properties.AutoUpgrade, there.Properties.ReleaseTrain, there.Properties.Version
			p.Settings = there.Properties.Settings
		}
	} else if client.IsNotFound(err) {
		err = nil
	}
	if err != nil {
		return object{}, err
	}
	for name, value := range change {
		if value == "" {
			delete(p.Settings, name)
			continue
		}
		p.Settings[name] = value
	}
	return x.t.call(ctx, request(http.MethodPut, u, versionExtensions, map[string]any{"properties": p}))
}

// await waits until an extension is Succeeded; that it Failed is an error.
func (x *clusterExtensions) await(ctx context.Context, u, name string) (o object, err error) {
	err = x.t.waiting(ctx, defaultWait, x.back(name), func(ctx context.Context, p *progress) error {
		return x.t.client.Poll(ctx, time.Second, func(ctx context.Context) (bool, error) {
			if o, err = x.t.call(ctx, request(http.MethodGet, u, versionExtensions, nil)); err != nil {
				return false, err
			}
			state := o.str("properties.provisioningState")
			p.show("Extension %s: %s", name, state)
			if state == "Failed" {
				return false, x.failure(o, name)
			}
			return state == "Succeeded", nil
		})
	})
	return o, err
}

// failure is why an extension is Failed, with what to do about it.
func (x *clusterExtensions) failure(o object, name string) error {
	return &cliError{
		code: o.str("properties.errorInfo.code"), message: o.str("properties.errorInfo.message"),
		fix: orElse(detail(o, "properties.errorInfo.details", "Fix"), x.back(name)), exit: client.ExitFailed,
	}
}

func (x *clusterExtensions) remove() *cobra.Command {
	var disconnect, yes bool
	c := x.t.verb("delete NAME", "Uninstall an extension of a cluster; connections need it", "keyfleet extension delete sc-extension --cluster prod --disconnect", cobra.ExactArgs(1), nil)
	c.Flags().BoolVar(&disconnect, "disconnect", false, "delete all connections of the cluster first, with everything that they made")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, name := cmd.Context(), args[0]
		u, err := x.url(ctx, name)
		if err != nil {
			return err
		}
		req := request(http.MethodDelete, u, versionExtensions, nil)
		with := ""
		if disconnect {
			req.Query = url.Values{"forceDelete": {"true"}}
			with = ", after all connections of the cluster"
		}
		if err := x.t.confirm(yes, "Extension %s will be removed from the cluster%s", name, with); err != nil {
			return err
		}
		resp, err := x.t.client.Do(ctx, req)
		if err != nil {
			return err
		}
		if resp.Status == http.StatusNoContent {
			return x.t.done("Extension %s does not exist; there is nothing to delete.", name)
		}
		if !wait() {
			return x.t.done("Extension %s is being removed.", name)
		}
		if err := x.awaitGone(ctx, u, name); err != nil {
			return err
		}
		return x.t.done("Extension %s is removed%s.", name, with)
	}
	return x.flag(c, true)
}

// awaitGone waits until an extension is seen to be gone, and shows what it waits for.
func (x *clusterExtensions) awaitGone(ctx context.Context, u, name string) error {
	return x.t.waiting(ctx, defaultWait, x.back(name), func(ctx context.Context, p *progress) error {
		return x.t.client.Poll(ctx, time.Second, func(ctx context.Context) (bool, error) {
			o, err := x.t.call(ctx, request(http.MethodGet, u, versionExtensions, nil))
			if client.IsNotFound(err) {
				return true, nil
			}
			if s := lastStatus(flat(o)); s.str("level") == "Error" {
				p.show("Extension %s: %s (%s)", name, o.str("properties.provisioningState"), s.str("message"))
			} else {
				p.show("Extension %s: %s", name, o.str("properties.provisioningState"))
			}
			return false, err
		})
	})
}
