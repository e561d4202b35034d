package keyvaultext

import (
	"fmt"
	"log/slog"
)

// secret is a value that must not appear in logs, errors or status files: a
// token, a secret's value, a private key. Printed in any way it is [redacted].
// It is behind a pointer, because fmt does not ask the methods of unexported
// fields, and would print a string there.
type secret struct{ text *string }

const redacted = "[redacted]"

func newSecret(text string) secret { return secret{&text} }

// reveal returns the value, to be used and not kept.
func (s secret) reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// String hides the value.
func (secret) String() string { return redacted }

// Format hides the value from every verb.
func (secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// LogValue hides the value from slog.
func (secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText hides the value from encoders.
func (secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
