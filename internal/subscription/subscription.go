// Package subscription holds what every resource hangs from: subscriptions,
// resource groups, and which resource providers a subscription uses.
//
// Idea: a resource can only be made where its subscription and its group
// exist, the group is not being deleted, and the provider is registered.
// [Require] is that rule; capabilities call it inside the transaction that
// makes the resource, so it still holds when the transaction commits.
//
// Invariant: a resource group goes only when nothing is left in it. Deleting
// it marks it; from then on nothing can be made in it, and a controller deletes
// what is inside, through [Contents], until a look finds nothing.
//
// Consequence for the operator: the deletion of a group may take as long as
// its slowest resource (a pool's nodes must be gone), survives restarts, and
// shows what it is waiting for as a condition of the group.
package subscription

import (
	"context"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Config is what a Service needs.
type Config struct {
	Store     *store.Store // required
	Gate      *access.Gate // required
	Tenant    string       // tenant id of subscriptions made here; required
	Contents  []Contents   // what can be in a resource group, in the order in which it is deleted
	Locations []Location   // nil: Locations()
}

// Service has the operations. Make it with [New].
type Service struct{ cfg Config }

// New returns a Service.
func New(cfg Config) *Service {
	if cfg.Locations == nil {
		cfg.Locations = Locations()
	}
	return &Service{cfg: cfg}
}

// Subscription is the spec of a subscription.
type Subscription struct {
	ID           string   `json:"subscriptionId"` // GUID, the creator's casing
	DisplayName  string   `json:"displayName"`
	Tenant       string   `json:"tenantId"`
	Unregistered []string `json:"unregistered,omitempty"` // provider namespaces that are known and not registered; lower case
}

// Object is a stored subscription.
type Object = store.Object[Subscription, struct{}]

// Subscriptions is the collection of subscriptions; ids are subscription ids.
var Subscriptions = store.NewCollection[Subscription, struct{}]("subscriptions")

const (
	actionSubscriptionRead  = "Microsoft.Resources/subscriptions/read"
	actionSubscriptionWrite = "Keyfleet/subscriptions/write"
)

// Scope is the ARM id of a subscription.
func Scope(id string) string { return "/subscriptions/" + id }

// Create makes a subscription with a chosen id (documented request bodies name
// theirs). The same id again is no error: its display name is changed if one is given.
func (s *Service) Create(ctx context.Context, id, displayName string) (out *Object, created bool, err error) {
	op := access.Op{Action: actionSubscriptionWrite, Resource: "/"}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		out, created, err = Insert(tx, Subscription{ID: id, DisplayName: displayName, Tenant: s.cfg.Tenant})
		return err
	})
	return out, created, err
}

// Insert makes or renames a subscription inside a transaction that somebody
// else decided and recorded: the first start.
func Insert(tx *store.Tx, sub Subscription) (*Object, bool, error) {
	if !arm.IsGUID(sub.ID) {
		return nil, false, fault.New(fault.Invalid, "InvalidSubscriptionId", "The subscription id '%s' is not a GUID.", sub.ID).At("subscriptionId")
	}
	if len(sub.DisplayName) > 64 {
		return nil, false, fault.New(fault.Invalid, "InvalidDisplayName", "The display name is longer than 64 characters.").At("displayName")
	}
	old, err := Subscriptions.Lookup(tx, strings.ToLower(sub.ID))
	if err != nil {
		return nil, false, err
	}
	if old != nil {
		if sub.DisplayName != "" {
			old.Spec.DisplayName = sub.DisplayName
		}
		return old, false, Subscriptions.Put(tx, old)
	}
	if sub.DisplayName == "" {
		sub.DisplayName = sub.ID
	}
	o := &Object{Meta: store.Meta{ID: strings.ToLower(sub.ID)}, Spec: sub}
	return o, true, Subscriptions.Insert(tx, o)
}

// Get returns a subscription, fault.NotFound if there is none.
func (s *Service) Get(ctx context.Context, id string) (*Object, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionSubscriptionRead, Resource: Scope(id)}); err != nil {
		return nil, err
	}
	return lookup(s.cfg.Store.View(ctx), id)
}

