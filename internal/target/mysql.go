package target

import (
	"context"
	"crypto/tls"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-sql-driver/mysql"

	"keyfleet.dev/keyfleet/internal/effect"
)

// mariadb makes credentials on MariaDB and MySQL. There the logins themselves hold
// the privileges, and their statements commit one by one, so each is written such
// that it may find its work done.
//
// What a login defines (views, routines, triggers, events) names that login and runs
// with its privileges. A revoked login with such definitions is therefore locked,
// without a password that anybody knows, instead of dropped.
type mariadb struct {
	Server
	config *tls.Config
}

// Error numbers of the server.
const (
	myDatabaseDenied = 1044
	myLoginDenied    = 1045
	myNoDatabase     = 1049
	myNoThread       = 1094
	myTableDenied    = 1142
	myPrivilegeLacks = 1227
	myNoPlugin       = 1524
	myLocked         = 3118 // MySQL
	mariaLocked      = 4151
	mariaNoPlugin    = 1915
)

// databasePrivileges is what a login gets on its database: all that an application
// needs that looks after its own tables.
var databasePrivileges = []string{
	"SELECT", "INSERT", "UPDATE", "DELETE", "CREATE", "DROP", "ALTER", "INDEX", "REFERENCES", "CREATE TEMPORARY TABLES",
	"LOCK TABLES", "CREATE VIEW", "SHOW VIEW", "CREATE ROUTINE", "ALTER ROUTINE", "EXECUTE", "TRIGGER", "EVENT",
}

// session is one connection; database/sql would otherwise make others as it likes.
type session struct {
	db *sql.DB
	*sql.Conn
}

func (s session) close() { _, _ = s.Conn.Close(), s.db.Close() }

func (m mariadb) connect(ctx context.Context, database string, login Login) (session, error) {
	c := mysql.NewConfig()
	c.Net, c.Addr, c.DBName, c.User, c.Passwd = "tcp", m.address(), database, login.User, login.Password.Reveal()
	c.TLS, c.Timeout, c.ReadTimeout, c.WriteTimeout = m.config, connectTimeout, callTimeout, callTimeout
	c.Logger = &mysql.NopLogger{}
	c.Collation = "utf8mb4_general_ci"
	connector, err := mysql.NewConnector(c)
	if err != nil {
		return session{}, fmt.Errorf("preparing a connection: %w", err)
	}
	db := sql.OpenDB(connector)
	conn, err := db.Conn(ctx)
	if err != nil {
		_ = db.Close()
		return session{}, m.explain("connecting", err)
	}
	return session{db, conn}, nil
}

// explain turns an error of a connection into one that people see.
func (m mariadb) explain(doing string, err error) error {
	var my *mysql.MySQLError
	switch {
	case errors.As(err, &my):
	case errors.Is(err, mysql.ErrNoTLS):
		return m.unanswered(tls.RecordHeaderError{Msg: err.Error()})
	case errors.Is(err, mysql.ErrInvalidConn), errors.Is(err, sql.ErrConnDone):
		return m.unreachable("the connection was lost", err)
	default:
		if f := m.unanswered(err); f != nil {
			return f
		}
		return m.failed(doing, err)
	}
	switch my.Number {
	case myLoginDenied, myLocked, mariaLocked:
		return m.loginRefused(err)
	case myNoDatabase:
		return m.notFound("database", err)
	case myDatabaseDenied, myTableDenied, myPrivilegeLacks:
		return m.denied(doing, err)
	case myNoPlugin, mariaNoPlugin:
		return m.noPlugin()
	}
	return m.failed(doing, err)
}

func (m mariadb) prove(ctx context.Context, login Login) error {
	s, err := m.connect(ctx, m.Database, login)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.QueryRowContext(ctx, "SELECT 1").Scan(new(int)); err != nil {
		return m.explain("a query", err)
	}
	return nil
}

// run runs one statement that changes the server.
func (m mariadb) run(ctx context.Context, s session, doing, statement string) error {
	err := effect.Do("mysql: "+doing, func() error { _, err := s.ExecContext(ctx, statement); return err })
	if err != nil {
		return m.explain(doing, err)
	}
	return nil
}

func (m mariadb) ensure(ctx context.Context, _ string, login Login) error {
	if m.Database == "" {
		return invalid("database", "A login for MySQL needs a database.")
	}
	s, err := m.connect(ctx, "", m.Admin)
	if err != nil {
		return err
	}
	defer s.close()
	if err := m.capable(ctx, s); err != nil {
		return err
	}
	if err := m.mayTouch(ctx, s, login.User); err != nil {
		return err
	}
	identified := account(login.User) + " IDENTIFIED WITH mysql_native_password AS '" + nativeHash(login.Password) + "'"
	if err := m.run(ctx, s, "making the login", "CREATE USER IF NOT EXISTS "+identified); err != nil {
		return err
	}
	if err := m.run(ctx, s, "granting privileges", "GRANT "+strings.Join(databasePrivileges, ", ")+" ON "+grantedDatabase(m.Database)+".* TO "+account(login.User)); err != nil {
		return err
	}
	return m.run(ctx, s, "setting the password", "ALTER USER "+identified+" ACCOUNT UNLOCK")
}

// mayTouch refuses an account that can do more than one of ours.
func (m mariadb) mayTouch(ctx context.Context, s session, user string) error {
	var n int
	err := s.QueryRowContext(ctx, "SELECT count(*) FROM information_schema.USER_PRIVILEGES WHERE GRANTEE = ? AND PRIVILEGE_TYPE <> 'USAGE'", account(user)).Scan(&n)
	switch {
	case err != nil:
		return m.explain("looking at the login", err)
	case n > 0:
		return m.nameTaken("user", user, "it has privileges on the whole server")
	}
	return nil
}

