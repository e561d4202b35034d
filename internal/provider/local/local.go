// Package local offers nodes that are Linux namespaces on this machine: for
// trying out, for tests, and for pools whose nodes are this machine.
//
// Idea: package namespace makes one node; this package makes it a provider of
// pools. It keeps nothing in memory: what is there is what the folders under
// DIR/nodes and their locks say, so a server that starts again finds its nodes
// by looking, and every operation may be repeated after a crash at any point.
//
//	Start    folder -> agent's files -> first process        (running already: nothing)
//	Stop     kill, wait -> remove the folder             (nothing there: nothing)
//	Restart  ask the agent to end, kill, wait -> first process
//	Reimage  kill, wait -> mark -> empty the folder -> Start
//
// Invariant: Stop returns only when no process, mount or file of the node is
// left. Nothing on this machine's network is made or changed.
//
// Consequence for the operator: nodes live as long as this machine, not as long
// as the server; a server run with --dev takes its nodes with it ([Provider.StopAll]).
// The files of a node can be read from outside, at [Provider.Files].
package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
	"keyfleet.dev/keyfleet/internal/provider/local/namespace"
)

// Config is what the provider needs. Dir, Agent, Server and CA must be set.
type Config struct {
	Dir       string       // the server's data directory, absolute: nodes are in Dir/nodes, the server's socket is in Dir/run
	Agent     string       // path of the keyfleet-agent program, absolute
	AgentArgs []string     // its arguments inside a node; nil: run with the configuration that Start writes
	Server    string       // URL of the node host, "https://node.keyfleet.internal:8443"
	CA        []byte       // PEM of the CA of the server's certificates
	AgentEnv  []string     // added to the environment of agents; for tests
	InitEnv   []string     // added to the environment of a node's first process; for tests
	Log       *slog.Logger // nil: nothing is logged
}

// Provider is the provider "local". Make it with [New].
type Provider struct {
	cfg   Config
	ports []int
	busy  keyedLock
}

var _ pool.Provider = (*Provider)(nil)

// New makes the provider and its folders. It starts nothing.
func New(cfg Config) (*Provider, error) {
	u, err := url.Parse(cfg.Server)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("setting up local nodes: %q is no URL of the node host", cfg.Server)
	}
	ports := []int{443} // what a URL without a port means
	if p := u.Port(); p != "" && p != "443" {
		n, err := strconv.Atoi(p)
		if err != nil {
			return nil, fmt.Errorf("setting up local nodes: %q is no port", p)
		}
		ports = append(ports, n)
	}
	if !filepath.IsAbs(cfg.Dir) || !filepath.IsAbs(cfg.Agent) {
		return nil, errors.New("setting up local nodes: the data directory and the agent's path must be absolute")
	}
	if cfg.AgentArgs == nil {
		cfg.AgentArgs = []string{"run", "--config", "/var/lib/waagent/" + configFile}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Provider{cfg: cfg, ports: ports}
	for _, d := range []string{p.nodesDir(), SocketDir(cfg.Dir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("setting up local nodes: %w", err)
		}
	}
	return p, nil
}

// Name is "local".
func (p *Provider) Name() string { return "local" }

// Offers reports whether nodes of the operating system can be had.
func (p *Provider) Offers(os string) bool { return os == "linux" }

func (p *Provider) nodesDir() string { return filepath.Join(p.cfg.Dir, "nodes") }

func (p *Provider) folder(id string) (namespace.Folder, error) {
	if !namespace.ValidID(id) {
		return "", fault.New(fault.Invalid, "InvalidNodeID", "%q cannot be the name of a local node.", id)
	}
	return namespace.Folder(filepath.Join(p.nodesDir(), id)), nil
}

// Files returns the folder on this machine that the node sees as /var/lib/waagent.
func (p *Provider) Files(nodeID string) string {
	f, err := p.folder(nodeID)
	if err != nil {
		return ""
	}
	return f.WAAgent()
}

