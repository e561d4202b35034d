//go:build linux

package bed

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// upFor, as environment of the test binary, makes it bring up the bed of the
// name: the process that [TestDownAfterKilledUp] kills.
const upFor = "KEYFLEET_TEST_BED_UP"

func TestMain(m *testing.M) {
	if name := os.Getenv(upFor); name != "" {
		_, err := Up(context.Background(), Config{Name: name, Masters: 1, Log: os.Stdout})
		fmt.Println("Up returned:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// testBed returns the configuration of a small bed that is taken down after the
// test, whatever happens.
func testBed(t *testing.T) Config {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: a cluster takes half a minute")
	}
	if os.Getuid() != 0 {
		t.Skip("a bed needs root")
	}
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	if err := cache.Ready(); errors.Is(err, ErrNotPrepared) {
		t.Skip(err)
	}
	if missing := missingPackages(); len(missing) > 0 {
		t.Skip(ErrNotPrepared, "(no", strings.Join(missing, ", ")+")")
	}
	b := make([]byte, 3)
	rand.Read(b)
	name := "test-" + hex.EncodeToString(b)
	dir := cache.BedDir(name)
	t.Cleanup(func() {
		if err := Down(context.Background(), dir); err != nil {
			t.Error(err)
		}
	})
	return Config{Name: name, Masters: 1, Workers: 1, Dir: dir, Log: t.Output()}
}

// TestBed brings up a cluster, uses every way into it, and takes it down.
func TestBed(t *testing.T) {
	cfg := testBed(t)
	settings := readSettings(t)
	c, err := Up(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("nodes are ready", func(t *testing.T) {
		out, err := c.Exec(t.Context(), "master-0", `kubectl get nodes -o 'jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}'`)
		if want := "master-0 True\nworker-0 True\n"; err != nil || out != want {
			t.Errorf("got %q, %v; want %q", out, err, want)
		}
	})
	t.Run("the folder opens", func(t *testing.T) {
		opened, err := Open(c.Dir)
		if err != nil || !reflect.DeepEqual(opened, c) {
			t.Errorf("got %+v, %v; want %+v", opened, err, c)
		}
	})
	t.Run("the network is the bed's own", func(t *testing.T) { checkNetwork(t, c) })
	t.Run("ssh", func(t *testing.T) { checkSSH(t, c) })
	t.Run("kubectl", func(t *testing.T) {
		out, err := exec.Command(filepath.Join(c.Dir, "kubectl"), "get", "--raw", "/readyz").CombinedOutput()
		if err != nil || string(out) != "ok" {
			t.Errorf("got %q, %v", out, err)
		}
	})
	t.Run("pods", func(t *testing.T) { checkPods(t, c) })
	t.Run("a script that fails says so", func(t *testing.T) {
		out, err := c.Exec(t.Context(), "worker-0", "id -un; echo sorry >&2; exit 3")
		if out != "root\n" || err == nil || !strings.Contains(err.Error(), "worker-0: exit status 3\nsorry") {
			t.Errorf("got %q, %v", out, err)
		}
	})
	started := time.Now()
	if err := c.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("down in %.1f s", time.Since(started).Seconds())
	checkNothingLeft(t, cfg)
	if names, _ := os.ReadDir(registry); len(names) == 1 { // the lock: no other bed is up, so the kernel is as before
		if now := readSettings(t); now != settings {
			t.Errorf("settings of the kernel: %s; before: %s", now, settings)
		}
	}
	if err := c.Down(t.Context()); err != nil {
		t.Errorf("the second Down: %v", err)
	}
}

// TestDownAfterKilledUp kills Up while kubeadm runs and leaves it to Down to find
// what there is.
func TestDownAfterKilledUp(t *testing.T) {
	cfg := testBed(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), upFor+"="+cfg.Name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for sc := bufio.NewScanner(out); ; {
		if !sc.Scan() {
			t.Fatalf("Up ended before the machines had booted: %v", sc.Err())
		}
		t.Log(sc.Text())
		if strings.Contains(sc.Text(), "ssh on a loopback port") {
			break
		}
		if strings.HasPrefix(sc.Text(), "Up returned") {
			t.Fatal(sc.Text())
		}
	}
	time.Sleep(2 * time.Second) // kubeadm is at work
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if len(traces(t, cfg)) == 0 {
		t.Fatal("the killed Up left nothing: this tests nothing")
	}
	if err := Down(t.Context(), cfg.Dir); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, cfg)
}

// checkNetwork: what Dial reaches has no way from this process. That is read off
// the routes: a connection to such an address would leave the machine, and
// somebody else might answer it.
func checkNetwork(t *testing.T, c *Cluster) {
	away := route(t, "198.51.100.1") // an address of nobody (RFC 5737)
	ca, err := c.Exec(t.Context(), "master-0", "cat /etc/kubernetes/pki/ca.crt")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(ca)) {
		t.Fatalf("not a certificate: %s", ca)
	}
	for _, addr := range []string{c.Nodes[0].IP + ":22", c.Nodes[1].IP + ":22", c.LoadBalancer} {
		conn, err := c.Dial(t.Context(), "tcp", addr)
		if err == nil {
			err = answers(conn, roots)
		}
		if err != nil {
			t.Errorf("%s from inside: %v", addr, err)
		}
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		if way := route(t, host); way != away {
			t.Errorf("%s can be reached from outside the bed: %q, an address of nobody %q", addr, way, away)
		}
	}
	conn, err := c.Dial(t.Context(), "tcp", "worker-0:22") // by name
	if err == nil {
		err = answers(conn, roots)
	}
	if err != nil {
		t.Error(err)
	}
}

// route is where the kernel would send a packet to an address from here; none is sent.
func route(t *testing.T, address string) string {
	t.Helper()
	out, err := exec.Command("ip", "route", "get", address).CombinedOutput()
	if err != nil {
		return "unreachable"
	}
	_, way, _ := strings.Cut(string(out), address)
	way, _, _ = strings.Cut(way, "src")
	return strings.TrimSpace(way)
}

// answers waits a moment for the greeting of sshd or the certificate of the API,
// and closes the connection.
func answers(conn net.Conn, roots *x509.CertPool) error {
	defer conn.Close()
	host, port, err := net.SplitHostPort(conn.RemoteAddr().String())
	if err != nil {
		return err
	}
	if port == "22" {
		return readGreeting(conn)
	}
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second)) // a fresh connection takes a deadline
	return tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: host}).Handshake()
}

func checkSSH(t *testing.T, c *Cluster) {
	ssh := func(knownHosts string) (string, error) {
		out, err := exec.Command("ssh", "-i", c.SSHKey, "-p", fmt.Sprint(c.SSHPort), "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes",
			"-o", "UserKnownHostsFile="+knownHosts, "-o", "GlobalKnownHostsFile=/dev/null", c.SSHUser+"@"+c.SSHHost, "hostname; sudo -n id -un").CombinedOutput()
		return string(out), err
	}
	if out, err := ssh(c.KnownHosts); err != nil || out != "master-0\nroot\n" {
		t.Errorf("ssh to the loopback port: %q, %v", out, err)
	}
	if out, err := ssh("/dev/null"); err == nil {
		t.Errorf("ssh without known hosts is let in: %q", out)
	}
	out, err := exec.Command(filepath.Join(c.Dir, "ssh"), "worker-0", "hostname").CombinedOutput() // through the first master
	if err != nil || string(out) != "worker-0\n" {
		t.Errorf("ssh to the worker: %q, %v", out, err)
	}
}

// checkPods uses the token of a probe pod from that pod's network, at the address
// where a pod looks for the API.
func checkPods(t *testing.T, c *Cluster) {
	const script = `set -eo pipefail
token=$(echo /var/lib/kubelet/pods/*/volumes/*projected/token/token | cut -d' ' -f1)
network=$(ip netns list | grep -o '^cni-[^ ]*' | tail -1)
ip netns exec "$network" curl -sS --max-time 5 --cacert "${token%token}ca.crt" -H "Authorization: Bearer $(cat "$token")" \
	-H 'Content-Type: application/json' -d '{"kind":"SelfSubjectReview","apiVersion":"authentication.k8s.io/v1"}' \
	https://` + serviceIP + `/apis/authentication.k8s.io/v1/selfsubjectreviews`
	out, err := c.Exec(t.Context(), "worker-0", script)
	if err != nil || !strings.Contains(out, `"username": "system:serviceaccount:default:default"`) {
		t.Errorf("the API says to a pod: %s, %v", out, err)
	}
	out, err = c.Exec(t.Context(), "master-0", "kubectl get deployment probe -o jsonpath='{.status.availableReplicas}'")
	if err != nil || out != "2" {
		t.Errorf("available probe pods: %q, %v", out, err)
	}
}

func checkNothingLeft(t *testing.T, cfg Config) {
	t.Helper()
	for _, trace := range traces(t, cfg) {
		t.Errorf("left behind: %s", trace)
	}
}

// traces are what a bed leaves outside its process: found without the help of
// the code that is tested, by name and by folder.
func traces(t *testing.T, cfg Config) []string {
	t.Helper()
	var found []string
	mark := "keyfleet-bed." + cfg.Name
	glob := func(pattern string) {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, files...)
	}
	glob("/run/netns/" + mark + "*")
	glob("/sys/fs/cgroup/" + mark)
	glob("/sys/fs/cgroup/*/" + mark)
	glob("/run/systemd/nspawn/*/" + mark + "*")
	glob(filepath.Join(registry, cfg.Name))
	glob(cfg.Dir)
	for _, name := range []string{"switch", "master-0", "worker-0", "cni0"} { // links, in the root namespace
		glob("/sys/class/net/" + name)
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range append(processes, "/proc/self") {
		cmdline, _ := os.ReadFile(filepath.Join(p, "cmdline")) // of processes that end meanwhile there is nothing to read
		groups, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		if len(cmdline) > 0 && strings.Contains(string(groups)+string(cmdline), mark) || strings.Contains(string(cmdline), cfg.Dir) {
			found = append(found, p+": "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
		mounts, _ := os.ReadFile(filepath.Join(p, "mounts"))
		for line := range strings.Lines(string(mounts)) {
			if strings.Contains(line, mark) || strings.Contains(line, cfg.Dir) {
				found = append(found, "mount seen by "+p+": "+line)
				break
			}
		}
	}
	return found
}

// readSettings returns the settings of the kernel that a bed changes.
func readSettings(t *testing.T) string {
	t.Helper()
	var all []string
	for _, name := range sysctls() {
		b, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, name+"="+strings.TrimSpace(string(b)))
	}
	return strings.Join(all, " ")
}
