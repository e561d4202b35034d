// Package issuer checks tokens that others have signed, with the keys that their
// issuers publish.
//
// Idea: an issuer is a URL. Below it stands a discovery document that says where
// its public keys are (OpenID Connect Discovery 1.0), and a token of the issuer is
// signed with one of them. The API server of every Kubernetes cluster is such an
// issuer for the tokens of its service accounts, mostly under a name that only the
// cluster itself can look up; what such an issuer publishes comes from
// [Config.Published], for which the caller names the cluster.
//
//	token ──kid──> keys that are remembered ──no──> discovery document ──> keys
//	                    │ yes                            (at most once in Pause)
//	                    └──> signature
//
// Invariant: keys count for an issuer only if they came over TLS from a server
// that the trust roots vouch for, and the discovery document names the issuer to
// the letter; or from somebody whom Published trusts. Redirects are not followed.
// Only signatures are decided here: whom a token is for and how long it lives is
// the caller's business.
//
// Consequence for the operator: a key that an issuer has added counts at once, for
// a token with an unknown key makes this server look again; one that it has taken
// away counts for up to Fresh longer, and, while the issuer cannot be reached, for
// up to Stale. What a cluster publishes is not remembered here.
package issuer

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Config is what a Client needs; its zero value works.
type Config struct {
	// Published returns the key set (RFC 7517) that a cluster publishes as that
	// issuer. Nil: there are no clusters.
	Published func(ctx context.Context, issuer, cluster string) (keySet []byte, err error)
	// Roots are the trust roots of issuers that are asked; nil: this machine's.
	Roots *x509.CertPool

	Timeout time.Duration    // of all requests for one issuer together; zero: 5 s
	Fresh   time.Duration    // how long keys are used without asking again; zero: 5 min
	Stale   time.Duration    // how long if the issuer cannot be asked; zero: 1 h
	Pause   time.Duration    // the least time between two requests for one issuer; zero: 5 s
	Now     func() time.Time // nil: time.Now
}

// Client remembers the keys of issuers. Make it with [New]. It is safe for
// concurrent use.
type Client struct {
	cfg Config

	mu      sync.Mutex
	issuers map[string]*known
}

// known is what is remembered of an issuer. Its lock is held while it is asked,
// so that many tokens of one issuer make one request.
type known struct {
	mu      sync.Mutex
	keys    jose.JSONWebKeySet
	fetched time.Time // when keys came; zero: never
	asked   time.Time // when it was asked last
	problem error     // of the last request; nil: it succeeded
}

const (
	maxIssuers  = 1024
	maxDocument = 1 << 20 // bytes
)

// algorithms are the signature algorithms that are accepted: those of RFC 7518 that
// use a public key.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512, jose.EdDSA,
}

// New returns a Client.
func New(cfg Config) *Client {
	cfg.Timeout, cfg.Fresh = cmp.Or(cfg.Timeout, 5*time.Second), cmp.Or(cfg.Fresh, 5*time.Minute)
	cfg.Stale, cfg.Pause = cmp.Or(cfg.Stale, time.Hour), cmp.Or(cfg.Pause, 5*time.Second)
	if cfg.Published == nil {
		cfg.Published = func(context.Context, string, string) ([]byte, error) { return nil, errors.New("there are no clusters") }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Client{cfg: cfg, issuers: map[string]*known{}}
}

// Verify checks that a compact JWS (RFC 7515) was signed with a key that the issuer
// publishes at its URL, or that the cluster publishes if one is named, and returns
// its payload. It is fault.Unauthenticated for what is no such JWS, and
// fault.Unavailable if the keys could not be got.
func (c *Client) Verify(ctx context.Context, issuer, cluster, jws string) ([]byte, error) {
	signed, err := jose.ParseSignedCompact(jws, algorithms)
	if err != nil || len(signed.Signatures) != 1 {
		return nil, fault.New(fault.Unauthenticated, "", "it is not a JWT with a signature of a known algorithm.").Because(err)
	}
	id := signed.Signatures[0].Header.KeyID
	candidates, published, err := c.keys(ctx, issuer, cluster, id)
	if err != nil {
		return nil, err
	}
	for _, k := range candidates {
		if payload, err := signed.Verify(k.Key); err == nil {
			return payload, nil
		}
	}
	if len(candidates) == 0 {
		return nil, fault.New(fault.Unauthenticated, "", "its key '%.80s' is not among the %d that the issuer publishes.", id, published)
	}
	return nil, fault.New(fault.Unauthenticated, "", "it does not fit the issuer's key '%.80s'.", id)
}

// keys returns the public keys of an issuer with the id, all of them if the id is
// empty, and how many there are of any id.
func (c *Client) keys(ctx context.Context, issuer, cluster, id string) (candidates []jose.JSONWebKey, published int, err error) {
	if cluster != "" { // nothing to gain from remembering what is remembered where it comes from
		set, err := c.published(ctx, issuer, cluster)
		return withID(set, id), len(set.Keys), err
	}
	k := c.known(issuer)
	k.mu.Lock()
	defer k.mu.Unlock()
	now := c.cfg.Now()
	age := now.Sub(k.fetched)
	candidates = withID(k.keys, id)
	if (age >= c.cfg.Fresh || len(candidates) == 0) && now.Sub(k.asked) >= c.cfg.Pause {
		k.refresh(ctx, c, issuer, now)
		candidates, age = withID(k.keys, id), now.Sub(k.fetched)
	}
	if k.problem != nil && (len(candidates) == 0 || age >= c.cfg.Stale) {
		return nil, 0, k.problem
	}
	return candidates, len(k.keys.Keys), nil
}

func (c *Client) known(issuer string) *known {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.issuers[issuer]
	if k == nil {
		if len(c.issuers) >= maxIssuers {
			clear(c.issuers) // each comes back with one request
		}
		k = &known{}
		c.issuers[issuer] = k
	}
	return k
}

func withID(set jose.JSONWebKeySet, id string) []jose.JSONWebKey {
	if id == "" {
		return set.Keys
	}
	return set.Key(id)
}

// refresh asks the issuer. Keys that were got before stay where it cannot be asked.
func (k *known) refresh(ctx context.Context, c *Client, issuer string, now time.Time) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.Timeout) // others wait for the answer too
	defer cancel()
	k.asked = now
	text, err := c.ask(ctx, issuer)
	var keys jose.JSONWebKeySet
	if err == nil {
		keys, err = parseKeys(text)
	}
	if err != nil {
		k.problem = notGot(err)
		return
	}
	k.keys, k.fetched, k.problem = keys, now, nil
}

