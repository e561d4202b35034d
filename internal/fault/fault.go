// Package fault is the one error type of Keyfleet.
//
// Idea: an error that a person or a program outside may see is made where the
// reason is known, with a kind (what sort of failure), a code (the public
// protocol's word), a message that is safe to show, the field it is about and
// the way to mend it. Everything else is [Internal]: the caller sees a request
// id, the log sees the cause.
//
// Invariant: Message, Target, Fix and Details never hold a secret; the cause
// in Err is never shown to a caller.
//
// Consequence for the operator: every refusal names a code, a reason and, where
// there is one, the command or the change that mends it. The mapping to HTTP
// statuses and Azure's error bodies is one table, in package azureapi.
package fault

import (
	"errors"
	"fmt"
	"time"
)

// Kind is the sort of a failure. Kinds cross process boundaries by name, so
// they are append-only. A Kind is itself an error, so that
// errors.Is(err, fault.NotFound) asks for the kind.
type Kind uint8

// The kinds.
const (
	Internal        Kind = iota // anything not foreseen; the zero value
	Invalid                     // the request is wrong and stays wrong
	Unauthenticated             // no credential, or one that does not count
	Denied                      // known caller, not allowed
	NotFound                    // the thing does not exist
	Conflict                    // the thing is in a state that forbids this now
	Precondition                // If-Match / If-None-Match did not hold
	TooLarge                    // a body or a value over its limit
	TooMany                     // slow down; RetryAfter says how long
	Unavailable                 // a part we need does not answer; try again
	Timeout                     // gave up waiting
)

var kindNames = [...]string{
	"internal", "invalid", "unauthenticated", "denied", "not found", "conflict",
	"precondition failed", "too large", "too many requests", "unavailable", "timeout",
}

// String returns the kind's name.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return "internal"
}

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Detail is one further fact about an error, as Azure's details[] carry them.
type Detail struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Target  string `json:"target,omitempty"`
}

// Error is a failure that may be shown. Build it with [New] and the With
// methods; the zero value is an internal error without a message.
type Error struct {
	Kind       Kind
	Code       string        // the protocol's word, for instance "SecretNotFound"; empty: the edge's word for Kind
	Inner      string        // Key Vault's innererror code, for instance "AccessDenied"
	Message    string        // one or two sentences, safe to show
	Target     string        // the field (properties.vmSize) or resource it is about
	Fix        string        // what to do: a command or a change
	Details    []Detail      // further facts, each safe to show
	RetryAfter time.Duration // when to try again; zero: unknown
	Err        error         // cause, for the log only
}

// New makes an error of a kind with the protocol's code and a message.
func New(kind Kind, code, format string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Message: fmt.Sprintf(format, args...)}
}

// At returns a copy that names the field or resource it is about.
func (e *Error) At(target string) *Error { c := *e; c.Target = target; return &c }

// WithFix returns a copy that says how to mend it.
func (e *Error) WithFix(format string, args ...any) *Error {
	c := *e
	c.Fix = fmt.Sprintf(format, args...)
	return &c
}

// WithInner returns a copy with Key Vault's innererror code.
func (e *Error) WithInner(code string) *Error { c := *e; c.Inner = code; return &c }

// WithDetail returns a copy with one more detail.
func (e *Error) WithDetail(code, format string, args ...any) *Error {
	c := *e
	c.Details = append(append([]Detail(nil), e.Details...), Detail{Code: code, Message: fmt.Sprintf(format, args...)})
	return &c
}

// After returns a copy that says when to try again.
func (e *Error) After(d time.Duration) *Error { c := *e; c.RetryAfter = d; return &c }

// Because returns a copy with a cause, which is logged and never shown.
func (e *Error) Because(err error) *Error { c := *e; c.Err = err; return &c }

// Error renders code, message, target, fix and cause: for logs and the command line.
func (e *Error) Error() string {
	s := e.Message
	if s == "" {
		s = e.Kind.String()
	}
	if e.Code != "" {
		s = e.Code + ": " + s
	}
	if e.Target != "" {
		s += " (" + e.Target + ")"
	}
	if e.Fix != "" {
		s += " Fix: " + e.Fix
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is this error's kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// From returns the *Error in err's chain, or an internal error that wraps err.
// From(nil) is nil.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Kind: Internal, Err: err}
}

// KindOf returns the kind of err; Internal for errors of other types.
func KindOf(err error) Kind { return From(err).kind() }

func (e *Error) kind() Kind {
	if e == nil {
		return Internal
	}
	return e.Kind
}
