package cli

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) roleCommand() *cobra.Command {
	return t.noun("role", "Roles: who may do what with which resources", t.roleAssign(), t.roleList(), t.roleRemove(), t.roleDefinitions())
}

func (t *tool) assignmentView(roles map[string]string) view[object] {
	return objectView(
		derived("Role", func(o object) string {
			id := strings.ToLower(lastPart(o.str("properties.roleDefinitionId")))
			return orElse(roles[id], id)
		}),
		field("Object id", "properties.principalId"), field("Type", "properties.principalType"), field("Scope", "properties.scope"), field("Name", "name"),
	)
}

func lastPart(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// definitions reads the roles that there are.
func (t *tool) definitions(ctx context.Context) ([]object, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return nil, err
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return nil, err
	}
	return t.list(ctx, c.AtScope("/subscriptions/"+sub, "roleDefinitions"), client.VersionRoles)
}

func (t *tool) roleDefinitions() *cobra.Command {
	return t.verb("definitions", "List the roles that can be assigned", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := t.definitions(ctx)
		if err != nil {
			return err
		}
		return many(t, all, view[object]{
			name: func(o object) string { return o.str("properties.roleName") },
			columns: []column[object]{
				field("Role", "properties.roleName"), field("Id", "name"),
				derived("Actions", func(o object) string {
					var actions []string
					for _, p := range o.objects("properties.permissions") {
						actions = append(actions, p.strs("actions")...)
						for _, n := range p.strs("notActions") {
							actions = append(actions, "not "+n)
						}
					}
					return strings.Join(actions, ", ")
				}),
			},
		})
	})
}

// role finds a role definition by its name or GUID.
func (t *tool) role(ctx context.Context, name string) (object, error) {
	all, err := t.definitions(ctx)
	if err != nil {
		return object{}, err
	}
	var names []string
	for _, o := range all {
		if strings.EqualFold(o.str("properties.roleName"), name) || strings.EqualFold(o.name(), name) {
			return o, nil
		}
		names = append(names, o.str("properties.roleName"))
	}
	return object{}, notFoundf("there is no role %q; there are %s", name, strings.Join(names, ", ")).withFix("keyfleet role definitions")
}

func (t *tool) roleAssign() *cobra.Command {
	var who principalFlags
	var role, scope, kind string
	c := t.verb("assign", "Give a principal a role at a scope", `
keyfleet role assign --object-id OID --role Contributor --scope /subscriptions/ID/resourceGroups/rg1
keyfleet role assign --identity pool-id --role Reader`, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		def, err := t.role(ctx, role)
		if err != nil {
			return err
		}
		oid, err := t.resolvePrincipal(ctx, who)
		if err != nil {
			return err
		}
		at, err := t.scope(ctx, scope)
		if err != nil {
			return err
		}
		u := t.client.AtScope(at, "roleAssignments/"+grantName(at, oid, def.name()))
		props := map[string]string{"roleDefinitionId": def.str("id"), "principalId": oid}
		if kind != "" {
			props["principalType"] = kind
		}
		o, err := t.call(ctx, request(http.MethodPut, u, client.VersionRoles, map[string]any{"properties": props}))
		var e *client.Error
		if errors.As(err, &e) && e.Code == "RoleAssignmentExists" {
			return t.done("%s has the role %s at %s already.", oid, def.str("properties.roleName"), at)
		}
		if err != nil {
			return err
		}
		return changed(t, o, t.assignmentView(nil), "%s has the role %s at %s.", oid, def.str("properties.roleName"), at)
	})
	who.add(c)
	c.Flags().StringVar(&role, "role", "", "role, by name or id")
	c.Flags().StringVar(&scope, "scope", "", "resource id of what it is for; / is everything (default: the group of -g, else the subscription)")
	c.Flags().StringVar(&kind, "principal-type", "", "ServicePrincipal where the principal is not known here yet")
	_ = c.MarkFlagRequired("role")
	return c
}

// scope is the scope that flags name; connect must have succeeded.
func (t *tool) scope(ctx context.Context, scope string) (string, error) {
	if scope != "" {
		return scope, nil
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return "", err
	}
	if t.flags.group != "" {
		return client.GroupID(sub, t.flags.group), nil
	}
	return "/subscriptions/" + sub, nil
}

// grantName is the GUID of an assignment: the same grant gets the same one, so
// that asking for it again changes nothing.
func grantName(scope, principal, role string) string {
	h := sha256.Sum256([]byte(strings.ToLower(strings.TrimRight(scope, "/") + "\n" + principal + "\n" + role)))
	h[6], h[8] = h[6]&0x0f|0x80, h[8]&0x3f|0x80 // version 8: of our own making (RFC 9562, 5.8)
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16])
}

func (t *tool) assignments(ctx context.Context, scope, principal string) ([]object, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return nil, err
	}
	at, err := t.scope(ctx, scope)
	if err != nil {
		return nil, err
	}
	req := request(http.MethodGet, c.AtScope(at, "roleAssignments"), client.VersionRoles, nil)
	if principal != "" {
		req.Query = map[string][]string{"$filter": {"principalId eq '" + strings.ReplaceAll(principal, "'", "''") + "'"}}
	}
	return client.List[object](ctx, c, req)
}

func (t *tool) roleList() *cobra.Command {
	var scope, principal string
	c := t.verb("list", "List who has which role", "keyfleet role list\nkeyfleet role list --scope / --object-id OID", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := t.assignments(ctx, scope, principal)
		if err != nil {
			return err
		}
		roles := map[string]string{}
		defs, err := t.definitions(ctx)
		if err != nil {
			return err
		}
		for _, d := range defs {
			roles[strings.ToLower(d.name())] = d.str("properties.roleName")
		}
		return many(t, all, t.assignmentView(roles))
	})
	c.Flags().StringVar(&scope, "scope", "", "resource id; default: the group of -g, else the subscription")
	c.Flags().StringVar(&principal, "object-id", "", "only of this principal")
	return c
}

func (t *tool) roleRemove() *cobra.Command {
	var who principalFlags
	var role, scope string
	c := t.verb("remove", "Take a role at a scope from a principal", "keyfleet role remove --object-id OID --role Contributor --scope /subscriptions/ID", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		def, err := t.role(ctx, role)
		if err != nil {
			return err
		}
		oid, err := t.resolvePrincipal(ctx, who)
		if err != nil {
			return err
		}
		at, err := t.scope(ctx, scope)
		if err != nil {
			return err
		}
		all, err := t.assignments(ctx, at, oid)
		if err != nil {
			return err
		}
		for _, o := range all {
			same := strings.EqualFold(strings.TrimRight(o.str("properties.scope"), "/"), strings.TrimRight(at, "/"))
			if same && strings.EqualFold(o.str("properties.principalId"), oid) && strings.EqualFold(lastPart(o.str("properties.roleDefinitionId")), def.name()) {
				if _, err := t.client.Do(ctx, request(http.MethodDelete, t.client.AtScope(at, "roleAssignments/"+o.name()), client.VersionRoles, nil)); err != nil {
					return err
				}
				return t.done("%s no longer has the role %s at %s.", oid, def.str("properties.roleName"), at)
			}
		}
		return notFoundf("%s does not have the role %s at %s itself", oid, def.str("properties.roleName"), at).withFix("keyfleet role list --object-id %s", oid)
	})
	who.add(c)
	c.Flags().StringVar(&role, "role", "", "role, by name or id")
	c.Flags().StringVar(&scope, "scope", "", "resource id; default: the group of -g, else the subscription")
	_ = c.MarkFlagRequired("role")
	return c
}
