package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) poolView() view[object] {
	return objectView(
		field("Name", "name"), field("State", "properties.allocationState"),
		derived("Nodes", func(o object) string {
			return o.str("properties.currentDedicatedNodes") + "/" + o.str("properties.scaleSettings.fixedScale.targetDedicatedNodes")
		}),
		field("Size", "properties.vmSize"),
		derived("Extensions", func(o object) string { return strings.Join(extensionNames(o), ", ") }),
		derived("Problem", poolProblem),
	).with(only(
		field("Provisioning", "properties.provisioningState"),
		t.timeAt("State since", "properties.allocationStateTransitionTime"),
		field("Image", "properties.deploymentConfiguration.virtualMachineConfiguration.imageReference.offer"),
		derived("Identities", func(o object) string {
			ids, _ := o.at("identity.userAssignedIdentities").(map[string]any)
			return strings.Join(keys(ids), "\n")
		}),
		field("Etag", "etag"), field("Id", "id"),
	)...)
}

const vmExtensions = "properties.deploymentConfiguration.virtualMachineConfiguration.extensions"

func extensionNames(o object) []string {
	var names []string
	for _, e := range o.objects(vmExtensions) {
		names = append(names, e.str("name"))
	}
	return names
}

// poolProblem is the first resize error, in short.
func poolProblem(o object) string {
	for _, e := range o.objects("properties.resizeOperationStatus.errors") {
		return e.str("code") + ": " + e.str("message")
	}
	return ""
}

func (t *tool) poolCommand() *cobra.Command {
	return t.noun("pool", "Pools of nodes", t.poolCreate(), t.poolWhatIf(), t.poolList(), t.poolShow(), t.poolResize(), t.poolUpdate(), t.poolDelete(), t.poolWait())
}

// bodyFlags say where the body of a pool is and what stands for its placeholders.
type bodyFlags struct {
	file string
	vars []string
}

func (f *bodyFlags) add(c *cobra.Command) {
	c.Flags().StringVarP(&f.file, "file", "f", "", "file with the pool's resource body as JSON; - is standard input")
	c.Flags().StringArrayVar(&f.vars, "var", nil, "NAME=VALUE for the placeholder {{NAME}} in the body; may be repeated")
	_ = c.MarkFlagRequired("file")
}

// apiVersionFlag lets a body be read by the rules of its own date.
func apiVersionFlag(c *cobra.Command, version *string) {
	c.Flags().StringVar(version, "api-version", client.VersionBatch, "api-version that the body is written for")
}

var placeholder = regexp.MustCompile(`\{\{([A-Za-z][A-Za-z0-9_.-]*)\}\}`)

// body reads the file and fills its placeholders. A body without placeholders
// is sent byte for byte: the server says what is wrong with it, and where.
func (t *tool) body(f *bodyFlags) ([]byte, error) {
	b, err := t.readBody(f.file)
	if err != nil {
		return nil, err
	}
	vars := map[string]string{
		"subscription": t.target.Subscription, "group": t.target.Group, "tenant": t.target.Tenant, "vaultSuffix": t.target.Endpoints.VaultSuffix,
	}
	for _, v := range f.vars {
		name, value, ok := strings.Cut(v, "=")
		if !ok || name == "" {
			return nil, usagef("--var %s is not of the form NAME=VALUE", v)
		}
		vars[name] = value
	}
	var missing []string
	out := placeholder.ReplaceAllFunc(b, func(m []byte) []byte {
		name := string(placeholder.FindSubmatch(m)[1])
		value, ok := vars[name]
		if !ok || value == "" {
			missing = append(missing, name)
			return m
		}
		q, _ := json.Marshal(value) // placeholders stand inside JSON strings
		return q[1 : len(q)-1]
	})
	if len(missing) > 0 {
		return nil, usagef("the body has placeholders without a value: %s", strings.Join(missing, ", ")).withFix("add --var %s=VALUE", missing[0])
	}
	return out, nil
}

var nameMember = regexp.MustCompile(`"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"`)

// poolName is the argument, or the name that the body says.
func poolName(args []string, body []byte) (string, error) {
	if len(args) == 1 {
		return args[0], nil
	}
	var b struct {
		Name string `json:"name"`
	}
	if json.Unmarshal(body, &b) == nil && b.Name != "" {
		return b.Name, nil
	}
	// A body that is not JSON still goes to the server, which says where it breaks.
	if m := nameMember.FindSubmatch(body); m != nil {
		return string(m[1]), nil
	}
	return "", usagef("neither the command nor the body names the pool").withFix("keyfleet pool create NAME --file FILE")
}

