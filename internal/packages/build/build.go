// Package build makes extension packages.
//
// Idea: a package is a zip whose bytes depend on nothing but the files put into
// it: names in order, no times, no owners. So the same sources give the same
// SHA-256 on every machine, and that is what a node checks.
//
// Invariant: what Write writes is accepted by package packages: there is one
// valid HandlerManifest.json, and the program or script that each of its
// commands starts is in the zip.
//
// Consequence for the operator: a package can be rebuilt and compared.
package build

import (
	"archive/zip"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
)

// ManifestName is the file that makes a zip an extension package.
const ManifestName = "HandlerManifest.json"

// epoch is the time of every file in a package: the first that the format has.
var epoch = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)

// File is one file of a package.
type File struct {
	Name       string // slash-separated, relative
	Content    []byte
	Executable bool
}

// Write writes a package of the files, one of which is the manifest.
func Write(w io.Writer, files []File) error {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	if err := check(files); err != nil {
		return fmt.Errorf("building package: %w", err)
	}
	z := zip.NewWriter(w)
	for _, f := range files {
		mode := fs.FileMode(0o644)
		if f.Executable {
			mode = 0o755
		}
		h := &zip.FileHeader{Name: f.Name, Method: zip.Deflate, Modified: epoch}
		h.SetMode(mode)
		c, err := z.CreateHeader(h)
		if err != nil {
			return fmt.Errorf("adding %s to the package: %w", f.Name, err)
		}
		if _, err := c.Write(f.Content); err != nil {
			return fmt.Errorf("adding %s to the package: %w", f.Name, err)
		}
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("finishing the package: %w", err)
	}
	return nil
}

// check sees to it that an agent can use what is written.
func check(sorted []File) error {
	byName := map[string]File{}
	for _, f := range sorted {
		if !fs.ValidPath(f.Name) || f.Name == "." || strings.Contains(f.Name, `\`) {
			return fmt.Errorf("%q is no path in a package", f.Name)
		}
		if _, twice := byName[f.Name]; twice {
			return fmt.Errorf("%s is there twice", f.Name)
		}
		byName[f.Name] = f
	}
	m, ok := byName[ManifestName]
	if !ok {
		return errors.New("there is no " + ManifestName)
	}
	manifest, err := extension.ParseHandlerManifest(m.Content)
	if err != nil {
		return err
	}
	c := manifest.HandlerManifest
	for _, command := range []string{c.InstallCommand, c.UninstallCommand, c.UpdateCommand, c.EnableCommand, c.DisableCommand} {
		program := path.Clean(strings.Fields(command)[0])
		f, ok := byName[program]
		if !ok {
			return fmt.Errorf("the command %q starts a file that is not there", command)
		}
		if !f.Executable {
			return fmt.Errorf("the command %q starts a file that is not executable", command)
		}
	}
	return nil
}
