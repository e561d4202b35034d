package resources

import (
	"net/http"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Role assignments and definitions are extension resources: the router gives
// what stands before /providers/Microsoft.Authorization/ as the parameter
// "scope", and routes the rest under "/-".
func (s surface) authorizationRoutes() []azureapi.Route {
	const (
		assignments = "/-/providers/microsoft.authorization/roleassignments"
		definitions = "/-/providers/microsoft.authorization/roledefinitions"
		read        = "Microsoft.Authorization/roleAssignments/read"
		readRole    = "Microsoft.Authorization/roleDefinitions/read"
	)
	return []azureapi.Route{
		row(http.MethodGet, assignments, authorizationVersions, read, s.listAssignments),
		row(http.MethodGet, assignments+"/{name}", authorizationVersions, read, s.getAssignment),
		row(http.MethodPut, assignments+"/{name}", authorizationVersions, "Microsoft.Authorization/roleAssignments/write", s.putAssignment),
		row(http.MethodDelete, assignments+"/{name}", authorizationVersions, "Microsoft.Authorization/roleAssignments/delete", s.deleteAssignment),
		row(http.MethodGet, definitions, authorizationVersions, readRole, s.listDefinitions),
		row(http.MethodGet, definitions+"/{name}", authorizationVersions, readRole, s.getDefinition),
	}
}

type assignment = store.Object[access.Assignment, struct{}]

// armTime is the form of times in ARM bodies.
const armTime = "2006-01-02T15:04:05.0000000Z"

func toAssignment(o *assignment) arm.RoleAssignment {
	stamp := func(t time.Time) string { return t.UTC().Format(armTime) }
	return arm.RoleAssignment{
		ID:   strings.TrimRight(o.Spec.Scope, "/") + "/providers/Microsoft.Authorization/roleAssignments/" + o.Spec.Name,
		Name: o.Spec.Name, Type: "Microsoft.Authorization/roleAssignments",
		Properties: arm.RoleAssignmentProperties{
			RoleDefinitionID: definitionID(o.Spec.Scope, o.Spec.RoleID), PrincipalID: o.Spec.Principal, PrincipalType: o.Spec.PrincipalType,
			Scope: o.Spec.Scope, CreatedOn: stamp(o.Created), UpdatedOn: stamp(o.Changed), CreatedBy: o.Spec.CreatedBy, UpdatedBy: o.Spec.CreatedBy,
		},
	}
}

// definitionID is the id of a role as Azure writes it: under the scope's
// subscription, or under none.
func definitionID(scope, role string) string {
	prefix := ""
	if id, err := arm.ParseID(scope); err == nil {
		prefix = "/subscriptions/" + id.Subscription
	}
	return prefix + "/providers/Microsoft.Authorization/roleDefinitions/" + role
}

// scopeOf checks the scope of an extension resource's path and gives its fixed words their casing.
func scopeOf(r *azureapi.Request) (string, error) {
	scope := r.Param("scope")
	if strings.Trim(scope, "/") == "" {
		return "/", nil
	}
	id, err := arm.ParseID(scope)
	if err != nil {
		return "", notAScope(scope)
	}
	return id.String(), nil
}

func notAScope(scope string) error {
	return fault.New(fault.Invalid, "InvalidScope", "'%.300s' is not a scope of this server.", scope).
		WithFix("use /, /subscriptions/ID, /subscriptions/ID/resourceGroups/GROUP or a resource id")
}

func (s surface) listAssignments(r *azureapi.Request) (*azureapi.Reply, error) {
	scope, err := scopeOf(r)
	if err != nil {
		return nil, err
	}
	f, err := assignmentFilter(r.Query("$filter"))
	if err != nil {
		return nil, err
	}
	all, err := s.Gate.ListAssignments(r.Context(), scope, f)
	if err != nil {
		return nil, err
	}
	return list(all, toAssignment), nil
}

// assignmentFilter parses the filters that clients send: atScope(),
// principalId eq 'ID', assignedTo('ID'), and two of them joined by and.
func assignmentFilter(s string) (access.AssignmentFilter, error) {
	var f access.AssignmentFilter
	for _, term := range strings.Split(s, " and ") {
		term = strings.TrimSpace(term)
		id, ok := between(term, "principalId eq '", "'")
		if !ok {
			id, ok = between(term, "assignedTo('", "')")
		}
		switch {
		case term == "" && s == "":
		case strings.EqualFold(term, "atScope()"):
			f.AtScope = true
		case ok && f.Principal == "":
			f.Principal = id
		default:
			return f, fault.New(fault.Invalid, "InvalidFilterInQueryString", "The filter is not supported at '%.80s'.", term).At("$filter").
				WithFix("use atScope(), principalId eq 'ID' or assignedTo('ID')")
		}
	}
	if f.Principal != "" && !arm.IsGUID(f.Principal) {
		return f, fault.New(fault.Invalid, "InvalidFilterInQueryString", "'%.64s' is not an object id (a GUID).", f.Principal).At("$filter")
	}
	return f, nil
}

// between returns what stands between prefix and suffix, compared without
// regard to case; ok is false if they do not surround at least one character.
func between(s, prefix, suffix string) (string, bool) {
	end := len(s) - len(suffix)
	if end <= len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) || s[end:] != suffix {
		return "", false
	}
	return s[len(prefix):end], true
}

