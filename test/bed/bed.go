//go:build linux

// Package bed is a real Kubernetes cluster with several masters on this one
// machine, for tests of the whole system and for people who want to look at one.
//
// Idea: every machine of the cluster is a container that boots systemd, with
// sshd, containerd and kubelet; the machines, their switch and their load
// balancer live in network namespaces of the bed alone. What differs from
// hardware is the kernel, which all share, and nothing that a rotation of
// certificates could see.
//
// Invariant: everything that a bed makes outside its folder carries the bed's
// name (namespaces, control groups) and every process that it starts is in one
// of its control groups, from before its first instruction.
//
// Consequences: beds of different names live side by side with the same
// addresses, and [Down] needs only the name to end exactly what the bed
// started, also when [Up] was killed half way. Nothing in the root namespace
// can reach a machine: the way in is one loopback port that leads to sshd of the
// first master, or [Cluster.Dial] and [Cluster.Exec], which need root; a test
// that needs more opens it, port by port, with [Cluster.Reach] and
// [Cluster.Expose].
//
// With [Config.Services] the cluster also runs applications: kubeadm's own
// kube-proxy and CoreDNS, and a registry from which pods get their images. What
// is not as in a cluster elsewhere then: the registry answers for every registry
// there is, so the host in an image's name means nothing, and an image that
// nobody has pushed does not exist; kube-proxy's image has the programs of Debian
// and "alpine" is Debian's busybox; CoreDNS has only the plugins that kubeadm
// configures; names outside the cluster do not exist, and no packet leaves the
// bed; nodes connect their pods by routes (the CNI plugin ptp), not by a bridge;
// masters without workers take ordinary pods; the API servers' certificate also
// names 127.0.0.1.
package bed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// Layouts: how a cluster is made, and where its certificates are.
const (
	// LayoutKubeadm is a cluster made by kubeadm: certificates in
	// /etc/kubernetes/pki, etcd and the control plane as static pods.
	LayoutKubeadm = "kubeadm"
	// LayoutAKSEngine is a cluster that looks as if aks-engine had made it:
	// certificates in /etc/kubernetes/certs, one CA, etcd as a systemd unit, the
	// rest of the control plane as static pods, and an API model beside it.
	LayoutAKSEngine = "aks-engine"
)

// Config says what to bring up. The zero value is a kubeadm cluster of three
// masters and no worker.
type Config struct {
	Name    string    // unique on this machine, at most 20 of a-z 0-9 -; empty: the layout's name
	Layout  string    // [LayoutKubeadm], also when empty, or [LayoutAKSEngine]
	Masters int       // 0: three
	Workers int       // without one the probe pods run on masters
	Dir     string    // the bed's folder, made by Up, on a disk rather than in memory; empty: beds/NAME in the cache
	Log     io.Writer // progress, a line per step; nil: none
	Keep    bool      // leave a bed that failed to come up, for a look; [Down] removes it

	// Services makes a cluster that applications run on: Services are reached,
	// names resolved, images pulled. Only in the layout kubeadm.
	Services bool
}

// Roles of a node.
const (
	RoleMaster = "master"
	RoleWorker = "worker"
)

// Node is a machine of the cluster. Its name is its host name and its name in Kubernetes.
type Node struct {
	Name string `json:"name"`
	IP   string `json:"ip"` // inside the bed's network
	Role string `json:"role"`
}

// Cluster is a bed that is up. As JSON it is cluster.json in the bed's folder.
type Cluster struct {
	Name         string `json:"name"`
	Layout       string `json:"layout"`
	Dir          string `json:"dir"`
	SSHHost      string `json:"sshHost"` // with SSHPort: sshd of the first master, as seen from this machine
	SSHPort      int    `json:"sshPort"`
	SSHUser      string `json:"sshUser"`      // may use sudo without a password
	SSHKey       string `json:"sshKey"`       // path of the private key that opens every node
	KnownHosts   string `json:"knownHosts"`   // path; knows the loopback port, and every node by name and address
	Kubeconfig   string `json:"kubeconfig"`   // path of a copy of the administrator's; its server is LoadBalancer
	APIModel     string `json:"apiModel"`     // path; empty where the layout has none
	LoadBalancer string `json:"loadBalancer"` // host:port inside the bed's network
	Services     bool   `json:"services"`     // as in [Config]
	Nodes        []Node `json:"nodes"`        // masters first
}

// Names of files in a bed's folder.
const (
	recordFile  = "bed.json" // written before anything is made: the folder is a bed's
	clusterFile = "cluster.json"
)

// record is what [Down] needs: the name that everything carries.
type record struct {
	Name string `json:"name"`
}

// Open returns the bed that is up in the folder.
func Open(dir string) (*Cluster, error) {
	c := &Cluster{}
	b, err := os.ReadFile(filepath.Join(dir, clusterFile))
	if err != nil {
		return nil, fmt.Errorf("opening the bed: %w", err)
	}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("reading %s: %w", filepath.Join(dir, clusterFile), err)
	}
	return c, nil
}

// Up brings a bed up and returns when every node is ready and the probe pods
// run. The cache must have been prepared: see [Cache.Prepare]. When Up fails it
// takes down what it has made; the error is a [*StepError] where a step on one
// machine failed.
func Up(ctx context.Context, cfg Config) (*Cluster, error) {
	cache, err := OpenCache()
	if err != nil {
		return nil, err
	}
	if err := cache.ReadyFor(cfg); err != nil {
		return nil, err
	}
	b, err := plan(cfg, cache)
	if err != nil {
		return nil, err
	}
	if err := claim(b.Name, b.Dir); err != nil {
		return nil, err
	}
	if err = b.build(ctx); err == nil {
		return b.Cluster, nil
	}
	if cfg.Keep {
		return nil, err
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if down := Down(cleanup, b.Dir); down != nil {
		return nil, errors.Join(err, fmt.Errorf("taking down what there was: %w", down))
	}
	return nil, err
}

// Down takes the bed down and removes its folder: see the function [Down].
func (c *Cluster) Down(ctx context.Context) error { return Down(ctx, c.Dir) }

// Node returns the node with the name.
func (c *Cluster) Node(name string) (Node, error) {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return Node{}, fmt.Errorf("bed %s has no node %q", c.Name, name)
}

// adminKubeconfig is the path of the administrator's kubeconfig on a master.
func (c *Cluster) adminKubeconfig() string {
	if c.Layout == LayoutAKSEngine {
		return "/home/" + c.SSHUser + "/.kube/config"
	}
	return "/etc/kubernetes/admin.conf"
}

// save writes cluster.json: from then on the folder opens.
func (c *Cluster) save() error { return writeJSON(filepath.Join(c.Dir, clusterFile), c) }

// writeJSON replaces the file in one step.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding %s: %w", filepath.Base(path), err)
	}
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// bedIn returns the name of the bed in the folder, "" when there is none. A bed
// whose folder somebody has removed is still in the registry.
func bedIn(dir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			return "", fmt.Errorf("%s is not the folder of a bed: it has no %s", dir, recordFile)
		}
		return registeredIn(dir)
	}
	if err != nil {
		return "", err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return "", fmt.Errorf("reading %s: %w", filepath.Join(dir, recordFile), err)
	}
	return r.Name, checkName(r.Name)
}

// checkName keeps names to what fits into namespaces, control groups and paths.
// No dot: "bed a" must not be able to own what belongs to "bed a.b".
func checkName(name string) error {
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,19}$`).MatchString(name) {
		return fmt.Errorf("the name of a bed is 1 to 20 of a-z, 0-9 and -, not %q", name)
	}
	return nil
}
