package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/internal/scextension"
)

// inside is what the sub-commands have in common that run in a cluster.
type inside struct {
	kubeconfig string
	probes     string
}

func (i *inside) flags(c *cobra.Command) *cobra.Command {
	c.Flags().StringVar(&i.kubeconfig, "kubeconfig", "", "how to reach the cluster; without it, as the ServiceAccount of the pod")
	return c
}

func (i *inside) probe(c *cobra.Command) *cobra.Command {
	c.Flags().StringVar(&i.probes, "probes", ":8081", "address for /healthz and /readyz; empty: none")
	return c
}

// open opens the cluster.
func (i *inside) open() (*scextension.Cluster, *slog.Logger, error) {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	cluster, err := scextension.OpenCluster(i.kubeconfig, log)
	return cluster, log, err
}

func operator() *cobra.Command {
	var in inside
	var identity string
	var lease time.Duration
	c := &cobra.Command{
		Use: "operator", Short: "Keep the objects of all connections of this cluster as they shall be", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cluster, log, err := in.open()
			if err != nil {
				return err
			}
			if identity == "" {
				if identity, err = os.Hostname(); err != nil {
					return fmt.Errorf("asking for the name of this host: %w", err)
				}
			}
			o := scextension.Operator{Cluster: cluster, Identity: identity, Lease: lease, Probes: in.probes, Log: log}
			return o.Run(cmd.Context())
		},
	}
	c.Flags().StringVar(&identity, "identity", "", "name of this replica, which no other one has; without it, that of the host, which is the pod")
	c.Flags().DurationVar(&lease, "lease", 15*time.Second, "for how long the replica that works may be silent before another one does")
	return in.flags(in.probe(c))
}

func job() *cobra.Command {
	var in inside
	var timeout time.Duration
	c := &cobra.Command{
		Use: "job", Short: "Make the objects of all connections of this cluster as they shall be, once", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cluster, _, err := in.open()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, errors.New("it may take "+timeout.String()))
			defer cancel()
			// On the same stream as the error that ends it: of two, a container's log mixes the lines.
			j := scextension.Job{Cluster: cluster, Out: cmd.ErrOrStderr()}
			return j.Run(ctx)
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 4*time.Minute, "time after which it gives up")
	return in.flags(c)
}

func webhook() *cobra.Command {
	var in inside
	var w scextension.Webhook
	c := &cobra.Command{
		Use: "webhook", Short: "Give pods that ask for workload identity their token and variables", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if w.Cluster, w.Log, err = in.open(); err != nil {
				return err
			}
			w.Probes = in.probes
			return w.Run(cmd.Context())
		},
	}
	c.Flags().StringVar(&w.Tenant, "tenant-id", "", "tenant of ServiceAccounts that name none")
	c.Flags().StringVar(&w.Authority, "authority-host", "", "URL of the token endpoint")
	c.Flags().StringVar(&w.Namespace, "namespace", scextension.Namespace, "namespace of the Service sc-webhook")
	c.Flags().StringVar(&w.Listen, "listen", ":9443", "address for the API server")
	return in.flags(in.probe(c))
}
