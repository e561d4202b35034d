//go:build linux

package target_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/gomodule/redigo/redis"
	amqp "github.com/rabbitmq/amqp091-go"

	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
)

type redisApp struct{}

func dialRedis(ctx context.Context, s target.Server, login target.Login) (redis.Conn, error) {
	return redis.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", s.Host, s.Port), redis.DialUseTLS(true), redis.DialTLSConfig(tlsOf(s)),
		redis.DialUsername(login.User), redis.DialPassword(login.Password.Reveal()))
}

func asRedisAdmin(t *testing.T, s *targettest.Server, command string, args ...any) any {
	t.Helper()
	conn, err := dialRedis(t.Context(), s.Target(""), s.Target("").Admin)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	reply, err := conn.Do(command, args...)
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return reply
}

// slowlog is every command that the server got: it has no statement log, but a log
// of slow commands, for which here all are slow.
func slowlog(t *testing.T, s *targettest.Server) string {
	t.Helper()
	return fmt.Sprintf("%s", asRedisAdmin(t, s, "SLOWLOG", "GET", -1))
}

func (redisApp) prepare(*testing.T, *targettest.Server) {}

func (redisApp) open(ctx context.Context, s target.Server, login target.Login) (session, error) {
	conn, err := dialRedis(ctx, s, login)
	return redisSession{conn}, err
}

type redisSession struct{ redis.Conn }

func (s redisSession) add(v string) error { _, err := s.Do("RPUSH", "words", v); return err }

func (s redisSession) values() ([]string, error) {
	return redis.Strings(s.Do("LRANGE", "words", 0, -1))
}
func (s redisSession) alive(context.Context) error { _, err := s.Do("PING"); return err }
func (s redisSession) close()                      { _ = s.Close() }

func (redisApp) inventory(t *testing.T, s *targettest.Server) string {
	t.Helper()
	users, err := redis.Strings(asRedisAdmin(t, s, "ACL", "LIST"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, u := range users {
		words := strings.Fields(u)
		users[i] = strings.Join(slices.DeleteFunc(words, func(w string) bool { return strings.HasPrefix(w, "#") }), " ")
	}
	slices.Sort(users)
	return strings.Join(users, "\n")
}

func (redisApp) forbidden(s target.Server, login target.Login) []attempt {
	run := func(command string, args ...any) func(context.Context) error {
		return func(ctx context.Context) error {
			conn, err := dialRedis(ctx, s, login)
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.Do(command, args...)
			return err
		}
	}
	return []attempt{
		{"make a user", run("ACL", "SETUSER", "intruder", "on"), "NOPERM"},
		{"see the users", run("ACL", "LIST"), "NOPERM"},
		{"see the settings", run("CONFIG", "GET", "*"), "NOPERM"},
		{"delete everything", run("FLUSHALL"), "NOPERM"},
		{"stop the server", run("SHUTDOWN"), "NOPERM"},
		{"use another database", run("SELECT", 1), "NOPERM"},
		{"use another database in a script", run("EVAL", "return redis.call('select', 1)", 0), "can't run this command"},
		{"move a key to another database", run("MOVE", "words", 1), "NOPERM"},
	}
}

type rabbitmqApp struct{}

func dialRabbitMQ(s target.Server, vhost string, login target.Login) (*amqp.Connection, error) {
	return amqp.DialConfig(fmt.Sprintf("amqps://%s:%d", s.Host, s.Port), amqp.Config{
		SASL: []amqp.Authentication{&amqp.PlainAuth{Username: login.User, Password: login.Password.Reveal()}}, Vhost: vhost, TLSClientConfig: tlsOf(s),
	})
}

// manage makes one request of the management API.
func manage(ctx context.Context, s target.Server, login target.Login, method, path string, body any) ([]byte, error) {
	content, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.Management+"/api/"+path, bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	req.SetBasicAuth(login.User, login.Password.Reveal())
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: tlsOf(s), DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return answer, err
}

func (rabbitmqApp) prepare(t *testing.T, s *targettest.Server) {
	for _, vhost := range []string{"/app data", "other"} {
		if _, err := manage(t.Context(), s.Target(""), s.Target("").Admin, http.MethodPut, "vhosts/"+url.PathEscape(vhost), struct{}{}); err != nil {
			t.Fatal(err)
		}
	}
}

func (rabbitmqApp) open(_ context.Context, s target.Server, login target.Login) (session, error) {
	conn, err := dialRabbitMQ(s, s.Database, login)
	if err != nil {
		return nil, err
	}
	ch, err := conn.Channel()
	if err == nil {
		_, err = ch.QueueDeclare("words", true, false, false, false, nil)
	}
	return &rabbitmqSession{conn, ch}, err
}

type rabbitmqSession struct {
	conn *amqp.Connection
	ch   *amqp.Channel
}

func (s *rabbitmqSession) add(v string) error {
	if err := s.ch.Confirm(false); err != nil {
		return err
	}
	c, err := s.ch.PublishWithDeferredConfirm("", "words", true, false, amqp.Publishing{Body: []byte(v), DeliveryMode: amqp.Persistent})
	if err == nil && !c.Wait() {
		err = errors.New("not taken")
	}
	return err
}

// values reads the messages and gives them back.
func (s *rabbitmqSession) values() ([]string, error) {
	ch, err := s.conn.Channel()
	if err != nil {
		return nil, err
	}
	defer ch.Close() // what was not acknowledged goes back
	var all []string
	for {
		m, ok, err := ch.Get("words", false)
		if err != nil || !ok {
			return all, err
		}
		all = append(all, string(m.Body))
	}
}

func (s *rabbitmqSession) alive(context.Context) error {
	ch, err := s.conn.Channel()
	if err != nil {
		return err
	}
	return ch.Close()
}

func (s *rabbitmqSession) close() { _ = s.conn.Close() }

func (rabbitmqApp) inventory(t *testing.T, s *targettest.Server) string {
	t.Helper()
	var lines []string
	for _, path := range []string{"users?columns=name,tags", "permissions", "topic-permissions"} {
		answer, err := manage(t.Context(), s.Target(""), s.Target("").Admin, http.MethodGet, path, nil)
		if err != nil {
			t.Fatal(err)
		}
		var all []json.RawMessage
		if err := json.Unmarshal(answer, &all); err != nil {
			t.Fatal(err)
		}
		for _, one := range all {
			lines = append(lines, path+" "+string(one))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func (rabbitmqApp) forbidden(s target.Server, login target.Login) []attempt {
	api := func(method, path string, body any) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := manage(ctx, s, login, method, path, body)
			return err
		}
	}
	vhost := func(name string) func(context.Context) error {
		return func(context.Context) error {
			conn, err := dialRabbitMQ(s, name, login)
			if err != nil {
				return err
			}
			return conn.Close()
		}
	}
	return []attempt{
		{"make a user", api(http.MethodPut, "users/intruder", map[string]string{"password": "x", "tags": ""}), "401"},
		{"see the users", api(http.MethodGet, "users", nil), "401"},
		{"use another virtual host", vhost("other"), "refused for user"},
		{"use the default virtual host", vhost("/"), "refused for user"},
	}
}
