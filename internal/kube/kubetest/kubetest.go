//go:build linux

// Package kubetest is a real API server on an etcd in this process, and on demand a
// real controller manager, for tests. There are no kubelets: pods exist and do not run.
package kubetest

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"keyfleet.dev/keyfleet/internal/pki"
)

// ServerIP is where the API server says that it is; it listens on loopback.
const ServerIP = "10.0.0.1"

// Cluster is a running API server.
type Cluster struct {
	Dir   string
	CA    *pki.CA
	Front *pki.CA // for front proxies
	Port  string  // of the API server, on 127.0.0.1
	Etcd  *embed.Etcd

	bin  string // folder of the programs
	stop func() // ends the API server
}

// programs finds Kubernetes where "go run ./test/bed/cmd/bed prepare" puts it.
func programs(t testing.TB) string {
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

// Start starts an API server that ends with the test. The test is left out, with
// the reason, where its program was not built yet.
func Start(t testing.TB) *Cluster {
	t.Helper()
	c := &Cluster{bin: programs(t), Dir: t.TempDir(), CA: NewCA(t, "kubernetes"), Front: NewCA(t, "front-proxy"), Port: Free(t)}
	c.startEtcd(t)
	c.Write(t, "ca.crt", c.CA.PEM())
	c.Write(t, "front.crt", c.Front.PEM())
	c.pair(t, "server", c.CA, pki.Template{Subject: "CN=kube-apiserver", EKUs: []string{pki.ServerAuth}, IPs: []net.IP{net.ParseIP(ServerIP), net.ParseIP("127.0.0.1")}})
	c.accountKey(t)
	c.stop = c.run(t, "kube-apiserver",
		"--etcd-servers=http://"+c.Etcd.Clients[0].Addr().String(),
		"--bind-address=127.0.0.1", "--secure-port="+c.Port, "--advertise-address="+ServerIP, "--service-cluster-ip-range=10.96.0.0/16",
		"--tls-cert-file="+c.Path("server.crt"), "--tls-private-key-file="+c.Path("server.key"), "--client-ca-file="+c.Path("ca.crt"),
		"--requestheader-client-ca-file="+c.Path("front.crt"), "--requestheader-allowed-names=front-proxy-client", "--requestheader-username-headers=X-Remote-User",
		"--service-account-key-file="+c.Path("accounts.pub"), "--service-account-signing-key-file="+c.Path("accounts.key"),
		"--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC", "--shutdown-delay-duration=0s",
	)
	c.awaitReady(t)
	return c
}

// awaitReady waits until the API server says that it is ready.
func (c *Cluster) awaitReady(t testing.TB) {
	t.Helper()
	cert, key := c.Client(t, c.CA, "CN=admin,O=system:masters")
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.CA.PEM())
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}}
	defer client.CloseIdleConnections()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		reply, err := client.Get("https://127.0.0.1:" + c.Port + "/readyz")
		if err == nil {
			_ = reply.Body.Close()
			if reply.StatusCode == http.StatusOK {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatalf("the API server is not ready after two minutes: %v", err)
		}
	}
}

// Kubeconfig is one of the cluster's administrator, with everything inside.
func (c *Cluster) Kubeconfig(t testing.TB) []byte {
	t.Helper()
	cert, key := c.Client(t, c.CA, "CN=admin,O=system:masters")
	return c.kubeconfig(t, map[string]any{"client-certificate-data": cert, "client-key-data": key})
}

// TokenKubeconfig is one with a token.
func (c *Cluster) TokenKubeconfig(t testing.TB, token string) []byte {
	t.Helper()
	return c.kubeconfig(t, map[string]any{"token": token})
}

func (c *Cluster) kubeconfig(t testing.TB, user map[string]any) []byte {
	t.Helper()
	named := func(kind string, v any) []any { return []any{map[string]any{"name": "c", kind: v}} }
	text, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": named("cluster", map[string]any{"server": "https://127.0.0.1:" + c.Port, "certificate-authority-data": c.CA.PEM()}),
		"users":    named("user", user), "contexts": named("context", map[string]string{"cluster": "c", "user": "c"}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// StartControllers starts the controllers that tests need, among them the one that
// publishes the root CA and the one that makes tokens.
func (c *Cluster) StartControllers(t testing.TB) {
	t.Helper()
	c.Write(t, "kubeconfig", c.Kubeconfig(t))
	c.run(t, "kube-controller-manager", "--kubeconfig="+c.Path("kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0",
		"--root-ca-file="+c.Path("ca.crt"), "--service-account-private-key-file="+c.Path("accounts.key"),
		"--controllers=serviceaccount-controller,serviceaccount-token-controller,root-ca-certificate-publisher-controller,deployment-controller,"+
			"replicaset-controller,daemonset-controller,statefulset-controller,job-controller,disruption-controller")
}

func (c *Cluster) startEtcd(t testing.TB) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(c.Dir, "etcd")
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
	c.Etcd = e
}

// Stop ends the API server, as if it had crashed.
func (c *Cluster) Stop() { c.stop() }

// run starts a program that ends with the test, or when the function that it
// returns is called. What it printed last is shown if the test fails.
func (c *Cluster) run(t testing.TB, name string, args ...string) (stop func()) {
	t.Helper()
	var output bytes.Buffer
	cmd := exec.Command(filepath.Join(c.bin, name), args...)
	cmd.Dir = c.Dir
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			lines := strings.Split(output.String(), "\n")
			t.Logf("the last lines of %s:\n%s", name, strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
	})
	return stop
}

// Path is that of a file of the cluster.
func (c *Cluster) Path(name string) string { return filepath.Join(c.Dir, name) }

// Write writes a file of the cluster.
func (c *Cluster) Write(t testing.TB, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(c.Path(name), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// pair writes NAME.crt and NAME.key.
func (c *Cluster) pair(t testing.TB, name string, ca *pki.CA, tmpl pki.Template) {
	t.Helper()
	cert, key := Issue(t, ca, tmpl)
	c.Write(t, name+".crt", cert)
	c.Write(t, name+".key", key)
}

// accountKey writes the key that signs the tokens of service accounts, and its public half.
func (c *Cluster) accountKey(t testing.TB) {
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
	c.Write(t, "accounts.key", text)
	c.Write(t, "accounts.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
}

// Client makes a client certificate.
func (c *Cluster) Client(t testing.TB, ca *pki.CA, subject string) (cert, key []byte) {
	t.Helper()
	return Issue(t, ca, pki.Template{Subject: subject, EKUs: []string{pki.ClientAuth}})
}

// NewCA makes a CA.
func NewCA(t testing.TB, name string) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// Issue makes a certificate that is valid for an hour.
func Issue(t testing.TB, ca *pki.CA, tmpl pki.Template) (cert, key []byte) {
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

// Free returns a port of loopback on which nobody listens at the moment. It is below
// the range from which connections and listeners on port 0 get theirs, so that none
// of them takes it before the program that it is for.
func Free(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(12000 + rand.IntN(18000))
		l, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			continue
		}
		_ = l.Close()
		return port
	}
	t.Fatal("no port is free")
	return ""
}
