package agent

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
)

// The bounds of packages. They are far above what real extensions need.
const (
	maxPackage  = 1 << 30 // bytes of the zip
	maxUnpacked = 2 << 30 // bytes of all files
	maxFiles    = 20000
	maxRatio    = 500 // unpacked to packed bytes of a file over 1 MiB
)

// downloadTimeout is how long a download may take before it is tried again; it then goes on where it stopped.
const downloadTimeout = 15 * time.Minute

// download brings a package to packagePath. What a crash or a broken
// connection left is gone on from; nothing unverified is at packagePath.
func (a *Agent) download(ctx context.Context, h *handler, p node.Package) error {
	if p.Size <= 0 || p.Size > maxPackage {
		return fmt.Errorf("a package of %d bytes is not accepted (at most %d)", p.Size, maxPackage)
	}
	if len(p.SHA256) != 64 || strings.Trim(p.SHA256, "0123456789abcdef") != "" {
		return errors.New("the package's SHA-256 is not 64 lower-case hex digits")
	}
	dest := a.packagePath(h)
	if sum, err := fileSum(dest); err == nil && sum == p.SHA256 {
		return nil
	}
	dir := a.statePath("downloads")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	part := filepath.Join(dir, p.SHA256+".part")
	var err error
	for n := range 3 {
		if n > 0 && !sleep(ctx, retryAfter(n, time.Second, 5*time.Second, spread())) {
			return ctx.Err()
		}
		if err = effect.Do("download package", func() error { return a.fetchPart(ctx, part, p) }); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	sum, err := fileSum(part)
	if err != nil {
		return err
	}
	if sum != p.SHA256 {
		_ = os.Remove(part)
		return fmt.Errorf("the downloaded package has the SHA-256 %s, not %s", sum, p.SHA256)
	}
	return effect.Do("keep package", func() error {
		if err := os.Rename(part, dest); err != nil {
			return err
		}
		return syncDir(filepath.Dir(dest))
	})
}

// fetchPart appends to part what is missing of the package.
func (a *Agent) fetchPart(ctx context.Context, part string, p node.Package) error {
	ctx, cancel := context.WithTimeout(ctx, downloadTimeout)
	defer cancel()
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	have, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if have > p.Size {
		have = 0
	}
	h := http.Header{}
	if have == p.Size {
		return nil
	}
	if have > 0 {
		h.Set("Range", "bytes="+strconv.FormatInt(have, 10)+"-")
	}
	resp, err := a.srv.stream(ctx, "/v1/packages/"+p.SHA256, h)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		have = 0
	}
	if err := f.Truncate(have); err != nil {
		return err
	}
	if _, err := f.Seek(have, io.SeekStart); err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(resp.Body, p.Size-have+1))
	if err != nil {
		return fmt.Errorf("downloading package: %w", err)
	}
	if have+n != p.Size {
		return fmt.Errorf("downloading package: it has %d bytes where %d were announced", have+n, p.Size)
	}
	return f.Sync()
}

// fileSum is the hex SHA-256 of a file.
func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// unpack makes the handler's folder from its package: into a folder beside it
// first, which is renamed when it is complete.
func (a *Agent) unpack(h *handler) error {
	tmp := h.dir + tmpSuffix
	return effect.Do("unpack package", func() error {
		if err := os.RemoveAll(tmp); err != nil {
			return err
		}
		if err := os.Mkdir(tmp, 0o700); err != nil {
			return err
		}
		if err := unpackInto(a.packagePath(h), tmp); err != nil {
			_ = os.RemoveAll(tmp)
			return err
		}
		if err := os.MkdirAll(filepath.Join(tmp, "config"), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(tmp, "config", "HandlerState"), []byte(node.NotInstalled), 0o600); err != nil {
			return err
		}
		if err := os.RemoveAll(h.dir); err != nil { // without HandlerState: not a handler of ours
			return err
		}
		if err := os.Rename(tmp, h.dir); err != nil {
			return err
		}
		return syncDir(filepath.Dir(h.dir))
	})
}

// errNoManifest says that a package has no HandlerManifest.json anywhere.
var errNoManifest = errors.New("the package has no HandlerManifest.json")

