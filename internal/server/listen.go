package server

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/provider/local"
)

// listeners are where the server is reached.
type listeners struct {
	tls   []net.Listener // the port, and the socket that local nodes use
	admin net.Listener   // for whoever owns the data directory
}

func (s *Server) listen() (out listeners, err error) {
	port, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return out, fault.New(fault.Unavailable, "AddressInUse", "The server cannot listen on %s.", s.cfg.Listen).
			WithFix("choose another address with --listen, or end the program that uses it").Because(err)
	}
	nodes, err := local.ListenUnix(s.cfg.DataDir)
	if err != nil {
		return out, errors.Join(fmt.Errorf("listening for local nodes: %w", err), port.Close())
	}
	admin, err := listenAdmin(s.cfg.DataDir)
	if err != nil {
		return out, errors.Join(err, port.Close(), nodes.Close())
	}
	return listeners{tls: []net.Listener{port, nodes}, admin: admin}, nil
}

// handler finds the edge by host name.
func (s *Server) handler() http.Handler {
	node := "node." + s.cfg.Domain
	own := s.ownHandler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := strings.ToLower(r.Host)
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		switch {
		case host == node:
			s.edge.ServeHTTP(w, r)
		case r.URL.Path == "/healthz" || r.URL.Path == "/metrics":
			own.ServeHTTP(w, r)
		default:
			s.api.ServeHTTP(w, r)
		}
	})
}

// writeFile writes a file with mode 0600 so that it is there whole or not at all.
func writeFile(path string, content []byte) error {
	if old, err := os.ReadFile(path); err == nil && string(old) == string(content) {
		return nil
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	if _, err = f.Write(content); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = effect.Do("rename "+filepath.Base(path), func() error { return os.Rename(f.Name(), path) })
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing %s: %w", dir, err)
	}
	return nil
}
