package agent

import (
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/node"
)

// order sorts extensions so that each comes after those it depends on, and
// otherwise by name. problems says of which extensions the order cannot be
// found, and why: a name that is not there, or a circle; those come last.
func order(exts []node.Extension) (sorted []node.Extension, problems map[string]string) {
	rest := slices.Clone(exts)
	slices.SortStableFunc(rest, func(a, b node.Extension) int { return strings.Compare(a.Name, b.Name) })
	names := map[string]bool{}
	for _, x := range rest {
		names[x.Name] = true
	}
	problems = map[string]string{}
	for _, x := range rest {
		for _, d := range x.DependsOn {
			if !names[d] {
				problems[x.Name] = "it depends on the extension " + d + ", which the node does not have"
			}
		}
	}
	placed := map[string]bool{}
	for len(rest) > 0 {
		// One level: all whose dependencies stand already.
		var level []node.Extension
		for _, x := range rest {
			if problems[x.Name] == "" && !slices.ContainsFunc(x.DependsOn, func(d string) bool { return !placed[d] }) {
				level = append(level, x)
			}
		}
		if len(level) == 0 {
			break
		}
		for _, x := range level {
			placed[x.Name] = true
		}
		sorted = append(sorted, level...)
		rest = slices.DeleteFunc(rest, func(x node.Extension) bool { return placed[x.Name] })
	}
	for _, x := range rest {
		if problems[x.Name] == "" {
			problems[x.Name] = "the extensions that it depends on depend on it, or cannot be ordered themselves"
		}
	}
	return append(sorted, rest...), problems
}

// gate is what an extension's dependencies say about it.
type gate struct {
	open    bool
	failed  string // name of the failed extension because of which it is skipped
	waiting string // name of the extension whose success it waits for
}

// dependencies decides whether an extension may be started, from what is known
// of those it depends on. An error stops it, so does an extension that was
// itself skipped (the name is then that of the first failure); anything but
// success lets it wait.
func dependencies(x node.Extension, known map[string]node.ExtensionStatus) gate {
	g := gate{open: true}
	for _, d := range x.DependsOn {
		switch s := known[d]; {
		case s.Skipped != "":
			return gate{failed: s.Skipped}
		case s.Status == "error":
			return gate{failed: d}
		case s.Status != "success" && s.Status != "warning" && g.open:
			g = gate{waiting: d}
		}
	}
	return g
}
