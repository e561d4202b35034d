package vault

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Actions of the management plane.
const (
	actionRead         = "Microsoft.KeyVault/vaults/read"
	actionWrite        = "Microsoft.KeyVault/vaults/write"
	actionDelete       = "Microsoft.KeyVault/vaults/delete"
	actionPolicies     = "Microsoft.KeyVault/vaults/accessPolicies/write"
	actionReadDeleted  = "Microsoft.KeyVault/deletedVaults/read"
	actionPurgeDeleted = "Microsoft.KeyVault/locations/deletedVaults/purge/action"
)

// VaultSpec is what a PUT or PATCH asks for. A nil field was not sent.
type VaultSpec struct {
	Location                     *string
	Tags                         map[string]string // nil: not sent
	Tenant                       *string
	SKU                          *string
	Policies                     *[]access.Policy
	EnabledForDeployment         *bool
	EnabledForDiskEncryption     *bool
	EnabledForTemplateDeployment *bool
	RetentionDays                *int
	PurgeProtection              *bool
	SoftDelete                   *bool
	RBAC                         *bool // access by role assignments, which Keyfleet does not offer
	Recover                      bool  // createMode "recover": bring the deleted vault back
}

// PutVault creates a vault or changes it, or recovers it. created tells which.
func (v *Vaults) PutVault(ctx context.Context, id arm.ID, spec VaultSpec) (vt Vault, created bool, err error) {
	if err := spec.check(); err != nil {
		return Vault{}, false, err
	}
	if err := CheckName(id.Name()); err != nil {
		return Vault{}, false, err
	}
	may := v.gate.Can(ctx, access.Op{Action: actionPolicies, Resource: id.String()}) == nil
	err = v.gate.Change(ctx, v.store, access.Op{Action: actionWrite, Resource: id.String(), Detail: spec.detail()}, func(tx *store.Tx) error {
		obj, err := vaults.Lookup(tx, lower(id.Name()))
		if err != nil {
			return err
		}
		if v.cfg.Require != nil && (obj == nil || obj.Spec.Deleted != nil) {
			if err := v.cfg.Require(tx, id.Subscription, id.ResourceGroup); err != nil {
				return err
			}
		}
		switch created = obj == nil; {
		case obj == nil && spec.Recover:
			return fault.New(fault.NotFound, "DeletedVaultNotFound", "There is no deleted vault '%s' to recover.", id.Name())
		case obj == nil:
			obj = newVault(id)
		default:
			if err := takeOver(obj, id, spec.Recover); err != nil {
				return err
			}
		}
		old := obj.Spec.Policies
		if err := spec.apply(&obj.Spec, created, v.cfg.Tenant); err != nil {
			return err
		}
		if !may {
			if err := within(ctx, old, obj.Spec.Policies, id); err != nil {
				return err
			}
		}
		vt = obj.Spec
		if created {
			return vaults.Insert(tx, obj)
		}
		return vaults.Put(tx, obj)
	})
	return vt, created, err
}

// PatchVault changes a vault that exists.
func (v *Vaults) PatchVault(ctx context.Context, id arm.ID, spec VaultSpec) (Vault, error) {
	if err := spec.check(); err != nil {
		return Vault{}, err
	}
	return v.edit(ctx, id, spec.detail(), func(vt *Vault) error { return spec.apply(vt, false, v.cfg.Tenant) })
}

// ChangePolicies adds, replaces or removes access policies. The principal needs
// the action accessPolicies/write, or what it gives away.
func (v *Vaults) ChangePolicies(ctx context.Context, id arm.ID, kind PolicyChange, change []access.Policy) (Vault, error) {
	change, err := normalPolicies(change)
	if err != nil {
		return Vault{}, err
	}
	return v.edit(ctx, id, string(kind)+" "+describe(change), func(vt *Vault) error {
		vt.Policies = combine(vt.Policies, change, kind)
		if len(vt.Policies) > maxPolicies {
			return fault.New(fault.Invalid, "BadRequest", "A vault has at most %d access policies.", maxPolicies).At("properties.accessPolicies")
		}
		return nil
	})
}

