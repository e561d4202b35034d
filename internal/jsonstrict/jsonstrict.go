// Package jsonstrict decodes JSON that comes from outside and says exactly
// what is wrong with it.
//
// Idea: encoding/json accepts duplicate names, other casings and unknown
// members in silence, so two readers of one body may see two things. Here they
// are errors, and every error names line, column and field path.
//
// Invariant: Decode either fills the value from a document that has exactly
// one meaning, or returns a fault.Invalid and leaves the value unusable.
//
// Consequence for the operator: a typing error in a body is answered with the
// place and what was expected there, not with a default.
package jsonstrict

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Decode decodes one JSON document into v: names must match exactly, unknown
// and duplicate names and trailing data are errors. The error is a
// fault.Invalid with code InvalidRequestContent, the field path as Target
// ("properties.scaleSettings.fixedScale.resizeTimeout"), and line and column
// (both from 1) in its message.
func Decode(data []byte, v any) error { return decode(data, v, json.RejectUnknownMembers(true)) }

// DecodeLoose is Decode, but ignores unknown members: for documents whose
// later versions may say more than we know.
func DecodeLoose(data []byte, v any) error { return decode(data, v) }

func decode(data []byte, v any, opts ...json.Options) error {
	if len(strings.TrimSpace(string(data))) == 0 {
		return fault.New(fault.Invalid, "InvalidRequestContent", "The request body is empty; a JSON document was expected.")
	}
	var whole jsontext.Value // syntax first: what is no JSON has no properties to speak of
	err := json.Unmarshal(data, &whole)
	if err == nil {
		err = json.Unmarshal(data, v, opts...)
	}
	if err == nil {
		return nil
	}
	return explain(data, err)
}

func explain(data []byte, err error) error {
	var syn *jsontext.SyntacticError
	if errors.As(err, &syn) {
		return explainSyntax(data, syn)
	}
	var sem *json.SemanticError
	if errors.As(err, &sem) {
		line, col := Position(data, sem.ByteOffset)
		path := Path(sem.JSONPointer)
		var inner *fault.Error
		if errors.As(sem.Err, &inner) { // an UnmarshalJSON of ours that already says it well
			if inner.Target == "" {
				return inner.At(path)
			}
			return inner
		}
		if errors.Is(sem.Err, json.ErrUnknownName) {
			return fault.New(fault.Invalid, "InvalidRequestContent",
				"The request body is not usable: line %d, column %d: there is no property %q here.", line, col, sem.JSONPointer.LastToken()).
				At(path).WithFix("remove it, or correct its spelling (names are case-sensitive)")
		}
		return fault.New(fault.Invalid, "InvalidRequestContent",
			"The request body is not usable: line %d, column %d: %s was found where %s was expected.", line, col, kindName(sem.JSONKind), typeName(sem)).At(path)
	}
	return fault.New(fault.Invalid, "InvalidRequestContent", "The request body cannot be decoded: %s.", err)
}

func explainSyntax(data []byte, e *jsontext.SyntacticError) error {
	offset, want := expected(data, e)
	line, col := Position(data, offset)
	path := Path(e.JSONPointer)
	if errors.Is(e.Err, jsontext.ErrDuplicateName) {
		return fault.New(fault.Invalid, "InvalidRequestContent",
			"The request body is not usable: line %d, column %d: the name %q appears twice in one object.", line, col, e.JSONPointer.LastToken()).
			At(path).WithFix("remove one of the two")
	}
	found := "the end of the document"
	if int(offset) < len(data) {
		r, _ := utf8.DecodeRune(data[offset:])
		found = strconv.QuoteRune(r)
	}
	return fault.New(fault.Invalid, "InvalidRequestContent",
		"The request body is not valid JSON: line %d, column %d: found %s, expected %s.", line, col, found, want).
		At(path).WithFix("%s", fix(e, line, col))
}

func fix(e *jsontext.SyntacticError, line, col int) string {
	if name := e.JSONPointer.LastToken(); strings.Contains(name, "://") && strings.Contains(e.Err.Error(), "after object name") {
		return fmt.Sprintf("%q stands where a property name belongs; if it is the value of url, write \"url\": before it and a comma after it", name)
	}
	return fmt.Sprintf("correct the body at line %d, column %d", line, col)
}

// expected returns where a syntax error is and what could have stood there.
// The decoder's own words tell the state it was in; a comma that nothing
// follows is reported at the comma, which is what has to go.
func expected(data []byte, e *jsontext.SyntacticError) (offset int64, want string) {
	i := min(max(int(e.ByteOffset), 0), len(data))
	text := e.Err.Error()
	before := strings.TrimRight(string(data[:i]), " \t\r\n")
	if i < len(data) && (data[i] == '}' || data[i] == ']') && strings.HasSuffix(before, ",") {
		return int64(len(before) - 1), fmt.Sprintf("no comma before the closing %q, or another element after it", data[i:i+1])
	}
	switch {
	case strings.Contains(text, "after object name"):
		return int64(i), "':' and a value after the property name"
	case strings.Contains(text, "after object value"):
		return int64(i), "',' or '}' after the value"
	case strings.Contains(text, "after array"):
		return int64(i), "',' or ']' after the element"
	case strings.Contains(text, "object name"), strings.HasSuffix(before, "{"):
		return int64(i), "a property name in double quotes"
	case strings.Contains(text, "top-level"):
		return int64(i), "nothing more after the document"
	case errors.Is(e.Err, io.ErrUnexpectedEOF):
		return int64(i), "the rest of the document: an object, array or string is not closed"
	}
	return int64(i), "a JSON value"
}

// Position turns a byte offset into line and column, both from 1; the column counts characters.
func Position(data []byte, offset int64) (line, col int) {
	i := min(max(int(offset), 0), len(data))
	head := string(data[:i])
	line = strings.Count(head, "\n") + 1
	col = len([]rune(head[strings.LastIndexByte(head, '\n')+1:])) + 1
	return line, col
}

// Path turns a JSON pointer into the dotted form of Azure's error targets:
// /properties/extensions/0/name becomes properties.extensions[0].name.
func Path(p jsontext.Pointer) string {
	var b strings.Builder
	for tok := range p.Tokens() {
		if _, err := strconv.Atoi(tok); err == nil {
			b.WriteString("[" + tok + "]")
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(tok)
	}
	return b.String()
}

func kindName(k jsontext.Kind) string {
	switch k {
	case 'n':
		return "null"
	case 't', 'f':
		return "a boolean"
	case '"':
		return "a string"
	case '0':
		return "a number"
	case '{':
		return "an object"
	case '[':
		return "an array"
	}
	return "something else"
}

func typeName(e *json.SemanticError) string {
	if e.GoType == nil {
		return "another type"
	}
	t := e.GoType
	for t.Kind().String() == "ptr" {
		t = t.Elem()
	}
	switch t.Kind().String() {
	case "bool":
		return "a boolean"
	case "string":
		return "a string"
	case "struct", "map":
		return "an object"
	case "slice", "array":
		return "an array"
	case "int", "int32", "int64", "uint", "uint32", "uint64":
		return "a whole number"
	case "float64", "float32":
		return "a number"
	}
	return "another type"
}
