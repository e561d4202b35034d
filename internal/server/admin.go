package server

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"strings"

	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/seal"
)

// AdminSocket is the path of the socket on which a running server answers the
// owner of its data directory, who needs no token: file permissions decide.
func AdminSocket(dataDir string) string { return filepath.Join(dataDir, "run", "admin.sock") }

func listenAdmin(dataDir string) (net.Listener, error) {
	path := AdminSocket(dataDir)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing an old admin socket: %w", err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("opening the folder of sockets: %w", err)
	}
	defer dir.Close()
	// By descriptor: a socket's address is at most 108 bytes long (unix(7)).
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/admin.sock", dir.Fd()))
	if err != nil {
		return nil, fmt.Errorf("listening on the admin socket: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protecting the admin socket: %w", err), l.Close())
	}
	return l, nil
}

// adminHandler serves the admin socket.
func (s *Server) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /backup", s.serveBackup)
	mux.HandleFunc("GET /dump", s.serveDump)
	mux.HandleFunc("POST /reseal", s.serveReseal)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	return mux
}

// trailer tells the client of a streamed answer whether it ended well.
const trailer = "Keyfleet-Error"

// stream writes an answer whose failure can come late: the trailer says so.
func (s *Server) stream(w http.ResponseWriter, what string, write func() error) {
	w.Header().Set("Trailer", trailer)
	if err := write(); err != nil {
		s.log.Error("the owner's request failed", "what", what, "error", err)
		w.Header().Set(trailer, strings.ReplaceAll(err.Error(), "\n", " "))
		return
	}
	w.Header().Set(trailer, "")
}

func (s *Server) serveBackup(w http.ResponseWriter, r *http.Request) {
	s.stream(w, "backup", func() error { return backup(r.Context(), s.backend, s.keyset, w) })
}

func (s *Server) serveDump(w http.ResponseWriter, r *http.Request) {
	reveal := r.URL.Query().Get("reveal") == "true"
	s.stream(w, "dump", func() error {
		return store.Dump(r.Context(), seal.Wrap(s.backend, s.keyset), w, store.DumpOptions{Prefix: r.URL.Query().Get("prefix"), Reveal: reveal})
	})
}

func (s *Server) serveReseal(w http.ResponseWriter, r *http.Request) {
	s.stream(w, "reseal", func() error {
		n, err := seal.Rotate(r.Context(), s.backend, s.keyset)
		fmt.Fprintf(w, "%d values sealed by a new key\n", n)
		return err
	})
}
