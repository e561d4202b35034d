package identity

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Issuers checks signatures of tokens that were made elsewhere.
type Issuers interface {
	// Verify checks that a compact JWS was signed with a key that the issuer
	// publishes at its URL, or that the cluster publishes if one is named, and returns
	// its payload. It is fault.Unauthenticated for a wrong signature and an unknown
	// key, fault.Unavailable if the keys could not be got.
	Verify(ctx context.Context, issuer, cluster, jws string) (payload []byte, err error)
}

// assertion is what is read of a client assertion (RFC 7523).
type assertion struct {
	issuer, subject string
	audiences       []string
	notBefore       time.Time
	expires         time.Time
	claims          map[string]any
}

const maxAssertion = 16 << 10 // bytes of a client assertion

// federate finds the managed identity of a client id and the federated credential
// that lets the bearer of an assertion act as it.
//
// The order protects us and helps the caller: an issuer is asked for its keys only
// if a credential of this very identity names it, so strangers cannot make this
// server connect anywhere; and what the credentials expect is told only to the
// bearer of a genuine token of that issuer.
func (s *Service) federate(ctx context.Context, c Credentials) (Identity, *FederatedObject, error) {
	if err := s.checkTenant(c.Tenant); err != nil {
		return Identity{}, nil, err
	}
	tx := s.cfg.Store.View(ctx)
	who, trusted, err := s.trusts(ctx, tx, c.ClientID)
	if err != nil {
		return who, nil, err
	}
	claimed, err := readAssertion(c.Assertion)
	if err != nil {
		return who, nil, err
	}
	sameIssuer := slices.DeleteFunc(slices.Clone(trusted), func(o *FederatedObject) bool { return o.Spec.Issuer != claimed.issuer })
	if len(sameIssuer) == 0 {
		return who, nil, mismatch("AADSTS700211", "issuer", claimed, fmt.Sprintf("none of the %d federated credentials of the identity trusts it", len(trusted)))
	}
	payload, sameSource, err := s.genuine(ctx, sameIssuer, c.Assertion)
	if err != nil {
		return who, nil, notGenuine(claimed, err)
	}
	genuine, err := decodeAssertion(payload)
	if err != nil {
		return who, nil, err
	}
	if err := genuine.checkTimes(s.cfg.Now()); err != nil {
		return who, nil, err
	}
	o, err := genuine.choose(sameSource)
	return who, o, err
}

// genuine checks the signature of an assertion. Several clusters may call their
// issuer the same (kubeadm's all do), so the keys of each that is trusted are
// tried; what comes back are the credentials that trust the one that has signed.
func (s *Service) genuine(ctx context.Context, trusted []*FederatedObject, jws string) (payload []byte, by []*FederatedObject, err error) {
	clusters := map[string][]*FederatedObject{}
	for _, o := range trusted {
		clusters[o.Spec.Cluster] = append(clusters[o.Spec.Cluster], o)
	}
	for _, cluster := range slices.Sorted(maps.Keys(clusters)) {
		payload, problem := s.cfg.Issuers.Verify(ctx, trusted[0].Spec.Issuer, cluster, jws)
		if problem == nil {
			return payload, clusters[cluster], nil
		}
		if err == nil || fault.KindOf(err) == fault.Unauthenticated { // what could not be decided counts for more
			err = problem
		}
	}
	return nil, nil, err
}

