// Package target makes credentials on real servers: PostgreSQL, MariaDB and
// MySQL, Redis and RabbitMQ.
//
// Idea: what a workload may do is a role, and how it proves who it is is a login.
// A role has two logins, named [Slots], that take turns: the new one is made and
// proven while the old one still works, and the old one is revoked when nobody
// uses it any more. Everything that is made can be found again by its name, so
// there is no record that could differ from the server.
//
//	            ┌── app_a   the old password, until it is revoked
//	role app ───┤
//	            └── app_b   the new password
//
//	             the role is                   a login may                        what a login made
//	PostgreSQL   a role that cannot log in     work in schema public of one       belongs to the role
//	MariaDB      the two users' grants         database: data, tables, routines   belongs to the database
//	Redis        the two users' rules          use all keys of one database       belongs to the database
//	RabbitMQ     the two users' permissions    use one virtual host               belongs to the virtual host
//
// Invariant: each operation may be repeated, and finishes what a crash in the
// middle of an earlier one left. No password is sent to a server but to log in
// with it: logins are made with a verifier or hash of the password that is
// computed here, so neither a statement log nor a recording of the administrator's
// session holds one. A login is revoked when it cannot be used for a new session
// and no session of it is left. The data stays, whatever is removed.
//
// Consequence for the operator: Keyfleet needs an administrator that can make
// logins and hand on the privileges above, no more; [Check] names what is missing
// and the statement that grants it. Passwords are hashed as the server demands:
// SCRAM-SHA-256, mysql_native_password, SHA-256; whoever can read the server's own
// tables of users can read these.
package target

