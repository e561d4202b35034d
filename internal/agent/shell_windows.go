package agent

import (
	"errors"
	"os"

	"keyfleet.dev/keyfleet/api/node"
)

// startProcess answers that sessions need a Unix node.
func startProcess(node.SessionStart) (*process, error) {
	return nil, errors.New("sessions are not offered on Windows nodes")
}

func (p *process) hangUp() {}

func exitStatus(*os.ProcessState, error) int { return 255 }
