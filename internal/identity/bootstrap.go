package identity

import (
	"context"
	"fmt"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Admin is the first administrator: an application with the role Owner at "/".
type Admin struct {
	TenantID       string
	SubscriptionID string
	ClientID       string
	ObjectID       string
	Secret         Secret
}

// Bootstrap says how the first start is done.
type Bootstrap struct {
	// Keep puts the administrator where its owner finds it (a file), durably,
	// and returns what is there: the one given, or, if an earlier start died
	// after Keep, the one that was kept then.
	Keep func(Admin) (Admin, error)
	// Subscribe makes the default subscription in tx.
	Subscribe func(tx *store.Tx, tenantID, subscriptionID string) error
}

// Bootstrapped is the spec of the record of the first start.
type Bootstrapped struct {
	ClientID       string `json:"clientId"`
	SubscriptionID string `json:"subscriptionId"`
}

// Bootstraps is the collection with that record; its id is "first".
var Bootstraps = store.NewCollection[Bootstrapped, struct{}]("bootstraps")

// Bootstrap makes the first administrator and the default subscription, unless
// an earlier start did, and returns whose they are. The order makes every crash
// harmless:
//
//  1. Make an administrator in memory.
//  2. Keep it. From here on its owner may hold a secret that does not work yet.
//  3. Commit its hash, its role and the subscription in one transaction.
//
// Dying before 3 is repaired by the next start, whose Keep returns what was
// kept. If another server's commit came first, the result names another client
// id than the one kept here: then the kept file is worthless and its owner
// should remove it.
func (s *Service) Bootstrap(ctx context.Context, b Bootstrap) (Bootstrapped, error) {
	const id = "first"
	ctx = access.AsSystem(ctx, "bootstrap")
	done, err := Bootstraps.Lookup(s.cfg.Store.View(ctx), id)
	if err != nil {
		return Bootstrapped{}, fmt.Errorf("looking for the first administrator: %w", err)
	}
	if done != nil {
		return done.Spec, nil
	}
	admin := Admin{TenantID: s.tenant, SubscriptionID: newGUID(), ClientID: newGUID(), ObjectID: newGUID(), Secret: newSecret()}
	err = effect.Do("keep first administrator", func() error { admin, err = b.Keep(admin); return err })
	if err != nil {
		return Bootstrapped{}, fmt.Errorf("keeping the first administrator: %w", err)
	}
	if err := admin.check(s.tenant); err != nil {
		return Bootstrapped{}, err
	}
	result := Bootstrapped{ClientID: admin.ClientID, SubscriptionID: admin.SubscriptionID}
	op := access.Op{Action: "Keyfleet/bootstrap", Resource: "/", Detail: "first administrator " + admin.ClientID}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		old, err := Bootstraps.Lookup(tx, id)
		if err != nil {
			return err
		}
		if old != nil { // another server was faster
			result = old.Spec
			return nil
		}
		if err := Bootstraps.Insert(tx, &store.Object[Bootstrapped, struct{}]{Meta: store.Meta{ID: id}, Spec: result}); err != nil {
			return err
		}
		if err := b.Subscribe(tx, s.tenant, admin.SubscriptionID); err != nil {
			return err
		}
		app := NewApplication{Name: "First administrator", ClientID: admin.ClientID}
		if _, err := s.insertApplication(tx, app, admin.ObjectID, admin.Secret); err != nil {
			return err
		}
		return access.Grant(tx, access.Assignment{
			Name: newGUID(), Scope: "/", Principal: admin.ObjectID, PrincipalType: "ServicePrincipal", RoleID: access.Owner.ID,
			CreatedBy: access.SystemPrincipal("bootstrap").ObjectID,
		})
	})
	if err != nil {
		return Bootstrapped{}, fmt.Errorf("making the first administrator: %w", err)
	}
	return result, nil
}

// check refuses what Keep returned if it is not usable with this store: a file
// that is left over from another one.
func (a Admin) check(tenant string) error {
	_, err := ParseSecret(a.Secret.value)
	if a.TenantID != tenant || err != nil || !arm.IsGUID(a.ClientID) || !arm.IsGUID(a.ObjectID) || !arm.IsGUID(a.SubscriptionID) {
		return fault.New(fault.Conflict, "LeftoverAdministrator", "The administrator that was kept does not belong to this store.").
			WithFix("remove the administrator file of an earlier server from the data folder and start again")
	}
	return nil
}
