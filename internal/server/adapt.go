package server

import (
	"context"
	"net/url"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/pool"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/subscription"
	"keyfleet.dev/keyfleet/internal/vault"
)

// The adapters of this file are all that capabilities know of each other.

// secretAccess answers pools whether an identity can read a secret.
type secretAccess struct {
	vaults    *vault.Vaults
	endpoints azureapi.Endpoints
}

// Check implements pool.SecretAccess.
func (a secretAccess) Check(ctx context.Context, who access.Principal, secretURL string) (pool.Verdict, error) {
	u, err := vault.ParseSecretURL(secretURL, a.endpoints.Suffixes(azureapi.Vault))
	if err != nil {
		e := fault.From(err)
		return pool.Verdict{Answer: vault.Unknown, Code: e.Code, Message: e.Message, Fix: e.Fix}, nil
	}
	v := a.vaults.Check(ctx, who, u.Vault, u.Name, u.Version)
	return pool.Verdict{Answer: v.Answer, Code: v.Code, Message: v.Message, Fix: v.Fix, Pinned: u.Version != ""}, nil
}

// secretChanges tells pools which secrets have a new version.
type secretChanges struct {
	*vault.Feed
	endpoints azureapi.Endpoints
}

// Follow implements pool.SecretChanges.
func (c secretChanges) Follow(ctx context.Context, fn func(vault, secret string, revision int64)) error {
	return c.Feed.Follow(ctx, func(v, s string, rev int64) error { fn(v, s, rev); return nil })
}

// Resolve implements pool.SecretChanges.
func (c secretChanges) Resolve(secretURL string) (vaultName, secret, version string, ok bool) {
	u, err := vault.ParseSecretURL(secretURL, c.endpoints.Suffixes(azureapi.Vault))
	return u.Vault, u.Name, u.Version, err == nil
}

// identities finds managed identities for pools.
type identities struct{ *identity.Service }

// Resolve implements pool.Identities.
func (i identities) Resolve(ctx context.Context, resourceID string) (pool.Identity, error) {
	id, err := i.Service.Resolve(ctx, resourceID)
	if err != nil {
		return pool.Identity{}, err
	}
	parsed, err := arm.ParseID(id.ID)
	if err != nil {
		return pool.Identity{}, err
	}
	return pool.Identity{ResourceID: id.ID, Tenant: id.Tenant, ClientID: id.ClientID, ObjectID: id.PrincipalID, Name: parsed.Name()}, nil
}

// nodeTokens gives nodes the tokens of their pool's identities.
type nodeTokens struct {
	fleet    *pool.Fleet
	identity *identity.Service
}

// Token implements nodeapi.Tokens.
func (t nodeTokens) Token(ctx context.Context, nodeID string, req node.TokenRequest) (node.TokenResponse, error) {
	id, err := t.fleet.NodeIdentity(ctx, nodeID, req)
	if err != nil {
		return node.TokenResponse{}, err
	}
	tok, err := t.identity.TokenFor(ctx, identity.Selector{ResourceID: id.ResourceID}, req.Resource)
	if err != nil {
		return node.TokenResponse{}, err
	}
	return node.TokenResponse{
		AccessToken: tok.Value.Reveal(), ClientID: tok.ClientID, Resource: tok.Resource, NotBefore: tok.NotBefore, ExpiresOn: tok.Expires,
	}, nil
}

// names tells pools which host names lead to this server.
type names struct{ azureapi.Endpoints }

// Hosts implements pool.Names.
func (n names) Hosts(urls []string) []string {
	hosts := []string{"node." + n.Domain, "login." + n.Domain, "arm." + n.Domain}
	for _, raw := range urls {
		u, err := url.Parse(raw)
		if err == nil && n.Serves(u.Hostname()) {
			hosts = append(hosts, strings.ToLower(u.Hostname()))
		}
	}
	slices.Sort(hosts)
	return slices.Compact(hosts)
}

// groups checks resource groups for pools.
type groups struct {
	store    *store.Store
	provider string
}

// Check implements pool.Groups.
func (g groups) Check(ctx context.Context, sub, group string) error {
	return subscription.Require(g.store.View(ctx), sub, group, g.provider)
}

// The resources in a resource group, in the order in which they are deleted:
// accounts with their pools first, since pools use identities and vaults.

type accountContents struct{ fleet *pool.Fleet }

// List implements subscription.Contents.
func (c accountContents) List(ctx context.Context, sub, group string) ([]subscription.Resource, error) {
	list, err := c.fleet.ListAccounts(access.AsSystem(ctx, "resource-groups"), arm.ID{Subscription: sub, ResourceGroup: group})
	var out []subscription.Resource
	for _, a := range list {
		out = append(out, resource(a.Spec.ID, a.Spec.Location, a.Spec.Tags))
	}
	return out, err
}

// Delete implements subscription.Contents.
func (c accountContents) Delete(ctx context.Context, r subscription.Resource) error {
	id, err := arm.ParseID(r.ID)
	if err != nil {
		return err
	}
	_, err = c.fleet.DeleteAccount(access.AsSystem(ctx, "resource-groups"), id)
	return err
}

type vaultContents struct{ vaults *vault.Vaults }

// List implements subscription.Contents.
func (c vaultContents) List(ctx context.Context, sub, group string) ([]subscription.Resource, error) {
	list, err := c.vaults.Vaults(access.AsSystem(ctx, "resource-groups"), sub, group)
	var out []subscription.Resource
	for _, v := range list {
		out = append(out, resource(v.ResourceID, v.Location, v.Tags))
	}
	return out, err
}

// Delete implements subscription.Contents.
func (c vaultContents) Delete(ctx context.Context, r subscription.Resource) error {
	id, err := arm.ParseID(r.ID)
	if err != nil {
		return err
	}
	_, err = c.vaults.DeleteVault(access.AsSystem(ctx, "resource-groups"), id)
	return err
}

type identityContents struct{ identity *identity.Service }

// List implements subscription.Contents.
func (c identityContents) List(ctx context.Context, sub, group string) ([]subscription.Resource, error) {
	list, err := c.identity.IdentitiesIn(ctx, sub, group)
	var out []subscription.Resource
	for _, i := range list {
		out = append(out, resource(i.Spec.ID, i.Spec.Location, i.Spec.Tags))
	}
	return out, err
}

// Delete implements subscription.Contents.
func (c identityContents) Delete(ctx context.Context, r subscription.Resource) error {
	_, err := c.identity.DeleteIdentity(access.AsSystem(ctx, "resource-groups"), r.ID)
	return err
}

type clusterContents struct{ clusters *cluster.Service }

// List implements subscription.Contents.
func (c clusterContents) List(ctx context.Context, sub, group string) ([]subscription.Resource, error) {
	list, err := c.clusters.In(ctx, sub, group)
	var out []subscription.Resource
	for _, o := range list {
		out = append(out, resource(o.Spec.ID, o.Spec.Location, o.Spec.Tags))
	}
	return out, err
}

// Delete implements subscription.Contents.
func (c clusterContents) Delete(ctx context.Context, r subscription.Resource) error {
	_, err := c.clusters.Delete(access.AsSystem(ctx, "resource-groups"), r.ID)
	return err
}

func resource(id, location string, tags map[string]string) subscription.Resource {
	r := subscription.Resource{ID: id, Location: location, Tags: tags}
	if parsed, err := arm.ParseID(id); err == nil {
		r.Name, r.Type, r.Group = parsed.Name(), parsed.Type(), parsed.ResourceGroup
	}
	return r
}
