//go:build linux

package bed

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// coreDNSVersion is the one that kubeadm of [kubernetesVersion] asks for.
const coreDNSVersion = "v1.14.2"

// startServices starts what a bed with Services has in its network besides: the
// registry with the images of the add-ons and "alpine", and the server of names
// that the cluster's own asks.
func (b *builder) startServices(ctx context.Context) error {
	for _, name := range []string{"registry.yaml", "Corefile"} {
		if err := renderTo(b.path(name), name, b.scene(Node{})); err != nil {
			return err
		}
	}
	bin := b.cache.path(services)
	err := b.startInside("names", []string{filepath.Join(bin, "coredns"), "-quiet", "-conf", b.path("Corefile")})
	if err != nil {
		return err
	}
	err = b.startInside("registry", []string{filepath.Join(bin, "registry"), "serve", b.path("registry.yaml")}, "OTEL_TRACES_EXPORTER=none")
	if err != nil {
		return err
	}
	if err := b.awaitRegistry(ctx); err != nil {
		log, _ := os.ReadFile(b.logFile("registry"))
		return &StepError{Machine: fabric, Step: "registry", Log: tail(string(log), 10), Err: err}
	}
	images, err := b.serviceImages(ctx)
	if err != nil {
		return err
	}
	for _, img := range images {
		if err := b.PushImage(ctx, img); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) awaitRegistry(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	transport := &http.Transport{DialContext: b.Dial}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+registryAddr+"/v2/", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(resp.Status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the registry: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// serviceImages are the images that are there from the start.
func (b *builder) serviceImages(ctx context.Context) ([]Image, error) {
	bin, debian := b.cache.path(services), b.cache.path(userland)
	proxy := Image{
		Ref:   repository + "/kube-proxy:" + kubernetesVersion,
		Files: map[string]string{"/usr/local/bin/kube-proxy": filepath.Join(bin, "kube-proxy")},
		Links: map[string]string{},
	}
	for _, dir := range []string{"lib", "lib64", "usr/lib", "usr/sbin"} {
		from := filepath.Join(debian, dir)
		if _, err := os.Stat(from); err == nil { // lib64 is of some architectures
			proxy.Files["/"+dir] = from
		}
	}
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		proxy.Links["/usr/sbin/"+name] = "xtables-nft-multi"
	}
	names := Image{
		Ref:        repository + "/coredns:" + coreDNSVersion,
		Files:      map[string]string{"/coredns": filepath.Join(bin, "coredns")},
		Entrypoint: []string{"/coredns"},
	}
	alpine, err := alpineImage(ctx, debian)
	return []Image{proxy, names, alpine}, err
}

// alpineImage is what pods get that ask for alpine. Debian's busybox has no
// printenv; the one of coreutils comes with its libraries. (The wget of busybox
// in Debian 12 crashes with -T: use timeout.)
func alpineImage(ctx context.Context, debian string) (Image, error) {
	img := Image{Ref: "alpine", Files: map[string]string{}, Links: map[string]string{}}
	for _, at := range []string{"bin/busybox", "usr/bin/printenv", "etc", "lib", "lib64"} {
		from := filepath.Join(debian, at)
		if _, err := os.Stat(from); err == nil {
			img.Files["/"+at] = from
		}
	}
	const busybox = "/bin/busybox"
	out, err := exec.CommandContext(ctx, filepath.Join(debian, busybox), "--list-full").Output()
	if err != nil {
		return img, fmt.Errorf("asking busybox what it is: %w", err)
	}
	for _, applet := range strings.Fields(string(out)) {
		if at := "/" + applet; img.Files[at] == "" {
			img.Links[at] = busybox
		}
	}
	return img, nil
}

// furnishServices writes where a node's containerd pulls from, and which server of
// names its pods have that do not use the cluster's.
func (b *builder) furnishServices(upper string, n Node) error {
	const mirrors = "/etc/containerd/certs.d"
	config, err := base.ReadFile("base/etc/containerd/config.toml")
	if err != nil {
		return err
	}
	text := string(config) + "\n  [plugins.\"io.containerd.grpc.v1.cri\".registry]\n    config_path = \"" + mirrors + "\"\n"
	if err := writeFile(filepath.Join(upper, "etc/containerd/config.toml"), text, 0o644); err != nil {
		return err
	}
	for at, name := range map[string]string{mirrors + "/_default/hosts.toml": "hosts.toml", "/etc/resolv.pods": "resolv.conf"} {
		if err := renderTo(filepath.Join(upper, at), name, b.scene(n)); err != nil {
			return err
		}
	}
	return nil
}

// InstallSecretProviderClass adds the kind SecretProviderClass of the Secrets
// Store CSI driver to the cluster, and nothing of the driver itself.
func (c *Cluster) InstallSecretProviderClass(ctx context.Context) error {
	manifest, err := render("secretproviderclass.yaml", c.scene(c.Nodes[0]))
	if err != nil {
		return err
	}
	script := "kubectl apply -f - <<'END'\n" + manifest + "\nEND\n" +
		"kubectl wait --for=condition=Established --timeout=60s crd/secretproviderclasses.secrets-store.csi.x-k8s.io"
	if _, err := c.Exec(ctx, c.Nodes[0].Name, script); err != nil {
		return fmt.Errorf("installing the kind SecretProviderClass: %w", err)
	}
	return nil
}
