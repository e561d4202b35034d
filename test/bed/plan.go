//go:build linux

package bed

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/template"
	"time"
)

// The addresses of every bed. They can be the same because no two beds share a network.
const (
	network        = "10.77.0."
	balancerIP     = network + "1"
	loadBalancer   = balancerIP + ":8443"
	serviceIP      = "10.96.0.1" // of the Service kubernetes.default
	serviceNetwork = "10.96.0.0/16"
	podNetwork     = "10.244.0.0/16"
	firstMaster    = 11
	firstWorker    = 31
	registryAddr   = balancerIP + ":5000" // with Services
)

//go:embed templates
var templates embed.FS

// builder brings one bed up. It is the Cluster to be, with what only Up needs.
type builder struct {
	*Cluster
	cache      *Cache
	bring      func(context.Context) error // the layout's own part, once the machines run
	staticPods int                         // of a master: API server, controller manager, scheduler, and etcd unless it is a unit
	started    time.Time

	mu  sync.Mutex // guards log: machines report at the same time
	log io.Writer
}

// plan fills in what the configuration leaves open. Nothing is made yet.
func plan(cfg Config, cache *Cache) (*builder, error) {
	c := &Cluster{
		Name: cfg.Name, Layout: cfg.Layout, Dir: cfg.Dir,
		SSHHost: "127.0.0.1", SSHUser: "azureuser", LoadBalancer: loadBalancer, Services: cfg.Services,
	}
	b := &builder{Cluster: c, cache: cache, started: time.Now(), log: cfg.Log}
	if b.log == nil {
		b.log = io.Discard
	}
	if c.Layout == "" {
		c.Layout = LayoutKubeadm
	}
	switch c.Layout {
	case LayoutKubeadm:
		b.bring, b.staticPods = b.bringKubeadm, 4
	case LayoutAKSEngine:
		b.bring, b.staticPods = b.bringAKSEngine, 3
	default:
		return nil, fmt.Errorf("there is no layout %q: take %s or %s", c.Layout, LayoutKubeadm, LayoutAKSEngine)
	}
	if c.Services && c.Layout != LayoutKubeadm {
		return nil, fmt.Errorf("the layout %s has no Services: take %s", c.Layout, LayoutKubeadm)
	}
	if c.Name == "" {
		c.Name = c.Layout
	}
	if err := checkName(c.Name); err != nil {
		return nil, err
	}
	if c.Dir == "" {
		c.Dir = cache.BedDir(c.Name)
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(dir, ":,\\\" \n") { // options of an overlay mount, of haproxy and of ssh
		return nil, fmt.Errorf("the bed's folder %q may not hold spaces, quotes, colons or commas", dir)
	}
	c.Dir = dir
	c.SSHKey, c.KnownHosts, c.Kubeconfig = b.path("id"), b.path("known_hosts"), b.path("kubeconfig")
	if c.Layout == LayoutAKSEngine {
		c.APIModel = b.path("apimodel.json")
	}
	c.Nodes, err = nodes(cfg)
	return b, err
}

func nodes(cfg Config) ([]Node, error) {
	if cfg.Masters == 0 {
		cfg.Masters = 3
	}
	if cfg.Masters < 1 || cfg.Masters > 9 || cfg.Workers < 0 || cfg.Workers > 9 {
		return nil, errors.New("a bed has 1 to 9 masters and 0 to 9 workers")
	}
	var all []Node
	for i := range cfg.Masters {
		all = append(all, Node{Name: fmt.Sprintf("master-%d", i), IP: fmt.Sprint(network, firstMaster+i), Role: RoleMaster})
	}
	for i := range cfg.Workers {
		all = append(all, Node{Name: fmt.Sprintf("worker-%d", i), IP: fmt.Sprint(network, firstWorker+i), Role: RoleWorker})
	}
	return all, nil
}

// podSubnet is the part of the pods' network that lives on the node.
func podSubnet(n Node) string {
	return "10.244." + n.IP[strings.LastIndexByte(n.IP, '.')+1:] + ".0/24"
}

// build does the steps in order and says how long each took.
func (b *builder) build(ctx context.Context) error {
	type step struct {
		done string
		do   func(context.Context) error
	}
	steps := []step{
		{"keys made", b.makeKeys},
		{"network and load balancer up", b.makeNetwork},
		{"machines booted", b.bootAll},
		{"ssh on a loopback port", b.openDoor},
		{"cluster up", b.bring},
	}
	if b.Services {
		steps = slices.Insert(steps, 2, step{"registry up", b.startServices})
	}
	for _, s := range steps {
		if err := s.do(ctx); err != nil {
			return err
		}
		b.logf("%s", s.done)
	}
	if err := b.writeWrapper(); err != nil {
		return err
	}
	return b.save()
}

func (b *builder) logf(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fmt.Fprintf(b.log, "%6.1fs  %s\n", time.Since(b.started).Seconds(), fmt.Sprintf(format, args...))
}

// path is a path in the bed's folder.
func (c *Cluster) path(elem ...string) string {
	return filepath.Join(append([]string{c.Dir}, elem...)...)
}

func (c *Cluster) masters() []Node {
	var m []Node
	for _, n := range c.Nodes {
		if n.Role == RoleMaster {
			m = append(m, n)
		}
	}
	return m
}

func (c *Cluster) workers() []Node { return c.Nodes[len(c.masters()):] }

// each does the same for several nodes at the same time and waits for all. When
// one fails the others are told to stop.
func each(ctx context.Context, nodes []Node, do func(context.Context, Node) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			if err := do(ctx, n); err != nil {
				cancel(err) // the first error stays; later ones follow from it
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// scene is what a template may speak of.
type scene struct {
	*Cluster
	Node           Node // where the file goes, if it is one machine's
	First          Node
	Others         []Node
	Masters        []Node
	Workers        []Node
	BalancerIP     string
	ServiceIP      string
	ServiceNetwork string
	PodNetwork     string
	PodSubnet      string
	Version        string
	EtcdVersion    string
	Repository     string
	Pause          string
	Token          string
	CertificateKey string
	CA             string // certificate of the cluster's CA, as kubeconfigs hold it
	AKS            aksFacts
	Registry       string // host:port inside the bed's network
	PassageTo      string // server of a [Cluster.passage], as haproxy has it
}

func (c *Cluster) scene(n Node) scene {
	return scene{
		Cluster: c, Node: n, First: c.Nodes[0], Others: c.Nodes[1:], Masters: c.masters(), Workers: c.workers(),
		Registry: registryAddr, BalancerIP: balancerIP, ServiceIP: serviceIP, ServiceNetwork: serviceNetwork, PodNetwork: podNetwork,
		PodSubnet: podSubnet(n), Version: kubernetesVersion, EtcdVersion: etcdVersion, Repository: repository, Pause: pauseImage,
	}
}

// render fills the template with the name.
func render(name string, s scene) (string, error) {
	t, err := template.New("").Option("missingkey=error").ParseFS(templates, "templates/*")
	if err != nil {
		return "", fmt.Errorf("parsing the templates: %w", err)
	}
	var out strings.Builder
	if err := t.ExecuteTemplate(&out, name, s); err != nil {
		return "", fmt.Errorf("filling the template %s: %w", name, err)
	}
	return out.String(), nil
}

// renderTo fills the template into a file.
func renderTo(path, name string, s scene) error {
	text, err := render(name, s)
	if err != nil {
		return err
	}
	return writeFile(path, text, 0o644)
}

// writeFile writes the file and makes the folders above it.
func writeFile(path, text string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), mode)
}
