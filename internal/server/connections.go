package server

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/subscription"
	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/vault"
)

// What connections know of the other capabilities.

// buildConnections makes the capability; clusters, identities and vaults are there already.
func (s *Server) buildConnections(gate *access.Gate) error {
	catalogue, err := connector.LoadCatalogue()
	if err != nil {
		return err
	}
	s.catalogue = catalogue
	s.connections = connector.New(connector.Config{
		Store: s.store, Gate: gate, Catalogue: catalogue, Clusters: clusterStates{s.clusters, s.store}, Vaults: connectionVaults{s.vaults, s.endpoints},
		Identities: connectionIdentities{s.identity, s.store}, Maker: maker{}, Tenant: s.identity.TenantID(), Log: s.log,
		Place: func(tx *store.Tx, sub, group, namespace string) error {
			if strings.HasPrefix(namespace, "Keyfleet.") {
				namespace = "" // of its own: always there
			}
			return subscription.Require(tx, sub, group, namespace)
		},
	})
	return nil
}

// clusterStates tells connections about clusters.
type clusterStates struct {
	clusters *cluster.Service
	store    *store.Store
}

// State implements connector.Clusters.
func (c clusterStates) State(ctx context.Context, id arm.ID) (connector.ClusterState, error) {
	o, err := c.clusters.Get(access.AsSystem(ctx, "connections"), id.String())
	if err != nil {
		return connector.ClusterState{}, err
	}
	out := connector.ClusterState{ID: o.Spec.ID, Location: o.Spec.Location, Issuer: o.Status.Issuer, Addon: o.Status.CSIDriver}
	out.State, out.Reason = o.Status.State(time.Now())
	out.Managed = !o.Status.Time.IsZero() && time.Since(o.Status.Time) <= cluster.Fresh
	out.Busy, err = c.clusters.Busy(ctx, o)
	return out, err
}

// connectionVaults keeps the credentials of connections in vaults of this server.
type connectionVaults struct {
	vaults    *vault.Vaults
	endpoints azureapi.Endpoints
}

// vaultOf is the resource id of the vault for the connections of a cluster. It is in
// the cluster's group; its name comes from the cluster's id, for names of vaults are unique.
func vaultOf(cluster arm.ID) arm.ID {
	sum := sha256.Sum256([]byte(cluster.Key()))
	name := "sc-" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:10]))
	return arm.ID{Subscription: cluster.Subscription, ResourceGroup: cluster.ResourceGroup, Provider: "Microsoft.KeyVault", Types: []string{"vaults"}, Names: []string{name}}
}

// Default implements connector.Vaults.
func (c connectionVaults) Default(ctx context.Context, cluster arm.ID) (vaultID string, there bool, err error) {
	id := vaultOf(cluster)
	v, err := c.vaults.Named(ctx, id.Name())
	if fault.KindOf(err) == fault.NotFound {
		return id.String(), false, nil
	}
	return v.ResourceID, err == nil, err
}

// Ensure implements connector.Vaults.
func (c connectionVaults) Ensure(ctx context.Context, cluster arm.ID, location string) (string, error) {
	vaultID, there, err := c.Default(ctx, cluster)
	if err != nil || there {
		return vaultID, err
	}
	id := vaultOf(cluster)
	_, deleted := c.vaults.DeletedVault(ctx, cluster.Subscription, location, id.Name())
	v, _, err := c.vaults.PutVault(ctx, id, vault.VaultSpec{
		Location: &location, Tags: map[string]string{"keyfleet": "credentials of the service connections of " + cluster.Name()}, Recover: deleted == nil,
	})
	return v.ResourceID, err
}

func nameOfVault(id string) (string, error) {
	parsed, err := arm.ParseID(id)
	if err != nil || !parsed.Is("Microsoft.KeyVault/vaults") {
		return "", fault.New(fault.Invalid, "LinkedInvalidPropertyId", "'%.300s' is not the resource id of a vault.", id)
	}
	return parsed.Name(), nil
}

func (c connectionVaults) may(ctx context.Context, ref connector.SecretRef, verb string) error {
	name, err := nameOfVault(ref.Vault)
	if err != nil {
		return err
	}
	return c.vaults.Authorize(ctx, name, "secrets/"+verb, "secrets/"+strings.ToLower(ref.Name))
}

// MaySet implements connector.Vaults.
func (c connectionVaults) MaySet(ctx context.Context, ref connector.SecretRef) error {
	return c.may(ctx, ref, "set")
}

