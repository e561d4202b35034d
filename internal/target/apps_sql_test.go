//go:build linux

package target_test

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"testing"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5"

	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
)

type postgresApp struct{}

func dialPostgres(ctx context.Context, s target.Server, database string, login target.Login) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("sslmode=disable")
	if err != nil {
		return nil, err
	}
	c.Host, c.Port, c.Database, c.User, c.Password = s.Host, uint16(s.Port), database, login.User, login.Password.Reveal()
	c.TLSConfig, c.Fallbacks = tlsOf(s), nil
	return pgx.ConnectConfig(ctx, c)
}

// asPostgresAdmin runs statements as the administrator.
func asPostgresAdmin(t *testing.T, s *targettest.Server, database string, statements ...string) {
	t.Helper()
	conn, err := dialPostgres(t.Context(), s.Target(""), database, s.Target("").Admin)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, sql := range statements {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

func (postgresApp) prepare(t *testing.T, s *targettest.Server) {
	asPostgresAdmin(t, s, "postgres", `CREATE DATABASE "app data"`, "CREATE DATABASE other")
	asPostgresAdmin(t, s, "other", "CREATE TABLE secrets (v text)", "INSERT INTO secrets VALUES ('secret')")
}

func (postgresApp) open(ctx context.Context, s target.Server, login target.Login) (session, error) {
	conn, err := dialPostgres(ctx, s, s.Database, login)
	if err != nil {
		return nil, err
	}
	_, err = conn.Exec(ctx, "CREATE TABLE IF NOT EXISTS words (id serial, v text)")
	return postgresSession{conn}, err
}

type postgresSession struct{ *pgx.Conn }

func (s postgresSession) add(v string) error {
	_, err := s.Exec(context.Background(), "INSERT INTO words (v) VALUES ($1)", v)
	return err
}

func (s postgresSession) values() ([]string, error) {
	rows, _ := s.Query(context.Background(), "SELECT v FROM words ORDER BY id")
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func (s postgresSession) alive(ctx context.Context) error { return s.Ping(ctx) }
func (s postgresSession) close()                          { _ = s.Close(context.Background()) }

func (postgresApp) inventory(t *testing.T, s *targettest.Server) string {
	t.Helper()
	var all []string
	for _, database := range []string{"app data", "other"} {
		conn, err := dialPostgres(t.Context(), s.Target(""), database, s.Target("").Admin)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		rows, _ := conn.Query(t.Context(), `
			SELECT format('role %s login=%s super=%s createdb=%s createrole=%s repl=%s limit=%s until=%s config=%s comment=%s', rolname, rolcanlogin, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolconnlimit, rolvaliduntil, rolconfig, shobj_description(oid, 'pg_authid')) FROM pg_roles
			UNION ALL SELECT format('member %s of %s', member::regrole, roleid::regrole) FROM pg_auth_members
			UNION ALL SELECT format('database %s %s', datname, coalesce(datacl, acldefault('d', datdba))) FROM pg_database
			UNION ALL SELECT format('schema %s %s', nspname, nspacl) FROM pg_namespace WHERE nspname = 'public'
			UNION ALL SELECT format('relation %s %s %s', relname, relowner::regrole, relacl) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname NOT LIKE 'words%'
			UNION ALL SELECT format('default %s %s %s', defaclrole::regrole, defaclobjtype, defaclacl) FROM pg_default_acl
			UNION ALL SELECT format('setting %s %s', setrole::regrole, setconfig) FROM pg_db_role_setting
			ORDER BY 1`)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, lines...)
	}
	return strings.Join(all, "\n")
}

func (postgresApp) forbidden(s target.Server, login target.Login) []attempt {
	run := func(database, statement string) func(context.Context) error {
		return func(ctx context.Context) error {
			conn, err := dialPostgres(ctx, s, database, login)
			if err != nil {
				return err
			}
			defer conn.Close(ctx)
			_, err = conn.Exec(ctx, statement)
			return err
		}
	}
	return []attempt{
		{"make a role", run(s.Database, "CREATE ROLE intruder"), "permission denied"},
		{"make a role as itself", run(s.Database, "SET ROLE none; CREATE ROLE intruder"), "permission denied"},
		{"become the administrator", run(s.Database, "SET ROLE "+s.Admin.User), "permission denied"},
		{"make a database", run(s.Database, "CREATE DATABASE intruder"), "permission denied"},
		{"read the passwords", run(s.Database, "SELECT * FROM pg_authid"), "permission denied"},
		{"read another database", run("other", "SELECT * FROM secrets"), "permission denied"},
		{"make a table in another database", run("other", "CREATE TABLE public.intruder (v text)"), "permission denied"},
		{"run a program", run(s.Database, "COPY (SELECT 1) TO PROGRAM 'true'"), "pg_execute_server_program"},
		{"read a file", run(s.Database, "SELECT pg_read_file('pg_hba.conf')"), "permission denied"},
	}
}

type mariadbApp struct{}

func dialMariaDB(ctx context.Context, s target.Server, database string, login target.Login) (*sql.DB, error) {
	c := mysql.NewConfig()
	c.Net, c.Addr, c.DBName, c.User, c.Passwd, c.TLS = "tcp", fmt.Sprintf("%s:%d", s.Host, s.Port), database, login.User, login.Password.Reveal(), tlsOf(s)
	c.Logger = &mysql.NopLogger{}
	connector, err := mysql.NewConnector(c)
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(connector)
	return db, db.PingContext(ctx)
}

func asMariaDBAdmin(t *testing.T, s *targettest.Server, statements ...string) {
	t.Helper()
	db, err := dialMariaDB(t.Context(), s.Target(""), "", s.Target("").Admin)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, statement := range statements {
		if _, err := db.ExecContext(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

func (mariadbApp) prepare(t *testing.T, s *targettest.Server) {
	asMariaDBAdmin(t, s, "CREATE DATABASE `app_data`", "CREATE DATABASE `appXdata`", "CREATE TABLE `appXdata`.secrets (v text)", "INSERT INTO `appXdata`.secrets VALUES ('secret')")
}

func (mariadbApp) open(ctx context.Context, s target.Server, login target.Login) (session, error) {
	db, err := dialMariaDB(ctx, s, s.Database, login)
	if err != nil {
		return nil, err
	}
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	_, err = conn.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS words (id int auto_increment primary key, v text)")
	return mariadbSession{db, conn}, err
}

type mariadbSession struct {
	db *sql.DB
	*sql.Conn
}

func (s mariadbSession) add(v string) error {
	_, err := s.ExecContext(context.Background(), "INSERT INTO words (v) VALUES (?)", v)
	return err
}

func (s mariadbSession) values() ([]string, error) {
	rows, err := s.QueryContext(context.Background(), "SELECT v FROM words ORDER BY id")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var v string
		if err := rows.Scan(&v); err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, rows.Err()
}

func (s mariadbSession) alive(ctx context.Context) error {
	_, err := s.ExecContext(ctx, "DO 1")
	return err
}

func (s mariadbSession) close() { _, _ = s.Conn.Close(), s.db.Close() }

func (mariadbApp) inventory(t *testing.T, s *targettest.Server) string {
	t.Helper()
	db, err := dialMariaDB(t.Context(), s.Target(""), "", s.Target("").Admin)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.QueryContext(t.Context(), `SELECT concat('user ', user, '@', host, ' ', json_value(priv, '$.account_locked'), ' ', json_value(priv, '$.plugin')) AS line FROM mysql.global_priv
		UNION ALL SELECT concat_ws(' ', 'server', GRANTEE, PRIVILEGE_TYPE, IS_GRANTABLE) FROM information_schema.USER_PRIVILEGES
		UNION ALL SELECT concat_ws(' ', 'database', GRANTEE, TABLE_SCHEMA, PRIVILEGE_TYPE, IS_GRANTABLE) FROM information_schema.SCHEMA_PRIVILEGES
		UNION ALL SELECT concat_ws(' ', 'table', GRANTEE, TABLE_SCHEMA, TABLE_NAME, PRIVILEGE_TYPE) FROM information_schema.TABLE_PRIVILEGES ORDER BY line`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var line sql.NullString
		if err := rows.Scan(&line); err != nil {
			t.Fatal(err)
		}
		all = append(all, line.String)
	}
	return strings.Join(all, "\n")
}

func (mariadbApp) forbidden(s target.Server, login target.Login) []attempt {
	run := func(statement string) func(context.Context) error {
		return func(ctx context.Context) error {
			db, err := dialMariaDB(ctx, s, s.Database, login)
			if err != nil {
				return err
			}
			defer db.Close()
			_, err = db.ExecContext(ctx, statement)
			return err
		}
	}
	return []attempt{
		{"make a user", run("CREATE USER intruder"), "Access denied"},
		{"hand on its privileges", run("GRANT SELECT ON `app_data`.* TO intruder IDENTIFIED BY 'x'"), "Access denied"},
		{"make a database", run("CREATE DATABASE intruder"), "Access denied"},
		{"read the passwords", run("SELECT * FROM mysql.global_priv"), "denied"},
		{"read another database", run("SELECT * FROM `appXdata`.secrets"), "denied"}, // 'app_data' as a pattern would let it in
		{"write a file", run("SELECT 1 INTO OUTFILE '/tmp/intruder'"), "Access denied"},
	}
}
