//go:build linux

package target_test

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/target"
)

func itoa(n int) string { return strconv.Itoa(n) }

// TestConformance holds for every kind of server.
func TestConformance(t *testing.T) {
	for kind, start := range fixtures() {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			f := start(t)
			f.prepare(t, f.Server)
			if _, err := target.Check(t.Context(), f.target()); err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				name string
				test func(*testing.T, *fixture)
			}{
				{"made twice", testMadeTwice},
				{"wrong login", testWrongLogin},
				{"least privilege", testLeastPrivilege},
				{"rotation under load", testRotationUnderLoad},
				{"revoke ends sessions", testRevokeEndsSessions},
				{"remove leaves nothing but the data", testRemove},
				{"crash at every message", testCrash},
				{"unreachable", testUnreachable},
				{"no password was sent", testNoPasswordWasSent}, // the last one: it looks at all before
			} {
				t.Run(c.name, func(t *testing.T) { c.test(t, f) })
			}
		})
	}
}

// testMadeTwice: making a login again changes nothing but its password, and a running session goes on.
func testMadeTwice(t *testing.T, f *fixture) {
	before := f.inventory(t, f.Server)
	first := f.ensure(t, "twice", 0)
	once := f.inventory(t, f.Server)
	running := f.openSession(t, first)
	if err := target.Ensure(t.Context(), f.target(), "twice", first); err != nil {
		t.Fatal(err)
	}
	f.prove(t, first)
	second := f.ensure(t, "twice", 0)
	if got := f.inventory(t, f.Server); got != once {
		t.Errorf("made twice:\n%s\nonce:\n%s", got, once)
	}
	f.prove(t, second)
	f.refused(t, first)
	if err := running.alive(t.Context()); err != nil {
		t.Errorf("a session did not survive: %v", err)
	}
	f.wantLogins(t, "twice", "twice_a")
	f.remove(t, "twice")
	if got := f.inventory(t, f.Server); got != before {
		t.Errorf("after removing:\n%s\nbefore:\n%s", got, before)
	}
}

// testWrongLogin: a wrong password and an unknown user are told in the same words,
// and a login that works is not refused.
func testWrongLogin(t *testing.T, f *fixture) {
	good := f.ensure(t, "wrong", 0)
	for _, bad := range []target.Login{{User: good.User, Password: target.NewSecret("another-password")}, {User: "nobody_a", Password: good.Password}} {
		_, err := target.Prove(t.Context(), f.target(), bad)
		wantFault(t, err, "InvalidDbSecret")
		if got := fault.From(err).Message; got != "Error in username or password." {
			t.Errorf("the message is %q", got)
		}
		f.refused(t, bad)
	}
	wantFault(t, target.Refused(t.Context(), f.target(), good), "TargetLoginNotRefused")
	admin := f.target()
	admin.Admin.Password = target.NewSecret("another-password")
	_, err := target.Check(t.Context(), admin)
	wantFault(t, err, "InvalidDbSecret")
	f.remove(t, "wrong")
}

// testLeastPrivilege: a login can work with its data, and do nothing else.
func testLeastPrivilege(t *testing.T, f *fixture) {
	login := f.ensure(t, "least", 0)
	work := f.openSession(t, login)
	if err := work.add("least"); err != nil {
		t.Errorf("it cannot write: %v", err)
	}
	if _, err := work.values(); err != nil {
		t.Errorf("it cannot read: %v", err)
	}
	for _, a := range f.forbidden(f.target(), login) {
		if err := wantError(a.try(t.Context()), a.want); err != nil {
			t.Errorf("%s: %v", a.name, err)
		}
	}
	work.close()
	f.remove(t, "least")
}

// testRotationUnderLoad: workers log in all the time with the login that was
// delivered last, through a whole rotation and back, and no login fails.
func testRotationUnderLoad(t *testing.T, f *fixture) {
	const workers = 3
	first := f.ensure(t, "rotating", 0)
	var delivered atomic.Pointer[target.Login]
	delivered.Store(&first)
	var logins, failures atomic.Int64
	var using [workers]atomic.Pointer[target.Login]
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for i := range workers {
		running.Go(func() {
			for ctx.Err() == nil {
				login := delivered.Load()
				using[i].Store(login)
				if _, err := target.Prove(t.Context(), f.target(), *login); err != nil {
					failures.Add(1)
					t.Errorf("a login as %s failed: %v", login.User, err)
				}
				logins.Add(1)
			}
		})
	}
	old := first
	for slot := range 4 {
		next := f.ensure(t, "rotating", (slot+1)%2)
		f.prove(t, next)
		f.prove(t, old) // both work
		f.wantLogins(t, "rotating", "rotating_a", "rotating_b")
		delivered.Store(&next)
		waitFor(t, "all workers have the new login", func() bool {
			for i := range using {
				if using[i].Load() != &next {
					return false
				}
			}
			return true
		})
		if err := target.Revoke(t.Context(), f.target(), "rotating", old.User); err != nil {
			t.Fatal(err)
		}
		f.refused(t, old)
		f.wantLogins(t, "rotating", next.User)
		old = next
	}
	stop()
	running.Wait()
	t.Logf("%s: %d logins through 4 rotations, %d failed", f.Kind, logins.Load(), failures.Load())
	f.remove(t, "rotating")
}

