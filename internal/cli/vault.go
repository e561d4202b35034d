package cli

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

const (
	keyVault = "Microsoft.KeyVault"
	vaults   = "vaults"
)

func (t *tool) vaultView() view[object] {
	return objectView(
		field("Name", "name"), derived("Group", object.group), field("Location", "location"), field("Url", "properties.vaultUri"),
		derived("Policies", func(o object) string { return strconv.Itoa(len(o.objects("properties.accessPolicies"))) }),
	).with(only(
		field("Retention days", "properties.softDeleteRetentionInDays"),
		field("Purge protection", "properties.enablePurgeProtection"),
		derived("Access", policyLines),
		field("Id", "id"),
	)...)
}

// policyLines prints the access policies, one principal a line.
func policyLines(o object) string {
	var lines []string
	for _, p := range o.objects("properties.accessPolicies") {
		line := p.str("objectId")
		for _, kind := range permissionKinds {
			if perms := p.strs("permissions." + kind + "s"); len(perms) > 0 {
				line += "  " + kind + "s: " + strings.Join(perms, ",")
			}
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func (t *tool) vaultCommand() *cobra.Command {
	list := t.verb("list", "List the vaults of the subscription", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := t.listResources(ctx, keyVault, vaults, client.VersionVaults)
		if err != nil {
			return err
		}
		return many(t, all, t.vaultView())
	})
	show := t.verb("show NAME", "Show a vault and who may do what in it", "keyfleet vault show prod1", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		o, err := t.findVault(ctx, args[0])
		if err != nil {
			return err
		}
		return one(t, o, t.vaultView())
	})
	show.ValidArgsFunction = t.completeVaults
	return t.noun("vault", "Vaults", t.vaultCreate(), list, show, t.vaultDelete(), t.vaultDeleted(), t.vaultRecover(), t.vaultPurge(), t.vaultSetPolicy(), t.vaultDeletePolicy())
}

func (t *tool) findVault(ctx context.Context, name string) (object, error) {
	return t.find(ctx, keyVault, vaults, "vault", name, client.VersionVaults)
}

func (t *tool) vaultCreate() *cobra.Command {
	var location string
	var retention int
	var protect bool
	var tagFlags []string
	c := t.verb("create NAME", "Create a vault; you may do everything in it", `
keyfleet vault create prod1 --group rg1
keyfleet vault create prod1 --retention-days 7`, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, loc, err := t.newResource(ctx, location, keyVault, vaults, args[0])
		if err != nil {
			return err
		}
		tags, err := tagsOf(tagFlags)
		if err != nil {
			return err
		}
		oid, err := t.self(ctx)
		if err != nil {
			return err
		}
		props := map[string]any{
			"tenantId": t.target.Tenant, "sku": map[string]string{"family": "A", "name": "standard"},
			"accessPolicies": []any{map[string]any{
				"tenantId": t.target.Tenant, "objectId": oid,
				"permissions": map[string][]string{"secrets": {"all"}, "certificates": {"all"}},
			}},
		}
		if old, err := t.call(ctx, request(http.MethodGet, u, client.VersionVaults, nil)); err == nil { // keep who may do what
			props["accessPolicies"] = old.at("properties.accessPolicies")
		}
		if retention != 0 {
			props["softDeleteRetentionInDays"] = retention
		}
		if protect {
			props["enablePurgeProtection"] = true
		}
		o, err := t.call(ctx, request(http.MethodPut, u, client.VersionVaults, map[string]any{"location": loc, "tags": tags, "properties": props}))
		if err != nil {
			return err
		}
		return changed(t, o, t.vaultView(), "Vault %s is there: %s", args[0], o.str("properties.vaultUri"))
	})
	c.Flags().StringVarP(&location, "location", "l", "", "location (default: the group's)")
	c.Flags().IntVar(&retention, "retention-days", 0, "how long deleted things can be recovered, 7 to 90 (default: the server's)")
	c.Flags().BoolVar(&protect, "purge-protection", false, "nobody can purge before the retention is over; cannot be switched off again")
	c.Flags().StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated")
	return c
}

func (t *tool) vaultDelete() *cobra.Command {
	c := t.verb("delete NAME", "Delete a vault; it can be recovered until its retention is over", "keyfleet vault delete prod1", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			o, err := t.findVault(ctx, args[0])
			if err != nil {
				return err
			}
			if err := t.deleteURL(ctx, t.client.ARM(o.str("id")), client.VersionVaults, true, "Vault "+args[0], "keyfleet vault list"); err != nil {
				return err
			}
			t.say("To get it back: keyfleet vault recover %s", args[0])
			return nil
		})
	c.ValidArgsFunction = t.completeVaults
	return c
}

func (t *tool) deletedVaults(ctx context.Context) ([]object, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return nil, err
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return nil, err
	}
	return t.list(ctx, c.ARM("/subscriptions/"+sub+"/providers/Microsoft.KeyVault/deletedVaults"), client.VersionVaults)
}

