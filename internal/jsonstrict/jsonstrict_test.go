package jsonstrict

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

type doc struct {
	Name string `json:"name"`
	List []item `json:"list"`
	On   bool   `json:"on"`
}

type item struct {
	Count int `json:"count"`
}

func TestErrorsSayWhereAndWhatWasExpected(t *testing.T) {
	cases := []struct {
		why, in   string
		path      string
		fragments []string
	}{
		{"wrong type", "{\n  \"list\": [{\"count\": \"x\"}]}", "list[0].count", []string{"line 2", "a string was found", "a whole number"}},
		{"unknown name", `{"nam":"x"}`, "nam", []string{"line 1, column 2", `no property "nam"`}},
		{"names are case-sensitive", `{"Name":"x"}`, "Name", []string{`no property "Name"`}},
		{"duplicate name", `{"on":true,"on":false}`, "on", []string{"appears twice"}},
		{"trailing comma in an object", "{\"on\":true,\n}", "", []string{"line 1, column 11", "no comma before the closing"}},
		{"trailing comma in an array", `{"list":[{"count":1},]}`, "list[1]", []string{"no comma before the closing"}},
		{"value without a name", `{"list":[{"https://x" "y"}]}`, "list[0].https://x", []string{"':' and a value"}},
		{"missing comma", `{"on":true "name":"x"}`, "", []string{"',' or '}'"}},
		{"cut off", `{"list":[{"count":1}`, "list", []string{"end of the document"}},
		{"empty", ` `, "", []string{"empty"}},
		{"trailing data", `{} x`, "", []string{"nothing more after the document"}},
		{"single quotes", `{'on':true}`, "", []string{"property name in double quotes"}},
	}
	for _, c := range cases {
		t.Run(c.why, func(t *testing.T) {
			var d doc
			err := Decode([]byte(c.in), &d)
			var e *fault.Error
			if !errors.As(err, &e) || e.Kind != fault.Invalid || e.Code != "InvalidRequestContent" {
				t.Fatalf("got %v, want an invalid request content", err)
			}
			if e.Target != c.path {
				t.Errorf("path %q, want %q (%s)", e.Target, c.path, e.Message)
			}
			for _, f := range c.fragments {
				if !strings.Contains(e.Message, f) {
					t.Errorf("message %q does not say %q", e.Message, f)
				}
			}
		})
	}
}

// TestDocumentedWindowsBodies: both are invalid JSON as published; the answer
// must say where.
func TestDocumentedWindowsBodies(t *testing.T) {
	for file, fragment := range map[string]string{
		"000-put-pool-windows.json": "line 41, column 26: found ','",
		"001-put-pool-windows.json": "line 32, column 41: found '\"', expected ':' and a value after the property name",
	} {
		b, err := os.ReadFile(filepath.Join("..", "..", "testdata", "requests", file))
		if err != nil {
			t.Fatal(err)
		}
		var v map[string]any
		err = Decode(b, &v)
		if err == nil || !strings.Contains(err.Error(), fragment) {
			t.Errorf("%s: got %v, want %q", file, err, fragment)
		}
	}
}

func TestLooseIgnoresUnknownMembers(t *testing.T) {
	var d doc
	if err := DecodeLoose([]byte(`{"name":"x","more":1}`), &d); err != nil || d.Name != "x" {
		t.Errorf("got %v %v", d, err)
	}
}

// FuzzDecode: whatever comes in, Decode ends, and what it accepts
// encoding/json reads the same way.
func FuzzDecode(f *testing.F) {
	for _, file := range []string{"000-put-pool-linux.json", "000-put-pool-windows.json", "001-put-pool-windows.json"} {
		b, err := os.ReadFile(filepath.Join("..", "..", "testdata", "requests", file))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"a":[1,{"b":null}],"a":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var got any
		if err := Decode(data, &got); err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Errorf("not an invalid request: %v", err)
			}
			return
		}
		var std any
		if err := json.Unmarshal(data, &std); err != nil {
			t.Errorf("accepted what encoding/json refuses: %v", err)
		}
	})
}
