package subscription

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// Group is the spec of a resource group.
type Group struct {
	Subscription string            `json:"subscriptionId"`
	Name         string            `json:"name"` // the creator's casing
	Location     string            `json:"location"`
	Tags         map[string]string `json:"tags,omitempty"`
	ManagedBy    string            `json:"managedBy,omitempty"`
}

// GroupObject is a stored resource group.
type GroupObject = store.Object[Group, struct{}]

// Groups is the collection of resource groups; ids are "SUBSCRIPTION/NAME".
var Groups = store.NewCollection[Group, struct{}]("resourcegroups")

// controllerName is also the finalizer of groups; it is there from the group's
// first moment, so that no deletion can overtake the controller.
const controllerName = "resource-groups"

const (
	actionGroupRead   = "Microsoft.Resources/subscriptions/resourceGroups/read"
	actionGroupWrite  = "Microsoft.Resources/subscriptions/resourceGroups/write"
	actionGroupDelete = "Microsoft.Resources/subscriptions/resourceGroups/delete"
)

// Contents is one kind of thing that can be in a resource group. The
// capabilities' resources are adapted to it where the server is composed.
type Contents interface {
	// List returns the resources of a subscription, of one group only if group
	// is not empty. Resources that are being deleted count. It decides nothing
	// about access.
	List(ctx context.Context, subscription, group string) ([]Resource, error)
	// Delete asks for the deletion of a resource that List returned. It may be
	// asked again; an absent resource is no error; the resource may go later.
	Delete(ctx context.Context, r Resource) error
}

// GroupScope is the ARM id of a group.
func GroupScope(subscription, group string) string {
	return arm.ID{Subscription: subscription, ResourceGroup: group}.String()
}

// PutGroup makes a group, or replaces the tags of one. Its location cannot change.
func (s *Service) PutGroup(ctx context.Context, g Group) (out *GroupObject, created bool, err error) {
	if err := checkGroupName(g.Name); err != nil {
		return nil, false, err
	}
	if g.Location, err = NormalizeLocation(g.Location); err != nil {
		return nil, false, err
	}
	if err := checkTags(g.Tags); err != nil {
		return nil, false, err
	}
	op := access.Op{Action: actionGroupWrite, Resource: GroupScope(g.Subscription, g.Name)}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if err := Require(tx, g.Subscription, "", ""); err != nil {
			return err
		}
		old, err := Groups.Lookup(tx, groupID(g.Subscription, g.Name))
		if err != nil {
			return err
		}
		if created = old == nil; created {
			out = &GroupObject{Meta: store.Meta{ID: groupID(g.Subscription, g.Name), Finalizers: []string{controllerName}}, Spec: g}
			return Groups.Insert(tx, out)
		}
		if err := Require(tx, g.Subscription, g.Name, ""); err != nil {
			return err
		}
		if old.Spec.Location != g.Location {
			return fault.New(fault.Conflict, "InvalidResourceGroupLocation",
				"Invalid resource group location '%s'. The Resource group already exists in location '%s'.", g.Location, old.Spec.Location).At("location")
		}
		old.Spec.Tags, old.Spec.ManagedBy, out = g.Tags, g.ManagedBy, old
		return Groups.Put(tx, old)
	})
	return out, created, err
}

// TagGroup replaces the tags of a group; nil leaves them as they are.
func (s *Service) TagGroup(ctx context.Context, subscription, name string, tags map[string]string) (out *GroupObject, err error) {
	if err := checkTags(tags); err != nil {
		return nil, err
	}
	op := access.Op{Action: actionGroupWrite, Resource: GroupScope(subscription, name)}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if err := Require(tx, subscription, name, ""); err != nil {
			return err
		}
		if out, err = lookupGroup(tx, subscription, name); err != nil {
			return err
		}
		if tags != nil {
			out.Spec.Tags = tags
		}
		return Groups.Put(tx, out)
	})
	return out, err
}

// Group returns a group, fault.NotFound if there is none.
func (s *Service) Group(ctx context.Context, subscription, name string) (*GroupObject, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionGroupRead, Resource: GroupScope(subscription, name)}); err != nil {
		return nil, err
	}
	tx := s.cfg.Store.View(ctx)
	if _, err := lookup(tx, subscription); err != nil {
		return nil, err
	}
	return lookupGroup(tx, subscription, name)
}

// ListGroups returns the groups of a subscription that the caller may read, by name.
func (s *Service) ListGroups(ctx context.Context, subscription string) ([]*GroupObject, error) {
	tx := s.cfg.Store.View(ctx)
	all, err := Groups.List(tx, strings.ToLower(subscription)+"/")
	if err != nil {
		return nil, err
	}
	op := access.Op{Action: actionGroupRead, Resource: Scope(subscription)}
	out, err := visible(ctx, s.cfg.Gate, op, all, func(g *GroupObject) access.Op {
		return access.Op{Action: actionGroupRead, Resource: GroupScope(g.Spec.Subscription, g.Spec.Name)}
	})
	if err != nil {
		return nil, err
	}
	_, err = lookup(tx, subscription)
	return out, err
}

