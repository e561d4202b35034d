//go:build !unix

package cli

import "keyfleet.dev/keyfleet/client"

// watchWindow tells nothing: there is no signal for it here.
func watchWindow(int) (sizes <-chan client.WindowSize, stop func()) { return nil, func() {} }
