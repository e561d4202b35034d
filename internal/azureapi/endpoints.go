package azureapi

import (
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
)

// Endpoints knows the names of the surfaces and recognises them in requests.
type Endpoints struct {
	Domain  string  // "keyfleet.internal"
	Port    string  // "" for 443, else with the colon: ":8443"
	Aliases []Alias // further names of surfaces
}

// Alias makes a host suffix another name of a surface: vault.azure.cn=vault.
type Alias struct {
	Suffix  string // lower case, without port
	Surface Surface
}

// ParseAlias parses the form SUFFIX=SURFACE of the flag --host-alias.
func ParseAlias(s string) (Alias, error) {
	suffix, surface, ok := strings.Cut(s, "=")
	suffix = strings.ToLower(strings.Trim(strings.TrimSpace(suffix), "."))
	a := Alias{Suffix: suffix, Surface: Surface(strings.TrimSpace(surface))}
	if !ok || suffix == "" || strings.ContainsAny(suffix, "/:@ ") ||
		!slices.Contains([]Surface{ARM, Login, Vault, Batch}, a.Surface) {
		return Alias{}, fmt.Errorf("host alias %q is not of the form SUFFIX=SURFACE, where SURFACE is arm, login, vault or batch", s)
	}
	return a, nil
}

// ARM is the base URL of the management surface.
func (e Endpoints) ARM() string { return "https://arm." + e.Domain + e.Port }

// Login is the base URL of the token surface.
func (e Endpoints) Login() string { return "https://login." + e.Domain + e.Port }

// Node is the base URL of the node edge.
func (e Endpoints) Node() string { return "https://node." + e.Domain + e.Port }

// VaultSuffix follows a vault's name and a dot in its host.
func (e Endpoints) VaultSuffix() string { return "vault." + e.Domain + e.Port }

// BatchSuffix follows account, dot, region and dot in an account's host.
func (e Endpoints) BatchSuffix() string { return "batch." + e.Domain + e.Port }

// Suffixes lists the host suffixes of a surface, aliases included, without port.
func (e Endpoints) Suffixes(s Surface) []string {
	out := []string{string(s) + "." + e.Domain}
	for _, a := range e.Aliases {
		if a.Surface == s {
			out = append(out, a.Suffix)
		}
	}
	return out
}

// Audiences lists what a token's aud may be for a surface: each suffix as a
// URL, with and without port, with and without a trailing slash.
func (e Endpoints) Audiences(s Surface) []string {
	var out []string
	for _, suffix := range e.Suffixes(s) {
		for _, port := range slices.Compact([]string{"", e.Port}) {
			out = append(out, "https://"+suffix+port, "https://"+suffix+port+"/")
		}
	}
	return out
}

// Serves reports whether the host name (without port) is one the server
// answers for, and so may have a certificate for.
func (e Endpoints) Serves(host string) bool {
	host = strings.ToLower(host)
	if host == "node."+e.Domain || host == e.Domain {
		return true
	}
	_, ok := e.parse(host, "")
	return ok
}

// parse recognises a host name. port keeps its colon.
func (e Endpoints) parse(host, port string) (Host, bool) {
	for _, s := range []Surface{ARM, Login} {
		if slices.Contains(e.Suffixes(s), host) {
			return Host{Surface: s, Suffix: host + port}, true
		}
	}
	for _, suffix := range e.Suffixes(Vault) {
		if name, ok := strings.CutSuffix(host, "."+suffix); ok && name != "" && !strings.Contains(name, ".") {
			return Host{Surface: Vault, Name: name, Suffix: suffix + port}, true
		}
	}
	for _, suffix := range e.Suffixes(Batch) {
		rest, ok := strings.CutSuffix(host, "."+suffix)
		name, region, two := strings.Cut(rest, ".")
		if ok && two && name != "" && region != "" && !strings.Contains(region, ".") {
			return Host{Surface: Batch, Name: name, Region: region, Suffix: suffix + port}, true
		}
	}
	return Host{}, false
}

// surfaceOf finds the surface and the path within it. A host that is no name
// of ours (an address, localhost) may reach arm and login by a path prefix.
func (e Endpoints) surfaceOf(r *http.Request) (Host, string, bool) {
	host, port := strings.ToLower(r.Host), ""
	if h, p, err := net.SplitHostPort(host); err == nil {
		host, port = h, ":"+p
	}
	if h, ok := e.parse(host, port); ok {
		return h, r.URL.Path, true
	}
	for _, s := range []Surface{ARM, Login} {
		if rest, ok := strings.CutPrefix(r.URL.Path, "/"+string(s)+"/"); ok {
			return Host{Surface: s, Suffix: host + port, prefix: "/" + string(s)}, "/" + rest, true
		}
	}
	return Host{}, r.URL.Path, false
}
