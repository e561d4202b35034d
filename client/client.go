// Package client is the Go client of Keyfleet's surface: Azure's protocols,
// and Keyfleet's few additions to them.
//
// Idea: the surface is many names on one port. The client speaks to all of
// them (arm., login., NAME.vault., ACCOUNT.REGION.batch.) under their own
// names, with TLS checked against those names, but dials the server's listen
// address itself, so nothing has to resolve. One method, [Client.Do], does what
// every call needs: a token for the right audience, Key Vault's challenge,
// retries, and one error type for the four error bodies of the protocols. The
// typed calls are thin rows on top of it.
//
// Invariant: a credential goes to the configured login host only, whatever a
// challenge says, and a token only to hosts of its audience. Neither appears in an error.
//
// Consequence for the operator: an error names the code, the reason, the fix
// if the server knows one, and the request id under which the server's log and
// audit have the rest.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
)

// Config is what a Client needs.
type Config struct {
	Endpoints    keyfleet.Endpoints // ResourceManager and Login must be set
	Tenant       string             // tenant id; must be set unless TokenSource is
	Subscription string             // default subscription of the typed calls
	ClientID     string             // of the application that logs in
	ClientSecret keyfleet.Secret
	TokenSource  TokenSource // used instead of ClientID and ClientSecret where set
	CAFile       string      // PEM file of the CA that the server's certificates come from; empty: CA, or the system's roots
	CA           []byte      // the same as PEM; used when CAFile is empty
	DialAddress  string      // host:port dialled for every name; empty: Endpoints.Listen; both empty: names are resolved
	UserAgent    string      // empty: "keyfleet-client"

	// Sleep waits between attempts and polls; nil: a timer. Tests shorten it.
	Sleep func(ctx context.Context, d time.Duration) error
}

// Client talks to one server as one caller. It is safe for concurrent use.
type Client struct {
	cfg    Config
	dial   string
	tls    *tls.Config
	http   *http.Client
	tokens *tokenCache
}

// New makes a client. It reads the CA file and sends nothing.
func New(cfg Config) (*Client, error) {
	if cfg.Endpoints.ResourceManager == "" || cfg.Endpoints.Login == "" {
		return nil, errors.New("making a client: the endpoints resourceManager and login must be set")
	}
	if cfg.TokenSource == nil && (cfg.Tenant == "" || cfg.ClientID == "" || cfg.ClientSecret == "") {
		return nil, errors.New("making a client: tenant, client id and client secret (or a token source) must be set")
	}
	roots, err := roots(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "keyfleet-client"
	}
	if cfg.Sleep == nil {
		cfg.Sleep = sleep
	}
	c := &Client{
		cfg:  cfg,
		dial: dialAddress(cfg),
		tls:  &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
	}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext:         c.DialContext,
			TLSClientConfig:     c.tls,
			MaxIdleConnsPerHost: 8,
			IdleConnTimeout:     90 * time.Second,
			TLSHandshakeTimeout: 10 * time.Second,
			ForceAttemptHTTP2:   true,
		},
		// A redirect would carry the token to a host that no one chose.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	source := cfg.TokenSource
	if source == nil {
		source = c.clientCredentials
	}
	c.tokens = newTokenCache(source)
	return c, nil
}

// FromAdmin returns the configuration that dir/admin.json describes.
func FromAdmin(dir string) (Config, error) {
	a, err := ReadAdmin(dir)
	if err != nil {
		return Config{}, err
	}
	return ForAdmin(a), nil
}

// ForAdmin returns the configuration of a login whose CAFile is absolute.
func ForAdmin(a keyfleet.Admin) Config {
	return Config{
		Endpoints: a.Endpoints, Tenant: a.Tenant, Subscription: a.Subscription,
		ClientID: a.ClientID, ClientSecret: a.ClientSecret, CAFile: a.CAFile,
	}
}

// ReadAdmin reads dir/admin.json and makes its CAFile absolute.
func ReadAdmin(dir string) (keyfleet.Admin, error) {
	var a keyfleet.Admin
	path := filepath.Join(dir, "admin.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return a, fmt.Errorf("reading the administrator's credential: %w", err)
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return a, fmt.Errorf("reading %s: %w", path, err)
	}
	if a.CAFile != "" && !filepath.IsAbs(a.CAFile) {
		a.CAFile = filepath.Join(dir, a.CAFile)
	}
	return a, nil
}

// Subscription is the default subscription.
func (c *Client) Subscription() string { return c.cfg.Subscription }

// Endpoints are the names under which the server answers.
func (c *Client) Endpoints() keyfleet.Endpoints { return c.cfg.Endpoints }

// TLSConfig is the TLS configuration that trusts the server, for callers that
// speak something else than requests and answers over [Client.DialContext].
func (c *Client) TLSConfig() *tls.Config { return c.tls.Clone() }

// DialContext dials the server for any of its names.
func (c *Client) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if c.dial != "" {
		addr = c.dial
	}
	d := net.Dialer{Timeout: 10 * time.Second}
	return d.DialContext(ctx, network, addr)
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// ARM is the URL of a path on the arm host.
func (c *Client) ARM(path string) string { return c.cfg.Endpoints.ResourceManager + path }

// Vault is the URL of a path on a vault's host.
func (c *Client) Vault(name, path string) string {
	return "https://" + strings.ToLower(name) + "." + c.cfg.Endpoints.VaultSuffix + path
}

// Batch is the URL of a path on an account's host; endpoint is the account's
// accountEndpoint ("acct1.westus2.batch.keyfleet.internal:8443").
func (c *Client) Batch(endpoint, path string) string { return "https://" + endpoint + path }

// batchResource is the audience of the Batch data plane.
func (c *Client) batchResource() string { return "https://" + c.cfg.Endpoints.BatchSuffix + "/" }

// resource guesses the audience of a URL: the arm host's own name, the batch
// resource on batch hosts, and empty (ask for a challenge) on everything else.
func (c *Client) resource(u *url.URL) string {
	arm, err := url.Parse(c.cfg.Endpoints.ResourceManager)
	switch {
	case err == nil && strings.EqualFold(u.Host, arm.Host):
		return c.cfg.Endpoints.ResourceManager
	case c.cfg.Endpoints.BatchSuffix != "" && hasSuffixFold(u.Host, "."+c.cfg.Endpoints.BatchSuffix):
		return c.batchResource()
	}
	return ""
}

func hasSuffixFold(s, suffix string) bool {
	return len(s) >= len(suffix) && strings.EqualFold(s[len(s)-len(suffix):], suffix)
}

func roots(cfg Config) (*x509.CertPool, error) {
	pem := cfg.CA
	if cfg.CAFile != "" {
		b, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("reading the CA of the server: %w", err)
		}
		pem = b
	}
	if len(pem) == 0 {
		return nil, nil // the system's roots
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("reading the CA of the server: there is no certificate in it")
	}
	return pool, nil
}

// dialAddress is where all names are dialled. A server that listens on every
// address is dialled on loopback: admin.json is read on the server's machine.
func dialAddress(cfg Config) string {
	addr := cfg.DialAddress
	if addr == "" {
		addr = cfg.Endpoints.Listen
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
