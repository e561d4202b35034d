//go:build linux

package targettest

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
)

// startRabbitMQ starts RabbitMQ: AMQP and the management API over TLS only. The
// Erlang node has a name, ports and an epmd of its own, all on loopback.
func (s *Server) startRabbitMQ(ctx context.Context, o Options) error {
	p, err := getPrograms(ctx, "rabbitmq-server")
	if err != nil {
		return err
	}
	erlexec, err := p.find("usr/lib/erlang/erts-*/bin/erlexec")
	if err != nil {
		return err
	}
	server, err := p.find("usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server")
	if err != nil {
		return err
	}
	management, err := freePort(s.Host)
	if err != nil {
		return err
	}
	s.Management = "https://" + net.JoinHostPort(s.Host, strconv.Itoa(management))
	if err := s.writeRabbitMQ(erlexec, management, o.Settings); err != nil {
		return err
	}
	epmd, err := freePort("127.0.0.1")
	if err != nil {
		return err
	}
	distribution, err := freePort("127.0.0.1")
	if err != nil {
		return err
	}
	if err := s.run(p, nil, filepath.Join(filepath.Dir(erlexec), "epmd"), "-address", "127.0.0.1", "-port", strconv.Itoa(epmd)); err != nil {
		return err
	}
	at := func(name string) string { return filepath.Join(s.Dir, name) }
	s.logs = append(s.logs, at("rabbit.log"))
	env := []string{
		"ERL_EPMD_PORT=" + strconv.Itoa(epmd), "ERL_EPMD_ADDRESS=127.0.0.1", "RABBITMQ_DIST_PORT=" + strconv.Itoa(distribution),
		"RABBITMQ_NODENAME=keyfleet" + strconv.Itoa(s.Port) + "@localhost", "RABBITMQ_CONF_ENV_FILE=" + at("none"),
		"RABBITMQ_CONFIG_FILE=" + at("rabbitmq.conf"), "RABBITMQ_ADVANCED_CONFIG_FILE=" + at("none.config"), "RABBITMQ_GENERATED_CONFIG_DIR=" + at("generated"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + at("enabled_plugins"), "RABBITMQ_MNESIA_BASE=" + at("mnesia"), "RABBITMQ_LOG_BASE=" + at("log"), "RABBITMQ_LOGS=" + at("rabbit.log"),
		"RABBITMQ_PID_FILE=" + at("pid"),
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-start_epmd false -kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none",
		"RUNNING_UNDER_SYSTEMD=1", // the script becomes the server, instead of waiting for it
	}
	if err := s.run(p, env, "/bin/sh", server); err != nil {
		return err
	}
	return s.ready(ctx)
}

// writeRabbitMQ writes the server's configuration, and the command "erl": Debian's
// own knows only the place where the package would be installed.
func (s *Server) writeRabbitMQ(erlexec string, management int, more []string) error {
	bin := filepath.Dir(erlexec)
	erl := fmt.Sprintf("#!/bin/sh\nexport ROOTDIR='%s' BINDIR='%s' EMU=beam PROGNAME=erl\nexec '%s' \"$@\"\n", filepath.Dir(filepath.Dir(bin)), bin, erlexec)
	tls := func(prefix string) []string {
		return []string{
			prefix + ".cacertfile = " + filepath.Join(s.Dir, caFile), prefix + ".certfile = " + filepath.Join(s.Dir, certFile), prefix + ".keyfile = " + filepath.Join(s.Dir, keyFile),
		}
	}
	settings := append([]string{
		"listeners.tcp = none", fmt.Sprintf("listeners.ssl.1 = %s:%d", s.Host, s.Port), "ssl_options.verify = verify_none", "ssl_options.fail_if_no_peer_cert = false",
		"management.ssl.ip = " + s.Host, "management.ssl.port = " + strconv.Itoa(management),
		"default_user = " + s.AdminUser, "default_pass = " + s.AdminPassword, "default_user_tags.administrator = true", "log.file.level = debug", "log.console = false",
	}, append(tls("ssl_options"), tls("management.ssl")...)...)
	if _, err := s.write("bin/erl", erl, 0o700); err != nil {
		return err
	}
	if _, err := s.write("enabled_plugins", "[rabbitmq_management].\n", 0o600); err != nil {
		return err
	}
	_, err := s.write("rabbitmq.conf", strings.Join(append(settings, more...), "\n")+"\n", 0o600)
	return err
}
