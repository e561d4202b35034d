// Package nodeapi is the server's edge for node agents: the host node.DOMAIN.
//
// Idea: an agent has one identity, a client certificate whose URI names its
// node, and everything it may ask for is about that node; the node is taken
// from the certificate and never from the request. Push is a hint: a watch is
// one hijacked HTTP/1.1 connection held by one goroutine, over which only "rev
// N" lines go; the agent then fetches with its own identity, so that access is
// checked and recorded at the fetch. What the edge needs from the capabilities
// are small interfaces over the wire types of api/node, declared in domain.go.
//
// Invariant: without a client certificate of the agents' CA there are two
// answers, GET /v1/ca and POST /v1/enrol with a join token; with one, a node
// gets its own items only. A lost "rev" line loses nothing: the agent fetches
// after every connect and at the poll interval.
//
// Consequence for the operator: a server that restarts with thousands of agents
// is not stampeded. It admits enrolments and connections at a rate, answers the
// rest with Retry-After, and tells every agent over how many seconds to spread
// its return.
//
//	agent                              edge
//	  |-- GET /v1/watch (mTLS) ---------->|  admitted, hijacked, 1 goroutine
//	  |<- retry 5 ------------------------|  spread a reconnect over 5 s
//	  |<- rev 812 ------------------------|  goal state changed
//	  |-- GET /v1/goal If-None-Match ---->|  another connection, same identity
//	  |<- ping ---------------------------|  every 30 s +-20 %
package nodeapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"time"

	"golang.org/x/time/rate"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Config is what the edge is made of.
type Config struct {
	Nodes     Nodes     // pool operations; must be set
	Authority Authority // CA of agents; must be set
	Tokens    Tokens    // tokens of the pool's identities; nil: every request is refused as unavailable
	Packages  Packages  // extension packages; nil: none exist
	Logs      Logs      // kept log tails; nil: uploads are accepted and dropped
	Sessions  Sessions  // shell sessions; nil: there are none

	Life       time.Duration // of agent certificates; zero: 24 h
	EnrolRate  float64       // enrolments and renewals admitted a second, with a burst of as many; zero: 50
	AcceptRate float64       // watches admitted a second, with a burst of as many; zero: 200
	Ping       time.Duration // between pings of an idle watch, +-20 %; zero: 30 s
	MaxWatches int           // watches held at once; zero: 20,000
	Log        *slog.Logger  // nil: discarded
	Now        func() time.Time
}

// Edge serves the node host. Make it with [New]; it works as a handler at
// once, and tells agents of changes while [Edge.Run] runs.
type Edge struct {
	cfg    Config
	mux    *http.ServeMux
	hub    *hub
	enrols *rate.Limiter
	watch  *rate.Limiter
	closed context.Context
	close  context.CancelFunc
}

// New returns an edge.
func New(cfg Config) *Edge {
	setDefaults(&cfg)
	e := &Edge{
		cfg: cfg, mux: http.NewServeMux(), hub: newHub(),
		enrols: rate.NewLimiter(rate.Limit(cfg.EnrolRate), max(1, int(cfg.EnrolRate))),
		watch:  rate.NewLimiter(rate.Limit(cfg.AcceptRate), max(1, int(cfg.AcceptRate))),
	}
	e.closed, e.close = context.WithCancel(context.Background())
	e.mux.HandleFunc("GET /v1/ca", e.ca)
	e.mux.HandleFunc("POST /v1/enrol", e.open(e.enrol))
	e.mux.HandleFunc("POST /v1/renew", e.node(e.renew))
	e.mux.HandleFunc("GET /v1/watch", e.node(e.serveWatch))
	e.mux.HandleFunc("GET /v1/goal", e.node(e.goal))
	e.mux.HandleFunc("POST /v1/status", e.node(e.status))
	e.mux.HandleFunc("POST /v1/token", e.node(e.token))
	e.mux.HandleFunc("GET /v1/packages/{sha256}", e.node(e.servePackage))
	e.mux.HandleFunc("POST /v1/logs", e.node(e.logs))
	e.mux.HandleFunc("POST /v1/sessions/{id}", e.node(e.session))
	e.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		e.fail(w, r, fault.New(fault.NotFound, "NoSuchRoute", "The node host has no %s %s.", r.Method, r.URL.Path))
	})
	return e
}

