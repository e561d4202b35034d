//go:build linux

package connector

import (
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-sql-driver/mysql"
	"github.com/gomodule/redigo/redis"

	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
)

// known are the users of a connection that its server knows, in its list of users or
// in one of grants, as its administrator sees them.
func (c *podClients) known(t *testing.T, u use) []string {
	t.Helper()
	all := map[target.Kind]func(*testing.T) []string{
		target.Postgres: c.postgresUsers, target.MySQL: c.mariadbUsers, target.Redis: c.redisUsers, target.RabbitMQ: c.rabbitmqUsers,
	}[u.kind](t)
	if !slices.ContainsFunc(all, func(name string) bool { return name == c.targets[u.kind].AdminUser }) {
		t.Errorf("%s does not show its administrator: %v", u.kind, all)
	}
	all = slices.DeleteFunc(all, func(name string) bool { return !strings.HasPrefix(name, "kf_"+u.connection+"_") })
	slices.Sort(all)
	return slices.Compact(all)
}

func (w *world) postgresUsers(t *testing.T) (all []string) {
	t.Helper()
	admin := w.login(t, w.postgres.AdminUser, w.postgres.AdminPassword, "shop")
	defer admin.Close(w.ctx)
	if err := admin.QueryRow(w.ctx, "SELECT array_agg(rolname::text) FROM pg_roles").Scan(&all); err != nil {
		t.Fatal(err)
	}
	return all
}

// roots is the TLS configuration of somebody who trusts a server's CA.
func roots(s *targettest.Server) *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(s.CA))
	return &tls.Config{RootCAs: pool, ServerName: s.Host}
}

// openMariaDB is the administrator's way in. Who opens it closes it.
func (w *world) openMariaDB(t *testing.T) *sql.DB {
	t.Helper()
	s := w.targets[target.MySQL]
	config := mysql.NewConfig()
	config.Net, config.Addr, config.User, config.Passwd, config.TLS = "tcp", s.Address(), s.AdminUser, s.AdminPassword, roots(s)
	connector, err := mysql.NewConnector(config)
	if err != nil {
		t.Fatal(err)
	}
	return sql.OpenDB(connector)
}

// shopInMariaDB makes the database that PostgreSQL has already.
func (w *world) shopInMariaDB(t *testing.T) {
	t.Helper()
	admin := w.openMariaDB(t)
	defer admin.Close()
	if _, err := admin.ExecContext(w.ctx, "CREATE DATABASE shop"); err != nil {
		t.Fatal(err)
	}
}

// written are the rows that the clients have written where such things last.
func (w *world) written(t *testing.T) map[target.Kind]int {
	t.Helper()
	const query = "SELECT count(DISTINCT word) FROM podclient"
	var rows, my int
	admin := w.login(t, w.postgres.AdminUser, w.postgres.AdminPassword, "shop")
	defer admin.Close(w.ctx)
	if err := admin.QueryRow(w.ctx, query).Scan(&rows); err != nil {
		t.Fatal(err)
	}
	other := w.openMariaDB(t)
	defer other.Close()
	if err := other.QueryRowContext(w.ctx, strings.Replace(query, "podclient", "shop.podclient", 1)).Scan(&my); err != nil {
		t.Fatal(err)
	}
	return map[target.Kind]int{target.Postgres: rows, target.MySQL: my}
}

func (w *world) mariadbUsers(t *testing.T) (all []string) {
	t.Helper()
	admin := w.openMariaDB(t)
	defer admin.Close()
	rows, err := admin.QueryContext(w.ctx, "SELECT user FROM mysql.global_priv UNION ALL SELECT user FROM mysql.db UNION ALL SELECT user FROM information_schema.PROCESSLIST")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			t.Fatal(err)
		}
		all = append(all, name)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

// redisUsers are those that Redis has, and those that it will have after a restart.
func (w *world) redisUsers(t *testing.T) []string {
	t.Helper()
	s := w.targets[target.Redis]
	conn, err := redis.DialContext(w.ctx, "tcp", s.Address(), redis.DialUseTLS(true), redis.DialTLSConfig(roots(s)), redis.DialUsername(s.AdminUser), redis.DialPassword(s.AdminPassword))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	all, err := redis.Strings(redis.DoContext(conn, w.ctx, "ACL", "USERS"))
	if err != nil {
		t.Fatal(err)
	}
	saved, err := os.ReadFile(filepath.Join(s.Dir, "users.acl"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(saved)) {
		if words := strings.Fields(line); len(words) > 1 {
			all = append(all, words[1]) // after "user"
		}
	}
	return all
}

func (w *world) rabbitmqUsers(t *testing.T) (all []string) {
	t.Helper()
	s := w.targets[target.RabbitMQ]
	api := &http.Client{Transport: &http.Transport{TLSClientConfig: roots(s), DisableKeepAlives: true}}
	for _, list := range []string{"users", "permissions", "topic-permissions"} {
		req, err := http.NewRequestWithContext(w.ctx, http.MethodGet, s.Management+"/api/"+list, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(s.AdminUser, s.AdminPassword)
		resp, err := api.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var some []struct{ Name, User string }
		err = json.NewDecoder(resp.Body).Decode(&some)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", list, resp.Status, err)
		}
		for _, one := range some {
			all = append(all, one.Name+one.User) // it has one of them
		}
	}
	return all
}
