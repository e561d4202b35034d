//go:build linux

package bed

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestServices brings up the smallest cluster that applications run on, and does
// what they do.
func TestServices(t *testing.T) {
	cfg := testBed(t)
	cfg.Workers, cfg.Services = 0, true
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	if err := cache.ReadyFor(cfg); err != nil {
		t.Skip(err)
	}
	c, err := Up(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, check := range []struct {
		what string
		do   func(*testing.T, *Cluster)
	}{
		{"a Job of alpine prints its Secret", checkJob},
		{"pods find each other by Services", checkService},
		{"names", checkNames},
		{"an image that is not there", checkNoImage},
		{"an image that a test pushes", checkPushed},
		{"a server of this machine", checkExposed},
		{"a process of this machine", checkReached},
		{"helm", checkHelm},
		{"SecretProviderClass", checkSecretProviderClass},
	} {
		t.Run(check.what, func(t *testing.T) { check.do(t, c) })
	}
	if err := c.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, cfg)
}

// kubectl runs the bed's own, and fails the test when it fails.
func kubectl(t *testing.T, c *Cluster, stdin string, args ...string) string {
	t.Helper()
	out, err := client(c, "kubectl", stdin, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// client runs kubectl or helm and returns all that it printed.
func client(c *Cluster, name, stdin string, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(c.Dir, name), args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// runJob runs a Job to its end and returns its log. The container is JSON.
func runJob(t *testing.T, c *Cluster, name, container string) string {
	t.Helper()
	kubectl(t, c, fmt.Sprintf(`{
  "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": %q},
  "spec": {"backoffLimit": 0, "template": {"spec": {"restartPolicy": "Never", "containers": [%s]}}}
}`, name, container), "apply", "-f", "-")
	out, err := client(c, "kubectl", "", "wait", "--for=condition=Complete", "--timeout=90s", "job/"+name)
	if err != nil {
		described, _ := client(c, "kubectl", "", "describe", "pods", "--selector=job-name="+name)
		log, _ := client(c, "kubectl", "", "logs", "job/"+name)
		t.Fatalf("the Job %s does not complete: %v\n%s\n%s\n%s", name, err, out, described, log)
	}
	return kubectl(t, c, "", "logs", "job/"+name)
}

// inShell is a container of alpine that runs the script.
func inShell(script string) string {
	b, _ := json.Marshal(map[string]any{"name": "shell", "image": "alpine", "command": []string{"sh", "-c", script}})
	return string(b)
}

func checkJob(t *testing.T, c *Cluster) {
	kubectl(t, c, "", "create", "secret", "generic", "connection", "--from-literal=AZURE_POSTGRESQL_HOST=db.example", "--from-literal=AZURE_POSTGRESQL_SSL=true")
	log := runJob(t, c, "sample", `{"name": "sample", "image": "alpine", "command": ["printenv"], "envFrom": [{"secretRef": {"name": "connection"}}]}`)
	for _, want := range []string{"AZURE_POSTGRESQL_HOST=db.example\n", "AZURE_POSTGRESQL_SSL=true\n"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log has no %q:\n%s", want, log)
		}
	}
}

func checkService(t *testing.T, c *Cluster) {
	kubectl(t, c, `
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: web
    image: alpine
    command: [sh, -c, "mkdir /www && echo hello from the shop >/www/index.html && exec httpd -f -p 8080 -h /www"]
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
`, "apply", "-f", "-")
	kubectl(t, c, "", "wait", "--namespace=shop", "--for=condition=Ready", "--timeout=90s", "pod/web-0")
	const retry = `for i in 1 2 3 4 5 6 7 8 9 10; do timeout 5 wget -q -O - http://%s && exit; sleep 1; done; exit 1` // kube-proxy needs a moment
	for i, name := range []string{"web.shop", "web.shop.svc.cluster.local"} {
		if log := runJob(t, c, fmt.Sprintf("visitor-%d", i), inShell(fmt.Sprintf(retry, name))); !strings.Contains(log, "hello from the shop\n") {
			t.Errorf("%s says %q", name, log)
		}
	}
	// A pod that is its own Service's only one: the way back must not be a shorter one.
	if out := kubectl(t, c, "", "exec", "--namespace=shop", "web-0", "--", "timeout", "5", "wget", "-q", "-O", "-", "http://web.shop.svc.cluster.local"); out != "hello from the shop\n" {
		t.Errorf("the pod's own Service says %q", out)
	}
}

func checkNames(t *testing.T, c *Cluster) {
	log := runJob(t, c, "names", inShell("nslookup kubernetes.default.svc.cluster.local; timeout 10 nslookup db.example.com; true"))
	for _, want := range []string{"Address: " + serviceIP + "\n", "can't find db.example.com: NXDOMAIN"} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in the answers:\n%s", want, log)
		}
	}
}

