//go:build linux

package bed

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestPlan(t *testing.T) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	b, err := plan(Config{Workers: 1}, cache)
	if err != nil {
		t.Fatal(err)
	}
	if b.Name != "kubeadm" || b.Dir != cache.BedDir("kubeadm") {
		t.Errorf("the default bed is %s in %s", b.Name, b.Dir)
	}
	want := []Node{
		{"master-0", "10.77.0.11", RoleMaster},
		{"master-1", "10.77.0.12", RoleMaster},
		{"master-2", "10.77.0.13", RoleMaster},
		{"worker-0", "10.77.0.31", RoleWorker},
	}
	if !slices.Equal(b.Nodes, want) {
		t.Errorf("nodes %v, want %v", b.Nodes, want)
	}
	for _, bad := range []Config{
		{Layout: "none"},
		{Name: "a.b"},
		{Name: "../x"},
		{Name: strings.Repeat("x", 21)},
		{Masters: 10},
		{Workers: -1},
		{Dir: "/tmp/with space"},
		{Dir: "/tmp/with:colon"},
	} {
		if _, err := plan(bad, cache); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

// TestPlanOfLayouts: what a layout decides before anything is made.
func TestPlanOfLayouts(t *testing.T) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		layout, name, model, admin string
		pods                       int
	}{
		{"", "kubeadm", "", "/etc/kubernetes/admin.conf", 4},
		{LayoutKubeadm, "kubeadm", "", "/etc/kubernetes/admin.conf", 4},
		{LayoutAKSEngine, "aks-engine", "apimodel.json", "/home/azureuser/.kube/config", 3},
	} {
		b, err := plan(Config{Layout: want.layout}, cache)
		if err != nil {
			t.Fatal(err)
		}
		model := ""
		if want.model != "" {
			model = filepath.Join(b.Dir, want.model)
		}
		if b.Name != want.name || b.APIModel != model || b.adminKubeconfig() != want.admin || b.staticPods != want.pods || b.bring == nil {
			t.Errorf("layout %q: bed %s, API model %q, kubeconfig %s, %d static pods; want %+v", want.layout, b.Name, b.APIModel, b.adminKubeconfig(), b.staticPods, want)
		}
	}
}

// TestTemplates fills every template; text/template finds a wrong name only then.
func TestTemplates(t *testing.T) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	b, err := plan(Config{Workers: 1}, cache)
	if err != nil {
		t.Fatal(err)
	}
	files, err := templates.ReadDir("templates")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := render(f.Name(), b.scene(b.Nodes[0]))
		if err != nil {
			t.Error(err)
		}
		if strings.Contains(text, "<no value>") {
			t.Errorf("%s has holes:\n%s", f.Name(), text)
		}
	}
	text, err := render("balancer.cfg", b.scene(Node{}))
	if err != nil || strings.Count(text, "\n  server ") != 3 {
		t.Errorf("the load balancer has not one server per master: %v\n%s", err, text)
	}
}

func TestImageNamesItsLayer(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "program")
	if err := os.WriteFile(binary, []byte("not much"), 0o755); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "image.tar")
	if err := writeImage(out, image{"image.tar", "example/program:1", "program", true}, binary); err != nil {
		t.Fatal(err)
	}
	files := readTar(t, out)
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil {
		t.Fatal(err)
	}
	layer := files[manifest[0].Layers[0]]
	sum := sha256.Sum256(layer)
	if !strings.Contains(string(files[manifest[0].Config]), `"sha256:`+hex.EncodeToString(sum[:])+`"`) {
		t.Errorf("the configuration does not name the layer: %s", files[manifest[0].Config])
	}
	at := filepath.Join(dir, "layer.tar")
	if err := os.WriteFile(at, layer, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := string(readTar(t, at)["usr/local/bin/program"]); got != "not much" {
		t.Errorf("the program in the layer is %q", got)
	}
	if left, _ := filepath.Glob(out + ".*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func readTar(t *testing.T, path string) map[string][]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDownLeavesOtherFolders: Down removes a folder only if it is a bed's.
func TestDownLeavesOtherFolders(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "thesis.txt")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Down(t.Context(), dir); err == nil {
		t.Error("Down takes any folder")
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if err := Down(t.Context(), filepath.Join(dir, "nothing")); err != nil {
		t.Errorf("Down of nothing: %v", err)
	}
}
