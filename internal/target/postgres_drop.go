package target

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"keyfleet.dev/keyfleet/internal/fault"
)

// adminAnywhere opens a connection as the administrator to the database or, where
// it is gone, to another one: what belongs to a role must be removable then too.
func (p postgres) adminAnywhere(ctx context.Context) (*pgx.Conn, error) {
	conn, err := p.admin(ctx)
	if f := (*fault.Error)(nil); errors.As(err, &f) && f.Code == codeNotFound {
		return p.connect(ctx, "postgres", p.Admin)
	}
	return conn, err
}

// drop removes a login or the role itself: it lets in no new session, ends those
// that run, gives away what it owns, and drops it. It reports what it did; an
// absent one is no error.
func (p postgres) drop(ctx context.Context, conn *pgx.Conn, role, name string) ([]string, error) {
	r, heir, err := p.shut(ctx, conn, role, name)
	if err != nil || r.oid == 0 {
		return nil, err
	}
	if err := p.endSessions(ctx, conn, r.oid); err != nil {
		return nil, err
	}
	report, err := p.disown(ctx, conn, role, r, heir)
	if err != nil {
		return report, err
	}
	if err := p.within(ctx, conn, role, "dropping the role", []string{"DROP ROLE IF EXISTS " + quote(name)}); err != nil {
		return report, err
	}
	// A login that was let in just before it was shut has a session by now.
	return append(report, "role "+name), p.endSessions(ctx, conn, r.oid)
}

// shut lets no new session of a role in. It returns the role, the zero value if
// there is none, and who gets what it owns: the role gets what a login of it made,
// the administrator what the role owns.
func (p postgres) shut(ctx context.Context, conn *pgx.Conn, role, name string) (r pgRole, heir string, err error) {
	tx, err := p.begin(ctx, conn, role)
	if err != nil {
		return pgRole{}, "", err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	found, err := p.look(ctx, tx, role, name)
	if err != nil {
		return pgRole{}, "", err
	}
	r, there := found[name]
	if !there {
		return pgRole{}, "", nil
	}
	heir = "CURRENT_USER"
	if _, ok := found[role]; ok && name != role {
		heir = quote(role)
	}
	var superuser bool
	if err := tx.QueryRow(ctx, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user").Scan(&superuser); err != nil {
		return pgRole{}, "", p.explain("looking at the administrator", err)
	}
	statements := []string{"ALTER ROLE " + quote(name) + " NOLOGIN PASSWORD NULL"}
	if !superuser {
		statements = append(statements, "GRANT "+quote(name)+" TO CURRENT_USER") // to end its sessions
	}
	return r, heir, p.commit(ctx, tx, "shutting the login", statements)
}

// endSessions ends the sessions of a role, by its number: a dropped one has no name.
func (p postgres) endSessions(ctx context.Context, conn *pgx.Conn, oid uint32) error {
	err := until(ctx, func() (bool, error) {
		var n int
		err := conn.QueryRow(ctx, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usesysid = $1", oid).Scan(&n)
		return n == 0, err
	})
	if err != nil {
		return p.explain("ending the login's sessions", err)
	}
	return nil
}

// disown gives what a role owns to the heir and takes back what it was granted, in
// every database where there is something.
func (p postgres) disown(ctx context.Context, conn *pgx.Conn, role string, r pgRole, heir string) (report []string, err error) {
	rows, _ := conn.Query(ctx, `SELECT d.datname, count(*) FILTER (WHERE s.deptype = 'o') FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid
		WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = $1 AND d.datname <> current_database() AND d.datallowconn GROUP BY d.datname
		UNION ALL SELECT current_database(), count(*) FILTER (WHERE s.deptype = 'o') FROM pg_shdepend s
		WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = $1 AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())`, r.oid)
	type place struct {
		Database string
		Owned    int
	}
	places, err := pgx.CollectRows(rows, pgx.RowToStructByPos[place])
	if err != nil {
		return nil, p.explain("looking for what the role owns", err)
	}
	statements := []string{"REASSIGN OWNED BY " + quote(r.name) + " TO " + heir, "DROP OWNED BY " + quote(r.name)}
	for _, place := range places {
		if err := p.inDatabase(ctx, conn, place.Database, role, statements); err != nil {
			return report, err
		}
		if place.Owned > 0 && heir == "CURRENT_USER" {
			report = append(report, fmt.Sprintf("ownership of %d objects in database %s, now %s's", place.Owned, place.Database, p.Admin.User))
		}
	}
	return report, nil
}

// inDatabase runs statements in a database, over the connection if it leads there.
func (p postgres) inDatabase(ctx context.Context, conn *pgx.Conn, database, role string, statements []string) error {
	if conn.Config().Database != database {
		other, err := p.connect(ctx, database, p.Admin)
		if err != nil {
			return err
		}
		defer p.close(other)
		conn = other
	}
	return p.within(ctx, conn, role, "giving away what the role owns", statements)
}