// checkNoImage: the registry is asked, says no, and that is the end of it.
func checkNoImage(t *testing.T, c *Cluster) {
	kubectl(t, c, "", "run", "nothing", "--image=no-such-image", "--restart=Never")
	const reason = "-o=jsonpath={.status.containerStatuses[0].state.waiting.reason}"
	deadline := time.Now().Add(30 * time.Second)
	for got := ""; got != "ErrImagePull" && got != "ImagePullBackOff"; got = kubectl(t, c, "", "get", "pod", "nothing", reason) {
		if time.Now().After(deadline) {
			t.Fatalf("the pod's reason to wait is %q", got)
		}
		time.Sleep(100 * time.Millisecond)
	}
	// The kubelet writes events after the state.
	const want = `"docker.io/library/no-such-image:latest": docker.io/library/no-such-image:latest: not found`
	for events := ""; !strings.Contains(events, want) || !strings.Contains(events, "Error: ErrImagePull"); events = kubectl(t, c, "", "describe", "pod", "nothing") {
		if time.Now().After(deadline) {
			t.Fatalf("the pod's events have no %q:\n%s", want, events)
		}
		time.Sleep(100 * time.Millisecond)
	}
	kubectl(t, c, "", "delete", "pod", "nothing", "--grace-period=0", "--force")
}

// checkPushed runs kubectl in a pod: it finds the API as every client in a pod does.
func checkPushed(t *testing.T, c *Cluster) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	const ref = "registry.bed.internal/tools/kubectl:0.1.0"
	program := "/usr/local/bin/kubectl"
	if err := c.PushImage(t.Context(), Image{Ref: ref, Files: map[string]string{program: cache.Kubectl()}, Entrypoint: []string{program}}); err != nil {
		t.Fatal(err)
	}
	log := runJob(t, c, "pushed", `{"name": "pushed", "image": "`+ref+`", "args": ["auth", "whoami", "-o=jsonpath={.status.userInfo.username}"]}`)
	if want := "system:serviceaccount:default:default"; log != want {
		t.Errorf("the API knows the pod as %q, want %q", log, want)
	}
}

// checkExposed: a pod reaches what listens on a loopback port here.
func checkExposed(t *testing.T, c *Cluster) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, "hello from the machine below")
			conn.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	addr, err := c.Expose(port)
	if err != nil {
		t.Fatal(err)
	}
	host, sameport, err := net.SplitHostPort(addr)
	if err != nil || sameport != fmt.Sprint(port) {
		t.Fatalf("port %d is exposed as %s, %v", port, addr, err)
	}
	if log := runJob(t, c, "caller", inShell("timeout 10 nc "+host+" "+sameport+" </dev/null")); log != "hello from the machine below\n" {
		t.Errorf("the pod hears %q", log)
	}
	if _, err := c.Expose(port); err == nil {
		t.Error("a port is exposed twice")
	}
}

