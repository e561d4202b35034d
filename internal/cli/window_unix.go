//go:build unix

package cli

import (
	"os"
	"os/signal"
	"syscall"

	"keyfleet.dev/keyfleet/client"
)

// watchWindow tells new sizes of the terminal until stop is called.
func watchWindow(fd int) (sizes <-chan client.WindowSize, stop func()) {
	sig := make(chan os.Signal, 1)
	out := make(chan client.WindowSize, 1)
	done := make(chan struct{})
	signal.Notify(sig, syscall.SIGWINCH)
	go func() { // ends with stop
		for {
			select {
			case <-done:
				return
			case <-sig:
			}
			select {
			case out <- windowSize(fd):
			case <-done:
				return
			}
		}
	}()
	return out, func() {
		signal.Stop(sig)
		close(done)
	}
}
