//go:build !linux

package agent

import "time"

// boot returns no id: it is known on Linux only, so a reboot cannot be told from a restart of the agent.
func boot() (id string, booted time.Time) { return "", time.Now().UTC().Round(time.Millisecond) }
