package system

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/go-sql-driver/mysql"
	"github.com/gomodule/redigo/redis"
	amqp "github.com/rabbitmq/amqp091-go"

	"keyfleet.dev/keyfleet/internal/target/targettest"
)

// The servers that are connected to, each with an application that uses an ordinary
// client library. The CA of the server stands in for the trust roots of the
// application's machine; all else comes from its environment.

// endpoint is what an application has read: either what its client library takes as
// it is, or the parts.
type endpoint struct {
	url                                  string
	host, port, user, password, database string
	tls                                  bool
}

func (e endpoint) address() string { return net.JoinHostPort(e.host, e.port) }

// variables are the names of an environment in which each variable is one value.
// Where none says whether to use TLS, the application knows that the server demands it.
type variables struct{ host, port, user, password, database, tls, yes string }

func (v variables) read(env map[string]string) endpoint {
	return endpoint{host: env[v.host], port: env[v.port], user: env[v.user], password: env[v.password], database: env[v.database], tls: v.tls == "" || env[v.tls] == v.yes}
}

// whole reads an environment of one variable that the client library takes as it is.
func whole(name string) func(map[string]string) endpoint {
	return func(env map[string]string) endpoint { return endpoint{url: env[name]} }
}

// jdbc reads a JDBC URL.
func jdbc(text string) endpoint {
	u, err := url.Parse(strings.TrimPrefix(text, "jdbc:"))
	if err != nil {
		return endpoint{}
	}
	q := u.Query()
	return endpoint{
		host: u.Hostname(), port: u.Port(), database: strings.TrimPrefix(u.Path, "/"),
		user: q.Get("user"), password: q.Get("password"), tls: q.Get("sslmode") == "required",
	}
}

// adonet reads a connection string of ADO.NET: NAME=VALUE;NAME="VALUE".
func adonet(text string) endpoint {
	all := map[string]string{}
	for text != "" {
		name, rest, _ := strings.Cut(text, "=")
		var value strings.Builder
		for quoted := strings.HasPrefix(rest, `"`); quoted; quoted = strings.HasPrefix(rest, `"`) {
			part, after, _ := strings.Cut(rest[1:], `"`)
			if rest = after; value.Len() > 0 {
				value.WriteByte('"') // a doubled one
			}
			value.WriteString(part)
		}
		plain, after, _ := strings.Cut(rest, ";")
		all[name], text = value.String()+plain, after
	}
	return variables{"Server", "Port", "User Id", "Password", "Database", "SSL Mode", "Required"}.read(all)
}

// stackExchange reads a connection string of StackExchange.Redis, which quotes nothing.
func stackExchange(text string) endpoint {
	words := strings.Split(text, ",")
	all := map[string]string{}
	all["host"], all["port"], _ = strings.Cut(words[0], ":")
	for _, w := range words[1:] {
		name, value, _ := strings.Cut(w, "=")
		all[name] = value
	}
	return variables{"host", "port", "user", "password", "defaultDatabase", "ssl", "True"}.read(all)
}

// rootsOf is the TLS configuration of an application that trusts the server's CA.
func rootsOf(s *targettest.Server) *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.CA))
	return &tls.Config{RootCAs: roots, ServerName: s.Host}
}

// administrator is the endpoint of a server's administrator.
func administrator(s *targettest.Server) endpoint {
	return endpoint{host: s.Host, port: strconv.Itoa(s.Port), user: s.AdminUser, password: s.AdminPassword, tls: true}
}

func openMariaDB(s *targettest.Server, e endpoint) (*sql.DB, error) {
	cfg := mysql.NewConfig()
	if e.url == "" {
		cfg.Net, cfg.Addr, cfg.User, cfg.Passwd, cfg.DBName = "tcp", e.address(), e.user, e.password, e.database
		if e.tls {
			cfg.TLS = rootsOf(s)
		}
	} else {
		var err error
		if cfg, err = mysql.ParseDSN(e.url); err != nil {
			return nil, err
		}
		if cfg.TLS == nil {
			return nil, errors.New("the DSN asks for no TLS")
		}
		cfg.TLS.RootCAs = rootsOf(s).RootCAs
	}
	cfg.Logger = &mysql.NopLogger{}
	connector, err := mysql.NewConnector(cfg)
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(connector), nil
}

