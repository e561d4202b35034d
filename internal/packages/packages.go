// Package packages keeps the extension packages that a server hands to its
// nodes: a folder of zip files.
//
// Idea: the folder is the truth. A file is named as Azure's agents name it,
// PUBLISHER.TYPE-VERSION.zip, and is a package if a handler manifest is in it.
// Putting a file there offers it, removing it withdraws it; nothing is restarted.
// A pool asks for a version such as "3.0"; which package that means is a pure
// function ([Choose]) of the versions there are.
//
//	DIR/Microsoft.Azure.KeyVault.KeyVaultForLinux-3.0.0.zip
//	    publisher "Microsoft.Azure.KeyVault", type "KeyVaultForLinux", version 3.0.0
//
// Invariant: a package is handed out under the SHA-256 of the bytes that were
// looked at; a file that changed since is looked at again before it is named.
// A file that is no package is never offered, and [Store.Problems] says why.
//
// Consequence for the operator: copy a package into the folder under another
// name and rename it; a half-copied file is reported, not installed.
package packages

import (
	"archive/zip"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Package is an extension package.
type Package struct {
	Publisher string
	Type      string
	Version   Version
	SHA256    string // lower-case hex
	Size      int64
	Path      string
}

// Problem is a file of the folder that is no package, and why.
type Problem struct {
	File string
	Err  error
}

// Store is a folder of packages. Make it with [Open].
type Store struct {
	dir string

	mu    sync.Mutex
	known map[string]entry // guarded by mu; file name -> what it was found to be
}

// entry is what a file was found to be when it had this size and time.
type entry struct {
	size     int64
	modified time.Time
	pkg      Package
	err      error // set: it is no package
}

// Open returns the store of a folder. A folder that does not exist is an empty store.
func Open(dir string) *Store { return &Store{dir: dir, known: map[string]entry{}} }

// List returns all packages, by publisher, type and version, newest first.
func (s *Store) List() ([]Package, error) {
	pkgs, _, err := s.look()
	return pkgs, err
}

// Problems returns the zip files that are no packages.
func (s *Store) Problems() ([]Problem, error) {
	_, problems, err := s.look()
	return problems, err
}

// Find returns the package for what a pool asked for. Publisher and type are
// compared without regard to case. A fault.NotFound says which versions there are.
func (s *Store) Find(publisher, typ, typeHandlerVersion string, autoUpgrade bool) (string, node.Package, error) {
	pkgs, _, err := s.look()
	if err != nil {
		return "", node.Package{}, err
	}
	var versions []Version
	for _, p := range pkgs {
		if strings.EqualFold(p.Publisher, publisher) && strings.EqualFold(p.Type, typ) {
			versions = append(versions, p.Version)
		}
	}
	want, err := ParseVersion(typeHandlerVersion)
	if err != nil {
		return "", node.Package{}, fault.New(fault.Invalid, "InvalidTypeHandlerVersion", "%q is no extension version.", typeHandlerVersion).
			At("typeHandlerVersion").WithFix("Use two numbers, for instance \"3.0\".")
	}
	chosen, ok := Choose(versions, want, autoUpgrade)
	if !ok {
		return "", node.Package{}, notFound(publisher, typ, typeHandlerVersion, autoUpgrade, versions)
	}
	for _, p := range pkgs {
		if strings.EqualFold(p.Publisher, publisher) && strings.EqualFold(p.Type, typ) && p.Version.Compare(chosen) == 0 {
			return p.Version.String(), node.Package{SHA256: p.SHA256, Size: p.Size}, nil
		}
	}
	return "", node.Package{}, notFound(publisher, typ, typeHandlerVersion, autoUpgrade, versions)
}

func notFound(publisher, typ, want string, autoUpgrade bool, versions []Version) error {
	if len(versions) == 0 {
		return fault.New(fault.NotFound, "ExtensionPackageNotFound", "This server has no package of extension %s.%s.", publisher, typ).
			WithFix("Put %s.%s-VERSION.zip into the server's packages folder.", publisher, typ)
	}
	names := make([]string, len(versions))
	for i, v := range versions {
		names[i] = v.String()
	}
	e := fault.New(fault.NotFound, "ExtensionVersionNotFound", "This server has no version of extension %s.%s that %q stands for; it has %s.",
		publisher, typ, want, strings.Join(names, ", ")).At("typeHandlerVersion")
	if !autoUpgrade {
		return e.WithFix("Ask for one of these, or set autoUpgradeMinorVersion to true.")
	}
	return e.WithFix("Ask for one of these.")
}

// Open returns the zip with this SHA-256, or fault.NotFound.
func (s *Store) Open(_ context.Context, sum string) (io.ReadSeekCloser, error) {
	pkgs, _, err := s.look()
	if err != nil {
		return nil, err
	}
	for _, p := range pkgs {
		if p.SHA256 != sum {
			continue
		}
		f, err := os.Open(p.Path)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("opening package: %w", err)
		}
		return f, nil
	}
	return nil, fault.New(fault.NotFound, "ExtensionPackageNotFound", "This server has no package with SHA-256 %s.", sum)
}

// look reads the folder, and those files in it that are new or changed.
func (s *Store) look() ([]Package, []Problem, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("reading the packages folder: %w", err)
	}
	var (
		pkgs     []Package
		problems []Problem
		known    = make(map[string]entry, len(entries))
	)
	for _, d := range entries {
		name := d.Name()
		fi, err := os.Stat(filepath.Join(s.dir, name)) // a link to a package is a package
		if err != nil || !fi.Mode().IsRegular() || !strings.EqualFold(path.Ext(name), ".zip") {
			continue
		}
		e, ok := s.known[name]
		if !ok || e.size != fi.Size() || !e.modified.Equal(fi.ModTime()) {
			e = entry{size: fi.Size(), modified: fi.ModTime()}
			e.pkg, e.err = inspect(filepath.Join(s.dir, name))
		}
		known[name] = e
		if e.err != nil {
			problems = append(problems, Problem{File: name, Err: e.err})
			continue
		}
		pkgs = append(pkgs, e.pkg)
	}
	s.known = known
	slices.SortFunc(pkgs, func(a, b Package) int {
		return cmp.Or(cmp.Compare(a.Publisher, b.Publisher), cmp.Compare(a.Type, b.Type), b.Version.Compare(a.Version), cmp.Compare(a.Path, b.Path))
	})
	return pkgs, problems, nil
}

// inspect reads a file as a package.
func inspect(file string) (Package, error) {
	p, err := ParseName(filepath.Base(file))
	if err != nil {
		return p, err
	}
	p.Path = file
	f, err := os.Open(file)
	if err != nil {
		return p, fmt.Errorf("opening package: %w", err)
	}
	defer f.Close()
	sum := sha256.New()
	if p.Size, err = io.Copy(sum, f); err != nil {
		return p, fmt.Errorf("reading package: %w", err)
	}
	p.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return p, checkManifest(f, p.Size)
}

// maxManifest bounds a handler manifest, in bytes.
const maxManifest = 1 << 20

// checkManifest finds HandlerManifest.json anywhere in the zip, as agents do,
// and reads it.
func checkManifest(r io.ReaderAt, size int64) error {
	z, err := zip.NewReader(r, size)
	if err != nil {
		return fmt.Errorf("reading package: %w", err)
	}
	for _, f := range z.File {
		if path.Base(f.Name) != "HandlerManifest.json" {
			continue
		}
		c, err := f.Open()
		if err != nil {
			return fmt.Errorf("reading handler manifest: %w", err)
		}
		defer c.Close()
		b, err := io.ReadAll(io.LimitReader(c, maxManifest))
		if err != nil {
			return fmt.Errorf("reading handler manifest: %w", err)
		}
		_, err = extension.ParseHandlerManifest(b)
		return err
	}
	return errors.New("there is no HandlerManifest.json in it")
}

// ParseName takes a file name PUBLISHER.TYPE-VERSION.zip apart. A publisher
// may hold dots, a type may not.
func ParseName(name string) (Package, error) {
	base := strings.TrimSuffix(name, path.Ext(name))
	if !strings.EqualFold(path.Ext(name), ".zip") {
		return Package{}, fmt.Errorf("the name of a package ends in .zip, not as %q", name)
	}
	dash := strings.LastIndexByte(base, '-')
	if dash < 0 {
		return Package{}, fmt.Errorf("the name of a package is PUBLISHER.TYPE-VERSION.zip, not %q", name)
	}
	dot := strings.LastIndexByte(base[:dash], '.')
	if dot < 1 || dot == dash-1 {
		return Package{}, fmt.Errorf("the name of a package is PUBLISHER.TYPE-VERSION.zip, not %q", name)
	}
	v, err := ParseVersion(base[dash+1:])
	if err != nil {
		return Package{}, err
	}
	return Package{Publisher: base[:dot], Type: base[dot+1 : dash], Version: v}, nil
}
