package keyfleet_test

import (
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "keyfleet.dev/keyfleet/"

// rule forbids imports. from and to are package path prefixes below the module
// (to may be any import path); a package under one of except may import it.
type rule struct {
	from   string
	to     string
	except []string
	why    string
}

// rules are the directions of docs/architecture.md. Imports are followed
// through the whole tree of what a package needs when deep is set.
var rules = []rule{
	{from: "internal/vault", to: "internal/pool", why: "capabilities never import each other; declare an interface and let server satisfy it"},
	{from: "internal/vault", to: "internal/identity", why: "capabilities never import each other"},
	{from: "internal/vault", to: "internal/subscription", why: "capabilities never import each other"},
	{from: "internal/pool", to: "internal/vault", why: "capabilities never import each other"},
	{from: "internal/pool", to: "internal/identity", why: "capabilities never import each other"},
	{from: "internal/pool", to: "internal/subscription", why: "capabilities never import each other"},
	{from: "internal/identity", to: "internal/vault", why: "capabilities never import each other"},
	{from: "internal/identity", to: "internal/pool", why: "capabilities never import each other"},
	{from: "internal/subscription", to: "internal/vault", why: "capabilities never import each other"},
	{from: "internal/subscription", to: "internal/pool", why: "capabilities never import each other"},
	{from: "internal/subscription", to: "internal/identity", why: "capabilities never import each other"},
	{from: "internal/cluster", to: "internal/identity", why: "capabilities never import each other"},
	{from: "internal/cluster", to: "internal/vault", why: "capabilities never import each other"},
	{from: "internal/cluster", to: "internal/pool", why: "capabilities never import each other"},
	{from: "internal/cluster", to: "internal/subscription", why: "capabilities never import each other"},
	{from: "internal/identity", to: "internal/cluster", why: "capabilities never import each other"},
	{from: "internal/connector", to: "internal/identity", why: "capabilities never import each other"},
	{from: "internal/connector", to: "internal/vault", why: "capabilities never import each other"},
	{from: "internal/connector", to: "internal/pool", why: "capabilities never import each other"},
	{from: "internal/connector", to: "internal/cluster", why: "capabilities never import each other"},
	{from: "internal/connector", to: "internal/subscription", why: "capabilities never import each other"},
	{from: "internal/connector", to: "internal/target", why: "a capability knows no adapter; server puts them together"},
	{from: "internal/target", to: "internal/connector", why: "an adapter knows no capability"},
	{from: "internal/access", to: "internal/identity", why: "identity imports access, never back"},
	{from: "internal/", to: "internal/server", why: "server is the composition; nothing below it knows it"},
	{from: "internal/", to: module + "cmd/", why: "commands are leaves"},
	{from: "api/", to: module + "internal/", except: nil, why: "wire types are leaves"},
	{from: "api/", to: module + "client", why: "wire types are leaves"},
	{from: "internal/rotation", to: module + "internal/remote", why: "the engine knows no SSH; adapters satisfy its interfaces"},
	{from: "internal/rotation", to: module + "internal/kube", why: "the engine knows no Kubernetes client"},
	{from: "internal/rotation", to: module + "internal/etcdadmin", why: "the engine knows no etcd client"},
	{from: "internal/rotation", to: module + "internal/store", why: "a rotation needs no server"},
	{from: "internal/rotation", to: module + "client", why: "a rotation needs no server"},
	{from: "internal/fault", to: module, why: "fault is a leaf"},
	{from: "internal/effect", to: module, why: "effect is a leaf"},
	{from: "", to: "net/http", except: []string{
		"internal/azureapi", "internal/nodeapi", "internal/web", "internal/agent", "internal/server", "internal/issuer", "internal/scextension", "internal/keyvaultext", "internal/kube", "internal/helm", "internal/target", "internal/cli", "client", "cmd/", "test/", "demo",
	}, why: "HTTP is spoken at the edges and by clients only"},
	{from: "", to: "go.etcd.io/etcd/", except: []string{"internal/store/etcd", "internal/etcdadmin", "internal/kube/kubetest"}, why: "our own etcd is a backend, known to store/etcd alone; etcdadmin speaks to a cluster's"},
	{from: "", to: "k8s.io/", except: []string{"internal/reconcile", "internal/kube", "internal/helm", "internal/scextension"}, why: "Kubernetes stays in its adapters; reconcile borrows the work queue"},
	{from: "", to: "golang.org/x/crypto/ssh", except: []string{"internal/remote"}, why: "SSH stays in remote"},
}

// deepRules hold for everything a package pulls in, directly or not.
var deepRules = []rule{
	{from: "internal/agent", to: module + "internal/store", why: "the agent goes onto every node and stays small"},
	{from: "internal/keyvaultext", to: module + "internal/store", why: "the extension goes onto every node and stays small"},
	{from: "internal/cli", to: module + "internal/store", why: "the command line speaks the API like anybody else"},
	{from: "cmd/keyfleet-agent", to: "go.etcd.io/", why: "the agent stays small"},
	{from: "cmd/keyfleet-keyvault-extension", to: "github.com/prometheus", why: "the extension stays small"},
	{from: "cmd/keyfleet-server", to: "helm.sh/", why: "Helm lives behind keyfleet-connector"},
	{from: "internal/rotation", to: "k8s.io/", why: "the engine knows no Kubernetes client"},
	{from: "cmd/keyfleet-server", to: "k8s.io/api/", why: "the server has no Kubernetes client"},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	GoFiles    []string
	Dir        string
	Standard   bool
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps,GoFiles,Dir,Standard", "./...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func (r rule) applies(path string) bool {
	if !strings.HasPrefix(path, r.from) || strings.HasPrefix(module+path, r.to) {
		return false
	}
	for _, e := range r.except {
		if strings.HasPrefix(path, e) {
			return false
		}
	}
	return true
}

func (r rule) target() string {
	if strings.HasPrefix(r.to, "internal/") {
		return module + r.to
	}
	return r.to
}

// TestImportDirections fails with the reason when a package imports what it must not know.
func TestImportDirections(t *testing.T) {
	for _, p := range packages(t) {
		path := strings.TrimPrefix(p.ImportPath, module)
		check := func(rules []rule, imports []string) {
			for _, r := range rules {
				if !r.applies(path) {
					continue
				}
				for _, imp := range imports {
					if strings.HasPrefix(imp, r.target()) && imp != p.ImportPath {
						t.Errorf("%s imports %s: %s", path, imp, r.why)
					}
				}
			}
		}
		check(rules, p.Imports)
		check(deepRules, p.Deps)
	}
}

// TestPackageComments: every package explains itself, in one place.
func TestPackageComments(t *testing.T) {
	for _, p := range packages(t) {
		n := 0
		for _, f := range p.GoFiles {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if file.Doc != nil {
				n++
			}
		}
		if n != 1 && len(p.GoFiles) > 0 {
			t.Errorf("%s has %d package comments, want 1", strings.TrimPrefix(p.ImportPath, module), n)
		}
	}
}
