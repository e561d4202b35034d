//go:build linux

package bed

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// helmVersion is what services/go.mod says of Helm.
const helmVersion = "v4.3.1"

// servicePrograms are what beds with Services need, built from the module in
// services/: one of its own, because what Helm and CoreDNS require would change the
// versions in kubernetes/. Of Kubernetes' own modules it has the same.
func servicePrograms() []program {
	return []program{
		{"kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"},
		{"coredns", "./coredns"},
		{"registry", "./registry"},
		{"helm", "helm.sh/helm/v4/cmd/helm"},
	}
}

// serviceFlags give Helm its version besides.
func serviceFlags() string {
	return linkerFlags() + " -X helm.sh/helm/v4/internal/version.version=" + helmVersion
}

func servicesKey(source string) (string, error) {
	inputs := []string{serviceFlags()}
	for _, name := range []string{"go.mod", "go.sum", "coredns/main.go", "registry/main.go"} {
		b, err := os.ReadFile(filepath.Join(source, "services", name))
		if err != nil {
			return "", fmt.Errorf("reading what the programs for Services are made from: %w", err)
		}
		inputs = append(inputs, string(b))
	}
	return kubernetesVersion + "-" + key(inputs...), nil
}

func (c *Cache) buildServices(ctx context.Context, dir string, log io.Writer) error {
	for _, p := range servicePrograms() {
		started := time.Now()
		err := goBuild(ctx, filepath.Join(c.source, "services"), filepath.Join(dir, p.name), serviceFlags(), p.pkg)
		if err != nil {
			return err
		}
		fmt.Fprintf(log, "  %-24s %.0f s\n", p.name, time.Since(started).Seconds())
	}
	return nil
}

// userlandRecipe counts changes to the code below that change its outcome.
const userlandRecipe = "1"

// userlandPackages are what containers have of Debian: kube-proxy the tables,
// "alpine" the rest.
func userlandPackages() []string { return []string{"busybox-static", "coreutils", "iptables"} }

// userlandPaths are what is kept of them.
func userlandPaths() []string {
	return []string{"bin/busybox", "usr/bin/printenv", "usr/sbin", "usr/lib", "lib", "lib64"}
}

func userlandKey() string {
	return suite + "-" + key(userlandRecipe, suite, strings.Join(userlandPackages(), ","), strings.Join(userlandPaths(), ","))
}

// buildUserland unpacks the packages without installing them.
func (c *Cache) buildUserland(ctx context.Context, dir string, _ io.Writer) error {
	all := filepath.Join(filepath.Dir(dir), "all")
	err := runContained(ctx, "mmdebstrap", "--mode=root", "--variant=extract", "--include="+strings.Join(userlandPackages(), ","), suite, all)
	if err != nil {
		return fmt.Errorf("unpacking packages of Debian %s: %w", suite, err)
	}
	for _, at := range userlandPaths() {
		from, to := filepath.Join(all, at), filepath.Join(dir, at)
		if _, err := os.Stat(from); os.IsNotExist(err) && at == "lib64" { // of some architectures
			continue
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.Rename(from, to); err != nil {
			return err
		}
	}
	users := "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
	if err := writeFile(filepath.Join(dir, "etc/passwd"), users, 0o644); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "etc/group"), "root:x:0:\nnogroup:x:65534:\n", 0o644)
}
