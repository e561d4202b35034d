//go:build linux

package bed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// importScript runs containerd once in the machines' root file system, with an
// empty store, and imports the images into it. $1 is a work folder, $2 the root
// file system, $3 the folder of images, $4 the store. containerd has no network,
// and needs none.
const importScript = `set -e
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
mkdir -p "$1/root/images" "$1/root/var/lib/containerd"
mount --bind "$3" "$1/root/images"
mount --bind "$4" "$1/root/var/lib/containerd"
mount -t proc proc "$1/root/proc"
mount -t sysfs sysfs "$1/root/sys"
mount --bind /dev "$1/root/dev"
exec unshare --net chroot "$1/root" sh -ec '
	mount -t tmpfs tmpfs /run
	containerd >/run/log 2>&1 &
	i=0
	until ctr version >/dev/null 2>&1; do
		i=$((i+1)); [ $i -lt 100 ] || { cat /run/log; exit 1; }
		sleep 0.1
	done
	for image in /images/*.tar; do ctr -n k8s.io images import "$image"; done
	kill $! && wait $! || true'
`

// buildContainers makes the store that a machine's containerd starts with: all
// images, imported and unpacked.
func (c *Cache) buildContainers(ctx context.Context, dir string, _ io.Writer) error {
	work := filepath.Join(filepath.Dir(dir), "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		return err
	}
	if err := runContained(ctx, "sh", "-c", importScript, "sh", work, c.path(rootFS), c.path(images), dir); err != nil {
		return fmt.Errorf("importing the images: %w", err)
	}
	return nil
}

// cloneStore gives a machine its own store. Layers and blobs are hard links:
// containerd never writes to them, only removes names; so they take no space, and
// the machines share one copy of every program in memory. The databases are
// copied.
func cloneStore(from, to string) error {
	return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		at := filepath.Join(to, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			if err := os.MkdirAll(at, 0o755); err != nil {
				return err
			}
			return os.Chmod(at, info.Mode().Perm())
		case !d.Type().IsRegular():
			return nil // sockets and the like: containerd makes its own
		case strings.Contains(rel, "/blobs/") || strings.Contains(rel, "/snapshots/"):
			if err := os.Link(name, at); !errors.Is(err, syscall.EXDEV) {
				return err
			}
		}
		return copyFile(name, at, info.Mode().Perm())
	})
}

func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Close()
}
