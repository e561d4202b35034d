package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/store"
)

// managerClientID is the client id of the manager that a server runs.
const managerClientID = "6b657966-6c65-4574-8d61-6e6167657231"

// clusterManager runs "keyfleet-connector manager" as a child while this server leads
// and a cluster is registered. What it needs of Kubernetes and Helm would triple the
// memory of a server that has no cluster.
//
// The child reads its login from standard input, so that it is in no file and no
// argument, and ends when that is closed: it never outlives the server, however that ends.
type clusterManager struct {
	program, image, addonChart string
	login                      func(ctx context.Context, st *store.Store) (keyfleet.Admin, error)
	log                        *slog.Logger
}

const (
	managerLook  = time.Second      // between two looks whether there is a cluster
	managerPause = 5 * time.Second  // before a manager that ended is started again
	managerStop  = 10 * time.Second // for a manager that was told to end
)

// Describe implements reconcile.Runnable.
func (m clusterManager) Describe() string { return "manager of clusters" }

// Run implements reconcile.Runnable.
func (m clusterManager) Run(ctx context.Context, st *store.Store) error {
	for pause := managerLook; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = managerLook
		if there, err := anyCluster(ctx, st); err != nil || !there {
			continue
		}
		err := m.runChild(ctx, st)
		if err != nil && ctx.Err() == nil {
			m.log.Error("the manager of clusters has ended and is started again", "error", err)
			pause = managerPause
		}
	}
}

// anyCluster reports whether a cluster is registered.
func anyCluster(ctx context.Context, st *store.Store) (bool, error) {
	all, err := cluster.Clusters.List(st.View(ctx), "")
	return len(all) > 0, err
}

// runChild runs one child until it ends, ctx ends, or the last cluster goes.
func (m clusterManager) runChild(ctx context.Context, st *store.Store) error {
	login, err := m.login(ctx, st)
	if err != nil {
		return err
	}
	text, err := json.Marshal(login)
	if err != nil {
		return fmt.Errorf("encoding the manager's login: %w", err)
	}
	args := []string{"manager", "--from", "-"}
	if m.image != "" {
		args = append(args, "--image", m.image)
	}
	if m.addonChart != "" {
		args = append(args, "--addon-chart", m.addonChart)
	}
	cmd := exec.Command(m.program, args...)
	cmd.Stderr = os.Stderr // its log is a part of the server's
	in, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("preparing the manager: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the manager: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the child
	if _, err := io.Copy(in, bytes.NewReader(append(text, '\n'))); err != nil {
		m.log.Warn("the manager of clusters did not read its login", "error", err)
	}
	m.log.Info("looking after clusters", "manager", cmd.Process.Pid)
	if err, over := m.watch(ctx, st, ended); over {
		return err
	}
	return m.stop(cmd, in, ended)
}

// watch returns when the child has to end, or, with over, when it has ended.
func (m clusterManager) watch(ctx context.Context, st *store.Store, ended <-chan error) (err error, over bool) {
	tick := time.NewTicker(managerLook)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			return fmt.Errorf("running %s: %w", filepath.Base(m.program), err), true
		case <-ctx.Done():
			return nil, false
		case <-tick.C:
			if there, err := anyCluster(ctx, st); err == nil && !there {
				return nil, false
			}
		}
	}
}

// stop ends the child: it is asked to by the end of its input, and killed if it does not.
func (m clusterManager) stop(cmd *exec.Cmd, in io.Closer, ended <-chan error) error {
	_ = in.Close()
	late := time.NewTimer(managerStop)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
		_ = cmd.Process.Kill()
		<-ended
	}
	return nil
}

// managerLogin makes the login of the manager that this server runs.
func (s *Server) managerLogin(ctx context.Context, st *store.Store) (keyfleet.Admin, error) {
	a, err := s.identity.Component(ctx, st, managerClientID, "Manager of clusters, run by the server", access.ClusterManager.ID)
	if err != nil {
		return keyfleet.Admin{}, err
	}
	return keyfleet.Admin{
		Endpoints: s.adminEndpoints(), Tenant: a.TenantID, ClientID: a.ClientID, ClientSecret: keyfleet.Secret(a.Secret.Reveal()),
		CAFile: filepath.Join(s.cfg.DataDir, "ca.crt"),
	}, nil
}
