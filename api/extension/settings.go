package extension

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// SettingsError is one problem of a settings document.
type SettingsError struct {
	Path   string // settings.authenticationSettings.msiClientId
	Reason string // what is wrong, as a clause without full stop
	Fix    string // what to write instead
}

// Error renders path, reason and fix.
func (e SettingsError) Error() string {
	return fmt.Sprintf("%s: %s. Fix: %s.", e.Path, e.Reason, e.Fix)
}

// SettingsErrors is every problem of a settings document, in document order.
type SettingsErrors []SettingsError

// Error renders all problems.
func (e SettingsErrors) Error() string {
	parts := make([]string, len(e))
	for i, one := range e {
		parts[i] = one.Error()
	}
	return strings.Join(parts, " ")
}

// value is one value of the document and where it stands.
type value struct {
	path string
	raw  json.RawMessage
}

// kind is the first character of the value: '{', '[', '"', 't', 'f', 'n', a digit or '-'.
func (v value) kind() byte {
	raw := bytes.TrimLeft(v.raw, " \t\r\n")
	if len(raw) == 0 {
		return 0
	}
	return raw[0]
}

func (v value) kindName() string {
	switch v.kind() {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a string"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	case 0:
		return "nothing"
	}
	return "a number"
}

// fields maps the names an object may have to what reads their values.
type fields map[string]func(value)

// home says in which object a name belongs, for names written at another level.
var home = map[string]string{
	"secretsManagementSettings": "settings",
	"authenticationSettings":    "settings",
	"loggingSettings":           "settings",
	"pollingIntervalInS":        "settings.secretsManagementSettings",
	"linkOnRenewal":             "settings.secretsManagementSettings",
	"requireInitialSync":        "settings.secretsManagementSettings",
	"aclEnabled":                "settings.secretsManagementSettings",
	"keepVersions":              "settings.secretsManagementSettings",
	"observedCertificates":      "settings.secretsManagementSettings",
	"msiEndpoint":               "settings.authenticationSettings",
	"msiClientId":               "settings.authenticationSettings",
	"customSymbolicLinkName":    "an element of settings.secretsManagementSettings.observedCertificates",
	"acls":                      "an element of settings.secretsManagementSettings.observedCertificates",
	"reloadHook":                "an element of settings.secretsManagementSettings.observedCertificates",
	"keyExportable":             "an element of settings.secretsManagementSettings.observedCertificates",
	"accounts":                  "an element of settings.secretsManagementSettings.observedCertificates",
}

func (p *settingsParser) problem(path, reason, fix string) {
	p.problems = append(p.problems, SettingsError{Path: path, Reason: reason, Fix: fix})
}

// object reads the members of v in document order and returns which names were
// there with a value; nil if v is no object. Null counts as absent.
func (p *settingsParser) object(v value, known fields) map[string]bool {
	if v.kind() != '{' {
		fix := "write a JSON object"
		if v.kind() == '"' {
			fix = "write the object itself, not a string that holds JSON"
		}
		p.problem(v.path, v.kindName()+" was found where an object was expected", fix)
		return nil
	}
	names, members, err := membersOf(v.raw)
	if err != nil {
		p.problem(v.path, err.Error(), "correct the JSON")
		return nil
	}
	found := map[string]bool{}
	for i, name := range names {
		at := value{path: v.path + "." + name, raw: members[i]}
		read, ok := known[name]
		switch {
		case !ok:
			p.unknown(v.path, name, known)
		case found[name]:
			p.problem(at.path, "the name appears twice in one object", "remove one of the two")
		case at.kind() != 'n':
			found[name] = true
			read(at)
		}
	}
	return found
}

// unknown reports a name that does not belong where it stands, with the place
// where it does or the name that was probably meant.
func (p *settingsParser) unknown(parent, name string, known fields) {
	at := parent + "." + name
	if where, ok := home[name]; ok {
		p.problem(at, "it stands at the wrong level; it belongs directly in "+where, "move it to "+where)
		return
	}
	best, distance := "", 1+len(name)/3
	for _, candidate := range slices.Sorted(maps.Keys(known)) {
		if strings.EqualFold(candidate, name) {
			best, distance = candidate, 0
			break
		}
		if d := editDistance(strings.ToLower(candidate), strings.ToLower(name), distance); d < distance {
			best, distance = candidate, d
		}
	}
	if best != "" {
		p.problem(at, "there is no such setting here; names are case-sensitive", "write "+best)
		return
	}
	p.problem(at, "there is no such setting here", "remove it; known here: "+strings.Join(slices.Sorted(maps.Keys(known)), ", "))
}

func (p *settingsParser) array(v value) []value {
	if v.kind() != '[' {
		p.problem(v.path, v.kindName()+" was found where a list was expected", "write a JSON list, [ ... ]")
		return nil
	}
	var raw []json.RawMessage
	if err := json.Unmarshal(v.raw, &raw); err != nil {
		p.problem(v.path, "it is not valid JSON", "correct the JSON")
		return nil
	}
	out := make([]value, len(raw))
	for i := range raw {
		out[i] = value{path: v.path + "[" + strconv.Itoa(i) + "]", raw: raw[i]}
	}
	return out
}

func (p *settingsParser) text(v value) string {
	var s string
	if v.kind() != '"' || json.Unmarshal(v.raw, &s) != nil {
		p.problem(v.path, v.kindName()+" was found where a string was expected", "write a string in double quotes")
	}
	return s
}

func (p *settingsParser) texts(v value) []string {
	var out []string
	for _, e := range p.array(v) {
		out = append(out, p.text(e))
	}
	return out
}

// boolean accepts true, "true" and "True".
func (p *settingsParser) boolean(v value) bool {
	var b Bool
	if v.kind() == '{' || v.kind() == '[' || json.Unmarshal(v.raw, &b) != nil {
		p.problem(v.path, v.kindName()+" was found where a boolean was expected", "write true or false")
	}
	return bool(b)
}

// whole accepts a whole number or a string of digits between low and high.
func (p *settingsParser) whole(v value, low, high int64, unit string) int64 {
	text := strings.TrimSpace(string(v.raw))
	if v.kind() == '"' {
		text = strings.TrimSpace(p.text(v))
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || strings.Trim(text, "0123456789.+-eE") != "" || f != math.Trunc(f) || f < float64(low) || f > float64(high) {
		p.problem(v.path, fmt.Sprintf("it is not a whole number of %s between %d and %d", unit, low, high), fmt.Sprintf("write a number from %d to %d, as a number or a string", low, high))
		return low
	}
	return int64(f)
}

// membersOf splits an object into its names and values, in order, duplicates kept.
func membersOf(raw json.RawMessage) (names []string, members []json.RawMessage, err error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if _, err := dec.Token(); err != nil {
		return nil, nil, errors.New("it is not valid JSON")
	}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return nil, nil, errors.New("it is not valid JSON: a member has no name in double quotes")
		}
		var member json.RawMessage
		if err := dec.Decode(&member); err != nil {
			return nil, nil, fmt.Errorf("it is not valid JSON: %q has no value", name)
		}
		names, members = append(names, name), append(members, member)
	}
	if _, err := dec.Token(); err != nil {
		return nil, nil, errors.New("it is not valid JSON: the object is not closed")
	}
	if dec.More() {
		return nil, nil, errors.New("it is not valid JSON: something follows the object")
	}
	return names, members, nil
}

// editDistance is the Levenshtein distance of a and b, or limit if it is not less.
func editDistance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return min(row[len(b)], limit)
}