func mariadb(t *testing.T) *service {
	srv := targettest.MariaDB(t, "require_secure_transport=ON")
	admin, err := openMariaDB(srv, administrator(srv))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = admin.Close() })
	run := func(t *testing.T, statement string) {
		t.Helper()
		if _, err := admin.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "CREATE DATABASE shop_db")
	const host, port, password = "AZURE_MYSQL_HOST", "AZURE_MYSQL_PORT", "AZURE_MYSQL_PASSWORD"
	django := variables{host, port, "AZURE_MYSQL_USER", password, "AZURE_MYSQL_NAME", "", ""}.read
	return &service{
		Server: srv, kind: "mysql", target: "mysql-flexible", connection: "my",
		id: "Microsoft.DBforMySQL/flexibleServers/main/databases/shop_db", place: []string{"--database", "shop_db"},
		clients: []clientType{
			{"nodejs", variables{host, port, "AZURE_MYSQL_USER", password, "AZURE_MYSQL_DATABASE", "AZURE_MYSQL_SSL", "true"}.read},
			{"go", whole("AZURE_MYSQL_CONNECTIONSTRING")},
			{"java", func(env map[string]string) endpoint { return jdbc(env["AZURE_MYSQL_CONNECTIONSTRING"]) }},
			{"dotnet", func(env map[string]string) endpoint { return adonet(env["AZURE_MYSQL_CONNECTIONSTRING"]) }},
			{"python", django},
			{"django", django},
			{"php", variables{host, port, "AZURE_MYSQL_USERNAME", password, "AZURE_MYSQL_DBNAME", "AZURE_MYSQL_FLAG", "MySQL_CLIENT_SSL"}.read},
			{"ruby", variables{host, port, "AZURE_MYSQL_USERNAME", password, "AZURE_MYSQL_DATABASE", "AZURE_MYSQL_SSLMODE", "required"}.read},
			{"none", variables{host, port, "AZURE_MYSQL_USERNAME", password, "AZURE_MYSQL_DATABASE", "", ""}.read},
			{"springBoot", func(env map[string]string) endpoint {
				e := jdbc(env["spring.datasource.url"])
				e.user, e.password = env["spring.datasource.username"], env["spring.datasource.password"]
				return e
			}},
		},
		login: func(ctx context.Context, e endpoint) error {
			db, err := openMariaDB(srv, e)
			if err != nil {
				return err
			}
			defer db.Close()
			if _, err := db.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS orders (n int)"); err != nil {
				return err
			}
			_, err = db.ExecContext(ctx, "INSERT INTO orders VALUES (1)")
			return err
		},
		refused: func(err error) bool {
			var my *mysql.MySQLError
			return errors.As(err, &my) && my.Number == 1045
		},
		ours: func(t *testing.T) string {
			t.Helper()
			rows, err := admin.QueryContext(t.Context(), `SELECT user FROM mysql.global_priv WHERE user LIKE 'kf\_%' UNION ALL SELECT DISTINCT concat('grant to ', GRANTEE) FROM information_schema.SCHEMA_PRIVILEGES WHERE GRANTEE LIKE '%kf\_%'
				UNION ALL SELECT concat('grant to ', user) FROM mysql.db WHERE user LIKE 'kf\_%' UNION ALL SELECT concat('session of ', USER) FROM information_schema.PROCESSLIST WHERE USER LIKE 'kf\_%'`)
			if err != nil {
				t.Fatal(err)
			}
			defer rows.Close()
			var all []string
			for rows.Next() {
				var line string
				if err := rows.Scan(&line); err != nil {
					t.Fatal(err)
				}
				all = append(all, line)
			}
			return strings.Join(all, "\n")
		},
		count: func(t *testing.T) (n int) {
			t.Helper()
			if err := admin.QueryRowContext(t.Context(), "SELECT count(*) FROM shop_db.orders").Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		},
		open: func(t *testing.T, user, password string) {
			t.Helper()
			run(t, "CREATE USER "+user+" IDENTIFIED BY '"+strings.NewReplacer(`\`, `\\`, "'", "''").Replace(password)+"'")
			run(t, "GRANT ALL ON shop_db.* TO "+user)
		},
	}
}

func dialRedis(ctx context.Context, s *targettest.Server, e endpoint) (redis.Conn, error) {
	if e.url != "" {
		return redis.DialURLContext(ctx, e.url, redis.DialTLSConfig(rootsOf(s)))
	}
	number, err := strconv.Atoi(e.database)
	if err != nil {
		return nil, err
	}
	return redis.DialContext(ctx, "tcp", e.address(), redis.DialUseTLS(e.tls), redis.DialTLSConfig(rootsOf(s)),
		redis.DialUsername(e.user), redis.DialPassword(e.password), redis.DialDatabase(number))
}

func redisServer(t *testing.T) *service {
	srv := targettest.Redis(t)
	const database = "3"
	do := func(t *testing.T, command string, args ...any) any {
		t.Helper()
		e := administrator(srv)
		e.database = database
		conn, err := dialRedis(t.Context(), srv, e)
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
	connectionString := whole("AZURE_REDIS_CONNECTIONSTRING")
	return &service{
		Server: srv, kind: "redis", target: "redis", connection: "cache",
		id: "Microsoft.Cache/redis/main/databases/" + database, place: []string{"--database", database},
		clients: []clientType{
			{"springBoot", variables{"spring.redis.host", "spring.redis.port", "spring.redis.username", "spring.redis.password", "spring.redis.database", "spring.redis.ssl", "true"}.read},
			{"go", connectionString},
			{"java", connectionString},
			{"python", connectionString},
			{"nodejs", connectionString},
			{"none", connectionString},
			{"dotnet", func(env map[string]string) endpoint { return stackExchange(env["AZURE_REDIS_CONNECTIONSTRING"]) }},
		},
		login: func(ctx context.Context, e endpoint) error {
			conn, err := dialRedis(ctx, srv, e)
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = redis.DoContext(conn, ctx, "RPUSH", "orders", 1)
			return err
		},
		refused: func(err error) bool { return strings.Contains(err.Error(), "WRONGPASS") },
		ours: func(t *testing.T) string {
			t.Helper()
			users, err := redis.Strings(do(t, "ACL", "LIST"), nil)
			if err != nil {
				t.Fatal(err)
			}
			file, err := os.ReadFile(filepath.Join(srv.Dir, "users.acl")) // what the server has after a restart
			if err != nil {
				t.Fatal(err)
			}
			return linesWith("kf_", append(users, strings.Split(string(file), "\n")...))
		},
		count: func(t *testing.T) int {
			t.Helper()
			n, err := redis.Int(do(t, "LLEN", "orders"), nil)
			if err != nil {
				t.Fatal(err)
			}
			return n
		},
		open: func(t *testing.T, user, password string) {
			t.Helper()
			do(t, "ACL", "SETUSER", user, "on", ">"+password, "~*", "+@all", "-@admin")
		},
	}
}

// linesWith are the lines that have a text.
func linesWith(text string, lines []string) string {
	var some []string
	for _, l := range lines {
		if strings.Contains(l, text) {
			some = append(some, l)
		}
	}
	return strings.Join(some, "\n")
}

func dialRabbitMQ(s *targettest.Server, e endpoint) (*amqp.Connection, error) {
	if e.url != "" {
		return amqp.DialTLS(e.url, rootsOf(s))
	}
	if !e.tls {
		return nil, errors.New("the environment asks for no TLS")
	}
	return amqp.DialConfig("amqps://"+e.address(), amqp.Config{
		SASL: []amqp.Authentication{&amqp.PlainAuth{Username: e.user, Password: e.password}}, Vhost: e.database, TLSClientConfig: rootsOf(s),
	})
}

// queue declares the queue of an application on a connection, and lets work use it.
func queue(conn *amqp.Connection, err error, work func(*amqp.Channel, amqp.Queue) error) error {
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	q, err := ch.QueueDeclare("orders", true, false, false, false, nil)
	if err != nil {
		return err
	}
	return work(ch, q)
}

func rabbitmq(t *testing.T) *service {
	srv := targettest.RabbitMQ(t)
	const vhost = "/shop"
	manage := func(t *testing.T, method, path string, body any) string {
		t.Helper()
		content, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(t.Context(), method, srv.Management+"/api/"+path, bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(srv.AdminUser, srv.AdminPassword)
		resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: rootsOf(srv), DisableKeepAlives: true}}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode/100 != 2 {
			t.Fatalf("%s %s: %s %s %v", method, path, resp.Status, answer, err)
		}
		return string(answer)
	}
	permit := func(t *testing.T, user string) {
		t.Helper()
		manage(t, http.MethodPut, "permissions/"+url.PathEscape(vhost)+"/"+user, map[string]string{"configure": ".*", "write": ".*", "read": ".*"})
	}
	manage(t, http.MethodPut, "vhosts/"+url.PathEscape(vhost), struct{}{})
	permit(t, srv.AdminUser)
	named := variables{"RABBITMQ_HOST", "RABBITMQ_PORT", "RABBITMQ_USERNAME", "RABBITMQ_PASSWORD", "RABBITMQ_VHOST", "RABBITMQ_SSL", "true"}.read
	connectionString := whole("RABBITMQ_CONNECTIONSTRING")
	return &service{
		Server: srv, kind: "rabbitmq", target: "rabbitmq", connection: "mq",
		id: "Keyfleet.Messaging/rabbitmq/main", values: map[string]string{"vhost": vhost}, place: []string{"--value", "vhost=" + vhost},
		clients: []clientType{
			{"none", named},
			{"go", connectionString},
			{"dotnet", connectionString},
			{"java", connectionString},
			{"nodejs", connectionString},
			{"python", named},
			{"springBoot", variables{
				"spring.rabbitmq.host", "spring.rabbitmq.port", "spring.rabbitmq.username", "spring.rabbitmq.password", "spring.rabbitmq.virtual-host", "spring.rabbitmq.ssl.enabled", "true",
			}.read},
		},
		login: func(ctx context.Context, e endpoint) error {
			conn, err := dialRabbitMQ(srv, e)
			return queue(conn, err, func(ch *amqp.Channel, _ amqp.Queue) error {
				if err := ch.Confirm(false); err != nil {
					return err
				}
				taken, err := ch.PublishWithDeferredConfirm("", "orders", true, false, amqp.Publishing{Body: []byte("1"), DeliveryMode: amqp.Persistent})
				if err != nil {
					return err
				}
				if ok, err := taken.WaitContext(ctx); err != nil || !ok {
					return fmt.Errorf("the message was not taken: %w", err)
				}
				return nil
			})
		},
		refused: func(err error) bool {
			var answer *amqp.Error
			return errors.As(err, &answer) && answer.Code == amqp.AccessRefused
		},
		ours: func(t *testing.T) string {
			t.Helper()
			var all []string
			for _, path := range []string{"users", "permissions", "topic-permissions"} {
				var some []json.RawMessage
				if err := json.Unmarshal([]byte(manage(t, http.MethodGet, path, nil)), &some); err != nil {
					t.Fatal(err)
				}
				for _, one := range some {
					all = append(all, path+" "+string(one))
				}
			}
			return linesWith(`"kf_`, all)
		},
		count: func(t *testing.T) (n int) {
			t.Helper()
			e := administrator(srv)
			e.database = vhost
			conn, err := dialRabbitMQ(srv, e)
			if err := queue(conn, err, func(_ *amqp.Channel, q amqp.Queue) error { n = q.Messages; return nil }); err != nil {
				t.Fatal(err)
			}
			return n
		},
		open: func(t *testing.T, user, password string) {
			t.Helper()
			manage(t, http.MethodPut, "users/"+user, map[string]string{"password": password, "tags": ""})
			permit(t, user)
		},
	}
}
