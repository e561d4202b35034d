package cli

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/client"
)

// forgetTime is how long the deletion of a dry run may take; what is not deleted goes
// after a day.
const forgetTime = 10 * time.Second

// planConnection asks what a create would do, shows it, and leaves nothing behind. The
// exit status is that of a create that is refused for the first thing that is missing.
func (t *tool) planConnection(ctx context.Context, f *connectionFlags, l servicelinker.Linker) error {
	all, err := t.connectionURL(ctx, orElse(f.source, f.cluster), "")
	if err != nil {
		return err
	}
	u := strings.TrimSuffix(all, servicelinker.Type) + servicelinker.DryrunType + "/dry-run-" + strings.ToLower(rand.Text()[:10])
	req := request(http.MethodPut, u, versionLinkers, servicelinker.Dryrun{Properties: servicelinker.DryrunProperties{
		Parameters: servicelinker.DryrunParameters{ActionName: "createOrUpdate", LinkerName: f.name, LinkerProperties: l.Properties},
	}})
	req.Query = f.query()
	defer t.forgetDryrun(ctx, u)
	o, resp, err := t.callFull(ctx, req)
	if err != nil {
		return err
	}
	if o.str("properties.provisioningState") != "Succeeded" {
		if _, err := t.follow(ctx, resp, f.name, ""); err != nil {
			return err
		}
		if o, err = t.call(ctx, request(http.MethodGet, u, versionLinkers, nil)); err != nil {
			return err
		}
	}
	var d servicelinker.Dryrun
	if err := json.Unmarshal(o.raw, &d); err != nil {
		return fmt.Errorf("reading the plan: %w", err)
	}
	if t.form() == "table" {
		err = t.showPlan(f.name, d.Properties)
	} else {
		err = one(t, o, objectView(field("Name", "properties.parameters.linkerName"), field("Change", "properties.plan.change")))
	}
	if missing := d.Properties.PrerequisiteResults; err == nil && len(missing) > 0 {
		err = exitStatus((&client.Error{Status: missing[0].Status, Code: missing[0].Code}).Exit())
	}
	return err
}

func (t *tool) forgetDryrun(ctx context.Context, u string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTime)
	defer cancel()
	if _, err := t.client.Do(ctx, request(http.MethodDelete, u, versionLinkers, nil)); err != nil {
		t.warn("The dry run was not deleted; it goes by itself after a day.")
	}
}

// showPlan writes a plan for people: what is missing, what happens, and what the
// workload gets.
func (t *tool) showPlan(name string, p servicelinker.DryrunProperties) error {
	for _, s := range [][]string{planHead(name, p), planMissing(p.PrerequisiteResults)} {
		for _, line := range s {
			if _, err := fmt.Fprintln(t.out, clean(line)); err != nil {
				return err
			}
		}
	}
	if p.Plan == nil {
		return nil
	}
	tables := []struct {
		head []string
		rows [][]string
	}{
		{[]string{"WHAT HAPPENS", "KIND", "NAME", "ABOUT"}, planSteps(*p.Plan)},
		{[]string{"VARIABLE", "VALUE"}, planKeys(*p.Plan)},
	}
	for _, tb := range tables {
		if len(tb.rows) == 0 {
			continue
		}
		if _, err := fmt.Fprintln(t.out); err != nil {
			return err
		}
		if err := writeTable(t.out, tb.head, tb.rows); err != nil {
			return err
		}
	}
	return t.showRestart(p.Plan.Restart)
}

// planHead says in a line what the create would come to, and how the cluster is.
func planHead(name string, p servicelinker.DryrunProperties) []string {
	pl := p.Plan
	if pl == nil {
		return []string{fmt.Sprintf("Connection %s: the server says no more about it.", name)}
	}
	would := map[servicelinker.Change]string{servicelinker.Create: "it would be made", servicelinker.Modify: "it would be changed", servicelinker.Unchanged: "it would stay as it is"}[pl.Change]
	if n := len(p.PrerequisiteResults); n > 0 {
		would = fmt.Sprintf("it cannot be made so, for %d reasons", n)
		if n == 1 {
			would = "it cannot be made so, for one reason"
		}
	}
	out := []string{fmt.Sprintf("Connection %s: %s. Nothing was changed.", name, would)}
	c := pl.Cluster
	switch {
	case c.Busy != "":
		out = append(out, "The cluster is being changed, and would be waited for: "+c.Busy+".")
	case c.Answers:
	case c.Reason == "": // there is none, which stands among the reasons
	default:
		out = append(out, "The cluster does not answer now, and would be waited for: "+c.Reason+".")
	}
	return out
}

func planMissing(all []servicelinker.PrerequisiteResult) []string {
	var out []string
	for _, r := range all {
		out = append(out, "", "  "+orElse(r.Code, r.Type)+": "+r.Message)
		if r.Message == "" { // a server that has no message of its own
			out[len(out)-1] += strings.Join(r.Permissions, ", ") + " over " + r.Scope + "; the role " + r.RecommendedRole + " has it"
		}
		if r.Target != "" {
			out = append(out, "    Where  "+r.Target)
		}
		if r.Fix != "" {
			out = append(out, "    Fix    "+r.Fix)
		}
	}
	return out
}

// planSteps are the rows of all that is made, in its order.
func planSteps(p servicelinker.Plan) [][]string {
	var rows [][]string
	row := func(change servicelinker.Change, kind, name, about string) {
		rows = append(rows, []string{string(change), kind, name, about})
	}
	shared := func(yes bool) string {
		if yes {
			return "shared with other connections"
		}
		return ""
	}
	if p.Extension == "install" {
		row(servicelinker.Create, "extension", "sc-extension", "installed by the cluster's first connection")
	}
	if s := p.Secret; s != nil {
		if s.VaultChange == servicelinker.Create {
			row(s.VaultChange, "vault", lastPart(s.Vault), "for the credentials of the cluster's connections")
		}
		row(s.Change, "vault secret", lastPart(s.Vault)+"/"+s.Name, "")
	}
	if l := p.Login; l != nil {
		row(l.Change, "login", l.User, "role "+l.Role+" on "+lastPart(l.Server)+": "+l.Privileges)
	}
	for _, g := range p.Grants {
		row(g.Change, g.Kind, lastPart(g.On), orElse(shared(g.Shared), "for "+g.To))
	}
	for _, o := range p.Objects {
		row(o.Change, o.Kind, o.Namespace+"/"+o.Name, shared(o.Shared))
	}
	return rows
}

func planKeys(p servicelinker.Plan) [][]string {
	var rows [][]string
	for _, k := range p.Environment {
		value := k.Value
		if k.Secret {
			value = "(a credential)"
		}
		rows = append(rows, []string{k.Name, value})
	}
	return rows
}

func (t *tool) showRestart(r servicelinker.Restart) error {
	var text string
	switch {
	case r.Needed && len(r.Consumers) == 0:
		text = "Workloads see the change when they are started anew."
	case len(r.Consumers) > 0:
		var pods []string
		for _, c := range r.Consumers {
			pods = append(pods, c.Pod)
		}
		text = "To be started anew, for they have older values: " + strings.Join(pods, ", ") + "."
	default:
		return nil
	}
	_, err := fmt.Fprintf(t.out, "\n%s\n", clean(text))
	return err
}
