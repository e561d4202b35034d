package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
)

// maxBody bounds what is read of one answer.
const maxBody = 64 << 20

// Request is one call.
type Request struct {
	Method   string
	URL      string      // absolute; see Client.ARM, Client.Vault, Client.Batch
	Version  string      // api-version; empty: the URL holds it, or the call needs none
	Query    url.Values  // further query parameters
	Header   http.Header // further headers
	Body     any         // nil: none; []byte: sent as it is; anything else as JSON
	Resource string      // audience of the token; empty: known from the host, or asked for by a challenge
	Open     bool        // send no token

	repeat bool // may be sent twice although its method is POST
}

// Response is a successful answer (2xx).
type Response struct {
	Status int
	Header http.Header
	Body   []byte
}

// Into decodes the body.
func (r *Response) Into(v any) error {
	if len(r.Body) == 0 {
		return nil
	}
	if err := json.Unmarshal(r.Body, v); err != nil {
		return fmt.Errorf("reading the server's answer: %w", err)
	}
	return nil
}

// Warnings returns the texts of the answer's Warning headers (RFC 7234, 5.5).
func (r *Response) Warnings() []string {
	var out []string
	for _, v := range r.Header.Values("Warning") {
		parts := strings.SplitN(v, " ", 3) // code, agent, quoted text
		text := v
		if len(parts) == 3 {
			text = unquote(strings.TrimSpace(parts[2]))
		}
		out = append(out, text)
	}
	return out
}