// Check reports as a *fault.Error why this machine does not let the provider
// make nodes, and the fix; nil if it does.
func (p *Provider) Check(ctx context.Context) error { return namespace.Check(ctx, p.cfg.Agent) }

// Start brings the node up: it returns when its agent is being started, after
// some ten milliseconds. A node that runs is left alone.
func (p *Provider) Start(ctx context.Context, n pool.NodeSpec) error {
	f, err := p.folder(n.ID)
	if err != nil {
		return err
	}
	defer p.busy.lock(n.ID)()
	return p.start(ctx, f, n)
}

func (p *Provider) start(ctx context.Context, f namespace.Folder, n pool.NodeSpec) error {
	files, err := p.agentFiles(n)
	if err != nil {
		return fmt.Errorf("writing the configuration of node %s: %w", n.ID, err)
	}
	spec := namespace.Node{
		ID: n.ID, Agent: p.cfg.Agent, Args: p.cfg.AgentArgs, Env: p.cfg.AgentEnv,
		SocketDir: SocketDir(p.cfg.Dir), Ports: p.ports, Hosts: n.Hosts,
	}
	if err := namespace.Explain(namespace.Start(ctx, f, spec, files, p.cfg.InitEnv)); err != nil {
		return fmt.Errorf("starting node %s: %w", n.ID, err)
	}
	p.cfg.Log.Info("node is up", "node", n.ID, "pool", n.Pool, "files", f.WAAgent())
	return nil
}

// The agent's files below /var/lib/waagent: its state folder, in which it keeps
// its key and certificate, and what the provider puts there.
const (
	agentState = "keyfleet"
	configFile = agentState + "/agent.json"
	tokenFile  = agentState + "/join-token"
	caFile     = agentState + "/server-ca.pem"
)

// agentConfig is the agent's configuration file; see agent.Config, which reads it.
type agentConfig struct {
	Server      string `json:"server"`
	Address     string `json:"address"`
	CAFile      string `json:"caFile"`
	TokenFile   string `json:"tokenFile"`
	ManageHosts bool   `json:"manageHosts"`
}

