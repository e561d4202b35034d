package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// The identity endpoint speaks the Instance Metadata Service's protocol. It is
// for programs on this machine, all of them, so it defends against requests
// that a program was tricked into (a forwarded request, a browser, another
// host's name) and against callers that are not on this machine; it is not a
// border between the machine's own users.

// imdsConcurrent is how many token requests are answered at once, and the rates are requests a second.
const (
	imdsConcurrent = 5
	imdsTokenRate  = 20
	imdsOtherRate  = 5
)

// imdsError is the body of an error answer.
type imdsError struct {
	Status      int    `json:"-"`
	Code        string `json:"error"`
	Description string `json:"error_description"`
	RetryAfter  int    `json:"-"` // seconds; 0: not said
}

func badRequest(description string) *imdsError {
	return &imdsError{Status: http.StatusBadRequest, Code: "invalid_request", Description: description}
}

// serveIMDS serves the identity endpoint until ctx ends.
func (a *Agent) serveIMDS(ctx context.Context) {
	if a.imds == nil {
		return
	}
	s := &http.Server{
		Handler: a.imdsHandler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: requestTimeout + 5*time.Second,
		IdleTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(a.imds); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		a.cfg.Log.Error("the identity endpoint ended", "error", err)
	}
}

// imdsHandler answers requests to the identity endpoint.
func (a *Agent) imdsHandler() http.Handler {
	tokenRate, otherRate := newBucket(imdsTokenRate), newBucket(imdsOtherRate)
	busy := make(chan struct{}, imdsConcurrent)
	hosts := imdsHosts(a.imds.Addr().String())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Server", "Keyfleet IMDS")
		body, e := a.answerIMDS(r, hosts, tokenRate, otherRate, busy)
		if e != nil {
			if e.RetryAfter > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(e.RetryAfter))
			}
			w.WriteHeader(e.Status)
			body = e
		}
		_ = json.NewEncoder(w).Encode(body) // the caller went away: nobody to tell
	})
}

func (a *Agent) answerIMDS(r *http.Request, hosts []string, tokenRate, otherRate *bucket, busy chan struct{}) (any, *imdsError) {
	if e := checkIMDS(r, hosts); e != nil {
		return nil, e
	}
	token := strings.EqualFold(strings.TrimRight(r.URL.Path, "/"), "/metadata/identity/oauth2/token")
	rate := otherRate
	if token {
		rate = tokenRate
	}
	if !rate.take(time.Now()) {
		return nil, &imdsError{Status: http.StatusTooManyRequests, Code: "too_many_requests", Description: "Too many requests; try again.", RetryAfter: 1}
	}
	q, e := parseIMDS(r)
	if e != nil {
		return nil, e
	}
	switch path := strings.ToLower(strings.TrimRight(r.URL.Path, "/")); path {
	case "/metadata/identity/oauth2/token":
		select {
		case busy <- struct{}{}:
			defer func() { <-busy }()
		default:
			return nil, &imdsError{Status: http.StatusTooManyRequests, Code: "too_many_requests", Description: "Too many token requests at once; try again.", RetryAfter: 1}
		}
		return a.identityToken(r.Context(), q)
	case "/metadata/instance", "/metadata/instance/compute":
		compute := map[string]string{"name": a.cfg.Hostname, "osType": osType(), "provider": "Keyfleet"}
		if path == "/metadata/instance" {
			return map[string]any{"compute": compute}, nil
		}
		return compute, nil
	}
	return nil, &imdsError{Status: http.StatusNotFound, Code: "not_found", Description: "This endpoint has /metadata/identity/oauth2/token and /metadata/instance."}
}

func osType() string {
	if runtime.GOOS == "windows" {
		return "Windows"
	}
	return "Linux"
}

// imdsHosts are the Host headers that are meant for us: the address that
// clients have built in, and what we really listen on.
func imdsHosts(listen string) []string {
	hosts := []string{"169.254.169.254", "169.254.169.254:80", listen}
	if host, port, err := net.SplitHostPort(listen); err == nil {
		if port == "80" {
			hosts = append(hosts, host)
		}
		if ip, err := netip.ParseAddr(host); err == nil && ip.IsLoopback() {
			hosts = append(hosts, net.JoinHostPort("localhost", port))
		}
	}
	return hosts
}

// checkIMDS refuses what no program of this machine would send on its own account.
func checkIMDS(r *http.Request, hosts []string) *imdsError {
	switch {
	case !onThisMachine(r.RemoteAddr):
		return &imdsError{Status: http.StatusForbidden, Code: "forbidden", Description: "The identity endpoint answers programs on this machine only."}
	case !slices.Contains(hosts, strings.ToLower(r.Host)):
		return badRequest("The Host header is not the address of this endpoint.")
	case r.Header.Get("Origin") != "" || r.Header.Get("Referer") != "":
		return &imdsError{Status: http.StatusForbidden, Code: "forbidden", Description: "Requests of browsers are not answered."}
	case len(r.Header.Values("X-Forwarded-For")) > 0 || len(r.Header.Values("Forwarded")) > 0:
		return badRequest("A request with an X-Forwarded-For header was forwarded, and is not answered.")
	case r.Method != http.MethodGet:
		return &imdsError{Status: http.StatusMethodNotAllowed, Code: "method_not_allowed", Description: "Only GET is answered."}
	case len(r.Header.Values("Metadata")) != 1 || !strings.EqualFold(r.Header.Get("Metadata"), "true"):
		return &imdsError{Status: http.StatusBadRequest, Code: "bad_request_102", Description: "Required metadata header not specified or not correct."}
	}
	return nil
}

