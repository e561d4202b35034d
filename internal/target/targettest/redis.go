//go:build linux

package targettest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strconv"
	"strings"
)

// startRedis starts Redis: TLS only, a file of logins, and no login but the
// administrator's.
func (s *Server) startRedis(ctx context.Context, o Options) error {
	p, err := getPrograms(ctx, "redis-server")
	if err != nil {
		return err
	}
	server, err := p.find("usr/bin/redis-server")
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(s.AdminPassword))
	logins, err := s.write("users.acl", "user default off\nuser "+s.AdminUser+" on #"+hex.EncodeToString(sum[:])+" ~* &* +@all\n", 0o600)
	if err != nil {
		return err
	}
	settings := append([]string{
		"port 0", "tls-port " + strconv.Itoa(s.Port), "bind " + s.Host, "dir " + s.Dir, "aclfile " + logins, "save \"\"", "loglevel debug", "tls-auth-clients no",
		"tls-cert-file " + filepath.Join(s.Dir, certFile), "tls-key-file " + filepath.Join(s.Dir, keyFile), "tls-ca-cert-file " + filepath.Join(s.Dir, caFile),
	}, o.Settings...)
	config, err := s.write("redis.conf", strings.Join(settings, "\n")+"\n", 0o600)
	if err != nil {
		return err
	}
	if err := s.run(p, nil, server, config); err != nil {
		return err
	}
	return s.ready(ctx)
}