func (t *tool) vaultDeleted() *cobra.Command {
	return t.verb("list-deleted", "List the deleted vaults that can be recovered", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := t.deletedVaults(ctx)
		if err != nil {
			return err
		}
		return many(t, all, objectView(field("Name", "name"), field("Location", "properties.location"),
			t.timeAt("Deleted", "properties.deletionDate"), t.timeAt("Purged", "properties.scheduledPurgeDate")))
	})
}

// deletedVault finds a deleted vault by its name.
func (t *tool) deletedVault(ctx context.Context, name string) (object, error) {
	all, err := t.deletedVaults(ctx)
	if err != nil {
		return object{}, err
	}
	for _, o := range all {
		if strings.EqualFold(o.name(), name) {
			return o, nil
		}
	}
	return object{}, notFoundf("there is no deleted vault %q", name).withFix("keyfleet vault list-deleted")
}

func (t *tool) vaultRecover() *cobra.Command {
	return t.verb("recover NAME", "Get a deleted vault back with all that was in it", "keyfleet vault recover prod1", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			d, err := t.deletedVault(ctx, args[0])
			if err != nil {
				return err
			}
			body := map[string]any{"location": d.str("properties.location"), "properties": map[string]any{
				"createMode": "recover", "tenantId": t.target.Tenant, "sku": map[string]string{"family": "A", "name": "standard"},
			}} // without accessPolicies: the vault comes back with its own
			o, err := t.call(ctx, request(http.MethodPut, t.client.ARM(d.str("properties.vaultId")), client.VersionVaults, body))
			if err != nil {
				return err
			}
			return changed(t, o, t.vaultView(), "Vault %s is back.", args[0])
		})
}

func (t *tool) vaultPurge() *cobra.Command {
	var yes bool
	c := t.verb("purge NAME", "Destroy a deleted vault and everything in it", "keyfleet vault purge prod1 --yes", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			d, err := t.deletedVault(ctx, args[0])
			if err != nil {
				return err
			}
			if err := t.confirm(yes, "Vault %s and everything in it will be destroyed", args[0]); err != nil {
				return err
			}
			sub, err := t.subscription(ctx)
			if err != nil {
				return err
			}
			u := t.client.ARM("/subscriptions/" + sub + "/providers/Microsoft.KeyVault/locations/" + url.PathEscape(d.str("properties.location")) + "/deletedVaults/" + args[0] + "/purge")
			resp, err := t.client.Do(ctx, request(http.MethodPost, u, client.VersionVaults, nil))
			if err != nil {
				return err
			}
			if _, err := t.client.Wait(ctx, resp, nil); err != nil {
				return err
			}
			return t.done("Vault %s is destroyed.", args[0])
		})
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

// permissionKinds are the kinds of permissions, as their flags spell them.
var permissionKinds = []string{"secret", "certificate", "key", "storage"}

// principalFlags say whom a policy or a role is for.
type principalFlags struct {
	objectID string
	identity string
	self     bool
}

func (f *principalFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.objectID, "object-id", "", "object id of the principal")
	c.Flags().StringVar(&f.identity, "identity", "", "managed identity, by name or resource id")
	c.Flags().BoolVar(&f.self, "self", false, "you yourself")
	c.MarkFlagsOneRequired("object-id", "identity", "self")
	c.MarkFlagsMutuallyExclusive("object-id", "identity", "self")
}

// resolve finds the object id.
func (t *tool) resolvePrincipal(ctx context.Context, f principalFlags) (string, error) {
	switch {
	case f.objectID != "":
		return f.objectID, nil
	case f.self:
		return t.self(ctx)
	}
	o, err := t.findIdentity(ctx, f.identity)
	return o.str("properties.principalId"), err
}

func (t *tool) vaultSetPolicy() *cobra.Command {
	var who principalFlags
	var replace bool
	perms := map[string]*[]string{}
	c := t.verb("set-policy VAULT", "Give a principal permissions in a vault", `
keyfleet vault set-policy prod1 --identity pool-id --secret-permissions get,list
keyfleet vault set-policy prod1 --object-id OID --certificate-permissions get --replace`, cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			o, err := t.findVault(ctx, args[0])
			if err != nil {
				return err
			}
			oid, err := t.resolvePrincipal(ctx, who)
			if err != nil {
				return err
			}
			given := map[string][]string{}
			for kind, list := range perms {
				if len(*list) > 0 {
					given[plainKind(kind)] = splitList(*list)
				}
			}
			if len(given) == 0 {
				return usagef("no permission is named").withFix("add --secret-permissions get,list or --certificate-permissions get")
			}
			how := "add"
			if replace {
				how = "replace"
			}
			policy := map[string]any{"tenantId": t.target.Tenant, "objectId": oid, "permissions": given}
			if err := t.changePolicies(ctx, o, how, policy); err != nil {
				return err
			}
			return t.afterPolicy(ctx, args[0], "The policy for %s is set in vault %s.", oid)
		})
	for _, kind := range permissionKinds {
		perms[kind] = c.Flags().StringSlice(kind+"-permissions", nil, "permissions on "+plainKind(kind)+", comma-separated: get, list, set, all, ...")
	}
	c.Flags().BoolVar(&replace, "replace", false, "take away what is not named; without it permissions are added")
	who.add(c)
	c.ValidArgsFunction = t.completeVaults
	return c
}

