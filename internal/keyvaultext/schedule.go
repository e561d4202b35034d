package keyvaultext

import (
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/fault"
)

// progress is what is known about one observed certificate. It is changed only
// by the functions of this file, which are pure.
type progress struct {
	synced   bool         // delivered at least once since the service started
	failures int          // failed tries since the last success, those caused by hints not counted
	problem  *fault.Error // of the last try; nil if it succeeded
	local    bool         // the problem is of this machine (directory, access), not of vault or identity
	next     time.Time    // when to try again; the zero time: now
	hinted   bool         // try as soon as the running try is over
	hook     *hookNote    // last reload hook; nil: none configured
}

// hookNote is what is remembered of a certificate's reload hook. It is written
// as pending before the link moves and as done when the hook has ended; so a
// hook that a kill has prevented is found at the next start and run then.
type hookNote struct {
	Link     string    `json:"link"`
	Version  string    `json:"version"`
	Pending  bool      `json:"pending"`
	ExitCode int       `json:"exitCode"` // -1: killed, or not started
	Message  string    `json:"message,omitempty"`
	Time     time.Time `json:"time"`
}

// outcome is how one try went.
type outcome struct {
	problem *fault.Error
	local   bool
	byHint  bool
}

// after returns the progress after a try. jitter is in [0, 1): polls come up to
// a tenth early, so that nodes which started together do not stay together,
// and never late, because the interval is an upper bound.
func (p progress) after(o outcome, now time.Time, interval time.Duration, t Timing, jitter float64) progress {
	p.problem, p.local = o.problem, o.local
	poll := now.Add(interval - time.Duration(jitter*float64(interval)/10))
	if o.problem == nil {
		p.synced, p.failures, p.next = true, 0, poll
		return p
	}
	if !o.byHint || p.failures == 0 {
		p.failures++
	}
	wait := backoff(p.failures, t.RetryBase, t.RetryCap)
	wait = max(wait-time.Duration(jitter*float64(wait)/4), o.problem.RetryAfter)
	p.next = now.Add(min(wait, 10*time.Minute))
	if p.next.After(poll) && o.problem.RetryAfter == 0 {
		p.next = poll
	}
	return p
}

// backoff is base, growing by two fifths with every failure up to limit: with a
// base of a second and a limit of a minute, 25 tries take a quarter of an hour.
func backoff(failures int, base, limit time.Duration) time.Duration {
	wait := base
	for range failures - 1 {
		if wait = wait * 7 / 5; wait >= limit {
			return limit
		}
	}
	return wait
}

// pollingInterval is the settings' interval, not below the floor.
func pollingInterval(s extension.KeyVaultSettings, t Timing) time.Duration {
	return max(time.Duration(float64(s.PollingInterval)*t.Scale), t.PollFloor)
}

// The words of the status file's operation and success message, as documented.
const (
	operationStart = "Service start."
	successMessage = "Successfully started Key Vault extension service."
)

// report is what the status file says, without its time.
type report struct {
	status    string
	code      extension.Code
	message   string
	substatus []extension.Substatus
}

// overall decides the status. Without requireInitialSync the service has
// succeeded when polling starts, unless this machine itself cannot hold a
// certificate. With it, the first delivery of every certificate counts, and
// 25 failed tries of one are an error; tries go on and may still succeed.
func overall(s extension.KeyVaultSettings, all []progress, t Timing) report {
	r := report{status: extension.StatusSuccess, message: successMessage}
	var waiting []string
	gaveUp, local := false, false
	most := 0
	for i, p := range all {
		if p.hook != nil {
			r.substatus = append(r.substatus, hookSubstatus(s.Certificates[i], *p.hook))
		}
		if p.synced {
			continue
		}
		most = max(most, p.failures)
		gaveUp = gaveUp || p.failures >= t.Tries
		local = local || p.local
		if p.problem != nil {
			waiting = append(waiting, explainProblem(s.Certificates[i], p.problem))
			if r.code == 0 {
				r.code = 1
			}
		} else if s.RequireInitialSync {
			waiting = append(waiting, s.Certificates[i].URL+": not fetched yet.")
		}
	}
	why := strings.Join(waiting, " ")
	switch {
	case s.RequireInitialSync && gaveUp:
		r.status = extension.StatusError
		r.message = fmt.Sprintf("Key Vault extension service gave up the first synchronisation after %d tries; %d of %d certificates are missing. %s", t.Tries, len(waiting), len(all), why)
	case s.RequireInitialSync && len(waiting) > 0:
		r.status, r.code = extension.StatusTransitioning, 0
		r.message = fmt.Sprintf("Key Vault extension service waits for the first synchronisation, try %d of %d; %d of %d certificates are missing. %s", most+1, t.Tries, len(waiting), len(all), why)
	case local:
		r.status = extension.StatusError
		r.message = "Key Vault extension service cannot keep certificates on this node. " + why
	default:
		r.code = 0
	}
	return r
}

// explainProblem says why a certificate is missing: the URL exactly as the
// settings write it, then code, message, place and fix.
func explainProblem(c extension.ObservedCertificate, f *fault.Error) string {
	text := c.URL + ": "
	if f.Code != "" {
		text += f.Code + ": "
	}
	text += f.Message
	if f.Target != "" {
		text += " (" + f.Target + ")"
	}
	if f.Fix != "" {
		text += " Fix: " + strings.TrimSuffix(f.Fix, ".") + "."
	}
	return text
}

func hookSubstatus(c extension.ObservedCertificate, n hookNote) extension.Substatus {
	s := extension.Substatus{Name: "reloadHook/" + c.LinkName(), Status: extension.StatusSuccess, FormattedMessage: extension.FormattedMessage{Lang: "en", Message: n.Message}}
	switch {
	case n.Version == "":
		s.Status, s.FormattedMessage.Message = extension.StatusTransitioning, "The link has not been switched yet."
	case n.Pending:
		s.Status, s.FormattedMessage.Message = extension.StatusTransitioning, "Running for version "+n.Version+"."
	default:
		s.FormattedMessage.Message = "Version " + n.Version + ", " + n.Time.UTC().Format(time.RFC3339) + ": " + n.Message
		if n.ExitCode != 0 {
			s.Status, s.Code = extension.StatusError, extension.Code(n.ExitCode)
		}
	}
	return s
}

// statusFile renders the report. since is when the service came to this status;
// it stands in the success message, as documented.
func (r report) statusFile(since, now time.Time) extension.StatusFile {
	message := r.message
	if r.status == extension.StatusSuccess {
		message += " " + since.UTC().Format(time.RFC3339)
	}
	return extension.StatusFile{
		Status: extension.Status{
			Code: r.code, Operation: operationStart, Status: r.status, Substatus: r.substatus,
			FormattedMessage: extension.FormattedMessage{Lang: "en", Message: message},
		},
		TimestampUTC: now.UTC().Format(time.RFC3339),
		Version:      "1.0",
	}
}
