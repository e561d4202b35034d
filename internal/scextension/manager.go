// Package scextension is the side of service connections that knows Kubernetes:
// the program keyfleet-connector.
//
// Idea: the server keeps what shall be, and this program, which may stand wherever
// a cluster can be reached, makes it so and reports what it sees. So far it looks:
// the manager visits every registered cluster again and again.
//
//	server ──Work──> manager ──looks──> API servers
//	   └<──observation──┘
//
// Invariant: the manager keeps nothing but connections; another one, or the same
// started again, goes on from what the server says. A cluster that does not answer
// delays no other one.
//
// Consequence for the operator: any number of managers can run; when none does,
// clusters show as Failed with that reason within a minute.
package scextension

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/client"
)

// Manager looks after the clusters of a server. Its zero value is not usable.
type Manager struct {
	Server   *client.Client // logged in with the role "Keyfleet Cluster Manager" at /
	Interval time.Duration  // between two looks; zero: 10 s
	Log      *slog.Logger

	logins map[string]connection // by cluster
}

// connection is an open API, and the login that it was opened with.
type connection struct {
	login string
	api   kubernetes.Interface
}

const (
	lookTime = 8 * time.Second // for one look; a cluster that takes longer has a problem
	visits   = 16              // clusters that are looked at side by side
)

// Run looks at all clusters every Interval until ctx ends. It returns nil then.
func (m *Manager) Run(ctx context.Context) error {
	if m.Interval <= 0 {
		m.Interval = 10 * time.Second
	}
	tick := time.NewTicker(m.Interval)
	defer tick.Stop()
	for {
		if err := m.Visit(ctx); err != nil && ctx.Err() == nil {
			m.Log.Error("the server cannot be asked for clusters", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Visit looks at all clusters once and reports what it saw.
func (m *Manager) Visit(ctx context.Context) error {
	var work wire.Work
	if err := m.call(ctx, http.MethodGet, "/keyfleet/v1/clusters/work", nil, &work); err != nil {
		return err
	}
	logins := make(map[string]connection, len(work.Clusters)) // those that are gone are dropped
	for _, a := range work.Clusters {
		c := m.logins[a.ID]
		if c.login != a.Login {
			c = connection{}
			api, err := m.open(ctx, a.ID)
			if err != nil {
				m.report(ctx, a.ID, wire.Observation{Problem: problem(err)})
				continue
			}
			c = connection{a.Login, api}
		}
		logins[a.ID] = c
	}
	m.logins = logins
	var all errgroup.Group
	all.SetLimit(visits)
	for id, c := range logins {
		all.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, lookTime)
			defer cancel()
			o, err := look(ctx, c.api)
			if err != nil {
				o = wire.Observation{Problem: problem(err)}
			}
			m.report(context.WithoutCancel(ctx), id, o)
			return nil
		})
	}
	return all.Wait()
}

// problem is an error as a cluster's resource shows it.
func problem(err error) string {
	const most = 500
	text := "looking at the cluster: " + err.Error()
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}

// open fetches the kubeconfig of a cluster.
func (m *Manager) open(ctx context.Context, id string) (kubernetes.Interface, error) {
	var k wire.CredentialResult
	if err := m.call(ctx, http.MethodPost, "/keyfleet/v1"+id+"/kubeconfig", nil, &k); err != nil {
		return nil, fmt.Errorf("fetching the kubeconfig: %w", err)
	}
	return connect(k.Value, lookTime)
}

func (m *Manager) report(ctx context.Context, id string, o wire.Observation) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	if err := m.call(ctx, http.MethodPut, "/keyfleet/v1"+id+"/observation", o, nil); err != nil {
		m.Log.Error("what was seen of a cluster cannot be reported", "cluster", id, "error", err)
	}
}

func (m *Manager) call(ctx context.Context, method, path string, body, into any) error {
	reply, err := m.Server.Do(ctx, client.Request{Method: method, URL: m.Server.ARM(path), Body: body})
	if err != nil || into == nil {
		return err
	}
	return reply.Into(into)
}
