//go:build linux

package targettest

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// startMariaDB starts MariaDB: TLS, all statements logged. The administrator has
// all privileges, and there is no other account but root's on the socket.
func (s *Server) startMariaDB(ctx context.Context, o Options) error {
	p, err := getPrograms(ctx, "mariadb-server")
	if err != nil {
		return err
	}
	mariadbd, err := p.find("usr/sbin/mariadbd")
	if err != nil {
		return err
	}
	usr := filepath.Dir(filepath.Dir(mariadbd))
	data := filepath.Join(s.Dir, "data")
	install := []string{filepath.Join(usr, "bin", "mariadb-install-db"), "--no-defaults", "--basedir=" + usr, "--datadir=" + data, "--tmpdir=" + s.Dir, "--auth-root-authentication-method=normal", "--skip-test-db"}
	if err := s.once(ctx, p, "/bin/sh", install...); err != nil {
		return err
	}
	admin := fmt.Sprintf("CREATE OR REPLACE USER '%[1]s'@'%%' IDENTIFIED BY '%[2]s';\nGRANT ALL PRIVILEGES ON *.* TO '%[1]s'@'%%' WITH GRANT OPTION;\n", s.AdminUser, s.AdminPassword)
	first, err := s.write("first.sql", admin, 0o600)
	if err != nil {
		return err
	}
	log := filepath.Join(s.Dir, "statements.log")
	settings := append([]string{
		"[mariadbd]", "basedir=" + usr, "datadir=" + data, "tmpdir=" + s.Dir, "lc-messages-dir=" + filepath.Join(usr, "share", "mysql"), "plugin-dir=" + filepath.Join(usr, "lib", "mysql", "plugin"),
		"bind-address=" + s.Host, "port=" + strconv.Itoa(s.Port), "socket=" + filepath.Join(s.Dir, "socket"), "pid-file=" + filepath.Join(s.Dir, "pid"), "init-file=" + first, "skip-name-resolve",
		"ssl-ca=" + filepath.Join(s.Dir, caFile), "ssl-cert=" + filepath.Join(s.Dir, certFile), "ssl-key=" + filepath.Join(s.Dir, keyFile),
		"general-log=1", "general-log-file=" + log, "innodb-buffer-pool-size=16M", "innodb-flush-log-at-trx-commit=0", "performance-schema=off",
	}, o.Settings...)
	config, err := s.write("mariadb.cnf", strings.Join(settings, "\n")+"\n", 0o600)
	if err != nil {
		return err
	}
	s.logs = append(s.logs, log)
	if err := s.run(p, nil, mariadbd, "--defaults-file="+config); err != nil {
		return err
	}
	return s.ready(ctx)
}
