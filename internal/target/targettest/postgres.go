//go:build linux

package targettest

import (
	"context"
	"path/filepath"
	"strconv"
	"strings"
)

// startPostgres starts PostgreSQL: SCRAM over TLS only, all statements logged. The
// administrator is a superuser.
func (s *Server) startPostgres(ctx context.Context, o Options) error {
	p, err := getPrograms(ctx, "postgresql")
	if err != nil {
		return err
	}
	initdb, err := p.find("usr/lib/postgresql/*/bin/initdb")
	if err != nil {
		return err
	}
	password, err := s.write("admin.txt", s.AdminPassword+"\n", 0o600)
	if err != nil {
		return err
	}
	data := filepath.Join(s.Dir, "data")
	if err := s.once(ctx, p, initdb, "--pgdata="+data, "--username="+s.AdminUser, "--pwfile="+password, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"); err != nil {
		return err
	}
	access, err := s.write("pg_hba.conf", "hostssl all all all scram-sha-256\n", 0o600)
	if err != nil {
		return err
	}
	settings := append([]string{
		"listen_addresses = '" + s.Host + "'", "port = " + strconv.Itoa(s.Port), "unix_socket_directories = ''", "hba_file = '" + access + "'",
		"ssl = on", "ssl_ca_file = '" + filepath.Join(s.Dir, caFile) + "'", "ssl_cert_file = '" + filepath.Join(s.Dir, certFile) + "'", "ssl_key_file = '" + filepath.Join(s.Dir, keyFile) + "'",
		"password_encryption = 'scram-sha-256'", "fsync = off", "shared_buffers = '16MB'", "max_connections = 60",
		"log_statement = 'all'", "log_connections = on", "log_min_messages = 'info'", "log_min_error_statement = 'info'", "log_parameter_max_length_on_error = -1",
	}, o.Settings...)
	config, err := s.write("postgresql.conf", strings.Join(settings, "\n")+"\n", 0o600)
	if err != nil {
		return err
	}
	if err := s.run(p, nil, filepath.Join(filepath.Dir(initdb), "postgres"), "-D", data, "--config-file="+config); err != nil {
		return err
	}
	return s.ready(ctx)
}