// edit changes a vault in use, under the rule that a grant never exceeds the granter.
func (v *Vaults) edit(ctx context.Context, id arm.ID, detail string, fn func(*Vault) error) (vt Vault, err error) {
	may := v.gate.Can(ctx, access.Op{Action: actionPolicies, Resource: id.String()}) == nil
	err = v.gate.Change(ctx, v.store, access.Op{Action: actionWrite, Resource: id.String(), Detail: detail}, func(tx *store.Tx) error {
		obj, err := lookupVault(tx, id)
		if err != nil {
			return err
		}
		old := obj.Spec.Policies
		if err := fn(&obj.Spec); err != nil {
			return err
		}
		if !may {
			if err := within(ctx, old, obj.Spec.Policies, id); err != nil {
				return err
			}
		}
		vt = obj.Spec
		return vaults.Put(tx, obj)
	})
	return vt, err
}

// Vault returns a vault in use.
func (v *Vaults) Vault(ctx context.Context, id arm.ID) (Vault, error) {
	if err := v.gate.Read(ctx, access.Op{Action: actionRead, Resource: id.String()}); err != nil {
		return Vault{}, err
	}
	obj, err := lookupVault(v.store.View(ctx), id)
	if err != nil {
		return Vault{}, err
	}
	return obj.Spec, nil
}

// Vaults lists the vaults in use of a subscription, or of one of its resource groups, by name.
func (v *Vaults) Vaults(ctx context.Context, subscription, group string) ([]Vault, error) {
	scope := arm.ID{Subscription: subscription, ResourceGroup: group}
	if err := v.gate.Read(ctx, access.Op{Action: actionRead, Resource: scope.String()}); err != nil {
		return nil, err
	}
	return v.list(ctx, func(vt *Vault) bool {
		sub, grp := vt.scope()
		return vt.Deleted == nil && strings.EqualFold(sub, subscription) && (group == "" || strings.EqualFold(grp, group))
	})
}

// DeleteVault deletes a vault softly: its name stays taken and it can be
// recovered until its retention ends. An absent vault is no error; found tells.
func (v *Vaults) DeleteVault(ctx context.Context, id arm.ID) (found bool, err error) {
	err = v.gate.Change(ctx, v.store, access.Op{Action: actionDelete, Resource: id.String()}, func(tx *store.Tx) error {
		obj, err := lookupVault(tx, id)
		if fault.KindOf(err) == fault.NotFound {
			found = false
			return nil
		}
		if err != nil {
			return err
		}
		found = true
		obj.Spec.Deleted = obj.Spec.deletion(v.now())
		return vaults.Put(tx, obj)
	})
	return found, err
}

// DeletedVaults lists the deleted vaults of a subscription.
func (v *Vaults) DeletedVaults(ctx context.Context, subscription string) ([]Vault, error) {
	scope := arm.ID{Subscription: subscription}
	if err := v.gate.Read(ctx, access.Op{Action: actionReadDeleted, Resource: scope.String()}); err != nil {
		return nil, err
	}
	return v.list(ctx, func(vt *Vault) bool {
		sub, _ := vt.scope()
		return vt.Deleted != nil && strings.EqualFold(sub, subscription)
	})
}

// DeletedVault returns a deleted vault of a subscription and location.
func (v *Vaults) DeletedVault(ctx context.Context, subscription, location, name string) (Vault, error) {
	scope := arm.ID{Subscription: subscription}
	if err := v.gate.Read(ctx, access.Op{Action: actionReadDeleted, Resource: scope.String()}); err != nil {
		return Vault{}, err
	}
	obj, err := lookupDeleted(v.store.View(ctx), subscription, location, name)
	if err != nil {
		return Vault{}, err
	}
	return obj.Spec, nil
}

