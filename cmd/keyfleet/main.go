// Command keyfleet is the command line of a Keyfleet server. See docs/cli.md.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"keyfleet.dev/keyfleet/internal/cli"
	"keyfleet.dev/keyfleet/internal/rotatecerts"
)

// version is set by the linker.
var version = "dev"

func main() {
	// The first Ctrl-C ends what runs in good order; the second one ends the program.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	code := cli.Main(ctx, os.Args[1:], cli.Streams{Version: version, RotateCerts: func(ctx context.Context, args []string) int {
		return rotatecerts.Main(ctx, args, rotatecerts.Terminal())
	}})
	stop()
	os.Exit(code)
}
