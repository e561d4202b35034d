// Command keyfleet-server is the control plane: store, REST surface, node edge.
//
//	keyfleet-server --data-dir DIR --listen 127.0.0.1:8443
//
// needs no other setting. On its first start it writes DIR/ca.crt and
// DIR/admin.json; log in with "keyfleet login --from DIR". It prints one line
// on standard output when it is ready, and its log on standard error.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/lmittmann/tint"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/server"
)

// version is set by the build.
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A server mostly holds idle connections of agents; collecting earlier halves
	// what a wave of their handshakes leaves behind, for little processor time.
	debug.SetGCPercent(50)
	if err := command().ExecuteContext(ctx); err != nil {
		report(err)
		os.Exit(1)
	}
}

// report prints an error in the form that all our programs use.
func report(err error) {
	var e *fault.Error
	if !errors.As(err, &e) {
		fmt.Fprintf(os.Stderr, "Error: %v\n", err)
		return
	}
	fmt.Fprintf(os.Stderr, "Error %s: %s\n", e.Code, e.Message)
	if e.Err != nil {
		fmt.Fprintf(os.Stderr, "  Why   %v\n", e.Err)
	}
	if e.Fix != "" {
		fmt.Fprintf(os.Stderr, "  Fix   %s\n", e.Fix)
	}
}

// settings are the flags of the server.
type settings struct {
	dataDir, listen, domain, packages, agent string
	connector, image, addonChart             string
	manager                                  bool
	logLevel, logFormat                      string
	aliases, etcd                            []string
	etcdCA, etcdCert, etcdKey                string
	dev                                      bool
}

func command() *cobra.Command {
	var f settings
	cmd := &cobra.Command{
		Use: "keyfleet-server", Short: "The Keyfleet control plane", Version: version, Args: cobra.NoArgs,
		Example:      "  keyfleet-server --data-dir /var/lib/keyfleet --listen 127.0.0.1:8443",
		SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context()) },
	}
	p := cmd.PersistentFlags()
	p.StringVar(&f.dataDir, "data-dir", "", "directory of everything the server keeps; made on first start (required)")
	p.StringSliceVar(&f.etcd, "etcd-endpoints", nil, "URLs of an external etcd (3.4 or newer) instead of the embedded one")
	p.StringVar(&f.etcdCA, "etcd-ca", "", "CA file of the external etcd")
	p.StringVar(&f.etcdCert, "etcd-cert", "", "client certificate file for the external etcd")
	p.StringVar(&f.etcdKey, "etcd-key", "", "client key file for the external etcd")
	p.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	p.StringVar(&f.logFormat, "log-format", "", "text or json; empty: text on a terminal, else json")
	l := cmd.Flags()
	l.StringVar(&f.listen, "listen", "127.0.0.1:8443", "address of the HTTPS port")
	l.StringVar(&f.domain, "domain", "keyfleet.internal", "domain under which the server answers: arm.DOMAIN, login.DOMAIN, NAME.vault.DOMAIN ...")
	l.StringSliceVar(&f.aliases, "host-alias", nil, "further name of a surface, SUFFIX=SURFACE: vault.azure.cn=vault, management.azure.com=arm")
	l.StringVar(&f.packages, "packages", "", "folder of extension packages; empty: \"packages\" beside this program")
	l.StringVar(&f.agent, "agent", "", "keyfleet-agent program of local nodes; empty: beside this program")
	l.BoolVar(&f.manager, "manager", true, "look after registered clusters with a child process; false: run \"keyfleet-connector manager\" yourself")
	l.StringVar(&f.connector, "connector", "", "keyfleet-connector program of that child; empty: beside this program")
	l.StringVar(&f.image, "connector-image", "", "image of keyfleet-connector that the extension runs in clusters; without it the child installs no extension")
	l.StringVar(&f.addonChart, "connector-addon-chart", "", "chart of the Secrets Store CSI driver, a folder or an archive, that the child installs where a connection needs the driver; without it the child does not install it")
	l.BoolVar(&f.dev, "dev", false, "for trying out: policy time may be moved, local nodes end with the server")
	_ = cmd.MarkPersistentFlagRequired("data-dir")
	cmd.AddCommand(maintenanceCommands(&f)...)
	return cmd
}

func (f *settings) run(ctx context.Context) error {
	started := time.Now()
	log, err := f.logger()
	if err != nil {
		return err
	}
	slog.SetDefault(log) // for packages without a logger of their own: the leadership's lines
	cfg := server.Config{DataDir: f.dataDir, Listen: f.listen, Domain: strings.ToLower(f.domain), EtcdEndpoints: f.etcd, Dev: f.dev, NoManager: !f.manager, Image: f.image, Log: log}
	for _, text := range f.aliases {
		a, err := azureapi.ParseAlias(text)
		if err != nil {
			return fault.New(fault.Invalid, "InvalidHostAlias", "%s", err)
		}
		cfg.Aliases = append(cfg.Aliases, a)
	}
	if cfg.EtcdTLS, err = f.etcdTLS(); err != nil {
		return err
	}
	for flag, path := range map[*string]string{&cfg.PackageDir: f.packages, &cfg.AgentPath: f.agent, &cfg.ConnectorPath: f.connector, &cfg.AddonChart: f.addonChart} {
		if path != "" {
			if *flag, err = filepath.Abs(path); err != nil {
				return err
			}
		}
	}
	s, err := server.New(ctx, cfg)
	if err != nil {
		return err
	}
	err = s.Run(ctx, func() { fmt.Println(s.Ready(time.Since(started))) })
	return errors.Join(err, s.Close())
}

func (f *settings) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return nil, fault.New(fault.Invalid, "InvalidLogLevel", "The log level %q is not debug, info, warn or error.", f.logLevel)
	}
	terminal := term.IsTerminal(int(os.Stderr.Fd()))
	switch {
	case f.logFormat == "json", f.logFormat == "" && !terminal:
		return slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})), nil
	case f.logFormat == "text", f.logFormat == "":
		return slog.New(tint.NewTextHandler(os.Stderr, &tint.Options{Level: level, NoColor: !terminal || os.Getenv("NO_COLOR") != ""})), nil
	}
	return nil, fault.New(fault.Invalid, "InvalidLogFormat", "The log format %q is not text or json.", f.logFormat)
}

func (f *settings) etcdTLS() (*tls.Config, error) {
	if f.etcdCA == "" && f.etcdCert == "" {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.etcdCA != "" {
		text, err := os.ReadFile(f.etcdCA)
		if err != nil {
			return nil, fmt.Errorf("reading the CA of etcd: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(text) {
			return nil, fault.New(fault.Invalid, "InvalidCA", "%s holds no certificate in PEM.", f.etcdCA)
		}
	}
	if f.etcdCert != "" {
		pair, err := tls.LoadX509KeyPair(f.etcdCert, f.etcdKey)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate for etcd: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}
