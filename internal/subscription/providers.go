package subscription

import (
	"context"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Provider is a resource provider of this server and its state in a subscription.
type Provider struct {
	Namespace  string   // "Microsoft.Batch"
	Types      []string // "batchAccounts", "batchAccounts/pools"
	Registered bool
}

// Providers lists the resource providers of this server. They are registered
// in every new subscription: on one's own server there is nothing to sign up
// for. They can be unregistered, and then creating says so as Azure does.
func Providers() []Provider {
	return []Provider{
		{Namespace: "Microsoft.Authorization", Types: []string{"roleAssignments", "roleDefinitions"}},
		{Namespace: "Microsoft.Batch", Types: []string{"batchAccounts", "batchAccounts/pools"}},
		{Namespace: "Microsoft.Cache", Types: []string{"redis"}},
		{Namespace: "Microsoft.ContainerService", Types: []string{"managedClusters"}},
		{Namespace: "Microsoft.DBforMySQL", Types: []string{"flexibleServers"}},
		{Namespace: "Microsoft.DBforPostgreSQL", Types: []string{"flexibleServers"}},
		{Namespace: "Microsoft.KeyVault", Types: []string{"vaults", "deletedVaults"}},
		{Namespace: "Microsoft.KubernetesConfiguration", Types: []string{"extensions"}},
		{Namespace: "Microsoft.ManagedIdentity", Types: []string{"userAssignedIdentities", "userAssignedIdentities/federatedIdentityCredentials"}},
		{Namespace: "Microsoft.Resources", Types: []string{"subscriptions", "resourceGroups", "resources", "tenants"}},
		{Namespace: "Microsoft.ServiceLinker", Types: []string{"linkers", "dryruns", "configurationNames"}},
	}
}

// always names the providers without which a subscription cannot be used.
var always = []string{"microsoft.authorization", "microsoft.resources"}

const (
	actionProviderRead     = "Microsoft.Resources/subscriptions/providers/read"
	actionProviderRegister = "Microsoft.Resources/subscriptions/providers/register/action"
)

// ListProviders returns the providers and their states in a subscription.
func (s *Service) ListProviders(ctx context.Context, subscription string) ([]Provider, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionProviderRead, Resource: Scope(subscription)}); err != nil {
		return nil, err
	}
	sub, err := lookup(s.cfg.Store.View(ctx), subscription)
	if err != nil {
		return nil, err
	}
	out := Providers()
	for i := range out {
		out[i].Registered = !slices.Contains(sub.Spec.Unregistered, strings.ToLower(out[i].Namespace))
	}
	return out, nil
}

// Provider returns one provider and its state in a subscription.
func (s *Service) Provider(ctx context.Context, subscription, namespace string) (Provider, error) {
	all, err := s.ListProviders(ctx, subscription)
	if err != nil {
		return Provider{}, err
	}
	return find(all, namespace)
}

// Register registers a provider in a subscription, or unregisters it. Asking
// for what is already so is no error.
func (s *Service) Register(ctx context.Context, subscription, namespace string, registered bool) (Provider, error) {
	p, err := find(Providers(), namespace)
	if err != nil {
		return p, err
	}
	key := strings.ToLower(p.Namespace)
	op := access.Op{Action: actionProviderRegister, Resource: Scope(subscription), Detail: p.Namespace}
	if !registered {
		op.Action = strings.Replace(op.Action, "/register/", "/unregister/", 1)
	}
	p.Registered = registered
	return p, s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if !registered && slices.Contains(always, key) {
			return fault.New(fault.Invalid, "CannotUnregisterProvider", "The provider '%s' cannot be unregistered.", p.Namespace)
		}
		sub, err := lookup(tx, subscription)
		if err != nil {
			return err
		}
		list := slices.DeleteFunc(slices.Clone(sub.Spec.Unregistered), func(n string) bool { return n == key })
		if !registered {
			list = append(list, key)
		}
		slices.Sort(list)
		sub.Spec.Unregistered = list
		return Subscriptions.Put(tx, sub)
	})
}

func find(list []Provider, namespace string) (Provider, error) {
	for _, p := range list {
		if strings.EqualFold(p.Namespace, namespace) {
			return p, nil
		}
	}
	names := make([]string, 0, len(list))
	for _, p := range list {
		names = append(names, p.Namespace)
	}
	return Provider{}, fault.New(fault.NotFound, "InvalidResourceNamespace", "The resource namespace '%s' is invalid.", namespace).
		WithFix("this server has %s", strings.Join(names, ", "))
}