// onThisMachine reports whether a peer has one of this machine's own
// addresses: a container behind a bridge, or a neighbour, has not.
func onThisMachine(remote string) bool {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return false
	}
	ip := ap.Addr().Unmap().WithZone("")
	if ip.IsLoopback() || ip == netip.MustParseAddr("169.254.169.254") {
		return true
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(addrs, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr().Unmap() == ip
	})
}

// imdsQuery is a checked query string.
type imdsQuery struct {
	version  string
	resource string
	identity node.TokenRequest // who was named, in one way at most
}

var apiVersionForm = regexp.MustCompile(`^20[0-9]{2}-[0-9]{2}-[0-9]{2}$`)

// oldestVersion is the first api-version that knew identities.
const oldestVersion = "2018-02-01"

// parseIMDS reads the query string: api-version is mandatory, no name may come twice.
func parseIMDS(r *http.Request) (imdsQuery, *imdsError) {
	var q imdsQuery
	if len(r.URL.RawQuery) > 4096 {
		return q, badRequest("The query string is too long.")
	}
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return q, badRequest("The query string cannot be parsed.")
	}
	seen := map[string]string{}
	for name, v := range values {
		lower := strings.ToLower(name)
		if _, twice := seen[lower]; twice || len(v) != 1 {
			return q, badRequest("The query parameter " + strconv.Quote(lower) + " appears more than once.")
		}
		seen[lower] = v[0]
	}
	q.version = seen["api-version"]
	if !apiVersionForm.MatchString(q.version) {
		return q, badRequest("api-version is missing or not a date. Use api-version=" + oldestVersion + ".")
	}
	if strings.Contains(strings.ToLower(r.URL.Path), "/identity/") && q.version < oldestVersion {
		return q, badRequest("api-version " + q.version + " knows no identities. Use api-version=" + oldestVersion + ".")
	}
	q.resource = seen["resource"]
	q.identity = node.TokenRequest{Resource: q.resource, ClientID: seen["client_id"], ObjectID: seen["object_id"], ResourceID: seen["msi_res_id"]}
	named := 0
	for _, name := range []string{"client_id", "object_id", "msi_res_id", "mi_res_id"} {
		if v, there := seen[name]; there {
			if v == "" {
				return q, badRequest("The query parameter " + name + " is empty.")
			}
			named++
		}
	}
	if q.identity.ResourceID == "" {
		q.identity.ResourceID = seen["mi_res_id"]
	}
	if named > 1 {
		return q, badRequest("Name the identity in one way only: client_id, object_id or msi_res_id.")
	}
	return q, nil
}

// chooseIdentity finds the identity that a request means, among those of the pool.
func chooseIdentity(of []node.Identity, q node.TokenRequest) (node.Identity, *imdsError) {
	named := q.ClientID != "" || q.ObjectID != "" || q.ResourceID != ""
	if !named {
		switch len(of) {
		case 0:
			return node.Identity{}, badRequest("Identity not found")
		case 1:
			return of[0], nil
		}
		return node.Identity{}, badRequest("Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request")
	}
	for _, id := range of {
		if q.ClientID != "" && strings.EqualFold(id.ClientID, q.ClientID) || q.ObjectID != "" && strings.EqualFold(id.ObjectID, q.ObjectID) ||
			q.ResourceID != "" && strings.EqualFold(strings.TrimRight(id.ResourceID, "/"), strings.TrimRight(q.ResourceID, "/")) {
			return id, nil
		}
	}
	return node.Identity{}, badRequest("Identity not found")
}

// imdsToken is a successful answer; numbers are strings.
type imdsToken struct {
	AccessToken  string `json:"access_token"`
	ClientID     string `json:"client_id"`
	ExpiresIn    string `json:"expires_in"`
	ExpiresOn    string `json:"expires_on"`
	ExtExpiresIn string `json:"ext_expires_in"`
	NotBefore    string `json:"not_before"`
	Resource     string `json:"resource"`
	TokenType    string `json:"token_type"`
}

