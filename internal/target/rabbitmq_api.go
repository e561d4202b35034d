package target

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// maxAnswer bounds what is read of an answer of the management API: its longest one
// is the list of connections, of which only names are asked for.
const maxAnswer = 64 << 20

// call makes one request of the management API, /api/PATH. It decodes the answer
// into out, if that is not nil. What is not there is fault.NotFound.
func (r rabbitmq) call(ctx context.Context, method string, body, out any, path ...string) error {
	if method == http.MethodGet {
		return r.exchange(ctx, method, body, out, path)
	}
	return effect.Do("rabbitmq: "+strings.ToLower(method)+" "+path[0], func() error { return r.exchange(ctx, method, body, out, path) })
}

func (r rabbitmq) exchange(ctx context.Context, method string, body, out any, path []string) error {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("writing a request: %w", err)
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, r.url(path), content)
	if err != nil {
		return fmt.Errorf("writing a request: %w", err)
	}
	req.SetBasicAuth(r.Admin.User, r.Admin.Password.Reveal())
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.client().Do(req)
	if err != nil {
		return r.apiError(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return r.apiError(err)
	}
	if err := r.status(resp, answer, method+" "+strings.Join(path, "/")); err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return r.failed("its management API answers with something else than JSON", err)
	}
	return nil
}

// url is the URL of a path; each part is escaped, for a virtual host may be called "/".
func (r rabbitmq) url(path []string) string {
	u := strings.TrimSuffix(r.Management, "/") + "/api"
	for _, part := range path {
		u += "/" + url.PathEscape(part)
	}
	if path[0] == "connections" && len(path) == 1 {
		u += "?columns=name,user"
	}
	return u
}

// client speaks HTTP with the management API. Each connection serves one request:
// none stays open. Redirections are not followed: the password is for this server.
func (r rabbitmq) client() *http.Client {
	config := r.config
	if config != nil && r.TLS.Name == "" {
		config = config.Clone()
		config.ServerName = "" // the URL's
	}
	return &http.Client{
		Timeout: callTimeout,
		Transport: &http.Transport{
			TLSClientConfig: config, TLSHandshakeTimeout: connectTimeout, DisableKeepAlives: true,
			DialContext: (&net.Dialer{Timeout: connectTimeout}).DialContext,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func (r rabbitmq) apiError(err error) error {
	if f := r.unanswered(err); f != nil {
		return f
	}
	if strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		return fault.New(fault.Unavailable, codeTLS, "The management API of '%s' does not speak TLS.", r.address()).At(r.Management).
			WithFix("turn on TLS at the server, or register the API with http://").Because(err)
	}
	return r.unreachable("its management API does not answer", err)
}

// status turns a status into an error that people see.
func (r rabbitmq) status(resp *http.Response, answer []byte, doing string) error {
	said := fmt.Errorf("%s: %s: %.500s", doing, resp.Status, answer)
	switch {
	case resp.StatusCode/100 == 2:
		return nil
	case resp.StatusCode == http.StatusNotFound:
		return fault.New(fault.NotFound, codeNotFound, "RabbitMQ has no such thing.").At(r.Management).Because(said)
	case resp.StatusCode == http.StatusForbidden, resp.StatusCode == http.StatusUnauthorized && strings.Contains(string(answer), "management"):
		return r.permissions(r.administrator())
	case resp.StatusCode == http.StatusUnauthorized:
		return r.loginRefused(said)
	}
	return r.failed("its management API does not allow it", said)
}
