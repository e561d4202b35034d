package connector

import (
	"fmt"
	"net/url"
	"strings"
)

// template is a text with placeholders:
//
//	{host}           the value of that name
//	{password:url}   the same, escaped for the place where it stands (see escapes)
//	{tls?a:b}        a where the value is neither empty nor "false", else b; both are templates
//
// Other text stands for itself.
type template []part

// part is text, a value, or a choice.
type part struct {
	text   string // literally; nothing else is set
	value  string // name of a value
	escape func(string) string
	choice bool // by value: yes or no
	yes    template
	no     template
}

// escapes are the ways to write a value, by the name of the place. Each leaves
// values alone that need no escaping there, so that what comes out is what the
// documentation shows.
func escapes(place string) func(string) string {
	return map[string]func(string) string{
		"url":       percent,
		"authority": authority,
		"conninfo":  conninfo,
		"adonet":    adonet,
		"jaas":      jaas,
		"braces":    braces,
	}[place]
}

// percent escapes a value for any part of a URL.
func percent(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }

// authority writes a host as it stands before ":port" (RFC 3986, 3.2.2): an IPv6
// address is in brackets.
func authority(s string) string {
	if strings.Contains(s, ":") && !strings.HasPrefix(s, "[") {
		return "[" + s + "]"
	}
	return s
}

// conninfo quotes a value of a libpq connection string.
func conninfo(s string) string {
	if s != "" && !strings.ContainsAny(s, " '\\\t\n") {
		return s
	}
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// adonet quotes a value of an ADO.NET connection string.
func adonet(s string) string {
	if !strings.ContainsAny(s, `;'"=`) && strings.TrimSpace(s) == s {
		return s
	}
	return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`
}

// jaas escapes a value between single quotes in a JAAS configuration.
func jaas(s string) string { return strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) }

// braces quotes a value of a JDBC connection string of SQL Server.
func braces(s string) string {
	if !strings.ContainsAny(s, ";{}[]") {
		return s
	}
	return "{" + strings.ReplaceAll(s, "}", "}}") + "}"
}

// parseTemplate parses a template. What is wrong with one is a mistake of the
// catalogue, not of a user.
func parseTemplate(text string) (template, error) {
	t, rest, err := parseParts(text, "")
	if err == nil && rest != "" {
		err = fmt.Errorf("template %q: %q is not expected", text, rest)
	}
	return t, err
}

// parseParts parses up to one of the ends, which stays in rest.
func parseParts(text, ends string) (t template, rest string, err error) {
	for text != "" {
		i := strings.IndexAny(text, "{"+ends)
		if i < 0 {
			return append(t, part{text: text}), "", nil
		}
		if i > 0 {
			t = append(t, part{text: text[:i]})
			text = text[i:]
		}
		if text[0] != '{' {
			return t, text, nil
		}
		var p part
		if p, text, err = parsePlaceholder(text[1:]); err != nil {
			return nil, "", err
		}
		t = append(t, p)
	}
	return t, "", nil
}

// parsePlaceholder parses what follows an opening brace.
func parsePlaceholder(text string) (p part, rest string, err error) {
	i := strings.IndexAny(text, "}:?")
	if i <= 0 {
		return p, "", fmt.Errorf("a placeholder is not finished or has no name at %q", text)
	}
	p.value = text[:i]
	switch sep, after := text[i], text[i+1:]; sep {
	case ':':
		place, rest, ok := strings.Cut(after, "}")
		if p.escape = escapes(place); !ok || p.escape == nil {
			return p, "", fmt.Errorf("%q is no place to escape for", place)
		}
		return p, rest, nil
	case '?':
		p.choice = true
		if p.yes, rest, err = parseParts(after, ":"); err != nil || rest == "" {
			return p, "", orElse(err, "a choice has no second part at %q", after)
		}
		if p.no, rest, err = parseParts(rest[1:], "}"); err != nil || rest == "" {
			return p, "", orElse(err, "a choice is not finished at %q", after)
		}
		return p, rest[1:], nil
	default:
		return p, after, nil
	}
}

func orElse(err error, format string, args ...any) error {
	if err != nil {
		return err
	}
	return fmt.Errorf(format, args...)
}

// expand fills a template in. Values that are not there are empty; their names
// are added to missing, but for those that only a choice asks for.
func (t template) expand(values map[string]string, missing map[string]bool) string {
	var b strings.Builder
	for _, p := range t {
		v, ok := values[p.value]
		switch {
		case p.value == "":
			b.WriteString(p.text)
		case p.choice && v != "" && v != "false":
			b.WriteString(p.yes.expand(values, missing))
		case p.choice:
			b.WriteString(p.no.expand(values, missing))
		default:
			if !ok {
				missing[p.value] = true
			}
			if p.escape != nil {
				v = p.escape(v)
			}
			b.WriteString(v)
		}
	}
	return b.String()
}

// names adds the values that a template speaks of to all.
func (t template) names(all map[string]bool) {
	for _, p := range t {
		if p.value != "" {
			all[p.value] = true
		}
		p.yes.names(all)
		p.no.names(all)
	}
}