// unpackInto unpacks a zip into dir, which no entry can leave, and copies
// HandlerManifest.json to dir itself.
func unpackInto(zipPath, dir string) error {
	z, err := zip.OpenReader(zipPath)
	if err != nil {
		return fmt.Errorf("opening package: %w", err)
	}
	defer z.Close()
	manifest, err := checkPackage(z.File)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	left := int64(maxUnpacked)
	for _, f := range z.File {
		if strings.HasSuffix(f.Name, "/") {
			if err := root.MkdirAll(strings.TrimSuffix(f.Name, "/"), 0o700); err != nil {
				return fmt.Errorf("unpacking %s: %w", f.Name, err)
			}
			continue
		}
		n, err := unpackFile(root, f, f.Name, left)
		if err != nil {
			return fmt.Errorf("unpacking %s: %w", f.Name, err)
		}
		left -= n
	}
	if manifest.Name != "HandlerManifest.json" {
		if _, err := unpackFile(root, manifest, "HandlerManifest.json", left); err != nil {
			return fmt.Errorf("copying HandlerManifest.json: %w", err)
		}
	}
	return nil
}

// checkPackage checks a zip's directory before anything is written, and finds
// the manifest: the one nearest to the root.
func checkPackage(files []*zip.File) (manifest *zip.File, err error) {
	if len(files) > maxFiles {
		return nil, fmt.Errorf("the package has %d entries; at most %d are accepted", len(files), maxFiles)
	}
	seen := map[string]bool{}
	var total uint64
	for _, f := range files {
		if err := checkEntry(f); err != nil {
			return nil, fmt.Errorf("the package's entry %q is not accepted: %w", f.Name, err)
		}
		name := strings.ToLower(strings.TrimSuffix(f.Name, "/"))
		if seen[name] && !strings.HasSuffix(f.Name, "/") {
			return nil, fmt.Errorf("the package's entry %q is there twice", f.Name)
		}
		seen[name] = true
		if total += f.UncompressedSize64; total > maxUnpacked {
			return nil, fmt.Errorf("the package unpacks to more than %d bytes", maxUnpacked)
		}
		if path.Base(f.Name) == "HandlerManifest.json" && (manifest == nil || depth(f.Name) < depth(manifest.Name)) {
			manifest = f
		}
	}
	if manifest == nil {
		return nil, errNoManifest
	}
	return manifest, nil
}

func depth(name string) int { return strings.Count(name, "/") }

// checkEntry refuses what must not be in a package: links, devices, setuid
// files, names that lead elsewhere, and files that explode.
func checkEntry(f *zip.File) error {
	name := strings.TrimSuffix(f.Name, "/")
	if !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\\:\x00") || len(name) > 1024 {
		return errors.New("its name leads out of the package's folder, or cannot be one")
	}
	if strings.HasSuffix(strings.ToLower(name), tmpSuffix) {
		return errors.New("its name is reserved")
	}
	mode := f.Mode()
	if mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != 0 {
		return errors.New("it is setuid, setgid or sticky")
	}
	if t := mode.Type(); t != 0 && t != fs.ModeDir || t == fs.ModeDir != strings.HasSuffix(f.Name, "/") {
		return errors.New("it is neither a file nor a folder")
	}
	if f.UncompressedSize64 > 1<<20 && f.UncompressedSize64/max(f.CompressedSize64, 1) > maxRatio {
		return errors.New("it unpacks to far more than it weighs")
	}
	return nil
}

// unpackFile writes one file, executable for its owner as the contract wants,
// and returns its size. The announced size is not trusted.
func unpackFile(root *os.Root, f *zip.File, name string, left int64) (int64, error) {
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o700); err != nil {
			return 0, err
		}
	}
	in, err := f.Open()
	if err != nil {
		return 0, err
	}
	defer in.Close()
	mode := f.Mode().Perm()&0o755 | 0o700
	out, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return 0, err
	}
	limit := min(left, int64(f.UncompressedSize64))
	n, err := io.Copy(out, io.LimitReader(in, limit+1))
	if err == nil && n > limit {
		err = errors.New("it is larger than the package says")
	}
	if err == nil {
		err = out.Chmod(mode)
	}
	return n, errors.Join(err, out.Close())
}
