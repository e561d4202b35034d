package subscription

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Resource is a resource as a listing over all providers shows it.
type Resource struct {
	ID       string // ARM id, the creator's casing
	Name     string
	Type     string // "Microsoft.KeyVault/vaults"
	Group    string
	Location string
	Tags     map[string]string
}

const actionResourcesRead = "Microsoft.Resources/subscriptions/resources/read"

// Resources returns the resources of a subscription, of one group only if
// group is not empty, that fit the filter and that the caller may read, by id.
func (s *Service) Resources(ctx context.Context, subscription, group string, f Filter) ([]Resource, error) {
	var all []Resource
	for _, c := range s.cfg.Contents {
		list, err := c.List(ctx, subscription, group)
		if err != nil {
			return nil, fmt.Errorf("listing resources: %w", err)
		}
		all = append(all, list...)
	}
	scope := Scope(subscription)
	if group != "" {
		scope = GroupScope(subscription, group)
	}
	out, err := visible(ctx, s.cfg.Gate, access.Op{Action: actionResourcesRead, Resource: scope}, all, func(r Resource) access.Op {
		return access.Op{Action: r.Type + "/read", Resource: r.ID}
	})
	if err != nil {
		return nil, err
	}
	tx := s.cfg.Store.View(ctx)
	if _, err := lookup(tx, subscription); err != nil {
		return nil, err
	}
	if group != "" {
		if _, err := lookupGroup(tx, subscription, group); err != nil {
			return nil, err
		}
	}
	out = slices.DeleteFunc(slices.Clone(out), func(r Resource) bool { return !f.Fits(r) })
	slices.SortFunc(out, func(a, b Resource) int { return strings.Compare(strings.ToLower(a.ID), strings.ToLower(b.ID)) })
	return out, nil
}

// Filter is a parsed $filter of a resource listing. Empty fields take all.
type Filter struct {
	Type, Name, Group, Location string
	NamePart                    string // substringof('x', name)
	TagName, TagValue           string
}

// Fits reports whether the resource fits.
func (f Filter) Fits(r Resource) bool {
	same := func(want, is string) bool { return want == "" || strings.EqualFold(want, is) }
	if !same(f.Type, r.Type) || !same(f.Name, r.Name) || !same(f.Group, r.Group) || !same(f.Location, r.Location) {
		return false
	}
	if !strings.Contains(strings.ToLower(r.Name), strings.ToLower(f.NamePart)) {
		return false
	}
	if f.TagName == "" {
		return true
	}
	for k, v := range r.Tags {
		if strings.EqualFold(k, f.TagName) && (f.TagValue == "" || v == f.TagValue) {
			return true
		}
	}
	return false
}

// ParseFilter parses the $filter that clients send to resource listings:
// comparisons of resourceType, name, resourceGroup, location, tagName and
// tagValue with eq, and substringof('x', name), joined by and. Anything else is
// a fault.Invalid, for ignoring a filter would show too much.
func ParseFilter(s string) (Filter, error) {
	var f Filter
	rest := strings.TrimSpace(s)
	for rest != "" {
		name, value, after, ok := filterTerm(rest)
		field := map[string]*string{
			"resourcetype": &f.Type, "name": &f.Name, "resourcegroup": &f.Group, "location": &f.Location,
			"tagname": &f.TagName, "tagvalue": &f.TagValue, "substringof": &f.NamePart,
		}[strings.ToLower(name)]
		if !ok || field == nil || *field != "" {
			return Filter{}, badFilter(rest)
		}
		*field = value
		if rest = strings.TrimSpace(after); rest == "" {
			break
		}
		word, next, found := strings.Cut(rest, " ")
		if rest = strings.TrimSpace(next); !strings.EqualFold(word, "and") || !found || rest == "" {
			return Filter{}, badFilter(after)
		}
	}
	if f.TagValue != "" && f.TagName == "" {
		return Filter{}, badFilter(s)
	}
	return f, nil
}

func badFilter(at string) error {
	return fault.New(fault.Invalid, "InvalidFilterInQueryString", "The filter is not supported at '%.80s'.", at).At("$filter").
		WithFix("use resourceType, name, resourceGroup, location, tagName or tagValue with eq 'VALUE', or substringof('VALUE', name), joined by and")
}

// filterTerm reads one comparison from the front of s.
func filterTerm(s string) (name, value, rest string, ok bool) {
	if len(s) > len("substringof(") && strings.EqualFold(s[:len("substringof(")], "substringof(") {
		value, rest, ok = quoted(strings.TrimSpace(s[len("substringof("):]))
		if !ok {
			return "", "", "", false
		}
		args, after, closed := strings.Cut(rest, ")")
		arg, comma := strings.CutPrefix(strings.TrimSpace(args), ",")
		if !closed || !comma || !strings.EqualFold(strings.TrimSpace(arg), "name") {
			return "", "", "", false
		}
		return "substringof", value, after, true
	}
	name, s, _ = strings.Cut(s, " ")
	op, s, _ := strings.Cut(strings.TrimSpace(s), " ")
	if !strings.EqualFold(op, "eq") {
		return "", "", "", false
	}
	value, rest, ok = quoted(strings.TrimSpace(s))
	return name, value, rest, ok
}

// quoted reads an OData string: in single quotes, a doubled quote stands for one. It must not be empty.
func quoted(s string) (value, rest string, ok bool) {
	if !strings.HasPrefix(s, "'") {
		return "", "", false
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		if s[i] != '\'' {
			b.WriteByte(s[i])
			continue
		}
		if i+1 < len(s) && s[i+1] == '\'' {
			b.WriteByte('\'')
			i++
			continue
		}
		return b.String(), s[i+1:], b.Len() > 0
	}
	return "", "", false
}
