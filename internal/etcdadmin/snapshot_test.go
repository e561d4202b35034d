package etcdadmin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"keyfleet.dev/keyfleet/internal/fault"
)

func TestSnapshotIsTheDatabaseAndItsDigest(t *testing.T) {
	c := start(t, 1, nil)
	e := c.open(t)
	for i := range 20 {
		if err := e.Put(t.Context(), map[string][]byte{fmt.Sprintf("/k%d", i): bytes.Repeat([]byte{byte(i)}, 50<<10)}); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if err := e.Snapshot(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	database, digest := b.Bytes()[:b.Len()-sha256.Size], b.Bytes()[b.Len()-sha256.Size:]
	if sum := sha256.Sum256(database); !bytes.Equal(sum[:], digest) {
		t.Error("it does not end in the digest that etcdutl looks for")
	}
	path := filepath.Join(t.TempDir(), "db")
	if err := os.WriteFile(path, database, 0o600); err != nil {
		t.Fatal(err)
	}
	db := backend.NewDefaultBackend(zap.NewNop(), path)
	defer db.Close()
	n := 0
	if err := db.ReadTx().UnsafeForEach(schema.Key, func(_, v []byte) error {
		n += bytes.Count(v, []byte("/k"))
		return nil
	}); err != nil || n != 20 {
		t.Errorf("%d of 20 keys are in the snapshot, %v", n, err)
	}
}

type full struct{ after int }

func (f *full) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, errors.New("the disk is full")
	}
	return len(p), nil
}

func TestSnapshotThatCannotBeWritten(t *testing.T) {
	c := start(t, 1, nil)
	e := c.open(t)
	if err := e.Put(t.Context(), map[string][]byte{"/k": make([]byte, 500<<10)}); err != nil {
		t.Fatal(err)
	}
	if err := e.Snapshot(t.Context(), &full{after: 100 << 10}); err == nil || !strings.Contains(err.Error(), "writing the snapshot: the disk is full") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := e.Snapshot(ctx, stops{cancel}); !errors.Is(err, context.Canceled) {
		t.Errorf("the caller gave up: %v", err)
	}
}

// stops ends the caller's context while the snapshot is written.
type stops struct{ cancel func() }

func (s stops) Write(p []byte) (int, error) {
	s.cancel()
	return len(p), nil
}

// mangler is an etcd that passes everything on to a real one and damages snapshots.
type mangler struct {
	pb.UnimplementedMaintenanceServer
	pb.UnimplementedClusterServer
	to     *clientv3.Client
	damage func(n int, blob []byte) ([]byte, error)
}

func (m *mangler) MemberList(ctx context.Context, r *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	return pb.NewClusterClient(m.to.ActiveConnection()).MemberList(ctx, r)
}

func (m *mangler) Status(ctx context.Context, r *pb.StatusRequest) (*pb.StatusResponse, error) {
	return pb.NewMaintenanceClient(m.to.ActiveConnection()).Status(ctx, r)
}

func (m *mangler) Snapshot(r *pb.SnapshotRequest, out pb.Maintenance_SnapshotServer) error {
	in, err := pb.NewMaintenanceClient(m.to.ActiveConnection()).Snapshot(out.Context(), r)
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		piece, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if piece.Blob, err = m.damage(n, piece.Blob); err != nil {
			return err
		}
		if err := out.Send(piece); err != nil {
			return err
		}
	}
}

// serve puts a mangler in front of the cluster's only member, at the member's address.
func (m *mangler) serve(t *testing.T, c *cluster) {
	t.Helper()
	cert, key := issue(t, c.ca, "mangler", host(0))
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: c.ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert})))
	pb.RegisterMaintenanceServer(s, m)
	pb.RegisterClusterServer(s, m)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() { s.Stop(); <-done })
	c.network.set(endpoints(1)[0], l.Addr().String())
}

func TestDamagedSnapshotIsRefused(t *testing.T) {
	c := start(t, 1, nil)
	direct := c.open(t)
	if err := direct.Put(t.Context(), map[string][]byte{"/k": make([]byte, 500<<10)}); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		damage func(n int, blob []byte) ([]byte, error)
		text   string // empty: it arrives whole
	}{
		"nothing": {func(_ int, b []byte) ([]byte, error) { return b, nil }, ""},
		"one bit": {func(n int, b []byte) ([]byte, error) {
			if n == 1 {
				b[100] ^= 1
			}
			return b, nil
		}, "damaged"},
		"a piece is missing": {func(n int, b []byte) ([]byte, error) {
			if n == 2 {
				return nil, nil
			}
			return b, nil
		}, "damaged"},
		"no digest": {func(_ int, b []byte) ([]byte, error) {
			if len(b) == sha256.Size {
				return nil, nil
			}
			return b, nil
		}, "damaged"},
		"it is empty": {func(int, []byte) ([]byte, error) { return nil, nil }, "damaged"},
		"it breaks off": {func(n int, b []byte) ([]byte, error) {
			if n == 2 {
				return nil, status.Error(codes.Unavailable, "the member was stopped")
			}
			return b, nil
		}, "the member was stopped"},
	} {
		t.Run(name, func(t *testing.T) {
			(&mangler{to: direct.(*admin).client, damage: test.damage}).serve(t, c)
			e := c.open(t)
			err := e.Snapshot(t.Context(), new(bytes.Buffer))
			if test.text == "" && err == nil {
				return
			}
			if test.text == "" || !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestStalledReadIsGivenUp(t *testing.T) {
	r, w := io.Pipe()
	in := impatient{r, 20 * time.Millisecond, func() { _ = w.CloseWithError(errStalled) }}
	if _, err := in.Read(make([]byte, 1)); !errors.Is(err, errStalled) {
		t.Errorf("%v", err)
	}
}