// published gets the keys that a cluster publishes.
func (c *Client) published(ctx context.Context, issuer, cluster string) (jose.JSONWebKeySet, error) {
	text, err := c.cfg.Published(ctx, issuer, cluster)
	var keys jose.JSONWebKeySet
	if err == nil {
		keys, err = parseKeys(text)
	}
	if err != nil {
		return keys, notGot(err)
	}
	return keys, nil
}

func notGot(err error) error {
	return fault.New(fault.Unavailable, "", "The keys of the issuer could not be got: %s.", strings.TrimSuffix(message(err), ".")).Because(err)
}

// message is what an error says to people, without its fix.
func message(err error) string {
	if e := fault.From(err); e.Message != "" {
		return e.Message
	}
	return err.Error()
}

// parseKeys reads a key set and leaves out what is no public key to check signatures with.
func parseKeys(text []byte) (jose.JSONWebKeySet, error) {
	var all, usable jose.JSONWebKeySet
	if err := json.Unmarshal(text, &all); err != nil {
		return usable, errors.New("they are no JSON Web Key Set")
	}
	for _, k := range all.Keys {
		if k.Valid() && k.IsPublic() && (k.Use == "" || k.Use == "sig") {
			usable.Keys = append(usable.Keys, k)
		}
	}
	if len(usable.Keys) == 0 {
		return usable, errors.New("it publishes no usable key")
	}
	return usable, nil
}

// ask gets the key set that an issuer's discovery document leads to.
func (c *Client) ask(ctx context.Context, issuer string) ([]byte, error) {
	client := &http.Client{
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: c.cfg.Roots}, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	defer client.CloseIdleConnections()
	where := strings.TrimSuffix(issuer, "/") + "/.well-known/openid-configuration"
	text, err := get(ctx, client, where)
	if err != nil {
		return nil, err
	}
	var document struct {
		Issuer  string `json:"issuer"`
		KeysURL string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(text, &document); err != nil {
		return nil, fmt.Errorf("%s is no JSON object", where)
	}
	if document.Issuer != issuer {
		return nil, fmt.Errorf("the discovery document at %s is of the issuer '%.200s'", where, document.Issuer)
	}
	if u, err := url.Parse(document.KeysURL); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("the discovery document names keys at '%.200s', which is not an https URL", document.KeysURL)
	}
	return get(ctx, client, document.KeysURL)
}

// get fetches a document.
func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("asking %.200s: %w", url, err)
	}
	r.Header.Set("Accept", "application/json")
	reply, err := client.Do(r)
	if err != nil {
		return nil, err // it names the URL
	}
	defer reply.Body.Close()
	if reply.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", url, reply.Status)
	}
	text, err := io.ReadAll(io.LimitReader(reply.Body, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", url, err)
	}
	if len(text) > maxDocument {
		return nil, fmt.Errorf("%s answers with more than %d bytes", url, maxDocument)
	}
	return text, nil
}
