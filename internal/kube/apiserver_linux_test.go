package kube

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// The API server says that it is at serverIP; only network.DialContext leads there.
const serverIP = "10.0.0.1"

// cluster is a real API server on an etcd in this process, and on demand a real
// controller manager. There are no kubelets: pods exist and do not run.
type cluster struct {
	dir     string
	bin     string // folder of the programs
	ca      *pki.CA
	front   *pki.CA // for front proxies
	network network
	server  string // serverIP:port
	etcd    *embed.Etcd
}

// programs finds Kubernetes where "go run ./test/bed/cmd/bed prepare" puts it.
func programs(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("KEYFLEET_BED_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Skipf("there is no cache folder to look for kube-apiserver in: %v", err)
		}
		cache = filepath.Join(dir, "keyfleet-bed")
	}
	found, err := filepath.Glob(filepath.Join(cache, "kubernetes-*", "kube-apiserver"))
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Skipf("there is no kube-apiserver in %s; run: go run ./test/bed/cmd/bed prepare", cache)
	}
	return filepath.Dir(found[len(found)-1])
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{bin: programs(t), dir: t.TempDir(), ca: newCA(t, "kubernetes"), front: newCA(t, "front-proxy")}
	c.startEtcd(t)
	real := free(t)
	_, port, _ := net.SplitHostPort(real)
	c.server = net.JoinHostPort(serverIP, port)
	c.network = network{c.server: real}
	c.write(t, "ca.crt", c.ca.PEM())
	c.write(t, "front.crt", c.front.PEM())
	c.pair(t, "server", c.ca, pki.Template{Subject: "CN=kube-apiserver", EKUs: []string{pki.ServerAuth}, IPs: []net.IP{net.ParseIP(serverIP), net.ParseIP("127.0.0.1")}})
	c.accountKey(t)
	c.run(t, "kube-apiserver",
		"--etcd-servers=http://"+c.etcd.Clients[0].Addr().String(),
		"--bind-address=127.0.0.1", "--secure-port="+port, "--advertise-address="+serverIP, "--service-cluster-ip-range=10.96.0.0/16",
		"--tls-cert-file="+c.path("server.crt"), "--tls-private-key-file="+c.path("server.key"), "--client-ca-file="+c.path("ca.crt"),
		"--requestheader-client-ca-file="+c.path("front.crt"), "--requestheader-allowed-names=front-proxy-client", "--requestheader-username-headers=X-Remote-User",
		"--service-account-key-file="+c.path("accounts.pub"), "--service-account-signing-key-file="+c.path("accounts.key"),
		"--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC", "--shutdown-delay-duration=0s",
	)
	a := c.admin(t)
	eventually(t, "the API server is ready", func() bool { return a.Ready(t.Context()) == nil })
	return c
}

// startControllers starts the controllers that the tests need, among them the
// one that publishes the root CA and the one that makes tokens.
func (c *cluster) startControllers(t *testing.T) {
	t.Helper()
	cert, key := c.client(t, c.ca, "CN=controllers,O=system:masters")
	c.write(t, "controllers.crt", cert)
	c.write(t, "controllers.key", key)
	c.write(t, "kubeconfig", fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"c"}}],
		"clusters":[{"name":"c","cluster":{"server":"https://%s","certificate-authority":%q}}],
		"users":[{"name":"c","user":{"client-certificate":%q,"client-key":%q}}]}`, c.network[c.server], c.path("ca.crt"), c.path("controllers.crt"), c.path("controllers.key")))
	c.run(t, "kube-controller-manager", "--kubeconfig="+c.path("kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0",
		"--root-ca-file="+c.path("ca.crt"), "--service-account-private-key-file="+c.path("accounts.key"),
		"--controllers=serviceaccount-controller,serviceaccount-token-controller,root-ca-certificate-publisher-controller,deployment-controller,"+
			"replicaset-controller,daemonset-controller,statefulset-controller,job-controller,disruption-controller")
}

func (c *cluster) startEtcd(t *testing.T) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(c.dir, "etcd")
	loopback := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{loopback}, []url.URL{loopback}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{loopback}, []url.URL{loopback}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.TickMs, cfg.ElectionMs = 50, 250
	cfg.UnsafeNoFsync = true
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Server.HardStop)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(time.Minute):
		t.Fatal("etcd is not ready after a minute")
	}
	c.etcd = e
}

// run starts a program that ends with the test. What it printed last is shown if the test fails.
func (c *cluster) run(t *testing.T, name string, args ...string) {
	t.Helper()
	var output bytes.Buffer
	cmd := exec.Command(filepath.Join(c.bin, name), args...)
	cmd.Dir = c.dir
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			lines := strings.Split(output.String(), "\n")
			t.Logf("the last lines of %s:\n%s", name, strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
	})
}

func (c *cluster) path(name string) string { return filepath.Join(c.dir, name) }

func (c *cluster) write(t *testing.T, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(c.path(name), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// pair writes NAME.crt and NAME.key.
func (c *cluster) pair(t *testing.T, name string, ca *pki.CA, tmpl pki.Template) {
	t.Helper()
	cert, key := issue(t, ca, tmpl)
	c.write(t, name+".crt", cert)
	c.write(t, name+".key", key)
}

// accountKey writes the key that signs the tokens of service accounts, and its public half.
func (c *cluster) accountKey(t *testing.T) {
	t.Helper()
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	text, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	c.write(t, "accounts.key", text)
	c.write(t, "accounts.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
}

func (c *cluster) client(t *testing.T, ca *pki.CA, subject string) (cert, key []byte) {
	t.Helper()
	return issue(t, ca, pki.Template{Subject: subject, EKUs: []string{pki.ClientAuth}})
}

// admin opens the API as cluster administrator.
func (c *cluster) admin(t *testing.T) *api {
	t.Helper()
	cert, key := c.client(t, c.ca, "CN=admin,O=system:masters")
	return c.open(t, rotation.Credential{Roots: c.ca.PEM(), Cert: cert, Key: key})
}

func (c *cluster) open(t *testing.T, as rotation.Credential) *api {
	t.Helper()
	a, err := connect(c.network, c.server, as, answerTime)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// network is a rotation.Dialer: the real address by the one that is dialled.
type network map[string]string

// DialContext implements rotation.Dialer.
func (n network) DialContext(ctx context.Context, kind, address string) (net.Conn, error) {
	to, ok := n[address]
	if !ok {
		return nil, fmt.Errorf("no way to %s", address)
	}
	var d net.Dialer
	return d.DialContext(ctx, kind, to)
}

func newCA(t *testing.T, name string) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t *testing.T, ca *pki.CA, tmpl pki.Template) (cert, key []byte) {
	t.Helper()
	k, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	tmpl.KeyUsage, tmpl.NotBefore, tmpl.NotAfter = x509.KeyUsageDigitalSignature, time.Now().Add(-pki.Backdate), time.Now().Add(time.Hour)
	chain, err := ca.Issue(tmpl, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	if key, err = pki.EncodeKey(k); err != nil {
		t.Fatal(err)
	}
	return pki.EncodeChain(chain...), key
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

// eventually repeats a check until it holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !holds(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in two minutes it did not come about: %s", what)
		}
	}
}