func plainKind(kind string) string {
	if kind == "storage" {
		return kind
	}
	return kind + "s"
}

// splitList allows spaces where az has them: "get list".
func splitList(list []string) []string {
	var out []string
	for _, e := range list {
		out = append(out, strings.Fields(strings.ToLower(e))...)
	}
	return out
}

// changePolicies calls accessPolicies/add, replace or remove of the vault.
func (t *tool) changePolicies(ctx context.Context, v object, how string, policy any) error {
	body := map[string]any{"properties": map[string]any{"accessPolicies": []any{policy}}}
	_, err := t.call(ctx, request(http.MethodPut, t.client.ARM(v.str("id")+"/accessPolicies/"+how), client.VersionVaults, body))
	return err
}

// afterPolicy shows the vault as it is now.
func (t *tool) afterPolicy(ctx context.Context, name, format, oid string) error {
	if t.form() == "table" {
		return t.done(format, oid, name)
	}
	o, err := t.findVault(ctx, name)
	if err != nil {
		return err
	}
	return one(t, o, t.vaultView())
}

func (t *tool) vaultDeletePolicy() *cobra.Command {
	var who principalFlags
	c := t.verb("delete-policy VAULT", "Take all permissions in a vault from a principal", "keyfleet vault delete-policy prod1 --identity pool-id", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			o, err := t.findVault(ctx, args[0])
			if err != nil {
				return err
			}
			oid, err := t.resolvePrincipal(ctx, who)
			if err != nil {
				return err
			}
			found := false
			for _, p := range o.objects("properties.accessPolicies") {
				if strings.EqualFold(p.str("objectId"), oid) {
					found = true
					if err := t.changePolicies(ctx, o, "remove", p); err != nil {
						return err
					}
				}
			}
			if !found {
				return notFoundf("vault %s has no policy for %s", args[0], oid).withFix("keyfleet vault show %s", args[0])
			}
			return t.afterPolicy(ctx, args[0], "The policy for %s is gone from vault %s.", oid)
		})
	who.add(c)
	c.ValidArgsFunction = t.completeVaults
	return c
}

// vaultObject is a secret or a certificate that arguments name.
type vaultObject struct {
	base    string // "https://prod1.vault.keyfleet.internal:8443"
	vault   string
	name    string
	version string
}

// objectArgs reads the arguments that name an object of a vault: VAULT NAME,
// VAULT/NAME[/VERSION], or the object's URL as messages and settings have it.
func (t *tool) objectArgs(ctx context.Context, args []string) (vaultObject, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return vaultObject{}, err
	}
	if len(args) == 2 {
		return vaultObject{base: c.Vault(args[0], ""), vault: args[0], name: args[1]}, nil
	}
	s := args[0]
	if strings.HasPrefix(s, "https://") {
		u, err := url.Parse(s)
		if err != nil {
			return vaultObject{}, usagef("%q is no URL", s)
		}
		parts := strings.Split(strings.Trim(u.Path, "/"), "/")
		if len(parts) < 2 || len(parts) > 3 {
			return vaultObject{}, usagef("%q is not the URL of a secret or certificate", s)
		}
		name, _, _ := strings.Cut(u.Hostname(), ".")
		v := vaultObject{base: c.Vault(name, ""), vault: name, name: parts[1]}
		if len(parts) == 3 {
			v.version = parts[2]
		}
		return v, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return vaultObject{}, usagef("%q names no object of a vault; the form is VAULT NAME or VAULT/NAME", s)
	}
	v := vaultObject{base: c.Vault(parts[0], ""), vault: parts[0], name: parts[1]}
	if len(parts) == 3 {
		v.version = parts[2]
	}
	return v, nil
}

// url is the object's URL under a kind ("secrets"), with its version if it has one.
func (v vaultObject) url(kind string, more ...string) string {
	u := v.base + "/" + kind + "/" + url.PathEscape(v.name)
	if v.version != "" && len(more) == 0 {
		u += "/" + url.PathEscape(v.version)
	}
	for _, m := range more {
		u += "/" + m
	}
	return u
}

func (v vaultObject) String() string { return v.vault + "/" + v.name }

// versionOf is the last part of an id with a version.
func versionOf(o object, path string) string {
	parts := strings.Split(strings.Trim(o.str(path), "/"), "/")
	if len(parts) < 6 { // https: "" host kind name version
		return ""
	}
	return parts[5]
}

// nameOf is the name in the id of a vault's object.
func nameOf(o object, path string) string {
	parts := strings.Split(strings.Trim(o.str(path), "/"), "/")
	if len(parts) < 5 {
		return ""
	}
	return parts[4]
}

// self is the caller's own object id, from the token that the server gave us.
func (t *tool) self(ctx context.Context) (string, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return "", err
	}
	return c.ObjectID(ctx)
}