// testRevokeEndsSessions: a revoked login has no session, the other one keeps its
// own, and what the revoked one made can be used and changed by the other.
func testRevokeEndsSessions(t *testing.T, f *fixture) {
	before := f.inventory(t, f.Server)
	a := f.ensure(t, "ending", 0)
	oldSession := f.openSession(t, a)
	if err := oldSession.add("made by a"); err != nil {
		t.Fatal(err)
	}
	b := f.ensure(t, "ending", 1)
	newSession := f.openSession(t, b)
	for range 2 { // the second time there is nothing to do
		if err := target.Revoke(t.Context(), f.target(), "ending", a.User); err != nil {
			t.Fatal(err)
		}
	}
	if err := oldSession.alive(t.Context()); err == nil {
		t.Error("the session of the revoked login goes on")
	}
	f.refused(t, a)
	if err := newSession.alive(t.Context()); err != nil {
		t.Errorf("the other login lost its session: %v", err)
	}
	values, err := newSession.values()
	if err != nil || !strings.Contains(strings.Join(values, "\n"), "made by a") {
		t.Errorf("the other login reads %q, %v", values, err)
	}
	newSession.close()
	f.remove(t, "ending")
	if got := f.inventory(t, f.Server); got != before {
		t.Errorf("after removing:\n%s\nbefore:\n%s", got, before)
	}
}

// testRemove: users, roles and grants are as before, sessions have ended, and the
// data is there for the next role.
func testRemove(t *testing.T, f *fixture) {
	before := f.inventory(t, f.Server)
	a := f.ensure(t, "removed", 0)
	b := f.ensure(t, "removed", 1)
	running := f.openSession(t, b)
	if err := running.add("kept"); err != nil {
		t.Fatal(err)
	}
	removed := f.remove(t, "removed")
	if len(removed) < 2 {
		t.Errorf("it says it removed %q", removed)
	}
	if got := f.inventory(t, f.Server); got != before {
		t.Errorf("after removing:\n%s\nbefore:\n%s", got, before)
	}
	f.refused(t, a)
	f.refused(t, b)
	if err := running.alive(t.Context()); err == nil {
		t.Error("a session goes on")
	}
	if again := f.remove(t, "removed"); len(again) != 0 {
		t.Errorf("the second time it removed %q", again)
	}
	heir := f.openSession(t, f.ensure(t, "heir", 0))
	values, err := heir.values()
	if err != nil || !strings.Contains(strings.Join(values, "\n"), "kept") {
		t.Errorf("the next role reads %q, %v", values, err)
	}
	heir.close()
	f.remove(t, "heir")
}

// testUnreachable: what is no answer about the login proves nothing about it.
func testUnreachable(t *testing.T, f *fixture) {
	login := f.ensure(t, "apart", 0)
	closed := f.target()
	closed.Port = 1
	otherCA := f.target()
	otherCA.TLS.CA = ""
	otherName := f.target()
	otherName.TLS.Name = "other.example"
	nowhere := f.target()
	nowhere.Database = map[target.Kind]string{target.Redis: "0"}[f.Kind] + "99"
	for _, c := range []struct {
		name   string
		server target.Server
		code   string
	}{
		{"nothing listens", closed, "TargetUnreachable"},
		{"another CA", otherCA, "TargetTLS"},
		{"another name", otherName, "TargetTLS"},
	} {
		err := target.Refused(t.Context(), c.server, login)
		wantFault(t, err, c.code)
		if strings.Contains(err.Error(), login.Password.Reveal()) {
			t.Errorf("%s: the error has the password", c.name)
		}
	}
	if f.Kind != target.Redis { // which has all its databases from the start
		wantFault(t, target.Refused(t.Context(), nowhere, login), map[bool]string{true: "TargetPermissionsMissing", false: "TargetDatabaseNotFound"}[f.Kind == target.MySQL])
		wantFault(t, target.Ensure(t.Context(), nowhere, "apart", login), "TargetDatabaseNotFound")
	}
	plain := f.target()
	plain.TLS = target.TLS{Disable: true}
	if f.Kind != target.MySQL { // which takes both here
		if err := target.Refused(t.Context(), plain, login); err == nil {
			t.Error("a server that wants TLS proved that a good login is refused")
		}
	}
	f.remove(t, "apart")
}

// testNoPasswordWasSent: the server logged statements, and no password is in what it logged.
func testNoPasswordWasSent(t *testing.T, f *fixture) {
	log := f.Log()
	if f.commands != nil {
		log += f.commands(t, f.Server)
	}
	marks := map[target.Kind]string{target.Postgres: "CREATE ROLE", target.MySQL: "CREATE USER", target.Redis: "setuser", target.RabbitMQ: "twice_a"}
	if !strings.Contains(strings.ToLower(log), strings.ToLower(marks[f.Kind])) {
		t.Errorf("the log does not show that logins are made (%q)", marks[f.Kind])
	}
	for _, p := range f.passwords {
		if strings.Contains(log, p) || strings.Contains(log, p[len(p)-26:]) {
			t.Fatal("the server's log has a password")
		}
	}
	t.Logf("%s: none of %d passwords in %d KiB of log", f.Kind, len(f.passwords), len(log)>>10)
}

func wantFault(t *testing.T, err error, code string) {
	t.Helper()
	f := (*fault.Error)(nil)
	if !errors.As(err, &f) || f.Code != code {
		t.Errorf("the error is %v, want %s", err, code)
	}
}

// waitFor polls until the condition holds.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout: %s", what)
		}
	}
}
