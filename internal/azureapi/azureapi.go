// Package azureapi is the REST edge for people's clients: az, the Azure SDKs,
// curl, and our own command line.
//
// Idea: the whole surface is a table of [Route] rows, made by one sub-package a
// surface (login, resources, keyvault, batch, nodes). This package turns the
// table into a handler: it finds the surface by host, routes without regard to
// case, authenticates, checks the api-version, calls the row's function and
// writes its reply, or its error in the form the surface's clients expect.
//
//	host -> surface -> recover -> ids -> route -> authenticate -> api-version -> handler -> reply | error table
//
// Invariant: a request reaches a handler only with a verified caller in its
// context, except on rows marked [Public]; handlers never write errors
// themselves. What a caller may do is decided by the domain operation, which
// also records it (package access).
//
// Consequence for the operator: every answer carries a request id that stands
// in the log and in the audit record; every error has a code, and where there
// is one a fix.
package azureapi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Verifier checks a bearer token for one of the audiences. Package identity has it.
type Verifier interface {
	Verify(ctx context.Context, token string, audiences []string) (access.Principal, error)
}

// Config is what the edge needs.
type Config struct {
	Endpoints Endpoints
	Routes    []Route
	Verifier  Verifier
	Tenant    string // tenant id, named in authentication challenges
	// Authorize decides whether the caller may do the row's action on what the
	// path names. It is asked before a request that changes something is looked
	// at any further, so that a refusal tells nothing about body or resource. The
	// domain operation decides again, in its transaction. Nil: only that decides.
	Authorize func(r *Request, action string) error
	Log       *slog.Logger                                                                       // nil: slog.Default()
	Observe   func(surface Surface, method string, status int, took time.Duration, route string) // nil: nothing
}

// API is the handler of all surfaces. Make it with [New].
type API struct {
	cfg  Config
	mux  map[Surface]*chi.Mux
	rows map[Surface]map[string]*row // chi pattern + method
}

// row is a route with what the router needs to know about its path.
type row struct {
	Route
	params map[string]int // parameter name -> index of its path segment
}

// New builds the handler. A table that cannot be routed (two rows with the same
// method and path on a surface) is an error.
func New(cfg Config) (*API, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	a := &API{cfg: cfg, mux: map[Surface]*chi.Mux{}, rows: map[Surface]map[string]*row{}}
	for _, rt := range cfg.Routes {
		if a.mux[rt.Surface] == nil {
			a.mux[rt.Surface] = chi.NewMux()
			a.rows[rt.Surface] = map[string]*row{}
		}
		key := rt.Method + " " + rt.Path
		if a.rows[rt.Surface][key] != nil {
			return nil, fmt.Errorf("route table: %s %s stands twice on %s", rt.Method, rt.Path, rt.Surface)
		}
		if rt.Path != strings.ToLower(rt.Path) && !strings.Contains(rt.Path, "{") {
			return nil, fmt.Errorf("route table: %s is not lower case", rt.Path)
		}
		rw := &row{Route: rt, params: map[string]int{}}
		for i, seg := range strings.Split(rt.Path[1:], "/") {
			if strings.HasPrefix(seg, "{") {
				rw.params[strings.Trim(seg, "{}")] = i
			}
		}
		a.rows[rt.Surface][key] = rw
		a.mux[rt.Surface].Method(rt.Method, rt.Path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.Context().Value(exchangeKey{}).(*exchange).row = rw
		}))
	}
	return a, nil
}

// Routes returns the route table.
func (a *API) Routes() []Route { return a.cfg.Routes }

type exchangeKey struct{}

// exchange is one request on its way through the edge.
type exchange struct {
	host        Host
	path        string // as the client sent it, without a surface prefix
	scope       string // what stood before /providers/microsoft.authorization/
	row         *row
	id          string
	correlation string
	start       time.Time
	status      int
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &exchange{id: uuid(), start: time.Now()}
	x.correlation = r.Header.Get("x-ms-correlation-request-id")
	if x.correlation == "" || len(x.correlation) > 64 {
		x.correlation = x.id
	}
	var ok bool
	x.host, x.path, ok = a.cfg.Endpoints.surfaceOf(r)
	x.commonHeaders(w.Header(), r)
	defer a.finish(w, r, x)
	if !ok {
		a.writeError(w, r, x, fault.New(fault.NotFound, "UnknownHost", "This server does not answer for host %q.", r.Host).
			WithFix("use a name under %s, or start the server with --host-alias", a.cfg.Endpoints.Domain))
		return
	}
	reply, err := a.serve(r, x)
	if err != nil {
		a.writeError(w, r, x, err)
		return
	}
	a.writeReply(w, r, x, reply)
}