import (
	"context"
	"errors"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Kind is a kind of server.
type Kind string

// The kinds.
const (
	Postgres Kind = "postgres"
	MySQL    Kind = "mysql" // MariaDB as well
	Redis    Kind = "redis"
	RabbitMQ Kind = "rabbitmq"
)

// Server is a server and how to reach it as its administrator.
type Server struct {
	Kind       Kind
	Host       string
	Port       int
	Database   string // PostgreSQL, MySQL: the database; Redis: its number; RabbitMQ: the virtual host. Check does without
	TLS        TLS
	Management string // RabbitMQ: URL of its management API
	Admin      Login
}

// TLS is how a server proves who it is. The zero value trusts this machine's roots.
type TLS struct {
	Disable bool   // no TLS at all
	CA      string // PEM; empty: this machine's roots
	Name    string // that the certificate must have; empty: Server.Host
}

// Login is a user with a password.
type Login struct {
	User     string
	Password Secret
}

// Times that no call exceeds, whatever the context allows.
const (
	connectTimeout = 10 * time.Second
	callTimeout    = time.Minute
	pollInterval   = 100 * time.Millisecond // between looks at sessions that are ending
)

// adapter is what each kind of server does in its own way. Names were checked.
type adapter interface {
	check(ctx context.Context) (warnings []string, err error)
	ensure(ctx context.Context, role string, login Login) error
	prove(ctx context.Context, login Login) error
	revoke(ctx context.Context, role, user string) error
	remove(ctx context.Context, role string) (removed []string, err error)
	logins(ctx context.Context, role string) ([]string, error)
}

// Errors that people see; the server's own words are the cause.
const (
	codeLogin       = "InvalidDbSecret"          // the server does not take the login
	codeUnreachable = "TargetUnreachable"        // no answer, or the connection was lost
	codeTLS         = "TargetTLS"                // no TLS, or a certificate that does not count
	codePermissions = "TargetPermissionsMissing" // the administrator lacks a privilege
	codeNotFound    = "TargetDatabaseNotFound"   // no such database or virtual host
	codeNameTaken   = "TargetNameTaken"          // the role or login was not made by Keyfleet
	codeUnsupported = "TargetUnsupported"        // the server cannot do what is needed
	codeNotRefused  = "TargetLoginNotRefused"    // a login that should be refused works
	codeFailed      = "TargetFailed"             // the server refused for a reason of its own
	codeInvalid     = "InvalidTarget"            // a name, password or address that cannot be
)

// Check fails unless the administrator can do what is needed, with the privilege
// that is missing and the statement that grants it. It returns what is doubtful
// about the server. With a database it looks at that too.
func Check(ctx context.Context, s Server) (warnings []string, err error) {
	a, ctx, cancel, err := s.open(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	if warnings, err = a.check(ctx); err != nil {
		return nil, err
	}
	if s.TLS.Disable {
		warnings = append(warnings, "Connections to the server are not encrypted.")
	}
	return warnings, nil
}

// Ensure makes the role, and the login with the privileges of the role and no
// others. The login's password becomes the given one; sessions go on. The login's
// name is one of [Slots].
func Ensure(ctx context.Context, s Server, role string, login Login) error {
	a, ctx, cancel, err := s.openRole(ctx, role, login.User)
	if err != nil {
		return err
	}
	defer cancel()
	if err := checkPassword(login.Password); err != nil {
		return err
	}
	return a.ensure(ctx, role, login)
}

// Prove logs in as an application does and asks for the smallest thing that needs
// the login's privileges. It returns how long that took.
func Prove(ctx context.Context, s Server, login Login) (time.Duration, error) {
	a, ctx, cancel, err := s.open(ctx)
	if err != nil {
		return 0, err
	}
	defer cancel()
	started := time.Now()
	err = a.prove(ctx, login)
	if f := (*fault.Error)(nil); errors.As(err, &f) && f.Code == codePermissions {
		err = fault.New(fault.Conflict, codePermissions, "The login '%s' lacks privileges on '%s'.", login.User, s.Database).At(s.at()).
			WithFix("rotate the credential: that makes a login with its privileges").Because(f.Err)
	}
	return time.Since(started), err
}

// Revoke ends a login: it can start no new session, its sessions are ended, and it
// is gone. A login that is not there is revoked.
func Revoke(ctx context.Context, s Server, role, user string) error {
	a, ctx, cancel, err := s.openRole(ctx, role, user)
	if err != nil {
		return err
	}
	defer cancel()
	return named(ctx, a, a.revoke(ctx, role, user))
}

// Refused fails unless the server refuses the login for its name or password. An
// error of any other sort, of the network for instance, proves nothing and is returned.
func Refused(ctx context.Context, s Server, login Login) error {
	_, err := Prove(ctx, s, login)
	if err == nil {
		return fault.New(fault.Conflict, codeNotRefused, "The login '%s' should be refused, but it works.", login.User).At(s.at())
	}
	if f := (*fault.Error)(nil); errors.As(err, &f) && f.Code == codeLogin {
		return nil
	}
	return err
}

// Remove removes the role with its logins and grants, and says what it removed.
// The data stays. What is not there is removed.
func Remove(ctx context.Context, s Server, role string) (removed []string, err error) {
	a, ctx, cancel, err := s.openRole(ctx, role, Slots(role)[0])
	if err != nil {
		return nil, err
	}
	defer cancel()
	removed, err = a.remove(ctx, role)
	return removed, named(ctx, a, err)
}

// Logins returns the logins of a role that can be used now.
func Logins(ctx context.Context, s Server, role string) ([]string, error) {
	a, ctx, cancel, err := s.openRole(ctx, role, Slots(role)[0])
	if err != nil {
		return nil, err
	}
	defer cancel()
	return a.logins(ctx, role)
}

// named replaces "permission denied" by the privilege that the administrator lacks,
// if it can be found.
func named(ctx context.Context, a adapter, err error) error {
	if f := (*fault.Error)(nil); errors.As(err, &f) && f.Code == codePermissions {
		if _, why := a.check(ctx); why != nil {
			return why
		}
	}
	return err
}

func (s Server) open(ctx context.Context) (a adapter, bounded context.Context, cancel context.CancelFunc, err error) {
	if err := s.check(); err != nil {
		return nil, nil, nil, err
	}
	config, err := s.tls()
	if err != nil {
		return nil, nil, nil, err
	}
	switch s.Kind {
	case Postgres:
		a = postgres{s, config}
	case MySQL:
		a = mariadb{s, config}
	case Redis:
		a = redisServer{s, config}
	case RabbitMQ:
		a = rabbitmq{s, config}
	default:
		return nil, nil, nil, invalid("kind", "Keyfleet makes no logins on servers of the kind '%.50s'.", s.Kind)
	}
	bounded, cancel = context.WithTimeout(ctx, callTimeout)
	return a, bounded, cancel, nil
}

func (s Server) openRole(ctx context.Context, role, user string) (adapter, context.Context, context.CancelFunc, error) {
	if err := checkRole(s, role, user); err != nil {
		return nil, nil, nil, err
	}
	return s.open(ctx)
}