func (m mariadb) logins(ctx context.Context, role string) ([]string, error) {
	s, err := m.connect(ctx, "", m.Admin)
	if err != nil {
		return nil, err
	}
	defer s.close()
	var usable []string
	for _, user := range Slots(role) {
		exists, locked, err := m.state(ctx, s, user)
		if err != nil {
			return nil, err
		}
		if exists && !locked {
			usable = append(usable, user)
		}
	}
	return usable, nil
}

// state tells whether there is an account, and whether it is locked.
func (m mariadb) state(ctx context.Context, s session, user string) (exists, locked bool, err error) {
	var n int
	if err := s.QueryRowContext(ctx, "SELECT count(*) FROM mysql.user WHERE user = ? AND host = '%'", user).Scan(&n); err != nil {
		return false, false, m.explain("looking at the login", err)
	}
	if n == 0 {
		return false, false, nil
	}
	var definition string
	if err := s.QueryRowContext(ctx, "SHOW CREATE USER "+account(user)).Scan(&definition); err != nil {
		return false, false, m.explain("looking at the login", err)
	}
	return true, strings.Contains(definition, " ACCOUNT LOCK"), nil
}

func (m mariadb) revoke(ctx context.Context, _, user string) error {
	s, err := m.connect(ctx, "", m.Admin)
	if err != nil {
		return err
	}
	defer s.close()
	defines, err := m.defines(ctx, s, user)
	if err != nil {
		return err
	}
	return m.end(ctx, s, user, len(defines) > 0)
}

func (m mariadb) remove(ctx context.Context, role string) (removed []string, err error) {
	s, err := m.connect(ctx, "", m.Admin)
	if err != nil {
		return nil, err
	}
	defer s.close()
	for _, user := range Slots(role) {
		exists, _, err := m.state(ctx, s, user)
		if err != nil {
			return removed, err
		}
		if !exists {
			continue
		}
		defines, err := m.defines(ctx, s, user)
		if err != nil {
			return removed, err
		}
		if err := m.end(ctx, s, user, false); err != nil {
			return removed, err
		}
		removed = append(removed, "user "+user)
		for _, what := range defines {
			removed = append(removed, "the definer of "+what+"; until it has another one it may not work")
		}
	}
	return removed, nil
}

// defines returns what names the user as its definer.
func (m mariadb) defines(ctx context.Context, s session, user string) ([]string, error) {
	const query = `SELECT concat('view ', TABLE_SCHEMA, '.', TABLE_NAME) FROM information_schema.VIEWS WHERE DEFINER = ?
		UNION ALL SELECT concat('trigger ', TRIGGER_SCHEMA, '.', TRIGGER_NAME) FROM information_schema.TRIGGERS WHERE DEFINER = ?
		UNION ALL SELECT concat('routine ', ROUTINE_SCHEMA, '.', ROUTINE_NAME) FROM information_schema.ROUTINES WHERE DEFINER = ?
		UNION ALL SELECT concat('event ', EVENT_SCHEMA, '.', EVENT_NAME) FROM information_schema.EVENTS WHERE DEFINER = ?`
	definer := user + "@%"
	names, err := texts(s.QueryContext(ctx, query, definer, definer, definer, definer))
	if err != nil {
		return nil, m.explain("looking for what the login defined", err)
	}
	slices.Sort(names)
	return names, nil
}

// end ends an account and its sessions; kept, it stays, locked.
func (m mariadb) end(ctx context.Context, s session, user string, kept bool) error {
	exists, _, err := m.state(ctx, s, user)
	if err != nil {
		return err
	}
	if exists {
		if err := m.mayTouch(ctx, s, user); err != nil {
			return err
		}
		unknown := nativeHash(NewSecret(hex.EncodeToString(randomBytes(32))))
		lock := "ALTER USER " + account(user) + " IDENTIFIED WITH mysql_native_password AS '" + unknown + "' ACCOUNT LOCK"
		if err := m.run(ctx, s, "locking the login", lock); err != nil {
			return err
		}
	}
	if err := m.endSessions(ctx, s, user); err != nil || !exists || kept {
		return err
	}
	if err := m.run(ctx, s, "dropping the login", "DROP USER IF EXISTS "+account(user)); err != nil {
		return err
	}
	// A login that was let in just before it was locked has a session by now.
	return m.endSessions(ctx, s, user)
}

func (m mariadb) endSessions(ctx context.Context, s session, user string) error {
	return until(ctx, func() (bool, error) {
		ids, err := texts(s.QueryContext(ctx, "SELECT ID FROM information_schema.PROCESSLIST WHERE USER = ?", user))
		if err != nil {
			return false, m.explain("looking for the login's sessions", err)
		}
		for _, id := range ids {
			_, err := s.ExecContext(ctx, "KILL "+id)
			if my := (*mysql.MySQLError)(nil); errors.As(err, &my) && my.Number == myNoThread {
				continue // it ended by itself
			}
			if err != nil {
				return false, m.explain("ending the login's sessions", err)
			}
		}
		return len(ids) == 0, nil
	})
}

// texts collects the only column of rows.
func texts(rows *sql.Rows, err error) ([]string, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			return nil, err
		}
		all = append(all, text)
	}
	return all, rows.Err()
}

// account is a user of ours as statements name it. The name was checked.
func account(user string) string { return "'" + user + "'@'%'" }

// backtick quotes an identifier.
func backtick(name string) string { return "`" + strings.ReplaceAll(name, "`", "``") + "`" }

// grantedDatabase quotes a database for GRANT, where '_' and '%' would stand for others as well.
func grantedDatabase(name string) string {
	return backtick(strings.NewReplacer(`\`, `\\`, "_", `\_`, "%", `\%`).Replace(name))
}
