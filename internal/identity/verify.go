package identity

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// verified is a token that passed all checks but those that depend on the moment.
type verified struct {
	canonical string // audience
	objectID  string
	notBefore time.Time
	expires   time.Time
}

// existence is what was last seen of a principal.
type existence struct {
	principal access.Principal // zero ObjectID: it does not exist
	read      time.Time
}

const (
	maxTokens    = 8192            // remembered tokens; about 250 bytes each
	maxExisting  = 8192            // remembered principals
	principalTTL = 3 * time.Second // after this long a principal is looked up again
	maxTokenSize = 8 << 10
)

// Verify checks a token and that its principal still exists, and returns the
// principal. audiences are the resources that the called surface stands for; the
// token must be for one of them or an alias of one. Errors are
// fault.Unauthenticated, or fault.Unavailable where it cannot be decided.
func (s *Service) Verify(ctx context.Context, token string, audiences []string) (access.Principal, error) {
	if len(token) > maxTokenSize {
		return access.Principal{}, invalidToken("it is longer than %d bytes", maxTokenSize)
	}
	now := s.cfg.Now()
	hash := sha256.Sum256([]byte(token))
	s.mu.RLock()
	v, known := s.tokens[hash]
	s.mu.RUnlock()
	if !known {
		var err error
		if v, err = s.parse(ctx, token); err != nil {
			return access.Principal{}, err
		}
	}
	if err := s.checkMoment(v, now, audiences); err != nil {
		return access.Principal{}, err
	}
	if !known {
		s.remember(hash, v, now)
	}
	return s.principal(ctx, v.objectID, now)
}

// checkMoment checks what may change between two uses of a token.
func (s *Service) checkMoment(v verified, now time.Time, audiences []string) error {
	switch {
	case !now.Before(v.expires):
		return fault.New(fault.Unauthenticated, "ExpiredAuthenticationToken", "The access token expired at %s.", v.expires.UTC().Format(time.RFC3339)).
			WithFix("get a new token: log in again")
	case now.Add(clockSkew).Before(v.notBefore):
		return invalidToken("it is valid only from %s; the clocks of client and server differ", v.notBefore.UTC().Format(time.RFC3339))
	}
	for _, a := range audiences {
		c, ok := s.canonical(a)
		if !ok {
			c = normalize(a)
		}
		if c == v.canonical {
			return nil
		}
	}
	return fault.New(fault.Unauthenticated, "InvalidAuthenticationTokenAudience",
		"The access token has been obtained for wrong audience or resource '%s'. It should be one of: %s.", v.canonical, strings.Join(audiences, ", "))
}

// header is the only header that a token of ours has. Any further member
// (crit, jku, jwk, x5u, ...) makes decoding fail.
type header struct {
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid"`
	Type      string `json:"typ"`
}

// parse checks form, header, signature, issuer and tenant of a token.
func (s *Service) parse(ctx context.Context, token string) (verified, error) {
	signed, sigText, ok := cutLast(token)
	headText, bodyText, ok2 := strings.Cut(signed, ".")
	if !ok || !ok2 || strings.Contains(bodyText, ".") {
		return verified{}, invalidToken("it is not a signed JWT")
	}
	var h header
	if err := decodePart(headText, &h, jsonstrict.Decode); err != nil {
		return verified{}, invalidToken("its header is not one that this server makes")
	}
	if h.Algorithm != "RS256" || h.Type != "JWT" {
		return verified{}, invalidToken("its algorithm or type is not accepted")
	}
	keys, err := s.signingKeys(ctx)
	if err != nil {
		return verified{}, err
	}
	key := keys.parsed[h.KeyID]
	if key == nil {
		return verified{}, invalidToken("its signing key is not known (any more)")
	}
	sig, err := base64.RawURLEncoding.Strict().DecodeString(sigText)
	if err != nil {
		return verified{}, invalidToken("its signature is not base64url")
	}
	sum := sha256.Sum256([]byte(signed))
	if rsa.VerifyPKCS1v15(&key.PublicKey, crypto.SHA256, sum[:], sig) != nil {
		return verified{}, invalidToken("its signature is wrong")
	}
	var c claims
	if err := decodePart(bodyText, &c, jsonstrict.Decode); err != nil {
		return verified{}, invalidToken("its claims are not those that this server makes")
	}
	return s.checkClaims(c)
}

func (s *Service) checkClaims(c claims) (verified, error) {
	issuer := map[string]string{"1.0": s.Issuer(V1), "2.0": s.Issuer(V2)}[c.Version]
	switch {
	case issuer == "" || c.Issuer != issuer || c.Tenant != s.tenant:
		return verified{}, invalidToken("it comes from another issuer")
	case c.ObjectID == "" || c.Subject != c.ObjectID:
		return verified{}, invalidToken("it names no principal")
	case c.Expires == 0 || c.NotBefore == 0:
		return verified{}, invalidToken("it has no times")
	}
	audience, ok := s.canonical(c.Audience)
	if !ok {
		audience = normalize(c.Audience)
	}
	return verified{
		canonical: audience, objectID: strings.ToLower(c.ObjectID),
		notBefore: time.Unix(c.NotBefore, 0), expires: time.Unix(c.Expires, 0),
	}, nil
}

func invalidToken(why string, args ...any) *fault.Error {
	return fault.New(fault.Unauthenticated, "InvalidAuthenticationToken", "The access token is invalid: "+why+".", args...).
		WithFix("log in again")
}

func cutLast(token string) (before, after string, ok bool) {
	i := strings.LastIndexByte(token, '.')
	if i < 0 {
		return "", "", false
	}
	return token[:i], token[i+1:], true
}

func decodePart(text string, v any, decode func([]byte, any) error) error {
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return err
	}
	return decode(b, v)
}

// remember keeps a verified token. When the cache is full, expired tokens go
// first and then any: losing one costs a signature check.
func (s *Service) remember(hash [32]byte, v verified, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.tokens) >= maxTokens {
		for h, old := range s.tokens {
			if !now.Before(old.expires) {
				delete(s.tokens, h)
			}
		}
		for h := range s.tokens {
			if len(s.tokens) < maxTokens*7/8 {
				break
			}
			delete(s.tokens, h)
		}
	}
	s.tokens[hash] = v
}

// principal returns the principal if it exists; what was read is used for principalTTL.
func (s *Service) principal(ctx context.Context, objectID string, now time.Time) (access.Principal, error) {
	s.mu.RLock()
	e, ok := s.existing[objectID]
	s.mu.RUnlock()
	if !ok || now.Sub(e.read) >= principalTTL || now.Before(e.read) {
		var err error
		if e, err = s.lookupPrincipal(ctx, objectID, now); err != nil {
			return access.Principal{}, err
		}
	}
	if e.principal.ObjectID == "" {
		return access.Principal{}, invalidToken("its principal does not exist any more")
	}
	return e.principal, nil
}

func (s *Service) lookupPrincipal(ctx context.Context, objectID string, now time.Time) (existence, error) {
	o, err := Principals.Lookup(s.cfg.Store.View(ctx), objectID)
	if err != nil {
		return existence{}, fault.New(fault.Unavailable, "", "The caller cannot be checked now.").After(time.Second).Because(err)
	}
	e := existence{read: now}
	if o != nil {
		e.principal = access.Principal{Kind: o.Spec.Kind, Tenant: s.tenant, ObjectID: objectID, ClientID: o.Spec.ClientID, Name: o.Spec.Name}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.existing) >= maxExisting {
		clear(s.existing) // each comes back with one read
	}
	s.existing[objectID] = e
	return e, nil
}

// forget drops what is remembered of a principal that was just deleted here;
// other servers notice when principalTTL is over.
func (s *Service) forget(objectID string) {
	s.mu.Lock()
	delete(s.existing, strings.ToLower(objectID))
	s.mu.Unlock()
}