// MayGet implements connector.Vaults.
func (c connectionVaults) MayGet(ctx context.Context, ref connector.SecretRef) error {
	return c.may(ctx, ref, "get")
}

// Set implements connector.Vaults. A secret that an earlier connection of the name
// has left deleted is taken up again.
func (c connectionVaults) Set(ctx context.Context, ref connector.SecretRef, value string) (string, error) {
	name, err := nameOfVault(ref.Vault)
	if err != nil {
		return "", err
	}
	v, err := c.vaults.SetSecret(ctx, name, ref.Name, vault.NewSecret(value), vault.Change{})
	if fault.KindOf(err) == fault.Conflict {
		if _, rerr := c.vaults.RecoverSecret(ctx, name, ref.Name); rerr != nil {
			return "", err
		}
		v, err = c.vaults.SetSecret(ctx, name, ref.Name, vault.NewSecret(value), vault.Change{})
	}
	return v.Version, err
}

// Get implements connector.Vaults.
func (c connectionVaults) Get(ctx context.Context, ref connector.SecretRef) (string, error) {
	name, err := nameOfVault(ref.Vault)
	if err != nil {
		return "", err
	}
	v, err := c.vaults.Secret(ctx, name, ref.Name, ref.Version, "")
	if err != nil {
		return "", err
	}
	return v.Value.Reveal(), nil
}