// trusts finds the managed identity of a client id and its federated credentials.
func (s *Service) trusts(ctx context.Context, tx *store.Tx, clientID string) (Identity, []*FederatedObject, error) {
	who, err := s.Find(ctx, Selector{ClientID: clientID})
	if fault.KindOf(err) == fault.NotFound {
		app, lookupErr := Applications.Lookup(tx, strings.ToLower(clientID))
		if lookupErr != nil {
			return who, nil, lookupErr
		}
		if app != nil {
			return who, nil, fault.New(fault.Unauthenticated, "invalid_client",
				"The client '%s' is an application; federated credentials belong to managed identities.", clip(clientID)).
				WithInner("AADSTS70025").WithFix("use the client id of a managed identity, or the application's client secret")
		}
		return who, nil, fault.New(fault.Invalid, "unauthorized_client",
			"Application with identifier '%s' was not found in the directory 'Keyfleet'. This can happen if the application has not been installed by the administrator of the tenant.",
			clip(clientID)).WithInner("AADSTS700016").WithFix("check the client id (the annotation azure.workload.identity/client-id of the service account): keyfleet identity list")
	}
	if err != nil {
		return who, nil, err
	}
	id, err := parseIdentityID(who.ID)
	if err != nil {
		return who, nil, err
	}
	all, err := FederatedCredentials.List(tx, id.StoreKey()+"/")
	if err == nil && len(all) == 0 {
		err = fault.New(fault.Unauthenticated, "invalid_client", "The client '%s' (%s) has no configured federated identity credentials.", who.ClientID, id.Name()).
			WithInner("AADSTS70025").WithFix("keyfleet identity federated-credential create NAME --identity %s --issuer URL --subject SUBJECT", id.Name())
	}
	return who, all, err
}

// readAssertion reads what an assertion says, without believing it.
func readAssertion(jws string) (assertion, error) {
	parts := strings.Split(jws, ".")
	if len(jws) > maxAssertion || len(parts) != 3 {
		return assertion{}, badAssertion("it is not a signed JWT of at most %d bytes", maxAssertion)
	}
	payload, err := base64.RawURLEncoding.Strict().DecodeString(parts[1])
	if err != nil {
		return assertion{}, badAssertion("its payload is not base64url")
	}
	return decodeAssertion(payload)
}

// decodeAssertion decodes the payload of a JWT (RFC 7519). aud is one text or a list.
func decodeAssertion(payload []byte) (assertion, error) {
	a := assertion{}
	if err := json.Unmarshal(payload, &a.claims); err != nil {
		return a, badAssertion("its payload is not a JSON object")
	}
	a.issuer, _ = a.claims["iss"].(string)
	a.subject, _ = a.claims["sub"].(string)
	switch aud := a.claims["aud"].(type) {
	case string:
		a.audiences = []string{aud}
	case []any:
		for _, v := range aud {
			if text, ok := v.(string); ok {
				a.audiences = append(a.audiences, text)
			}
		}
	}
	a.expires, a.notBefore = moment(a.claims["exp"]), moment(a.claims["nbf"])
	for claim, missing := range map[string]bool{"iss": a.issuer == "", "sub": a.subject == "", "aud": len(a.audiences) == 0, "exp": a.expires.IsZero()} {
		if missing {
			return a, badAssertion("it has no claim '%s'", claim)
		}
	}
	return a, nil
}

// moment turns a NumericDate (RFC 7519, section 2) into a time; zero where there is none.
func moment(v any) time.Time {
	n, ok := v.(float64)
	if !ok || n <= 0 || n > 1<<40 {
		return time.Time{}
	}
	return time.Unix(int64(n), 0)
}

func (a assertion) checkTimes(now time.Time) error {
	if now.Before(a.expires) && !now.Add(clockSkew).Before(a.notBefore) {
		return nil
	}
	return fault.New(fault.Unauthenticated, "invalid_client",
		"Client assertion is not within its valid time range. Current time: %s, assertion valid from %s, expiry time of assertion %s.",
		stamp(now), stamp(a.notBefore), stamp(a.expires)).
		WithInner("AADSTS700024").WithFix("read the token from its file each time: the kubelet replaces it; and compare the clocks")
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "(not said)"
	}
	return t.UTC().Format(time.RFC3339)
}

// choose finds the credential that an assertion of its issuer fulfils. Where none
// does, the error is about the part that stands in the way of the nearest.
func (a assertion) choose(trusted []*FederatedObject) (*FederatedObject, error) {
	var subjects, audiences []string
	for _, o := range trusted {
		subjectFits := o.Spec.Subject == a.subject
		if o.Spec.Expression != "" {
			e, err := parseExpression(o.Spec.Expression)
			if err != nil {
				return nil, err
			}
			subjectFits = e.matches(a.claims)
		}
		if !subjectFits {
			subjects = append(subjects, quote(o.Spec.Subject+o.Spec.Expression))
			continue
		}
		if slices.ContainsFunc(o.Spec.Audiences, func(want string) bool { return slices.Contains(a.audiences, want) }) {
			return o, nil
		}
		audiences = append(audiences, quote(strings.Join(o.Spec.Audiences, "', '")))
	}
	if len(audiences) > 0 {
		return nil, mismatch("AADSTS700212", "audience", a, "expected is "+list(audiences))
	}
	return nil, mismatch("AADSTS700213", "subject", a, "expected is "+list(subjects))
}

