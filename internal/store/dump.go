package store

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// DumpOptions says what a dump shows.
type DumpOptions struct {
	Prefix string // only keys that start so; "": all
	Reveal bool   // show secret values; otherwise "[redacted]" stands in their place
	// Secret names further members that are secret, by kind (first part of the
	// key), beside those that [isSecret] knows by name or content.
	Secret map[string][]string
}

// dumped is a line of a dump.
type dumped struct {
	Key      string `json:"key"`
	Revision int64  `json:"revision"`
	Created  int64  `json:"created"` // revision of its creation
	Value    any    `json:"value"`   // the object; a string if the value is not JSON
}

const redacted = "[redacted]"

// Dump writes every key of b as a line of JSON, in key order, for people who want
// to see what the store holds. b is the sealed backend, so values are clear.
func Dump(ctx context.Context, b Backend, w io.Writer, o DumpOptions) error {
	es, _, err := b.List(ctx, o.Prefix)
	if err != nil {
		return fmt.Errorf("listing the store: %w", err)
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for _, e := range es {
		line := dumped{Key: e.Key, Revision: e.ModRev, Created: e.CreateRev}
		if err := json.Unmarshal(e.Value, &line.Value); err != nil {
			line.Value = string(e.Value)
		}
		if !o.Reveal {
			kind, _, _ := strings.Cut(strings.TrimPrefix(e.Key, "/"), "/")
			line.Value = redact("", line.Value, o.Secret[kind])
		}
		if err := enc.Encode(line); err != nil {
			return fmt.Errorf("writing the dump: %w", err)
		}
	}
	return nil
}

// redact replaces secret values inside v, a decoded JSON value that is the member name.
func redact(name string, v any, more []string) any {
	switch v := v.(type) {
	case map[string]any:
		if isSecret(name, "", more) {
			return redacted
		}
		for k, member := range v {
			v[k] = redact(k, member, more)
		}
		return v
	case []any:
		for i, element := range v {
			v[i] = redact(name, element, more)
		}
		return v
	case string:
		if v != "" && isSecret(name, v, more) {
			return redacted
		}
	}
	return v
}

// secretWords make a member secret if its name, in lower case, contains one.
var secretWords = [...]string{"secret", "password", "passphrase", "private", "protected", "token", "credential", "pkcs12", "pfx"}

// secretNames make a member secret if its name, in lower case, is one.
var secretNames = [...]string{"value", "key", "keys", "pem", "der", "d", "k", "data", "content"}

// isSecret reports whether a member is shown as "[redacted]": by its name, by
// being declared in more, or by what it holds. It would rather hide too much.
func isSecret(name, value string, more []string) bool {
	lower := strings.ToLower(name)
	for _, w := range secretWords {
		if strings.Contains(lower, w) {
			return true
		}
	}
	for _, n := range secretNames {
		if lower == n {
			return true
		}
	}
	for _, n := range more {
		if strings.EqualFold(n, name) {
			return true
		}
	}
	// A private key as PEM or as base64 of PEM or of PKCS #8, PKCS #12; a JWT.
	for _, start := range []string{"-----BEGIN PRIV", "-----BEGIN EC", "-----BEGIN RSA", "LS0tLS1CRUdJTiBQUklW", "LS0tLS1CRUdJTiBFQ", "LS0tLS1CRUdJTiBSU0E", "MIIEv", "MIGHAgEAMBMG", "eyJhbGciO"} {
		if strings.HasPrefix(value, start) {
			return true
		}
	}
	return strings.Contains(value, "PRIVATE KEY")
}
