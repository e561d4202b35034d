package namespace

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"keyfleet.dev/keyfleet/internal/effect"
)

// maxEtcFile is the size in bytes above which a file of /etc is left out
// (compiled hardware tables and the like, which a node has no use for).
const maxEtcFile = 1 << 20

// ownFiles are files of /etc that a node does not get from this machine.
var ownFiles = map[string]bool{
	"hosts": true, "hostname": true, "resolv.conf": true, "machine-id": true, "mtab": true, "fstab": true,
}

// makeEtc makes the node's own /etc: a copy of what every user of this machine
// may read, with the node's own name and hosts. It is a copy because a node
// writes there (certificate folders under /etc/ssl, service configurations),
// and of readable files only, because a node is another machine: password
// hashes and host keys are not for it. An /etc that is there is kept.
func makeEtc(f Folder, n Node) error {
	if _, err := os.Stat(f.path("etc")); err == nil {
		return nil
	}
	tmp := f.path("etc.tmp")
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("clearing a half-made /etc: %w", err)
	}
	if err := copyTree("/etc", tmp); err != nil {
		return err
	}
	own := map[string]string{
		"hosts":       hostsFile(n),
		"hostname":    n.ID + "\n",
		"resolv.conf": "# This node has no DNS; names are in /etc/hosts.\n",
		"machine-id":  strings.ReplaceAll(newUUID(), "-", "") + "\n",
		"fstab":       "",
	}
	for name, content := range own {
		if err := os.WriteFile(filepath.Join(tmp, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("writing the node's /etc/%s: %w", name, err)
		}
	}
	if err := os.Symlink("/proc/self/mounts", filepath.Join(tmp, "mtab")); err != nil {
		return fmt.Errorf("linking the node's /etc/mtab: %w", err)
	}
	return effect.Do("rename etc", func() error { return os.Rename(tmp, f.path("etc")) })
}

// hostsFile is the node's first hosts file; the agent keeps it as the goal
// state says from then on.
func hostsFile(n Node) string {
	var b strings.Builder
	fmt.Fprintf(&b, "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 %s\n", n.ID)
	for _, h := range n.Hosts {
		fmt.Fprintf(&b, "127.0.0.1 %s\n", h)
	}
	return b.String()
}

// copyTree copies folders, links and world-readable files from one folder to
// another. What cannot be read is left out, as if it were not there.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		rel, rerr := filepath.Rel(from, path)
		if rerr != nil {
			return rerr
		}
		if err != nil {
			if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return fmt.Errorf("reading %s: %w", path, err)
		}
		if ownFiles[rel] {
			return nil
		}
		err = copyEntry(path, filepath.Join(to, rel), d)
		if err != nil && !errors.Is(err, fs.SkipDir) {
			return fmt.Errorf("copying %s: %w", path, err)
		}
		return err
	})
}

func copyEntry(from, to string, d fs.DirEntry) error {
	switch {
	case d.Type()&os.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case !d.IsDir() && !d.Type().IsRegular():
		return nil
	}
	fi, err := d.Info()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if d.IsDir() {
		if err := os.Mkdir(to, fi.Mode().Perm()|0o700); err != nil {
			return err
		}
		if fi.Mode()&0o005 != 0o005 {
			return fs.SkipDir // not for every user; the node gets an empty one
		}
		return nil
	}
	if fi.Mode()&0o004 == 0 || fi.Size() > maxEtcFile {
		return nil
	}
	src, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, fi.Mode().Perm()|0o200)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		_ = dst.Close()
		return err
	}
	return dst.Close()
}
