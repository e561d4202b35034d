package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// requestTimeout is how long a request to the server may take, downloads and watches excepted.
const requestTimeout = 30 * time.Second

// answerLimit is the most that an answer of the server may weigh, in bytes.
const answerLimit = 8 << 20

// server speaks to the node host as api/node describes. The client certificate
// is looked up at every handshake, so a renewed one is used from then on.
type server struct {
	base    string
	id      atomic.Pointer[identity]
	session sessions
	api     *http.Client // short requests; a connection is kept for a few seconds
	streams *http.Client // watches, downloads: one connection each
}

// newServer returns a client that trusts the CA in ca and dials address instead of base's name, if set.
func newServer(base, address string, ca []byte) (*server, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("the server's CA is not a PEM certificate")
	}
	s := &server{base: base}
	s.session.forget()
	conf := &tls.Config{
		RootCAs: roots, MinVersion: tls.VersionTLS12, ClientSessionCache: &s.session,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if id := s.id.Load(); id != nil {
				return &id.Cert, nil
			}
			return &tls.Certificate{}, nil
		},
	}
	s.api = &http.Client{Timeout: requestTimeout, Transport: transportTo(address, conf, 5*time.Second), CheckRedirect: noRedirect}
	s.streams = &http.Client{Transport: transportTo(address, conf, 0), CheckRedirect: noRedirect}
	return s, nil
}

// use makes id, which may be nil, what the agent proves itself with from the
// next request on. A resumed session or a kept connection would still prove the old one.
func (s *server) use(id *identity) {
	s.id.Store(id)
	s.session.forget()
	s.api.CloseIdleConnections()
	s.streams.CloseIdleConnections()
}

// sessions is a cache of TLS sessions that can be emptied.
type sessions struct {
	cache atomic.Pointer[tls.ClientSessionCache]
}

func (s *sessions) forget() {
	c := tls.NewLRUClientSessionCache(2)
	s.cache.Store(&c)
}

// Get returns a session to resume.
func (s *sessions) Get(key string) (*tls.ClientSessionState, bool) { return (*s.cache.Load()).Get(key) }

// Put keeps a session.
func (s *sessions) Put(key string, cs *tls.ClientSessionState) { (*s.cache.Load()).Put(key, cs) }

// transportTo dials address (or the URL's host) with conf; idle 0: connections are not kept.
func transportTo(address string, conf *tls.Config, idle time.Duration) *http.Transport {
	d := &net.Dialer{Timeout: 10 * time.Second}
	return &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if address != "" {
				addr = address
			}
			return d.DialContext(ctx, network, addr)
		},
		TLSClientConfig: conf, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: requestTimeout,
		IdleConnTimeout: idle, DisableKeepAlives: idle == 0, MaxIdleConnsPerHost: 1, DisableCompression: true,
		ReadBufferSize: 2048, WriteBufferSize: 2048, MaxResponseHeaderBytes: 16 << 10,
	}
}

// noRedirect keeps a redirect from leading anywhere else with our certificate.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// fetchCA gets the CA from a server that is not trusted yet. Nothing secret is
// sent; the caller compares the answer with its pin before anything else happens.
func fetchCA(ctx context.Context, base, address string) ([]byte, error) {
	conf := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} //nolint:gosec // see above: the answer is pinned by its hash
	c := &http.Client{Timeout: requestTimeout, Transport: transportTo(address, conf, 0), CheckRedirect: noRedirect}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v1/ca", nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetching the server's CA: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetching the server's CA: the server answered %s", resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, 64<<10))
}

// answerError is an error answer of the server.
type answerError struct {
	Status     int
	Body       node.Error
	RetryAfter time.Duration // zero: the server named none
}

func (e *answerError) Error() string {
	s := fmt.Sprintf("the server answered %d %s: %s", e.Status, e.Body.Code, e.Body.Message)
	if e.Body.Fix != "" {
		s += " Fix: " + e.Body.Fix
	}
	return s
}

// readError makes the error of an answer that is none of the expected ones.
func readError(resp *http.Response) error {
	e := &answerError{Status: resp.StatusCode}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if json.Unmarshal(body, &e.Body) != nil || e.Body.Code == "" {
		e.Body = node.Error{Code: http.StatusText(resp.StatusCode), Message: "The answer has no error body; is this a Keyfleet node host?"}
	}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		e.RetryAfter = time.Duration(min(n, 3600)) * time.Second
	}
	return e
}

// do sends a JSON body (nil: none) and decodes the answer into out (nil: not
// looked at). header may be nil. It returns the answer's header; a 304 is an
// answer without a body.
func (s *server) do(ctx context.Context, method, path string, header http.Header, in, out any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.base+path, body)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := s.api.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotModified {
		return resp, nil
	}
	if resp.StatusCode/100 != 2 {
		return nil, readError(resp)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, answerLimit))
	if err != nil {
		return nil, fmt.Errorf("reading the server's answer: %w", err)
	}
	if out != nil {
		if err := json.Unmarshal(data, out); err != nil {
			return nil, fmt.Errorf("reading the server's answer: %w", err)
		}
	}
	return resp, nil
}

// stream opens a GET whose body is read as it comes; the caller closes it.
func (s *server) stream(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base+path, nil)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := s.streams.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, readError(resp)
	}
	return resp, nil
}

// Upgrade asks the server to turn a POST to path (such as "/v1/sessions/ID")
// into a byte stream of the named protocol. The caller closes the stream.
func (a *Agent) Upgrade(ctx context.Context, path, protocol string) (io.ReadWriteCloser, error) {
	s := a.srv
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	resp, err := s.streams.Do(req)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	rw, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		defer resp.Body.Close()
		return nil, fmt.Errorf("opening %s: %w", path, readError(resp))
	}
	return rw, nil
}

// isAnswer reports whether err is an answer of the server with this status (and code, unless "").
func isAnswer(err error, status int, code string) bool {
	var e *answerError
	return errors.As(err, &e) && e.Status == status && (code == "" || e.Body.Code == code)
}

// serverName is the name of the node host, without the port.
func (a *Agent) serverName() string {
	host := strings.TrimPrefix(a.cfg.Server, "https://")
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		return host
	}
	return name
}