// visible returns what the caller may see of a listing: all of it if op is
// allowed; otherwise those items that are allowed one by one; and op's refusal
// if there are none. The answer is on record before it is given.
func visible[T any](ctx context.Context, gate *access.Gate, op access.Op, all []T, of func(T) access.Op) ([]T, error) {
	if gate.Can(ctx, op) == nil {
		return all, gate.Read(ctx, op)
	}
	var out []T
	for _, v := range all {
		err := gate.Can(ctx, of(v))
		switch fault.KindOf(err) {
		case fault.Denied, fault.Unauthenticated:
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	if len(out) == 0 {
		return nil, gate.Read(ctx, op)
	}
	c, _ := access.From(ctx)
	op.Detail = fmt.Sprintf("%d of %d", len(out), len(all))
	return out, gate.Record(ctx, c.Principal, op, nil)
}

// DeleteGroup asks for the deletion of a group with all that is in it, and
// returns the group; nil if there is none. [Service.GroupGone] says when it is done.
func (s *Service) DeleteGroup(ctx context.Context, subscription, name string) (out *GroupObject, err error) {
	op := access.Op{Action: actionGroupDelete, Resource: GroupScope(subscription, name)}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if _, err := lookup(tx, subscription); err != nil {
			return err
		}
		if out, err = Groups.Lookup(tx, groupID(subscription, name)); err != nil || out == nil {
			return err
		}
		return Groups.Delete(tx, out.ID)
	})
	return out, err
}

// GroupGone reports whether the group that had this UID is gone. A group of the
// same name that was made since does not count. The caller must be able to see the subscription.
func (s *Service) GroupGone(ctx context.Context, subscription, name, uid string) (bool, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionSubscriptionRead, Resource: Scope(subscription), Detail: "deletion of " + name}); err != nil {
		return false, err
	}
	o, err := Groups.Lookup(s.cfg.Store.View(ctx), groupID(subscription, name))
	if err != nil {
		return false, err
	}
	return o == nil || o.UID != uid, nil
}

// Controller deletes what is in groups that are being deleted.
func (s *Service) Controller() reconcile.Controller[Group, struct{}] {
	return reconcile.Controller[Group, struct{}]{Name: controllerName, Objects: Groups, Reconciler: groupReconciler{s.cfg.Contents}}
}

type groupReconciler struct{ contents []Contents }

// Reconcile has nothing to do: a group is there when it is stored.
func (groupReconciler) Reconcile(context.Context, *store.Store, *GroupObject) (reconcile.Result, error) {
	return reconcile.Result{}, nil
}

// Finalize asks for the deletion of all that is inside, and is done when a look finds nothing.
func (r groupReconciler) Finalize(ctx context.Context, s *store.Store, g *GroupObject) (bool, reconcile.Result, error) {
	left := 0
	for _, c := range r.contents {
		list, err := c.List(ctx, g.Spec.Subscription, g.Spec.Name)
		if err != nil {
			return false, reconcile.Result{}, fmt.Errorf("listing what is in the group: %w", err)
		}
		left += len(list)
		for _, res := range list {
			if err := c.Delete(ctx, res); err != nil {
				return false, reconcile.Result{}, fmt.Errorf("deleting %s: %w", res.ID, err)
			}
		}
	}
	if left > 0 {
		g.SetCondition(store.Condition{
			Type: "Deleting", Status: true, Reason: "WaitingForResources",
			Message: fmt.Sprintf("%d resources are still there", left),
		}, time.Now().UTC())
		return false, reconcile.Result{After: time.Second}, nil
	}
	scope := GroupScope(g.Spec.Subscription, g.Spec.Name)
	if err := s.Update(ctx, func(tx *store.Tx) error { return access.RemoveScope(tx, scope) }); err != nil {
		return false, reconcile.Result{}, fmt.Errorf("removing role assignments: %w", err)
	}
	return true, reconcile.Result{}, nil
}

func groupID(subscription, name string) string { return strings.ToLower(subscription + "/" + name) }

func lookupGroup(tx *store.Tx, subscription, name string) (*GroupObject, error) {
	g, err := Groups.Lookup(tx, groupID(subscription, name))
	if err != nil {
		return nil, err
	}
	if g == nil {
		return nil, fault.New(fault.NotFound, "ResourceGroupNotFound", "Resource group '%s' could not be found.", name).
			WithFix("az group create --name %s --location westus2 --subscription %s", name, subscription)
	}
	return g, nil
}

// checkGroupName checks Azure's rule: 1 to 90 letters, digits, '_', '-', '.', '(' and ')', not ending in a period.
func checkGroupName(name string) error {
	runes := []rune(name)
	bad := slices.ContainsFunc(runes, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("_-.()", r)
	})
	if bad || len(runes) == 0 || len(runes) > 90 || strings.HasSuffix(name, ".") {
		return fault.New(fault.Invalid, "InvalidResourceGroup",
			"The resource group name '%s' is not valid: 1 to 90 letters, digits, '_', '-', '.', '(' and ')', not ending in a period.", name).At("name")
	}
	return nil
}

// checkTags checks Azure's limits on tags: at most 50, names at most 512 and
// values at most 256 characters.
func checkTags(tags map[string]string) error {
	if len(tags) > 50 {
		return fault.New(fault.Invalid, "InvalidTags", "There are %d tags; at most 50 are possible.", len(tags)).At("tags")
	}
	for k, v := range tags {
		if k == "" || len(k) > 512 || len(v) > 256 || strings.ContainsAny(k, `<>%&\?/`) {
			return fault.New(fault.Invalid, "InvalidTagNameCharacters",
				"The tag '%.64s' is not valid: names have 1 to 512 characters without <>%%&\\?/, values at most 256.", k).At("tags")
		}
	}
	return nil
}
