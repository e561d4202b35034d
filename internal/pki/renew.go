package pki

import "time"

// Trigger says when a certificate is due for its lifetime action. Exactly one
// of the fields is set; with none the action is never due.
type Trigger struct {
	DaysBeforeExpiry   int // days (of 24 hours) before NotAfter
	LifetimePercentage int // 1 to 99: when this part of the lifetime has passed
}

// RenewAt returns the moment the trigger is due, between notBefore and
// notAfter; the zero time if the trigger is empty. A number of days that is
// longer than the whole life makes it due at notBefore.
func RenewAt(notBefore, notAfter time.Time, t Trigger) time.Time {
	life := notAfter.Sub(notBefore)
	var at time.Time
	switch {
	case t.DaysBeforeExpiry > 0:
		at = notAfter.Add(-time.Duration(t.DaysBeforeExpiry) * 24 * time.Hour)
	case t.LifetimePercentage > 0:
		at = notBefore.Add(life / 100 * time.Duration(t.LifetimePercentage))
	default:
		return time.Time{}
	}
	if at.Before(notBefore) {
		return notBefore
	}
	if at.After(notAfter) {
		return notAfter
	}
	return at
}
