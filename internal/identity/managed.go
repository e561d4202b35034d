package identity

import (
	"context"
	"regexp"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// IdentityType is the ARM type of user-assigned managed identities.
const IdentityType = "Microsoft.ManagedIdentity/userAssignedIdentities"

// Identity is the spec of a user-assigned managed identity.
type Identity struct {
	ID          string            `json:"id"` // ARM id, the creator's casing
	Location    string            `json:"location"`
	Tags        map[string]string `json:"tags,omitempty"`
	Tenant      string            `json:"tenantId"`
	PrincipalID string            `json:"principalId"` // object id
	ClientID    string            `json:"clientId"`
}

// Principal is the caller that a token of the identity makes.
func (i Identity) Principal() access.Principal {
	return access.Principal{Kind: access.ManagedIdentity, Tenant: i.Tenant, ObjectID: i.PrincipalID, ClientID: i.ClientID, Name: i.ID[strings.LastIndexByte(i.ID, '/')+1:]}
}

// IdentityObject is a stored managed identity.
type IdentityObject = store.Object[Identity, struct{}]

// Identities is the collection of managed identities; ids are "SUBSCRIPTION/GROUP/NAME".
var Identities = store.NewCollection[Identity, struct{}]("identities")

const (
	actionIdentityRead   = IdentityType + "/read"
	actionIdentityWrite  = IdentityType + "/write"
	actionIdentityDelete = IdentityType + "/delete"
	actionIdentityAssign = IdentityType + "/assign/action"
	actionSetClientID    = "Keyfleet/identities/setClientId"
)

// Azure's rule for names of identities, and ours for client ids that an
// administrator chooses: documented request bodies hold some that are not quite GUIDs.
var (
	identityName   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_-]{2,127}$`)
	chosenClientID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9-]{7,63}$`)
)

// PutIdentity makes a managed identity or replaces its tags. want.ID must name
// an identity; want.Location is normalised by the caller. A want.ClientID that
// differs from what is there must be new, and setting it needs
// Keyfleet/identities/setClientId at the identity.
func (s *Service) PutIdentity(ctx context.Context, want Identity) (out *IdentityObject, created bool, err error) {
	id, err := parseIdentityID(want.ID)
	if err != nil {
		return nil, false, err
	}
	if !identityName.MatchString(id.Name()) {
		return nil, false, fault.New(fault.Invalid, "InvalidResourceName",
			"The identity name '%.128s' is not valid: 3 to 128 letters, digits, '-' and '_', the first a letter or digit.", id.Name()).At("name")
	}
	if err := checkTags(want.Tags); err != nil {
		return nil, false, err
	}
	if err := s.maySetClientID(ctx, id, want.ClientID); err != nil {
		return nil, false, err
	}
	op := access.Op{Action: actionIdentityWrite, Resource: id.String()}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if s.cfg.Place != nil {
			if err := s.cfg.Place(tx, id.Subscription, id.ResourceGroup); err != nil {
				return err
			}
		}
		old, err := Identities.Lookup(tx, id.StoreKey())
		if err != nil {
			return err
		}
		if created = old == nil; created {
			out, err = s.insertIdentity(tx, id, want)
			return err
		}
		out = old
		return updateIdentity(tx, out, want)
	})
	return out, created, err
}

func (s *Service) insertIdentity(tx *store.Tx, id arm.ID, want Identity) (*IdentityObject, error) {
	spec := Identity{
		ID: id.String(), Location: want.Location, Tags: want.Tags,
		Tenant: s.tenant, PrincipalID: newGUID(), ClientID: want.ClientID,
	}
	if spec.ClientID == "" {
		spec.ClientID = newGUID()
	}
	o := &IdentityObject{Meta: store.Meta{ID: id.StoreKey()}, Spec: spec}
	err := insertPrincipal(tx, spec.PrincipalID, Principal{Kind: access.ManagedIdentity, ClientID: spec.ClientID, Name: id.Name(), Ref: o.ID})
	if err != nil {
		return nil, err
	}
	return o, Identities.Insert(tx, o)
}

func updateIdentity(tx *store.Tx, o *IdentityObject, want Identity) error {
	if want.Location != o.Spec.Location {
		return fault.New(fault.Conflict, "InvalidResourceLocation",
			"The resource '%s' already exists in location '%s'. A resource with the same name cannot be created in location '%s'.", o.Spec.ID, o.Spec.Location, want.Location).At("location")
	}
	if want.ClientID != "" && !strings.EqualFold(want.ClientID, o.Spec.ClientID) {
		return fault.New(fault.Conflict, "PropertyChangeNotAllowed", "The client id of the identity is '%s' and cannot be changed.", o.Spec.ClientID).
			At("properties.clientId").WithFix("delete the identity and make it again")
	}
	o.Spec.Tags = want.Tags
	return Identities.Put(tx, o)
}

