// Package keyfleet holds the wire types of Keyfleet's own additions to the
// surface: admin.json, which a server writes on its first start, and the
// bodies under /keyfleet/v1/ on the arm host. It is a leaf.
package keyfleet

import (
	"fmt"
	"log/slog"
)

// Admin is admin.json: how to reach a server, and the credential of its first
// administrator. The server writes it into its data directory with mode 0600.
type Admin struct {
	Endpoints    Endpoints `json:"endpoints"`
	Tenant       string    `json:"tenant"`
	Subscription string    `json:"subscription"`
	ClientID     string    `json:"clientId"`
	ClientSecret Secret    `json:"clientSecret"`
	CAFile       string    `json:"caFile"` // a path relative to admin.json's own directory, or an absolute one
}

// Endpoints says under which names a server answers. The names need not
// resolve: a client that knows Listen dials it for every one of them.
type Endpoints struct {
	ResourceManager string `json:"resourceManager"` // "https://arm.keyfleet.internal:8443"
	Login           string `json:"login"`           // "https://login.keyfleet.internal:8443"
	Node            string `json:"node"`            // "https://node.keyfleet.internal:8443"
	VaultSuffix     string `json:"vaultSuffix"`     // "vault.keyfleet.internal:8443"; a vault is https://NAME.SUFFIX
	BatchSuffix     string `json:"batchSuffix"`     // "batch.keyfleet.internal:8443"; an account is https://ACCOUNT.REGION.SUFFIX
	Listen          string `json:"listen"`          // "127.0.0.1:8443"; empty: resolve the names
}

// Secret is a credential. It marshals as it is, because admin.json must hold
// it, and prints as [redacted] everywhere else.
type Secret string

const redacted = "[redacted]"

// String returns [redacted].
func (Secret) String() string { return redacted }

// GoString returns [redacted].
func (Secret) GoString() string { return redacted }

// Format writes [redacted] for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// LogValue keeps the secret out of logs.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// Reveal returns the secret itself.
func (s Secret) Reveal() string { return string(s) }