func (s surface) getAssignment(r *azureapi.Request) (*azureapi.Reply, error) {
	scope, err := scopeOf(r)
	if err != nil {
		return nil, err
	}
	o, err := s.Gate.Assignment(r.Context(), scope, r.Param("name"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(toAssignment(o)), nil
}

func (s surface) putAssignment(r *azureapi.Request) (*azureapi.Reply, error) {
	scope, err := scopeOf(r)
	if err != nil {
		return nil, err
	}
	var body arm.RoleAssignment
	if err := r.DecodeLoose(&body); err != nil {
		return nil, err
	}
	p := body.Properties
	if p.Condition != "" {
		return nil, fault.New(fault.Invalid, "ConditionNotSupported", "Conditions on role assignments are not supported.").At("properties.condition").
			WithFix("leave the condition out, or assign at a narrower scope")
	}
	if p.PrincipalType == "" {
		p.PrincipalType = "ServicePrincipal"
	}
	o, isNew, err := s.Gate.Assign(r.Context(), access.Assignment{
		Name: r.Param("name"), Scope: scope, Principal: p.PrincipalID, PrincipalType: p.PrincipalType,
		RoleID: strings.ToLower(p.RoleDefinitionID[strings.LastIndexByte(p.RoleDefinitionID, '/')+1:]),
	})
	if err != nil {
		return nil, err
	}
	return created(isNew, toAssignment(o)), nil
}

func (s surface) deleteAssignment(r *azureapi.Request) (*azureapi.Reply, error) {
	scope, err := scopeOf(r)
	if err != nil {
		return nil, err
	}
	o, err := s.Gate.Unassign(r.Context(), scope, r.Param("name"))
	if err != nil {
		return nil, err
	}
	if o == nil {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.OK(toAssignment(o)), nil
}

func toDefinition(scope string) func(access.Role) arm.RoleDefinition {
	return func(role access.Role) arm.RoleDefinition {
		none := []string{}
		return arm.RoleDefinition{
			ID: definitionID(scope, role.ID), Name: role.ID, Type: "Microsoft.Authorization/roleDefinitions",
			Properties: arm.RoleDefinitionProperties{
				RoleName: role.Name, Type: "BuiltInRole", Description: role.Description, AssignableScopes: []string{"/"},
				Permissions: []arm.RolePermission{{Actions: role.Actions, NotActions: append(none, role.NotActions...), DataActions: none, NotDataActions: none}},
			},
		}
	}
}

func (s surface) listDefinitions(r *azureapi.Request) (*azureapi.Reply, error) {
	scope, err := scopeOf(r)
	if err != nil {
		return nil, err
	}
	name, err := definitionFilter(r.Query("$filter"))
	if err != nil {
		return nil, err
	}
	roles, err := s.Gate.RoleDefinitions(r.Context(), scope)
	if err != nil {
		return nil, err
	}
	fit := make([]access.Role, 0, len(roles))
	for _, role := range roles {
		if name == "" || strings.EqualFold(role.Name, name) {
			fit = append(fit, role)
		}
	}
	return list(fit, toDefinition(scope)), nil
}

// definitionFilter returns the role name that a filter asks for. All roles are
// built in and assignable everywhere, so the other known filters take all.
func definitionFilter(s string) (string, error) {
	name := ""
	for _, term := range strings.Split(s, " and ") {
		term = strings.TrimSpace(term)
		role, ok := between(term, "roleName eq '", "'")
		switch {
		case term == "" && s == "", strings.EqualFold(term, "atScopeAndBelow()"), strings.EqualFold(term, "type eq 'BuiltInRole'"):
		case ok && name == "":
			name = role
		default:
			return "", fault.New(fault.Invalid, "InvalidFilterInQueryString", "The filter is not supported at '%.80s'.", term).At("$filter").
				WithFix("use roleName eq 'NAME', type eq 'BuiltInRole' or atScopeAndBelow()")
		}
	}
	return name, nil
}

func (s surface) getDefinition(r *azureapi.Request) (*azureapi.Reply, error) {
	scope, err := scopeOf(r)
	if err != nil {
		return nil, err
	}
	if _, err := s.Gate.RoleDefinitions(r.Context(), scope); err != nil {
		return nil, err
	}
	role, ok := access.RoleByID(r.Param("name"))
	if !ok {
		return nil, fault.New(fault.NotFound, "RoleDefinitionDoesNotExist", "The specified role definition with ID '%.64s' does not exist.", r.Param("name"))
	}
	return azureapi.OK(toDefinition(scope)(role)), nil
}
