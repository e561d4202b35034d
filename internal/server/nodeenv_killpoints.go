//go:build killpoints

package server

import (
	"os"
	"strings"
)

// nodeEnvironment is KEYFLEET_NODE_ENV, taken apart at semicolons: how a test
// tells the programs inside local nodes where to die (package effect).
func nodeEnvironment() []string {
	if text := os.Getenv("KEYFLEET_NODE_ENV"); text != "" {
		return strings.Split(text, ";")
	}
	return nil
}
