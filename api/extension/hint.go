package extension

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// HintSocketVariable names the environment variable with the path of the
// Unix socket on which an agent gives hints. It is Keyfleet's addition to the
// contract and optional: without it an extension only polls.
//
// The extension connects; the agent writes lines "hint VALUE\n" (VALUE changes
// when something observed has changed; the first line after connecting is the
// present value), and the extension writes one [Delivery] a line as JSON.
// A hint carries no secret and grants nothing: the extension fetches with its own identity.
const HintSocketVariable = "KEYFLEET_HINT_SOCKET"

// Delivery is one line from an extension to the agent: the state of one
// observed secret. Lines are repeated after a reconnect; the last one counts.
type Delivery struct {
	Secret  string    `json:"secret"`            // URL, exactly as the settings write it
	Version string    `json:"version,omitempty"` // version on disk; empty: none yet
	Path    string    `json:"path,omitempty"`    // link that consumers read
	Since   time.Time `json:"since,omitzero"`    // when the link was switched to this version
	Pinned  bool      `json:"pinned,omitempty"`  // the URL names a version, so it never renews
	Problem string    `json:"problem,omitempty"` // why the last fetch failed; empty: it did not
}

// EncodeDelivery renders d as a line with its line feed.
func EncodeDelivery(d Delivery) []byte { return append(mustJSON(d), '\n') }

// ParseDelivery reads one line; secret is required.
func ParseDelivery(line []byte) (Delivery, error) {
	var d Delivery
	if err := json.Unmarshal(line, &d); err != nil {
		return Delivery{}, fmt.Errorf("reading delivery line: %w", err)
	}
	if d.Secret == "" {
		return Delivery{}, errors.New("reading delivery line: secret is missing")
	}
	return d, nil
}

// ParseHint returns the value of a line "hint VALUE"; ok is false for lines
// that are something else, which an extension ignores.
func ParseHint(line string) (value string, ok bool) {
	value, ok = strings.CutPrefix(strings.TrimRight(line, "\r\n"), "hint ")
	if !ok || value == "" {
		return "", false
	}
	return value, true
}