func (t *tool) poolCreate() *cobra.Command {
	var f bodyFlags
	var strict, ifNone bool
	var ifMatch, version string
	c := t.verb("create [NAME]", "Create a pool from its resource body, or change it to be as the body says", `
keyfleet pool create sim --file pool.json
keyfleet pool create sim --file pool.json --strict
keyfleet pool create sim --file pool.json --var vault=prod1 --no-wait`, cobra.MaximumNArgs(1), nil)
	c.Long = `Create a pool from its resource body: the JSON that a PUT of the resource takes,
sent byte for byte. Placeholders {{NAME}} in it are filled from --var;
{{subscription}}, {{group}}, {{tenant}} and {{vaultSuffix}} come from the context.

What is wrong in itself is refused. What depends on the state of other things (a
secret that does not exist yet, a missing permission) is accepted with a warning;
--strict refuses that too.`
	account := accountFlag(c)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		if _, err := t.connect(ctx); err != nil {
			return err
		}
		body, err := t.body(&f)
		if err != nil {
			return err
		}
		name, err := poolName(args, body)
		if err != nil {
			return err
		}
		id, err := t.poolID(ctx, *account, name)
		if err != nil {
			return err
		}
		req := request(http.MethodPut, t.client.ARM(id), version, body)
		req.Header = http.Header{}
		if ifMatch != "" {
			req.Header.Set("If-Match", ifMatch)
		}
		if ifNone {
			req.Header.Set("If-None-Match", "*")
		}
		if strict {
			req.Header.Set("Prefer", "handling=strict") // RFC 7240
		}
		o, err := t.call(ctx, req)
		if err != nil {
			return err
		}
		if !wait() {
			return changed(t, o, t.poolView(), "Pool %s is accepted.", name)
		}
		return t.awaitPool(ctx, id, "idle")
	}
	f.add(c)
	apiVersionFlag(c, &version)
	c.Flags().BoolVar(&strict, "strict", false, "refuse what would be accepted with a warning")
	c.Flags().BoolVar(&ifNone, "if-none-match", false, "only if there is no such pool yet")
	c.Flags().StringVar(&ifMatch, "if-match", "", "only if the pool still has this etag")
	return c
}

func (t *tool) poolList() *cobra.Command {
	c := t.verb("list", "List the pools of an account", "", cobra.NoArgs, nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		acct, err := t.account(ctx, *account)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, t.client.ARM(acct.str("id")+"/pools"), client.VersionBatch)
		if err != nil {
			return err
		}
		return many(t, all, t.poolView())
	}
	return c
}

func (t *tool) poolShow() *cobra.Command {
	c := t.verb("show NAME", "Show a pool", "keyfleet pool show sim -o json", cobra.ExactArgs(1), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		o, err := t.pool(cmd.Context(), *account, args[0])
		if err != nil {
			return err
		}
		return one(t, o, t.poolView())
	}
	c.ValidArgsFunction = t.completePools
	return c
}

func (t *tool) pool(ctx context.Context, account, name string) (object, error) {
	id, err := t.poolID(ctx, account, name)
	if err != nil {
		return object{}, err
	}
	return t.call(ctx, request(http.MethodGet, t.client.ARM(id), client.VersionBatch, nil))
}

func (t *tool) poolResize() *cobra.Command {
	var resizeTimeout string
	var stop bool
	c := t.verb("resize NAME COUNT", "Change how many nodes a pool has, or stop a running change", `
keyfleet pool resize sim 5
keyfleet pool resize sim --stop`, cobra.RangeArgs(1, 2), nil)
	account := accountFlag(c)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		if stop != (len(args) == 1) {
			return usagef("either COUNT or --stop is needed").withFix("keyfleet pool resize %s 3", args[0])
		}
		id, err := t.poolID(ctx, *account, args[0])
		if err != nil {
			return err
		}
		if stop {
			o, err := t.call(ctx, request(http.MethodPost, t.client.ARM(id+"/stopResize"), client.VersionBatch, nil))
			if err != nil {
				return err
			}
			return changed(t, o, t.poolView(), "The resize of pool %s is being stopped.", args[0])
		}
		n, err := strconv.Atoi(args[1])
		if err != nil || n < 0 {
			return usagef("%q is no number of nodes", args[1])
		}
		fixed := map[string]any{"targetDedicatedNodes": n}
		if resizeTimeout != "" {
			fixed["resizeTimeout"] = resizeTimeout
		}
		body := map[string]any{"properties": map[string]any{"scaleSettings": map[string]any{"fixedScale": fixed}}}
		o, err := t.call(ctx, request(http.MethodPatch, t.client.ARM(id), client.VersionBatch, body))
		if err != nil {
			return err
		}
		if !wait() {
			return changed(t, o, t.poolView(), "Pool %s is resizing to %s.", args[0], plural(n, "node"))
		}
		return t.awaitPool(ctx, id, "idle")
	}
	c.Flags().StringVar(&resizeTimeout, "resize-timeout", "", "when the server gives up, as ISO 8601 (PT5M to P7D)")
	c.Flags().BoolVar(&stop, "stop", false, "stop the running resize")
	c.ValidArgsFunction = t.completePools
	return c
}

