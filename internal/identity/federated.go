package identity

import (
	"context"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// FederatedType is the ARM type of federated identity credentials, children of
// managed identities.
const FederatedType = IdentityType + "/federatedIdentityCredentials"

// DefaultAudience is the audience of assertions that clients of Azure ask their
// token issuers for.
const DefaultAudience = "api://AzureADTokenExchange"

// Federated is the spec of a federated identity credential: whoever holds a token
// of that issuer, for that audience, about that subject, gets tokens of the
// managed identity. Comparisons are exact, casing and trailing slashes included.
type Federated struct {
	ID     string `json:"id"` // ARM id, the creator's casing
	Issuer string `json:"issuer"`
	// Cluster is the resource id of the registered cluster that is the issuer. Empty:
	// the issuer is asked at its URL. A name is not enough: anybody can give an API
	// server any issuer.
	Cluster   string   `json:"cluster,omitempty"`
	Audiences []string `json:"audiences"`
	// Exactly one of Subject and Expression is set. The expression is text in the
	// language that parseExpression documents.
	Subject    string `json:"subject,omitempty"`
	Expression string `json:"claimsMatchingExpression,omitempty"`
}

// FederatedObject is a stored federated identity credential.
type FederatedObject = store.Object[Federated, struct{}]

// FederatedCredentials is the collection of federated identity credentials; ids
// are "SUBSCRIPTION/GROUP/IDENTITY/NAME".
var FederatedCredentials = store.NewCollection[Federated, struct{}]("federated-credentials")

const (
	actionFederatedRead   = FederatedType + "/read"
	actionFederatedWrite  = FederatedType + "/write"
	actionFederatedDelete = FederatedType + "/delete"

	maxFederated       = 1000 // of one identity; Azure knows 20
	maxFederatedString = 600  // characters of issuer, subject and audience, as in Azure
	maxAudiences       = 10
)

var federatedName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_-]{2,119}$`)

// PutFederated makes or replaces a federated identity credential of an identity
// that is there. No two credentials of one identity may trust the same issuer
// and subject, so that which one let a caller in is never in doubt.
func (s *Service) PutFederated(ctx context.Context, want Federated) (out *FederatedObject, created bool, err error) {
	id, err := parseFederatedID(want.ID)
	if err != nil {
		return nil, false, err
	}
	want.ID = id.String()
	if err := s.takeIssuer(ctx, &want); err != nil {
		return nil, false, err
	}
	if err := want.validate(id.Name()); err != nil {
		return nil, false, err
	}
	op := access.Op{Action: actionFederatedWrite, Resource: id.String(), Detail: "trust " + clip(want.Subject+want.Expression) + " of " + clip(want.Issuer)}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if _, err := lookupIdentity(tx, identityOf(id)); err != nil {
			return err
		}
		siblings, err := FederatedCredentials.List(tx, identityOf(id).StoreKey()+"/")
		if err != nil {
			return err
		}
		if err := want.checkSiblings(id, siblings); err != nil {
			return err
		}
		if out, err = FederatedCredentials.Lookup(tx, id.StoreKey()); err != nil {
			return err
		}
		if created = out == nil; created {
			out = &FederatedObject{Meta: store.Meta{ID: id.StoreKey()}, Spec: want}
			return FederatedCredentials.Insert(tx, out)
		}
		want.ID = out.Spec.ID
		out.Spec = want
		return FederatedCredentials.Put(tx, out)
	})
	return out, created, err
}

// takeIssuer fills in the issuer of a cluster, as it was seen there.
func (s *Service) takeIssuer(ctx context.Context, want *Federated) error {
	if want.Cluster == "" {
		return nil
	}
	if s.cfg.ClusterIssuer == nil {
		return fault.New(fault.Invalid, "InvalidFederatedIdentityCredential", "This server has no clusters.").At("properties.cluster")
	}
	cluster, issuer, err := s.cfg.ClusterIssuer(ctx, want.Cluster)
	if err != nil {
		return err
	}
	if want.Issuer != "" && want.Issuer != issuer {
		return fault.New(fault.Invalid, "InvalidFederatedIdentityCredential", "The issuer of the cluster is '%s', not '%.200s'.", issuer, want.Issuer).
			At("properties.issuer").WithFix("leave the issuer out")
	}
	want.Cluster, want.Issuer = cluster, issuer
	return nil
}

// Federated returns a federated identity credential, fault.NotFound if there is none.
func (s *Service) Federated(ctx context.Context, resourceID string) (*FederatedObject, error) {
	id, err := parseFederatedID(resourceID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionFederatedRead, Resource: id.String()}); err != nil {
		return nil, err
	}
	o, err := FederatedCredentials.Lookup(s.cfg.Store.View(ctx), id.StoreKey())
	if err == nil && o == nil {
		err = fault.New(fault.NotFound, "ResourceNotFound", "The federated identity credential '%s' of the identity '%s' was not found.", id.Name(), identityOf(id).Name())
	}
	return o, err
}

// ListFederated returns the federated identity credentials of an identity, by name.
func (s *Service) ListFederated(ctx context.Context, identityID string) ([]*FederatedObject, error) {
	id, err := parseIdentityID(identityID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionFederatedRead, Resource: id.String()}); err != nil {
		return nil, err
	}
	tx := s.cfg.Store.View(ctx)
	if _, err := lookupIdentity(tx, id); err != nil {
		return nil, err
	}
	return FederatedCredentials.List(tx, id.StoreKey()+"/")
}

// DeleteFederated deletes a federated identity credential and reports whether
// there was one. Tokens that were got with it live until they expire.
func (s *Service) DeleteFederated(ctx context.Context, resourceID string) (existed bool, err error) {
	id, err := parseFederatedID(resourceID)
	if err != nil {
		return false, err
	}
	op := access.Op{Action: actionFederatedDelete, Resource: id.String()}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		o, err := FederatedCredentials.Lookup(tx, id.StoreKey())
		if existed = o != nil; err != nil || o == nil {
			return err
		}
		return FederatedCredentials.Delete(tx, o.ID)
	})
	return existed, err
}

// removeFederated deletes all credentials of an identity that goes.
func removeFederated(tx *store.Tx, identityKey string) error {
	all, err := FederatedCredentials.List(tx, identityKey+"/")
	if err != nil {
		return err
	}
	for _, o := range all {
		if err := FederatedCredentials.Delete(tx, o.ID); err != nil {
			return err
		}
	}
	return nil
}

func (f Federated) validate(name string) error {
	if !federatedName.MatchString(name) {
		return fault.New(fault.Invalid, "InvalidResourceName",
			"The name '%.128s' of the federated identity credential is not valid: 3 to 120 letters, digits, '-' and '_', the first a letter or digit.", name).At("name")
	}
	if err := checkIssuer(f.Issuer); err != nil {
		return err
	}
	if len(f.Audiences) == 0 || len(f.Audiences) > maxAudiences || slices.ContainsFunc(f.Audiences, func(a string) bool { return a == "" || len(a) > maxFederatedString }) {
		return fault.New(fault.Invalid, "InvalidFederatedIdentityCredential", "A federated identity credential has 1 to %d audiences of 1 to %d characters.", maxAudiences, maxFederatedString).
			At("properties.audiences").WithFix(`clients of Azure use ["%s"]`, DefaultAudience)
	}
	switch {
	case (f.Subject == "") == (f.Expression == ""):
		return fault.New(fault.Invalid, "InvalidFederatedIdentityCredential", "Either a subject or a claims matching expression is needed, and not both.").
			At("properties.subject").WithFix("for a Kubernetes service account: system:serviceaccount:NAMESPACE:NAME")
	case len(f.Subject) > maxFederatedString:
		return fault.New(fault.Invalid, "InvalidFederatedIdentityCredential", "The subject is longer than %d characters.", maxFederatedString).At("properties.subject")
	case f.Expression != "":
		_, err := parseExpression(f.Expression)
		return err
	}
	return nil
}

// checkIssuer accepts what OpenID Connect Discovery accepts as an issuer.
func checkIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || len(issuer) > maxFederatedString {
		return fault.New(fault.Invalid, "InvalidFederatedIdentityCredential",
			"The issuer '%.200s' is not an https URL without query and fragment, of at most %d characters.", issuer, maxFederatedString).
			At("properties.issuer").WithFix("a cluster's issuer: kubectl get --raw /.well-known/openid-configuration")
	}
	return nil
}

// checkSiblings compares with the identity's other credentials.
func (f Federated) checkSiblings(id arm.ID, siblings []*FederatedObject) error {
	others := 0
	for _, o := range siblings {
		if o.ID == id.StoreKey() {
			continue
		}
		others++
		if o.Spec.Issuer == f.Issuer && o.Spec.Cluster == f.Cluster && o.Spec.Subject == f.Subject && o.Spec.Expression == f.Expression {
			other, _ := arm.ParseID(o.Spec.ID) // it was parsed when it was stored
			return fault.New(fault.Conflict, "FederatedIdentityCredentialExists",
				"The federated identity credential '%s' has the same issuer and subject. They must be unique on a managed identity.", other.Name()).
				At("properties.subject").WithFix("use that one, or delete it first")
		}
	}
	if others >= maxFederated {
		return fault.New(fault.Conflict, "TooManyFederatedIdentityCredentials", "The identity has %d federated identity credentials already; more are not possible.", others).
			WithFix("one claimsMatchingExpression can stand for many subjects")
	}
	return nil
}

// identityOf is the identity that a federated credential belongs to.
func identityOf(id arm.ID) arm.ID {
	id.Types, id.Names = id.Types[:1], id.Names[:1]
	return id
}

// parseFederatedID parses the resource id of a federated identity credential and
// gives it the standard casing of provider and types.
func parseFederatedID(s string) (arm.ID, error) {
	id, err := arm.ParseID(s)
	if err != nil || !id.Is(FederatedType) || id.ResourceGroup == "" {
		return arm.ID{}, fault.New(fault.Invalid, "LinkedInvalidPropertyId", "'%.300s' is not the resource id of a federated identity credential.", s).
			WithFix("/subscriptions/ID/resourceGroups/GROUP/providers/%s/IDENTITY/federatedIdentityCredentials/NAME", IdentityType)
	}
	parts := strings.Split(FederatedType, "/")
	id.Provider, id.Types = parts[0], parts[1:]
	return id, nil
}
