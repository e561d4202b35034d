//go:build linux

package target_test

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
)

// TestMariaDBAdministrator: the statements that an administrator without privileges
// is told give it what it needs, and no more is needed.
func TestMariaDBAdministrator(t *testing.T) {
	f := &fixture{Server: targettest.MariaDB(t), application: mariadbApp{}, database: "app_data"}
	f.prepare(t, f.Server)
	asMariaDBAdmin(t, f.Server, "CREATE USER weak IDENTIFIED BY 'weak-password'")
	weak := f.target()
	weak.Admin = target.Login{User: "weak", Password: target.NewSecret("weak-password")}
	_, err := target.Check(t.Context(), weak)
	wantFault(t, err, "TargetPermissionsMissing")
	for grant := range strings.SplitAfterSeq(strings.TrimSuffix(fault.From(err).Fix, ";"), ";") {
		asMariaDBAdmin(t, f.Server, strings.TrimSuffix(grant, ";"))
	}
	if _, err := target.Check(t.Context(), weak); err != nil {
		t.Fatalf("with the statements that it named: %v", err)
	}
	login := f.login("strong", 0)
	if err := target.Ensure(t.Context(), weak, "strong", login); err != nil {
		t.Fatal(err)
	}
	session := f.openSession(t, login)
	if err := target.Revoke(t.Context(), weak, "strong", login.User); err != nil {
		t.Fatal(err)
	}
	if session.alive(t.Context()) == nil {
		t.Error("the session of the revoked login goes on")
	}
	if _, err := target.Remove(t.Context(), weak, "strong"); err != nil {
		t.Fatal(err)
	}
}

// TestMariaDBDefinitionsOutliveLogins: a view runs as the login that defined it. It
// works on when that login was revoked, which stays, locked; it comes back with its
// turn, and is gone after Remove, which names the view.
func TestMariaDBDefinitionsOutliveLogins(t *testing.T) {
	f := &fixture{Server: targettest.MariaDB(t), application: mariadbApp{}, database: "app_data"}
	f.prepare(t, f.Server)
	a := f.ensure(t, "definer", 0)
	db, err := dialMariaDB(t.Context(), f.target(), f.database, a)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, statement := range []string{"CREATE TABLE words (v text)", "INSERT INTO words VALUES ('one')", "CREATE VIEW shown AS SELECT v FROM words"} {
		if _, err := db.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	b := f.ensure(t, "definer", 1)
	if err := target.Revoke(t.Context(), f.target(), "definer", a.User); err != nil {
		t.Fatal(err)
	}
	f.refused(t, a)
	f.wantLogins(t, "definer", "definer_b")
	other, err := dialMariaDB(t.Context(), f.target(), f.database, b)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	var v string
	if err := other.QueryRowContext(t.Context(), "SELECT v FROM shown").Scan(&v); err != nil || v != "one" {
		t.Errorf("the view shows %q, %v", v, err)
	}
	f.prove(t, f.ensure(t, "definer", 0))
	f.wantLogins(t, "definer", "definer_a", "definer_b")
	removed := f.remove(t, "definer")
	if !slices.ContainsFunc(removed, func(s string) bool { return strings.Contains(s, "view app_data.shown") }) {
		t.Errorf("it removed %q", removed)
	}
}

// TestMariaDBLeavesOthersAlone: an account with privileges on the server is not ours.
func TestMariaDBLeavesOthersAlone(t *testing.T) {
	f := &fixture{Server: targettest.MariaDB(t), application: mariadbApp{}, database: "app_data"}
	f.prepare(t, f.Server)
	asMariaDBAdmin(t, f.Server, "CREATE USER people_a", "GRANT RELOAD ON *.* TO people_a")
	wantFault(t, target.Ensure(t.Context(), f.target(), "people", f.login("people", 0)), "TargetNameTaken")
	wantFault(t, target.Revoke(t.Context(), f.target(), "people", "people_a"), "TargetNameTaken")
	_, err := target.Remove(t.Context(), f.target(), "people")
	wantFault(t, err, "TargetNameTaken")
}

// TestRedisKeepsLogins: with a file of logins they are in it, and go from it; without
// one Check says how long they live.
func TestRedisKeepsLogins(t *testing.T) {
	f := &fixture{Server: targettest.Redis(t), application: redisApp{}, database: "3"}
	file := func() string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(f.Dir, "users.acl"))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	f.prove(t, f.ensure(t, "kept", 0))
	if !strings.Contains(file(), "user kept_a on") {
		t.Errorf("the file has\n%s", file())
	}
	f.remove(t, "kept")
	if strings.Contains(file(), "kept_a") {
		t.Errorf("the file has\n%s", file())
	}

	plain := &fixture{Server: targettest.Redis(t, `aclfile ""`, "user keyfleet_admin on nopass ~* &* +@all", "user weak on nopass ~* &* +@all -acl"), application: redisApp{}, database: "0"}
	warnings, err := target.Check(t.Context(), plain.target())
	if err != nil || !slices.ContainsFunc(warnings, func(s string) bool { return strings.Contains(s, "aclfile") }) {
		t.Errorf("warnings are %q, %v", warnings, err)
	}
	plain.prove(t, plain.ensure(t, "short", 0))
	plain.remove(t, "short")

	weak := plain.target()
	weak.Admin.User = "weak"
	_, err = target.Check(t.Context(), weak)
	wantFault(t, err, "TargetPermissionsMissing")
	asRedisAdmin(t, plain.Server, "ACL", anys(strings.Fields(strings.TrimPrefix(fault.From(err).Fix, "ACL ")))...)
	if _, err := target.Check(t.Context(), weak); err != nil {
		t.Errorf("with the command that it named: %v", err)
	}
}

func anys(words []string) []any {
	var all []any
	for _, w := range words {
		all = append(all, w)
	}
	return all
}

// TestRabbitMQAdministrator: what an administrator lacks is named, and a user with
// tags is not ours.
func TestRabbitMQAdministrator(t *testing.T) {
	f := &fixture{Server: targettest.RabbitMQ(t), application: rabbitmqApp{}, database: "/"}
	for name, tags := range map[string]string{"plain": "", "viewer": "management", "people_a": "monitoring"} {
		body := map[string]string{"password": "weak-password", "tags": tags}
		if _, err := manage(t.Context(), f.target(), f.target().Admin, http.MethodPut, "users/"+name, body); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"plain", "viewer"} {
		weak := f.target()
		weak.Admin = target.Login{User: name, Password: target.NewSecret("weak-password")}
		_, err := target.Check(t.Context(), weak)
		wantFault(t, err, "TargetPermissionsMissing")
		if got, want := fault.From(err).Fix, "rabbitmqctl set_user_tags "+name+" administrator"; got != want {
			t.Errorf("the fix is %q, want %q", got, want)
		}
	}
	wantFault(t, target.Ensure(t.Context(), f.target(), "people", f.login("people", 0)), "TargetNameTaken")
	wantFault(t, target.Revoke(t.Context(), f.target(), "people", "people_a"), "TargetNameTaken")
}
