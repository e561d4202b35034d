package identity

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Version is the shape of a token: which claims carry what.
type Version int

// The token versions, by the endpoint that was asked. The metadata service answers V1.
const (
	V1 Version = 1
	V2 Version = 2
)

// Token is an access token that was just made.
type Token struct {
	Value     Secret
	Resource  string // as asked for
	ClientID  string
	ObjectID  string
	NotBefore time.Time
	Expires   time.Time
	Lifetime  time.Duration
}

// claims is the content of an access token. The names are those of the v1 and
// v2 access tokens of Microsoft Entra ID; appid, appidacr, idp and uti's kin are
// of one version each.
type claims struct {
	Audience   string `json:"aud"`
	Issuer     string `json:"iss"`
	IssuedAt   int64  `json:"iat"`
	NotBefore  int64  `json:"nbf"`
	Expires    int64  `json:"exp"`
	AppID      string `json:"appid,omitempty"`    // v1
	AppIDACR   string `json:"appidacr,omitempty"` // v1: "1" a secret, "2" a certificate
	AZP        string `json:"azp,omitempty"`      // v2
	AZPACR     string `json:"azpacr,omitempty"`   // v2
	IDP        string `json:"idp,omitempty"`      // v1
	IDType     string `json:"idtyp,omitempty"`
	ObjectID   string `json:"oid"`
	Subject    string `json:"sub"`
	Tenant     string `json:"tid"`
	UTI        string `json:"uti"`
	Version    string `json:"ver"`
	ResourceID string `json:"xms_mirid,omitempty"` // of a managed identity
}

// Issuer is the issuer of tokens of a version.
func (s *Service) Issuer(v Version) string {
	if v == V2 {
		return s.cfg.Login + "/" + s.tenant + "/v2.0"
	}
	return s.cfg.Login + "/" + s.tenant + "/"
}

// subject is whom a token is for.
type subject struct {
	clientID, objectID string
	resourceID         string // ARM id of a managed identity; empty for an application
	lifetime           time.Duration
}

// issue makes a token for an audience that requireAudience has passed.
func (s *Service) issue(ctx context.Context, who subject, audience string, v Version) (Token, error) {
	keys, err := s.signingKeys(ctx)
	if err != nil {
		return Token{}, err
	}
	now := s.cfg.Now().UTC().Truncate(time.Second)
	c := claims{
		Audience: audience, Issuer: s.Issuer(v), IssuedAt: now.Unix(), NotBefore: now.Unix(), Expires: now.Add(who.lifetime).Unix(),
		IDType: "app", ObjectID: who.objectID, Subject: who.objectID, Tenant: s.tenant, UTI: newUTI(), ResourceID: who.resourceID,
	}
	acr := "1"
	if who.resourceID != "" {
		acr = "2"
	}
	if v == V2 {
		c.Version, c.AZP, c.AZPACR = "2.0", who.clientID, acr
	} else {
		c.Version, c.AppID, c.AppIDACR, c.IDP = "1.0", who.clientID, acr, c.Issuer
	}
	key := keys.ring.signer(now)
	value, err := sign(c, key.ID, keys.parsed[key.ID])
	if err != nil {
		return Token{}, err
	}
	return Token{
		Value: Secret{value}, Resource: audience, ClientID: who.clientID, ObjectID: who.objectID,
		NotBefore: now, Expires: now.Add(who.lifetime), Lifetime: who.lifetime,
	}, nil
}

// sign makes a compact JWS (RFC 7515) with RS256.
func sign(c claims, kid string, key *rsa.PrivateKey) (string, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encoding token: %w", err)
	}
	enc := base64.RawURLEncoding
	signed := enc.EncodeToString([]byte(`{"alg":"RS256","kid":"`+kid+`","typ":"JWT"}`)) + "." + enc.EncodeToString(body)
	sum := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		return "", fmt.Errorf("signing token: %w", err)
	}
	return signed + "." + enc.EncodeToString(sig), nil
}

func newUTI() string {
	var b [16]byte
	rand.Read(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// Credentials is a token request.
type Credentials struct {
	Tenant    string // as in the path of the token endpoint
	ClientID  string
	Secret    string // of an application
	Assertion string // token of another issuer that a managed identity trusts, instead of Secret
	Resource  string // URL; the "/.default" of a scope taken off
	Version   Version
}

// ClientCredentials gives a token to an application that proves its secret
// (RFC 6749, section 4.4), or of a managed identity to the bearer of an assertion
// that one of its federated credentials trusts (RFC 7523). Success and failure
// are both on record. Errors carry OAuth's error as Code and the AADSTS code as Inner.
func (s *Service) ClientCredentials(ctx context.Context, c Credentials) (Token, error) {
	if c.Assertion != "" {
		return s.byFederation(ctx, c)
	}
	app, err := s.authenticate(ctx, c)
	p := access.Principal{Kind: access.Application, Tenant: s.tenant, ClientID: clip(c.ClientID), ObjectID: app.ObjectID, Name: app.Name}
	audience := ""
	if err == nil {
		audience, err = s.requireAudience(c.Resource)
	}
	op := access.Op{Action: "Keyfleet/applications/token", Resource: "/keyfleet/applications/" + clip(c.ClientID), Detail: "for " + clip(c.Resource)}
	if err := s.cfg.Gate.Record(ctx, p, op, err); err != nil {
		return Token{}, err
	}
	return s.issue(ctx, subject{clientID: app.ClientID, objectID: app.ObjectID, lifetime: s.cfg.TokenLifetime}, audience, c.Version)
}

// clip bounds what a stranger can put into a record.
func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), 256)], "") }

// authenticate finds the application and checks its secret.
func (s *Service) authenticate(ctx context.Context, c Credentials) (Application, error) {
	if err := s.checkTenant(c.Tenant); err != nil {
		return Application{}, err
	}
	o, err := Applications.Lookup(s.cfg.Store.View(ctx), strings.ToLower(c.ClientID))
	if err != nil {
		return Application{}, err
	}
	if o == nil {
		return Application{}, fault.New(fault.Invalid, "unauthorized_client",
			"Application with identifier '%s' was not found in the directory 'Keyfleet'. This can happen if the application has not been installed by the administrator of the tenant.",
			clip(c.ClientID)).WithInner("AADSTS700016").WithFix("check the client id; an administrator lists them: keyfleet application list")
	}
	return o.Spec, o.Spec.check(c.Secret, s.cfg.Now())
}

// checkTenant accepts the tenant's id and the names by which clients mean
// "the one there is". "adfs" is among them because a client that finds it in an
// authority's path asks no public host whether the authority may be trusted.
func (s *Service) checkTenant(t string) error {
	switch t = strings.ToLower(t); t {
	case strings.ToLower(s.tenant), "common", "organizations", "adfs":
		return nil
	}
	return fault.New(fault.Invalid, "invalid_request",
		"Tenant '%s' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud.", clip(t)).
		WithInner("AADSTS90002").WithFix("the tenant of this server is %s", s.tenant)
}

// HasTenant reports whether the name in a path means the tenant.
func (s *Service) HasTenant(name string) bool { return s.checkTenant(name) == nil }
