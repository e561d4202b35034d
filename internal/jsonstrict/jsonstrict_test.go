package jsonstrict

import (
	"os"
	"path/filepath"
	"testing"
)

func TestShow(t *testing.T) {
	var v map[string]any
	for _, f := range []string{"000-put-pool-windows.json", "001-put-pool-windows.json"} {
		b, err := os.ReadFile(filepath.Join("../../testdata/requests", f))
		if err != nil {
			t.Fatal(err)
		}
		t.Log(Decode(b, &v))
	}
	var s struct {
		A struct {
			B []struct {
				C int `json:"c"`
			} `json:"b"`
		} `json:"a"`
	}
	for _, d := range []string{`{"a":{"b":[{"c":"x"}]}}`, `{"a":{"b":[{"d":1}]}}`, `{"a":1,"a":2}`, `{"a":{}`, `{"a" 1}`, `{"a":{}} x`, `{'a':1}`, `{"A":{}}`} {
		t.Log(d, Decode([]byte(d), &s))
	}
}
