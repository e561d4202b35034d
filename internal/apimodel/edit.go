package apimodel

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"keyfleet.dev/keyfleet/internal/fault"
)

// span finds the value at a path of object members and returns where it begins
// and ends; 0, 0 if there is none.
func span(text []byte, path ...string) (from, to int, err error) {
	dec := jsontext.NewDecoder(bytes.NewReader(text))
	for {
		if dec.PeekKind() != '{' {
			return 0, 0, nil
		}
		if _, err := dec.ReadToken(); err != nil {
			return 0, 0, err
		}
		ok, err := seek(dec, path[0])
		if err != nil || !ok {
			return 0, 0, err
		}
		if path = path[1:]; len(path) == 0 {
			v, err := dec.ReadValue()
			if err != nil {
				return 0, 0, err
			}
			to = int(dec.InputOffset())
			return to - len(v), to, nil
		}
	}
}

// seek reads on in an object until the member's value is next.
func seek(dec *jsontext.Decoder, name string) (bool, error) {
	for dec.PeekKind() != '}' {
		t, err := dec.ReadToken()
		if err != nil {
			return false, err
		}
		if t.String() == name {
			return true, nil
		}
		if err := dec.SkipValue(); err != nil {
			return false, err
		}
	}
	return false, nil
}

// With returns the text of the model with another profile in place of its own;
// every other byte is as it was. Entries that are references in the model and
// not in p stay; members of the profile that are not known here go to its end.
func (m *Model) With(p Profile) ([]byte, error) {
	if m.to == 0 {
		return nil, bad("properties.certificateProfile", "it has no certificate profile, whose place a new one could take").
			WithFix("give the apimodel.json that aks-engine deploy or generate wrote; the file that they read has none")
	}
	s := styleOf(m.text[:m.from])
	all, err := m.members(p)
	if err != nil {
		return nil, err
	}
	out := bytes.Clone(m.text[:m.from])
	out = s.object(out, all)
	return append(out, m.text[m.to:]...), nil
}

// entry is a member of a profile to write: a value, or a list of values.
type entry struct {
	name   string
	value  []byte
	list   [][]byte
	isList bool
}

// members are those to write, in the order of aks-engine.
func (m *Model) members(p Profile) ([]entry, error) {
	for name := range p {
		if _, _, ok := split(name); !ok {
			return nil, fault.New(fault.Invalid, "UnknownEntry", "%q is not an entry of a certificate profile.", clip(name)).
				WithFix("the entries are %s", strings.Join(Names(1), ", "))
		}
	}
	var all []entry
	for _, name := range scalars() {
		v, err := m.value(p, name)
		if err != nil {
			return nil, err
		}
		if v != nil {
			all = append(all, entry{name: name, value: v})
		}
	}
	for _, name := range lists() {
		e := entry{name: name, isList: true}
		for i := range max(length(p, name), length(m.refs, name)) {
			v, err := m.value(p, item(name, i))
			if err != nil {
				return nil, err
			}
			if v == nil {
				v = []byte(`""`) // the others keep their places
			}
			e.list = append(e.list, v)
		}
		if len(e.list) > 0 {
			all = append(all, e)
		}
	}
	for _, k := range m.keep {
		all = append(all, entry{name: k.name, value: k.value})
	}
	return all, nil
}

// value is an entry in JSON; nil if there is none.
func (m *Model) value(p Profile, name string) ([]byte, error) {
	text, ok := p[name]
	if !ok {
		return m.refs[name], nil
	}
	if !utf8.Valid(text) {
		return nil, fault.New(fault.Invalid, "EntryNotText", "The entry is not text.").At(name).WithFix("give it in PEM")
	}
	return quote(nil, string(text)), nil
}

// quote appends a string in JSON; it is UTF-8.
func quote(out []byte, s string) []byte {
	out, _ = jsontext.AppendQuote(out, s)
	return out
}

// style is how a file is laid out. Empty: all on one line.
type style struct {
	newline string // with the indentation of the profile's name
	unit    string // one level of indentation
	colon   string
}

// styleOf tells the layout from what stands before the profile: if its name is
// the first of a line, everything gets a line. It is two levels deep.
func styleOf(before []byte) style {
	end := bytes.LastIndexByte(before, '\n')
	line := before[end+1:]
	base := line[:len(line)-len(bytes.TrimLeft(line, " \t"))]
	if end < 0 || !bytes.HasPrefix(line[len(base):], []byte(`"certificateProfile"`)) {
		return style{colon: ":"}
	}
	newline := "\n"
	if end > 0 && before[end-1] == '\r' {
		newline = "\r\n"
	}
	return style{newline: newline + string(base), unit: string(base[:(len(base)+1)/2]), colon: ": "}
}

// object appends a profile.
func (s style) object(out []byte, all []entry) []byte {
	if len(all) == 0 {
		return append(out, "{}"...)
	}
	out = append(out, '{')
	for i, e := range all {
		if i > 0 {
			out = append(out, ',')
		}
		out = s.line(out, 1)
		out = append(quote(out, e.name), s.colon...)
		if !e.isList {
			out = append(out, e.value...)
			continue
		}
		out = append(out, '[')
		for i, v := range e.list {
			if i > 0 {
				out = append(out, ',')
			}
			out = append(s.line(out, 2), v...)
		}
		out = append(s.line(out, 1), ']')
	}
	return append(s.line(out, 0), '}')
}

// line begins a line, some levels deeper than the profile's name.
func (s style) line(out []byte, levels int) []byte {
	if s.newline == "" {
		return out
	}
	return append(out, s.newline+strings.Repeat(s.unit, levels)...)
}
