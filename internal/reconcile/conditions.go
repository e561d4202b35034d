package reconcile

import (
	"errors"
	"fmt"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// The conditions that the runtime sets.
const (
	Ready       = "Ready"       // the object is what its spec asks for
	Reconciling = "Reconciling" // work is going on, or planned after a failure
	Stalled     = "Stalled"     // given up until NextAttempt; without one: until the spec changes
)

// unset marks, during an attempt, a condition that the reconciler has not set
// itself: SetCondition replaces it by the generation.
const unset = -1

// markUnset prepares the conditions for an attempt.
func markUnset(m *store.Meta) {
	for i := range m.Conditions {
		switch m.Conditions[i].Type {
		case Ready, Reconciling, Stalled:
			m.Conditions[i].ObservedGeneration = unset
		}
	}
}

// conclude sets the conditions that the reconciler did not set, after the
// outcome of the attempt. attempt is the request id that the log also has.
func conclude(m *store.Meta, o outcome, err error, attempt string, now time.Time) {
	set := func(c store.Condition) {
		if old := m.Condition(c.Type); old.Type == "" || old.ObservedGeneration == unset {
			m.SetCondition(c, now)
		}
	}
	if err == nil {
		if !m.Deleting.IsZero() {
			set(store.Condition{Type: Ready, Reason: "Deleting"})
		}
		set(store.Condition{Type: Ready, Status: true, Reason: "Reconciled"})
		ready := m.Condition(Ready)
		set(store.Condition{Type: Reconciling, Status: !ready.Status, Reason: ready.Reason, Message: ready.Message})
		set(store.Condition{Type: Stalled, Reason: "Reconciled"})
		return
	}
	reason, message := explain(err, attempt)
	var next time.Time
	if o.wait > 0 {
		next = now.Add(o.wait).Round(time.Millisecond)
	}
	set(store.Condition{Type: Ready, Reason: reason, Message: message})
	if o.stalled {
		set(store.Condition{Type: Reconciling, Reason: Stalled})
		set(store.Condition{Type: Stalled, Status: true, Reason: reason, Message: message, NextAttempt: next})
		return
	}
	set(store.Condition{Type: Reconciling, Status: true, Reason: "Retrying", Message: message, NextAttempt: next})
	set(store.Condition{Type: Stalled, Reason: "Retrying"})
}

// panicError is a panic of a reconciler.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// explain returns an error's reason and message as they may be shown: those of
// a fault, and for anything else the way to find the cause in the log.
func explain(err error, attempt string) (reason, message string) {
	var f *fault.Error
	if !errors.As(err, &f) || f.Message == "" {
		reason = "InternalError"
		var p *panicError
		if errors.As(err, &p) {
			reason = "Panicked"
		}
		return reason, "An unforeseen error; the server's log has the cause under request id " + attempt + "."
	}
	reason, message = f.Code, f.Message
	if reason == "" {
		reason = reasons[f.Kind]
	}
	if f.Target != "" {
		message += " (" + f.Target + ")"
	}
	if f.Fix != "" {
		message += " Fix: " + f.Fix
	}
	return reason, message
}

// reasons are the condition reasons of faults without a code.
var reasons = map[fault.Kind]string{
	fault.Internal:        "InternalError",
	fault.Invalid:         "Invalid",
	fault.Unauthenticated: "Unauthenticated",
	fault.Denied:          "Denied",
	fault.NotFound:        "NotFound",
	fault.Conflict:        "Conflict",
	fault.Precondition:    "PreconditionFailed",
	fault.TooLarge:        "TooLarge",
	fault.TooMany:         "TooManyRequests",
	fault.Unavailable:     "Unavailable",
	fault.Timeout:         "Timeout",
}