// agentFiles are the files with which the agent enrols. The token has its own
// file so that the agent can remove it when it is spent.
func (p *Provider) agentFiles(n pool.NodeSpec) ([]namespace.File, error) {
	const dir = "/var/lib/waagent/"
	config, err := json.MarshalIndent(agentConfig{
		Server: p.cfg.Server, Address: "127.0.0.1", CAFile: dir + caFile, TokenFile: dir + tokenFile, ManageHosts: true,
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	files := []namespace.File{{Path: caFile, Content: p.cfg.CA}, {Path: configFile, Content: config}}
	if n.Token != "" {
		files = append(files, namespace.File{Path: tokenFile, Content: []byte(n.Token.Reveal())})
	}
	return files, nil
}

// Stop ends the node and removes it.
func (p *Provider) Stop(ctx context.Context, nodeID string) error {
	f, err := p.folder(nodeID)
	if err != nil {
		return err
	}
	defer p.busy.lock(nodeID)()
	if _, err := os.Lstat(string(f)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	lock, err := namespace.Kill(ctx, f, false)
	if err != nil {
		return fmt.Errorf("stopping node %s: %w", nodeID, err)
	}
	defer lock.Release()
	if err := namespace.Remove(f); err != nil {
		return fmt.Errorf("removing node %s: %w", nodeID, err)
	}
	p.cfg.Log.Info("node is gone", "node", nodeID)
	return nil
}

// Restart ends the node's processes and starts it again with its files.
func (p *Provider) Restart(ctx context.Context, nodeID string) error {
	f, err := p.folder(nodeID)
	if err != nil {
		return err
	}
	defer p.busy.lock(nodeID)()
	n, err := f.Read()
	if err != nil {
		return fault.New(fault.NotFound, "NodeNotFound", "There is no local node %s.", nodeID).Because(err)
	}
	lock, err := namespace.Kill(ctx, f, true)
	if err != nil {
		return fmt.Errorf("restarting node %s: %w", nodeID, err)
	}
	lock.Release()
	// A newer program or another port of this server is taken up here.
	n.Agent, n.Args, n.Env, n.Ports = p.cfg.Agent, p.cfg.AgentArgs, p.cfg.AgentEnv, p.ports
	if err := namespace.Explain(namespace.Start(ctx, f, n, nil, p.cfg.InitEnv)); err != nil {
		return fmt.Errorf("restarting node %s: %w", nodeID, err)
	}
	return nil
}

// Reimage gives the node back its first state.
func (p *Provider) Reimage(ctx context.Context, n pool.NodeSpec) error {
	f, err := p.folder(n.ID)
	if err != nil {
		return err
	}
	defer p.busy.lock(n.ID)()
	if err := os.MkdirAll(string(f), 0o700); err != nil {
		return fmt.Errorf("reimaging node %s: %w", n.ID, err)
	}
	lock, err := namespace.Kill(ctx, f, false)
	if err != nil {
		return fmt.Errorf("reimaging node %s: %w", n.ID, err)
	}
	err = namespace.Wipe(f)
	lock.Release()
	if err != nil {
		return fmt.Errorf("reimaging node %s: %w", n.ID, err)
	}
	return p.start(ctx, f, n)
}

// List returns the nodes that have a folder, by id.
func (p *Provider) List(context.Context) ([]pool.ProviderNode, error) {
	entries, err := os.ReadDir(p.nodesDir())
	if err != nil {
		return nil, fmt.Errorf("listing local nodes: %w", err)
	}
	var out []pool.ProviderNode
	for _, e := range entries {
		f, err := p.folder(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		n, err := p.look(f)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("looking at node %s: %w", e.Name(), err)
		}
		out = append(out, n)
	}
	return out, nil
}

func (p *Provider) look(f namespace.Folder) (pool.ProviderNode, error) {
	defer p.busy.lock(f.ID())() // asking whether the lock is free takes it for a moment
	n := pool.ProviderNode{ID: f.ID()}
	if _, err := os.Stat(string(f)); err != nil {
		return n, err
	}
	var err error
	if n.Running, err = f.Running(); err != nil || n.Running {
		return n, err
	}
	n.Detail = "its processes have ended"
	if last := lastLine(f.Console()); last != "" {
		n.Detail += ": " + last
	}
	return n, nil
}

// lastLine returns the last line that a node's console holds, cut to a sane length.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	buf := make([]byte, 512)
	fi, err := f.Stat()
	if err != nil {
		return ""
	}
	n, _ := f.ReadAt(buf, max(0, fi.Size()-int64(len(buf)))) // io.EOF is the normal end here
	lines := bytes.Split(bytes.TrimSpace(buf[:n]), []byte("\n"))
	return string(bytes.ToValidUTF8(lines[len(lines)-1], nil))
}

// StopAll stops every node, all at once, and removes Dir/nodes if nothing is left.
func (p *Provider) StopAll(ctx context.Context) error {
	nodes, err := p.List(ctx)
	if err != nil {
		return err
	}
	var all errgroup.Group
	for _, n := range nodes {
		all.Go(func() error { return p.Stop(ctx, n.ID) })
	}
	if err := all.Wait(); err != nil {
		return err
	}
	return effect.Do("remove nodes folder", func() error {
		if err := os.Remove(p.nodesDir()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("removing the nodes' folder: %w", err)
		}
		return nil
	})
}

// keyedLock lets one caller at a time work on a key. The zero value is ready.
type keyedLock struct {
	mu   sync.Mutex
	held map[string]*waiting // guarded by mu; absent: nobody holds or waits
}

type waiting struct {
	sync.Mutex
	users int // guarded by keyedLock.mu
}

// lock waits for the key and returns the function that gives it back.
func (k *keyedLock) lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*waiting{}
	}
	w := k.held[key]
	if w == nil {
		w = &waiting{}
		k.held[key] = w
	}
	w.users++
	k.mu.Unlock()
	w.Lock()
	return func() {
		w.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if w.users--; w.users == 0 {
			delete(k.held, key)
		}
	}
}
