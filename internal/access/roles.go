package access

import (
	"context"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Role is a role definition: what its holder may do under the scope of the assignment.
// Actions are matched case-insensitively; "*" matches any run of characters.
type Role struct {
	ID          string // GUID, as in Azure
	Name        string
	Description string
	Actions     []string
	NotActions  []string
}

// The built-in roles (GUIDs as in Azure, so scripts that name them work).
var (
	Owner = Role{
		ID: "8e3af657-a8ff-443c-a75c-2fe8c4bcb635", Name: "Owner",
		Description: "Everything, role assignments included.",
		Actions:     []string{"*"},
	}
	Contributor = Role{
		ID: "b24988ac-6180-42a0-ab88-20f7382dd24c", Name: "Contributor",
		Description: "Everything but role assignments, the access policies of vaults, and the administration of this server.",
		Actions:     []string{"*"},
		NotActions: []string{
			"Microsoft.Authorization/*/Delete", "Microsoft.Authorization/*/Write", "Microsoft.KeyVault/vaults/accessPolicies/write", "Keyfleet/*",
		},
	}
	Reader = Role{
		ID: "acdd72a7-3385-48ef-bd42-f606fba81ae7", Name: "Reader",
		Description: "Sees all resources and changes none.",
		Actions:     []string{"*/read"},
		NotActions:  []string{"Keyfleet/*"},
	}
	ManagedIdentityOperator = Role{
		ID: "f1a07417-d97a-45cb-824c-7a7467783830", Name: "Managed Identity Operator",
		Description: "Reads managed identities and puts them on pools.",
		// Azure lists the forms with "*/"; its matching takes them for the plain ones too.
		Actions: []string{
			"Microsoft.ManagedIdentity/userAssignedIdentities/read", "Microsoft.ManagedIdentity/userAssignedIdentities/*/read",
			"Microsoft.ManagedIdentity/userAssignedIdentities/assign/action", "Microsoft.ManagedIdentity/userAssignedIdentities/*/assign/action",
			"Microsoft.Authorization/*/read",
		},
	}
	// ClusterManager is Keyfleet's own.
	ClusterManager = Role{
		ID: "4b6579f1-c1a5-4e57-8a11-6d616e616765", Name: "Keyfleet Cluster Manager",
		Description: "Looks after registered Kubernetes clusters: fetches their kubeconfigs and reports what it sees.",
		Actions:     []string{"Keyfleet/clusters/manage/action"},
	}
)

// Roles lists the built-in roles.
func Roles() []Role {
	return []Role{Owner, Contributor, Reader, ManagedIdentityOperator, ClusterManager}
}

// RoleByID returns the built-in role with the GUID, in any casing.
func RoleByID(id string) (Role, bool) {
	for _, r := range Roles() {
		if strings.EqualFold(r.ID, id) {
			return r, true
		}
	}
	return Role{}, false
}

// Includes reports whether r allows whatever other allows. It never says yes
// wrongly; for roles whose patterns overlap in odd ways it may say no where yes
// would do, which only makes a grant impossible that a wider role allows.
func (r Role) Includes(other Role) bool {
	for _, a := range other.Actions {
		if !matchAny(r.Actions, a) { // a's own * is matched only by a * of ours
			return false
		}
	}
	for _, n := range r.NotActions {
		if matchAny(other.NotActions, n) {
			continue // the other does not allow it either
		}
		for _, a := range other.Actions {
			if overlap(strings.ToLower(n), strings.ToLower(a)) {
				return false
			}
		}
	}
	return true
}

// overlap reports whether some string fits both patterns.
func overlap(p, q string) bool {
	// at[j]: the part of p read so far and q[:j] can be the same string.
	at := make([]bool, len(q)+1)
	at[0] = true
	for j := 1; j <= len(q) && q[j-1] == '*'; j++ {
		at[j] = true
	}
	for i := 0; i < len(p); i++ {
		next := make([]bool, len(q)+1)
		next[0] = p[i] == '*' && at[0]
		for j := 1; j <= len(q); j++ {
			switch {
			case p[i] == '*':
				next[j] = at[j] || next[j-1]
			case q[j-1] == '*':
				next[j] = at[j] || next[j-1]
			default:
				next[j] = at[j-1] && p[i] == q[j-1]
			}
		}
		at = next
	}
	return at[len(q)]
}

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

// byRole decides by role assignments at the resource or above it.
func (g *Gate) byRole(ctx context.Context, p Principal, op Op) error {
	if p.Kind == Node {
		return denied(p, op)
	}
	list, err := Assignments.List(g.cfg.Store.View(ctx), strings.ToLower(p.ObjectID)+"/")
	if err != nil {
		return undecided(err)
	}
	for _, a := range list {
		if !covers(a.Spec.Scope, op.Resource) {
			continue
		}
		if r, ok := RoleByID(a.Spec.RoleID); ok && r.Allows(op.Action) {
			return nil
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
	e := fault.New(fault.Denied, "AuthorizationFailed",
		"The client '%s' with object id '%s' does not have authorization to perform action '%s' over scope '%s'.",
		p.ClientID, p.ObjectID, op.Action, op.Resource)
	roles := Roles()
	for i := range roles { // the narrowest role that would do stands last
		if r := roles[len(roles)-1-i]; r.Allows(op.Action) {
			scope := op.Resource
			if !strings.HasPrefix(scope, "/subscriptions/") {
				scope = "/"
			}
			return e.WithFix("keyfleet role assign --object-id %s --role '%s' --scope %s", p.ObjectID, r.Name, scope)
		}
	}
	return e
}

// undecided is a failure to read what decides: no answer, so no access.
func undecided(err error) error {
	return fault.New(fault.Unavailable, "", "Access cannot be decided now.").Because(err)
}
