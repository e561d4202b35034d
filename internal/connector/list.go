package connector

import (
	"maps"
	"slices"
	"strings"
)

// Names is one combination of the catalogue.
type Names struct {
	Target, Type string // word and resource type
	Auth         AuthType
	Client       string
	Env          []Name // by name
}

// Name is a variable before it has a value.
type Name struct {
	Name     string
	Template string // what its value is made of
	Secret   bool
	Own      bool // Azure emits no such variable
}

// List returns all combinations that clusters have, in the order of the catalogue.
func (c Catalogue) List() []Names {
	var out []Names
	for _, t := range c.Targets {
		for _, a := range t.Auth {
			if a.Kubernetes == "no" {
				continue
			}
			for _, cs := range a.Clients {
				env := cs.list()
				for _, client := range cs.For {
					out = append(out, Names{t.Word, t.Type, a.Type, client, env})
				}
			}
		}
	}
	return out
}

func (c Clients) list() []Name {
	var out []Name
	add := func(env map[string]string, secret, own bool) {
		for _, name := range slices.Sorted(maps.Keys(env)) {
			out = append(out, Name{name, env[name], secret, own})
		}
	}
	add(c.Env, false, c.From == "own")
	add(c.SecretEnv, true, c.From == "own")
	add(c.OwnEnv, false, true)
	slices.SortFunc(out, func(a, b Name) int { return strings.Compare(a.Name, b.Name) })
	return out
}
