//go:build linux

package target_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
)

// preparedPostgres is a server with the tests' databases.
func preparedPostgres(t *testing.T) *fixture {
	f := &fixture{Server: targettest.Postgres(t), application: postgresApp{}, database: "app data"}
	f.prepare(t, f.Server)
	return f
}

// TestPostgresAdministrator: an administrator that lacks privileges is told which,
// the statements that it is told give them, and with these and no more, not a
// superuser's, it can do everything.
func TestPostgresAdministrator(t *testing.T) {
	f := preparedPostgres(t)
	asPostgresAdmin(t, f.Server, "postgres", `CREATE ROLE weak LOGIN PASSWORD 'weak-password'`)
	superPassword := f.AdminPassword
	f.AdminUser, f.AdminPassword = "weak", "weak-password"
	_, err := target.Check(t.Context(), f.target())
	wantFault(t, err, "TargetPermissionsMissing")
	for _, want := range []string{"CREATEROLE", "CONNECT", "USAGE and CREATE"} {
		if !strings.Contains(fault.From(err).Message, want) {
			t.Errorf("it does not name %s: %v", want, err)
		}
	}
	wantFault(t, target.Ensure(t.Context(), f.target(), "strong", f.login("strong", 0)), "TargetPermissionsMissing")

	f.AdminUser, f.AdminPassword = "keyfleet_admin", superPassword
	for _, grant := range strings.SplitAfter(fault.From(err).Fix, ";") {
		asPostgresAdmin(t, f.Server, f.database, grant)
	}
	f.AdminUser, f.AdminPassword = "weak", "weak-password"
	if _, err := target.Check(t.Context(), f.target()); err != nil {
		t.Fatalf("with the statements that it named: %v", err)
	}
	a := f.ensure(t, "strong", 0)
	session := f.openSession(t, a)
	if err := session.add("one"); err != nil {
		t.Fatal(err)
	}
	b := f.ensure(t, "strong", 1)
	f.prove(t, b)
	if err := target.Revoke(t.Context(), f.target(), "strong", a.User); err != nil {
		t.Fatal(err)
	}
	f.refused(t, a)
	if session.alive(t.Context()) == nil {
		t.Error("the session of the revoked login goes on")
	}
	removed := f.remove(t, "strong")
	if want := []string{"role strong_b", "ownership of 2 objects in database app data, now weak's", "role strong"}; !slices.Equal(removed, want) {
		t.Errorf("it removed %q, want %q", removed, want)
	}
	f.wantLogins(t, "strong")
}

