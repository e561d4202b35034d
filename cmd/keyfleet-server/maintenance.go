package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/internal/server"
)

// maintenanceCommands work on the data directory, whether a server runs on it or not.
func maintenanceCommands(f *settings) []*cobra.Command {
	work := func(ctx context.Context, do func(context.Context, server.Maintenance) error) error {
		log, err := f.logger()
		if err != nil {
			return err
		}
		return do(ctx, server.Maintenance{DataDir: f.dataDir, EtcdEndpoints: f.etcd, Log: log})
	}
	var kek string
	backup := &cobra.Command{
		Use: "backup FILE", Short: "Write a sealed backup of the store; \"-\" is standard output", Args: cobra.ExactArgs(1),
		Long:    "Write a sealed backup of the store, also while the server runs.\n\nThe backup opens only with the file kek of the data directory, which is not in it: keep a copy of that file elsewhere.",
		Example: "  keyfleet-server backup --data-dir /var/lib/keyfleet keyfleet.backup",
		RunE: func(cmd *cobra.Command, args []string) error {
			return work(cmd.Context(), func(ctx context.Context, m server.Maintenance) error {
				return toFile(args[0], func(w io.Writer) error { return m.Backup(ctx, w) })
			})
		},
	}
	restore := &cobra.Command{
		Use: "restore FILE", Short: "Make a new data directory from a backup, after opening every value in it", Args: cobra.ExactArgs(1),
		Example: "  keyfleet-server restore --data-dir /var/lib/keyfleet-new --kek kek.copy keyfleet.backup",
		RunE: func(cmd *cobra.Command, args []string) error {
			return work(cmd.Context(), func(ctx context.Context, m server.Maintenance) error {
				in, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer in.Close()
				n, err := m.Restore(ctx, in, kek)
				if err == nil {
					fmt.Printf("restored %d values into %s; all of them open\n", n, f.dataDir)
				}
				return err
			})
		},
	}
	verify := &cobra.Command{
		Use: "verify FILE", Short: "Read a whole backup and open every value in it; changes nothing", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return work(cmd.Context(), func(_ context.Context, m server.Maintenance) error {
				in, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer in.Close()
				n, err := m.Verify(in, kek)
				if err == nil {
					fmt.Printf("%d values, all of them open\n", n)
				}
				return err
			})
		},
	}
	for _, c := range []*cobra.Command{restore, verify} {
		c.Flags().StringVar(&kek, "kek", "", "copy of the file kek of the data directory that was backed up (required)")
		_ = c.MarkFlagRequired("kek")
	}
	return []*cobra.Command{backup, restore, verify, storeCommand(work)}
}

func storeCommand(work func(context.Context, func(context.Context, server.Maintenance) error) error) *cobra.Command {
	var prefix string
	var reveal bool
	dump := &cobra.Command{
		Use: "dump", Short: "Print every key and value as JSON lines; secrets are hidden", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return work(cmd.Context(), func(ctx context.Context, m server.Maintenance) error {
				return m.Dump(ctx, os.Stdout, prefix, reveal)
			})
		},
	}
	dump.Flags().StringVar(&prefix, "prefix", "", "only keys that begin with this, for instance /pools/")
	dump.Flags().BoolVar(&reveal, "reveal", false, "show secret values and private keys")
	reseal := &cobra.Command{
		Use: "reseal", Short: "Replace the sealing key and seal every value anew; run it again if it was interrupted", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return work(cmd.Context(), func(ctx context.Context, m server.Maintenance) error { return m.Reseal(ctx, os.Stdout) })
		},
	}
	cmd := &cobra.Command{Use: "store", Short: "Look at the store, and change its sealing key"}
	cmd.AddCommand(dump, reseal)
	return cmd
}

// toFile writes a file, mode 0600, that is there whole or not at all; "-" is standard output.
func toFile(path string, write func(io.Writer) error) error {
	if path == "-" {
		return write(os.Stdout)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".keyfleet-backup-*")
	if err != nil {
		return fmt.Errorf("making %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	if err = write(f); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
