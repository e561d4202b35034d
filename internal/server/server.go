// Package server is the composition of the control plane: it builds every
// part, connects them, and runs them until told to stop.
//
// Idea: the program is a struct. [New] opens the store and builds; [Server.Run]
// listens and works until its context ends; [Server.Close] gives everything
// back. What one capability needs of another is a small interface that it
// declares and that adapt.go satisfies. Tests run the same struct.
//
//	listener :8443, DIR/run/server.sock ── TLS by name ──┬─ node.        -> nodeapi   (client certificates)
//	                                                     ├─ arm. login. *.vault. *.batch. -> azureapi
//	                                                     └─ /healthz /metrics
//	DIR/run/admin.sock (0600)                            ── backup, dump: whoever owns the directory
//	leadership                                           ── controllers, with fenced writes
//
// Invariant: nothing is served before the store is open and the first
// administrator exists; everything that was started is ended by Close, in the
// opposite order.
//
// Consequence for the operator: one directory and one port; what is in the
// directory is all there is to keep.
//
//	DIR/ca.crt        the CA of the server's and the agents' certificates
//	DIR/admin.json    how the first administrator reaches the server; 0600
//	DIR/kek           the key that opens the keyset; 0600. Keep a copy elsewhere
//	DIR/keyset.json   the sealing keys, wrapped by kek
//	DIR/etcd/         the store (embedded)
//	DIR/audit/        the audit log
//	DIR/nodes/        local nodes
//	DIR/rotations/    journals of rotations of clusters' certificates
//	DIR/run/          sockets
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/nodeapi"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/pool"
	"keyfleet.dev/keyfleet/internal/provider/local"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/etcd"
	"keyfleet.dev/keyfleet/internal/store/seal"
	"keyfleet.dev/keyfleet/internal/subscription"
	"keyfleet.dev/keyfleet/internal/vault"
)

// Config says how a server runs. DataDir and Listen must be set.
type Config struct {
	DataDir       string           // made with mode 0700 if absent
	Listen        string           // host:port
	Domain        string           // empty: keyfleet.internal
	Aliases       []azureapi.Alias // further names of surfaces
	EtcdEndpoints []string         // an external etcd; empty: embedded
	EtcdTLS       *tls.Config      // for https endpoints
	Dev           bool             // policy time may be moved; local nodes end with the server
	PackageDir    string           // extension packages; empty: "packages" beside the running program
	AgentPath     string           // the agent of local nodes; empty: keyfleet-agent beside the running program
	NoManager     bool             // no manager of clusters is run as a child
	ConnectorPath string           // the program of that manager; empty: keyfleet-connector beside the running program
	KeyfleetPath  string           // the program that rotates certificates of clusters; empty: keyfleet beside the running program
	Image         string           // of keyfleet-connector, for the extension in clusters; empty: it is not installed
	AddonChart    string           // path of the chart of the Secrets Store CSI driver; empty: it is not installed
	Log           *slog.Logger     // nil: slog.Default()
}

// Server is the control plane. Make it with [New].
type Server struct {
	cfg       Config
	endpoints azureapi.Endpoints
	log       *slog.Logger

	backend *etcd.Backend
	raw     store.Backend // below the seal
	keyset  *seal.Keyset
	store   *store.Store
	audit   *audit.Log
	ca      *pki.CA
	minter  *minter
	tls     *tls.Config

	gate          *access.Gate
	identity      *identity.Service
	clusters      *cluster.Service
	connections   *connector.Service
	catalogue     connector.Catalogue
	subscriptions *subscription.Service
	vaults        *vault.Vaults
	clock         *vault.Clock
	fleet         *pool.Fleet
	local         *local.Provider
	api           *azureapi.API
	edge          *nodeapi.Edge
	logs          nodeapi.LogDir       // last part of the logs of nodes' extensions
	runnables     []reconcile.Runnable // while this server leads
	metrics       *metrics

	closers []func() error // run by Close, last first
}

// New opens the store and builds the server. Nothing is listening yet.
func New(ctx context.Context, cfg Config) (s *Server, err error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return nil, fault.New(fault.Invalid, "InvalidListenAddress", "The listen address %q is not of the form HOST:PORT.", cfg.Listen).Because(err)
	}
	if port == "443" {
		port = ""
	} else {
		port = ":" + port
	}
	s = &Server{cfg: cfg, log: cfg.Log, endpoints: azureapi.Endpoints{Domain: cfg.Domain, Port: port, Aliases: cfg.Aliases}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
			s = nil
		}
	}()
	for _, step := range []func(context.Context) error{s.openStore, s.openTrust, s.build, s.firstStart} {
		if err := step(ctx); err != nil {
			return s, err
		}
	}
	return s, nil
}

