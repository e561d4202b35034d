package target

import (
	"context"
	"strings"

	"github.com/jackc/pgx/v5"
)

// pgRole is a role of the server, a login or not.
type pgRole struct {
	oid    uint32
	name   string
	ours   bool // it has our mark
	strong bool // it can do what no role of ours can
}

// look returns those of the named roles that there are.
func (p postgres) look(ctx context.Context, tx pgx.Tx, names ...string) (map[string]pgRole, error) {
	rows, err := tx.Query(ctx, `SELECT oid, rolname, coalesce(shobj_description(oid, 'pg_authid'), '') = $2,
			rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls
		FROM pg_roles WHERE rolname = ANY($1)`, names, mark)
	if err != nil {
		return nil, p.explain("looking at the roles", err)
	}
	found := map[string]pgRole{}
	var r pgRole
	_, err = pgx.ForEachRow(rows, []any{&r.oid, &r.name, &r.ours, &r.strong}, func() error { found[r.name] = r; return nil })
	if err != nil {
		return nil, p.explain("looking at the roles", err)
	}
	for _, r := range found {
		if !r.ours || r.strong {
			return nil, p.nameTaken("role", r.name, "it lacks the comment '"+mark+"', or it can do more than a role of Keyfleet's")
		}
	}
	return found, nil
}

func (p postgres) ensure(ctx context.Context, role string, login Login) error {
	if p.Database == "" {
		return invalid("database", "A login for PostgreSQL needs a database.")
	}
	conn, err := p.admin(ctx)
	if err != nil {
		return err
	}
	defer p.close(conn)
	superuser, err := p.capable(ctx, conn)
	if err != nil {
		return err
	}
	verifier, err := scramVerifier(login.Password, randomBytes(16))
	if err != nil {
		return err
	}
	tx, err := p.begin(ctx, conn, role)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	found, err := p.look(ctx, tx, role, login.User)
	if err != nil {
		return err
	}
	tables, sequences, err := p.relations(ctx, tx)
	if err != nil {
		return err
	}
	_, haveRole := found[role]
	_, haveLogin := found[login.User]
	statements := p.roleStatements(role, haveRole, superuser, tables, sequences)
	statements = append(statements, loginStatements(role, login.User, verifier, haveLogin)...)
	return p.commit(ctx, tx, "making the login", statements)
}

// roleStatements make the role and bring its privileges up to date. It gets the
// data of what is in schema public now and of what the administrator puts there
// later, so that a new role can go on with what an earlier one left.
func (p postgres) roleStatements(role string, exists, superuser bool, tables, sequences []string) []string {
	r := quote(role)
	var s []string
	if !exists {
		s = append(s, "CREATE ROLE "+r+" NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION",
			"COMMENT ON ROLE "+r+" IS "+literal(mark))
	}
	if !superuser {
		s = append(s, "GRANT "+r+" TO CURRENT_USER") // to hand on what it owns, and to end its sessions
	}
	s = append(s,
		"GRANT CONNECT ON DATABASE "+quote(p.Database)+" TO "+r,
		"GRANT USAGE, CREATE ON SCHEMA public TO "+r,
		"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO "+r,
		"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE, SELECT, UPDATE ON SEQUENCES TO "+r)
	if len(tables) > 0 {
		s = append(s, "GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE "+strings.Join(tables, ", ")+" TO "+r)
	}
	if len(sequences) > 0 {
		s = append(s, "GRANT USAGE, SELECT, UPDATE ON SEQUENCE "+strings.Join(sequences, ", ")+" TO "+r)
	}
	return s
}

func loginStatements(role, login, verifier string, exists bool) []string {
	r, l := quote(role), quote(login)
	password := " CONNECTION LIMIT -1 VALID UNTIL 'infinity' PASSWORD " + literal(verifier)
	var s []string
	if exists {
		s = append(s, "ALTER ROLE "+l+" LOGIN INHERIT"+password)
	} else {
		s = append(s, "CREATE ROLE "+l+" LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION"+password,
			"COMMENT ON ROLE "+l+" IS "+literal(mark))
	}
	return append(s, "GRANT "+r+" TO "+l, "ALTER ROLE "+l+" SET role = "+r)
}

// relations returns the tables and sequences in schema public, quoted, that the
// administrator may hand on.
func (p postgres) relations(ctx context.Context, tx pgx.Tx) (tables, sequences []string, err error) {
	rows, err := tx.Query(ctx, `SELECT relname, relkind = 'S' FROM pg_class
		WHERE relnamespace = to_regnamespace('public') AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND pg_has_role(relowner, 'USAGE')
		ORDER BY relname`)
	if err != nil {
		return nil, nil, p.explain("listing the tables", err)
	}
	var name string
	var sequence bool
	_, err = pgx.ForEachRow(rows, []any{&name, &sequence}, func() error {
		if qualified := (pgx.Identifier{"public", name}).Sanitize(); sequence {
			sequences = append(sequences, qualified)
		} else {
			tables = append(tables, qualified)
		}
		return nil
	})
	if err != nil {
		return nil, nil, p.explain("listing the tables", err)
	}
	return tables, sequences, nil
}

func (p postgres) logins(ctx context.Context, role string) ([]string, error) {
	conn, err := p.admin(ctx)
	if err != nil {
		return nil, err
	}
	defer p.close(conn)
	slots := Slots(role)
	rows, _ := conn.Query(ctx, "SELECT rolname FROM pg_roles WHERE rolname = ANY($1) AND rolcanlogin ORDER BY rolname", slots[:])
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, p.explain("listing the logins", err)
	}
	return names, nil
}

func (p postgres) revoke(ctx context.Context, role, user string) error {
	conn, err := p.adminAnywhere(ctx)
	if err != nil {
		return err
	}
	defer p.close(conn)
	_, err = p.drop(ctx, conn, role, user)
	return err
}

func (p postgres) remove(ctx context.Context, role string) (removed []string, err error) {
	conn, err := p.adminAnywhere(ctx)
	if err != nil {
		return nil, err
	}
	defer p.close(conn)
	slots := Slots(role)
	for _, name := range append(slots[:], role) {
		report, err := p.drop(ctx, conn, role, name)
		removed = append(removed, report...)
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}
