package connector

import (
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/fault"
)

//go:embed catalogue.yaml
var catalogue []byte

// AuthType is how a workload proves itself to a target, in the words of the
// command line of Azure.
type AuthType string

// The authentication types. SystemIdentity is in the catalogue and not for clusters.
const (
	Secret           AuthType = "secret"
	ServicePrincipal AuthType = "service-principal"
	WorkloadIdentity AuthType = "workload-identity"
	CSIAddOn         AuthType = "csi-addon-identity" // the identity of the Key Vault add-on
	SystemIdentity   AuthType = "system-identity"
)

// Catalogue is what variables a workload gets, by target, authentication and client.
type Catalogue struct {
	Version string   `json:"version"` // a day
	Targets []Target `json:"targets"`
}

// Target is a kind of service.
type Target struct {
	Word string `json:"target"` // of the command line, "postgres-flexible"
	Type string `json:"type"`   // of Azure's resource, or of the linker's target service
	// Makes is the kind of server on which Keyfleet can make the credential itself;
	// empty: the credential has to be given.
	Makes string   `json:"makes,omitempty"`
	IDs   []string `json:"ids,omitempty"` // values that the names in the resource id are, in order
	// Values are what a target is described by, with templates of their defaults;
	// nil: there is none.
	Values  map[string]*string `json:"values"`
	Secrets []string           `json:"secrets"` // names of further values, which are credentials
	Auth    []Auth             `json:"auth"`    // the first is the default
}

// Auth is an authentication that a target has.
type Auth struct {
	Type AuthType `json:"type"`
	// Kubernetes says whether clusters have it: "" yes, "no", or "passwordless": in
	// Azure by an extension of the command line.
	Kubernetes string    `json:"kubernetes,omitempty"`
	Clients    []Clients `json:"clients"`
}

// Clients are the client types that get the same variables: name -> template.
type Clients struct {
	For       []string          `json:"for"`
	From      string            `json:"from,omitempty"` // how well this is known; empty: documented
	Env       map[string]string `json:"env,omitempty"`
	SecretEnv map[string]string `json:"secretEnv,omitempty"` // credentials
	OwnEnv    map[string]string `json:"ownEnv,omitempty"`    // Azure has no such; left out where empty
}

// LoadCatalogue returns the catalogue that is built in.
func LoadCatalogue() (Catalogue, error) {
	var c Catalogue
	if err := yaml.UnmarshalStrict(catalogue, &c); err != nil {
		return c, fmt.Errorf("reading the catalogue of environment names: %w", err)
	}
	return c, nil
}

// Target finds a kind of service by its word.
func (c Catalogue) Target(word string) (Target, error) {
	var known []string
	for _, t := range c.Targets {
		if strings.EqualFold(t.Word, word) {
			return t, nil
		}
		known = append(known, t.Word)
	}
	return Target{}, fault.New(fault.Invalid, "TargetTypeNotSupported", "Target resource type %.100s is not supported.", word).
		At("properties.targetService").WithFix("one of: %s", strings.Join(known, ", "))
}

// auth finds an authentication of a target that clusters have; an empty type means the default.
func (t Target) auth(typ AuthType) (Auth, error) {
	var known []string
	for _, a := range t.Auth {
		if a.Kubernetes == "no" {
			continue
		}
		if typ == "" || a.Type == typ {
			return a, nil
		}
		known = append(known, string(a.Type))
	}
	return Auth{}, fault.New(fault.Invalid, "InvalidArgument", "Authentication type %.60s is not supported by target resource %s on a cluster. Supported authentication types are %s.",
		typ, t.Word, strings.Join(known, ", ")).At("properties.authInfo.authType")
}

func (a Auth) clients(target, client string) (Clients, error) {
	var known []string
	for _, c := range a.Clients {
		for _, name := range c.For {
			if strings.EqualFold(name, client) {
				return c, nil
			}
			known = append(known, name)
		}
	}
	slices.Sort(known)
	return Clients{}, fault.New(fault.Invalid, "InvalidArgument", "Client type %.60s is not supported by target resource %s with authentication %s. Supported client types are %s.",
		client, target, a.Type, strings.Join(known, ", ")).At("properties.clientType")
}

// Variable is one name that a workload gets.
type Variable struct {
	Name    string // as emitted
	Default string // as in the catalogue; differs where the user renamed it
	Value   string
	Secret  bool // Value is, or holds, a credential
	Own     bool // Azure emits no such variable
}

