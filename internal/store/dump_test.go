package store_test

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/store"
)

func TestDumpHidesSecretsUnlessAsked(t *testing.T) {
	m := store.NewMemory()
	defer m.Close()
	// Every member whose text holds the word canary must not be seen.
	_, err := m.Commit(context.Background(), nil, []store.Write{
		{Key: "/meta/incarnation", Value: []byte("0a1b2c3d")},
		{Key: "/applications/a", Value: []byte(`{"id":"a","spec":{"name":"app","clientSecret":"canary","secrets":[{"hint":"canary"},"canary"]}}`)},
		{Key: "/secrets/prod1/web/1", Value: []byte(`{"id":"prod1/web/1","spec":{"value":"canary","contentType":"text/plain"}}`)},
		{Key: "/keys/x", Value: []byte(`{"spec":{"jwk":{"kty":"EC","d":"canary"},"note":"-----BEGIN PRIVATE KEY----- canary"}}`)},
		{Key: "/other/x", Value: []byte(`{"spec":{"special":"canary","plain":"seen","count":3,"empty":""}}`)},
	})
	if err != nil {
		t.Fatal(err)
	}
	dump := func(o store.DumpOptions) string {
		var out bytes.Buffer
		if err := store.Dump(context.Background(), m, &out, o); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			if !json.Valid([]byte(line)) {
				t.Errorf("not a line of JSON: %s", line)
			}
		}
		return out.String()
	}
	hidden := dump(store.DumpOptions{Secret: map[string][]string{"other": {"Special"}}})
	if strings.Contains(hidden, "canary") {
		t.Errorf("a secret is seen:\n%s", hidden)
	}
	for _, want := range []string{`"0a1b2c3d"`, `"name":"app"`, `"text/plain"`, `"plain":"seen"`, `"count":3`, `"kty":"EC"`, `"revision":2`, `"key":"/other/x"`} {
		if !strings.Contains(hidden, want) {
			t.Errorf("%s is not seen:\n%s", want, hidden)
		}
	}
	if n := strings.Count(dump(store.DumpOptions{Reveal: true}), "canary"); n != 7 {
		t.Errorf("%d of 7 secrets are revealed", n)
	}
	if got := dump(store.DumpOptions{Prefix: "/secrets/"}); strings.Count(got, "\n") != 1 {
		t.Errorf("with a prefix:\n%s", got)
	}
}
