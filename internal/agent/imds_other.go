//go:build !linux

package agent

import (
	"fmt"
	"net"
)

// bindIMDS listens on the identity endpoint's address, which must be there.
func bindIMDS(cfg Config) (net.Listener, error) {
	l, err := net.Listen("tcp4", cfg.IMDS)
	if err != nil {
		return nil, fmt.Errorf("opening the identity endpoint on %s: %w", cfg.IMDS, err)
	}
	return l, nil
}