// identityToken answers with a token, from memory or from the server.
func (a *Agent) identityToken(ctx context.Context, q imdsQuery) (any, *imdsError) {
	if q.resource == "" {
		return nil, badRequest("The query parameter resource is missing.")
	}
	a.mu.Lock()
	g := a.goal
	a.mu.Unlock()
	if g == nil {
		return nil, &imdsError{Status: http.StatusServiceUnavailable, Code: "temporarily_unavailable", Description: "The node does not know its identities yet.", RetryAfter: 1}
	}
	id, e := chooseIdentity(g.Identities, q.identity)
	if e != nil {
		return nil, e
	}
	if len(g.Audiences) > 0 && !slices.ContainsFunc(g.Audiences, func(s string) bool { return sameAudience(s, q.resource) }) {
		return nil, badRequest("Tokens for this resource are not given to nodes of this pool.")
	}
	t, err := a.tokens.get(tokenKey{id.ClientID, q.resource}, time.Now(), func() (node.TokenResponse, error) {
		var t node.TokenResponse
		_, err := a.srv.do(ctx, http.MethodPost, "/v1/token", nil, node.TokenRequest{Resource: q.resource, ClientID: id.ClientID}, &t)
		return t, err
	})
	if err != nil {
		return nil, tokenError(err)
	}
	left := strconv.FormatInt(int64(time.Until(t.ExpiresOn).Seconds()), 10)
	return imdsToken{
		AccessToken: t.AccessToken, ClientID: t.ClientID, ExpiresIn: left, ExtExpiresIn: left,
		ExpiresOn: strconv.FormatInt(t.ExpiresOn.Unix(), 10), NotBefore: strconv.FormatInt(t.NotBefore.Unix(), 10),
		Resource: q.resource, TokenType: "Bearer",
	}, nil
}

// sameAudience compares resources without a trailing slash and case: clients differ in both.
func sameAudience(x, y string) bool {
	return strings.EqualFold(strings.TrimRight(x, "/"), strings.TrimRight(y, "/"))
}

// tokenError is the endpoint's word for a refusal of the server. A 404 would
// mean "try again" to clients, so it is never used for a missing identity.
func tokenError(err error) *imdsError {
	var ans *answerError
	if !errors.As(err, &ans) {
		return &imdsError{Status: http.StatusServiceUnavailable, Code: "temporarily_unavailable", Description: "The server cannot be reached.", RetryAfter: 2}
	}
	switch {
	case ans.Body.Code == "IdentityNotFound":
		return badRequest("Identity not found")
	case ans.Status == http.StatusTooManyRequests || ans.Status >= 500:
		return &imdsError{
			Status: ans.Status, Code: "temporarily_unavailable", Description: ans.Body.Message,
			RetryAfter: max(1, int(ans.RetryAfter.Seconds())),
		}
	case ans.Status == http.StatusForbidden:
		return &imdsError{Status: http.StatusForbidden, Code: "forbidden", Description: ans.Body.Message}
	}
	return badRequest(ans.Body.Message)
}

// tokens keeps tokens until five minutes before they end. A token prints nowhere.
type tokens struct {
	mu   sync.Mutex // guards kept
	kept map[tokenKey]node.TokenResponse
	age  int // counts forget, so that a token asked for before it is not kept after it
}

type tokenKey struct{ clientID, resource string }

// maxTokens bounds the memory that callers can take by asking for ever new resources.
const maxTokens = 64

func newTokens() *tokens { return &tokens{kept: map[tokenKey]node.TokenResponse{}} }

// forget drops all tokens: the pool's identities changed.
func (t *tokens) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.kept)
	t.age++
}

// get returns a kept token, or asks for one.
func (t *tokens) get(k tokenKey, now time.Time, ask func() (node.TokenResponse, error)) (node.TokenResponse, error) {
	t.mu.Lock()
	tok, ok := t.kept[k]
	age := t.age
	t.mu.Unlock()
	if ok && now.Before(tok.ExpiresOn.Add(-5*time.Minute)) {
		return tok, nil
	}
	fresh, err := ask()
	var ans *answerError
	if err != nil && ok && now.Before(tok.ExpiresOn) && !errors.As(err, &ans) {
		return tok, nil // the server cannot be reached, and this one still counts
	}
	if err != nil {
		return fresh, err
	}
	tok = fresh
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.age == age {
		if len(t.kept) >= maxTokens {
			clear(t.kept)
		}
		t.kept[k] = tok
	}
	return tok, nil
}

// bucket admits rate requests a second, with a burst of as many.
type bucket struct {
	mu   sync.Mutex // guards what follows
	rate float64
	have float64
	last time.Time
}

func newBucket(rate float64) *bucket { return &bucket{rate: rate, have: rate} }

func (b *bucket) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.last.IsZero() {
		b.have = min(b.rate, b.have+b.rate*now.Sub(b.last).Seconds())
	}
	b.last = now
	if b.have < 1 {
		return false
	}
	b.have--
	return true
}

// listenIMDS opens the identity endpoint's listener; nil if it is switched off.
func listenIMDS(cfg Config) (net.Listener, error) {
	if cfg.IMDSListen != nil || cfg.IMDS == "off" {
		return cfg.IMDSListen, nil
	}
	return bindIMDS(cfg)
}
