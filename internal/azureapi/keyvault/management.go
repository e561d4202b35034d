package keyvault

import (
	"net/http"
	"net/url"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/vault"
)

const provider = "Microsoft.KeyVault"

// vaultID is the resource id that the path names, without what follows the vault.
func vaultID(r *azureapi.Request) arm.ID {
	return arm.ID{
		Subscription: r.Param("subscription"), ResourceGroup: r.Param("group"), Provider: provider, Types: []string{"vaults"}, Names: []string{r.Param("name")},
	}
}

// vaultOf is a vault as clients get it.
func vaultOf(r *azureapi.Request, vt vault.Vault) wire.Vault {
	yes, no, policies := true, false, entries(vt.Policies)
	props := wire.VaultProperties{
		TenantID: &vt.Tenant, SKU: &wire.SKU{Family: "A", Name: vt.SKU}, AccessPolicies: &policies, VaultURI: vaultURL(r, vt.Name) + "/",
		EnabledForDeployment: &vt.EnabledForDeployment, EnabledForDiskEncryption: &vt.EnabledForDiskEncryption,
		EnabledForTemplateDeployment: &vt.EnabledForTemplateDeployment, EnableSoftDelete: &yes, SoftDeleteRetentionInDays: &vt.RetentionDays,
		EnableRbacAuthorization: &no, PublicNetworkAccess: "Enabled", ProvisioningState: "Succeeded",
		NetworkACLs: &wire.NetworkACLs{Bypass: "AzureServices", DefaultAction: "Allow"},
	}
	if vt.PurgeProtection {
		props.EnablePurgeProtection = &yes
	}
	tags := vt.Tags
	if tags == nil {
		tags = map[string]string{}
	}
	return wire.Vault{ID: vt.ResourceID, Name: vt.Name, Type: vault.ResourceType, Location: vt.Location, Tags: tags, Properties: props}
}

// vaultURL is a vault's URL under the server's own suffix, without a trailing slash.
func vaultURL(r *azureapi.Request, name string) string {
	return "https://" + strings.ToLower(name) + "." + r.Endpoints().VaultSuffix()
}

func entries(policies []access.Policy) []wire.AccessPolicyEntry {
	out := make([]wire.AccessPolicyEntry, len(policies))
	for i, p := range policies {
		out[i] = wire.AccessPolicyEntry{
			TenantID: p.Tenant, ObjectID: p.ObjectID, ApplicationID: p.ClientID,
			Permissions: wire.Permissions{Keys: p.Keys, Secrets: p.Secrets, Certificates: p.Certificates, Storage: p.Storage},
		}
	}
	return out
}

func policies(list []wire.AccessPolicyEntry) []access.Policy {
	out := make([]access.Policy, len(list))
	for i, e := range list {
		out[i] = access.Policy{
			Tenant: e.TenantID, ObjectID: e.ObjectID, ClientID: e.ApplicationID,
			Keys: e.Permissions.Keys, Secrets: e.Permissions.Secrets, Certificates: e.Permissions.Certificates, Storage: e.Permissions.Storage,
		}
	}
	return out
}

// vaultSpec reads the body of a PUT or PATCH.
func vaultSpec(r *azureapi.Request) (vault.VaultSpec, error) {
	var body wire.PutVault
	if err := r.Decode(&body); err != nil {
		return vault.VaultSpec{}, err
	}
	spec := vault.VaultSpec{Location: body.Location, Tags: body.Tags}
	p := body.Properties
	if p == nil {
		if r.Method == http.MethodPut {
			return spec, fault.New(fault.Invalid, "InvalidRequestContent", "The vault's properties are missing.").At("properties").WithFix("send at least properties.tenantId and properties.sku")
		}
		return spec, nil
	}
	if err := openToAll(p); err != nil {
		return spec, err
	}
	switch strings.ToLower(p.CreateMode) {
	case "", "default":
	case "recover":
		spec.Recover = true
	default:
		return spec, fault.New(fault.Invalid, "BadRequest", "There is no createMode '%s'.", p.CreateMode).At("properties.createMode").WithFix("use default or recover")
	}
	spec.Tenant, spec.RetentionDays, spec.PurgeProtection = p.TenantID, p.SoftDeleteRetentionInDays, p.EnablePurgeProtection
	spec.SoftDelete, spec.RBAC = p.EnableSoftDelete, p.EnableRbacAuthorization
	spec.EnabledForDeployment, spec.EnabledForDiskEncryption, spec.EnabledForTemplateDeployment = p.EnabledForDeployment, p.EnabledForDiskEncryption, p.EnabledForTemplateDeployment
	if p.SKU != nil {
		spec.SKU = &p.SKU.Name
	}
	if p.AccessPolicies != nil {
		list := policies(*p.AccessPolicies)
		spec.Policies = &list
	}
	return spec, nil
}

