package system

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/mvcc"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

// succeeds runs keyfleet-server on a data directory and returns its output.
func (s *system) succeeds(dir string, args ...string) string {
	s.T.Helper()
	out, stderr, exit := s.program("keyfleet-server", append(args, "--data-dir", dir)...)
	if exit != 0 {
		s.T.Fatalf("keyfleet-server %s: exit %d: %s", strings.Join(args, " "), exit, stderr)
	}
	return out
}

// fails runs keyfleet-server on a data directory; it must refuse and say all of it.
func (s *system) fails(dir string, says []string, args ...string) {
	s.T.Helper()
	_, stderr, exit := s.program("keyfleet-server", append(args, "--data-dir", dir)...)
	if exit != 1 {
		s.T.Errorf("keyfleet-server %s: exit %d, want 1", strings.Join(args, " "), exit)
	}
	for _, text := range says {
		if !strings.Contains(stderr, text) {
			s.T.Errorf("keyfleet-server %s does not say %q:\n%s", strings.Join(args, " "), text, stderr)
		}
	}
}

// secretValue is what the tests of the store look for where it must not be.
const secretValue = "correct-horse-battery-staple"

// TestBackupAndRestore: a backup of the running server becomes another server
// with the same vaults and the same administrator, and other entity tags.
func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	s := start(t, stack.Config{})
	group := s.group("rg")
	s.vault(group, "vault1")
	s.call(http.MethodPut, s.Client.Vault("vault1", "/secrets/db"), "7.4", object{"value": secretValue}, nil)
	s.certificate("vault1", "web", nil)
	const account = "/providers/Microsoft.Batch/batchAccounts/acct1"
	s.account(group+account, "westus2")
	id, clientID, _ := s.identity(group, "nodes")
	f := &fleet{system: s, group: group, identityID: id, clientID: clientID}
	var before struct{ Etag string }
	s.put(f.poolPath("p1"), "2021-01-01", f.poolBody(0), &before)

	backup, kek := filepath.Join(t.TempDir(), "backup"), filepath.Join(s.Dir, "kek")
	s.succeeds(s.Dir, "backup", backup)
	text, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(text, []byte(secretValue)) || bytes.Contains(text, []byte("PRIVATE KEY")) {
		t.Error("the backup shows secrets")
	}
	if out := s.succeeds(s.Dir, "verify", backup, "--kek", kek); !strings.Contains(out, "all of them open") {
		t.Errorf("verify says %q", out)
	}
	s.refusedBackups(backup, text, kek)

	restored := filepath.Join(t.TempDir(), "restored")
	if out := s.succeeds(restored, "restore", backup, "--kek", kek); !strings.Contains(out, "all of them open") {
		t.Errorf("restore says %q", out)
	}
	s.fails(restored, []string{"empty"}, "restore", backup, "--kek", kek) // never over something
	admin, err := client.ReadAdmin(s.Dir)
	if err != nil {
		t.Fatal(err)
	}

	// The credential is not in the store; its owner kept it, as the backup's KEK.
	credential, err := os.ReadFile(filepath.Join(s.Dir, "admin.json"))
	if err != nil {
		t.Fatal(err)
	}
	s.Stop()
	if err := os.WriteFile(filepath.Join(restored, "admin.json"), credential, 0o600); err != nil {
		t.Fatal(err)
	}
	r := &system{ctx: s.ctx, Stack: stack.Start(t, stack.Config{Dir: restored})}
	var me struct{ TenantID string }
	r.call(http.MethodGet, r.Client.ARM("/keyfleet/v1/whoami"), "", nil, &me)
	if me.TenantID != admin.Tenant || r.Client.Subscription() != admin.Subscription {
		t.Errorf("the restored server has tenant %s, was %s", me.TenantID, admin.Tenant)
	}
	var secret struct{ Value string }
	r.call(http.MethodGet, r.Client.Vault("vault1", "/secrets/db"), "7.4", nil, &secret)
	if secret.Value != secretValue {
		t.Errorf("the restored secret is %q", secret.Value)
	}
	r.call(http.MethodGet, r.Client.Vault("vault1", "/secrets/web"), "7.4", nil, &secret)
	if !keyPair([]byte(secret.Value)) {
		t.Error("the restored certificate is no key pair")
	}
	var after struct{ Etag string }
	r.call(http.MethodGet, r.Client.ARM(f.poolPath("p1")), "2021-01-01", nil, &after)
	if before.Etag == "" || after.Etag == before.Etag {
		t.Errorf("the etag is %q after the restore and was %q", after.Etag, before.Etag)
	}
}

// refusedBackups: a wrong KEK, a cut backup and a changed one are refused, and
// nothing is restored from them.
func (s *system) refusedBackups(backup string, text []byte, kek string) {
	s.T.Helper()
	dir := s.T.(*testing.T).TempDir()
	key, err := os.ReadFile(kek)
	if err != nil {
		s.T.Fatal(err)
	}
	wrong, cut, changed := filepath.Join(dir, "kek"), filepath.Join(dir, "cut"), filepath.Join(dir, "changed")
	other := start(s.T.(*testing.T), stack.Config{})
	otherKey, err := os.ReadFile(filepath.Join(other.Dir, "kek"))
	if err != nil || bytes.Equal(key, otherKey) {
		s.T.Fatalf("two servers have the same KEK (%v)", err)
	}
	flipped := bytes.Clone(text)
	flipped[len(flipped)/2] ^= 1
	for path, b := range map[string][]byte{wrong: otherKey, cut: text[:len(text)*2/3], changed: flipped} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			s.T.Fatal(err)
		}
	}
	for name, args := range map[string][]string{
		"wrong KEK": {backup, "--kek", wrong}, "cut": {cut, "--kek", kek}, "changed": {changed, "--kek", kek},
	} {
		s.fails(s.Dir, nil, append([]string{"verify"}, args...)...)
		to := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		s.fails(to, nil, append([]string{"restore"}, args...)...)
		if left, _ := os.ReadDir(to); len(left) != 0 {
			s.T.Errorf("%s: a refused restore left %d files", name, len(left))
		}
	}
}

