//go:build linux

package bed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotPrepared says that something a bed is made from has not been built yet.
var ErrNotPrepared = errors.New("the bed's cache is not prepared: run go run ./test/bed/cmd/bed prepare")

// Cache is where the parts of every bed are kept once they are built: programs,
// root file system, images. An entry's name ends in a hash of what it is made
// from, and an entry appears complete or not at all; so an entry never changes,
// several checkouts may share a cache, and beds that are up may go on using an
// old entry.
type Cache struct {
	Dir    string
	source string // folder of this package in the checkout
	parts  []part // in the order they are built
}

// part is one entry of the cache.
type part struct {
	name     string
	key      string
	build    func(ctx context.Context, dir string, log io.Writer) error // into the empty folder dir
	services bool                                                       // only beds with Services need it
}

// Names of the parts.
const (
	programs   = "kubernetes"
	rootFS     = "rootfs"
	images     = "images"
	containers = "containerd"
	services   = "services"
	userland   = "userland"
)

// OpenCache finds the cache, $KEYFLEET_BED_CACHE or keyfleet-bed in the user's
// cache directory, and says what it should hold. The working directory must be
// inside the project.
func OpenCache() (*Cache, error) {
	source, err := findSource()
	if err != nil {
		return nil, err
	}
	c := &Cache{Dir: os.Getenv("KEYFLEET_BED_CACHE"), source: source}
	if c.Dir == "" {
		dir, err := os.UserCacheDir() // $XDG_CACHE_HOME or ~/.cache
		if err != nil {
			return nil, fmt.Errorf("finding the cache: %w", err)
		}
		c.Dir = filepath.Join(dir, "keyfleet-bed")
	}
	kubernetes, err := programsKey(source)
	if err != nil {
		return nil, err
	}
	root, err := rootFSKey()
	if err != nil {
		return nil, err
	}
	pictures, err := imagesKey(source, kubernetes)
	if err != nil {
		return nil, err
	}
	more, err := servicesKey(source)
	if err != nil {
		return nil, err
	}
	c.parts = []part{
		{name: programs, key: kubernetes, build: c.buildPrograms},
		{name: rootFS, key: root, build: c.buildRootFS},
		{name: images, key: pictures, build: c.buildImages},
		{name: containers, key: key(root, pictures), build: c.buildContainers},
		{name: services, key: more, build: c.buildServices, services: true},
		{name: userland, key: userlandKey(), build: c.buildUserland, services: true},
	}
	return c, nil
}

// findSource looks for this package's folder from the working directory upwards:
// the versions of what is built stand in files there.
func findSource() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(b, []byte("module keyfleet.dev/keyfleet\n")) {
			return filepath.Join(dir, "test", "bed"), nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("the project's go.mod is not above the working directory")
		}
		dir = up
	}
}

// key is a short name for the inputs.
func key(inputs ...string) string {
	h := sha256.New()
	for _, in := range append(inputs, runtime.GOARCH) {
		fmt.Fprintf(h, "%d:%s", len(in), in)
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

// path is the folder of the part, whether it is there or not.
func (c *Cache) path(name string) string {
	for _, p := range c.parts {
		if p.name == name {
			return filepath.Join(c.Dir, name+"-"+p.key)
		}
	}
	panic("bed: no part " + name)
}

// Kubectl is the path of kubectl of the beds' version.
func (c *Cache) Kubectl() string { return filepath.Join(c.path(programs), "kubectl") }

// Helm is the path of helm. Beds with Services have it.
func (c *Cache) Helm() string { return filepath.Join(c.path(services), "helm") }

// BedDir is where a bed of the name lives when it is not told another place.
func (c *Cache) BedDir(name string) string { return filepath.Join(c.Dir, "beds", name) }

// Ready returns [ErrNotPrepared] when a part is missing that every bed needs.
func (c *Cache) Ready() error { return c.ReadyFor(Config{}) }

// ReadyFor returns [ErrNotPrepared] when a part is missing that the bed needs.
func (c *Cache) ReadyFor(cfg Config) error {
	for _, p := range c.partsFor(cfg) {
		if _, err := os.Stat(c.path(p.name)); err != nil {
			return fmt.Errorf("%w (no %s)", ErrNotPrepared, c.path(p.name))
		}
	}
	return nil
}

func (c *Cache) partsFor(cfg Config) []part {
	var needed []part
	for _, p := range c.parts {
		if !p.services || cfg.Services {
			needed = append(needed, p)
		}
	}
	return needed
}

// Prepare builds everything that is missing: see [Cache.PrepareFor].
func (c *Cache) Prepare(ctx context.Context, log io.Writer) error {
	return c.PrepareFor(ctx, Config{Services: true}, log)
}

// PrepareFor builds what is missing for the bed, as root, and writes a line to
// log per part. From nothing it takes five minutes on two processors, and four
// more with Services, most of it in the compiler. Only one process builds at a
// time; others wait.
func (c *Cache) PrepareFor(ctx context.Context, cfg Config, log io.Writer) error {
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return err
	}
	if err := installPackages(ctx, log); err != nil {
		return err
	}
	lock, err := lockFile(filepath.Join(c.Dir, "lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := c.sweep(); err != nil {
		return err
	}
	for _, p := range c.partsFor(cfg) {
		if _, err := os.Stat(c.path(p.name)); err == nil {
			fmt.Fprintf(log, "%-11s ready\n", p.name)
			continue
		}
		started := time.Now()
		fmt.Fprintf(log, "%-11s building\n", p.name)
		if err := c.make(ctx, p, log); err != nil {
			return fmt.Errorf("building %s: %w", p.name, err)
		}
		fmt.Fprintf(log, "%-11s built in %.0f s\n", p.name, time.Since(started).Seconds())
	}
	return nil
}

// make builds a part aside and moves it to its place.
func (c *Cache) make(ctx context.Context, p part, log io.Writer) error {
	aside, err := os.MkdirTemp(c.Dir, "building-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(aside)
	dir := filepath.Join(aside, p.name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := p.build(ctx, dir, log); err != nil {
		return err
	}
	return os.Rename(dir, c.path(p.name))
}

// sweep removes what a killed Prepare left. The lock is held: nobody builds.
func (c *Cache) sweep() error {
	left, err := filepath.Glob(filepath.Join(c.Dir, "building-*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("removing what an interrupted build left: %w", err)
		}
	}
	return nil
}

// lockFile waits for the lock; closing the file gives it back, and so does the
// end of the process.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return f, nil
}
