package kube

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/rotation"
)

const serverIP = kubetest.ServerIP

// cluster is a real API server. It says that it is at serverIP; only
// network.DialContext leads there.
type cluster struct {
	*kubetest.Cluster
	network network
	server  string // serverIP:port
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{Cluster: kubetest.Start(t)}
	c.server = net.JoinHostPort(serverIP, c.Port)
	c.network = network{c.server: net.JoinHostPort("127.0.0.1", c.Port)}
	return c
}

// admin opens the API as cluster administrator.
func (c *cluster) admin(t *testing.T) *api {
	t.Helper()
	cert, key := c.Client(t, c.CA, "CN=admin,O=system:masters")
	return c.open(t, rotation.Credential{Roots: c.CA.PEM(), Cert: cert, Key: key})
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

// eventually repeats a check until it holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !holds(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in two minutes it did not come about: %s", what)
		}
	}
}
