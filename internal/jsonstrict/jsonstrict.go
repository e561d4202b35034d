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
	err := json.Unmarshal(data, v, opts...)
	if err == nil {
		return nil
	}
	return explain(data, err)
}

func explain(data []byte, err error) error {
	var syn *jsontext.SyntacticError
	if errors.As(err, &syn) {
		line, col := Position(data, syn.ByteOffset)
		what := strings.TrimPrefix(syn.Err.Error(), "jsontext: ")
		if errors.Is(syn.Err, io.ErrUnexpectedEOF) {
			what = "the document ends too early"
		}
		if errors.Is(syn.Err, jsontext.ErrDuplicateName) {
			return fault.New(fault.Invalid, "InvalidRequestContent",
				"The request body is not usable: line %d, column %d: the name %q appears twice in one object.", line, col, syn.JSONPointer.LastToken()).
				At(Path(syn.JSONPointer)).WithFix("remove one of the two")
		}
		return fault.New(fault.Invalid, "InvalidRequestContent",
			"The request body is not valid JSON: line %d, column %d: %s; %s.", line, col, what, expected(data, syn)).
			At(Path(syn.JSONPointer)).WithFix("correct the body at line %d, column %d", line, col)
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

// expected says what could have stood at the place of a syntax error.
func expected(data []byte, e *jsontext.SyntacticError) string {
	i := int(e.ByteOffset)
	before := strings.TrimRight(string(data[:min(i, len(data))]), " \t\r\n")
	at := byte(0)
	if i < len(data) {
		at = data[i]
	}
	switch {
	case strings.HasSuffix(before, ",") && (at == '}' || at == ']'):
		return fmt.Sprintf("there is a comma before this %q: expected another element, or no comma", string(at))
	case strings.HasSuffix(before, ","):
		return "expected another element after the comma"
	case strings.HasSuffix(before, `"`) && strings.Contains(e.Err.Error(), "':'"),
		strings.Contains(e.Err.Error(), "after object name"):
		return `expected ':' and a value after the property name`
	case strings.Contains(e.Err.Error(), "after object value"):
		return "expected ',' or '}' after the value"
	case strings.Contains(e.Err.Error(), "after array element"), strings.Contains(e.Err.Error(), "after array value"):
		return "expected ',' or ']' after the element"
	case strings.Contains(e.Err.Error(), "start of object"), strings.Contains(e.Err.Error(), "object name"):
		return "expected a property name in double quotes"
	case strings.Contains(e.Err.Error(), "top-level"):
		return "expected nothing more after the document"
	}
	return "expected a JSON value"
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
