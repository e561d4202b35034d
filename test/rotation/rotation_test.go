//go:build linux

package rotation

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/test/bed"
	"keyfleet.dev/keyfleet/test/stack"
)

func TestMain(m *testing.M) {
	code := m.Run()
	stack.Clean()
	os.Exit(code)
}

// deep says that everything is wanted, not a sample.
func deep() bool { return os.Getenv("KEYFLEET_TEST_DEEP") != "" }

// cluster is a bed, and the program that rotates it, as it is called on one
// machine: that is a folder of journals, a way to the SSH host, an environment.
type cluster struct {
	*bed.Cluster
	t     *testing.T
	bin   string
	dir   string   // of the runs
	door  string   // host:port of the SSH host, as this machine reaches it
	known string   // file of known host keys
	env   []string // more of the program's environment
	flags []string // that every call needs in this layout
}

// in is the same cluster in a part of the test.
func (c *cluster) in(t *testing.T) *cluster {
	d := *c
	d.t = t
	return &d
}

// elsewhere is the same cluster, as another machine sees it that knows nothing yet.
func (c *cluster) elsewhere() *cluster {
	d := *c
	d.dir, d.env = c.t.TempDir(), nil
	return &d
}

// up brings a kubeadm bed up, which ends with the test. tags are those of the program.
func up(t *testing.T, masters, workers int, tags string) *cluster {
	t.Helper()
	return upAs(t, bed.LayoutKubeadm, masters, workers, tags)
}

// upAs brings a bed of a layout up.
func upAs(t *testing.T, layout string, masters, workers int, tags string) *cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("SHORT: a cluster takes minutes")
	}
	if os.Getuid() != 0 {
		t.Skip("a cluster on this machine needs root")
	}
	cache, err := bed.OpenCache()
	if err == nil {
		err = cache.Ready()
	}
	if err != nil {
		t.Skipf("no cluster can be made here: %v", err)
	}
	bin := stack.Build(t, tags)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	c, err := bed.Up(ctx, bed.Config{Name: fmt.Sprintf("rot-%d", os.Getpid()%100000), Layout: layout, Masters: masters, Workers: workers, Log: logTo{t}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := c.Down(ctx); err != nil {
			t.Errorf("taking the cluster down: %v", err)
		}
	})
	door := net.JoinHostPort(c.SSHHost, fmt.Sprint(c.SSHPort))
	out := &cluster{Cluster: c, t: t, bin: filepath.Join(bin, "keyfleet"), dir: t.TempDir(), door: door, known: c.KnownHosts}
	if c.APIModel != "" { // as in the example of aks-engine's page
		out.flags = []string{
			"--api-model", c.APIModel, "--location", "local", "--resource-group", "bed", "--subscription-id", "12345678-XXXX-YYYY-ZZZZ-1234567890ab",
			"--client-id", "12345678-XXXX-YYYY-ZZZZ-1234567890ab", "--client-secret", "12345678-XXXX-YYYY-ZZZZ-1234567890ab", "--azure-env", "AzureStackCloud",
		}
	}
	return out
}

// logTo writes lines into the test's log.
type logTo struct{ t *testing.T }

func (l logTo) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// sh runs a script on a machine.
func (c *cluster) sh(node, script string) string {
	c.t.Helper()
	return c.shWithin(time.Minute, node, script)
}

func (c *cluster) shWithin(limit time.Duration, node, script string) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	out, err := c.Exec(ctx, node, script)
	if err != nil {
		c.t.Fatalf("%s on %s: %v\n%s", script, node, err, out)
	}
	return out
}

// admin reads the administrator's kubeconfig as it is now.
func (c *cluster) admin() *login {
	c.t.Helper()
	l, err := readLogin([]byte(c.sh("master-0", `cat "$KUBECONFIG"`)))
	if err != nil {
		c.t.Fatal(err)
	}
	return l
}

// begin starts probes, for which it makes an object.
func (c *cluster) begin() *probes {
	c.t.Helper()
	c.sh("master-0", "kubectl create configmap probe --dry-run=client -o yaml | kubectl apply -f -")
	servers := map[string]string{}
	for _, n := range c.Nodes {
		if n.Role == bed.RoleMaster {
			servers[n.Name] = net.JoinHostPort(n.IP, "6443")
		}
	}
	p := begin(c.Dial, c.admin(), c.LoadBalancer, servers)
	c.t.Cleanup(p.end)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if err := p.settle(ctx); err != nil {
		c.t.Fatal(err)
	}
	return p
}

// keys are the hashes of what a rotation replaces, on one machine.
func (c *cluster) keys(node string) map[string]string {
	out := map[string]string{}
	script := `cd /etc/kubernetes; find pki -type f -name '*.crt' -o -name 'sa.pub' | sort | xargs sha256sum; sha256sum *.conf /var/lib/kubelet/pki/kubelet-client-current.pem`
	if c.Layout == bed.LayoutAKSEngine {
		script = `cd /etc/kubernetes/certs; sha256sum *.crt *.key /var/lib/kubelet/pki/kubelet-client-current.pem; [ ! -e /home/azureuser/.kube/config ] || sha256sum /home/azureuser/.kube/config`
	}
	for _, line := range strings.Split(strings.TrimSpace(c.sh(node, script)), "\n") {
		sum, file, _ := strings.Cut(line, "  ")
		out[file] = sum
	}
	return out
}

// adminChanged checks that the new administrator's kubeconfig works, and the old does not.
func (c *cluster) adminChanged(old *login) {
	c.t.Helper()
	c.reads(c.t, c.admin())
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	lb := target{"load balancer", c.LoadBalancer, true}
	p := &probes{dial: c.Dial}
	p.login.Store(c.admin())
	p.login.Store(&login{roots: p.login.Load().roots, cert: old.cert})
	if err := p.read(ctx, p.client(lb), lb); err == nil || !strings.Contains(err.Error(), "401") && !strings.Contains(err.Error(), "403") {
		c.t.Errorf("the old administrator: %v, want a refusal", err)
	}
	p.login.Store(old)
	if err := p.ready(ctx, p.client(lb), lb); err == nil {
		c.t.Error("who trusts only the old CA still accepts the API server")
	}
	if out := c.sh("master-0", "kubectl get nodes --no-headers"); strings.Count(out, " Ready ") != len(c.Nodes) {
		c.t.Errorf("nodes afterwards:\n%s", out)
	}
}

// reads checks that somebody may read through the load balancer. It stands beside
// probes, which have no second try: a balancer may be a second behind.
func (c *cluster) reads(t *testing.T, as *login) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	lb := target{"load balancer", c.LoadBalancer, true}
	p := &probes{dial: c.Dial}
	p.login.Store(as)
	for {
		err := p.read(ctx, p.client(lb), lb)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Errorf("reading through the load balancer: %v", err)
			return
		case <-time.After(500 * time.Millisecond):
		}
	}
}