// openToAll refuses a firewall: the server would not keep what it promises.
func openToAll(p *wire.VaultProperties) error {
	if p.PublicNetworkAccess != "" && !strings.EqualFold(p.PublicNetworkAccess, "Enabled") {
		return fault.New(fault.Invalid, "BadRequest", "Network rules of vaults are not offered.").At("properties.publicNetworkAccess").WithFix("leave it out, and limit access with access policies")
	}
	if n := p.NetworkACLs; n != nil && (strings.EqualFold(n.DefaultAction, "Deny") || len(n.IPRules)+len(n.VirtualNetworkRules) > 0) {
		return fault.New(fault.Invalid, "BadRequest", "Network rules of vaults are not offered.").At("properties.networkAcls").WithFix("send defaultAction Allow without rules, and limit access with access policies")
	}
	return nil
}

func (s surface) putVault(r *azureapi.Request) (*azureapi.Reply, error) {
	spec, err := vaultSpec(r)
	if err != nil {
		return nil, err
	}
	vt, created, err := s.vaults.PutVault(r.Context(), vaultID(r), spec)
	if err != nil {
		return nil, err
	}
	reply := azureapi.OK(vaultOf(r, vt))
	if created {
		reply.Status = http.StatusCreated
	}
	return reply, nil
}

func (s surface) patchVault(r *azureapi.Request) (*azureapi.Reply, error) {
	spec, err := vaultSpec(r)
	if err != nil {
		return nil, err
	}
	vt, err := s.vaults.PatchVault(r.Context(), vaultID(r), spec)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(vaultOf(r, vt)), nil
}

func (s surface) getVault(r *azureapi.Request) (*azureapi.Reply, error) {
	vt, err := s.vaults.Vault(r.Context(), vaultID(r))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(vaultOf(r, vt)), nil
}

