package target

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/gomodule/redigo/redis"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// redisServer makes credentials on Redis. One command sets all of a user's rules at
// once, so there is nothing between "not yet" and "done" but writing the users to the
// server's file, where it has one.
type redisServer struct {
	Server
	config *tls.Config
}

// database is the number of the database.
func (r redisServer) database() int {
	n, _ := strconv.Atoi(r.Database) // was checked
	return n
}

func (r redisServer) connect(ctx context.Context, login Login) (redis.Conn, error) {
	options := []redis.DialOption{
		redis.DialUsername(login.User), redis.DialPassword(login.Password.Reveal()),
		redis.DialConnectTimeout(connectTimeout), redis.DialReadTimeout(callTimeout), redis.DialWriteTimeout(callTimeout),
	}
	if r.config != nil {
		options = append(options, redis.DialUseTLS(true), redis.DialTLSConfig(r.config), redis.DialTLSHandshakeTimeout(connectTimeout))
	}
	conn, err := redis.DialContext(ctx, "tcp", r.address(), options...)
	if err != nil {
		return nil, r.explain("connecting", err)
	}
	return conn, nil
}

// explain turns an error of a connection into one that people see.
func (r redisServer) explain(doing string, err error) error {
	var answer redis.Error
	if !errors.As(err, &answer) {
		if f := r.unanswered(err); f != nil {
			return f
		}
		return r.failed(doing, err)
	}
	switch word, _, _ := strings.Cut(string(answer), " "); word {
	case "WRONGPASS", "NOAUTH":
		return r.loginRefused(err)
	case "NOPERM":
		return r.denied(doing, err)
	}
	return r.failed(doing, err)
}

// do runs one command; doing says for what.
func (r redisServer) do(ctx context.Context, conn redis.Conn, doing, command string, args ...any) (any, error) {
	reply, err := redis.DoContext(conn, ctx, command, args...)
	if err != nil {
		return nil, r.explain(doing, err)
	}
	return reply, nil
}

func (r redisServer) prove(ctx context.Context, login Login) error {
	conn, err := r.connect(ctx, login)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := r.do(ctx, conn, "choosing the database", "SELECT", r.database()); err != nil {
		return err
	}
	_, err = r.do(ctx, conn, "a command", "PING")
	return err
}

// rules are those of a login: every key and channel, nothing that administers the
// server, and no other database than its own. Redis cannot bind a login to a
// database: a session begins in database 0 and can be kept from changing only.
func (r redisServer) rules(password Secret) []any {
	return []any{
		"reset", "on", "#" + redisHash(password), "~*", "&*", "+@all", "-@dangerous", "-@admin",
		"-select", "-move", "-copy", "+select|" + strconv.Itoa(r.database()),
	}
}

func (r redisServer) ensure(ctx context.Context, _ string, login Login) error {
	conn, err := r.connect(ctx, r.Admin)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := r.capable(ctx, conn); err != nil {
		return err
	}
	err = effect.Do("redis: making the login", func() error {
		_, err := r.do(ctx, conn, "making the login", "ACL", append([]any{"SETUSER", login.User}, r.rules(login.Password)...)...)
		return err
	})
	if err != nil {
		return err
	}
	return r.save(ctx, conn)
}

// save writes the users to the server's file of them, if it has one.
func (r redisServer) save(ctx context.Context, conn redis.Conn) error {
	return effect.Do("redis: saving the logins", func() error {
		_, err := redis.DoContext(conn, ctx, "ACL", "SAVE")
		if answer := redis.Error(""); errors.As(err, &answer) && strings.Contains(string(answer), "not configured to use an ACL file") {
			return nil // Check warned
		}
		if err != nil {
			return r.explain("saving the logins", err)
		}
		return nil
	})
}

func (r redisServer) logins(ctx context.Context, role string) ([]string, error) {
	conn, err := r.connect(ctx, r.Admin)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var usable []string
	for _, user := range Slots(role) {
		reply, err := r.do(ctx, conn, "looking at the logins", "ACL", "GETUSER", user)
		if err != nil {
			return nil, err
		}
		if reply != nil {
			usable = append(usable, user)
		}
	}
	return usable, nil
}

func (r redisServer) revoke(ctx context.Context, _, user string) error {
	_, err := r.delete(ctx, user)
	return err
}

func (r redisServer) remove(ctx context.Context, role string) ([]string, error) {
	slots := Slots(role)
	return r.delete(ctx, slots[:]...)
}

// delete deletes users; the server ends their sessions with that. The file is
// written even if there was no user: it may still hold one that is gone.
func (r redisServer) delete(ctx context.Context, users ...string) (deleted []string, err error) {
	conn, err := r.connect(ctx, r.Admin)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	for _, user := range users {
		err := effect.Do("redis: deleting the login", func() error {
			n, err := redis.Int(r.do(ctx, conn, "deleting the login", "ACL", "DELUSER", user))
			if n > 0 {
				deleted = append(deleted, "user "+user)
			}
			return err
		})
		if err != nil {
			return deleted, err
		}
	}
	return deleted, r.save(ctx, conn)
}

func (r redisServer) check(ctx context.Context) ([]string, error) {
	conn, err := r.connect(ctx, r.Admin)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := r.capable(ctx, conn); err != nil {
		return nil, err
	}
	warnings := []string{"Redis does not keep databases apart: logins for other databases than 0 can use database 0 as well."}
	file, err := redis.Strings(redis.DoContext(conn, ctx, "CONFIG", "GET", "aclfile"))
	switch {
	case err != nil:
		warnings = append(warnings, "The server does not say whether it keeps its logins in a file (CONFIG GET aclfile).")
	case len(file) < 2 || file[1] == "":
		warnings = append(warnings, "The server has no file for its logins: they live as long as it runs. To keep them, give it an aclfile.")
	}
	return warnings, nil
}

// capable fails unless the administrator may change the users.
func (r redisServer) capable(ctx context.Context, conn redis.Conn) error {
	name := r.Admin.User
	if name == "" {
		name = "default"
	}
	var lack []missing
	for _, sub := range [][]any{{"SETUSER", name}, {"GETUSER", name}, {"DELUSER", name}, {"SAVE"}} {
		reply, err := redis.DoContext(conn, ctx, "ACL", append([]any{"DRYRUN", name, "ACL"}, sub...)...)
		if answer := redis.Error(""); errors.As(err, &answer) {
			if strings.HasPrefix(string(answer), "NOPERM") {
				return r.permissions([]missing{{"ACL", fmt.Sprintf("ACL SETUSER %s +acl", name)}})
			}
			if strings.Contains(strings.ToLower(string(answer)), "unknown") {
				return fault.New(fault.Conflict, codeUnsupported, "The server '%s' is older than Redis 7.", r.address()).At(r.at()).Because(err)
			}
		}
		if err != nil {
			return r.explain("looking at the administrator's privileges", err)
		}
		if text, _ := redis.String(reply, nil); text != "OK" {
			lack = append(lack, missing{fmt.Sprint("ACL ", sub[0]), fmt.Sprintf("ACL SETUSER %s +acl|%s", name, strings.ToLower(fmt.Sprint(sub[0])))})
		}
	}
	return r.permissions(lack)
}
