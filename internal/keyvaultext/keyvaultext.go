// Package keyvaultext is the Key Vault extension: an ordinary VM extension
// handler that keeps the certificates of Key Vault secrets as files on a node.
//
// Idea: one program is the handler's five commands and the service they start.
// The service pulls with the node's own managed identity and polls at the
// interval of the settings; a hint on a socket only makes it look sooner. One
// goroutine owns all state (which certificate is delivered, what failed, when
// to look again); fetches and reload hooks run beside it and report back.
//
// Invariant: whoever opens a certificate's link reads one complete file whose
// private key belongs to its certificate, at every moment, whatever is killed
// when. A version is complete and on disk before the link names it, and the
// file that a link names is never removed.
//
// Consequence for the operator: consumers read only the link. After a crash at
// any point the answer is to run enable again. While the vault or the identity
// endpoint is away the last good files stay. A reload hook may run twice for
// one switch, when the machine died between the hook and the note of it, and
// is never lost.
//
// The contract between an agent and this handler is in package api/extension;
// nothing here needs Keyfleet's agent or Keyfleet's vault.
package keyvaultext

import (
	"os"
	"strconv"
	"time"
)

// HandlerName is the handler's published name, PUBLISHER.TYPE.
const HandlerName = "Microsoft.Azure.KeyVault.KeyVaultForLinux"

// TimeScaleVariable names an environment variable that multiplies waiting
// times (not network timeouts), for tests.
const TimeScaleVariable = "KEYFLEET_KEYVAULT_TIME_SCALE"

// Timing is how long the service waits for what. The zero value of a field is
// not usable; start from [DefaultTiming].
type Timing struct {
	PollFloor  time.Duration // shortest polling interval, whatever the settings say
	RetryBase  time.Duration // wait after the first failure
	RetryCap   time.Duration // longest wait between tries; the polling interval bounds it too
	Tries      int           // failed tries after which requireInitialSync gives up
	Request    time.Duration // one HTTP request, with its body
	TokenTries int           // tries for one token when the identity endpoint says "later"
	HintRetry  time.Duration // longest wait before connecting to the hint socket again
	Scale      float64       // multiplies the settings' polling interval
}

// DefaultTiming gives 25 tries in about a quarter of an hour.
func DefaultTiming() Timing {
	return Timing{
		PollFloor: 5 * time.Second, RetryBase: time.Second, RetryCap: time.Minute, Tries: 25,
		Request: 10 * time.Second, TokenTries: 4, HintRetry: 2 * time.Second, Scale: 1,
	}
}

// Scaled multiplies every wait by f; network timeouts stay.
func (t Timing) Scaled(f float64) Timing {
	by := func(d time.Duration) time.Duration { return max(time.Duration(float64(d)*f), time.Millisecond) }
	t.PollFloor, t.RetryBase, t.RetryCap, t.HintRetry = by(t.PollFloor), by(t.RetryBase), by(t.RetryCap), by(t.HintRetry)
	t.Scale *= f
	return t
}

// TimingFromEnvironment is DefaultTiming, scaled if [TimeScaleVariable] says so.
func TimingFromEnvironment() Timing {
	f, err := strconv.ParseFloat(os.Getenv(TimeScaleVariable), 64)
	if err != nil || f <= 0 || f > 1 {
		return DefaultTiming()
	}
	return DefaultTiming().Scaled(f)
}
