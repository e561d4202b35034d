package etcdadmin

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// cluster is a real etcd: members in this process, with TLS and client
// certificates on both ports. Clients find it only through its network, at
// addresses 10.0.0.N:2379 that nothing else leads to.
type cluster struct {
	ca      *pki.CA
	dir     string
	network *network
	peers   []string // the real URLs of the peer ports
	members []*embed.Etcd
	stop    []func() // ends a member
}

// host is the address of a member, counted from 0.
func host(n int) string { return fmt.Sprintf("10.0.0.%d", n+1) }

func endpoints(n int) (out []string) {
	for i := range n {
		out = append(out, host(i)+":2379")
	}
	return out
}

func newCA(t *testing.T, name string) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// issue signs a certificate for both sides.
func issue(t *testing.T, ca *pki.CA, name string, ips ...string) (cert, key []byte) {
	t.Helper()
	k, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := pki.Template{
		Subject: "CN=" + name, EKUs: []string{pki.ServerAuth, pki.ClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-pki.Backdate), NotAfter: time.Now().Add(time.Hour),
	}
	for _, ip := range ips {
		tmpl.IPs = append(tmpl.IPs, net.ParseIP(ip))
	}
	chain, err := ca.Issue(tmpl, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	if key, err = pki.EncodeKey(k); err != nil {
		t.Fatal(err)
	}
	return pki.EncodeChain(chain...), key
}

// administrator is a credential that the cluster accepts.
func administrator(t *testing.T, ca *pki.CA) rotation.Credential {
	t.Helper()
	cert, key := issue(t, ca, "administrator")
	return rotation.Credential{Roots: ca.PEM(), Cert: cert, Key: key}
}

// start starts a cluster of n members and waits until all are ready.
func start(t *testing.T, n int, change func(*embed.Config)) *cluster {
	t.Helper()
	c := &cluster{ca: newCA(t, "etcd"), dir: t.TempDir(), network: &network{to: map[string]string{}}}
	if err := os.WriteFile(filepath.Join(c.dir, "ca"), c.ca.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	for range n {
		c.peers = append(c.peers, "https://"+free(t))
	}
	for i := range n {
		c.run(t, i, "new", c.initial(n), change)
	}
	for _, e := range c.members {
		within(t, e.Server.ReadyNotify())
	}
	return c
}

func (c *cluster) initial(n int) string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("m%d=%s", i, c.peers[i]))
	}
	return strings.Join(all, ",")
}

// run starts one member, which ends with the test.
func (c *cluster) run(t *testing.T, i int, state, initial string, change func(*embed.Config)) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = fmt.Sprintf("m%d", i), filepath.Join(c.dir, fmt.Sprintf("m%d", i))
	cfg.InitialCluster, cfg.ClusterState = initial, state
	peer := parse(t, c.peers[i])
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.ListenClientUrls = []url.URL{{Scheme: "https", Host: "127.0.0.1:0"}}
	cfg.AdvertiseClientUrls = []url.URL{{Scheme: "https", Host: host(i) + ":2379"}}
	c.certify(t, i, c.ca)
	for _, info := range []*struct{ cert, key, ca *string }{
		{&cfg.ClientTLSInfo.CertFile, &cfg.ClientTLSInfo.KeyFile, &cfg.ClientTLSInfo.TrustedCAFile},
		{&cfg.PeerTLSInfo.CertFile, &cfg.PeerTLSInfo.KeyFile, &cfg.PeerTLSInfo.TrustedCAFile},
	} {
		*info.cert, *info.key, *info.ca = c.file(i, "cert"), c.file(i, "key"), filepath.Join(c.dir, "ca")
	}
	cfg.ClientTLSInfo.ClientCertAuth, cfg.PeerTLSInfo.ClientCertAuth = true, true
	cfg.TickMs, cfg.ElectionMs = 50, 500
	cfg.UnsafeNoFsync = true
	cfg.EnableGRPCGateway = false
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	if change != nil {
		change(cfg)
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(e.Close)
	t.Cleanup(stop)
	c.members, c.stop = append(c.members, e), append(c.stop, stop)
	c.network.set(host(i)+":2379", e.Clients[0].Addr().String())
}

func (c *cluster) file(i int, name string) string {
	return filepath.Join(c.dir, fmt.Sprintf("m%d.%s", i, name))
}

// certify gives a member a certificate of a CA; a running member uses it from
// the next connection on.
func (c *cluster) certify(t *testing.T, i int, ca *pki.CA) {
	t.Helper()
	cert, key := issue(t, ca, fmt.Sprintf("m%d", i), host(i), "127.0.0.1")
	for name, text := range map[string][]byte{"cert": cert, "key": key} {
		if err := os.WriteFile(c.file(i, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// open connects as an administrator, to all members.
func (c *cluster) open(t *testing.T) rotation.Etcd {
	t.Helper()
	e, err := Opener(c.network)(t.Context(), endpoints(len(c.members)), administrator(t, c.ca))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// network is a rotation.Dialer that knows where the addresses of a cluster are.
type network struct {
	mu   sync.Mutex // guards the fields below
	to   map[string]string
	open int
}

func (n *network) set(address, to string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.to[address] = to
}

// DialContext implements rotation.Dialer.
func (n *network) DialContext(ctx context.Context, kind, address string) (net.Conn, error) {
	n.mu.Lock()
	to := n.to[address]
	n.mu.Unlock()
	if to == "" {
		return nil, fmt.Errorf("no way to %s", address)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, kind, to)
	if err != nil {
		return nil, err
	}
	n.count(1)
	return &counted{Conn: c, closed: sync.OnceFunc(func() { n.count(-1) })}, nil
}

func (n *network) count(by int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open += by
}

func (n *network) connections() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.open
}

type counted struct {
	net.Conn
	closed func()
}

func (c *counted) Close() error {
	c.closed()
	return c.Conn.Close()
}

// free returns a loopback address that nobody listens on at the moment.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func parse(t *testing.T, text string) url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return *u
}

// within receives from a channel, or fails the test after a minute.
func within[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(time.Minute):
		t.Fatal("nothing happened for a minute")
	}
	return v
}

// eventually repeats a check until it holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in a minute it did not come about: %s", what)
		}
	}
}