func (c *Config) setDefaults() error {
	if c.DataDir == "" || c.Listen == "" {
		return fault.New(fault.Invalid, "MissingSetting", "The server needs a data directory and a listen address.").
			WithFix("keyfleet-server --data-dir DIR --listen 127.0.0.1:8443")
	}
	dir, err := filepath.Abs(c.DataDir)
	if err != nil {
		return fmt.Errorf("finding the data directory: %w", err)
	}
	c.DataDir = dir
	if c.Domain == "" {
		c.Domain = "keyfleet.internal"
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	if c.PackageDir == "" {
		c.PackageDir = filepath.Join(filepath.Dir(exe), "packages")
	}
	if c.AgentPath == "" {
		c.AgentPath = filepath.Join(filepath.Dir(exe), "keyfleet-agent")
	}
	if c.KeyfleetPath == "" {
		c.KeyfleetPath = filepath.Join(filepath.Dir(exe), "keyfleet")
	}
	if c.ConnectorPath == "" {
		c.ConnectorPath = filepath.Join(filepath.Dir(exe), "keyfleet-connector")
	}
	return nil
}

func (s *Server) onClose(f func() error) { s.closers = append(s.closers, f) }

// Close ends what New started. Call it after Run has returned.
func (s *Server) Close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// openStore opens etcd, the keyset and the sealed store.
func (s *Server) openStore(ctx context.Context) error {
	b, err := etcd.Open(ctx, etcd.Config{Dir: s.cfg.DataDir, Endpoints: s.cfg.EtcdEndpoints, TLS: s.cfg.EtcdTLS, Log: s.log})
	if err != nil {
		return fmt.Errorf("opening the store: %w", err)
	}
	s.backend, s.raw = b, b
	s.onClose(b.Close)
	if s.keyset, err = seal.OpenKeyset(s.cfg.DataDir, nil); err != nil {
		return fmt.Errorf("opening the keyset: %w", err)
	}
	if s.store, err = store.New(ctx, seal.Wrap(b, s.keyset)); err != nil {
		return fmt.Errorf("opening the store: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(s.cfg.DataDir, "audit"), 0o700); err != nil {
		return fmt.Errorf("making the audit folder: %w", err)
	}
	if s.audit, err = audit.Open(audit.Config{Path: filepath.Join(s.cfg.DataDir, "audit", "audit.jsonl"), Log: s.log}); err != nil {
		return fmt.Errorf("opening the audit log: %w", err)
	}
	s.onClose(func() error { s.audit.Close(); return nil })
	return nil
}

// openTrust loads the CA and prepares TLS.
func (s *Server) openTrust(ctx context.Context) (err error) {
	if s.ca, err = loadAuthority(ctx, s.store, "transport", "Keyfleet CA"); err != nil {
		return err
	}
	if s.minter, err = newMinter(s.ca, s.endpoints.Serves, s.cfg.Listen); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(s.cfg.DataDir, "run"), 0o700); err != nil {
		return fmt.Errorf("making the folder of sockets: %w", err)
	}
	base := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.minter.certificate, NextProtos: []string{"h2", "http/1.1"}}
	node := nodeapi.TLS(base, s.ca.Pool())
	nodeHost := "node." + s.cfg.Domain
	s.tls = base.Clone()
	s.tls.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if hello.ServerName == nodeHost {
			return node, nil
		}
		return base, nil
	}
	return writeFile(filepath.Join(s.cfg.DataDir, "ca.crt"), s.ca.PEM())
}

// Ready describes the running server in one line.
func (s *Server) Ready(took time.Duration) string {
	return fmt.Sprintf("keyfleet-server is ready: %s on %s, data in %s (%.2f s)", s.endpoints.ARM(), s.cfg.Listen, s.cfg.DataDir, took.Seconds())
}

// Run listens and works until ctx ends, then stops in order. ready is called
// once, when requests are answered.
func (s *Server) Run(ctx context.Context, ready func()) error {
	listeners, err := s.listen()
	if err != nil {
		return err
	}
	handler := s.handler()
	web := &http.Server{
		Handler: handler, TLSConfig: s.tls, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	admin := &http.Server{Handler: s.adminHandler(), ReadHeaderTimeout: 10 * time.Second}

	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWork()
	g, gctx := errgroup.WithContext(work)
	for _, l := range listeners.tls {
		g.Go(func() error { return closedIsNil(web.ServeTLS(l, "", "")) })
	}
	g.Go(func() error { return closedIsNil(admin.Serve(listeners.admin)) })
	for _, loop := range s.loops() {
		g.Go(func() error { return stoppedIsNil(gctx, loop(gctx)) })
	}
	g.Go(func() error { // ends with ctx, or with the first failure
		defer stopWork()
		select {
		case <-ctx.Done():
		case <-gctx.Done():
		case <-s.backend.Failed():
			return fault.New(fault.Unavailable, "", "The embedded etcd ended; nothing can be stored any more. Its log says why.")
		}
		s.stopServing(web, admin)
		return nil
	})
	if ready != nil {
		ready()
	}
	err = g.Wait()
	if s.cfg.Dev && s.local != nil {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		err = errors.Join(err, s.local.StopAll(stop))
	}
	return err
}

// loops are what runs beside the listeners on every server.
func (s *Server) loops() []func(context.Context) error {
	return []func(context.Context) error{
		s.edge.Run,
		s.vaults.Run,
		s.forgetLogs,
		func(ctx context.Context) error { return reconcile.Lead(ctx, s.backend, s.store, s.runnables) },
	}
}

// forgetLogs removes the kept logs of nodes that are gone.
func (s *Server) forgetLogs(ctx context.Context) error {
	return pool.Nodes.Follow(ctx, s.store, "", func(ch store.Change[pool.NodeWanted, pool.NodeSeen]) error {
		if ch.Object != nil || ch.ID == "" {
			return nil
		}
		if err := s.logs.Remove(ctx, ch.ID); err != nil {
			s.log.Warn("the logs of a node that is gone could not be removed", "node", ch.ID, "error", err)
		}
		return nil
	})
}

// stopServing ends open requests, giving them five seconds.
func (s *Server) stopServing(servers ...*http.Server) {
	s.edge.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for _, srv := range servers {
		if err := srv.Shutdown(ctx); err != nil {
			_ = srv.Close()
		}
	}
}

func closedIsNil(err error) error {
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// stoppedIsNil forgets the error of a loop that was told to stop.
func stoppedIsNil(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