// List returns the subscriptions in which, above which or below which the
// caller has a role. Every caller may ask; most see few.
func (s *Service) List(ctx context.Context) ([]*Object, error) {
	c, _ := access.From(ctx)
	if err := s.cfg.Gate.Record(ctx, c.Principal, access.Op{Action: actionSubscriptionRead, Resource: "/subscriptions"}, nil); err != nil {
		return nil, err
	}
	all, err := Subscriptions.List(s.cfg.Store.View(ctx), "")
	if err != nil {
		return nil, err
	}
	out := make([]*Object, 0, len(all))
	for _, o := range all {
		ok, err := s.cfg.Gate.Reaches(ctx, Scope(o.Spec.ID))
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, o)
		}
	}
	return out, nil
}

func lookup(tx *store.Tx, id string) (*Object, error) {
	o, err := Subscriptions.Lookup(tx, strings.ToLower(id))
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fault.New(fault.NotFound, "SubscriptionNotFound", "The subscription '%s' could not be found.", id).
			WithFix("an Owner at / creates it: keyfleet subscription create %s", id)
	}
	return o, nil
}

// Require fails unless a resource of the provider namespace can be made in the
// group now: fault.NotFound for subscription or group, fault.Conflict for a
// group that is being deleted or a namespace that is not registered. An empty
// group or namespace is not checked. Called inside the transaction that makes the resource.
func Require(tx *store.Tx, subscription, group, namespace string) error {
	sub, err := lookup(tx, subscription)
	if err != nil {
		return err
	}
	if namespace != "" && slices.Contains(sub.Spec.Unregistered, strings.ToLower(namespace)) {
		return fault.New(fault.Conflict, "MissingSubscriptionRegistration", "The subscription is not registered to use namespace '%s'.", namespace).
			WithFix("keyfleet provider register %s --subscription %s", namespace, subscription)
	}
	if group == "" {
		return nil
	}
	g, err := lookupGroup(tx, subscription, group)
	if err != nil {
		return err
	}
	if !g.Deleting.IsZero() {
		return fault.New(fault.Conflict, "ResourceGroupBeingDeleted",
			"The resource group '%s' is in deprovisioning state and cannot perform this operation.", g.Spec.Name).
			WithFix("wait until it is gone, or use another group")
	}
	return nil
}

// Location is a place that resources can name. Keyfleet does nothing with it
// but show it, and use it in the host names of Batch accounts.
type Location struct {
	Name        string // "westus2"
	DisplayName string // "West US 2"
}

// Locations are the usual ones, plus "local".
func Locations() []Location {
	return []Location{
		{"local", "This server"},
		{"eastus", "East US"},
		{"eastus2", "East US 2"},
		{"centralus", "Central US"},
		{"westus", "West US"},
		{"westus2", "West US 2"},
		{"westus3", "West US 3"},
		{"canadacentral", "Canada Central"},
		{"brazilsouth", "Brazil South"},
		{"northeurope", "North Europe"},
		{"westeurope", "West Europe"},
		{"uksouth", "UK South"},
		{"francecentral", "France Central"},
		{"germanywestcentral", "Germany West Central"},
		{"swedencentral", "Sweden Central"},
		{"switzerlandnorth", "Switzerland North"},
		{"eastasia", "East Asia"},
		{"southeastasia", "Southeast Asia"},
		{"japaneast", "Japan East"},
		{"koreacentral", "Korea Central"},
		{"centralindia", "Central India"},
		{"australiaeast", "Australia East"},
		{"chinaeast", "China East"},
		{"chinaeast2", "China East 2"},
		{"chinanorth", "China North"},
		{"chinanorth2", "China North 2"},
		{"chinanorth3", "China North 3"},
	}
}

// Locations lists the locations, in the order of the configuration. Every
// caller who may read the subscription may ask.
func (s *Service) Locations(ctx context.Context, subscription string) ([]Location, error) {
	if _, err := s.Get(ctx, subscription); err != nil {
		return nil, err
	}
	return s.cfg.Locations, nil
}

// NormalizeLocation turns "West US 2" into "westus2". It accepts any word of
// letters and digits, for a location is only a label here: fault.Invalid otherwise.
func NormalizeLocation(s string) (string, error) {
	n := strings.ToLower(strings.ReplaceAll(strings.TrimSpace(s), " ", ""))
	if n == "" {
		return "", fault.New(fault.Invalid, "LocationRequired", "The location property is required for this definition.").At("location")
	}
	if len(n) > 32 || strings.Trim(n, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return "", fault.New(fault.Invalid, "LocationNotAvailableForResourceType", "'%s' is not a location: letters and digits only, at most 32.", s).At("location")
	}
	return n, nil
}
