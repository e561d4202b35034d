package target

import (
	"fmt"
	"io"
	"log/slog"
)

// Secret is a password. However it is printed, logged or marshalled it shows as
// [redacted]; Reveal is the one way to the value.
type Secret struct{ value string }

const redacted = "[redacted]"

// NewSecret wraps a password.
func NewSecret(value string) Secret { return Secret{value} }

// Reveal returns the password.
func (s Secret) Reveal() string { return s.value }

// String implements fmt.Stringer.
func (Secret) String() string { return redacted }

// GoString implements fmt.GoStringer.
func (Secret) GoString() string { return redacted }

// Format implements fmt.Formatter, for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText implements encoding.TextMarshaler, so JSON shows no value either.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue implements slog.LogValuer.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }
