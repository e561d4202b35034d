package target

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"keyfleet.dev/keyfleet/internal/effect"
)

// postgres makes credentials on PostgreSQL. A role that cannot log in holds the
// privileges; its logins are members that act as it from their first statement on,
// so what they make belongs to the role and outlives them. All that Ensure does is
// one transaction.
type postgres struct {
	Server
	config *tls.Config
}

// mark is the comment of the roles that were made here. Others are not touched.
const mark = "made by Keyfleet"

// SQLSTATE of the errors that are told apart.
const (
	pgWrongPassword   = "28P01"
	pgNoAuthorization = "28000" // also where pg_hba.conf has no line for the client
	pgNoDatabase      = "3D000"
	pgNoPrivilege     = "42501"
)

// connect opens a connection to a database. Nothing of the environment or of the
// files that libpq knows counts.
func (p postgres) connect(ctx context.Context, database string, login Login) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("host=localhost port=1 user=u dbname=d sslmode=disable passfile='' target_session_attrs=any")
	if err != nil {
		return nil, fmt.Errorf("preparing a connection: %w", err)
	}
	c.Host, c.Port, c.Database = p.Host, uint16(p.Port), database
	c.User, c.Password = login.User, login.Password.Reveal()
	c.TLSConfig, c.Fallbacks, c.ConnectTimeout = p.config, nil, connectTimeout
	c.RuntimeParams = map[string]string{"application_name": "keyfleet"}
	c.DefaultQueryExecMode = pgx.QueryExecModeExec
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return nil, p.explain("connecting to the database", err)
	}
	return conn, nil
}

// admin opens a connection as the administrator, to any database if none is named.
func (p postgres) admin(ctx context.Context) (*pgx.Conn, error) {
	database := p.Database
	if database == "" {
		database = "postgres"
	}
	return p.connect(ctx, database, p.Admin)
}

func (p postgres) close(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), pollInterval)
	defer cancel()
	_ = conn.Close(ctx) // polite; the socket is closed in any case
}

// explain turns an error of a connection into one that people see.
func (p postgres) explain(doing string, err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		if f := p.unanswered(err); f != nil {
			return f
		}
		if strings.Contains(err.Error(), "server refused TLS connection") {
			return p.unanswered(tls.RecordHeaderError{Msg: err.Error()})
		}
		return p.failed(doing, err)
	}
	switch {
	case pg.Code == pgWrongPassword, pg.Code == pgNoAuthorization && strings.Contains(pg.File+pg.Routine, "InitializeSessionUserId"):
		return p.loginRefused(err)
	case pg.Code == pgNoDatabase:
		return p.notFound("database", err)
	case pg.Code == pgNoPrivilege:
		return p.denied(doing, err)
	}
	return p.failed(doing, err)
}

func (p postgres) prove(ctx context.Context, login Login) error {
	conn, err := p.connect(ctx, p.Database, login)
	if err != nil {
		return err
	}
	defer p.close(conn)
	if err := conn.QueryRow(ctx, "SELECT 1").Scan(new(int)); err != nil {
		return p.explain("a query", err)
	}
	return nil
}

func (p postgres) check(ctx context.Context) ([]string, error) {
	conn, err := p.admin(ctx)
	if err != nil {
		return nil, err
	}
	defer p.close(conn)
	if _, err := p.capable(ctx, conn); err != nil {
		return nil, err
	}
	if p.Database == "" {
		return nil, nil
	}
	rows, _ := conn.Query(ctx, `SELECT datname FROM pg_database
		WHERE datallowconn AND NOT datistemplate AND datname NOT IN ($1, 'postgres') AND has_database_privilege('public', oid, 'CONNECT')
		ORDER BY datname LIMIT 20`, p.Database)
	open, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, p.explain("listing the databases", err)
	}
	var warnings []string
	for _, name := range open {
		warnings = append(warnings, fmt.Sprintf("Every login may connect to the database '%s'. Its tables stay closed; to close it: REVOKE CONNECT ON DATABASE %s FROM PUBLIC;", name, quote(name)))
	}
	return warnings, nil
}

// capable fails unless the administrator can make and remove roles and hand on what
// a role gets. It returns whether it is a superuser.
func (p postgres) capable(ctx context.Context, conn *pgx.Conn) (superuser bool, err error) {
	var create, connect, usage, makeObjects bool
	err = conn.QueryRow(ctx, `SELECT rolsuper, rolcreaterole,
			has_database_privilege(current_database(), 'CONNECT WITH GRANT OPTION'),
			coalesce(has_schema_privilege(to_regnamespace('public'), 'USAGE WITH GRANT OPTION'), false),
			coalesce(has_schema_privilege(to_regnamespace('public'), 'CREATE WITH GRANT OPTION'), false)
		FROM pg_roles WHERE rolname = current_user`).Scan(&superuser, &create, &connect, &usage, &makeObjects)
	if err != nil {
		return false, p.explain("looking at the administrator's privileges", err)
	}
	admin, database := quote(p.Admin.User), quote(p.Database)
	var lack []missing
	if !superuser && !create {
		lack = append(lack, missing{"CREATEROLE", "ALTER ROLE " + admin + " CREATEROLE;"})
	}
	if p.Database != "" && !superuser {
		if !connect {
			lack = append(lack, missing{"CONNECT on the database, with grant option", "GRANT CONNECT ON DATABASE " + database + " TO " + admin + " WITH GRANT OPTION;"})
		}
		if !usage || !makeObjects {
			lack = append(lack, missing{"USAGE and CREATE on schema public, with grant option", "GRANT USAGE, CREATE ON SCHEMA public TO " + admin + " WITH GRANT OPTION;"})
		}
	}
	return superuser, p.permissions(lack)
}

// within runs statements on a role in one transaction.
func (p postgres) within(ctx context.Context, conn *pgx.Conn, role, doing string, statements []string) error {
	tx, err := p.begin(ctx, conn, role)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }() // after a commit it does nothing
	return p.commit(ctx, tx, doing, statements)
}

// begin begins a transaction that no other one on the same role overlaps: the
// server may still be at work for a caller that gave up.
func (p postgres) begin(ctx context.Context, conn *pgx.Conn, role string) (pgx.Tx, error) {
	tx, err := conn.Begin(ctx)
	if err == nil {
		_, err = tx.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtext($1))", "keyfleet "+role)
	}
	if err != nil {
		return nil, p.explain("waiting for the role", err)
	}
	return tx, nil
}

// commit runs statements and commits the transaction: that is the effect.
func (p postgres) commit(ctx context.Context, tx pgx.Tx, doing string, statements []string) error {
	for _, s := range statements {
		if _, err := tx.Exec(ctx, s); err != nil {
			return p.explain(doing, err)
		}
	}
	if err := effect.Do("postgres: "+doing, func() error { return tx.Commit(ctx) }); err != nil {
		return p.explain(doing, err)
	}
	return nil
}

// quote quotes an identifier.
func quote(name string) string { return pgx.Identifier{name}.Sanitize() }

// literal quotes a text that has no backslash.
func literal(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }
