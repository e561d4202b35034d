package keyvaultext

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/fault"
)

const vaultAPIVersion = "7.4"

// fetched is one version of a secret.
type fetched struct {
	version     string // 32 lower-case hex digits
	contentType string
	value       secret
}

// vaultClient gets secrets from Key Vault's data plane, with the challenge as
// its clients follow it: ask without a token, be told the resource, ask again.
// It is safe for several goroutines.
type vaultClient struct {
	tokens *tokenSource
	timing Timing

	mu        sync.Mutex
	http      *http.Client
	rootsFrom time.Time         // of the file in SSL_CERT_FILE when http was made
	resources map[string]string // by vault host: what to ask tokens for
}

func newVaultClient(s extension.KeyVaultSettings, timing Timing) *vaultClient {
	v := &vaultClient{
		tokens: &tokenSource{
			endpoint: s.MSIEndpoint, clientID: s.MSIClientID, timing: timing, tokens: map[string]token{},
			http: &http.Client{Transport: transport(nil, false), CheckRedirect: noRedirect},
		},
		timing: timing, resources: map[string]string{},
	}
	v.http, v.rootsFrom = tlsClient()
	return v
}

// transport speaks HTTP/1.1 only, which costs a node less memory, and follows
// no proxy to the identity endpoint.
func transport(roots *x509.CertPool, proxy bool) *http.Transport {
	t := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSHandshakeTimeout: 5 * time.Second, IdleConnTimeout: 10 * time.Minute, MaxIdleConnsPerHost: 2,
		ReadBufferSize: 4 << 10, WriteBufferSize: 2 << 10, MaxResponseHeaderBytes: 32 << 10, DisableCompression: true,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ClientSessionCache: tls.NewLRUClientSessionCache(8)},
	}
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	if proxy {
		t.Proxy = http.ProxyFromEnvironment
	}
	return t
}

// noRedirect: a token must not follow a redirect to another host.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// tlsClient trusts the system's roots and those in SSL_CERT_FILE, and returns the latter's age.
func tlsClient() (*http.Client, time.Time) {
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	var at time.Time
	if file := os.Getenv("SSL_CERT_FILE"); file != "" {
		if info, err := os.Stat(file); err == nil {
			at = info.ModTime()
		}
		if pem, err := os.ReadFile(file); err == nil {
			roots.AppendCertsFromPEM(pem)
		}
	}
	return &http.Client{Transport: transport(roots, true), CheckRedirect: noRedirect}, at
}

// client returns the TLS client, made anew when SSL_CERT_FILE has changed: the
// vault's CA may be renewed while the service runs.
func (v *vaultClient) client() *http.Client {
	v.mu.Lock()
	defer v.mu.Unlock()
	if file := os.Getenv("SSL_CERT_FILE"); file != "" {
		if info, err := os.Stat(file); err == nil && !info.ModTime().Equal(v.rootsFrom) {
			v.http.CloseIdleConnections()
			v.http, v.rootsFrom = tlsClient()
		}
	}
	return v.http
}

// get fetches the newest version, or the one that the URL names. Errors are
// *fault.Error with the HTTP status in the message and the fix.
func (v *vaultClient) get(ctx context.Context, c extension.ObservedCertificate) (fetched, error) {
	var bearer secret
	v.mu.Lock()
	resource := v.resources[c.Host]
	v.mu.Unlock()
	for round := 0; ; round++ {
		if resource != "" {
			t, err := v.tokens.get(ctx, resource, bearer)
			if err != nil {
				return fetched{}, err
			}
			bearer = t
		}
		resp, body, err := v.request(ctx, c, bearer)
		if err != nil {
			return fetched{}, err
		}
		switch {
		case resp.StatusCode == http.StatusOK:
			return parseSecret(body, c)
		case resp.StatusCode != http.StatusUnauthorized || round == 2:
			return fetched{}, v.refused(resp, body, c)
		}
		told, err := challengeResource(resp.Header.Get("WWW-Authenticate"), c.Host)
		if err != nil {
			return fetched{}, err
		}
		if bearer != (secret{}) && told == resource && round > 0 {
			return fetched{}, v.refused(resp, body, c) // a fresh token was refused too
		}
		resource = told
		v.mu.Lock()
		v.resources[c.Host] = told
		v.mu.Unlock()
	}
}

func (v *vaultClient) request(ctx context.Context, c extension.ObservedCertificate, bearer secret) (*http.Response, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, v.timing.Request)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.URL, "/")+"?api-version="+vaultAPIVersion, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("building request: %w", err)
	}
	if bearer != (secret{}) {
		req.Header.Set("Authorization", "Bearer "+bearer.reveal())
	}
	req.Header.Set("User-Agent", "keyfleet-keyvault-extension")
	resp, err := v.client().Do(req)
	if err != nil {
		return nil, nil, unreachable(err, c)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, nil, unreachable(err, c)
	}
	return resp, body, nil
}

// unreachable explains a failure below HTTP.
func unreachable(err error, c extension.ObservedCertificate) error {
	var dns *net.DNSError
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	f := fault.New(fault.Unavailable, "VaultUnreachable", "The vault %s does not answer: %s.", c.Host, plainNetworkError(err)).Because(err)
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return f.WithFix("correct the vault's name in the URL, or make the name resolve on the node")
	case errors.As(err, &unknown):
		return f.WithFix("make the node trust the vault's CA: the system's store, or the file in SSL_CERT_FILE")
	case errors.As(err, &name):
		return f.WithFix("correct the vault's name in the URL: the server at that address has a certificate for other names")
	}
	return f.WithFix("check that the node reaches %s; the extension tries again", c.Host)
}

