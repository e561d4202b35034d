package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
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
	return serve(cfg, *verbose, nil)
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
		config  = fs.String("config", "/etc/keyfleet/agent.json", "`FILE` that the configuration is written to when the machine is enrolled, for keyfleet-agent run; empty: nowhere")
		only    = fs.Bool("enrol-only", false, "end when the machine is enrolled, instead of running the agent")
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
	written := cfg // without the token
	cfg.Token = t
	return serve(cfg, *verbose, func() (run bool, err error) { return !*only, writeConfig(*config, written) })
}

// writeConfig keeps the configuration of a machine that has joined.
func writeConfig(path string, cfg agent.Config) error {
	if path == "" {
		return nil
	}
	text, err := json.MarshalIndent(cfg, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
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

// serve runs the agent until a signal. With joined, the machine is enrolled
// first, and joined then says whether to go on.
func serve(cfg agent.Config, verbose bool, joined func() (run bool, err error)) int {
	debug.SetGCPercent(50) // an agent idles: a small heap is worth more than a few collections
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	cfg.Version = version()
	cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	cfg.Session = agent.ServeSession
	a, err := agent.New(cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "keyfleet-agent:", err)
		return exitUsage
	}
	defer a.Close()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if joined != nil {
		err := a.Enrol(ctx)
		run := false
		if err == nil {
			run, err = joined()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "keyfleet-agent:", err)
			return 1
		}
		if !run {
			fmt.Println(a.Node())
			return 0
		}
	}
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