// checkReached: a process outside the bed reaches the API and any port inside.
func checkReached(t *testing.T, c *Cluster) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := c.HostKubeconfig()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(cache.Kubectl(), "--kubeconfig="+kubeconfig, "get", "--raw", "/readyz").CombinedOutput()
	if err != nil || string(out) != "ok" {
		t.Errorf("the API from outside: %q, %v", out, err)
	}
	if again, err := c.HostKubeconfig(); err != nil || again != kubeconfig {
		t.Errorf("the second time it is %q, %v; want %q", again, err, kubeconfig)
	}
	if info, err := os.Stat(kubeconfig); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the kubeconfig: %v, %v; want mode 0600", info, err)
	}
	addr, err := c.Reach("master-0:22")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := readGreeting(conn); err != nil {
		t.Error(err)
	}
	if _, err := c.Reach("db.example.com:5432"); err == nil {
		t.Error("a name of the outside is reached inside")
	}
}

func checkHelm(t *testing.T, c *Cluster) {
	out, err := client(c, "helm", "", "list", "--namespace=sc-system")
	if err != nil || !strings.HasPrefix(out, "NAME\tNAMESPACE\t") || strings.Count(out, "\n") != 1 {
		t.Errorf("releases: %q, %v", out, err)
	}
	if out, err := client(c, "helm", "", "version", "--template={{.Version}}"); err != nil || out != helmVersion {
		t.Errorf("helm's version: %q, %v; want %s", out, err, helmVersion)
	}
}

