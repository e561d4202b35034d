package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/etcd"
	"keyfleet.dev/keyfleet/internal/store/seal"
)

// Maintenance is what the owner of a data directory does to it, whether the
// server is running (then through its admin socket) or not.
type Maintenance struct {
	DataDir       string
	EtcdEndpoints []string     // as the server's
	Log           *slog.Logger // nil: slog.Default()
}

// Backup writes a sealed backup of everything in the store.
func (m Maintenance) Backup(ctx context.Context, w io.Writer) error {
	return m.do(ctx, http.MethodGet, "/backup", w, func(b *etcd.Backend, k *seal.Keyset) error { return backup(ctx, b, k, w) })
}

// Dump writes every key and value as JSON lines; secret members are hidden unless reveal is set.
func (m Maintenance) Dump(ctx context.Context, w io.Writer, prefix string, reveal bool) error {
	path := fmt.Sprintf("/dump?prefix=%s&reveal=%t", prefix, reveal)
	return m.do(ctx, http.MethodGet, path, w, func(b *etcd.Backend, k *seal.Keyset) error {
		return store.Dump(ctx, seal.Wrap(b, k), w, store.DumpOptions{Prefix: prefix, Reveal: reveal})
	})
}

// Reseal replaces the sealing key and rewrites every value under the new one.
func (m Maintenance) Reseal(ctx context.Context, w io.Writer) error {
	return m.do(ctx, http.MethodPost, "/reseal", w, func(b *etcd.Backend, k *seal.Keyset) error {
		n, err := seal.Rotate(ctx, b, k)
		fmt.Fprintf(w, "%d values sealed by a new key\n", n)
		return err
	})
}

// Restore makes the data directory from a backup and puts a copy of the KEK
// into it; every value was opened before. The directory must be absent or empty.
func (m Maintenance) Restore(ctx context.Context, r io.Reader, kekFile string) (entries int, err error) {
	kek, err := seal.FileKEK(kekFile, false)
	if err != nil {
		return 0, fmt.Errorf("opening the KEK: %w", err)
	}
	_, n, err := etcd.Restore(ctx, r, m.DataDir, opener(kek), m.log())
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(kekFile)
	if err != nil {
		return 0, fmt.Errorf("reading the KEK: %w", err)
	}
	return n, writeFile(filepath.Join(m.DataDir, "kek"), text)
}

// Verify reads a whole backup and opens every value.
func (m Maintenance) Verify(r io.Reader, kekFile string) (entries int, err error) {
	kek, err := seal.FileKEK(kekFile, false)
	if err != nil {
		return 0, fmt.Errorf("opening the KEK: %w", err)
	}
	_, n, err := etcd.Verify(r, opener(kek))
	return n, err
}

func opener(kek seal.KEK) etcd.Check {
	return func(h etcd.Header) (func(string, []byte) error, error) {
		k, err := seal.ParseKeyset(h.Files[seal.KeysetFile], kek)
		if err != nil {
			return nil, fmt.Errorf("opening the backup's keyset: %w", err)
		}
		return func(key string, value []byte) error {
			if strings.HasPrefix(key, "/leader/") { // the only values that are not sealed
				return nil
			}
			_, err := k.Open(key, value)
			return err
		}, nil
	}
}

// backup writes a backup while the keyset stays as it is.
func backup(ctx context.Context, b *etcd.Backend, k *seal.Keyset, w io.Writer) error {
	return k.Steady(func(wrapped []byte) error {
		_, err := etcd.Backup(ctx, b, w, map[string][]byte{seal.KeysetFile: wrapped})
		return err
	})
}

// do asks the running server, or works on the directory itself if none runs.
func (m Maintenance) do(ctx context.Context, method, path string, w io.Writer, offline func(*etcd.Backend, *seal.Keyset) error) error {
	done, err := m.ask(ctx, method, path, w)
	if done || err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(m.DataDir, seal.KeysetFile)); err != nil {
		return fault.New(fault.NotFound, "NoDataDirectory", "%s is not the data directory of a server.", m.DataDir).WithFix("name the directory with --data-dir").Because(err)
	}
	b, err := etcd.Open(ctx, etcd.Config{Dir: m.DataDir, Endpoints: m.EtcdEndpoints, Log: m.log()})
	if err != nil {
		return fmt.Errorf("opening the store: %w", err)
	}
	k, err := seal.OpenKeyset(m.DataDir, nil)
	if err == nil {
		err = offline(b, k)
	}
	return errors.Join(err, b.Close())
}

// ask sends the request to the running server; done is false if there is none.
func (m Maintenance) ask(ctx context.Context, method, path string, w io.Writer) (done bool, err error) {
	dir, err := os.Open(filepath.Dir(AdminSocket(m.DataDir)))
	if err != nil {
		return false, nil // no such folder: no server has run here
	}
	defer dir.Close()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/admin.sock", dir.Fd()))
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://server"+path, nil)
	if err != nil {
		return false, err
	}
	resp, err := client.Do(req)
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return false, nil
	}
	if err != nil {
		return true, fmt.Errorf("asking the running server: %w", err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return true, fmt.Errorf("reading the running server's answer: %w", err)
	}
	if text := resp.Trailer.Get(trailer); text != "" {
		return true, fault.New(fault.Internal, "", "The running server could not do it: %s", text)
	}
	return true, nil
}

func (m Maintenance) log() *slog.Logger {
	if m.Log == nil {
		return slog.Default()
	}
	return m.Log
}