// mismatch is the answer to an assertion that no federated credential fits. It
// repeats the three things that have to be equal, so that they can be compared.
func mismatch(aadsts, part string, a assertion, why string) error {
	return fault.New(fault.Unauthenticated, "invalid_client",
		"No matching federated identity record found for presented assertion: the %s differs; %s. Assertion Issuer: '%s'. Assertion Subject: '%s'. Assertion Audience: '%s'.",
		part, why, clip(a.issuer), clip(a.subject), clip(strings.Join(a.audiences, "', '"))).
		WithInner(aadsts).WithFix("make them equal to the letter: keyfleet identity federated-credential list --identity NAME")
}

// notGenuine is the answer where the signature could not be accepted.
func notGenuine(a assertion, err error) error {
	if fault.KindOf(err) == fault.Unauthenticated {
		return fault.New(fault.Unauthenticated, "invalid_client", "Client assertion contains an invalid signature: %s Assertion Issuer: '%s'.", fault.From(err).Message, clip(a.issuer)).
			WithInner("AADSTS700027").WithFix("the token must come from that issuer, of the cluster that runs now; after a rotation of its keys, read the token again").Because(err)
	}
	return fault.New(fault.Unavailable, "temporarily_unavailable", "Request to External OIDC endpoint failed: %s Assertion Issuer: '%s'.", fault.From(err).Message, clip(a.issuer)).
		WithInner("AADSTS90061").WithFix("the issuer's discovery document must be reachable from this server").Because(err)
}

func badAssertion(why string, args ...any) error {
	return fault.New(fault.Unauthenticated, "invalid_client", "Client assertion is malformed: "+why+".", args...).
		WithInner("AADSTS50027").WithFix("send the content of the file that AZURE_FEDERATED_TOKEN_FILE names, and nothing else")
}

func quote(s string) string { return "'" + s + "'" }

// list joins what was expected, not more than a person reads.
func list(all []string) string {
	const most = 3
	slices.Sort(all)
	if len(all) > most {
		return strings.Join(all[:most], " or ") + fmt.Sprintf(" or one of %d more", len(all)-most)
	}
	return strings.Join(all, " or ")
}

// byFederation gives a token of a managed identity to the bearer of a token of
// another issuer that the identity trusts.
func (s *Service) byFederation(ctx context.Context, c Credentials) (Token, error) {
	who, credential, err := s.federate(ctx, c)
	audience := ""
	if err == nil {
		audience, err = s.requireAudience(c.Resource)
	}
	target, detail := clip(c.ClientID), "for "+clip(c.Resource)
	if who.ID != "" {
		target = who.ID
	}
	if credential != nil {
		claimed, _ := readAssertion(c.Assertion) // it was read before
		detail += " as " + clip(claimed.subject) + " of " + clip(claimed.issuer) + " by " + credential.ID[strings.LastIndexByte(credential.ID, '/')+1:]
	}
	p := access.Principal{Kind: access.ManagedIdentity, Tenant: s.tenant, ClientID: clip(c.ClientID), ObjectID: who.PrincipalID}
	if who.ID != "" {
		p = who.Principal()
	}
	if err := s.cfg.Gate.Record(ctx, p, access.Op{Action: IdentityType + "/token", Resource: target, Detail: detail}, err); err != nil {
		return Token{}, err
	}
	return s.issue(ctx, subject{clientID: who.ClientID, objectID: who.PrincipalID, resourceID: who.ID, lifetime: s.cfg.TokenLifetime}, audience, c.Version)
}

// noIssuers is for a Service that was given none.
type noIssuers struct{}

func (noIssuers) Verify(context.Context, string, string, string) ([]byte, error) {
	return nil, fault.New(fault.Unavailable, "", "This server asks no other issuers.")
}
