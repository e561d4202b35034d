package servicelinker

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"

	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// TestMerge are the examples of RFC 7396 that are about objects.
func TestMerge(t *testing.T) {
	for _, c := range []struct{ base, patch, want string }{
		{`{"a":"b"}`, `{"a":"c"}`, `{"a":"c"}`},
		{`{"a":"b"}`, `{"b":"c"}`, `{"a":"b","b":"c"}`},
		{`{"a":"b"}`, `{"a":null}`, `{}`},
		{`{"a":"b","b":"c"}`, `{"a":null}`, `{"b":"c"}`},
		{`{"a":["b"]}`, `{"a":"c"}`, `{"a":"c"}`},
		{`{"a":"c"}`, `{"a":["b"]}`, `{"a":["b"]}`},
		{`{"a":{"b":"c"}}`, `{"a":{"b":"d","c":null}}`, `{"a":{"b":"d"}}`},
		{`{"a":[{"b":"c"}]}`, `{"a":[1]}`, `{"a":[1]}`},
		{`{"e":null}`, `{"a":1}`, `{"a":1,"e":null}`},
		{`{}`, `{"a":{"bb":{"ccc":null}}}`, `{"a":{"bb":{}}}`},
		{`{"a":"foo"}`, `{"a":{"b":1}}`, `{"a":{"b":1}}`},
	} {
		got, err := merge(json.RawMessage(c.base), []byte(c.patch))
		if err != nil || string(got) != c.want {
			t.Errorf("%s with %s: %s, %v, expected %s", c.base, c.patch, got, err, c.want)
		}
	}
}

// FuzzMerge: a patch is refused as a client's mistake, or leads to a body that a PUT
// could have said; the same patch again changes nothing.
func FuzzMerge(f *testing.F) {
	f.Add([]byte(`{"properties":{"clientType":"go","authInfo":{"secretInfo":null}}}`))
	f.Add([]byte(`{"properties":{"configurationInfo":{"customizedKeys":{"A":null,"B":"C"}},"publicNetworkSolution":{"firewallRules":{"ipRanges":[1]}}}}`))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Add([]byte(`null`))
	base := wire.Linker{Properties: wire.LinkerProperties{
		ClientType: "python", Scope: "shop", AuthInfo: wire.AuthInfo{AuthType: "secret", SecretInfo: &wire.SecretInfo{SecretType: "rawValue"}},
		ConfigurationInfo: &wire.ConfigurationInfo{CustomizedKeys: map[string]string{"A": "B"}},
	}}
	f.Fuzz(func(t *testing.T, patch []byte) {
		merged, err := merge(base, patch)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("%q: %v", patch, err)
			}
			return
		}
		again, err := merge(json.RawMessage(merged), patch)
		if err != nil {
			t.Fatalf("%q: the second time: %v", patch, err)
		}
		if d := cmp.Diff(string(merged), string(again)); d != "" {
			t.Fatalf("%q: the second time something changes:\n%s", patch, d)
		}
		var l wire.Linker
		if err := jsonstrict.Decode(merged, &l); err != nil && fault.KindOf(err) != fault.Invalid {
			t.Fatalf("%q: %v", patch, err)
		}
	})
}
