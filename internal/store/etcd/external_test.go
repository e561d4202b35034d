package etcd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/storetest"
)

// cluster is an etcd of one member with a client listener, as an operator would run it.
func cluster(t *testing.T, change func(*embed.Config)) (endpoint string) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	loopback := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{loopback}, []url.URL{loopback}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{loopback}, []url.URL{loopback}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.TickMs, cfg.ElectionMs = 50, 250
	cfg.UnsafeNoFsync = true
	cfg.MaxTxnOps = maxTxnOps
	cfg.MaxRequestBytes = maxRequest
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newLogger(slog.New(slog.DiscardHandler), nil))
	if change != nil {
		change(cfg)
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	within(t, e.Server.ReadyNotify())
	return e.Clients[0].Addr().String()
}

// dial connects to an external cluster, and closes with the test.
func dial(t *testing.T, c Config) *Backend {
	t.Helper()
	c.Log = slog.New(slog.DiscardHandler)
	b, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func TestExternalConforms(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Backend {
		return dial(t, Config{Endpoints: []string{"http://" + cluster(t, nil)}})
	})
}

// proxy forwards connections and can cut them all.
type proxy struct {
	listener net.Listener

	mu    sync.Mutex // guards the fields below
	conns []net.Conn
	down  bool
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil || !p.keep(in, out) {
				_ = in.Close()
				continue
			}
			all.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
			all.Go(func() { _, _ = io.Copy(in, out); _ = in.Close() })
		}
	})
	t.Cleanup(func() { _ = l.Close(); p.cut(true); all.Wait() })
	return p
}

func (p *proxy) keep(cs ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		for _, c := range cs {
			_ = c.Close()
		}
		return false
	}
	p.conns = append(p.conns, cs...)
	return true
}

// cut closes all connections, and refuses new ones if down.
func (p *proxy) cut(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns, p.down = nil, down
}

func TestWatchResumesOverALostConnection(t *testing.T) {
	addr := cluster(t, nil)
	direct := dial(t, Config{Endpoints: []string{"http://" + addr}})
	p := newProxy(t, addr)
	b := dial(t, Config{Endpoints: []string{"http://" + p.listener.Addr().String()}})
	rev := commit(t, direct, put("/t/n", "start"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watch := b.Watch(ctx, "/t/", rev)
	for i := range 30 {
		want := string(rune('A' + i))
		if i%10 == 5 {
			p.cut(true) // the change below happens while there is no connection
		}
		commit(t, direct, put("/t/n", want))
		p.cut(false)
		batch := within(t, watch)
		if batch.Err != nil || len(batch.Events) != 1 || string(batch.Events[0].Value) != want {
			t.Fatalf("change %d after lost connections: %+v", i, batch)
		}
	}
}

func TestNoAnswerIsUnavailableWithAWayOut(t *testing.T) {
	p := newProxy(t, cluster(t, nil))
	b := dial(t, Config{Endpoints: []string{"http://" + p.listener.Addr().String()}})
	commit(t, b, put("/t/a", "1"))
	p.cut(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := b.Commit(ctx, nil, []store.Write{put("/t/a", "2")})
	if f := fault.From(err); !errors.Is(err, fault.Unavailable) || f.Fix == "" || f.RetryAfter == 0 || !strings.Contains(f.Message, p.listener.Addr().String()) {
		t.Errorf("without a connection: %v", err)
	}
	p.cut(false)
	deadline := time.Now().Add(time.Minute)
	for err = errors.New("not tried"); err != nil && time.Now().Before(deadline); {
		_, err = b.Commit(t.Context(), nil, []store.Write{put("/t/a", "3")})
	}
	if err != nil {
		t.Errorf("after the connection came back: %v", err)
	}
}

func TestOpenSaysThatNobodyAnswers(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := Open(ctx, Config{Endpoints: []string{"http://127.0.0.1:1"}, Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("no etcd there: %v", err)
	}
}

func TestExternalWithClientCertificates(t *testing.T) {
	dir := t.TempDir()
	pool, cert := selfSigned(t, dir)
	addr := cluster(t, func(c *embed.Config) {
		c.ListenClientUrls[0].Scheme, c.AdvertiseClientUrls[0].Scheme = "https", "https"
		c.ClientTLSInfo.CertFile, c.ClientTLSInfo.KeyFile = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
		c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.ClientCertAuth = filepath.Join(dir, "cert"), true
	})
	b := dial(t, Config{Endpoints: []string{"https://" + addr}, TLS: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}})
	commit(t, b, put("/t/a", "1"))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := Open(ctx, Config{Endpoints: []string{"https://" + addr}, TLS: &tls.Config{RootCAs: pool}, Log: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("opened without a client certificate")
	}
}

// selfSigned makes a certificate for loopback, for both sides, and writes it to dir.
func selfSigned(t *testing.T, dir string) (*x509.CertPool, tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"cert": {Type: "CERTIFICATE", Bytes: der}, "key": {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(leaf)
	return pool, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