// refused explains an answer that is no secret, in the vault's own words.
func (v *vaultClient) refused(resp *http.Response, body []byte, c extension.ObservedCertificate) error {
	var e struct {
		Error struct {
			Code       string `json:"code"`
			Message    string `json:"message"`
			InnerError struct {
				Code string `json:"code"`
			} `json:"innererror"`
		} `json:"error"`
	}
	_ = json.Unmarshal(body, &e) // a body in another form leaves only the status
	kind, fix := explainStatus(resp.StatusCode, e.Error.InnerError.Code, v.tokens.clientID, c)
	message := firstNonEmpty(oneLine(e.Error.Message), http.StatusText(resp.StatusCode))
	code := firstNonEmpty(e.Error.Code, "VaultError")
	words := fmt.Sprintf("HTTP %d", resp.StatusCode)
	if inner := e.Error.InnerError.Code; inner != "" {
		words += " (" + inner + ")"
	}
	return fault.New(kind, code, "%s: %s", words, message).WithInner(e.Error.InnerError.Code).WithFix("%s", fix).After(retryAfter(resp.Header, time.Now()))
}

func explainStatus(status int, inner, clientID string, c extension.ObservedCertificate) (fault.Kind, string) {
	who := "the node's identity"
	if clientID != "" {
		who = "the identity with client id " + clientID
	}
	switch {
	case status == http.StatusUnauthorized:
		return fault.Unauthenticated, "use a vault of the tenant that " + who + " belongs to"
	case status == http.StatusForbidden && inner == "SecretDisabled":
		return fault.Denied, "enable this version of the certificate, or observe another one"
	case status == http.StatusForbidden:
		return fault.Denied, fmt.Sprintf("allow %s to get secrets of vault %s: az keyvault set-policy --name %s --spn CLIENT-ID --secret-permissions get", who, c.Vault, c.Vault)
	case status == http.StatusNotFound && c.Version != "":
		return fault.NotFound, "correct the name or the version in the URL, or leave the version out to follow the newest"
	case status == http.StatusNotFound:
		return fault.NotFound, "create certificate " + c.Secret + " in vault " + c.Vault + ", or correct the URL"
	case status == http.StatusTooManyRequests:
		return fault.TooMany, "none needed: the extension tries again"
	case status >= 500:
		return fault.Unavailable, "none needed if it passes: the extension tries again"
	}
	return fault.Invalid, "check the URL in the settings"
}

var challengeParameter = regexp.MustCompile(`([a-zA-Z_]+)="([^"]*)"`)

// challengeResource reads the resource of a Bearer challenge and refuses one
// that is not a parent domain of the vault's host, so that a strange server
// cannot make us send it a token for something else.
func challengeResource(header, host string) (string, error) {
	parameters := map[string]string{}
	if len(header) >= 7 && strings.EqualFold(header[:7], "Bearer ") {
		for _, m := range challengeParameter.FindAllStringSubmatch(header[7:], -1) {
			parameters[strings.ToLower(m[1])] = m[2]
		}
	}
	resource := firstNonEmpty(parameters["resource"], strings.TrimSuffix(parameters["scope"], "/.default"))
	u, err := url.Parse(resource)
	if err != nil || resource == "" {
		return "", fault.New(fault.Denied, "BadChallenge", "HTTP 401 from %s without a usable Bearer challenge.", host).
			WithFix("check that %s is a Key Vault", host)
	}
	if u.Scheme != "https" || u.Host == "" || !strings.HasSuffix(strings.ToLower(host), "."+strings.ToLower(u.Host)) {
		return "", fault.New(fault.Denied, "BadChallenge", "The challenge of %s is for %s, which is not its domain; no token was sent.", host, oneLine(resource)).
			WithFix("correct the vault's URL, or the vault's own configuration of its domain and port")
	}
	return resource, nil
}

var secretID = regexp.MustCompile(`(?i)/secrets/([0-9a-z-]{1,127})/([0-9a-f]{32})/?$`)

// parseSecret reads a secret bundle and checks that it is the one asked for.
func parseSecret(body []byte, c extension.ObservedCertificate) (fetched, error) {
	var b struct {
		ID          string `json:"id"`
		Value       string `json:"value"`
		ContentType string `json:"contentType"`
	}
	bad := func(reason string) error {
		return fault.New(fault.Invalid, "BadSecret", "The vault's answer is not usable: %s.", reason).WithFix("check that %s is a Key Vault", c.Host)
	}
	if err := json.Unmarshal(body, &b); err != nil {
		return fetched{}, bad("it is not a secret")
	}
	m := secretID.FindStringSubmatch(b.ID)
	if m == nil {
		return fetched{}, bad("its id names no version")
	}
	version := strings.ToLower(m[2])
	if !strings.EqualFold(m[1], c.Secret) || c.Version != "" && c.Version != version {
		return fetched{}, bad("it is another secret than the one asked for")
	}
	return fetched{version: version, contentType: b.ContentType, value: newSecret(b.Value)}, nil
}
