package access

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Assignment gives a principal a role at a scope.
type Assignment struct {
	Name          string `json:"name"`      // GUID
	Scope         string `json:"scope"`     // ARM id, the caller's casing; "/" is everything
	Principal     string `json:"principal"` // object id
	PrincipalType string `json:"principalType,omitempty"`
	RoleID        string `json:"roleId"`
	CreatedBy     string `json:"createdBy,omitempty"`
}

// Assignments is the collection of role assignments; ids are "PRINCIPAL/NAME",
// so that a decision reads one short list.
var Assignments = store.NewCollection[Assignment, struct{}]("roleassignments")

// Two indexes stand beside the assignments, written in the same transactions:
// names are unique, and so is the triple of principal, role and scope.
var (
	assignmentNames  = store.NewCollection[assignmentRef, struct{}]("roleassignmentnames")
	assignmentGrants = store.NewCollection[assignmentRef, struct{}]("roleassignmentgrants")
	rootOwners       = store.NewCollection[rootOwnerList, struct{}]("rootowners")
)

type assignmentRef struct {
	ID string `json:"id"` // of the assignment
}

// rootOwnerList names the Owner assignments at "/". It is one object, so that
// two callers who each remove "the last but one" meet in it.
type rootOwnerList struct {
	Assignments []string `json:"assignments"`
}

const (
	actionAssignmentRead   = "Microsoft.Authorization/roleAssignments/read"
	actionAssignmentWrite  = "Microsoft.Authorization/roleAssignments/write"
	actionAssignmentDelete = "Microsoft.Authorization/roleAssignments/delete"
)

// Assign makes a role assignment. The granter needs roleAssignments/write at
// the scope, and an own assignment at or above it whose role allows everything
// that the new one does. The same assignment again is no error (created is
// false); another one under the same name, or the same grant under another
// name, is a fault.Conflict.
func (g *Gate) Assign(ctx context.Context, a Assignment) (out *store.Object[Assignment, struct{}], created bool, err error) {
	role, err := a.check()
	if err != nil {
		return nil, false, err
	}
	c, _ := From(ctx)
	a.CreatedBy = c.Principal.ObjectID
	op := Op{Action: actionAssignmentWrite, Resource: a.Scope, Detail: "role " + role.Name + " for " + a.Principal}
	err = g.Change(ctx, g.cfg.Store, op, func(tx *store.Tx) error {
		out, created, err = g.assign(tx, c.Principal, a, role)
		return err
	})
	return out, created, err
}

func (g *Gate) assign(tx *store.Tx, granter Principal, a Assignment, role Role) (*store.Object[Assignment, struct{}], bool, error) {
	if err := mayGrant(tx, granter, role, a.Scope); err != nil {
		return nil, false, err
	}
	if g.cfg.Principal != nil {
		if err := g.cfg.Principal(tx, a.Principal); err != nil {
			return nil, false, err
		}
	}
	old, err := byName(tx, a.Name)
	if err != nil {
		return nil, false, err
	}
	if old != nil {
		if old.Spec.same(a) {
			return old, false, nil
		}
		return nil, false, fault.New(fault.Conflict, "RoleAssignmentUpdateNotPermitted",
			"The role assignment '%s' exists with another principal, role or scope; these cannot be changed.", a.Name).
			WithFix("delete it first, or use another name")
	}
	out := &store.Object[Assignment, struct{}]{Meta: store.Meta{ID: a.id()}, Spec: a}
	return out, true, insertAssignment(tx, out)
}

// Grant makes an assignment inside a transaction that somebody else decided
// and recorded: the first administrator's.
func Grant(tx *store.Tx, a Assignment) error {
	if _, err := a.check(); err != nil {
		return err
	}
	return insertAssignment(tx, &store.Object[Assignment, struct{}]{Meta: store.Meta{ID: a.id()}, Spec: a})
}

func insertAssignment(tx *store.Tx, o *store.Object[Assignment, struct{}]) error {
	a := o.Spec
	taken, err := assignmentGrants.Lookup(tx, a.grantID())
	if err != nil {
		return err
	}
	if taken != nil {
		_, name, _ := strings.Cut(taken.Spec.ID, "/")
		return fault.New(fault.Conflict, "RoleAssignmentExists", "The role assignment already exists. The ID of the existing role assignment is %s.", name)
	}
	ref := assignmentRef{ID: o.ID}
	if err := assignmentGrants.Insert(tx, &store.Object[assignmentRef, struct{}]{Meta: store.Meta{ID: a.grantID()}, Spec: ref}); err != nil {
		return err
	}
	if err := assignmentNames.Insert(tx, &store.Object[assignmentRef, struct{}]{Meta: store.Meta{ID: strings.ToLower(a.Name)}, Spec: ref}); err != nil {
		return err
	}
	if err := Assignments.Insert(tx, o); err != nil || !a.rootOwner() {
		return err
	}
	return changeRootOwners(tx, func(l []string) []string { return append(l, o.ID) })
}

