// Package scextension is the side of service connections that knows Kubernetes:
// the program keyfleet-connector.
//
// Idea: the server keeps what shall be, and this program makes it so and reports what
// it sees. Its manager may stand wherever a cluster can be reached; its operator,
// its job and its webhook run in the cluster.
//
//	server ──work──> manager ──desired states──> sc-system ──> operator, sc-job ──> Secrets, ServiceAccounts
//	   └<──what was seen──┘<────what was applied────┘
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
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/effect"
)

// Manager looks after the clusters of a server. Its zero value is not usable.
type Manager struct {
	Server   *client.Client // logged in with the role "Keyfleet Cluster Manager" at /
	Interval time.Duration  // between two looks at a cluster; zero: 10 s
	Poll     time.Duration  // between two questions for work; zero: 1 s, at most Interval
	Log      *slog.Logger

	// Authority is the URL of the server's token endpoint and Tenant its tenant, for
	// pods of the webhook. Empty: they are given as settings.
	Authority, Tenant string
	// Image is that of keyfleet-connector, for pods. Empty: extensions are not installed.
	Image string
	// Releases opens a cluster for installations. Nil: extensions are not installed.
	Releases func(kubeconfig []byte) (Releases, error)
	// Addon opens a cluster for the installation of the add-on. Nil: it is not installed.
	Addon func(kubeconfig []byte) (Releases, error)

	logins map[string]connection // by cluster
	work   sync.WaitGroup        // visits, installations and answers

	lock     sync.Mutex
	looked   map[string]time.Time    // by cluster: when it was last looked at
	visiting map[string]bool         // clusters where a visit has not ended
	told     map[string]told         // by connection
	done     map[string]installation // by cluster and extension
	asked    map[string]bool         // questions that are looked into, or were, by their UIDs
}

// told is a report, and when it was made.
type told struct {
	report wire.ConnectionReport
	time   time.Time
}

// connection is an open API, and the login that it was opened with.
type connection struct {
	login    string
	api      kubernetes.Interface
	releases Releases // nil: nothing is installed
	addon    Releases // nil: the add-on is not installed
}

const (
	lookTime    = 8 * time.Second  // for one look; a cluster that takes longer has a problem
	deliverTime = 30 * time.Second // for the connections of one cluster; the rest waits for the next visit
)

// Run looks at all clusters every Interval, and brings them their connections as
// soon as it knows of them, until ctx ends. It returns nil then.
func (m *Manager) Run(ctx context.Context) error {
	if m.Interval <= 0 {
		m.Interval = 10 * time.Second
	}
	if m.Poll <= 0 {
		m.Poll = time.Second
	}
	tick := time.NewTicker(min(m.Poll, m.Interval))
	defer tick.Stop()
	defer m.work.Wait() // visits and installations end with ctx
	for {
		if err := m.visit(ctx); err != nil && ctx.Err() == nil {
			m.Log.Error("the server cannot be asked for clusters", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// visit asks the server for work and begins it, for each cluster beside all others.
func (m *Manager) visit(ctx context.Context) error {
	if m.told == nil {
		m.told, m.looked, m.done = map[string]told{}, map[string]time.Time{}, map[string]installation{}
		m.asked, m.visiting = map[string]bool{}, map[string]bool{}
	}
	var work wire.Work
	if err := m.call(ctx, http.MethodGet, "/keyfleet/v1/clusters/work", nil, &work); err != nil {
		return err
	}
	logins := make(map[string]connection, len(work.Clusters)) // those that are gone are dropped
	for _, a := range work.Clusters {
		c := m.logins[a.ID]
		if c.login != a.Login {
			c = connection{}
			var err error
			if c, err = m.open(ctx, a); err != nil {
				m.report(ctx, a.ID, wire.Observation{Problem: problem(err)})
				continue
			}
		}
		logins[a.ID] = c
	}
	m.logins = logins
	m.forget(work)
	for _, a := range work.Clusters {
		c, open := logins[a.ID]
		if !open {
			continue
		}
		for _, w := range a.Extensions {
			m.install(ctx, a.ID, c, w)
		}
		for _, q := range a.Questions {
			m.answer(ctx, c, q)
		}
		m.goTo(ctx, c, a)
	}
	return nil
}

// goTo brings a cluster its connections, and looks at it when that is due. A cluster
// where the last visit has not ended is left to that.
func (m *Manager) goTo(ctx context.Context, c connection, a wire.Assignment) {
	m.lock.Lock()
	defer m.lock.Unlock()
	if m.visiting[a.ID] {
		return
	}
	m.visiting[a.ID] = true
	due := time.Since(m.looked[a.ID]) >= m.Interval
	if due {
		m.looked[a.ID] = time.Now()
	}
	m.work.Go(func() {
		if due {
			m.see(ctx, a.ID, c.api)
		}
		delivery, cancel := context.WithTimeout(ctx, deliverTime)
		defer cancel()
		if err := m.deliver(delivery, c.api, a.Connections); err != nil && ctx.Err() == nil {
			m.Log.Error("connections cannot be brought to a cluster", "cluster", a.ID, "error", err)
		}
		m.lock.Lock()
		defer m.lock.Unlock()
		delete(m.visiting, a.ID)
	})
}

// forget drops what is known of connections, and of questions, that are gone.
func (m *Manager) forget(work wire.Work) {
	there := map[string]bool{}
	for _, a := range work.Clusters {
		for _, c := range a.Connections {
			there[c.ID] = true
		}
		for _, q := range a.Questions {
			there[q.UID] = true
		}
	}
	m.lock.Lock()
	defer m.lock.Unlock()
	maps.DeleteFunc(m.told, func(id string, _ told) bool { return !there[id] })
	maps.DeleteFunc(m.asked, func(uid string, _ bool) bool { return !there[uid] })
}

// see looks at a cluster and reports what it saw.
func (m *Manager) see(ctx context.Context, id string, api kubernetes.Interface) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	o, err := look(ctx, api)
	if err != nil {
		o = wire.Observation{Problem: problem(err)}
	}
	m.report(context.WithoutCancel(ctx), id, o)
}

// problem is an error as a cluster's resource shows it.
func problem(err error) string { return clip("looking at the cluster: " + err.Error()) }

// clip shortens a text of others.
func clip(text string) string {
	const most = 500
	return strings.ToValidUTF8(text[:min(len(text), most)], "")
}

// open fetches the kubeconfig of a cluster.
func (m *Manager) open(ctx context.Context, a wire.Assignment) (c connection, err error) {
	var k wire.CredentialResult
	if err := m.call(ctx, http.MethodPost, "/keyfleet/v1"+a.ID+"/kubeconfig", nil, &k); err != nil {
		return c, fmt.Errorf("fetching the kubeconfig: %w", err)
	}
	c.login = a.Login
	if c.api, err = connect(k.Value, lookTime); err != nil {
		return c, err
	}
	if m.Releases != nil {
		if c.releases, err = m.Releases(k.Value); err != nil {
			return c, err
		}
	}
	if m.Addon != nil {
		c.addon, err = m.Addon(k.Value)
	}
	return c, err
}

func (m *Manager) report(ctx context.Context, id string, o wire.Observation) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	err := effect.Do("report on cluster", func() error { return m.call(ctx, http.MethodPut, "/keyfleet/v1"+id+"/observation", o, nil) })
	if err != nil {
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
