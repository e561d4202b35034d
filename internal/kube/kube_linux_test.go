package kube

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// TestAPIServer runs everything against one real API server, in an order in
// which each part finds what it needs.
func TestAPIServer(t *testing.T) {
	c := startCluster(t)
	a := c.admin(t)
	t.Run("namespaces before anybody publishes a CA", func(t *testing.T) { noRootCAs(t, a) })
	c.StartControllers(t)
	t.Run("who am I", func(t *testing.T) { whoAmI(t, c) })
	t.Run("trust", func(t *testing.T) { trust(t, c) })
	t.Run("tokens", func(t *testing.T) { tokens(t, a) })
	t.Run("CA bundles", func(t *testing.T) { bundles(t, a) })
	t.Run("root CAs", func(t *testing.T) { rootCAs(t, c, a) })
	t.Run("ConfigMaps", func(t *testing.T) { configMaps(t, a) })
	t.Run("token Secrets", func(t *testing.T) { tokenSecrets(t, c, a) })
	t.Run("nodes", func(t *testing.T) { nodes(t, c, a) })
	t.Run("pods", func(t *testing.T) { pods(t, a) })
	t.Run("restarts", func(t *testing.T) { restarts(t, a) })
	t.Run("lists of several pages", func(t *testing.T) { pages(t, a) })
	t.Run("without etcd", func(t *testing.T) { withoutEtcd(t, c, a) })
}

func noRootCAs(t *testing.T, a *api) {
	roots, err := a.RootCAs(t.Context())
	ca, known := roots["kube-system"]
	if err != nil || !known || ca != "" {
		t.Errorf("%v, %v", roots, err)
	}
}