func (s surface) deleteVault(r *azureapi.Request) (*azureapi.Reply, error) {
	found, err := s.vaults.DeleteVault(r.Context(), vaultID(r))
	if err != nil {
		return nil, err
	}
	if !found {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Status(http.StatusOK), nil
}

func (s surface) putPolicies(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.AccessPolicies
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	kind := vault.PolicyChange(strings.ToLower(r.Param("operation")))
	switch kind {
	case vault.AddPolicies, vault.ReplacePolicies, vault.RemovePolicies:
	default:
		return nil, fault.New(fault.Invalid, "BadRequest", "There is no change '%s' of access policies.", kind).WithFix("use add, replace or remove")
	}
	vt, err := s.vaults.ChangePolicies(r.Context(), vaultID(r), kind, policies(body.Properties.AccessPolicies))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(wire.AccessPolicies{
		ID: vt.ResourceID + "/accessPolicies/", Type: vault.ResourceType + "/accessPolicies", Location: vt.Location,
		Properties: wire.AccessPoliciesProperties{AccessPolicies: entries(vt.Policies)},
	}), nil
}

func (s surface) listVaults(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.vaults.Vaults(r.Context(), r.Param("subscription"), r.Param("group"))
	if err != nil {
		return nil, err
	}
	out := wire.List[wire.Vault]{Value: make([]wire.Vault, len(all))}
	for i, vt := range all {
		out.Value[i] = vaultOf(r, vt)
	}
	return azureapi.OK(out), nil
}

// listHSMs answers that there are no managed HSMs, to whoever may list vaults: az asks for both.
func (s surface) listHSMs(r *azureapi.Request) (*azureapi.Reply, error) {
	if _, err := s.vaults.Vaults(r.Context(), r.Param("subscription"), r.Param("group")); err != nil {
		return nil, err
	}
	return azureapi.OK(wire.List[struct{}]{Value: []struct{}{}}), nil
}

func deletedVault(vt vault.Vault) wire.DeletedVault {
	id, _ := arm.ParseID(vt.ResourceID) // it was one when it was stored
	tags := vt.Tags
	if tags == nil {
		tags = map[string]string{}
	}
	out := wire.DeletedVault{
		ID:   "/subscriptions/" + id.Subscription + "/providers/" + provider + "/locations/" + vt.Location + "/deletedVaults/" + vt.Name,
		Name: vt.Name, Type: provider + "/deletedVaults",
		Properties: wire.DeletedVaultProperties{VaultID: vt.ResourceID, Location: vt.Location, DeletionDate: vt.Deleted.At, ScheduledPurgeDate: vt.Deleted.PurgeAt, Tags: tags},
	}
	if vt.PurgeProtection {
		out.Properties.PurgeProtectionEnabled = &vt.PurgeProtection
	}
	return out
}

func (s surface) listDeletedVaults(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.vaults.DeletedVaults(r.Context(), r.Param("subscription"))
	if err != nil {
		return nil, err
	}
	out := wire.List[wire.DeletedVault]{Value: make([]wire.DeletedVault, len(all))}
	for i, vt := range all {
		out.Value[i] = deletedVault(vt)
	}
	return azureapi.OK(out), nil
}

func (s surface) getDeletedVault(r *azureapi.Request) (*azureapi.Reply, error) {
	vt, err := s.vaults.DeletedVault(r.Context(), r.Param("subscription"), r.Param("location"), r.Param("name"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(deletedVault(vt)), nil
}

func (s surface) purgeVault(r *azureapi.Request) (*azureapi.Reply, error) {
	sub, loc, name := r.Param("subscription"), r.Param("location"), r.Param("name")
	if err := s.vaults.PurgeVault(r.Context(), sub, loc, name); err != nil {
		return nil, err
	}
	return azureapi.Accepted(purgeLocation(r), "1"), nil
}

func purgeLocation(r *azureapi.Request) string {
	return r.BaseURL() + "/subscriptions/" + url.PathEscape(r.Param("subscription")) + "/providers/" + provider + "/locations/" + url.PathEscape(r.Param("location")) +
		"/operationResults/" + url.PathEscape(r.Param("name")) + "?api-version=" + url.QueryEscape(r.Version)
}

func (s surface) purgeResult(r *azureapi.Request) (*azureapi.Reply, error) {
	done, err := s.vaults.PurgeDone(r.Context(), r.Param("subscription"), r.Param("name"))
	if err != nil {
		return nil, err
	}
	if !done {
		return azureapi.Accepted(purgeLocation(r), "1"), nil
	}
	return azureapi.Status(http.StatusNoContent), nil
}

func (s surface) checkName(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.CheckName
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	why, err := s.vaults.NameAvailable(r.Context(), r.Param("subscription"), body.Name)
	if err != nil {
		return nil, err
	}
	out := wire.NameAvailability{NameAvailable: why == nil}
	if f := fault.From(why); f != nil {
		out.Message, out.Reason = f.Message, "AlreadyExists"
		if f.Kind == fault.Invalid {
			out.Reason = "AccountNameInvalid"
		}
	}
	return azureapi.OK(out), nil
}

func (s surface) renewal(r *azureapi.Request) (*azureapi.Reply, error) {
	n, err := s.vaults.Renewal(r.Context(), r.Param("vault"), r.Param("name"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(wire.Renewal{
		Vault: n.Vault, Name: n.Name, Version: n.Version, NotBefore: moment(n.NotBefore), NotAfter: moment(n.NotAfter), Next: moment(n.Next), MailDue: moment(n.MailDue),
		Failing: n.Failing, Stalled: n.Stalled, Reason: n.Reason, Message: n.Message, Since: moment(n.Since), NextAttempt: moment(n.NextAttempt),
	}), nil
}

func moment(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func (s surface) renew(r *azureapi.Request) (*azureapi.Reply, error) {
	out, err := s.vaults.RenewNow(r.Context(), r.Param("vault"), r.Param("name"))
	if err != nil {
		return nil, err
	}
	return &azureapi.Reply{Status: http.StatusAccepted, Body: operation(vaultURL(r, out.Vault), out)}, nil
}

func (s surface) getClock(r *azureapi.Request) (*azureapi.Reply, error) {
	now, offset, err := s.clock.Read(r.Context())
	return clockReply(now, offset, err)
}

func (s surface) advanceClock(r *azureapi.Request) (*azureapi.Reply, error) {
	var body wire.AdvanceClock
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	d, err := time.ParseDuration(body.Advance)
	if err != nil {
		return nil, fault.New(fault.Invalid, "InvalidRequestContent", "'%s' is not a duration.", body.Advance).At("advance").WithFix("write it like 720h or 90m")
	}
	now, offset, err := s.clock.Advance(r.Context(), d)
	return clockReply(now, offset, err)
}

func clockReply(now time.Time, offset time.Duration, err error) (*azureapi.Reply, error) {
	if err != nil {
		return nil, err
	}
	return azureapi.OK(wire.Clock{PolicyTime: now, Offset: offset.String()}), nil
}