// Request says which variables are asked for.
type Request struct {
	Target string
	Auth   AuthType // empty: the target's default
	Client string   // empty: none
	// Values describe the target, the identity and the credential. What is not here
	// has the catalogue's default.
	Values map[string]string
	// Rename maps names of the catalogue to names that the user wants.
	Rename map[string]string
}

// Variables returns the environment of a connection, by name. It is fault.Invalid
// where target, authentication and client do not go together, where a value that
// is needed was not given, and where renaming makes two names one.
func (c Catalogue) Variables(r Request) ([]Variable, error) {
	t, err := c.Target(r.Target)
	if err != nil {
		return nil, err
	}
	a, err := t.auth(r.Auth)
	if err != nil {
		return nil, err
	}
	client := r.Client
	if client == "" {
		client = "none"
	}
	names, err := a.clients(t.Word, client)
	if err != nil {
		return nil, err
	}
	values, err := t.fill(r.Values)
	if err != nil {
		return nil, err
	}
	all, missing, err := names.expand(values)
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, fault.New(fault.Invalid, "MissingTargetValue", "The connection to %s with authentication %s needs the values %s.", t.Word, a.Type, strings.Join(missing, ", ")).
			At("properties.targetService").WithFix("give them: --value NAME=VALUE")
	}
	return rename(all, r.Rename)
}

// fill adds the defaults of values that were not given.
func (t Target) fill(given map[string]string) (map[string]string, error) {
	values := map[string]string{}
	for name, v := range given {
		if v != "" { // given empty: not given
			values[name] = v
		}
	}
	var resolve func(name string, depth int) error
	resolve = func(name string, depth int) error {
		text, known := t.Values[name]
		if _, ok := values[name]; ok || !known || text == nil {
			return nil
		}
		if depth > len(t.Values) {
			return fmt.Errorf("the value %s of %s depends on itself", name, t.Word)
		}
		parsed, err := parseTemplate(*text)
		if err != nil {
			return err
		}
		needs := map[string]bool{}
		parsed.names(needs)
		for other := range needs {
			if err := resolve(other, depth+1); err != nil {
				return err
			}
		}
		missing := map[string]bool{}
		if v := parsed.expand(values, missing); len(missing) == 0 {
			values[name] = v
		}
		return nil
	}
	for name := range t.Values {
		if err := resolve(name, 0); err != nil {
			return nil, err
		}
	}
	return values, nil
}

// expand fills the templates in; missing are the values that have to be given, sorted.
func (c Clients) expand(values map[string]string) (all []Variable, missing []string, err error) {
	absent := map[string]bool{}
	own := c.From == "own"
	for _, s := range []struct {
		env                   map[string]string
		secret, own, optional bool
	}{{env: c.Env, own: own}, {env: c.SecretEnv, secret: true, own: own}, {env: c.OwnEnv, own: true, optional: true}} {
		for name, text := range s.env {
			parsed, err := parseTemplate(text)
			if err != nil {
				return nil, nil, fmt.Errorf("variable %s: %w", name, err)
			}
			gaps := absent
			if s.optional {
				gaps = map[string]bool{}
			}
			if v := parsed.expand(values, gaps); v != "" || !s.optional {
				all = append(all, Variable{Name: name, Default: name, Value: v, Secret: s.secret, Own: s.own})
			}
		}
	}
	return all, slices.Sorted(maps.Keys(absent)), nil
}

// rename gives variables the names that the user wants, and sorts them.
func rename(all []Variable, wanted map[string]string) ([]Variable, error) {
	known, taken := map[string]bool{}, map[string]string{}
	for i, v := range all {
		known[v.Default] = true
		if name := wanted[v.Default]; name != "" {
			if !secretKey.MatchString(name) {
				return nil, fault.New(fault.Invalid, "InvalidCustomizedKey", "'%.100s' cannot be the name of %s: letters, digits, '-', '_' and '.', at most 253.", name, v.Default).
					At("properties.configurationInfo.customizedKeys")
			}
			all[i].Name = name
		}
		if other := taken[all[i].Name]; other != "" {
			return nil, fault.New(fault.Invalid, "InvalidCustomizedKey", "%s and %s would both be named %s.", other, v.Default, all[i].Name).
				At("properties.configurationInfo.customizedKeys").WithFix("give them different names")
		}
		taken[all[i].Name] = v.Default
	}
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		if !known[name] {
			return nil, fault.New(fault.Invalid, "InvalidCustomizedKey", "The connection has no variable %.100s that could be renamed; it has %s.", name, strings.Join(slices.Sorted(maps.Keys(known)), ", ")).
				At("properties.configurationInfo.customizedKeys." + name)
		}
	}
	slices.SortFunc(all, func(a, b Variable) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}