// serviceToken makes a service account in the default namespace and a token for it.
func serviceToken(t *testing.T, a *api, name string) string {
	t.Helper()
	accounts := a.typed.CoreV1().ServiceAccounts("default")
	if _, err := accounts.Create(t.Context(), &core.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	r, err := accounts.CreateToken(t.Context(), name, &authentication.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status.Token
}

func whoAmI(t *testing.T, c *cluster) {
	token := serviceToken(t, c.admin(t), "caller")
	proxyCert, proxyKey := c.Client(t, c.Front, "CN=front-proxy-client")
	otherCert, otherKey := c.Client(t, c.Front, "CN=somebody")
	cert, key := c.Client(t, c.CA, "CN=alice")
	foreignCert, foreignKey := c.Client(t, kubetest.NewCA(t, "other"), "CN=alice")
	roots := c.CA.PEM()
	for name, test := range map[string]struct {
		as   rotation.Credential
		user string
		kind error
	}{
		"client certificate":                  {rotation.Credential{Roots: roots, Cert: cert, Key: key}, "alice", nil},
		"service account":                     {rotation.Credential{Roots: roots, Token: token}, "system:serviceaccount:default:caller", nil},
		"front proxy":                         {rotation.Credential{Roots: roots, Cert: proxyCert, Key: proxyKey, As: "bob"}, "bob", nil},
		"certificate that is no front proxy":  {rotation.Credential{Roots: roots, Cert: otherCert, Key: otherKey, As: "bob"}, "", fault.Unauthenticated},
		"proxy by the CA of the clients":      {rotation.Credential{Roots: roots, Cert: cert, Key: key, As: "bob"}, "alice", nil},
		"client certificate of an unknown CA": {rotation.Credential{Roots: roots, Cert: foreignCert, Key: foreignKey}, "", fault.Unauthenticated},
		"token of nobody":                     {rotation.Credential{Roots: roots, Token: token[:len(token)-8] + "AAAAAAAA"}, "", fault.Unauthenticated},
		"nobody":                              {rotation.Credential{Roots: roots}, "", fault.Denied},
	} {
		user, err := c.open(t, test.as).WhoAmI(t.Context())
		if user != test.user || !errors.Is(err, test.kind) {
			t.Errorf("%s: %q, %v", name, user, err)
		}
		if err != nil && strings.Contains(err.Error(), token[:20]) {
			t.Errorf("%s: the token is in the error", name)
		}
	}
}

func trust(t *testing.T, c *cluster) {
	cert, key := c.Client(t, c.CA, "CN=alice")
	open := func(server string, roots []byte) *api {
		a, err := connect(c.network, server, rotation.Credential{Roots: roots, Cert: cert, Key: key}, answerTime)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	err := open(c.server, kubetest.NewCA(t, "kubernetes").PEM()).Ready(t.Context())
	var authority x509.UnknownAuthorityError
	if !errors.Is(err, fault.Unavailable) || !errors.As(err, &authority) || !strings.Contains(fault.From(err).Message, "not trusted") {
		t.Errorf("another CA of the same name: %v", err)
	}
	c.network["10.0.0.9:443"] = c.network[c.server]
	var hostname x509.HostnameError
	if err = open("10.0.0.9:443", c.CA.PEM()).Ready(t.Context()); !errors.Is(err, fault.Unavailable) || !errors.As(err, &hostname) {
		t.Errorf("an address that is not in the certificate: %v", err)
	}
	c.network["10.0.0.8:443"] = net.JoinHostPort("127.0.0.1", kubetest.Free(t))
	if err = open("10.0.0.8:443", c.CA.PEM()).Ready(t.Context()); !errors.Is(err, fault.Unavailable) || errors.As(err, &authority) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nobody listens: %v", err)
	}
	if err = open("10.0.0.7:443", c.CA.PEM()).Ready(t.Context()); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "no way to 10.0.0.7:443") {
		t.Errorf("not by the dialer: %v", err)
	}
}

func tokens(t *testing.T, a *api) {
	token := serviceToken(t, a, "reviewed")
	if ok, err := a.ReviewToken(t.Context(), token); !ok || err != nil {
		t.Errorf("a good token: %v, %v", ok, err)
	}
	if ok, err := a.ReviewToken(t.Context(), token[:len(token)-8]+"AAAAAAAA"); ok || err != nil {
		t.Errorf("a token with another signature: %v, %v", ok, err)
	}
	uid, err := a.ServiceAccount(t.Context(), "default", "reviewed")
	if s, _ := a.typed.CoreV1().ServiceAccounts("default").Get(t.Context(), "reviewed", metav1.GetOptions{}); err != nil || uid != string(s.UID) || uid == "" {
		t.Errorf("its account: %q, %v", uid, err)
	}
	if err := a.typed.CoreV1().ServiceAccounts("default").Delete(t.Context(), "reviewed", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a token of an account that is gone is not accepted", func() bool {
		ok, err := a.ReviewToken(t.Context(), token)
		return !ok && err == nil
	})
	if _, err := a.ServiceAccount(t.Context(), "default", "reviewed"); !errors.Is(err, fault.NotFound) {
		t.Errorf("an account that is gone: %v", err)
	}
	issuer, kids, err := a.Issuer(t.Context())
	if err != nil || issuer != "https://kubernetes.default.svc" || len(kids) != 1 || kids[0] == "" {
		t.Errorf("issuer %q, keys %q, %v", issuer, kids, err)
	}
}

// pages makes more nodes than fit on a page.
func pages(t *testing.T, a *api) {
	before, err := a.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const more = pageSize + 20
	failed := make(chan error)
	for i := range 10 {
		go func() {
			for n := i; n < more; n += 10 {
				node := &core.Node{ObjectMeta: metav1.ObjectMeta{GenerateName: "page-", Labels: map[string]string{"page": "yes"}}}
				if _, err := a.typed.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
					failed <- err
					return
				}
			}
			failed <- nil
		}()
	}
	for range 10 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	after, err := a.Nodes(t.Context())
	if err != nil || len(after) != len(before)+more {
		t.Errorf("%d nodes, want %d, %v", len(after), len(before)+more, err)
	}
	seen := map[string]bool{}
	for _, n := range after {
		seen[n.Name] = true
	}
	if len(seen) != len(after) {
		t.Errorf("%d nodes came twice", len(after)-len(seen))
	}
}

// withoutEtcd is the last test: nothing works after it.
func withoutEtcd(t *testing.T, c *cluster, a *api) {
	c.Etcd.Server.HardStop()
	c.Etcd.Clients[0].Close()
	eventually(t, "the API server says that etcd is missing", func() bool {
		err := a.Ready(t.Context())
		return errors.Is(err, fault.Unavailable) && strings.Contains(fault.From(err).Message, "not ready: etcd")
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := a.PutConfigMap(ctx, "default", "any", nil); !errors.Is(err, fault.Unavailable) {
		t.Errorf("reading: %v", err)
	}
}
