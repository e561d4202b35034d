package access

import (
	"context"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Role is a role definition: what its holder may do under the scope of the assignment.
// Actions are matched case-insensitively; "*" matches any run of characters.
type Role struct {
	ID         string // GUID, as in Azure
	Name       string
	Actions    []string
	NotActions []string
}

// The built-in roles (GUIDs as in Azure, so scripts that name them work).
var (
	Owner       = Role{ID: "8e3af657-a8ff-443c-a75c-2fe8c4bcb635", Name: "Owner", Actions: []string{"*"}}
	Contributor = Role{
		ID: "b24988ac-6180-42a0-ab88-20f7382dd24c", Name: "Contributor", Actions: []string{"*"},
		NotActions: []string{"Microsoft.Authorization/*/Delete", "Microsoft.Authorization/*/Write", "Microsoft.KeyVault/vaults/accessPolicies/write", "Keyfleet/*"},
	}
	Reader                  = Role{ID: "acdd72a7-3385-48ef-bd42-f606fba81ae7", Name: "Reader", Actions: []string{"*/read"}}
	ManagedIdentityOperator = Role{
		ID: "f1a07417-d97a-45cb-824c-7a7467783830", Name: "Managed Identity Operator",
		Actions: []string{"Microsoft.ManagedIdentity/userAssignedIdentities/*/read", "Microsoft.ManagedIdentity/userAssignedIdentities/*/assign/action", "Microsoft.Authorization/*/read"},
	}
)

// Roles lists the built-in roles.
func Roles() []Role { return []Role{Owner, Contributor, Reader, ManagedIdentityOperator} }

// Allows reports whether the role allows the action.
func (r Role) Allows(action string) bool {
	return matchAny(r.Actions, action) && !matchAny(r.NotActions, action)
}

func matchAny(patterns []string, action string) bool {
	for _, p := range patterns {
		if match(strings.ToLower(p), strings.ToLower(action)) {
			return true
		}
	}
	return false
}

// match reports whether s fits pattern, where each * stands for any run of characters.
func match(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	if !strings.HasPrefix(s, parts[0]) {
		return false
	}
	s = s[len(parts[0]):]
	for _, p := range parts[1 : len(parts)-1] {
		i := strings.Index(s, p)
		if i < 0 {
			return false
		}
		s = s[i+len(p):]
	}
	return strings.HasSuffix(s, parts[len(parts)-1])
}

// Assignment gives a principal a role at a scope.
type Assignment struct {
	Name          string `json:"name"`      // GUID
	Scope         string `json:"scope"`     // ARM id, the caller's casing; "/" is everything
	Principal     string `json:"principal"` // object id
	PrincipalType string `json:"principalType,omitempty"`
	RoleID        string `json:"roleId"`
	CreatedBy     string `json:"createdBy,omitempty"`
}

// Assignments is the collection of role assignments; ids are "PRINCIPAL/NAME".
var Assignments = store.NewCollection[Assignment, struct{}]("roleassignments")

// byRole decides by role assignments at the resource or above it.
func (g *Gate) byRole(ctx context.Context, p Principal, op Op) error {
	if p.Kind == Node {
		return denied(p, op)
	}
	list, err := Assignments.List(g.cfg.Store.View(ctx), strings.ToLower(p.ObjectID)+"/")
	if err != nil {
		return fault.New(fault.Unavailable, "", "Access cannot be decided now.").Because(err)
	}
	for _, a := range list {
		if !covers(a.Spec.Scope, op.Resource) {
			continue
		}
		for _, r := range Roles() {
			if r.ID == a.Spec.RoleID && r.Allows(op.Action) {
				return nil
			}
		}
	}
	return denied(p, op)
}

// covers reports whether the scope is the resource or above it.
func covers(scope, resource string) bool {
	scope, resource = strings.ToLower(strings.TrimRight(scope, "/")), strings.ToLower(strings.TrimRight(resource, "/"))
	return scope == "" || scope == resource || strings.HasPrefix(resource, scope+"/")
}

func denied(p Principal, op Op) error {
	return fault.New(fault.Denied, "AuthorizationFailed",
		"The client '%s' with object id '%s' does not have authorization to perform action '%s' over scope '%s'.",
		p.ClientID, p.ObjectID, op.Action, op.Resource).
		WithFix("keyfleet role assign --object-id %s --role Contributor --scope %s", p.ObjectID, op.Resource)
}
