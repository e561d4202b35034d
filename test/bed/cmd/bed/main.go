//go:build linux

// Command bed brings up and takes down a real Kubernetes cluster on this machine:
// see package bed and docs/test-bed.md.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"keyfleet.dev/keyfleet/test/bed"
)

const usage = `Usage, as root, anywhere in the project:

  bed prepare                       build what beds are made from; once
  bed up [-layout L] [-name N] [-masters 3] [-workers 1] [-services] [-dir DIR] [-keep]
  bed down [-layout L] [-name N] [-dir DIR]

Layouts: kubeadm, aks-engine.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bed:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("no command\n\n%s", usage)
	}
	cfg := bed.Config{Log: out}
	flags := flag.NewFlagSet("bed "+args[0], flag.ContinueOnError)
	flags.StringVar(&cfg.Layout, "layout", bed.LayoutKubeadm, "how the cluster is made")
	flags.StringVar(&cfg.Name, "name", "", "name of the bed; empty: the layout's")
	flags.StringVar(&cfg.Dir, "dir", "", "the bed's folder; empty: in the cache")
	flags.IntVar(&cfg.Masters, "masters", 3, "number of masters")
	flags.IntVar(&cfg.Workers, "workers", 1, "number of workers")
	flags.BoolVar(&cfg.Services, "services", false, "kube-proxy, CoreDNS and a registry, for applications")
	flags.BoolVar(&cfg.Keep, "keep", false, "leave a bed that failed to come up")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if cfg.Name == "" {
		cfg.Name = cfg.Layout
	}
	cache, err := bed.OpenCache()
	if err != nil {
		return err
	}
	if cfg.Dir == "" {
		cfg.Dir = cache.BedDir(cfg.Name)
	}
	switch args[0] {
	case "prepare":
		return cache.Prepare(ctx, out)
	case "up":
		if err := cache.PrepareFor(ctx, cfg, out); err != nil {
			return err
		}
		return up(ctx, cfg, out)
	case "down":
		return bed.Down(ctx, cfg.Dir)
	}
	return fmt.Errorf("there is no command %q\n\n%s", args[0], usage)
}

func up(ctx context.Context, cfg bed.Config, out io.Writer) error {
	c, err := bed.Up(ctx, cfg)
	if err != nil {
		return err
	}
	file := func(name string) string { return filepath.Join(c.Dir, name) }
	fmt.Fprintf(out, "\nBed %s is up. It stays until it is taken down.\n\n", c.Name)
	fmt.Fprintf(out, "  described in  %s\n", file("cluster.json"))
	fmt.Fprintf(out, "  a shell       %s %s   (or another node)\n", file("ssh"), c.Nodes[0].Name)
	fmt.Fprintf(out, "  the API       %s get nodes\n", file("kubectl"))
	fmt.Fprintf(out, "  plain ssh     ssh -i %s -p %d -o UserKnownHostsFile=%s %s@%s\n", c.SSHKey, c.SSHPort, c.KnownHosts, c.SSHUser, c.SSHHost)
	return nil
}