// maySetClientID checks a client id that the caller chose. Sending back the one
// that is there is no choice.
func (s *Service) maySetClientID(ctx context.Context, id arm.ID, clientID string) error {
	if clientID == "" {
		return nil
	}
	if !chosenClientID.MatchString(clientID) {
		return fault.New(fault.Invalid, "InvalidClientId", "The client id '%.64s' is not usable: 8 to 64 letters, digits and '-'.", clientID).At("properties.clientId")
	}
	old, err := Identities.Lookup(s.cfg.Store.View(ctx), id.StoreKey())
	if err != nil {
		return err
	}
	if old != nil && strings.EqualFold(old.Spec.ClientID, clientID) {
		return nil
	}
	return s.cfg.Gate.Read(ctx, access.Op{Action: actionSetClientID, Resource: id.String(), Detail: clientID})
}

// TagIdentity replaces the tags of an identity; nil leaves them as they are.
func (s *Service) TagIdentity(ctx context.Context, resourceID string, tags map[string]string) (out *IdentityObject, err error) {
	id, err := parseIdentityID(resourceID)
	if err != nil {
		return nil, err
	}
	if err := checkTags(tags); err != nil {
		return nil, err
	}
	op := access.Op{Action: actionIdentityWrite, Resource: id.String()}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if out, err = lookupIdentity(tx, id); err != nil {
			return err
		}
		if tags != nil {
			out.Spec.Tags = tags
		}
		return Identities.Put(tx, out)
	})
	return out, err
}

// Identity returns a managed identity, fault.NotFound if there is none.
func (s *Service) Identity(ctx context.Context, resourceID string) (*IdentityObject, error) {
	id, err := parseIdentityID(resourceID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionIdentityRead, Resource: id.String()}); err != nil {
		return nil, err
	}
	return lookupIdentity(s.cfg.Store.View(ctx), id)
}

// ListIdentities returns the identities of a subscription, of one group only if
// group is not empty, by name.
func (s *Service) ListIdentities(ctx context.Context, subscription, group string) ([]*IdentityObject, error) {
	scope := arm.ID{Subscription: subscription, ResourceGroup: group}.String()
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionIdentityRead, Resource: scope}); err != nil {
		return nil, err
	}
	return s.IdentitiesIn(ctx, subscription, group)
}

// IdentitiesIn is ListIdentities without a decision: for listings over all
// providers and for the deletion of a group, which decide themselves.
func (s *Service) IdentitiesIn(ctx context.Context, subscription, group string) ([]*IdentityObject, error) {
	prefix := strings.ToLower(subscription) + "/"
	if group != "" {
		prefix += strings.ToLower(group) + "/"
	}
	return Identities.List(s.cfg.Store.View(ctx), prefix)
}

// DeleteIdentity deletes an identity with its role assignments and federated
// credentials; its tokens die within 5 seconds. It reports whether there was one.
func (s *Service) DeleteIdentity(ctx context.Context, resourceID string) (existed bool, err error) {
	id, err := parseIdentityID(resourceID)
	if err != nil {
		return false, err
	}
	op := access.Op{Action: actionIdentityDelete, Resource: id.String()}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		o, err := Identities.Lookup(tx, id.StoreKey())
		if existed = o != nil; err != nil || o == nil {
			return err
		}
		if err := s.removePrincipal(tx, o.Spec.PrincipalID, o.Spec.ClientID); err != nil {
			return err
		}
		if err := removeFederated(tx, o.ID); err != nil {
			return err
		}
		return Identities.Delete(tx, o.ID)
	})
	return existed, err
}

// RequireAssign fails unless the caller may put each of the identities on
// something: Microsoft.ManagedIdentity/userAssignedIdentities/assign/action.
func (s *Service) RequireAssign(ctx context.Context, resourceIDs ...string) error {
	for _, r := range resourceIDs {
		id, err := parseIdentityID(r)
		if err != nil {
			return err
		}
		if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionIdentityAssign, Resource: id.String()}); err != nil {
			return err
		}
	}
	return nil
}

