package keyvaultext

import (
	"fmt"
	"log/slog"
)

// secret is a value that must not appear in logs, errors or status files: a
// token, a secret's value, a private key. Printed in any way it is [redacted].
type secret string

const redacted = "[redacted]"

// String hides the value.
func (secret) String() string { return redacted }

// Format hides the value from every verb.
func (secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// LogValue hides the value from slog.
func (secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText hides the value from encoders.
func (secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
