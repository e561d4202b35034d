//go:build linux

package rotation

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
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

// cluster is a bed, and the program that rotates it.
type cluster struct {
	*bed.Cluster
	t   *testing.T
	bin string
	dir string   // of the runs
	env []string // more of the program's environment
}

// up brings a bed up, which ends with the test. tags are those of the program.
func up(t *testing.T, masters, workers int, tags string) *cluster {
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
	c, err := bed.Up(ctx, bed.Config{Name: fmt.Sprintf("rot-%d", os.Getpid()%100000), Masters: masters, Workers: workers, Log: logTo{t}})
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
	return &cluster{Cluster: c, t: t, bin: filepath.Join(bin, "keyfleet"), dir: t.TempDir()}
}

// logTo writes lines into the test's log.
type logTo struct{ t *testing.T }

func (l logTo) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// command is one call of rotate-certs.
func (c *cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.bin, append([]string{"rotate-certs"}, args...)...)
	cmd.Args = append(cmd.Args, "--ssh-host", fmt.Sprintf("ssh://%s@%s", c.SSHUser, net.JoinHostPort(c.SSHHost, fmt.Sprint(c.SSHPort))),
		"--linux-ssh-private-key", c.SSHKey, "--known-hosts", c.KnownHosts, "--run-dir", c.dir)
	cmd.Env = append(os.Environ(), c.env...)
	return cmd
}

// rotate runs rotate-certs to its end; at tells of each line.
func (c *cluster) rotate(at func(line string), args ...string) error {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 30*time.Minute)
	defer cancel()
	cmd := c.command(ctx, args...)
	out, in := io.Pipe()
	cmd.Stdout, cmd.Stderr = in, in
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { // ends with the command
		err := cmd.Wait()
		in.Close()
		ended <- err
	}()
	for lines := bufio.NewScanner(out); lines.Scan(); {
		c.t.Log(lines.Text())
		if at != nil {
			at(lines.Text())
		}
	}
	return <-ended
}

// sh runs a script on a machine.
func (c *cluster) sh(node, script string) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
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
	l, err := readLogin([]byte(c.sh("master-0", "cat /etc/kubernetes/admin.conf")))
	if err != nil {
		c.t.Fatal(err)
	}
	return l
}

// begin starts probes, for which it makes an object.
func (c *cluster) begin() *probes {
	c.t.Helper()
	c.sh("master-0", "kubectl --kubeconfig /etc/kubernetes/admin.conf create configmap probe")
	servers := map[string]string{}
	for _, n := range c.Nodes {
		if n.Role == bed.RoleMaster {
			servers[n.Name] = net.JoinHostPort(n.IP, "6443")
		}
	}
	p := begin(c.Dial, c.admin(), c.LoadBalancer, servers)
	c.t.Cleanup(p.end)
	return p
}

// keys are the hashes of what a rotation replaces, on one machine.
func (c *cluster) keys(node string) map[string]string {
	out := map[string]string{}
	script := `cd /etc/kubernetes; find pki -type f -name '*.crt' -o -name 'sa.pub' | sort | xargs sha256sum; sha256sum *.conf /var/lib/kubelet/pki/kubelet-client-current.pem`
	for _, line := range strings.Split(strings.TrimSpace(c.sh(node, script)), "\n") {
		sum, file, _ := strings.Cut(line, "  ")
		out[file] = sum
	}
	return out
}

func TestFullRotationLosesNoRequest(t *testing.T) {
	c := up(t, 3, 1, "")
	before := map[string]map[string]string{}
	for _, n := range c.Nodes {
		before[n.Name] = c.keys(n.Name)
	}
	old := c.admin()
	p := c.begin()
	began := time.Now()
	err := c.rotate(func(line string) {
		if strings.Contains(line, "point of no return ----") && !strings.Contains(line, "until here") {
			p.login.Store(c.admin()) // what an administrator does after the switch
		}
	}, "--restart-pods")
	took := time.Since(began)
	p.end()
	t.Logf("rotated in %s\n%s", took.Round(time.Second), p)
	if err != nil {
		t.Fatal(err)
	}
	if o := p.outcomes["load balancer"]; o.failed != 0 || o.total < 100 {
		t.Errorf("%d of %d requests through the load balancer failed: %v", o.failed, o.total, o.reasons)
	}
	if n := p.missed(); n != 0 {
		t.Errorf("the watch missed %d of %d writes", n, p.written)
	}
	for _, n := range c.Nodes {
		for file, sum := range c.keys(n.Name) {
			if sum == before[n.Name][file] {
				t.Errorf("%s on %s is as it was", file, n.Name)
			}
		}
	}
	c.adminChanged(old)
	if t.Failed() {
		return
	}
	fmt.Printf("a full rotation of %d nodes took %s: %d requests through the load balancer, %d failed, longest gap %.2f s\n",
		len(c.Nodes), took.Round(time.Second), p.outcomes["load balancer"].total, p.outcomes["load balancer"].failed, p.outcomes["load balancer"].longest.Seconds())
}

// adminChanged checks that the new administrator's kubeconfig works, and the old does not.
func (c *cluster) adminChanged(old *login) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	lb := target{"load balancer", c.LoadBalancer, true}
	p := &probes{dial: c.Dial}
	p.login.Store(c.admin())
	if err := p.read(ctx, p.client(lb), lb); err != nil {
		c.t.Errorf("the new administrator: %v", err)
	}
	p.login.Store(&login{roots: p.login.Load().roots, cert: old.cert})
	if err := p.read(ctx, p.client(lb), lb); err == nil || !strings.Contains(err.Error(), "401") && !strings.Contains(err.Error(), "403") {
		c.t.Errorf("the old administrator: %v, want a refusal", err)
	}
	p.login.Store(old)
	if err := p.ready(ctx, p.client(lb), lb); err == nil {
		c.t.Error("who trusts only the old CA still accepts the API server")
	}
	if out := c.sh("master-0", "kubectl --kubeconfig /etc/kubernetes/admin.conf get nodes --no-headers"); strings.Count(out, " Ready ") != len(c.Nodes) {
		c.t.Errorf("nodes afterwards:\n%s", out)
	}
}
