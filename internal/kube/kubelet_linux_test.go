package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// TestKubeletIsAsked: what kubelets say is told apart, and nothing but a name
// that they say themselves counts. That real ones say so is shown on the bed.
func TestKubeletIsAsked(t *testing.T) {
	ca := kubetest.NewCA(t, "cluster")
	cert, key := (&cluster{}).Client(t, ca, "CN=keyfleet-canary")
	as := rotation.Credential{Roots: ca.PEM(), Cert: cert, Key: key}
	for _, tc := range []struct {
		reason string
		status int
		text   string
		want   string
		kind   error
	}{
		{"it knows us", 403, "Forbidden (user=keyfleet-canary, verb=get, resource=nodes, subresource(s)=[configz proxy])", "keyfleet-canary", nil},
		{"it takes us for a stranger", 403, "Forbidden (user=system:anonymous, verb=get, resource=nodes, subresource(s)=[proxy])", "system:anonymous", nil},
		{"it wants to know who we are", 401, "Unauthorized", "", nil},
		{"it lets everybody in", 200, "{}", "", fault.Precondition},
		{"something else is there", 403, "<html>keyfleet-canary</html>", "", fault.Precondition},
		{"it is broken", 500, strings.Repeat("x", 1<<20), "", fault.Precondition},
	} {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if len(r.TLS.PeerCertificates) == 0 {
				t.Errorf("%s: no certificate is shown", tc.reason)
			}
			w.WriteHeader(tc.status)
			_, _ = w.Write([]byte(tc.text))
		}))
		s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, ClientCAs: x509.NewCertPool()}
		s.StartTLS()
		who, err := Kubelets(&net.Dialer{})(context.Background(), s.Listener.Addr().String(), as)
		s.Close()
		if who != tc.want || (tc.kind == nil) != (err == nil) || tc.kind != nil && !errors.Is(err, tc.kind) {
			t.Errorf("%s: %q, %v", tc.reason, who, err)
		}
	}
}