// PurgeVault removes a deleted vault and everything in it for good. The work
// goes on after the call; the name is free when it is done.
func (v *Vaults) PurgeVault(ctx context.Context, subscription, location, name string) error {
	scope := arm.ID{Subscription: subscription}
	return v.gate.Change(ctx, v.store, access.Op{Action: actionPurgeDeleted, Resource: scope.String(), Detail: name}, func(tx *store.Tx) error {
		obj, err := lookupDeleted(tx, subscription, location, name)
		if err != nil {
			return err
		}
		if obj.Spec.PurgeProtection {
			return fault.New(fault.Denied, "OperationNotAllowed", "The vault '%s' has purge protection; it goes by itself on %s.", obj.Spec.Name, obj.Spec.Deleted.PurgeAt.Format("2006-01-02"))
		}
		return vaults.Delete(tx, obj.ID)
	})
}

// PurgeDone reports whether nothing of a vault that was purged is left.
func (v *Vaults) PurgeDone(ctx context.Context, subscription, name string) (bool, error) {
	scope := arm.ID{Subscription: subscription}
	if err := v.gate.Read(ctx, access.Op{Action: actionReadDeleted, Resource: scope.String()}); err != nil {
		return false, err
	}
	obj, err := vaults.Lookup(v.store.View(ctx), lower(name))
	return obj == nil || obj.Deleting.IsZero(), err
}

// NameAvailable reports whether a new vault can have the name, and why not.
func (v *Vaults) NameAvailable(ctx context.Context, subscription, name string) (reason error, err error) {
	scope := arm.ID{Subscription: subscription}
	if err := v.gate.Read(ctx, access.Op{Action: "Microsoft.KeyVault/checkNameAvailability/read", Resource: scope.String()}); err != nil {
		return nil, err
	}
	if err := CheckName(name); err != nil {
		return err, nil
	}
	obj, err := vaults.Lookup(v.store.View(ctx), lower(name))
	if err != nil || obj == nil {
		return nil, err
	}
	return taken(name), nil
}

func (v *Vaults) list(ctx context.Context, keep func(*Vault) bool) ([]Vault, error) {
	objs, err := vaults.List(v.store.View(ctx), "")
	if err != nil {
		return nil, err
	}
	var out []Vault
	for _, o := range objs {
		if o.Deleting.IsZero() && keep(&o.Spec) {
			out = append(out, o.Spec)
		}
	}
	return out, nil
}

// newVault is a vault with nothing said about it. The finalizer is there from
// the start: the name must not come free while something of the vault is left.
func newVault(id arm.ID) *vaultObject {
	obj := &vaultObject{Spec: Vault{
		Name: id.Name(), ResourceID: id.String(), SKU: "standard", RetentionDays: defaultRetention,
	}}
	obj.ID, obj.Finalizers = lower(id.Name()), []string{vaultController}
	return obj
}

// takeOver checks that a PUT of id may change the vault that has its name.
func takeOver(obj *vaultObject, id arm.ID, recovering bool) error {
	same := strings.EqualFold(obj.Spec.ResourceID, id.String())
	switch {
	case !obj.Deleting.IsZero():
		return fault.New(fault.Conflict, "ConflictError", "The vault '%s' is being purged.", obj.Spec.Name).WithFix("try again in a moment")
	case !same:
		return taken(obj.Spec.Name)
	case obj.Spec.Deleted != nil && !recovering:
		return fault.New(fault.Conflict, "ConflictError", "A vault with the name '%s' exists in deleted state.", obj.Spec.Name).
			WithFix("recover it with createMode \"recover\" (keyfleet vault recover %s), or purge it", obj.Spec.Name)
	}
	obj.Spec.Deleted = nil
	return nil
}

func taken(name string) error {
	return fault.New(fault.Conflict, "VaultAlreadyExists", "The vault name '%s' is already in use. Names of vaults are unique in the whole deployment, deleted vaults included.", name).
		WithFix("choose another name")
}

// lookupVault finds a vault in use by its resource id.
func lookupVault(tx *store.Tx, id arm.ID) (*vaultObject, error) {
	obj, err := vaults.Lookup(tx, lower(id.Name()))
	if err != nil {
		return nil, err
	}
	if obj == nil || obj.Spec.Deleted != nil || !obj.Deleting.IsZero() || !strings.EqualFold(obj.Spec.ResourceID, id.String()) {
		return nil, fault.New(fault.NotFound, "ResourceNotFound", "The Resource '%s/%s' under resource group '%s' was not found.", ResourceType, id.Name(), id.ResourceGroup)
	}
	return obj, nil
}

