//go:build linux

package rotatecerts

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/kube"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// master is a machine of which only the CA's files are asked for.
type master struct{ dir string }

func (master) Name() string { return "cp1" }

func (m master) Run(_ context.Context, s rotation.Script) ([]byte, error) {
	return os.ReadFile(filepath.Join(m.dir, filepath.Base(s.Args[0])))
}

func (master) Put(context.Context, string, io.Reader, fs.FileMode) error { return fs.ErrPermission }

// TestRenewKubeconfig: against a real API server, a kubeconfig that a rotation has
// ended works again as the same somebody; one that lasts is left alone.
func TestRenewKubeconfig(t *testing.T) {
	c := kubetest.Start(t)
	c.StartControllers(t)
	key, err := c.CA.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	c.Write(t, "ca.key", key)
	renewal, err := rotation.RenewFrom(t.Context(), master{c.Dir}, rotation.Kubeadm(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	direct := new(net.Dialer)
	r := renewer{Renewal: renewal, jump: direct, endpoints: []string{"127.0.0.1:" + c.Port}}
	admin, err := r.Administrator(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	api, err := kube.Connector(direct)(r.endpoints[0], admin)
	if err != nil {
		t.Fatal(err)
	}
	var lasting string
	for deadline := time.Now().Add(time.Minute); lasting == ""; time.Sleep(100 * time.Millisecond) { // until the account is there
		if lasting, err = api.(tokens).NewToken(t.Context(), "default", "default", nil, time.Hour); err != nil && time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	former := kubetest.NewCA(t, "kubernetes")
	byFormer := func(subject string) map[string]any {
		cert, key := c.Client(t, former, subject)
		return map[string]any{"client-certificate-data": cert, "client-key-data": key}
	}
	ended := map[string]any{"token": unsigned(lasting)}
	cert, certKey := c.Client(t, c.CA, "CN=ops")

	cases := []struct {
		name    string
		user    map[string]any
		want    string // empty: it cannot be renewed
		changed bool   // beside the CA
	}{
		{"a certificate of the former CA", byFormer("CN=ops,O=viewers"), "ops", true},
		{"a token of the former key", ended, "system:serviceaccount:default:default", true},
		{"a certificate of the CA", map[string]any{"client-certificate-data": cert, "client-key-data": certKey}, "ops", false},
		{"a token that is accepted", map[string]any{"token": lasting}, "system:serviceaccount:default:default", false},
		{"a token of somebody else's", map[string]any{"token": "word"}, "", false},
		{"a token of a Secret that is gone", map[string]any{"token": "e30." + claim(map[string]string{"kubernetes.io/serviceaccount/namespace": "default", "kubernetes.io/serviceaccount/secret.name": "gone"}) + ".x"}, "", false},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			k, err := parseKubeconfig(document(t, c, former, tc.user))
			if err != nil {
				t.Fatal(err)
			}
			before := k.credential()
			out, err := r.renew(t.Context(), k)
			if tc.want == "" {
				if err == nil || k.credential().Token != before.Token {
					t.Fatalf("it was renewed: %+v", out)
				}
				return
			}
			after := k.credential()
			if err != nil || out.User != tc.want || !out.Changed || string(after.Roots) != string(c.CA.PEM()) {
				t.Fatalf("%+v, %v", out, err)
			}
			if changed := string(after.Key) != string(before.Key) || after.Token != before.Token; changed != tc.changed {
				t.Errorf("changed: %t, want %t", changed, tc.changed)
			}
			if again, err := r.renew(t.Context(), k); err != nil || again.Changed {
				t.Errorf("the second time: %+v, %v", again, err)
			}
		})
	}
}

// document is a kubeconfig of a user, which trusts a CA.
func document(t *testing.T, c *kubetest.Cluster, ca *pki.CA, user map[string]any) []byte {
	t.Helper()
	list := func(kind string, v any) []any {
		return []any{map[string]any{"name": "other", kind: map[string]any{}}, map[string]any{"name": "c", kind: v}}
	}
	text, err := yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": list("cluster", map[string]any{"server": "https://127.0.0.1:" + c.Port, "certificate-authority-data": ca.PEM()}),
		"users":    list("user", user), "contexts": list("context", map[string]any{"cluster": "c", "user": "c"}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func claim(v any) string {
	text, _ := json.Marshal(v)
	return base64.RawURLEncoding.EncodeToString(text)
}

// unsigned is a token with another signature.
func unsigned(token string) string {
	i := strings.LastIndexByte(token, '.')
	return token[:i+1] + base64.RawURLEncoding.EncodeToString(make([]byte, 64))
}

// FuzzKubeconfig: what is no kubeconfig, and what is no token, is said, and nothing else happens.
func FuzzKubeconfig(f *testing.F) {
	f.Add("current-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://x:6443'}}]\nusers: [{name: u, user: {token: a.b.c}}]")
	f.Add("clusters: {}")
	f.Add("e30.eyJleHAiOjF9.x")
	f.Fuzz(func(t *testing.T, text string) {
		if c, ok := parseToken(text); ok && c.Secret == "" && c.Expires <= c.Issued {
			t.Errorf("%q is taken for a token with an end", text)
		}
		k, err := parseKubeconfig([]byte(text))
		if err != nil {
			return
		}
		_, _, _ = k.server()
		k.take(k.credential()) // one that is not as we write it
		if k.take(k.credential()) {
			t.Error("taking what is there changes it again")
		}
	})
}
