package rotatecerts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/etcdadmin"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/kube"
	"keyfleet.dev/keyfleet/internal/remote"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// session is a connection to a cluster.
type session struct {
	jump   *remote.Jump
	sealer *remote.Sealer
	layout rotation.Layout
	hosts  map[string]rotation.Host
	model  *apimodel.Model // nil: there is none
}

func (s *session) close() { _ = s.jump.Close() }

// theHost names the jump host before we know which node it is.
const theHost = "the SSH host"

// open connects to the jump host and tells the layout.
func (c *command) open(ctx context.Context) (*session, error) {
	if err := c.o.complete(c.Env, c.warn); err != nil {
		return nil, err
	}
	s := &session{hosts: map[string]rotation.Host{}}
	if c.o.apiModel != "" {
		text, err := os.ReadFile(c.o.apiModel)
		if err != nil {
			return nil, fault.New(fault.Invalid, "NoAPIModel", "The API model cannot be read: %s.", err).At("--api-model").
				WithFix("give the path of the apimodel.json that aks-engine wrote, by default below _output")
		}
		if s.model, err = apimodel.Parse(text); err != nil {
			return nil, err
		}
		if err := c.o.matchesModel(s.model); err != nil {
			return nil, err
		}
	}
	if err := c.connect(ctx, s); err != nil {
		return nil, err
	}
	if err := c.detect(ctx, s); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// connect opens the way to the jump host.
func (c *command) connect(ctx context.Context, s *session) error {
	key, err := os.ReadFile(c.o.sshKey)
	if err != nil {
		return fault.New(fault.Invalid, "NoKey", "The SSH key cannot be read: %s.", err).At("--linux-ssh-private-key").
			WithFix("give the path of the private key that opens the nodes")
	}
	var passphrase func() ([]byte, error)
	if c.Passphrase != nil {
		passphrase = sync.OnceValues(func() ([]byte, error) { return c.Passphrase(c.o.sshKey) })
	}
	if s.sealer, err = remote.NewSealer(key, passphrase, c.o.recipients); err != nil {
		return err
	}
	cfg := remote.Config{Address: c.o.sshHost, User: c.sshUser(s), Key: key, Passphrase: passphrase, KnownHosts: c.o.knownHosts}
	s.windowsLogin(&cfg)
	if c.Ask != nil {
		cfg.Confirm = c.confirm
	}
	s.jump, err = remote.Dial(ctx, cfg)
	return err
}

// sshUser is the login user: given, or that of the API model.
func (c *command) sshUser(s *session) string {
	if c.o.userFromModel && s.model != nil && s.model.AdminUser != "" {
		return s.model.AdminUser
	}
	return c.o.sshUser
}

// detect tells the layout, and checks the flags that depend on it.
func (c *command) detect(ctx context.Context, s *session) error {
	masters := 1
	if s.model != nil {
		masters = s.model.Masters
	}
	var layouts []rotation.Layout
	for _, l := range []rotation.Layout{rotation.Kubeadm(), rotation.AKSEngine(masters, c.sshUser(s))} {
		if c.o.layout == "" || c.o.layout == l.Name {
			layouts = append(layouts, l)
		}
	}
	var err error
	if s.layout, err = rotation.Detect(ctx, s.jump.Host(theHost), layouts); err != nil {
		return err
	}
	return c.o.requireFor(s.layout.Name)
}

// reach opens every node.
func (s *session) reach(ctx context.Context, nodes []rotation.Node) error {
	if err := s.checkWindows(nodes); err != nil {
		return err
	}
	var targets []remote.Target
	for _, n := range nodes {
		targets = append(targets, remote.Target{Name: n.Name, Address: n.Address, Windows: n.OS == "windows"})
	}
	hosts, err := s.jump.Hosts(ctx, targets)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		s.hosts[h.Name()] = h
	}
	return nil
}

func (c *command) confirm(unknown []remote.Fingerprint) (bool, error) {
	var text strings.Builder
	text.WriteString("These host keys are not known yet:\n")
	for _, f := range unknown {
		fmt.Fprintf(&text, "  %s\n", f)
	}
	text.WriteString("Are they right?")
	return c.Ask(text.String())
}

// look finds the nodes and looks at them. dead says that no API server answers.
func (c *command) look(ctx context.Context, s *session) (o rotation.Observation, dead bool, err error) {
	nodes, err := rotation.FindNodes(ctx, s.jump.Host(theHost), s.layout, kube.Connector(s.jump), time.Now())
	switch {
	case err == nil && c.o.force:
		c.warn("The API server answers: --force has nothing to skip.")
	case c.o.force && errors.Is(err, fault.Unavailable):
		c.warn("The API server does not answer; as --force was given, the nodes are looked for in the database of etcd.")
		dead = true
		nodes, err = s.nodesInEtcd(ctx)
	}
	if err != nil {
		return o, dead, err
	}
	if err := s.reach(ctx, nodes); err != nil {
		return o, dead, err
	}
	if o, err = rotation.Observe(ctx, s.layout, nodes, s.hosts, time.Now()); err != nil {
		return o, dead, err
	}
	if dead {
		if err := s.allDead(ctx, o); err != nil {
			return o, dead, err
		}
	}
	return o, dead, c.matches(s, o)
}

// nodesInEtcd finds the nodes in the database file of the jump host's etcd.
func (s *session) nodesInEtcd(ctx context.Context) ([]rotation.Node, error) {
	db, err := etcdadmin.NewDatabase()
	if err != nil {
		return nil, err
	}
	defer db.Close()
	if err := rotation.CopyDatabase(ctx, s.jump.Host(theHost), s.layout, db); err != nil {
		return nil, err
	}
	values, err := db.Values(rotation.NodesInEtcd)
	if err != nil {
		return nil, err
	}
	var nodes []rotation.Node
	for key, stored := range values {
		n, err := kube.ParseNode(stored)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		nodes = append(nodes, n)
	}
	return nodes, nil
}

// allDead refuses a recovery, which takes all API servers down, where one answers.
func (s *session) allDead(ctx context.Context, o rotation.Observation) error {
	alive, err := rotation.Alive(ctx, s.jump.Host(theHost), o, kube.Connector(s.jump))
	if err != nil || len(alive) == 0 {
		return err
	}
	return fault.New(fault.Precondition, "SomeAnswer", "The API server of the SSH host does not answer, but that of %s does.", strings.Join(alive, ", ")).
		WithFix("give %s as --ssh-host, and repair the other first: a rotation needs all of them", alive[0])
}

// matches checks that the API model is that of the cluster.
func (c *command) matches(s *session, o rotation.Observation) error {
	if s.model == nil {
		return nil
	}
	masters := 0
	for _, m := range o.Machines {
		if m.Master {
			masters++
		}
	}
	if masters != s.model.Masters {
		return fault.New(fault.Precondition, "OtherModel", "The API model names %d masters, and the cluster has %d.", s.model.Masters, masters).
			At("properties.masterProfile.count").WithFix("give the API model of this cluster, as it is now")
	}
	return rotation.MatchProfile(o, s.model.Profile)
}
