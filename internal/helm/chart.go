package helm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"helm.sh/helm/v4/pkg/chart/loader/archive"
	chartv2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/ignore"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Chart is a chart that was read and is sound. It can be applied many times.
type Chart struct {
	Name    string
	Version string
	files   []*archive.BufferedFile
}

// chartLimit is the size of a chart, unpacked, in bytes: its record has to fit into a
// Secret of 1 MiB, compressed.
const chartLimit = 20 << 20

// ReadChart reads a chart from a folder.
func ReadChart(folder fs.FS) (*Chart, error) {
	files, err := readFolder(folder)
	if err != nil {
		return nil, unavailable("", err)
	}
	return newChart("", files)
}

// LoadChart reads a chart from a path, which is that of a folder or of an archive.
func LoadChart(path string) (*Chart, error) {
	files, err := load(path)
	if err != nil {
		return nil, unavailable(path, err)
	}
	return newChart(path, files)
}

func load(path string) ([]*archive.BufferedFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return readArchive(f)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return readFolder(root.FS())
}

func readArchive(r io.Reader) ([]*archive.BufferedFile, error) {
	files, err := archive.LoadArchiveFiles(r)
	if err != nil {
		return nil, fmt.Errorf("unpacking the archive: %w", err)
	}
	return files, nil
}

func readFolder(folder fs.FS) ([]*archive.BufferedFile, error) {
	rules := ignore.Empty()
	if text, err := fs.ReadFile(folder, ignore.HelmIgnore); err == nil {
		if rules, err = ignore.Parse(bytes.NewReader(text)); err != nil {
			return nil, fmt.Errorf("reading %s: %w", ignore.HelmIgnore, err)
		}
	}
	rules.AddDefaults()
	var files []*archive.BufferedFile
	left := chartLimit
	err := fs.WalkDir(folder, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if rules.Ignore(name, info) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() {
			return nil
		}
		if info.Mode()&(fs.ModeNamedPipe|fs.ModeSocket|fs.ModeDevice) != 0 {
			return fmt.Errorf("%s is no file that can be read", name)
		}
		text, err := fs.ReadFile(folder, name)
		if err != nil {
			return err
		}
		if left -= len(text); left < 0 {
			return fmt.Errorf("it is larger than %d bytes", chartLimit)
		}
		files = append(files, &archive.BufferedFile{Name: name, Data: bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))})
		return nil
	})
	return files, err
}

// newChart looks whether the files are a chart that can be installed.
func newChart(path string, files []*archive.BufferedFile) (*Chart, error) {
	c := &Chart{files: files}
	loaded, err := c.load()
	if err == nil {
		err = installable(loaded)
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "RenderingFailed", "Helm chart rendering failed with given values: this is not a chart that can be installed: %s.", short(err.Error())).
			At(path).WithFix("correct the chart; see: helm lint %s", path).Because(err)
	}
	c.Name, c.Version = loaded.Metadata.Name, loaded.Metadata.Version
	return c, nil
}

// load makes Helm's form of the chart; Helm changes it while it renders it.
func (c *Chart) load() (*chartv2.Chart, error) { return loader.LoadFiles(c.files) }

func installable(c *chartv2.Chart) error {
	if c.Metadata.APIVersion != chartv2.APIVersionV1 && c.Metadata.APIVersion != chartv2.APIVersionV2 {
		return fmt.Errorf("its apiVersion %q is not known", c.Metadata.APIVersion)
	}
	if t := c.Metadata.Type; t != "" && t != "application" {
		return fmt.Errorf("it is of the type %q", t)
	}
	present := map[string]bool{}
	for _, d := range c.Dependencies() {
		present[d.Name()] = true
	}
	var missing []error
	for _, d := range c.Metadata.Dependencies {
		if !present[d.Name] {
			missing = append(missing, fmt.Errorf("its dependency %s is not in its folder charts", d.Name))
		}
	}
	return errors.Join(missing...)
}

func unavailable(path string, err error) error {
	if path == "" {
		path = "CHART"
	}
	return fault.New(fault.Unavailable, "ChartUnavailable", "Unable to download the Helm chart from the repo URL: the chart at %s cannot be read: %s.", path, short(err.Error())).
		At(path).WithFix("put the chart there, as a folder or as an archive (helm pull REPOSITORY/CHART); see: helm show chart %s", path).Because(err)
}
