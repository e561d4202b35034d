package identity

import (
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

// expression is a claims matching expression: all its terms must hold.
type expression []term

// term compares one claim of an assertion.
type term struct {
	claim   string
	pattern bool // value is a pattern: '*' stands for any text, '?' for one character
	value   string
}

// maxExpression is the most characters and terms that an expression may have.
const (
	maxExpression = 2000
	maxTerms      = 10
)

// parseExpression parses the language of flexible federated identity credentials
// (languageVersion 1): terms joined by "and", each
//
//	claims['sub'] eq 'system:serviceaccount:shop:web'
//	claims['sub'] matches 'system:serviceaccount:team-*:web'
//
// It must say something of the claim sub that not every token of an issuer
// fulfils. A quote within a value is not possible.
func parseExpression(text string) (expression, error) {
	bad := func(why string, args ...any) error {
		return fault.New(fault.Invalid, "InvalidClaimsMatchingExpression", "The claims matching expression is not valid: "+why+".", args...).
			At("properties.claimsMatchingExpression.value").WithFix("for instance: claims['sub'] matches 'system:serviceaccount:team-*:web'")
	}
	if len(text) > maxExpression {
		return nil, bad("it is longer than %d characters", maxExpression)
	}
	var all expression
	bound := false
	for rest := strings.TrimSpace(text); ; {
		t, after, ok := parseTerm(rest)
		if !ok {
			return nil, bad("claims['NAME'] eq 'VALUE' or claims['NAME'] matches 'PATTERN' is expected at '%.60s'", rest)
		}
		all = append(all, t)
		bound = bound || t.claim == "sub" && strings.Trim(t.value, "*?") != ""
		if after == "" {
			break
		}
		if rest, ok = strings.CutPrefix(after, "and "); !ok {
			return nil, bad("'and' is expected at '%.60s'", after)
		}
		rest = strings.TrimSpace(rest)
	}
	switch {
	case len(all) > maxTerms:
		return nil, bad("it has more than %d terms", maxTerms)
	case !bound:
		return nil, bad("it has to say which subjects it means, by claims['sub']; otherwise everybody with a token of the issuer would be let in")
	}
	return all, nil
}

// parseTerm parses the term that text begins with; rest is what follows it.
func parseTerm(text string) (t term, rest string, ok bool) {
	rest, ok = strings.CutPrefix(text, "claims['")
	if !ok {
		return t, "", false
	}
	if t.claim, rest, ok = strings.Cut(rest, "']"); !ok || t.claim == "" || strings.ContainsAny(t.claim, "'[]") {
		return t, "", false
	}
	operator, rest, _ := strings.Cut(strings.TrimLeft(rest, " "), " ")
	switch operator {
	case "eq":
	case "matches":
		t.pattern = true
	default:
		return t, "", false
	}
	if rest, ok = strings.CutPrefix(strings.TrimLeft(rest, " "), "'"); !ok {
		return t, "", false
	}
	if t.value, rest, ok = strings.Cut(rest, "'"); !ok || t.value == "" {
		return t, "", false
	}
	if rest != "" && rest[0] != ' ' {
		return t, "", false
	}
	return t, strings.TrimSpace(rest), true
}

// matches reports whether all terms hold. Claims that are no text never match.
func (e expression) matches(claims map[string]any) bool {
	for _, t := range e {
		value, ok := claims[t.claim].(string)
		if !ok || !t.matches(value) {
			return false
		}
	}
	return len(e) > 0
}

func (t term) matches(value string) bool {
	if !t.pattern {
		return value == t.value
	}
	return glob(t.value, value)
}

// glob matches bytes against a pattern of '*' and '?', in time of the product of
// both lengths at most: after a mismatch it takes up the last '*' again.
func glob(pattern, s string) bool {
	p, i, star, retry := 0, 0, -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, retry = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			retry++
			p, i = star+1, retry
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
