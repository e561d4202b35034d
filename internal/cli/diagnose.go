package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

const extensionOfConnections = "sc-extension"

// connectionDiagnose walks the list of the documentation's troubleshooting: with a
// name for a connection, without one for the extension that all connections need.
func (t *tool) connectionDiagnose(l *clusterConnections) *cobra.Command {
	c := t.verb("diagnose [NAME]", "Look for what is wrong with a connection, in order, and say what to run next", `
keyfleet connection diagnose shop-db --cluster prod
keyfleet connection diagnose --cluster prod -o json`, cobra.MaximumNArgs(1),
		func(ctx context.Context, args []string) error {
			o, err := t.diagnose(ctx, l, args)
			if err != nil {
				return err
			}
			return t.diagnosed(o)
		})
	c.Long = `Look for what is wrong with a connection, in order, and say what to run next.
A manager looks in the cluster: at the extension's namespace, release, job and
operator, at permissions, at the connection's objects and at the workloads that use
it. Without a name it looks at what all connections of the cluster need. It fails
where something is wrong.`
	return c
}

// diagnose asks, and waits for the answer.
func (t *tool) diagnose(ctx context.Context, l *clusterConnections, args []string) (o object, err error) {
	var resp *client.Response
	name, back := extensionOfConnections, ""
	if len(args) == 1 {
		name, back = args[0], l.back(args[0])
		_, resp, err = l.call(ctx, http.MethodPost, name, "/diagnose")
	} else {
		x := &clusterExtensions{t: t, cluster: l.cluster}
		var u string
		if u, err = x.url(ctx, name); err != nil {
			return o, err
		}
		back = x.back(name)
		_, resp, err = t.callFull(ctx, request(http.MethodPost, u+"/diagnose", versionExtensions, nil))
	}
	if err != nil {
		return o, err
	}
	err = t.waiting(ctx, defaultWait, back, func(ctx context.Context, p *progress) error {
		last, err := t.client.Wait(ctx, resp, func(string) { p.show("Looking for what is wrong with %s", name) })
		if err != nil {
			return err
		}
		return last.Into(&o)
	})
	return o, err
}

// diagnosed prints what was found, and below the first failure in full: the others
// often follow from it.
func (t *tool) diagnosed(o object) error {
	all := o.objects("properties.findings")
	if len(all) == 0 {
		return errors.New("the server answered without findings")
	}
	wrong := slices.IndexFunc(all, func(f object) bool { return f.str("result") == "failure" })
	switch t.form() {
	case "table", "tsv", "name":
		err := many(t, all, objectView(field("Result", "result"), field("Name", "name"), field("Code", "code"), field("Message", "message")))
		if err != nil {
			return err
		}
		if wrong >= 0 && t.form() == "table" {
			fmt.Fprintln(t.out, explained(all[wrong]))
		}
	default:
		if err := t.data(o); err != nil {
			return err
		}
	}
	if wrong >= 0 {
		return exitStatus(client.ExitFailed)
	}
	return nil
}

// explained is a finding in full.
func explained(f object) string {
	out := []string{"", "Mend this first: " + f.str("name")}
	for _, part := range []struct{ head, path string }{{"Code", "code"}, {"Layer", "layer"}, {"Object", "object"}, {"Message", "message"}, {"Said there", "raw"}, {"Fix", "fix"}} {
		if text := f.str(part.path); text != "" {
			out = append(out, fmt.Sprintf("  %-10s  %s", part.head, strings.ReplaceAll(text, "\n", "\n"+strings.Repeat(" ", 14))))
		}
	}
	return clean(strings.Join(out, "\n"))
}
