// Package servicelinker is the surface of service connections: the management API of
// Microsoft.ServiceLinker/linkers on a cluster, the servers on which Keyfleet makes
// logins, and the catalogue of names that workloads get.
//
//	PUT, PATCH, GET, DELETE CLUSTER/providers/Microsoft.ServiceLinker/linkers/{name}
//	POST .../validateLinker, /listConfigurations, /generateConfigurations, and Keyfleet's own /rotate and /diagnose, which extensions have, too
//	PUT, PATCH, GET, DELETE CLUSTER/providers/Microsoft.ServiceLinker/dryruns/{name}
//	GET  .../locations/{location}/operationStatuses/{operation}
//	PUT, GET, DELETE .../Microsoft.DBforPostgreSQL/flexibleServers/{name}   and three more types: a registered server
//	GET  /providers/Microsoft.ServiceLinker/configurationNames?$filter=TargetService eq 'X' and AuthType eq 'Y' and ClientType eq 'Z'
//	POST, PUT /keyfleet/v1/CLUSTER/.../linkers/{name}/desired, /report, /sight      for managers
//
// Invariant: no credential is in any answer but that of /desired, which is recorded.
// An operation's name says all about it, and its state is found by looking.
//
// Consequence for the operator: a client that lost an answer asks again; the names of
// an application's variables can be looked up before there is a connection.
package servicelinker

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
)

// versions are the api-versions that have the catalogue, oldest first.
var versions = []string{"2022-11-01-preview", "2023-04-01-preview", "2024-04-01", "2024-07-01-preview"}

// page is how many combinations one answer has at most.
const page = 100

// Config is what the surface needs.
type Config struct {
	Catalogue   connector.Catalogue
	Connections *connector.Service
	// Locate turns the URL of a secret of this server into a reference.
	Locate func(url string) (connector.SecretRef, error)
}

// Routes is the route table of the surface.
func Routes(cfg Config) []azureapi.Route {
	s := surface{Config: cfg, catalogue: cfg.Catalogue, all: cfg.Catalogue.List()}
	names := azureapi.Route{
		Surface: azureapi.ARM, Method: http.MethodGet, Path: "/providers/microsoft.servicelinker/configurationnames", Versions: versions,
		Action: azureapi.Authenticated, Handle: s.names,
	}
	return slices.Concat(s.linkerRoutes(), s.dryrunRoutes(), s.extensionRoutes(), s.diagnoseRoutes(), s.serverRoutes(), []azureapi.Route{names})
}

type surface struct {
	Config
	catalogue connector.Catalogue
	all       []connector.Names
}

// authTypes are the words of the REST API for those of the command line.
var authTypes = map[connector.AuthType]string{
	connector.Secret: "secret", connector.ServicePrincipal: "servicePrincipalSecret", connector.WorkloadIdentity: "userAssignedIdentity", connector.CSIAddOn: "userAssignedIdentity",
}

func (s surface) names(r *azureapi.Request) (*azureapi.Reply, error) {
	want, err := parseFilter(r.Query("$filter"))
	if err != nil {
		return nil, err
	}
	skip := 0
	if token := r.Query("$skipToken"); token != "" {
		if skip, err = strconv.Atoi(token); err != nil || skip < 0 {
			return nil, fault.New(fault.Invalid, "InvalidSkipToken", "'%.60s' is no skip token of this list.", token).At("$skipToken").WithFix("follow nextLink as it is")
		}
	}
	out := arm.List[wire.ConfigurationNames]{Value: []wire.ConfigurationNames{}}
	seen := 0
	for _, n := range s.all {
		if !want.fits(n) {
			continue
		}
		switch seen++; {
		case seen <= skip:
		case len(out.Value) == page:
			next := url.Values{"api-version": {r.Version}, "$skipToken": {strconv.Itoa(skip + page)}}
			if f := r.Query("$filter"); f != "" {
				next.Set("$filter", f)
			}
			out.NextLink = r.BaseURL() + r.Path() + "?" + next.Encode()
			return azureapi.OK(out), nil
		default:
			out.Value = append(out.Value, toWire(n))
		}
	}
	return azureapi.OK(out), nil
}

func toWire(n connector.Names) wire.ConfigurationNames {
	p := wire.ConfigurationNamesProperties{TargetService: n.Type, AuthType: authTypes[n.Auth], ClientType: n.Client}
	for _, v := range n.Env {
		about := v.Template
		if v.Secret {
			about += " (a credential)"
		}
		p.Names = append(p.Names, wire.ConfigurationName{Value: v.Name, Description: about, Required: !v.Own})
	}
	return wire.ConfigurationNames{Properties: p}
}

// filter is what $filter asks for; an empty field is not asked for.
type filter struct{ target, auth, client string }

func (f filter) fits(n connector.Names) bool {
	same := func(want string, is ...string) bool {
		if want == "" {
			return true
		}
		for _, s := range is {
			if strings.EqualFold(want, s) {
				return true
			}
		}
		return false
	}
	return same(f.target, n.Type, n.Target) && same(f.auth, authTypes[n.Auth], string(n.Auth)) && same(f.client, n.Client)
}

// parseFilter parses terms NAME eq 'VALUE' joined by "and"; names in any casing.
func parseFilter(text string) (filter, error) {
	var f filter
	bad := fault.New(fault.Invalid, "InvalidFilter", "The filter '%.200s' cannot be used.", text).At("$filter").
		WithFix("TargetService eq 'TYPE' and AuthType eq 'TYPE' and ClientType eq 'TYPE', or some of these")
	for rest := strings.TrimSpace(text); rest != ""; {
		name, after, ok := strings.Cut(rest, " ")
		into := map[string]*string{"targetservice": &f.target, "authtype": &f.auth, "clienttype": &f.client}[strings.ToLower(name)]
		after, isEq := strings.CutPrefix(strings.TrimLeft(after, " "), "eq ")
		after, quoted := strings.CutPrefix(strings.TrimLeft(after, " "), "'")
		value, after, closed := strings.Cut(after, "'")
		if !ok || into == nil || *into != "" || !isEq || !quoted || !closed || value == "" {
			return f, bad
		}
		*into = value
		if rest = strings.TrimSpace(after); rest == "" {
			break
		}
		if rest, ok = strings.CutPrefix(rest, "and "); !ok || strings.TrimSpace(rest) == "" {
			return f, bad
		}
		rest = strings.TrimSpace(rest)
	}
	return f, nil
}