// Unassign removes the role assignment of the name at the scope. It returns
// what was removed, nil if there was none. The last Owner at "/" cannot be removed.
func (g *Gate) Unassign(ctx context.Context, scope, name string) (old *store.Object[Assignment, struct{}], err error) {
	op := Op{Action: actionAssignmentDelete, Resource: scope, Detail: "assignment " + name}
	err = g.Change(ctx, g.cfg.Store, op, func(tx *store.Tx) error {
		if old, err = atScope(tx, scope, name); err != nil || old == nil {
			return err
		}
		return removeAssignment(tx, old)
	})
	if err != nil {
		return nil, err
	}
	return old, nil
}

// atScope finds an assignment where the caller says it is. One of the same name
// at another scope is none: the decision was made for this scope.
func atScope(tx *store.Tx, scope, name string) (*store.Object[Assignment, struct{}], error) {
	o, err := byName(tx, name)
	if err != nil || o == nil || !strings.EqualFold(strings.TrimRight(o.Spec.Scope, "/"), strings.TrimRight(scope, "/")) {
		return nil, err
	}
	return o, nil
}

func removeAssignment(tx *store.Tx, o *store.Object[Assignment, struct{}]) error {
	if o.Spec.rootOwner() {
		last := false
		err := changeRootOwners(tx, func(l []string) []string {
			l = slices.DeleteFunc(l, func(id string) bool { return id == o.ID })
			last = len(l) == 0
			return l
		})
		if err != nil {
			return err
		}
		if last {
			return fault.New(fault.Conflict, "LastOwner", "This is the last Owner at scope '/'; without it nobody could administer this server.").
				WithFix("give the role Owner at / to another principal first")
		}
	}
	if err := assignmentGrants.Delete(tx, o.Spec.grantID()); err != nil {
		return err
	}
	if err := assignmentNames.Delete(tx, strings.ToLower(o.Spec.Name)); err != nil {
		return err
	}
	return Assignments.Delete(tx, o.ID)
}

func changeRootOwners(tx *store.Tx, change func([]string) []string) error {
	const id = "all"
	o, err := rootOwners.Lookup(tx, id)
	if err != nil {
		return err
	}
	if o == nil {
		o = &store.Object[rootOwnerList, struct{}]{Meta: store.Meta{ID: id}}
		o.Spec.Assignments = change(nil)
		return rootOwners.Insert(tx, o)
	}
	o.Spec.Assignments = change(slices.Clone(o.Spec.Assignments))
	return rootOwners.Put(tx, o)
}

// RemovePrincipal removes every assignment of a principal that ceases to exist,
// in the transaction that removes it. It fails if the last Owner at "/" is among them.
func RemovePrincipal(tx *store.Tx, objectID string) error {
	list, err := Assignments.List(tx, strings.ToLower(objectID)+"/")
	if err != nil {
		return err
	}
	for _, o := range list {
		if err := removeAssignment(tx, o); err != nil {
			return err
		}
	}
	return nil
}

// Assignment returns the role assignment of the name at the scope, or a fault.NotFound.
func (g *Gate) Assignment(ctx context.Context, scope, name string) (*store.Object[Assignment, struct{}], error) {
	if err := g.Read(ctx, Op{Action: actionAssignmentRead, Resource: scope}); err != nil {
		return nil, err
	}
	o, err := atScope(g.cfg.Store.View(ctx), scope, name)
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fault.New(fault.NotFound, "RoleAssignmentNotFound", "The role assignment '%s' is not found.", name)
	}
	return o, nil
}

// AssignmentFilter narrows [Gate.ListAssignments]. The zero value takes all
// that count at, above or below the scope.
type AssignmentFilter struct {
	Principal string // object id; empty: any
	AtScope   bool   // leave out what is below the scope
}

// ListAssignments returns the role assignments at, above and below a scope, by name.
func (g *Gate) ListAssignments(ctx context.Context, scope string, f AssignmentFilter) ([]*store.Object[Assignment, struct{}], error) {
	if err := g.Read(ctx, Op{Action: actionAssignmentRead, Resource: scope}); err != nil {
		return nil, err
	}
	prefix := ""
	if f.Principal != "" {
		prefix = strings.ToLower(f.Principal) + "/"
	}
	list, err := Assignments.List(g.cfg.Store.View(ctx), prefix)
	if err != nil {
		return nil, err
	}
	out := slices.DeleteFunc(list, func(o *store.Object[Assignment, struct{}]) bool {
		return !covers(o.Spec.Scope, scope) && (f.AtScope || !covers(scope, o.Spec.Scope))
	})
	slices.SortFunc(out, func(a, b *store.Object[Assignment, struct{}]) int { return strings.Compare(a.Spec.Name, b.Spec.Name) })
	return out, nil
}

