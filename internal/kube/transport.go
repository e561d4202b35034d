package kube

import (
	"io"
	"net/http"
	"strings"
	"time"
	"unicode"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// caller is the way to one API server as one somebody. client-go's own transport
// is not used: it is shared by all that have the same certificates, and lives on.
type caller struct {
	next  http.RoundTripper
	token string
	user  string // for a front proxy
}

func newCaller(d rotation.Dialer, as rotation.Credential) (*caller, error) {
	secure, err := as.TLS()
	if err != nil {
		return nil, err
	}
	if strings.ContainsFunc(as.Token+as.As, unicode.IsControl) {
		return nil, fault.New(fault.Invalid, "", "The credential's token or user name holds a line break or another control character.")
	}
	// HTTP/1.1: a request that times out takes its connection with it. The one
	// connection of HTTP/2 would go on to be used, though the tunnel below it is dead.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &caller{token: as.Token, user: as.As, next: &http.Transport{
		DialContext: d.DialContext, TLSClientConfig: secure, Protocols: &protocols,
		TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: idleTime, MaxIdleConnsPerHost: 8,
	}}, nil
}

// RoundTrip adds who calls, and hides from client-go what would make it try
// again: errors that it knows, and the header Retry-After.
func (c *caller) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	if c.user != "" {
		r.Header.Set("X-Remote-User", c.user)
	}
	resp, err := c.next.RoundTrip(r)
	if err != nil {
		return nil, &unanswered{err}
	}
	resp.Header.Del("Retry-After")
	resp.Body = body{resp.Body}
	return resp, nil
}

// unanswered is a failure on the way to the server and back. It does not unwrap:
// client-go must not see its cause, api.explain takes it out.
type unanswered struct{ cause error }

func (*unanswered) Error() string { return "the server did not answer" }

// body marks failures in the middle of an answer.
type body struct{ io.ReadCloser }

func (b body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = &unanswered{err}
	}
	return n, err
}
