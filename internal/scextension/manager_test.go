package scextension

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/client"
)

// TestDeadClusterDelaysNoOther: one cluster never answers, another does. By the time
// that the first is reported as a problem, the other was looked at again and again.
func TestDeadClusterDelaysNoOther(t *testing.T) {
	dead := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done(); panic(http.ErrAbortHandler) }))
	t.Cleanup(dead.Close)
	alive := httptest.NewServer(http.NotFoundHandler()) // no cluster, but it says so at once
	t.Cleanup(alive.Close)
	clusters := map[string]string{"/dead": dead.URL, "/alive": alive.URL}

	var looks atomic.Int64
	told := make(chan int64, 1)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, verb, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/keyfleet/v1/"), "/")
		switch {
		case verb == "work":
			_ = json.NewEncoder(w).Encode(wire.Work{Clusters: []wire.Assignment{{ID: "/dead", Login: "1"}, {ID: "/alive", Login: "1"}}})
		case verb == "kubeconfig":
			_ = json.NewEncoder(w).Encode(wire.CredentialResult{Value: fmt.Appendf(nil, "apiVersion: v1\nkind: Config\ncurrent-context: c\n"+
				"clusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {token: t}}]\n", clusters["/"+id])})
		case id == "alive":
			looks.Add(1)
		default:
			select {
			case told <- looks.Load():
			default:
			}
		}
	}))
	t.Cleanup(server.Close)
	api, err := client.New(client.Config{
		Endpoints: keyfleet.Endpoints{ResourceManager: server.URL, Login: server.URL},
		CA:        pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}),
		TokenSource: func(context.Context, string) (client.Token, error) {
			return client.Token{Value: "t", Expires: time.Now().Add(time.Hour)}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)

	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	m := Manager{Server: api, Interval: 100 * time.Millisecond, Log: slog.New(slog.DiscardHandler)}
	go func() { ended <- m.Run(ctx) }()
	select {
	case n := <-told:
		if n < 5 {
			t.Errorf("the other cluster was looked at %d times meanwhile", n)
		}
	case <-time.After(time.Minute):
		t.Error("the dead cluster was not reported")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
