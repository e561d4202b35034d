package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"keyfleet.dev/keyfleet/internal/agent"
)

// runAgent is "keyfleet-agent run".
func runAgent(args []string) int {
	fs := flag.NewFlagSet("run", flag.ContinueOnError)
	config := fs.String("config", "/etc/keyfleet/agent.json", "configuration `FILE`")
	verbose := fs.Bool("verbose", false, "log every step")
	if fs.Parse(args) != nil {
		return exitUsage
	}
	cfg, err := agent.ReadConfig(*config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "keyfleet-agent:", err)
		return 1
	}
	return serve(cfg, *verbose)
}

// join is "keyfleet-agent join".
func join(args []string) int {
	fs := flag.NewFlagSet("join", flag.ContinueOnError)
	var (
		server  = fs.String("server", "", "`URL` of the server's node host, or https://IP:PORT together with --name")
		name    = fs.String("name", "node.keyfleet.internal", "`NAME` of the node host, when --server is an address")
		address = fs.String("address", "", "`IP[:PORT]` where the server is, when its name does not resolve")
		caHash  = fs.String("ca-hash", "", "`sha256:HEX` of the server's CA, as keyfleet prints it")
		caFile  = fs.String("ca", "", "`FILE` with the server's CA, instead of --ca-hash")
		token   = fs.String("token", "", "join `TOKEN`; - reads it from standard input (KEYFLEET_TOKEN works too)")
		pool    = fs.String("pool", "", "`POOL` the token was made for, to be compared with what the server says")
		state   = fs.String("state-dir", "", "`DIR` of the agent's state; default /var/lib/waagent/keyfleet")
		imds    = fs.String("imds", "", "`IP:PORT` of the identity endpoint; default 169.254.169.254:80")
		claim   = fs.Bool("claim-imds", true, "put the identity endpoint's address on the loopback device")
		hosts   = fs.Bool("manage-hosts", true, "keep the server's names in /etc/hosts")
		verbose = fs.Bool("verbose", false, "log every step")
	)
	if fs.Parse(args) != nil {
		return exitUsage
	}
	cfg := agent.Config{
		Server: *server, Address: *address, CAFile: *caFile, CAHash: *caHash, Pool: *pool, StateDir: *state,
		IMDS: *imds, ClaimIMDS: *claim, ManageHosts: *hosts, RebootCommand: []string{"systemctl", "reboot"},
	}
	if err := nameServer(&cfg, *name); err != nil {
		fmt.Fprintln(os.Stderr, "keyfleet-agent:", err)
		return exitUsage
	}
	t, err := joinToken(*token)
	if err != nil {
		fmt.Fprintln(os.Stderr, "keyfleet-agent:", err)
		return 1
	}
	cfg.Token = t
	return serve(cfg, *verbose)
}

// nameServer turns a server given by address into its name and that address:
// the server tells its hosts apart by name.
func nameServer(cfg *agent.Config, name string) error {
	u, err := url.Parse(cfg.Server)
	if err != nil || u.Host == "" {
		return errors.New("--server URL is needed, for instance https://node.keyfleet.internal:8443")
	}
	if _, err := netip.ParseAddr(u.Hostname()); err != nil {
		return nil // a name
	}
	if cfg.Address == "" {
		cfg.Address = u.Hostname()
	}
	cfg.Server = "https://" + name
	if u.Port() != "" {
		cfg.Server += ":" + u.Port()
	}
	return nil
}

// joinToken takes the token from the flag, standard input or the environment.
// A flag can be read by every user of the machine; the token is good once.
func joinToken(flagValue string) (agent.Token, error) {
	switch flagValue {
	case "":
		t := os.Getenv("KEYFLEET_TOKEN")
		_ = os.Unsetenv("KEYFLEET_TOKEN") // not for the extensions
		return agent.Token(t), nil
	case "-":
		var t string
		if _, err := fmt.Scanln(&t); err != nil {
			return "", fmt.Errorf("reading join token from standard input: %w", err)
		}
		return agent.Token(t), nil
	}
	return agent.Token(strings.TrimSpace(flagValue)), nil
}

// serve runs the agent until a signal.
func serve(cfg agent.Config, verbose bool) int {
	debug.SetGCPercent(50) // an agent idles: a small heap is worth more than a few collections
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	cfg.Version = version()
	cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	a, err := agent.New(cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "keyfleet-agent:", err)
		return exitUsage
	}
	defer a.Close()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch err := a.Run(ctx); {
	case err == nil:
		return 0
	case errors.Is(err, agent.ErrReboot):
		return exitReboot
	default:
		fmt.Fprintln(os.Stderr, "keyfleet-agent:", err)
		return 1
	}
}