// Delete implements connector.Vaults.
func (c connectionVaults) Delete(ctx context.Context, ref connector.SecretRef) error {
	name, err := nameOfVault(ref.Vault)
	if err != nil {
		return err
	}
	if _, err = c.vaults.DeleteSecret(ctx, name, ref.Name); fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// Locate turns the URL of a secret into a reference.
func (c connectionVaults) Locate(url string) (connector.SecretRef, error) {
	u, err := vault.ParseSecretURL(url, c.endpoints.Suffixes(azureapi.Vault))
	if err != nil {
		return connector.SecretRef{}, err
	}
	v, err := c.vaults.Named(context.Background(), u.Vault)
	return connector.SecretRef{Vault: v.ResourceID, Name: u.Name, Version: u.Version}, err
}

// Endpoint implements connector.Vaults.
func (c connectionVaults) Endpoint(ctx context.Context, vaultID string) (string, bool) {
	name, err := nameOfVault(vaultID)
	if err != nil {
		return "", false
	}
	v, err := c.vaults.Named(ctx, name)
	if err != nil || !strings.EqualFold(v.ResourceID, vaultID) {
		return "", false
	}
	return "https://" + strings.ToLower(v.Name) + "." + c.endpoints.VaultSuffix() + "/", true
}

// Granted implements connector.Vaults.
func (c connectionVaults) Granted(ctx context.Context, vaultID, objectID string) (bool, error) {
	name, err := nameOfVault(vaultID)
	if err != nil {
		return false, err
	}
	v, err := c.vaults.Named(ctx, name)
	return slices.ContainsFunc(v.Policies, func(p access.Policy) bool {
		return strings.EqualFold(p.ObjectID, objectID) && (slices.Contains(p.Secrets, "get") || slices.Contains(p.Secrets, "all"))
	}), err
}

// Grant implements connector.Vaults.
func (c connectionVaults) Grant(ctx context.Context, vaultID, objectID string) error {
	if there, err := c.Granted(ctx, vaultID, objectID); there || err != nil {
		return err
	}
	return c.policy(ctx, vaultID, objectID, vault.AddPolicies)
}

// Revoke implements connector.Vaults.
func (c connectionVaults) Revoke(ctx context.Context, vaultID, objectID string) error {
	return c.policy(ctx, vaultID, objectID, vault.RemovePolicies)
}

func (c connectionVaults) policy(ctx context.Context, vaultID, objectID string, kind vault.PolicyChange) error {
	id, err := arm.ParseID(vaultID)
	if err != nil {
		return err
	}
	v, err := c.vaults.Named(ctx, id.Name())
	if err != nil {
		return err
	}
	_, err = c.vaults.ChangePolicies(ctx, id, kind, []access.Policy{{Tenant: v.Tenant, ObjectID: objectID, Secrets: []string{"get", "list"}}})
	return err
}

// connectionIdentities finds managed identities for connections.
type connectionIdentities struct {
	identity *identity.Service
	store    *store.Store
}

// Find implements connector.Identities.
func (c connectionIdentities) Find(ctx context.Context, resourceID, clientID string) (connector.ManagedIdentity, error) {
	i, err := c.identity.Find(ctx, identity.Selector{ResourceID: resourceID, ClientID: clientID})
	return connector.ManagedIdentity{ID: i.ID, ClientID: i.ClientID, ObjectID: i.PrincipalID, TenantID: i.Tenant}, err
}

// MayTrust implements connector.Identities.
func (c connectionIdentities) MayTrust(ctx context.Context, resourceID string) error {
	return c.identity.RequireAssign(ctx, resourceID)
}

func federatedID(identityID, name string) string {
	return identityID + "/federatedIdentityCredentials/" + name
}

// Trust implements connector.Identities. What is there already is not written again.
func (c connectionIdentities) Trust(ctx context.Context, resourceID, name, cluster, subject string) error {
	id, err := arm.ParseID(federatedID(resourceID, name))
	if err != nil {
		return err
	}
	old, err := identity.FederatedCredentials.Lookup(c.store.View(ctx), id.StoreKey())
	if err != nil || old != nil && old.Spec.Subject == subject && strings.EqualFold(old.Spec.Cluster, cluster) {
		return err
	}
	_, _, err = c.identity.PutFederated(ctx, identity.Federated{ID: id.String(), Cluster: cluster, Subject: subject, Audiences: []string{identity.DefaultAudience}})
	return err
}

// Distrust implements connector.Identities.
func (c connectionIdentities) Distrust(ctx context.Context, resourceID, name string) error {
	_, err := c.identity.DeleteFederated(ctx, federatedID(resourceID, name))
	return err
}

// maker makes logins by package target.
type maker struct{}

func reachOf(r connector.Reach) target.Server {
	return target.Server{
		Kind: target.Kind(r.Kind), Host: r.Host, Port: r.Port, Database: r.Database, Management: r.Management,
		TLS: target.TLS{Disable: r.Plain, CA: r.CA, Name: r.Name}, Admin: loginOf(r.Login),
	}
}

func loginOf(l connector.Login) target.Login {
	return target.Login{User: l.User, Password: target.NewSecret(l.Password)}
}

func (maker) Check(ctx context.Context, r connector.Reach) ([]string, error) {
	return target.Check(ctx, reachOf(r))
}

func (maker) Ensure(ctx context.Context, r connector.Reach, role string, l connector.Login) error {
	return target.Ensure(ctx, reachOf(r), role, loginOf(l))
}

func (maker) Prove(ctx context.Context, r connector.Reach, l connector.Login) (time.Duration, error) {
	return target.Prove(ctx, reachOf(r), loginOf(l))
}

func (maker) Revoke(ctx context.Context, r connector.Reach, role, user string) error {
	return target.Revoke(ctx, reachOf(r), role, user)
}

func (maker) Refused(ctx context.Context, r connector.Reach, l connector.Login) error {
	return target.Refused(ctx, reachOf(r), loginOf(l))
}

func (maker) Remove(ctx context.Context, r connector.Reach, role string) ([]string, error) {
	return target.Remove(ctx, reachOf(r), role)
}

// The resources of the capability in a resource group: connections go first, for
// they need clusters, servers, vaults and identities to take back what they made.

type connectionContents struct{ connections *connector.Service }

// List implements subscription.Contents.
func (c connectionContents) List(ctx context.Context, sub, group string) ([]subscription.Resource, error) {
	list, err := c.connections.In(ctx, sub, group)
	var out []subscription.Resource
	for _, o := range list {
		out = append(out, subscription.Resource{ID: o.Spec.ID, Name: o.Spec.Name(), Type: connector.Type, Group: groupOf(o.Spec.Cluster)})
	}
	return out, err
}

func groupOf(id string) string {
	parsed, err := arm.ParseID(id)
	if err != nil {
		return ""
	}
	return parsed.ResourceGroup
}

// Delete implements subscription.Contents.
func (c connectionContents) Delete(ctx context.Context, r subscription.Resource) error {
	_, err := c.connections.Delete(access.AsSystem(ctx, "resource-groups"), r.ID, false)
	return err
}

type serverContents struct{ connections *connector.Service }

// List implements subscription.Contents.
func (c serverContents) List(ctx context.Context, sub, group string) ([]subscription.Resource, error) {
	list, err := c.connections.ServersIn(ctx, sub, group)
	var out []subscription.Resource
	for _, o := range list {
		out = append(out, resource(o.Spec.ID, o.Spec.Location, o.Spec.Tags))
	}
	return out, err
}

// Delete implements subscription.Contents.
func (c serverContents) Delete(ctx context.Context, r subscription.Resource) error {
	_, err := c.connections.DeleteServer(access.AsSystem(ctx, "resource-groups"), r.ID)
	return err
}