// mayGrant fails unless one assignment of the granter, at or above the scope,
// has a role that includes the granted one. The assignment found is read
// through tx: if it is removed meanwhile, the grant does not commit.
func mayGrant(tx *store.Tx, granter Principal, role Role, scope string) error {
	if granter.Kind == System {
		return nil
	}
	list, err := Assignments.List(tx, strings.ToLower(granter.ObjectID)+"/")
	if err != nil {
		return err
	}
	for _, a := range list {
		held, ok := RoleByID(a.Spec.RoleID)
		if !ok || !covers(a.Spec.Scope, scope) || !held.Allows(actionAssignmentWrite) || !held.Includes(role) {
			continue
		}
		if again, err := Assignments.Lookup(tx, a.ID); err != nil || again != nil {
			return err
		}
	}
	return fault.New(fault.Denied, "AuthorizationFailed",
		"The client '%s' with object id '%s' cannot give the role '%s' at scope '%s': it does not hold all of the role's rights there itself.",
		granter.ClientID, granter.ObjectID, role.Name, scope).
		WithFix("ask an Owner at or above the scope")
}

func byName(tx *store.Tx, name string) (*store.Object[Assignment, struct{}], error) {
	if name == "" {
		return nil, nil
	}
	ref, err := assignmentNames.Lookup(tx, strings.ToLower(name))
	if err != nil || ref == nil {
		return nil, err
	}
	return Assignments.Lookup(tx, ref.Spec.ID)
}

func (a Assignment) check() (Role, error) {
	if !arm.IsGUID(a.Name) {
		return Role{}, fault.New(fault.Invalid, "InvalidRoleAssignmentId", "The role assignment name '%s' is not a GUID.", a.Name).At("name")
	}
	if !arm.IsGUID(a.Principal) {
		return Role{}, fault.New(fault.Invalid, "InvalidPrincipalId", "The principal '%s' is not an object id (a GUID).", a.Principal).At("properties.principalId")
	}
	if a.Scope != "/" && !strings.HasPrefix(strings.ToLower(a.Scope), "/subscriptions/") {
		return Role{}, fault.New(fault.Invalid, "InvalidScope", "The scope '%s' is neither / nor a resource id.", a.Scope).At("properties.scope")
	}
	role, ok := RoleByID(a.RoleID)
	if !ok {
		names := make([]string, 0, 4)
		for _, r := range Roles() {
			names = append(names, r.Name+" ("+r.ID+")")
		}
		return role, fault.New(fault.Invalid, "RoleDefinitionDoesNotExist", "There is no role definition '%s'.", a.RoleID).
			At("properties.roleDefinitionId").WithFix("use one of %s", strings.Join(names, ", "))
	}
	return role, nil
}

func (a Assignment) id() string { return strings.ToLower(a.Principal + "/" + a.Name) }

// grantID is the same for two assignments that give the same thing.
func (a Assignment) grantID() string {
	h := sha256.Sum256([]byte(strings.ToLower(a.Principal + "|" + a.RoleID + "|" + strings.TrimRight(a.Scope, "/"))))
	return hex.EncodeToString(h[:16])
}

func (a Assignment) same(b Assignment) bool {
	return strings.EqualFold(a.Name, b.Name) && a.grantID() == b.grantID()
}

func (a Assignment) rootOwner() bool {
	return strings.TrimRight(a.Scope, "/") == "" && strings.EqualFold(a.RoleID, Owner.ID)
}

// RemoveScope removes every assignment at or below a scope that ceases to
// exist, so that a later resource of the same name does not inherit its grants.
func RemoveScope(tx *store.Tx, scope string) error {
	list, err := Assignments.List(tx, "")
	if err != nil {
		return err
	}
	for _, o := range list {
		if covers(scope, o.Spec.Scope) {
			if err := removeAssignment(tx, o); err != nil {
				return err
			}
		}
	}
	return nil
}

// Reaches reports whether the caller has any role at, above or below the
// scope: whether a listing shows the scope to it at all. It records nothing.
func (g *Gate) Reaches(ctx context.Context, scope string) (bool, error) {
	c, _ := From(ctx)
	if c.Principal.Kind == System {
		return true, nil
	}
	if c.Principal.ObjectID == "" || c.Principal.Kind == Node {
		return false, nil
	}
	list, err := Assignments.List(g.cfg.Store.View(ctx), strings.ToLower(c.Principal.ObjectID)+"/")
	if err != nil {
		return false, undecided(err)
	}
	return slices.ContainsFunc(list, func(a *store.Object[Assignment, struct{}]) bool {
		return covers(a.Spec.Scope, scope) || covers(scope, a.Spec.Scope)
	}), nil
}

// RoleDefinitions returns the built-in roles to a caller who may read role
// definitions at the scope.
func (g *Gate) RoleDefinitions(ctx context.Context, scope string) ([]Role, error) {
	if err := g.Read(ctx, Op{Action: "Microsoft.Authorization/roleDefinitions/read", Resource: scope}); err != nil {
		return nil, err
	}
	return Roles(), nil
}
