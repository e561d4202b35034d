package namespace

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// maxEtcFile is the size in bytes above which a file of /etc is left out
// (compiled hardware tables and the like, which a node has no use for).
const maxEtcFile = 1 << 20

// ownFiles are files of /etc that a node does not get from this machine.
var ownFiles = map[string]bool{
	"hosts": true, "hostname": true, "resolv.conf": true, "machine-id": true, "mtab": true, "fstab": true,
}

// makeEtc makes the node's own /etc in memory: a copy of what every user of
// this machine may read, with the node's own name and hosts. It is a copy
// because a node writes there (certificate folders under /etc/ssl,
// configurations of services), of readable files only because a node is another
// machine (password hashes and host keys are not for it), and in memory because
// a thousand small files take a second on many a disk. So /etc is new with
// every start of the node; the agent and its extensions bring it there again.
func makeEtc(etc string, n Node) error {
	if err := copyTree("/etc", etc); err != nil {
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
		if err := os.WriteFile(filepath.Join(etc, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return os.Symlink("/proc/self/mounts", filepath.Join(etc, "mtab"))
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
	content, err := os.ReadFile(from)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, fi.Mode().Perm()|0o200)
}
