package azureapi

import (
	"net"
	"net/http"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
)

// Surface is one of the hosts that Keyfleet answers as.
type Surface string

// The surfaces. A vault's and a batch account's host carry their names.
const (
	ARM   Surface = "arm"   // arm.DOMAIN
	Login Surface = "login" // login.DOMAIN
	Vault Surface = "vault" // NAME.vault.DOMAIN
	Batch Surface = "batch" // ACCOUNT.REGION.batch.DOMAIN
)

// Route is one row of the route table. The table is data: the router, the
// authorisation matrix of the tests and the API index are made from it.
type Route struct {
	Surface  Surface
	Method   string
	Path     string   // chi pattern in lower case; parameters in braces; a trailing slash in requests is ignored
	Versions []string // accepted api-versions; nil: the route needs none
	// Action is what the caller must be allowed to do: an Azure action for role
	// decisions, "secrets/get" for access policies; Public for open routes;
	// Authenticated where any valid caller will do. The handler's domain
	// operation enforces it; the matrix test proves that it does.
	Action string
	Handle func(r *Request) (*Reply, error)
}

// Special values of Route.Action.
const (
	Public        = "public"
	Authenticated = "authenticated"
)

// Request is an authenticated request to a route.
type Request struct {
	*http.Request
	Caller  access.Principal
	Version string // api-version as sent; one of Route.Versions
	Host    Host
	ID      string // request id

	params    map[string]string
	path      string
	endpoints Endpoints
}

// Host is the parsed host of a request.
type Host struct {
	Surface Surface
	Name    string // vault or account; lower case; empty for arm and login
	Region  string // of a batch host
	Suffix  string // what follows, with the port: "vault.keyfleet.internal:8443"

	prefix string // path prefix by which the surface was reached; usually empty
}

// Param returns a path parameter in the caller's casing, percent-decoded.
func (r *Request) Param(name string) string { return r.params[name] }

// ResourceID returns the ARM id that the request's path names, without a
// trailing verb: fault.Invalid if the path is none.
func (r *Request) ResourceID() (arm.ID, error) { return resourceID(r) }

// Reply is a successful answer. Body nil means no body.
type Reply struct {
	Status int // zero: 200
	Header http.Header
	Body   any // marshalled as JSON

	// Upgrade, if set, gets the connection after a 101 answer with Protocol, and
	// owns it until it returns. Status and Body are then not used.
	Upgrade  func(conn net.Conn)
	Protocol string
}

// OK answers 200 with a body.
func OK(body any) *Reply { return &Reply{Status: http.StatusOK, Body: body} }

// Status answers with a status and no body.
func Status(code int) *Reply { return &Reply{Status: code} }

// With returns a copy with a header set.
func (r *Reply) With(key, value string) *Reply {
	c := *r
	c.Header = r.Header.Clone()
	if c.Header == nil {
		c.Header = http.Header{}
	}
	c.Header.Set(key, value)
	return &c
}