func setDefaults(cfg *Config) {
	if cfg.Life == 0 {
		cfg.Life = 24 * time.Hour
	}
	if cfg.EnrolRate == 0 {
		cfg.EnrolRate = 50
	}
	if cfg.AcceptRate == 0 {
		cfg.AcceptRate = 200
	}
	if cfg.Ping == 0 {
		cfg.Ping = 30 * time.Second
	}
	if cfg.MaxWatches == 0 {
		cfg.MaxWatches = 20000
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
}

// TLS returns the TLS settings of the node host: those of base, with client
// certificates asked for and checked against agents, and HTTP/1.1 only, since
// a watch is hijacked. Return the same value from GetConfigForClient for every
// connection, or resumption stops working.
func TLS(base *tls.Config, agents *x509.CertPool) *tls.Config {
	c := base.Clone()
	c.GetConfigForClient = nil
	c.ClientAuth = tls.VerifyClientCertIfGiven
	c.ClientCAs = agents
	c.NextProtos = []string{"http/1.1"}
	return c
}

// Run tells agents of changed goal states until ctx ends.
func (e *Edge) Run(ctx context.Context) error {
	return e.cfg.Nodes.FollowGoals(ctx, e.hub.revision)
}

// Close ends all watches, telling the agents how to spread their return, and waits for their goroutines.
func (e *Edge) Close() {
	e.close()
	e.hub.drain()
}

// Watching is the number of watches that are held, for the metrics.
func (e *Edge) Watching() int { return e.hub.len() }

// ServeHTTP routes a request to the node host.
func (e *Edge) ServeHTTP(w http.ResponseWriter, r *http.Request) { e.mux.ServeHTTP(w, r) }

// open wraps a route that needs no client certificate.
func (e *Edge) open(fn func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx := access.With(r.Context(), access.Call{RequestID: requestID(w), RemoteAddr: r.RemoteAddr})
		r = r.WithContext(ctx)
		defer e.recover(w, r)
		if err := fn(w, r); err != nil {
			e.fail(w, r, err)
		}
	}
}

// node wraps a route that is about the node that the client certificate names.
func (e *Edge) node(fn func(http.ResponseWriter, *http.Request, string) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, err := nodeOf(r.TLS)
		if err != nil {
			e.fail(w, r, err)
			return
		}
		ctx := access.With(r.Context(), access.Call{
			Principal: access.Principal{Kind: access.Node, ObjectID: "node:" + id, Name: id, Node: id},
			RequestID: requestID(w), RemoteAddr: r.RemoteAddr,
		})
		r = r.WithContext(ctx)
		defer e.recover(w, r)
		if err := fn(w, r, id); err != nil {
			e.fail(w, r, err)
		}
	}
}

// nodeOf takes the node's id from a verified client certificate: its one URI
// keyfleet://node/ID, which must agree with the common name.
func nodeOf(state *tls.ConnectionState) (string, error) {
	none := fault.New(fault.Unauthenticated, "ClientCertificateRequired", "This route needs the client certificate of an enrolled node.").
		WithFix("enrol the node: keyfleet-agent join")
	if state == nil || len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return "", none
	}
	leaf := state.VerifiedChains[0][0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != "keyfleet" || leaf.URIs[0].Host != "node" || len(leaf.URIs[0].Path) < 2 {
		return "", none
	}
	id := leaf.URIs[0].Path[1:]
	if id != leaf.Subject.CommonName || !nodeName(id) {
		return "", none
	}
	return id, nil
}

// nodeName reports whether s can be a node id: it goes into store keys and log file names.
func nodeName(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i, c := range s {
		ok := c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || i > 0 && (c == '-' || c == '_' || c == '.')
		if !ok {
			return false
		}
	}
	return true
}