func (t *tool) poolUpdate() *cobra.Command {
	var f bodyFlags
	var ifMatch, version string
	c := t.verb("update NAME", "Change what a body with some properties names (PATCH)", "keyfleet pool update sim --file patch.json", cobra.ExactArgs(1), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		id, err := t.poolID(ctx, *account, args[0])
		if err != nil {
			return err
		}
		body, err := t.body(&f)
		if err != nil {
			return err
		}
		req := request(http.MethodPatch, t.client.ARM(id), version, body)
		if ifMatch != "" {
			req.Header = http.Header{"If-Match": {ifMatch}}
		}
		o, err := t.call(ctx, req)
		if err != nil {
			return err
		}
		return changed(t, o, t.poolView(), "Pool %s is updated.", args[0])
	}
	f.add(c)
	apiVersionFlag(c, &version)
	c.Flags().StringVar(&ifMatch, "if-match", "", "only if the pool still has this etag")
	c.ValidArgsFunction = t.completePools
	return c
}

func (t *tool) poolDelete() *cobra.Command {
	var yes bool
	c := t.verb("delete NAME", "Delete a pool and its nodes", "keyfleet pool delete sim --yes", cobra.ExactArgs(1), nil)
	account := accountFlag(c)
	wait := waitFlags(c, true)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		id, err := t.poolID(ctx, *account, args[0])
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Pool %s and its nodes will be deleted", args[0]); err != nil {
			return err
		}
		return t.deleteURL(ctx, t.client.ARM(id), client.VersionBatch, wait(), "Pool "+args[0], "keyfleet pool show "+args[0])
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.ValidArgsFunction = t.completePools
	return c
}

func (t *tool) poolWhatIf() *cobra.Command {
	var f bodyFlags
	var exitCode, patch bool
	var version string
	c := t.verb("what-if [NAME]", "Say what creating or changing a pool would change, refuse and warn of, and change nothing", "keyfleet pool what-if sim --file pool.json", cobra.MaximumNArgs(1), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		if _, err := t.connect(ctx); err != nil {
			return err
		}
		body, err := t.body(&f)
		if err != nil {
			return err
		}
		name, err := poolName(args, body)
		if err != nil {
			return err
		}
		id, err := t.poolID(ctx, *account, name)
		if err != nil {
			return err
		}
		req := request(http.MethodPost, t.client.ARM("/keyfleet/v1"+id+"/whatif"), version, body)
		if patch {
			req.Query = url.Values{"patch": {"true"}}
		}
		o, err := t.call(ctx, req)
		if err != nil {
			return err
		}
		if t.form() != "table" {
			err = t.data(o)
		} else {
			t.whatIf(name, o)
		}
		if err == nil && exitCode && len(o.objects("changes"))+len(o.objects("problems"))+len(o.objects("warnings")) > 0 {
			err = exitStatus(exitChanges)
		}
		return err
	}
	f.add(c)
	apiVersionFlag(c, &version)
	c.Flags().BoolVar(&patch, "patch", false, "the body is that of an update, not of the whole pool")
	c.Flags().BoolVar(&exitCode, "exit-code", false, "end with 10 when there are changes, problems or warnings")
	return c
}

// whatIf prints a what-if for people.
func (t *tool) whatIf(name string, o object) {
	changes := o.objects("changes")
	isNew := o.str("created") == "true"
	switch {
	case o.str("accepted") != "true":
		fmt.Fprintf(t.out, "Pool %s would be refused.\n", name)
	case isNew:
		fmt.Fprintf(t.out, "Pool %s would be created.\n", name)
	case len(changes) == 0:
		fmt.Fprintf(t.out, "Pool %s would not change.\n", name)
	default:
		fmt.Fprintf(t.out, "Pool %s would change.\n", name)
	}
	for _, c := range changes {
		if isNew {
			break // all of it is new
		}
		word := "change"
		if c.str("allowed") != "true" {
			word = "cannot change"
		}
		fmt.Fprintf(t.out, "  %s  %s: %s -> %s\n", word, clean(c.str("path")), clean(scalar(c.at("old"))), clean(scalar(c.at("new"))))
	}
	for _, kind := range []string{"problem", "warning"} {
		for _, p := range o.objects(kind + "s") {
			fmt.Fprintf(t.out, "  %s  %s\n", kind, clean(strings.TrimPrefix(p.str("path")+": "+p.str("reason"), ": ")))
			if fix := p.str("fix"); fix != "" {
				fmt.Fprintf(t.out, "           Fix: %s\n", clean(fix))
			}
		}
	}
}