// TestPostgresObjectsOutliveLogins: what one login makes belongs to the role: the
// other one can change it, also what was made in another role or in another
// database, and at the end it is the administrator's.
func TestPostgresObjectsOutliveLogins(t *testing.T) {
	f := preparedPostgres(t)
	asPostgresAdmin(t, f.Server, "other", "GRANT CREATE ON SCHEMA public TO PUBLIC")
	a := f.ensure(t, "owner", 0)
	for database, statement := range map[string]string{
		f.database: "CREATE TABLE mine (v text); RESET ROLE; CREATE TABLE reset (v text)", // poolers reset sessions
		"other":    "SET ROLE none; CREATE TABLE public.elsewhere (v text)",
	} {
		conn, err := dialPostgres(t.Context(), f.target(), database, a)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	b := f.ensure(t, "owner", 1)
	if err := target.Revoke(t.Context(), f.target(), "owner", a.User); err != nil {
		t.Fatal(err)
	}
	for database, statement := range map[string]string{
		f.database: "ALTER TABLE mine ADD w text; ALTER TABLE reset ADD w text; INSERT INTO mine VALUES ('a', 'b')",
		"other":    "ALTER TABLE public.elsewhere ADD w text",
	} {
		conn, err := dialPostgres(t.Context(), f.target(), database, b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Errorf("%s: %v", statement, err)
		}
		conn.Close(t.Context())
	}
	want := []string{
		"role owner_b", "ownership of 1 objects in database other, now keyfleet_admin's",
		"ownership of 2 objects in database app data, now keyfleet_admin's", "role owner",
	}
	if got := f.remove(t, "owner"); !slices.Equal(got, want) {
		t.Errorf("it removed %q, want %q", got, want)
	}
	asPostgresAdmin(t, f.Server, f.database, "ALTER TABLE mine OWNER TO CURRENT_USER", "SELECT 1 / (SELECT count(*) FROM mine)")
}

// TestPostgresLeavesOthersAlone: a role or login that was not made here, or that can
// do more, is neither changed nor removed.
func TestPostgresLeavesOthersAlone(t *testing.T) {
	f := preparedPostgres(t)
	asPostgresAdmin(t, f.Server, "postgres", "CREATE ROLE people", "CREATE ROLE mine_a LOGIN")
	login := f.ensure(t, "grown", 0)
	asPostgresAdmin(t, f.Server, "postgres", "ALTER ROLE grown_a CREATEDB")
	before := f.inventory(t, f.Server)
	for _, role := range []string{"people", "mine", "grown"} {
		wantFault(t, target.Ensure(t.Context(), f.target(), role, target.Login{User: role + "_a", Password: login.Password}), "TargetNameTaken")
		wantFault(t, target.Revoke(t.Context(), f.target(), role, role+"_a"), "TargetNameTaken")
		_, err := target.Remove(t.Context(), f.target(), role)
		wantFault(t, err, "TargetNameTaken")
	}
	if got := f.inventory(t, f.Server); got != before {
		t.Errorf("after:\n%s\nbefore:\n%s", got, before)
	}
}

// TestPostgresClosedByAddress: a server whose pg_hba.conf lets nobody in says nothing
// about a login, so it does not count as a refusal of it.
func TestPostgresClosedByAddress(t *testing.T) {
	f := preparedPostgres(t)
	login := f.ensure(t, "closed", 0)
	rules := "hostssl all " + f.AdminUser + " all scram-sha-256\n"
	if err := os.WriteFile(filepath.Join(f.Dir, "pg_hba.conf"), []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	asPostgresAdmin(t, f.Server, "postgres", "SELECT pg_reload_conf()")
	waitFor(t, "the new rules hold", func() bool { _, err := target.Prove(t.Context(), f.target(), login); return err != nil })
	wantFault(t, target.Refused(t.Context(), f.target(), login), "TargetFailed")
}

// TestPostgresDatabaseIsGone: the logins of a database that somebody dropped can be removed.
func TestPostgresDatabaseIsGone(t *testing.T) {
	f := preparedPostgres(t)
	before := f.inventory(t, f.Server)
	f.ensure(t, "orphan", 0)
	asPostgresAdmin(t, f.Server, "postgres", `DROP DATABASE "app data"`, `CREATE DATABASE "app data"`)
	gone := f.target()
	gone.Database = "never there"
	if removed, err := target.Remove(t.Context(), gone, "orphan"); err != nil || len(removed) != 2 {
		t.Errorf("it removed %q, %v", removed, err)
	}
	if got := f.inventory(t, f.Server); got != before {
		t.Errorf("after:\n%s\nbefore:\n%s", got, before)
	}
}

// TestPostgresWarnings: a database that lets everybody connect is named, with what closes it.
func TestPostgresWarnings(t *testing.T) {
	f := preparedPostgres(t)
	warnings, err := target.Check(t.Context(), f.target())
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], `REVOKE CONNECT ON DATABASE "other" FROM PUBLIC;`) {
		t.Fatalf("warnings are %q, %v", warnings, err)
	}
	asPostgresAdmin(t, f.Server, "postgres", `REVOKE CONNECT ON DATABASE "other" FROM PUBLIC;`)
	if warnings, err := target.Check(t.Context(), f.target()); err != nil || len(warnings) != 0 {
		t.Errorf("warnings are %q, %v", warnings, err)
	}
}