// unquote takes a quoted-string apart (RFC 9110, 5.6.4); other text stays as it is.
func unquote(s string) string {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
		return s
	}
	var b strings.Builder
	for i := 1; i < len(s)-1; i++ {
		if s[i] == '\\' && i < len(s)-2 {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// retryWaits are the pauses between attempts where the server names none; the
// sum bounds how long a call hides an outage.
var retryWaits = [...]time.Duration{
	200 * time.Millisecond,
	time.Second, // 1.2 s
	3 * time.Second,
}

// maxRetryAfter is the longest pause that a call takes on the server's word.
const maxRetryAfter = 30 * time.Second

// Do sends the request and returns its answer. Answers other than 2xx are a
// *[Error]. A call that may be repeated is repeated on 429 and 503 and when the
// connection breaks, as often as retryWaits has entries.
func (c *Client) Do(ctx context.Context, req Request) (*Response, error) {
	u, err := url.Parse(req.URL)
	if err != nil {
		return nil, fmt.Errorf("calling the server: %w", err)
	}
	if req.Open {
		return c.send(ctx, req, "")
	}
	resource := req.Resource
	if resource == "" {
		resource = c.resource(u)
	}
	if resource == "" {
		if resource, err = c.askResource(ctx, req, u); err != nil {
			return nil, err
		}
	}
	tok, err := c.tokens.get(ctx, resource, "")
	if err != nil {
		return nil, err
	}
	resp, err := c.send(ctx, req, tok)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusUnauthorized {
		// The token may have ended or its signing key may be gone: once more with a new one.
		if tok, err = c.tokens.get(ctx, resource, tok); err != nil {
			return nil, err
		}
		return c.send(ctx, req, tok)
	}
	return resp, err
}

// askResource finds the audience of a vault's host by an unauthenticated
// request without a body, as Azure's clients do.
func (c *Client) askResource(ctx context.Context, req Request, u *url.URL) (string, error) {
	if s := c.cfg.Endpoints.VaultSuffix; s != "" && hasSuffixFold(u.Host, "."+s) {
		return "https://" + s, nil
	}
	ask := Request{Method: req.Method, URL: req.URL, Version: req.Version, Query: req.Query, repeat: true}
	_, err := c.send(ctx, ask, "")
	var e *Error
	if !errors.As(err, &e) || e.Status != http.StatusUnauthorized {
		if err == nil {
			err = fmt.Errorf("%s answered without asking for a token", u.Host)
		}
		return "", err
	}
	return challengeResource(e.header, u.Host)
}

// send sends the request with a token, and repeats it where that is allowed.
func (c *Client) send(ctx context.Context, req Request, tok keyfleet.Secret) (*Response, error) {
	body, err := encode(req.Body)
	if err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		resp, err := c.once(ctx, req, body, tok)
		wait, again := req.retry(err, attempt)
		if !again || ctx.Err() != nil {
			return resp, err
		}
		if serr := c.cfg.Sleep(ctx, wait); serr != nil {
			return nil, err // the first reason says more than "context ended"
		}
	}
}

// retry decides whether a failed attempt is made again, and when.
func (req Request) retry(err error, attempt int) (time.Duration, bool) {
	if err == nil || attempt >= len(retryWaits) {
		return 0, false
	}
	safe := req.repeat
	switch req.Method {
	case http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete:
		safe = true
	}
	var e *Error
	if !errors.As(err, &e) {
		return 0, false
	}
	switch {
	case e.Status == 0 && e.refused: // nothing was sent; but a server that is not there is said at once
		return 0, false
	case e.Status == 0 && safe, e.Status == http.StatusServiceUnavailable && safe:
	case e.Status == http.StatusTooManyRequests: // refused before anything was done, whatever the method
	default:
		return 0, false
	}
	if e.RetryAfter > maxRetryAfter {
		return 0, false
	}
	return max(retryWaits[attempt], e.RetryAfter), true
}

func encode(v any) ([]byte, error) {
	switch b := v.(type) {
	case nil:
		return nil, nil
	case []byte:
		return b, nil
	case json.RawMessage:
		return b, nil
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("writing the request body: %w", err)
	}
	return bytes.TrimRight(buf.Bytes(), "\n"), nil
}

func (c *Client) once(ctx context.Context, req Request, body []byte, tok keyfleet.Secret) (*Response, error) {
	hr, err := c.httpRequest(ctx, req, body, tok)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(hr)
	if err != nil {
		return nil, c.unreachable(ctx, hr, err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, c.unreachable(ctx, hr, err)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, decodeError(hr, resp, b)
	}
	return &Response{Status: resp.StatusCode, Header: resp.Header, Body: b}, nil
}

func (c *Client) httpRequest(ctx context.Context, req Request, body []byte, tok keyfleet.Secret) (*http.Request, error) {
	u, err := url.Parse(req.URL)
	if err != nil {
		return nil, fmt.Errorf("calling the server: %w", err)
	}
	q := u.Query()
	if req.Version != "" {
		q.Set("api-version", req.Version)
	}
	for k, v := range req.Query {
		q[k] = v
	}
	u.RawQuery = q.Encode()
	var r io.Reader
	if body != nil {
		r = bytes.NewReader(body)
	}
	hr, err := http.NewRequestWithContext(ctx, req.Method, u.String(), r)
	if err != nil {
		return nil, fmt.Errorf("calling the server: %w", err)
	}
	hr.Header.Set("User-Agent", c.cfg.UserAgent)
	hr.Header.Set("Accept", "application/json")
	if body != nil {
		hr.Header.Set("Content-Type", "application/json")
	}
	for k, v := range req.Header {
		hr.Header[http.CanonicalHeaderKey(k)] = v
	}
	if tok != "" {
		hr.Header.Set("Authorization", "Bearer "+tok.Reveal())
	}
	return hr, nil
}

// Call is Do followed by Into; out may be nil.
func (c *Client) Call(ctx context.Context, req Request, out any) error {
	resp, err := c.Do(ctx, req)
	if err != nil || out == nil {
		return err
	}
	return resp.Into(out)
}

// List reads every page of a collection.
func List[T any](ctx context.Context, c *Client, req Request) ([]T, error) {
	var all []T
	for {
		var page struct {
			Value     []T    `json:"value"`
			NextLink  string `json:"nextLink"`
			OdataNext string `json:"odata.nextLink"`
		}
		if err := c.Call(ctx, req, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Value...)
		next := page.NextLink
		if next == "" {
			next = page.OdataNext
		}
		if next == "" {
			return all, nil
		}
		req = Request{Method: req.Method, URL: next, Header: req.Header, Resource: req.Resource} // requested verbatim
	}
}