func lookupDeleted(tx *store.Tx, subscription, location, name string) (*vaultObject, error) {
	obj, err := vaults.Lookup(tx, lower(name))
	if err != nil {
		return nil, err
	}
	if obj != nil && obj.Spec.Deleted != nil && obj.Deleting.IsZero() {
		if sub, _ := obj.Spec.scope(); strings.EqualFold(sub, subscription) && sameLocation(obj.Spec.Location, location) {
			return obj, nil
		}
	}
	return nil, fault.New(fault.NotFound, "DeletedVaultNotFound", "There is no deleted vault '%s' in location '%s'.", name, location)
}

// sameLocation compares locations as Azure does: "East US" is "eastus".
func sameLocation(a, b string) bool {
	plain := func(s string) string { return lower(strings.ReplaceAll(s, " ", "")) }
	return plain(a) == plain(b)
}

// within checks that every permission that is given by the change is held by the caller already.
func within(ctx context.Context, old, new []access.Policy, id arm.ID) error {
	call, _ := access.From(ctx)
	if call.Principal.Kind == access.System {
		return nil
	}
	for _, perm := range added(old, new) {
		if !held(call.Principal, old, perm) {
			return fault.New(fault.Denied, "AuthorizationFailed",
				"The client '%s' with object id '%s' may not give the permission '%s' on the vault '%s': it neither holds it there nor may perform the action '%s'.",
				call.Principal.ClientID, call.Principal.ObjectID, perm, id.Name(), actionPolicies).At("properties.accessPolicies").
				WithFix("az role assignment create --role Owner --assignee-object-id %s --assignee-principal-type ServicePrincipal --scope %s", call.Principal.ObjectID, id.String())
		}
	}
	return nil
}

// check refuses what no vault can have, whatever is there already.
func (s *VaultSpec) check() error {
	switch {
	case s.RBAC != nil && *s.RBAC:
		return fault.New(fault.Invalid, "BadRequest", "Vaults with access by role assignments are not offered: access is decided by access policies.").
			At("properties.enableRbacAuthorization").WithFix("send enableRbacAuthorization false (az keyvault create --enable-rbac-authorization false) and set access policies")
	case s.SoftDelete != nil && !*s.SoftDelete:
		return fault.New(fault.Invalid, "BadRequest", "Soft delete cannot be switched off.").At("properties.enableSoftDelete").WithFix("leave enableSoftDelete out, or send true")
	case s.SKU != nil && !slices.Contains([]string{"standard", "premium"}, lower(*s.SKU)):
		return fault.New(fault.Invalid, "BadRequest", "There is no SKU '%s'.", *s.SKU).At("properties.sku.name").WithFix("use standard")
	case s.RetentionDays != nil && (*s.RetentionDays < minRetention || *s.RetentionDays > maxRetention):
		return fault.New(fault.Invalid, "BadRequest", "The retention of deleted things is %d to %d days; %d was asked for.", minRetention, maxRetention, *s.RetentionDays).
			At("properties.softDeleteRetentionInDays")
	case len(s.Tags) > maxVaultTags:
		return fault.New(fault.Invalid, "InvalidTags", "A vault has at most %d tags; these are %d.", maxVaultTags, len(s.Tags)).At("tags")
	}
	for k, val := range s.Tags {
		if len(k) > maxTagLength || len(val) > maxTagLength {
			return fault.New(fault.Invalid, "InvalidTags", "A tag's name and value have at most %d characters.", maxTagLength).At("tags." + k)
		}
	}
	if s.Policies != nil {
		clean, err := normalPolicies(*s.Policies)
		if err != nil {
			return err
		}
		s.Policies = &clean
	}
	return nil
}

