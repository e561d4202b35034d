//go:build linux

package bed

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// Versions of what kubernetes/go.mod builds; the module pins them, these name them.
const (
	kubernetesVersion = "v1.36.3"
	etcdVersion       = "3.6.8"
)

// program is a command that is built from the module in kubernetes/.
type program struct {
	name string
	pkg  string
}

func allPrograms() []program {
	const commands = "k8s.io/kubernetes/cmd/"
	return []program{
		{"kube-apiserver", commands + "kube-apiserver"}, // the longest first: what it compiles the others use
		{"kube-controller-manager", commands + "kube-controller-manager"},
		{"kube-scheduler", commands + "kube-scheduler"},
		{"kubelet", commands + "kubelet"},
		{"kubeadm", commands + "kubeadm"},
		{"kubectl", commands + "kubectl"},
		{"etcd", "go.etcd.io/etcd/server/v3"},
		{"etcdctl", "go.etcd.io/etcd/etcdctl/v3"},
	}
}

// linkerFlags give the programs the version that kubeadm compares; Kubernetes
// built without them calls itself v0.0.0.
func linkerFlags() string {
	numbers := strings.Split(strings.TrimPrefix(kubernetesVersion, "v"), ".")
	values := []struct{ name, value string }{
		{"gitVersion", kubernetesVersion},
		{"gitMajor", numbers[0]},
		{"gitMinor", numbers[1]},
		{"gitTreeState", "clean"},
		{"gitCommit", strings.Repeat("0", 40)},
		{"buildDate", "2026-01-01T00:00:00Z"}, // fixed: the same sources give the same programs
	}
	flags := []string{"-s", "-w"}
	for _, v := range values {
		flags = append(flags, "-X", "k8s.io/component-base/version."+v.name+"="+v.value)
	}
	return strings.Join(flags, " ")
}

func programsKey(source string) (string, error) {
	inputs := []string{linkerFlags()}
	for _, name := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(source, "kubernetes", name))
		if err != nil {
			return "", fmt.Errorf("reading the versions of the programs: %w", err)
		}
		inputs = append(inputs, string(b))
	}
	return kubernetesVersion + "-" + key(inputs...), nil
}

func (c *Cache) buildPrograms(ctx context.Context, dir string, log io.Writer) error {
	for _, p := range allPrograms() {
		started := time.Now()
		err := goBuild(ctx, filepath.Join(c.source, "kubernetes"), filepath.Join(dir, p.name), linkerFlags(), p.pkg)
		if err != nil {
			return err
		}
		fmt.Fprintf(log, "  %-24s %.0f s\n", p.name, time.Since(started).Seconds())
	}
	return nil
}

// goBuild makes one static program. Modules come from where the user's Go gets them.
func goBuild(ctx context.Context, dir, out, ldflags, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o", out, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("compiling %s: %w\n%s", path.Base(out), err, tail(output.String(), 20))
	}
	return nil
}

// tail returns the last n lines.
func tail(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
