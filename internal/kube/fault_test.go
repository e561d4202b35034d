package kube

import (
	"context"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// broken is a server that does on purpose what a real API server cannot be made to do.
type broken struct {
	*httptest.Server
	asked atomic.Int32
	open  atomic.Int32 // connections
}

func newBroken(t *testing.T, answer http.HandlerFunc) *broken {
	t.Helper()
	b := &broken{}
	b.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.asked.Add(1)
		answer(w, r)
	}))
	b.StartTLS()
	t.Cleanup(b.Close)
	return b
}

// DialContext implements rotation.Dialer.
func (b *broken) DialContext(ctx context.Context, kind, _ string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, kind, b.Listener.Addr().String())
	if err != nil {
		return nil, err
	}
	b.open.Add(1)
	return &counted{Conn: c, closed: sync.OnceFunc(func() { b.open.Add(-1) })}, nil
}

type counted struct {
	net.Conn
	closed func()
}

func (c *counted) Close() error {
	c.closed()
	return c.Conn.Close()
}

func (b *broken) api(t *testing.T, timeout time.Duration) *api {
	t.Helper()
	roots := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b.Certificate().Raw})
	a, err := connect(b, "example.com:6443", rotation.Credential{Roots: roots, Token: "s3cret"}, timeout) // example.com is in httptest's certificate
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func respond(status int, kind, text string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", kind)
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text)
	}
}

func cut(w http.ResponseWriter, sent string) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	_, _ = io.WriteString(c, sent)
	_ = c.Close()
}

func TestBrokenServers(t *testing.T) {
	list := `{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"m"},"data":{"a":"b"}}`
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		kind   fault.Kind
		text   string
	}{
		"never answers": {func(_ http.ResponseWriter, r *http.Request) { hang(r) }, fault.Unavailable, ""},
		"stops in the middle": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, list[:10])
			w.(http.Flusher).Flush()
			hang(r)
		}, fault.Unavailable, ""},
		"cuts the connection": {func(w http.ResponseWriter, _ *http.Request) { cut(w, "") }, fault.Unavailable, "EOF"},
		"cuts in the middle": {func(w http.ResponseWriter, _ *http.Request) {
			cut(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"+list[:10])
		}, fault.Unavailable, "unexpected EOF"},
		"speaks another protocol":     {func(w http.ResponseWriter, _ *http.Request) { cut(w, "SSH-2.0-OpenSSH\r\n") }, fault.Unavailable, "malformed"},
		"is a web site":               {respond(200, "text/html", "<html>hello</html>"), fault.Unavailable, ""},
		"answers garbage":             {respond(200, "application/json", `{"kind":`), fault.Unavailable, ""},
		"answers something else":      {respond(200, "application/json", `{"kind":"Elephant","apiVersion":"zoo/v1"}`), fault.Unavailable, ""},
		"is elsewhere":                {respond(302, "text/plain", "", "Location", "https://example.org/"), fault.Unavailable, ""},
		"is behind a broken balancer": {respond(503, "text/html", "<html>no backend</html>", "Retry-After", "1"), fault.Unavailable, "unable to handle"},
		"has too much to do":          {respond(429, "text/plain", "later", "Retry-After", "1"), fault.TooMany, "later"},
		"fails with a status":         {respond(500, "application/json", `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"etcdserver: leader changed","code":500}`), fault.Unavailable, "leader changed"},
		"does not know who we are":    {respond(401, "application/json", `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}`), fault.Unauthenticated, "Unauthorized"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBroken(t, test.answer)
			began := time.Now()
			_, err := b.api(t, 3*time.Second).ConfigMap(t.Context(), "default", "m")
			if !errors.Is(err, test.kind) || err == nil || !strings.Contains(err.Error(), test.text) || !strings.Contains(err.Error(), "default/m") {
				t.Errorf("%v", err)
			}
			if err != nil && strings.Contains(err.Error(), "s3cret") {
				t.Errorf("a secret in an error: %v", err)
			}
			if n := b.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
			if took := time.Since(began); took > 30*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestCallerGivesUp(t *testing.T) {
	b := newBroken(t, func(_ http.ResponseWriter, r *http.Request) { hang(r) })
	a := b.api(t, answerTime)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := a.ConfigMap(ctx, "default", "m"); !errors.Is(err, context.Canceled) || errors.Is(err, fault.Unavailable) {
		t.Errorf("cancelled: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := a.ConfigMap(ctx, "default", "m"); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, fault.Unavailable) {
		t.Errorf("out of time: %v", err)
	}
	for end := time.Now().Add(10 * time.Second); b.open.Load() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections are left", b.open.Load())
		}
	}
}

// TestIdleConnectionsEnd: an API needs no Close.
func TestIdleConnectionsEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("waits as long as an idle connection is kept")
	}
	b := newBroken(t, respond(200, "text/plain", "ok"))
	for range 3 {
		a := b.api(t, answerTime)
		for range 2 {
			if err := a.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := b.open.Load(); n != 3 {
		t.Errorf("%d connections of three APIs that called twice", n)
	}
	for end := time.Now().Add(3 * idleTime); b.open.Load() > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections are left", b.open.Load())
		}
	}
}

// TestForgottenRevision: the server has compacted the revision of the first page.
func TestForgottenRevision(t *testing.T) {
	secret := func(name string) string {
		return `{"metadata":{"namespace":"default","name":"` + name + `"}}`
	}
	b := newBroken(t, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		switch {
		case q.Get("continue") != "":
			respond(410, "application/json", `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"too old","reason":"Expired","code":410}`)(w, r)
		case q.Get("limit") == "":
			respond(200, "application/json", `{"kind":"SecretList","apiVersion":"v1","metadata":{},"items":[`+secret("a")+`,`+secret("b")+`]}`)(w, r)
		default:
			respond(200, "application/json", `{"kind":"SecretList","apiVersion":"v1","metadata":{"continue":"x"},"items":[`+secret("a")+`]}`)(w, r)
		}
	})
	all, err := b.api(t, answerTime).TokenSecrets(t.Context())
	if err != nil || len(all) != 2 || all[0].Name != "a" || all[1].Name != "b" {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestConnectorRefuses(t *testing.T) {
	b := newBroken(t, nil)
	roots := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b.Certificate().Raw})
	for name, test := range map[string]struct {
		server string
		as     rotation.Credential
	}{
		"no port":                 {"example.com", rotation.Credential{Roots: roots}},
		"no roots":                {"example.com:443", rotation.Credential{}},
		"no key":                  {"example.com:443", rotation.Credential{Roots: roots, Cert: roots}},
		"token with its line end": {"example.com:443", rotation.Credential{Roots: roots, Token: "s3cret\n"}},
		"garbage for key":         {"example.com:443", rotation.Credential{Roots: roots, Cert: roots, Key: []byte("s3cret")}},
	} {
		if _, err := Connector(b)(test.server, test.as); !errors.Is(err, fault.Invalid) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// hang answers nothing until the client has gone, and ends without a word: an
// empty answer could still reach a client that is about to hang up.
func hang(r *http.Request) {
	<-r.Context().Done()
	panic(http.ErrAbortHandler)
}
