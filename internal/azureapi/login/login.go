// Package login is the token surface, login.DOMAIN: what OAuth and OpenID
// Connect clients of Azure call before they call anything else.
//
// Idea: clients differ in which of the documents they fetch and which of the
// two token endpoints they post to, so all are here, for the tenant's id and
// for the names that mean "the tenant there is" (common, organizations, adfs).
//
//	GET  /{tenant}/discovery/instance                          may this authority be trusted (MSAL)
//	GET  /{tenant}[/v2.0]/.well-known/openid-configuration     where the endpoints are
//	GET  /{tenant}/discovery[/v2.0]/keys                       public signing keys (JWKS)
//	POST /{tenant}/oauth2/v2.0/token                           scope=RESOURCE/.default
//	POST /{tenant}/oauth2/token                                resource=RESOURCE (older clients); with tenant adfs also scope=
//
// Invariant: a token leaves only after package identity has put it on record.
//
// Consequence for the operator: a failed login answers with the code of
// Microsoft Entra ID (AADSTS7000215 for a wrong secret, and so on), so what
// people find under that code applies.
package login

import (
	"net/http"
	"net/url"
	"strings"

	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/identity"
)

// Config is what the surface needs.
type Config struct {
	Identity *identity.Service
}

// Routes is the route table of the surface.
func Routes(cfg Config) []azureapi.Route {
	l := login{cfg.Identity}
	row := func(method, path string, h func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.Login, Method: method, Path: path, Action: azureapi.Public, Handle: h}
	}
	return []azureapi.Route{
		row(http.MethodGet, "/{tenant}/discovery/instance", l.instance),
		row(http.MethodGet, "/{tenant}/.well-known/openid-configuration", l.configuration(identity.V1)),
		row(http.MethodGet, "/{tenant}/v2.0/.well-known/openid-configuration", l.configuration(identity.V2)),
		row(http.MethodGet, "/{tenant}/discovery/keys", l.keys),
		row(http.MethodGet, "/{tenant}/discovery/v2.0/keys", l.keys),
		row(http.MethodPost, "/{tenant}/oauth2/token", l.token(identity.V1)),
		row(http.MethodPost, "/{tenant}/oauth2/v2.0/token", l.token(identity.V2)),
	}
}

type login struct{ identity *identity.Service }

// instances is the answer of instance discovery.
type instances struct {
	TenantDiscoveryEndpoint string     `json:"tenant_discovery_endpoint"`
	APIVersion              string     `json:"api-version"`
	Metadata                []instance `json:"metadata"`
}

type instance struct {
	PreferredNetwork string   `json:"preferred_network"`
	PreferredCache   string   `json:"preferred_cache"`
	Aliases          []string `json:"aliases"`
}

// instance answers for this server's authority, whatever name it was reached
// by: clients ask a public host, which people point here in their hosts file.
func (l login) instance(r *azureapi.Request) (*azureapi.Reply, error) {
	ours, err := url.Parse(r.Endpoints().Login())
	if err != nil {
		return nil, err
	}
	tenant := "common"
	if asked, err := url.Parse(r.Query("authorization_endpoint")); err == nil {
		if first, _, _ := strings.Cut(strings.TrimPrefix(asked.Path, "/"), "/"); l.identity.HasTenant(first) {
			tenant = first
		}
	}
	return azureapi.OK(instances{
		TenantDiscoveryEndpoint: r.Endpoints().Login() + "/" + tenant + "/v2.0/.well-known/openid-configuration",
		APIVersion:              "1.1",
		Metadata:                []instance{{PreferredNetwork: ours.Host, PreferredCache: ours.Host, Aliases: []string{ours.Host}}},
	}), nil
}

// configuration is the answer of OpenID Connect discovery. authorization_endpoint
// is there because clients insist on it; there is no interactive login.
type configuration struct {
	Issuer                string   `json:"issuer"`
	TokenEndpoint         string   `json:"token_endpoint"`
	AuthorizationEndpoint string   `json:"authorization_endpoint"`
	JWKSURI               string   `json:"jwks_uri"`
	AuthMethods           []string `json:"token_endpoint_auth_methods_supported"`
	GrantTypes            []string `json:"grant_types_supported"`
	ResponseTypes         []string `json:"response_types_supported"`
	ResponseModes         []string `json:"response_modes_supported"`
	SubjectTypes          []string `json:"subject_types_supported"`
	Algorithms            []string `json:"id_token_signing_alg_values_supported"`
	Scopes                []string `json:"scopes_supported"`
	Claims                []string `json:"claims_supported"`
	RequestURIParameter   bool     `json:"request_uri_parameter_supported"`
	HTTPLogout            bool     `json:"http_logout_supported"`
	TenantRegionScope     *string  `json:"tenant_region_scope"`
	CloudInstanceName     string   `json:"cloud_instance_name"`
	FrontchannelLogout    bool     `json:"frontchannel_logout_supported"`
}

func (l login) configuration(v identity.Version) func(*azureapi.Request) (*azureapi.Reply, error) {
	return func(r *azureapi.Request) (*azureapi.Reply, error) {
		tenant := r.Param("tenant")
		if !l.identity.HasTenant(tenant) {
			return refuse(r, unknownTenant(tenant))
		}
		base, host := r.BaseURL()+"/"+tenant, r.Request.Host
		c := configuration{
			Issuer: l.identity.Issuer(v), TokenEndpoint: base + "/oauth2/token", AuthorizationEndpoint: base + "/oauth2/authorize", JWKSURI: base + "/discovery/keys",
			AuthMethods: []string{"client_secret_post", "client_secret_basic", "private_key_jwt"}, GrantTypes: []string{"client_credentials"},
			ResponseTypes: []string{"code"}, ResponseModes: []string{"query", "fragment", "form_post"}, SubjectTypes: []string{"pairwise"},
			Algorithms: []string{"RS256"}, Scopes: []string{"openid", "profile", "offline_access"},
			Claims:            []string{"sub", "iss", "aud", "exp", "iat", "nbf", "oid", "tid", "ver", "appid", "azp", "uti"},
			CloudInstanceName: host,
		}
		if v == identity.V2 {
			c.TokenEndpoint, c.AuthorizationEndpoint, c.JWKSURI = base+"/oauth2/v2.0/token", base+"/oauth2/v2.0/authorize", base+"/discovery/v2.0/keys"
		}
		return azureapi.OK(c).With("Cache-Control", "max-age=3600"), nil
	}
}

// keySet is a JWK set (RFC 7517, section 5).
type keySet struct {
	Keys []identity.JWK `json:"keys"`
}

func (l login) keys(r *azureapi.Request) (*azureapi.Reply, error) {
	if !l.identity.HasTenant(r.Param("tenant")) {
		return refuse(r, unknownTenant(r.Param("tenant")))
	}
	keys, err := l.identity.PublicKeys(r.Context())
	if err != nil {
		return nil, err
	}
	return azureapi.OK(keySet{keys}).With("Cache-Control", "max-age=3600"), nil
}
