package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
)

// Token is an access token. It prints as [redacted].
type Token struct {
	Value   keyfleet.Secret
	Expires time.Time
}

// TokenSource gets a token for a resource (an audience such as
// "https://vault.keyfleet.internal:8443"). It is called when no token is cached
// or the cached one is about to end.
type TokenSource func(ctx context.Context, resource string) (Token, error)

// tokenMargin is how long before its end a token is replaced, so that it does
// not end while a request is under way.
const tokenMargin = 2 * time.Minute

// tokenCache keeps one token per resource and asks for each only once at a time.
type tokenCache struct {
	source TokenSource

	mu      sync.Mutex
	entries map[string]*tokenEntry // guarded by mu; an entry's token by its own lock
}

type tokenEntry struct {
	mu    sync.Mutex
	token Token
}

func newTokenCache(source TokenSource) *tokenCache {
	return &tokenCache{source: source, entries: map[string]*tokenEntry{}}
}

// get returns a token for the resource. stale, when not empty, is a token that
// the server has refused: it is not given again.
func (t *tokenCache) get(ctx context.Context, resource string, stale keyfleet.Secret) (keyfleet.Secret, error) {
	t.mu.Lock()
	e := t.entries[resource]
	if e == nil {
		e = &tokenEntry{}
		t.entries[resource] = e
	}
	t.mu.Unlock()

	e.mu.Lock()
	defer e.mu.Unlock()
	if e.token.Value != "" && e.token.Value != stale && time.Until(e.token.Expires) > tokenMargin {
		return e.token.Value, nil
	}
	tok, err := t.source(ctx, resource)
	if err != nil {
		return "", err
	}
	e.token = tok
	return tok.Value, nil
}

// Token returns a token of the caller for a resource.
func (c *Client) Token(ctx context.Context, resource string) (keyfleet.Secret, error) {
	return c.tokens.get(ctx, resource, "")
}

// clientCredentials is the TokenSource of an application: OAuth 2.0, RFC 6749
// section 4.4, at the v2 endpoint of the tenant.
func (c *Client) clientCredentials(ctx context.Context, resource string) (Token, error) {
	form := url.Values{
		"grant_type":    {"client_credentials"},
		"client_id":     {c.cfg.ClientID},
		"client_secret": {c.cfg.ClientSecret.Reveal()},
		"scope":         {resource + "/.default"},
	}
	resp, err := c.send(ctx, Request{
		Method: http.MethodPost,
		URL:    c.cfg.Endpoints.Login + "/" + url.PathEscape(c.cfg.Tenant) + "/oauth2/v2.0/token",
		Header: http.Header{"Content-Type": {"application/x-www-form-urlencoded"}},
		Body:   []byte(form.Encode()),
		repeat: true, // asking for a token twice is harmless
	}, "")
	if err != nil {
		return Token{}, err
	}
	var body struct {
		AccessToken keyfleet.Secret `json:"access_token"`
		ExpiresIn   json.Number     `json:"expires_in"`
	}
	if err := json.Unmarshal(resp.Body, &body); err != nil {
		return Token{}, fmt.Errorf("reading the token answer: %w", err)
	}
	if body.AccessToken == "" {
		return Token{}, fmt.Errorf("reading the token answer: it holds no token")
	}
	secs, _ := body.ExpiresIn.Int64()
	return Token{Value: body.AccessToken, Expires: time.Now().Add(time.Duration(secs) * time.Second)}, nil
}

// challenge is what a 401 of a vault says: for which resource it wants a token.
//
//	WWW-Authenticate: Bearer authorization="https://LOGIN/TENANT", resource="https://vault.SUFFIX"
//
// Only the resource is used; credentials go to the configured login host.
func challengeResource(h http.Header, host string) (string, error) {
	for _, v := range h.Values("WWW-Authenticate") {
		rest, ok := cutPrefixFold(v, "Bearer ")
		if !ok {
			continue
		}
		for _, part := range strings.Split(rest, ",") {
			key, val, _ := strings.Cut(strings.TrimSpace(part), "=")
			if !strings.EqualFold(key, "resource") {
				continue
			}
			res := strings.Trim(val, `"`)
			u, err := url.Parse(res)
			if err != nil || u.Scheme != "https" || u.Host == "" {
				return "", fmt.Errorf("the challenge of %s names an unusable resource", host)
			}
			// The token of one service must not be handed to another: the
			// host must be the resource's own or under it (as Azure's clients check it).
			if !strings.EqualFold(host, u.Host) && !hasSuffixFold(host, "."+u.Host) {
				return "", fmt.Errorf("the challenge of %s asks for a token of another host (%s)", host, u.Host)
			}
			return res, nil
		}
	}
	return "", fmt.Errorf("%s refused the request and did not say which token it wants", host)
}

func cutPrefixFold(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return s, false
	}
	return s[len(prefix):], true
}

// ObjectID is the caller's own object id: what access policies and role assignments name.
func (c *Client) ObjectID(ctx context.Context) (string, error) {
	var me struct {
		ObjectID string `json:"objectId"`
	}
	err := c.Call(ctx, Request{Method: http.MethodGet, URL: c.ARM("/keyfleet/v1/whoami")}, &me)
	if err == nil && me.ObjectID == "" {
		err = errors.New("asking for the own object id: the server names none")
	}
	return me.ObjectID, err
}

// AskTenant returns the tenant that the server names when it refuses a request
// without a token (authorization_uri="https://LOGIN/TENANT"); empty if it names none.
func (c *Client) AskTenant(ctx context.Context) string {
	_, err := c.send(ctx, Request{Method: http.MethodGet, URL: c.ARM("/subscriptions"), Version: VersionSubscriptions}, "")
	var e *Error
	if !errors.As(err, &e) {
		return ""
	}
	for _, v := range e.header.Values("WWW-Authenticate") {
		_, rest, ok := strings.Cut(v, `authorization_uri="`)
		uri, _, closed := strings.Cut(rest, `"`)
		u, err := url.Parse(uri)
		if !ok || !closed || err != nil {
			continue
		}
		if tenant, _, _ := strings.Cut(strings.Trim(u.Path, "/"), "/"); tenant != "" {
			return tenant
		}
	}
	return ""
}
