// Package batch is the Batch part of the REST edge: accounts and pools on the
// management plane, pools, nodes and extensions on the data plane, and
// Keyfleet's own routes about them.
//
// Idea: every api-version is a view of one hub, package pool's types. Handlers
// take a request apart, call one domain operation, and render its answer; rules
// live in the domain. What clients depend on beyond the documents is kept here
// and named: pool PUT answers 200 and never 201; ETags are weak and quoted on the
// management plane, bare on the data plane; numbers may come as strings in a
// resize; the documented api-version 2010-01-01 of the extension page is an alias.
//
// Invariant: an answer never has protected settings, and a request is never
// half understood: a member that an api-version does not have, or that Keyfleet
// does not offer, is refused by name.
//
// Consequence for the operator: real clients work unchanged; a body that is
// refused says where and why, and what is only doubtful comes back as a
// Warning header (Prefer: handling=strict makes it a refusal).
package batch

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
)

// Config is what the routes need.
type Config struct {
	Fleet  *pool.Fleet // required
	CAHash string      // what `keyfleet-agent join --ca-hash` takes; empty: the answer to a new join token has none
}

type edge struct{ cfg Config }

const (
	accountType = "Microsoft.Batch/batchAccounts"
	groupPath   = "/subscriptions/{subscription}/resourcegroups/{group}"
	accounts    = groupPath + "/providers/microsoft.batch/batchaccounts"
	account     = accounts + "/{account}"
	pools       = account + "/pools"
	onePool     = pools + "/{pool}"
)

// Routes returns the rows of the route table.
func Routes(cfg Config) []azureapi.Route {
	e := &edge{cfg: cfg}
	return slices.Concat(e.managementRoutes(), e.dataRoutes(), e.ownRoutes())
}

func (e *edge) managementRoutes() []azureapi.Route {
	const read, write, del = "/read", "/write", "/delete"
	row := func(method, path, action string, handle func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: path, Versions: dates(), Action: action, Handle: handle}
	}
	poolType := accountType + "/pools"
	return []azureapi.Route{
		row(http.MethodGet, "/subscriptions/{subscription}/providers/microsoft.batch/batchaccounts", accountType+read, e.listAccounts),
		row(http.MethodGet, accounts, accountType+read, e.listAccounts),
		row(http.MethodPut, account, accountType+write, e.putAccount),
		row(http.MethodPatch, account, accountType+write, e.patchAccount),
		row(http.MethodGet, account, accountType+read, e.getAccount),
		row(http.MethodDelete, account, accountType+del, e.deleteAccount),
		row(http.MethodPost, account+"/listkeys", accountType+read, e.listKeys),
		row(http.MethodGet, account+"/operationresults/{operation}", accountType+read, e.getAccount),
		row(http.MethodGet, account+"/pooloperationresults/{operation}", poolType+read, e.poolOperation),
		row(http.MethodGet, pools, poolType+read, e.listPools),
		row(http.MethodPut, onePool, poolType+write, e.putPool),
		row(http.MethodPatch, onePool, poolType+write, e.patchPool),
		row(http.MethodGet, onePool, poolType+read, e.getPool),
		row(http.MethodDelete, onePool, poolType+del, e.deletePool),
		row(http.MethodPost, onePool+"/stopresize", poolType+write, e.stopResize),
		row(http.MethodPost, onePool+"/disableautoscale", poolType+write, e.disableAutoScale),
	}
}

// accountID is the account that the path names.
func accountID(r *azureapi.Request) arm.ID {
	return arm.ID{
		Subscription: r.Param("subscription"), ResourceGroup: r.Param("group"), Provider: "Microsoft.Batch",
		Types: []string{"batchAccounts"}, Names: []string{r.Param("account")},
	}
}

// poolID is the pool that the path names.
func poolID(r *azureapi.Request) arm.ID { return poolIn(accountID(r), r.Param("pool")) }

func poolIn(account arm.ID, name string) arm.ID {
	account.Types, account.Names = []string{"batchAccounts", "pools"}, []string{account.Names[0], name}
	return account
}

// etagOf is the entity tag of a precondition header: W/"0xAB", "0xAB" and 0xAB
// all mean 0xAB.
func etagOf(header string) string {
	return strings.Trim(strings.TrimPrefix(strings.TrimSpace(header), "W/"), `"`)
}

// strict reports whether the caller wants warnings to be refusals.
func strict(r *azureapi.Request) bool {
	for _, v := range r.Header.Values("Prefer") { // RFC 7240, section 4.4
		if strings.Contains(strings.ToLower(v), "handling=strict") {
			return true
		}
	}
	return strings.EqualFold(r.Header.Get("Keyfleet-Strict"), "true") || strings.EqualFold(r.Query("strict"), "true")
}

// warn adds a Warning header for each problem (RFC 7234, section 5.5).
func warn(reply *azureapi.Reply, problems []pool.Problem) *azureapi.Reply {
	if len(problems) == 0 {
		return reply
	}
	c := *reply
	if c.Header = reply.Header.Clone(); c.Header == nil {
		c.Header = http.Header{}
	}
	for _, p := range problems {
		c.Header.Add("Warning", "299 keyfleet "+quoted(p.Code+": "+p.String()))
	}
	return &c
}

// quoted is a quoted-string of a header: printable ASCII, one line.
func quoted(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			b.WriteByte('\\')
			b.WriteRune(c)
		case c < ' ' || c == 0x7f:
			b.WriteByte(' ')
		case c > 0x7e:
			b.WriteByte('?')
		default:
			b.WriteRune(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// page is a slice of a list in id order, and where the next one begins.
type page[T any] struct {
	items []T
	next  string // skip token; empty: the last page
}

const maxResults = 1000

// cut takes a page out of a list: maxresults items after the skip token.
func cut[T any](r *azureapi.Request, all []T, id func(T) string) (page[T], error) {
	slices.SortFunc(all, func(a, b T) int { return cmp.Compare(id(a), id(b)) })
	size := maxResults
	if s := r.Query("maxresults"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > maxResults {
			return page[T]{}, fault.New(fault.Invalid, "InvalidQueryParameterValue", "maxresults must be a number from 1 to %d.", maxResults).At("maxresults")
		}
		size = n
	}
	if token := r.Query("$skiptoken"); token != "" {
		i := slices.IndexFunc(all, func(v T) bool { return id(v) > token })
		if i < 0 {
			i = len(all)
		}
		all = all[i:]
	}
	if len(all) <= size {
		return page[T]{items: all}, nil
	}
	return page[T]{items: all[:size], next: id(all[size-1])}, nil
}

// nextLink is the absolute URL of the page after the token.
func nextLink(r *azureapi.Request, token string) string {
	if token == "" {
		return ""
	}
	q := url.Values{}
	for k, v := range r.URL.Query() {
		if !strings.EqualFold(k, "$skiptoken") {
			q[k] = v
		}
	}
	q.Set("$skiptoken", token)
	return r.BaseURL() + r.Path() + "?" + q.Encode()
}

// fleet and context are what every handler needs.
func (e *edge) fleet(r *azureapi.Request) (*pool.Fleet, context.Context) {
	return e.cfg.Fleet, r.Context()
}

// location is an absolute URL under the surface, with the request's api-version.
func location(r *azureapi.Request, path string) string {
	return fmt.Sprintf("%s%s?api-version=%s", r.BaseURL(), path, url.QueryEscape(r.Version))
}
