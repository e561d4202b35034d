package access

import (
	"context"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

func faultMessage(err error) string { return fault.From(err).Message }

// decide is the decision. System principals may do what controllers do; nodes
// are decided by package nodeapi, which only ever serves a node its own items.
func (g *Gate) decide(ctx context.Context, p Principal, op Op) error {
	switch {
	case p.ObjectID == "":
		return fault.New(fault.Unauthenticated, "AuthenticationFailed", "Authentication failed: the request has no valid credential.")
	case p.Kind == System:
		return nil
	case op.Policies != nil:
		return byPolicy(p, op)
	}
	return g.byRole(ctx, p, op)
}

// byPolicy decides by a vault's access policies (Key Vault, access policy mode).
func byPolicy(p Principal, op Op) error {
	kind, verb, _ := strings.Cut(op.Action, "/")
	for _, pol := range op.Policies {
		if !strings.EqualFold(pol.ObjectID, p.ObjectID) || !strings.EqualFold(pol.Tenant, p.Tenant) {
			continue
		}
		if pol.ClientID != "" && !strings.EqualFold(pol.ClientID, p.ClientID) {
			continue
		}
		list := map[string][]string{"secrets": pol.Secrets, "certificates": pol.Certificates, "keys": pol.Keys}[kind]
		if slices.Contains(list, verb) || slices.Contains(list, "all") {
			return nil
		}
	}
	vault, _, _ := strings.Cut(op.Resource, "/")
	return fault.New(fault.Denied, "Forbidden",
		"The user, group or application 'appid=%s;oid=%s' does not have %s %s permission on key vault '%s'.",
		p.ClientID, p.ObjectID, kind, verb, vault).WithInner("AccessDenied").
		WithFix("keyfleet vault set-policy %s --object-id %s --%s-permissions %s", vault, p.ObjectID, strings.TrimSuffix(kind, "s"), verb)
}