// finish turns a panic into an internal error and writes the access log line.
func (a *API) finish(w http.ResponseWriter, r *http.Request, x *exchange) {
	if p := recover(); p != nil {
		if p == http.ErrAbortHandler {
			panic(p)
		}
		a.cfg.Log.Error("panic in a handler", "request", x.id, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		if x.status == 0 {
			a.writeError(w, r, x, errors.New("panic"))
		}
	}
	pattern := ""
	if x.row != nil {
		pattern = x.row.Path
	}
	took := time.Since(x.start)
	a.cfg.Log.Debug("request", "request", x.id, "host", r.Host, "method", r.Method, "path", r.URL.Path, "status", x.status, "took", took)
	if a.cfg.Observe != nil {
		a.cfg.Observe(x.host.Surface, r.Method, x.status, took, pattern)
	}
}

func (a *API) serve(r *http.Request, x *exchange) (*Reply, error) {
	found, other := a.route(r, x)
	public := found && x.row.Action == Public
	var caller access.Principal
	if !public {
		var err error
		if caller, err = a.authenticate(r, x.host); err != nil {
			return nil, err
		}
	}
	if !found {
		if other {
			return nil, fault.New(fault.NotFound, "MethodNotAllowed", "%s is not possible on this path.", r.Method)
		}
		return nil, fault.New(fault.NotFound, "NotFound", "There is nothing at %s on %s.", x.path, r.Host)
	}
	version := r.URL.Query().Get("api-version")
	if err := checkVersion(x.host.Surface, x.row.Route, version); err != nil {
		return nil, err
	}
	ctx := access.With(r.Context(), access.Call{Principal: caller, RequestID: x.id, CorrelationID: x.correlation, RemoteAddr: r.RemoteAddr})
	req := &Request{Request: r.WithContext(ctx), Caller: caller, Version: version, Host: x.host, ID: x.id, path: x.path, endpoints: a.cfg.Endpoints}
	req.params = x.params()
	if change := r.Method != http.MethodGet && r.Method != http.MethodHead; change && !public && x.row.Action != Authenticated && a.cfg.Authorize != nil {
		if err := a.cfg.Authorize(req, x.row.Action); err != nil {
			return nil, err
		}
	}
	return x.row.Handle(req)
}

// ByPolicy reports whether the action of a row is decided by a vault's access
// policies and not by role assignments.
func ByPolicy(action string) bool {
	return strings.HasPrefix(action, "secrets/") || strings.HasPrefix(action, "certificates/")
}

// route finds the row. other is true when the path exists with other methods.
func (a *API) route(r *http.Request, x *exchange) (found, other bool) {
	mux := a.mux[x.host.Surface]
	if mux == nil {
		return false, false
	}
	path := strings.ToLower(strings.TrimRight(x.path, "/"))
	if i := strings.LastIndex(path, authorizationPart); i >= 0 {
		// An extension resource: whatever stands before is one parameter, "scope".
		x.scope = x.path[:i]
		if x.scope == "" {
			x.scope = "/"
		}
		path = "/-" + path[i:]
	}
	if path == "" {
		path = "/"
	}
	rctx := chi.NewRouteContext()
	if !mux.Match(rctx, r.Method, path) {
		for _, m := range []string{http.MethodGet, http.MethodPut, http.MethodPost, http.MethodPatch, http.MethodDelete} {
			if mux.Match(chi.NewRouteContext(), m, path) {
				return false, true
			}
		}
		return false, false
	}
	x.row = a.rows[x.host.Surface][r.Method+" "+rctx.RoutePattern()]
	return x.row != nil, false
}

const authorizationPart = "/providers/microsoft.authorization/"

// params takes the parameters from the path as the client wrote it.
func (x *exchange) params() map[string]string {
	out := make(map[string]string, len(x.row.params))
	path := strings.Trim(x.path, "/")
	if x.scope != "" {
		path = "-" + strings.TrimRight(x.path[len(strings.TrimRight(x.scope, "/")):], "/")
	}
	segs := strings.Split(path, "/")
	for name, i := range x.row.params {
		if i < len(segs) {
			out[name] = segs[i]
		}
	}
	if x.scope != "" {
		out["scope"] = x.scope
	}
	return out
}

func checkVersion(s Surface, rt Route, version string) error {
	if rt.Versions == nil {
		return nil
	}
	if version == "" {
		code := map[Surface]string{ARM: "MissingApiVersionParameter", Batch: "MissingRequiredQueryParameter"}[s]
		return fault.New(fault.Invalid, code, "The api-version query parameter (?api-version=) is required for all requests.").At("api-version").
			WithFix("add ?api-version=%s", rt.Versions[len(rt.Versions)-1])
	}
	for _, v := range rt.Versions {
		if strings.EqualFold(v, version) {
			return nil
		}
	}
	code := map[Surface]string{ARM: "InvalidApiVersionParameter", Batch: "UnsupportedRequestVersion", Vault: "BadParameter"}[s]
	return fault.New(fault.Invalid, code, "The api-version '%s' is not supported here. Supported: %s.", version, strings.Join(rt.Versions, ", ")).At("api-version")
}

// uuid returns a random UUID (version 4, RFC 9562).
func uuid() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