// TestStoreDumpHidesSecretsAndResealKeepsThem works on the store of a running
// server, and on it again when the server has ended.
func TestStoreDumpHidesSecretsAndResealKeepsThem(t *testing.T) {
	t.Parallel()
	s := start(t, stack.Config{})
	s.vault(s.group("rg"), "vault1")
	url := s.Client.Vault("vault1", "/secrets/db")
	s.call(http.MethodPut, url, "7.4", object{"value": secretValue}, nil)

	dump := s.succeeds(s.Dir, "store", "dump")
	if strings.Contains(dump, secretValue) || strings.Contains(dump, "PRIVATE KEY") {
		t.Error("store dump shows secrets")
	}
	n := 0
	for _, line := range strings.Split(strings.TrimSpace(dump), "\n") {
		n++
		var entry struct{ Key string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil || !strings.HasPrefix(entry.Key, "/") {
			t.Fatalf("line %d of the dump is no entry: %v", n, err)
		}
	}
	if revealed := s.succeeds(s.Dir, "store", "dump", "--reveal"); !strings.Contains(revealed, secretValue) {
		t.Error("--reveal shows no secrets")
	}

	keyset, err := os.ReadFile(filepath.Join(s.Dir, "keyset.json"))
	if err != nil {
		t.Fatal(err)
	}
	if out := s.succeeds(s.Dir, "store", "reseal"); !strings.Contains(out, "sealed by a new key") {
		t.Errorf("reseal says %q", out)
	}
	if now, err := os.ReadFile(filepath.Join(s.Dir, "keyset.json")); err != nil || bytes.Equal(now, keyset) {
		t.Errorf("the keyset did not change (%v)", err)
	}
	reads := func(when string) {
		t.Helper()
		var secret struct{ Value string }
		if s.call(http.MethodGet, url, "7.4", nil, &secret); secret.Value != secretValue {
			t.Errorf("%s the secret is %q", when, secret.Value)
		}
	}
	reads("after resealing")
	s.Kill()
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	reads("after a restart")

	s.fails(s.Dir, []string{"in use by another server"}, "--listen", "127.0.0.1:0")
	reads("after a second server was refused")

	s.Kill()
	s.succeeds(s.Dir, "store", "reseal") // on the directory itself
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	reads("after resealing without a server")
}

// TestHealthAndMetrics: both are answered without a login; metrics only to
// callers on the server's own machine.
func TestHealthAndMetrics(t *testing.T) {
	t.Parallel()
	_, port, err := net.SplitHostPort(freePort(t))
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, stack.Config{Args: []string{"--listen", "0.0.0.0:" + port}})
	s.vault(s.group("rg"), "vault1")
	s.certificate("vault1", "web", nil)

	// An address, or a socket of the data directory.
	get := func(where, path string) (int, string) {
		t.Helper()
		h := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			TLSClientConfig: s.Client.TLSConfig(), DisableKeepAlives: true, ForceAttemptHTTP2: true,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				if strings.HasPrefix(where, "/") {
					return (&net.Dialer{}).DialContext(ctx, "unix", where)
				}
				return (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(where, port))
			},
		}}
		resp, err := h.Get(s.Client.ARM(path))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if status, text := get("127.0.0.1", "/healthz"); status != 200 || !strings.Contains(text, `"ok"`) {
		t.Errorf("/healthz: %d %s", status, text)
	}
	status, text := get("127.0.0.1", "/metrics")
	if status != 200 {
		t.Fatalf("/metrics: %d", status)
	}
	found := false
	for _, line := range strings.Split(text, "\n") {
		found = found || (strings.HasPrefix(line, "x509_cert_not_after{") && strings.Contains(line, "vault1") && strings.Contains(line, "web"))
	}
	if !found || !strings.Contains(text, "# TYPE x509_cert_not_after gauge") {
		t.Error("/metrics has no x509_cert_not_after of vault1's certificate web")
	}
	nodes := filepath.Join(s.Dir, "run", "server.sock") // where local nodes come in
	if status, text := get(nodes, "/metrics"); status != http.StatusForbidden || strings.Contains(text, "x509") {
		t.Errorf("/metrics through the socket of local nodes: %d", status)
	}
	ip := outerAddress()
	if ip == "" {
		t.Log("LEFT OUT: /metrics from another address, for this machine has only the loopback device")
		return
	}
	if status, text := get(ip, "/metrics"); status != http.StatusForbidden || strings.Contains(text, "x509") {
		t.Errorf("/metrics from %s: %d", ip, status)
	}
	if status, _ := get(ip, "/healthz"); status != 200 {
		t.Errorf("/healthz from %s: %d", ip, status)
	}
}

// outerAddress is an IPv4 address of this machine other than loopback; "" for none.
func outerAddress() string {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	return ""
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestExternalEtcd: with --etcd-endpoints the state is in that etcd, sealed, and
// a new start on the same directory goes on from there.
func TestExternalEtcd(t *testing.T) {
	t.Parallel()
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel = t.TempDir(), "fatal"
	loopback := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls, cfg.ListenClientUrls, cfg.AdvertiseClientUrls = loopback, loopback, loopback, loopback
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(2 * time.Minute):
		t.Fatal("etcd is not ready")
	}
	endpoint := "http://" + e.Clients[0].Addr().String()
	s := start(t, stack.Config{Args: []string{"--etcd-endpoints", endpoint}})
	s.vault(s.group("rg"), "vault1")
	address := s.Client.Vault("vault1", "/secrets/db")
	s.call(http.MethodPut, address, "7.4", object{"value": secretValue}, nil)
	if _, err := os.Stat(filepath.Join(s.Dir, "etcd")); !os.IsNotExist(err) {
		t.Errorf("the data directory holds an etcd of its own: %v", err)
	}
	stored, err := e.Server.KV().Range(s.ctx, []byte("/"), []byte("0"), mvcc.RangeOptions{})
	if err != nil || len(stored.KVs) < 10 {
		t.Fatalf("the etcd holds %d keys (%v)", len(stored.KVs), err)
	}
	for _, kv := range stored.KVs {
		if bytes.Contains(kv.Value, []byte(secretValue)) {
			t.Errorf("%s shows the secret", kv.Key)
		}
	}
	s.Kill()
	if err := s.Run(); err != nil {
		t.Fatal(err)
	}
	var secret struct{ Value string }
	if s.call(http.MethodGet, address, "7.4", nil, &secret); secret.Value != secretValue {
		t.Errorf("after a restart the secret is %q", secret.Value)
	}
}
