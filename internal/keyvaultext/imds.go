package keyvaultext

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

const maxBody = 1 << 20 // bytes read of any answer

// tokenSource asks the node's managed identity endpoint (IMDS,
// /metadata/identity/oauth2/token) for tokens and keeps them until shortly
// before they expire. It is safe for several goroutines; one asks, the others wait.
type tokenSource struct {
	endpoint string // msiEndpoint in its long form
	clientID string // empty: the node's only identity
	http     *http.Client
	timing   Timing

	mu     sync.Mutex
	tokens map[string]token // by resource
}

type token struct {
	value   secret
	refresh time.Time // ask for the next one from here on
}

// get returns a token for resource. stale, if not empty, is a token that the
// vault has just refused, and is not returned again.
func (s *tokenSource) get(ctx context.Context, resource string, stale secret) (secret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := s.tokens[resource]; ok && t.value != stale && time.Now().Before(t.refresh) {
		return t.value, nil
	}
	wait := s.timing.RetryBase
	for try := 1; ; try++ {
		t, err := s.ask(ctx, resource)
		if err == nil {
			s.tokens[resource] = t
			return t.value, nil
		}
		if f := fault.From(err); f.Kind != fault.Unavailable && f.Kind != fault.TooMany || try >= s.timing.TokenTries {
			return secret{}, err
		} else if f.RetryAfter > wait {
			return secret{}, err // longer than is worth holding the certificate's try open
		}
		select {
		case <-ctx.Done():
			return secret{}, err
		case <-time.After(wait):
		}
		wait *= 2
	}
}

// ask makes one request. Statuses that the protocol calls temporary (404 and
// 410 while the endpoint starts, 429, 5xx) are fault.Unavailable or fault.TooMany.
func (s *tokenSource) ask(ctx context.Context, resource string) (token, error) {
	query := url.Values{"api-version": {"2018-02-01"}, "resource": {resource}}
	if s.clientID != "" {
		query.Set("client_id", s.clientID)
	}
	ctx, cancel := context.WithTimeout(ctx, s.timing.Request)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.endpoint+"?"+query.Encode(), nil)
	if err != nil {
		return token{}, fmt.Errorf("building token request: %w", err)
	}
	req.Header.Set("Metadata", "true")
	resp, err := s.http.Do(req)
	if err != nil {
		return token{}, fault.New(fault.Unavailable, "IdentityEndpointUnreachable", "The identity endpoint %s does not answer: %s.", s.endpoint, plainNetworkError(err)).
			WithFix("check settings.authenticationSettings.msiEndpoint, and that the node's agent serves it").Because(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return token{}, fault.New(fault.Unavailable, "IdentityEndpointUnreachable", "The identity endpoint %s cut its answer off: %s.", s.endpoint, plainNetworkError(err))
	}
	if resp.StatusCode != http.StatusOK {
		return token{}, s.refused(resp, body)
	}
	return parseToken(body, time.Now())
}

// refused explains an answer that is no token.
func (s *tokenSource) refused(resp *http.Response, body []byte) error {
	var e struct {
		Error            string `json:"error"`
		ErrorDescription string `json:"error_description"`
	}
	_ = json.Unmarshal(body, &e) // a body in another form leaves only the status
	who := "the node's identity"
	if s.clientID != "" {
		who = "the identity with client id " + s.clientID
	}
	kind, fix := fault.Denied, "put the identity on the pool, and its client id into settings.authenticationSettings.msiClientId"
	switch {
	case resp.StatusCode == http.StatusTooManyRequests:
		kind, fix = fault.TooMany, "none needed: the extension tries again"
	case resp.StatusCode == http.StatusNotFound, resp.StatusCode == http.StatusGone, resp.StatusCode >= 500:
		kind = fault.Unavailable
	case s.clientID == "":
		fix = "name the identity in settings.authenticationSettings.msiClientId: it is required as soon as the pool has a user-assigned identity"
	}
	return fault.New(kind, firstNonEmpty(e.Error, "IdentityEndpointError"), "HTTP %d from the identity endpoint, no token for %s: %s", resp.StatusCode, who,
		firstNonEmpty(oneLine(e.ErrorDescription), http.StatusText(resp.StatusCode))).
		WithFix("%s", fix).After(retryAfter(resp.Header, time.Now()))
}

// parseToken reads the endpoint's answer; its numbers come as strings or numbers.
func parseToken(body []byte, now time.Time) (token, error) {
	var answer struct {
		AccessToken string          `json:"access_token"`
		ExpiresOn   json.RawMessage `json:"expires_on"`
		ExpiresIn   json.RawMessage `json:"expires_in"`
	}
	if err := json.Unmarshal(body, &answer); err != nil || answer.AccessToken == "" || strings.ContainsAny(answer.AccessToken, "\r\n ") {
		return token{}, fault.New(fault.Unavailable, "IdentityEndpointError", "The identity endpoint answered 200 without a usable access_token.").
			WithFix("check that settings.authenticationSettings.msiEndpoint is a managed identity endpoint")
	}
	life := 5 * time.Minute // an answer that does not say
	if unix, err := number(answer.ExpiresOn); err == nil {
		life = time.Unix(unix, 0).Sub(now)
	} else if seconds, err := number(answer.ExpiresIn); err == nil && seconds < math.MaxInt32 {
		life = time.Duration(seconds) * time.Second
	}
	return token{value: newSecret(answer.AccessToken), refresh: now.Add(life - min(5*time.Minute, life/5))}, nil
}

func number(raw json.RawMessage) (int64, error) {
	return strconv.ParseInt(strings.Trim(string(raw), `"`), 10, 64)
}

// retryAfter reads the header's seconds or date; zero if there is none.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if seconds, err := strconv.Atoi(v); err == nil && seconds >= 0 && seconds <= 24*3600 {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil && at.After(now) {
		return min(at.Sub(now), 24*time.Hour)
	}
	return 0
}

// plainNetworkError is err without the URL and the layers that net/http puts around it.
func plainNetworkError(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		if u.Timeout() {
			return "no answer in time"
		}
		err = u.Err
	}
	return oneLine(err.Error())
}

// oneLine makes foreign text fit for a log line and a status message.
func oneLine(s string) string {
	s = strings.Join(strings.FieldsFunc(strings.ToValidUTF8(s, "?"), func(r rune) bool { return r < ' ' || r == 0x7f }), " ")
	if len(s) > 1000 {
		s = strings.ToValidUTF8(s[:1000], "") + "..."
	}
	return s
}

func firstNonEmpty(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
