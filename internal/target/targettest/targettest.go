//go:build linux

// Package targettest starts real servers for tests: PostgreSQL, MariaDB, Redis and
// RabbitMQ.
//
// Idea: the programs are Debian's. What this machine does not have is downloaded
// with apt-get, unpacked into a cache folder and started from there; nothing is
// installed, so no service, user or setting of the machine changes. A server lives
// in one folder, listens on one address with TLS from a CA of its own, and logs
// every statement, so that a test can look for what must not be logged.
//
// Invariant: servers run without privileges (as nobody, when root starts them),
// and end with the test, or with the process at the latest.
//
// Consequence for who runs the tests: the first run downloads up to 200 MB.
// Where the programs cannot be had, tests are skipped with the reason.
package targettest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/target"
)

// Options say what to start.
type Options struct {
	Kind     target.Kind
	Dir      string   // of the server, empty or new; who starts it must be able to give it to nobody
	Listen   string   // IP address; empty: loopback
	Names    []string // more names for the certificate
	Settings []string // lines for the server's configuration, after ours
}

// Server is a running server.
type Server struct {
	Kind          target.Kind
	Host          string
	Port          int
	Management    string // RabbitMQ: URL of the management API
	AdminUser     string
	AdminPassword string
	CA            string // PEM
	Dir           string

	processes []*process
	logs      []string // files
}

// startTimeout is how long a server may take to answer: RabbitMQ needs ten seconds of a
// processor, which it may share with a cluster that comes up.
const startTimeout = 4 * time.Minute

// ErrNoPrograms says that the programs of a server cannot be had on this machine.
var ErrNoPrograms = errors.New("no programs")

// Start starts a server and returns when it takes logins. The context is for the
// start only; who starts it stops it with [Server.Stop].
func Start(ctx context.Context, o Options) (*Server, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout+downloadTimeout)
	defer cancel()
	if o.Listen == "" {
		o.Listen = "127.0.0.1"
	}
	s := &Server{Kind: o.Kind, Host: o.Listen, AdminUser: "keyfleet_admin", AdminPassword: rand.Text(), Dir: o.Dir}
	start := map[target.Kind]func(context.Context, Options) error{
		target.Postgres: s.startPostgres, target.MySQL: s.startMariaDB, target.Redis: s.startRedis, target.RabbitMQ: s.startRabbitMQ,
	}[o.Kind]
	if start == nil {
		return nil, fmt.Errorf("there is no server of the kind %q", o.Kind)
	}
	if err := s.prepare(o); err != nil {
		return nil, err
	}
	if err := start(ctx, o); err != nil {
		log := s.Log()
		s.Stop()
		return nil, fmt.Errorf("starting %s: %w\n%s", o.Kind, err, log[max(0, len(log)-3000):])
	}
	return s, nil
}

// prepare makes the folder, the port and the certificate.
func (s *Server) prepare(o Options) (err error) {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return fmt.Errorf("making the server's folder: %w", err)
	}
	if s.Port, err = freePort(s.Host); err != nil {
		return err
	}
	if s.CA, err = writeCertificate(s.Dir, append([]string{s.Host, "localhost"}, o.Names...)); err != nil {
		return fmt.Errorf("making the server's certificate: %w", err)
	}
	return nil
}

// ready waits until the administrator can log in, or a process has ended.
func (s *Server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		_, err := target.Check(ctx, s.Target(""))
		if err == nil {
			return nil
		}
		for _, p := range s.processes {
			if p.ended() {
				return fmt.Errorf("%s ended: %w", filepath.Base(p.cmd.Path), p.err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the server: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Stop ends the server's processes.
func (s *Server) Stop() {
	for i := len(s.processes) - 1; i >= 0; i-- {
		s.processes[i].stop()
	}
}

// Target is the server as package target reaches it.
func (s *Server) Target(database string) target.Server {
	return target.Server{
		Kind: s.Kind, Host: s.Host, Port: s.Port, Database: database, Management: s.Management,
		TLS: target.TLS{CA: s.CA}, Admin: target.Login{User: s.AdminUser, Password: target.NewSecret(s.AdminPassword)},
	}
}

// Log is all that the server and its processes have logged.
func (s *Server) Log() string {
	var all []byte
	for _, file := range s.logs {
		text, _ := os.ReadFile(file) // not there yet: nothing logged
		all = append(all, text...)
	}
	return string(all)
}

// Address is the host and port.
func (s *Server) Address() string { return net.JoinHostPort(s.Host, strconv.Itoa(s.Port)) }

// Postgres starts PostgreSQL for a test.
func Postgres(t testing.TB, settings ...string) *Server { return start(t, target.Postgres, settings) }

// MariaDB starts MariaDB for a test.
func MariaDB(t testing.TB, settings ...string) *Server { return start(t, target.MySQL, settings) }

// Redis starts Redis for a test.
func Redis(t testing.TB, settings ...string) *Server { return start(t, target.Redis, settings) }

// RabbitMQ starts RabbitMQ for a test.
func RabbitMQ(t testing.TB, settings ...string) *Server { return start(t, target.RabbitMQ, settings) }

// start starts a server that ends with the test. Its folder is none of t.TempDir's:
// only root could enter that.
func start(t testing.TB, kind target.Kind, settings []string) *Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "keyfleet-target-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("removing the server's folder: %v", err)
		}
	})
	s, err := Start(t.Context(), Options{Kind: kind, Dir: dir, Settings: settings})
	if errors.Is(err, ErrNoPrograms) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}
