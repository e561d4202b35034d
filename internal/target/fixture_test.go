//go:build linux

package target_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
)

// application is a workload's own view of a kind of server, with an ordinary client.
type application interface {
	// prepare makes what the tests need beside the logins: the database, another one with a secret.
	prepare(t *testing.T, s *targettest.Server)
	// open logs in and stays.
	open(ctx context.Context, s target.Server, login target.Login) (session, error)
	// inventory is all users, roles and grants of the server, without passwords.
	inventory(t *testing.T, s *targettest.Server) string
	// forbidden are things that a login must not be able to do, with what the server says to them.
	forbidden(s target.Server, login target.Login) []attempt
}

type session interface {
	add(value string) error      // writes a value
	values() ([]string, error)   // reads all values
	alive(context.Context) error // fails when the server has ended the session
	close()
}

type attempt struct {
	name string
	try  func(context.Context) error
	want string // in the error
}

// fixture is one running server with an application's view of it.
type fixture struct {
	*targettest.Server
	application
	database string
	commands func(*testing.T, *targettest.Server) string // what the server was told; nil: its log has it

	mu        sync.Mutex
	passwords []string // all that were made
}

func (f *fixture) target() target.Server { return f.Server.Target(f.database) }

// login makes a login of a role with a new password.
func (f *fixture) login(role string, slot int) target.Login {
	p := "Pw'$\\\"%`" + rand.Text() // what must be quoted somewhere
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passwords = append(f.passwords, p)
	return target.Login{User: target.Slots(role)[slot], Password: target.NewSecret(p)}
}

func (f *fixture) ensure(t *testing.T, role string, slot int) target.Login {
	t.Helper()
	login := f.login(role, slot)
	if err := target.Ensure(t.Context(), f.target(), role, login); err != nil {
		t.Fatalf("making %s: %v", login.User, err)
	}
	return login
}

func (f *fixture) prove(t *testing.T, login target.Login) {
	t.Helper()
	if _, err := target.Prove(t.Context(), f.target(), login); err != nil {
		t.Fatalf("logging in as %s: %v", login.User, err)
	}
}

func (f *fixture) refused(t *testing.T, login target.Login) {
	t.Helper()
	if err := target.Refused(t.Context(), f.target(), login); err != nil {
		t.Fatalf("%s should be refused: %v", login.User, err)
	}
}

func (f *fixture) openSession(t *testing.T, login target.Login) session {
	t.Helper()
	s, err := f.open(t.Context(), f.target(), login)
	if err != nil {
		t.Fatalf("opening a session of %s: %v", login.User, err)
	}
	t.Cleanup(s.close)
	return s
}

func (f *fixture) remove(t *testing.T, role string) []string {
	t.Helper()
	removed, err := target.Remove(t.Context(), f.target(), role)
	if err != nil {
		t.Fatalf("removing %s: %v", role, err)
	}
	return removed
}

func (f *fixture) wantLogins(t *testing.T, role string, want ...string) {
	t.Helper()
	got, err := target.Logins(t.Context(), f.target(), role)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("logins of %s are %q, want %q", role, got, want)
	}
}

// fixtures start one server of each kind.
func fixtures() map[target.Kind]func(t *testing.T) *fixture {
	return map[target.Kind]func(t *testing.T) *fixture{
		target.Postgres: func(t *testing.T) *fixture {
			return &fixture{Server: targettest.Postgres(t), application: postgresApp{}, database: "app data"}
		},
		target.MySQL: func(t *testing.T) *fixture {
			return &fixture{Server: targettest.MariaDB(t), application: mariadbApp{}, database: "app_data"}
		},
		target.Redis: func(t *testing.T) *fixture {
			s := targettest.Redis(t, "slowlog-log-slower-than 0", "slowlog-max-len 1000000")
			return &fixture{Server: s, application: redisApp{}, database: "0", commands: slowlog}
		},
		target.RabbitMQ: func(t *testing.T) *fixture {
			return &fixture{Server: targettest.RabbitMQ(t), application: rabbitmqApp{}, database: "/app data"}
		},
	}
}

// tlsOf is the configuration of an application that trusts the server's CA.
func tlsOf(s target.Server) *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.TLS.CA))
	return &tls.Config{RootCAs: roots, ServerName: s.Host}
}

// wantError fails unless err is there and has the text.
func wantError(err error, text string) error {
	switch {
	case err == nil:
		return fmt.Errorf("it is allowed")
	case !strings.Contains(err.Error(), text):
		return fmt.Errorf("it fails with %q, want %q", err, text)
	}
	return nil
}