func checkSecretProviderClass(t *testing.T, c *Cluster) {
	const object = `
apiVersion: secrets-store.csi.x-k8s.io/v1
kind: SecretProviderClass
metadata: {name: vault}
spec: {provider: azure, parameters: {keyvaultName: shop}}
`
	if out, err := client(c, "kubectl", object, "apply", "-f", "-"); err == nil || !strings.Contains(out, `no matches for kind "SecretProviderClass"`) {
		t.Errorf("before it is installed: %q, %v", out, err)
	}
	for range 2 { // again is no error
		if err := c.InstallSecretProviderClass(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	kubectl(t, c, object, "apply", "-f", "-")
	if out := kubectl(t, c, "", "get", "secretproviderclass", "vault", "-o=jsonpath={.spec.parameters.keyvaultName}"); out != "shop" {
		t.Errorf("the object says %q", out)
	}
}

// TestPlanOfServices: what the option decides before anything is made.
func TestPlanOfServices(t *testing.T) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := plan(Config{Layout: LayoutAKSEngine, Services: true}, cache); err == nil {
		t.Error("the layout aks-engine has Services")
	}
	for _, want := range []struct {
		cfg   Config
		pods  int
		mark  map[string]string // by template, what only this bed has
		other map[string]string // and what it has not
	}{
		{
			Config{Masters: 1},
			4,
			map[string]string{"balancer.cfg": "bind 10.96.0.1:443", "cni.json": `"bridge"`, "kubelet-machine": `resolvConf: ""`},
			map[string]string{"registration": "taints", "kubeadm-init.yaml": "certSANs"},
		},
		{
			Config{Masters: 1, Services: true},
			7,
			map[string]string{"cni.json": `"ptp"`, "kubelet-machine": "resolvConf: /etc/resolv.pods", "registration": "taints: []", "kubeadm-init.yaml": "certSANs: [127.0.0.1]"},
			map[string]string{"balancer.cfg": "10.96.0.1"},
		},
		{
			Config{Masters: 3, Workers: 1, Services: true},
			18,
			nil,
			map[string]string{"registration": "taints"},
		},
	} {
		b, err := plan(want.cfg, cache)
		if err != nil {
			t.Fatal(err)
		}
		if got := b.systemPods(); got != want.pods {
			t.Errorf("%+v: %d pods in kube-system, want %d", want.cfg, got, want.pods)
		}
		text := func(name string) string {
			text, err := render(name, b.scene(b.Nodes[0]))
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
		for name, mark := range want.mark {
			if text := text(name); !strings.Contains(text, mark) {
				t.Errorf("%+v: %s has no %q:\n%s", want.cfg, name, mark, text)
			}
		}
		for name, mark := range want.other {
			if text := text(name); strings.Contains(text, mark) {
				t.Errorf("%+v: %s has %q:\n%s", want.cfg, name, mark, text)
			}
		}
		if cni := text("cni.json"); !json.Valid([]byte(cni)) {
			t.Errorf("%+v: not JSON: %s", want.cfg, cni)
		}
	}
}

// TestPartsOfServices: a bed without Services needs nothing of theirs.
func TestPartsOfServices(t *testing.T) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	names := func(cfg Config) string {
		var all []string
		for _, p := range cache.partsFor(cfg) {
			all = append(all, p.name)
		}
		return strings.Join(all, " ")
	}
	if got, want := names(Config{}), "kubernetes rootfs images containerd"; got != want {
		t.Errorf("a bed needs %s, want %s", got, want)
	}
	if got, want := names(Config{Services: true}), "kubernetes rootfs images containerd services userland"; got != want {
		t.Errorf("a bed with Services needs %s, want %s", got, want)
	}
	module, err := os.ReadFile(filepath.Join(cache.source, "services", "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pinned := range []string{"k8s.io/kubernetes " + kubernetesVersion, "github.com/coredns/coredns " + coreDNSVersion, "helm.sh/helm/v4 " + helmVersion} {
		if !bytes.Contains(module, []byte("\t"+pinned)) {
			t.Errorf("services/go.mod does not require %s", pinned)
		}
	}
}

func TestSplitRef(t *testing.T) {
	for _, want := range []struct{ ref, repository, tag string }{
		{"alpine", "library/alpine", "latest"},
		{"alpine:3.20", "library/alpine", "3.20"},
		{"docker.io/alpine", "library/alpine", "latest"},
		{"docker.io/library/alpine:3", "library/alpine", "3"},
		{"team/app", "team/app", "latest"},
		{"registry.bed.internal/keyfleet-connector:0.1.0", "keyfleet-connector", "0.1.0"},
		{"localhost/app", "app", "latest"},
		{"127.0.0.1:5000/a/b/c", "a/b/c", "latest"},
		{"localhost:5000/app:1", "app", "1"},
	} {
		repository, tag, err := splitRef(want.ref)
		if err != nil || repository != want.repository || tag != want.tag {
			t.Errorf("%s is %s, %s, %v; want %s, %s", want.ref, repository, tag, err, want.repository, want.tag)
		}
	}
	for _, bad := range []string{"", "alpine:", "registry.example/", "alpine@sha256:00"} {
		if repository, tag, err := splitRef(bad); err == nil {
			t.Errorf("%q is %s, %s", bad, repository, tag)
		}
	}
}

// TestLayer: the archive of a folder, a file and a link, with every folder before
// what is in it, and the same bytes twice.
func TestLayer(t *testing.T) {
	dir := t.TempDir()
	if err := writeFile(filepath.Join(dir, "lib/deep/one.so"), "library", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("one.so", filepath.Join(dir, "lib/deep/two.so")); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"/lib": filepath.Join(dir, "lib"), "/bin/program": filepath.Join(dir, "lib/deep/two.so")}
	links := map[string]string{"/usr/bin/other": "/bin/program"}
	var once, twice bytes.Buffer
	for _, out := range []*bytes.Buffer{&once, &twice} {
		if err := writeLayer(out, files, links); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(once.Bytes(), twice.Bytes()) {
		t.Error("the same files give another archive")
	}
	at := filepath.Join(dir, "layer.tar")
	if err := os.WriteFile(at, once.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tar", "-tvf", at).Output()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		got = append(got, f[0]+" "+strings.Join(f[5:], " "))
	}
	want := []string{
		"drwxrwxrwt tmp/", "drwxr-xr-x bin/", "-rw-r--r-- bin/program", "drwxr-xr-x lib/", "drwxr-xr-x lib/deep/", "-rw-r--r-- lib/deep/one.so",
		"lrwxrwxrwx lib/deep/two.so -> one.so", "drwxr-xr-x usr/", "drwxr-xr-x usr/bin/", "lrwxrwxrwx usr/bin/other -> /bin/program",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("the archive holds\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
