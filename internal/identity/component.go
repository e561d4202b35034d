package identity

import (
	"context"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/store"
)

// Component gives a program that the control plane runs itself a login: an
// application of that client id with the role at "/", made if need be, and one fresh
// secret. The secrets that the application had before end, so that a program that
// outlived its server can do nothing any more once its token has expired.
func (s *Service) Component(ctx context.Context, st *store.Store, clientID, name, role string) (Admin, error) {
	secret := newSecret()
	out := Admin{TenantID: s.tenant, ClientID: clientID, Secret: secret}
	ctx = access.AsSystem(ctx, "components")
	op := access.Op{Action: actionApplicationWrite, Resource: "/", Detail: "fresh secret for " + name}
	err := s.cfg.Gate.Change(ctx, st, op, func(tx *store.Tx) error {
		o, err := Applications.Lookup(tx, strings.ToLower(clientID))
		if err != nil {
			return err
		}
		if o != nil {
			out.ObjectID, o.Spec.Secrets = o.Spec.ObjectID, []ClientSecret{secret.stored(s.cfg.Now().UTC(), time.Time{})}
			return Applications.Put(tx, o)
		}
		out.ObjectID = newGUID()
		if _, err := s.insertApplication(tx, NewApplication{Name: name, ClientID: clientID}, out.ObjectID, secret); err != nil {
			return err
		}
		return access.Grant(tx, access.Assignment{
			Name: newGUID(), Scope: "/", Principal: out.ObjectID, PrincipalType: "ServicePrincipal", RoleID: role,
			CreatedBy: access.SystemPrincipal("components").ObjectID,
		})
	})
	if err != nil {
		return Admin{}, fmt.Errorf("making the login of %s: %w", name, err)
	}
	return out, nil
}
