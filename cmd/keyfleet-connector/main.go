// Command keyfleet-connector is the side of service connections that knows Kubernetes.
//
//	keyfleet-connector manager --from DIR
//
// looks after all clusters that are registered at a server. DIR is what "keyfleet
// cluster manager create" wrote: how to reach the server, and the credential.
//
//	keyfleet-connector operator
//	keyfleet-connector job
//	keyfleet-connector webhook --tenant-id ID --authority-host URL
//
// are what the chart of sc-extension runs in a cluster: they keep the objects of its
// connections as they shall be, do so once, and give pods their identity. All log on
// standard error, where the job also prints what it did.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/scextension"
)

// version is set by the build.
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{
		Use: "keyfleet-connector", Short: "The cluster side of service connections", Version: version, Args: cobra.NoArgs,
		SilenceUsage: true, SilenceErrors: true,
	}
	root.AddCommand(manager(), operator(), job(), webhook())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "Error: %v\n", err)
		os.Exit(1)
	}
}

func manager() *cobra.Command {
	var from, image, addonChart string
	var interval time.Duration
	c := &cobra.Command{
		Use: "manager", Short: "Look after the clusters that are registered at a server", Args: cobra.NoArgs,
		Example: "  keyfleet-connector manager --from /etc/keyfleet-connector --image registry.example.org/keyfleet-connector:0.1.0",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cfg, err := openLogin(cmd.Context(), from, cmd.InOrStdin())
			if err != nil {
				return err
			}
			server, err := client.New(cfg)
			if err != nil {
				return err
			}
			defer server.Close()
			log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
			log.Info("looking after clusters", "server", cfg.Endpoints.ResourceManager, "interval", interval)
			// The login's folder names this manager over its restarts.
			open := opener{runner: cfg.Endpoints.ResourceManager + " " + from, log: log}
			m := scextension.Manager{
				Server: server, Interval: interval, Log: log, Image: image, Authority: strings.TrimRight(cfg.Endpoints.Login, "/") + "/", Tenant: cfg.Tenant,
			}
			if m.Releases, err = open.extension(); err != nil {
				return err
			}
			if m.Addon, err = open.addon(addonChart); err != nil {
				return err
			}
			return m.Run(ctx)
		},
	}
	c.Flags().StringVar(&from, "from", "", "folder with the login that \"keyfleet cluster manager create\" wrote; - reads it from standard input and ends with that (required)")
	c.Flags().DurationVar(&interval, "interval", 10*time.Second, "time between two looks at a cluster")
	c.Flags().StringVar(&image, "image", "", "image of this program, which the extension runs in clusters; without it extensions are not installed")
	c.Flags().StringVar(&addonChart, "addon-chart", "", "chart of the Secrets Store CSI driver with the provider for Azure, a folder or an archive; without it the add-on is not installed")
	_ = c.MarkFlagRequired("from")
	return c
}

// openLogin reads the login from a folder. With "-" it comes on standard input, and
// the context ends when that is closed: who started this program is gone then.
func openLogin(ctx context.Context, from string, in io.Reader) (context.Context, client.Config, error) {
	if from != "-" {
		cfg, err := client.FromAdmin(from)
		return ctx, cfg, err
	}
	var login keyfleet.Admin
	d := json.NewDecoder(in)
	if err := d.Decode(&login); err != nil {
		return ctx, client.Config{}, fmt.Errorf("reading the login from standard input: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	go func() { // ends with the input, or with the process
		_, _ = io.Copy(io.Discard, in)
		cancel(errors.New("standard input was closed"))
	}()
	return ctx, client.ForAdmin(login), nil
}