// apply lays what was sent over the vault. tenant is that of the subscription; empty: not checked.
func (s *VaultSpec) apply(vt *Vault, created bool, tenant string) error {
	if err := s.applyFixed(vt, created, tenant); err != nil {
		return err
	}
	set(&vt.EnabledForDeployment, s.EnabledForDeployment)
	set(&vt.EnabledForDiskEncryption, s.EnabledForDiskEncryption)
	set(&vt.EnabledForTemplateDeployment, s.EnabledForTemplateDeployment)
	if s.SKU != nil {
		vt.SKU = lower(*s.SKU)
	}
	if s.Tags != nil {
		vt.Tags = maps.Clone(s.Tags)
	}
	if s.Policies != nil {
		vt.Policies = *s.Policies
	}
	for _, p := range vt.Policies {
		if !strings.EqualFold(p.Tenant, vt.Tenant) {
			return fault.New(fault.Invalid, "BadRequest", "The access policy of '%s' is for tenant '%s'; the vault belongs to tenant '%s'.", p.ObjectID, p.Tenant, vt.Tenant).
				At("properties.accessPolicies.tenantId")
		}
	}
	return nil
}

// applyFixed sets what a vault gets once and keeps.
func (s *VaultSpec) applyFixed(vt *Vault, created bool, tenant string) error {
	if s.Location != nil {
		if !created && !sameLocation(vt.Location, *s.Location) {
			return fault.New(fault.Conflict, "InvalidResourceLocation", "The vault '%s' exists in location '%s' and cannot move to '%s'.", vt.Name, vt.Location, *s.Location).At("location")
		}
		if created {
			vt.Location = *s.Location
		}
	}
	if created && vt.Location == "" {
		return fault.New(fault.Invalid, "LocationRequired", "The location property is required for this definition.").At("location")
	}
	if s.Tenant != nil {
		vt.Tenant = lower(*s.Tenant)
	}
	switch {
	case vt.Tenant == "" && tenant == "":
		return fault.New(fault.Invalid, "BadRequest", "A vault belongs to a tenant: tenantId is missing.").At("properties.tenantId")
	case vt.Tenant == "":
		vt.Tenant = lower(tenant)
	case tenant != "" && !strings.EqualFold(vt.Tenant, tenant):
		return fault.New(fault.Invalid, "BadRequest", "The tenant '%s' is not that of the subscription, '%s'.", vt.Tenant, tenant).At("properties.tenantId")
	}
	if s.RetentionDays != nil {
		if !created && *s.RetentionDays != vt.RetentionDays {
			return fault.New(fault.Invalid, "BadRequest", "softDeleteRetentionInDays is %d for this vault and can't be modified.", vt.RetentionDays).At("properties.softDeleteRetentionInDays")
		}
		vt.RetentionDays = *s.RetentionDays
	}
	if s.PurgeProtection != nil {
		if !*s.PurgeProtection && vt.PurgeProtection {
			return fault.New(fault.Invalid, "BadRequest", "Purge protection cannot be switched off once it is on.").At("properties.enablePurgeProtection")
		}
		vt.PurgeProtection = *s.PurgeProtection
	}
	return nil
}

func set[T any](field *T, value *T) {
	if value != nil {
		*field = *value
	}
}

// detail says in the audit record who is given what.
func (s *VaultSpec) detail() string {
	if s.Policies == nil {
		return ""
	}
	return "access policies: " + describe(*s.Policies)
}

func describe(policies []access.Policy) string {
	var b strings.Builder
	for i, p := range policies {
		if i == 16 {
			fmt.Fprintf(&b, "and %d more", len(policies)-i)
			break
		}
		fmt.Fprintf(&b, "%s secrets=%s certificates=%s; ", p.ObjectID, strings.Join(p.Secrets, ","), strings.Join(p.Certificates, ","))
	}
	return strings.TrimSuffix(b.String(), "; ")
}

// Named returns the vault in use that has the name. It decides nothing about
// access: for capabilities that resolve what their own resources refer to.
func (v *Vaults) Named(ctx context.Context, name string) (Vault, error) {
	obj, err := vaults.Lookup(v.store.View(ctx), lower(name))
	if err != nil {
		return Vault{}, err
	}
	if obj == nil || obj.Spec.Deleted != nil || !obj.Deleting.IsZero() {
		return Vault{}, fault.New(fault.NotFound, "VaultNotFound", "The vault '%s' does not exist.", name).WithFix("keyfleet vault create %s", name)
	}
	return obj.Spec, nil
}
