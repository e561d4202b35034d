package helm

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"keyfleet.dev/keyfleet/internal/fault"
)

// pack makes the archive of a chart.
func pack(t testing.TB, files fstest.MapFS) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(z)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: "small/" + name, Mode: 0o644, Size: int64(len(files[name].Data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(files[name].Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestCharts(t *testing.T) {
	files := folder(map[string]string{"c.yaml": "{}"})
	files[".helmignore"] = &fstest.MapFile{Data: []byte("secret.txt\nskipped/\n")}
	files["secret.txt"], files["skipped/x"] = &fstest.MapFile{}, &fstest.MapFile{}
	path := t.TempDir()
	if err := os.CopyFS(filepath.Join(path, "folder"), files); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path, "small.tgz"), pack(t, folder(map[string]string{"c.yaml": "{}"})), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"folder", "small.tgz"} {
		c, err := LoadChart(filepath.Join(path, name))
		if err != nil {
			t.Fatal(err)
		}
		if c.Name != "small" || c.Version != "1.2.3" {
			t.Errorf("%s: %+v", name, c)
		}
		for _, f := range c.files {
			if f.Name == "secret.txt" || strings.HasPrefix(f.Name, "skipped") {
				t.Errorf("%s has %s", name, f.Name)
			}
		}
	}
}

func TestChartsThatCannotBeRead(t *testing.T) {
	path := t.TempDir()
	write := func(name, text string) {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(path, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("garbage.tgz", "no archive")
	write("cut.tgz", string(pack(t, folder(map[string]string{"c.yaml": strings.Repeat("x", 9999)}))[:100]))
	write("empty/README.md", "")
	write("no-version/Chart.yaml", "apiVersion: v2\nname: x\n")
	write("old/Chart.yaml", "apiVersion: v0\nname: x\nversion: 1.0.0\n")
	write("no-yaml/Chart.yaml", "{")
	write("values/Chart.yaml", "apiVersion: v2\nname: x\nversion: 1.0.0\n")
	write("values/values.yaml", "a: b: c")
	write("library/Chart.yaml", "apiVersion: v2\nname: x\nversion: 1.0.0\ntype: library\n")
	write("dependency/Chart.yaml", "apiVersion: v2\nname: x\nversion: 1.0.0\ndependencies: [{name: dep, version: 1.0.0, repository: \"https://charts.example.com\"}]\n")
	write("outside/Chart.yaml", "apiVersion: v2\nname: x\nversion: 1.0.0\n")
	if err := os.Symlink("/etc/hostname", filepath.Join(path, "outside", "link")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct{ code, says string }{
		"absent":      {"ChartUnavailable", "no such file"},
		"garbage.tgz": {"ChartUnavailable", "gzip"},
		"cut.tgz":     {"ChartUnavailable", "EOF"},
		"outside":     {"ChartUnavailable", "escapes"},
		"empty":       {"RenderingFailed", "Chart.yaml file is missing"},
		"no-version":  {"RenderingFailed", "version"},
		"old":         {"RenderingFailed", "v0"},
		"no-yaml":     {"RenderingFailed", "Chart.yaml"},
		"values":      {"RenderingFailed", "values.yaml"},
		"library":     {"RenderingFailed", "library"},
		"dependency":  {"RenderingFailed", "its dependency dep"},
	} {
		_, err := LoadChart(filepath.Join(path, name))
		f := fault.From(err)
		if f == nil || f.Code != want.code || !strings.Contains(f.Message, want.says) || !strings.HasSuffix(f.Target, name) || f.Fix == "" {
			t.Errorf("%s: %v, want %s with %q", name, err, want.code, want.says)
			continue
		}
		sentence := map[string]string{"ChartUnavailable": "Unable to download the Helm chart from the repo URL", "RenderingFailed": "Helm chart rendering failed with given values"}[f.Code]
		if !strings.HasPrefix(f.Message, sentence) {
			t.Errorf("%s: %s", name, f.Message)
		}
	}
}

func FuzzChart(f *testing.F) {
	f.Add(pack(f, folder(map[string]string{"c.yaml": "{{ .Values.x }}", "values.yaml": "x: 1"})))
	f.Add([]byte("\x1f\x8b"))
	f.Fuzz(func(t *testing.T, text []byte) {
		files, err := readArchive(bytes.NewReader(text))
		if err != nil {
			return
		}
		c, err := newChart("x.tgz", files)
		if err != nil {
			if code := fault.From(err).Code; code != "RenderingFailed" {
				t.Errorf("the code is %q: %v", code, err)
			}
			return
		}
		if c.Name == "" || c.Version == "" {
			t.Errorf("a chart without name or version: %+v", c)
		}
		if _, err := c.load(); err != nil {
			t.Errorf("it was sound, and cannot be loaded again: %v", err)
		}
	})
}