// Resolve returns the identity that a resource id names. It decides nothing
// about access: a capability resolves the identities of its own resources. An
// identity in a subscription that this tenant does not have is fault.Invalid,
// an absent one fault.NotFound.
func (s *Service) Resolve(ctx context.Context, resourceID string) (Identity, error) {
	id, err := parseIdentityID(resourceID)
	if err != nil {
		return Identity{}, err
	}
	tx := s.cfg.Store.View(ctx)
	o, err := lookupIdentity(tx, id)
	if err == nil {
		return o.Spec, nil
	}
	if fault.KindOf(err) == fault.NotFound && s.cfg.Place != nil && fault.KindOf(s.cfg.Place(tx, id.Subscription, "")) == fault.NotFound {
		return Identity{}, fault.New(fault.Invalid, "IdentityOfAnotherTenant",
			"The identity '%s' is in subscription '%s', which does not belong to this tenant (%s). Only identities of the same tenant can be used.", resourceID, id.Subscription, s.tenant).
			At(resourceID).WithFix("make the identity in a subscription of this tenant, or create that subscription here first")
	}
	return Identity{}, err
}

// Selector names one managed identity. The first field that is set counts.
type Selector struct{ ResourceID, ClientID, ObjectID string }

// TokenFor gives a token of a managed identity for a resource, in the shape of
// the metadata service. The caller has made sure that the identity is on the
// node that asks; ctx carries that node, and the record names both.
func (s *Service) TokenFor(ctx context.Context, sel Selector, resource string) (Token, error) {
	i, err := s.Find(ctx, sel)
	audience := ""
	if err == nil {
		audience, err = s.requireAudience(resource)
	}
	c, _ := access.From(ctx)
	target := i.ID
	if target == "" {
		target = clip(sel.ResourceID + sel.ClientID + sel.ObjectID)
	}
	if err := s.cfg.Gate.Record(ctx, c.Principal, access.Op{Action: IdentityType + "/token", Resource: target, Detail: "for " + clip(resource)}, err); err != nil {
		return Token{}, err
	}
	who := subject{clientID: i.ClientID, objectID: i.PrincipalID, resourceID: i.ID, lifetime: s.cfg.IdentityLifetime}
	return s.issue(ctx, who, audience, V1)
}

// Find returns the identity that a selector names. It decides nothing about access,
// as [Service.Resolve] does not.
func (s *Service) Find(ctx context.Context, sel Selector) (Identity, error) {
	if sel.ResourceID != "" {
		return s.Resolve(ctx, sel.ResourceID)
	}
	tx := s.cfg.Store.View(ctx)
	objectID := sel.ObjectID
	if sel.ClientID != "" {
		c, err := Clients.Lookup(tx, strings.ToLower(sel.ClientID))
		if err != nil {
			return Identity{}, err
		}
		if objectID = ""; c != nil {
			objectID = c.Spec.ObjectID
		}
	}
	if objectID != "" {
		p, err := Principals.Lookup(tx, strings.ToLower(objectID))
		if err != nil {
			return Identity{}, err
		}
		if p != nil && p.Spec.Kind == access.ManagedIdentity {
			o, err := Identities.Lookup(tx, p.Spec.Ref)
			if err != nil {
				return Identity{}, err
			}
			if o != nil {
				return o.Spec, nil
			}
		}
	}
	return Identity{}, fault.New(fault.NotFound, "IdentityNotFound", "Identity not found.")
}

func lookupIdentity(tx *store.Tx, id arm.ID) (*IdentityObject, error) {
	o, err := Identities.Lookup(tx, id.StoreKey())
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fault.New(fault.NotFound, "ResourceNotFound", "The Resource '%s/%s' under resource group '%s' was not found.", IdentityType, id.Name(), id.ResourceGroup).
			WithFix("az identity create --name %s --resource-group %s --subscription %s", id.Name(), id.ResourceGroup, id.Subscription)
	}
	return o, nil
}

// parseIdentityID parses the resource id of an identity and gives it the
// standard casing of provider and type.
func parseIdentityID(s string) (arm.ID, error) {
	id, err := arm.ParseID(s)
	if err != nil || !id.Is(IdentityType) || id.ResourceGroup == "" {
		return arm.ID{}, fault.New(fault.Invalid, "LinkedInvalidPropertyId", "'%.300s' is not the resource id of a user-assigned identity.", s).
			WithFix("/subscriptions/ID/resourceGroups/GROUP/providers/%s/NAME", IdentityType)
	}
	provider, typ, _ := strings.Cut(IdentityType, "/")
	id.Provider, id.Types[0] = provider, typ
	return id, nil
}

func checkTags(tags map[string]string) error {
	bad := len(tags) > 50
	for k, v := range tags {
		bad = bad || k == "" || len(k) > 512 || len(v) > 256
	}
	if bad {
		return fault.New(fault.Invalid, "InvalidTags", "At most 50 tags, names of 1 to 512 and values of at most 256 characters.").At("tags")
	}
	return nil
}
