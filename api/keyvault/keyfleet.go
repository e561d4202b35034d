package keyvault

import "time"

// The types below are Keyfleet's own, under /keyfleet/v1/ of the management surface.

// Renewal is how a certificate stands: GET
// /keyfleet/v1/vaults/{vault}/certificates/{name}.
type Renewal struct {
	Vault       string     `json:"vault"`
	Name        string     `json:"name"`
	Version     string     `json:"version,omitempty"` // newest; absent: none yet
	NotBefore   *time.Time `json:"notBefore,omitempty"`
	NotAfter    *time.Time `json:"notAfter,omitempty"`
	Next        *time.Time `json:"nextRenewal,omitempty"` // in policy time; absent: never by itself
	MailDue     *time.Time `json:"mailDue,omitempty"`     // when EmailContacts became due; no mail was sent
	Failing     bool       `json:"failing"`
	Stalled     bool       `json:"stalled"`
	Reason      string     `json:"reason,omitempty"`
	Message     string     `json:"message,omitempty"`
	Since       *time.Time `json:"since,omitempty"`
	NextAttempt *time.Time `json:"nextAttempt,omitempty"` // absent while stalled: when the policy changes
}

// AdvanceClock is the body of POST /keyfleet/v1/dev/clock. Advance is a Go duration such as "720h".
type AdvanceClock struct {
	Advance string `json:"advance"`
}

// Clock is policy time: the answer of GET and POST /keyfleet/v1/dev/clock.
type Clock struct {
	PolicyTime time.Time `json:"policyTime"`
	Offset     string    `json:"offset"` // to real time, a Go duration
}
