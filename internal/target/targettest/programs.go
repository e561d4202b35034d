//go:build linux

package targettest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// downloadTimeout bounds the download of a server's packages.
const downloadTimeout = 10 * time.Minute

// programs is where the programs of a server are: below the root of this machine,
// and of an unpacked tree if something is missing here.
type programs struct{ roots []string }

// find returns the file that a pattern such as "usr/lib/postgresql/*/bin/postgres"
// names, of several the last one.
func (p programs) find(pattern string) (string, error) {
	for _, root := range p.roots {
		if found, _ := filepath.Glob(filepath.Join(root, pattern)); len(found) > 0 {
			return slices.Max(found), nil
		}
	}
	return "", fmt.Errorf("%w: there is no /%s in Debian's packages", ErrNoPrograms, pattern)
}

// environment is that of a process which uses unpacked programs.
func (p programs) environment(dir string) []string {
	env := []string{"HOME=" + dir, "TMPDIR=" + dir, "LANG=C.UTF-8", "PATH=" + dir + "/bin:/usr/bin:/bin"}
	var libraries []string
	for _, root := range p.roots {
		if root != "/" {
			for _, pattern := range []string{"usr/lib/*-linux-gnu", "lib/*-linux-gnu"} {
				found, _ := filepath.Glob(filepath.Join(root, pattern))
				libraries = append(libraries, found...)
			}
		}
	}
	if len(libraries) > 0 {
		env = append(env, "LD_LIBRARY_PATH="+strings.Join(libraries, ":"))
	}
	return env
}

// cacheFolder is where packages are unpacked: for root below /var/cache, because
// the servers run as nobody, who may not enter root's home.
func cacheFolder() (string, error) {
	if os.Getuid() == 0 {
		return "/var/cache/keyfleet-targets", nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "keyfleet-targets"), err
}

// getPrograms finds the programs of a Debian package, and unpacks the package with
// those that it needs and this machine lacks. One process at a time does that.
func getPrograms(ctx context.Context, name string) (programs, error) {
	fail := func(err error) (programs, error) {
		return programs{}, fmt.Errorf("%w of the package %s: %w", ErrNoPrograms, name, err)
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fail(err)
	}
	cache, err := cacheFolder()
	if err != nil {
		return fail(err)
	}
	unlock, err := lockFolder(cache)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	lacking, err := lackingPackages(ctx, name)
	if err != nil {
		return fail(err)
	}
	if len(lacking) == 0 {
		return programs{[]string{"/"}}, nil
	}
	sum := sha256.Sum256([]byte(strings.Join(lacking, "\n")))
	tree := filepath.Join(cache, name+"-"+hex.EncodeToString(sum[:6]))
	if _, err := os.Stat(tree); err != nil {
		if err := unpack(ctx, name, tree); err != nil {
			return fail(err)
		}
	}
	return programs{[]string{tree, "/"}}, nil
}

// lockFolder makes a folder that everybody may enter, and locks it.
func lockFolder(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}

// lackingPackages returns the lines "Inst NAME (VERSION ...)" of what an installation would bring.
func lackingPackages(ctx context.Context, name string) ([]string, error) {
	out, err := apt(ctx, "install", "-s", "-q", "--no-install-recommends", name)
	if err != nil && os.Getuid() == 0 { // the lists of packages may be absent
		if _, err := apt(ctx, "update", "-q"); err != nil {
			return nil, err
		}
		out, err = apt(ctx, "install", "-s", "-q", "--no-install-recommends", name)
	}
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "Inst ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines, nil
}

// unpack downloads a package with what it needs and unpacks all into a new tree.
func unpack(ctx context.Context, name, tree string) error {
	temporary := tree + ".new"
	archives := filepath.Join(temporary, "archives")
	if err := os.RemoveAll(temporary); err != nil { // of a run that was ended
		return err
	}
	if err := os.MkdirAll(filepath.Join(archives, "partial"), 0o755); err != nil {
		return err
	}
	download := []string{"install", "-y", "-q", "--no-install-recommends", "--download-only", "-o", "Dir::Cache::archives=" + archives, "-o", "Debug::NoLocking=1", name}
	if _, err := apt(ctx, download...); err != nil {
		if _, err := apt(ctx, "update", "-q"); err != nil { // the lists may be old
			return err
		}
		if _, err := apt(ctx, download...); err != nil {
			return err
		}
	}
	files, err := filepath.Glob(filepath.Join(archives, "*.deb"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("nothing was downloaded: %w", err)
	}
	for _, file := range files {
		if out, err := exec.CommandContext(ctx, "dpkg", "-x", file, filepath.Join(temporary, "root")).CombinedOutput(); err != nil {
			return fmt.Errorf("unpacking %s: %w: %s", filepath.Base(file), err, out)
		}
	}
	if err := os.Rename(filepath.Join(temporary, "root"), tree); err != nil {
		return err
	}
	return os.RemoveAll(temporary)
}

func apt(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, downloadTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("apt-get %s: %w: %s", args[0], err, out[max(0, len(out)-500):])
	}
	return string(out), nil
}
