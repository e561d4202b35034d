package namespace

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A stepError says which step of building a node failed; [Check] explains it.
type stepError struct {
	Step string // for instance "mount proc"
	Err  error
}

func (e *stepError) Error() string { return e.Step + ": " + e.Err.Error() }
func (e *stepError) Unwrap() error { return e.Err }

// programs are the top-level folders of this machine that a node sees,
// read-only. Home folders, /mnt, /srv and the like are not a node's business.
// /nix and /gnu hold the programs of two distributions without /usr.
var programs = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "opt", "nix", "gnu"}

// plan is a list of steps of which the first failure ends the rest.
type plan struct{ err error }

func (p *plan) do(step string, fn func() error) {
	if p.err != nil {
		return
	}
	if err := fn(); err != nil {
		p.err = &stepError{Step: step, Err: err}
	}
}

func (p *plan) mkdir(path string, mode os.FileMode) {
	p.do("make "+path, func() error {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		return os.Chmod(path, mode)
	})
}

func (p *plan) mount(source, target, fstype string, flags uintptr, options string) {
	p.do("mount "+fstype, func() error { return unix.Mount(source, target, fstype, flags, options) })
}

// bind shows source, a folder or a file, at target. MS_REC is needed where a
// mount below source belongs to a more privileged namespace (mount_namespaces(7)).
func (p *plan) bind(source, target string) {
	p.do("bind "+source, func() error {
		fi, err := os.Stat(source)
		if err != nil {
			return err
		}
		if err := makeMountPoint(target, fi.IsDir()); err != nil {
			return err
		}
		return unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, "")
	})
}

// readOnly makes a mount and all below it read-only.
func (p *plan) readOnly(target string) {
	p.do("make "+target+" read-only", func() error {
		err := unix.MountSetattr(-1, target, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID})
		if err != unix.ENOSYS {
			return err
		}
		// Before Linux 5.12: this mount alone, keeping the flags that a user
		// namespace may not take away.
		var st unix.Statfs_t
		if err := unix.Statfs(target, &st); err != nil {
			return err
		}
		kept := uintptr(st.Flags) & (unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME)
		return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|kept, "")
	})
}

// makeMountPoint makes what a folder or a file can be mounted on, unless it is there.
func makeMountPoint(path string, dir bool) error {
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	if dir {
		return os.MkdirAll(path, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o644)
}

// buildRoot makes the node's root on f's mount point and moves into it. The
// mounts exist in this process's mount namespace only and end with it.
func buildRoot(f Folder, n Node) error {
	root := f.path("root")
	in := func(path string) string { return filepath.Join(root, path) }
	p := new(plan)
	p.do("make mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") })
	p.mount("keyfleet", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=64m")
	p.showPrograms(root)
	p.mkdir(in("/sys"), 0o555)
	p.mkdir(in("/root"), 0o700)
	p.mkdir(in("/home"), 0o755)
	p.mkdir(in("/mnt"), 0o755)
	p.mkdir(in("/var/tmp"), 0o777|os.ModeSticky)
	p.mkdir(in("/run/lock"), 0o777|os.ModeSticky)
	p.do("link /var/run", func() error { return os.Symlink("/run", in("/var/run")) })
	p.do("make /etc", func() error { return makeEtc(in("/etc"), n) })
	p.bind(f.WAAgent(), in("/var/lib/waagent"))
	p.bind(f.Log(), in("/var/log/azure"))
	p.bind(f.path("tmp"), in("/tmp"))
	p.bind(n.SocketDir, in(filepath.Dir(socketPath)))
	p.bind(n.Agent, in(agentPath))
	p.readOnly(in(agentPath))
	p.devices(root, n.HostRoot)
	p.proc(root, n.HostRoot)
	p.do("change the root", func() error { return pivot(root) })
	return p.err
}

func (p *plan) showPrograms(root string) {
	for _, name := range programs {
		from, to := "/"+name, filepath.Join(root, name)
		fi, err := os.Lstat(from)
		switch {
		case err != nil:
		case fi.Mode()&os.ModeSymlink != 0:
			p.do("link "+from, func() error {
				target, err := os.Readlink(from)
				if err != nil {
					return err
				}
				return os.Symlink(target, to)
			})
		case fi.IsDir():
			p.bind(from, to)
			p.readOnly(to)
		}
	}
}

// devices makes the few devices that programs expect, borrowed from this
// machine, and the node's own terminals.
func (p *plan) devices(root string, hostRoot bool) {
	dev := filepath.Join(root, "dev")
	p.mkdir(dev, 0o755)
	p.mount("dev", dev, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=64k")
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		p.bind("/dev/"+name, filepath.Join(dev, name))
	}
	p.mkdir(filepath.Join(dev, "pts"), 0o755)
	options := "newinstance,ptmxmode=0666,mode=0620"
	if hostRoot {
		options += ",gid=5" // tty; in a user namespace with one group there is no such group
	}
	p.mount("devpts", filepath.Join(dev, "pts"), "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, options)
	p.mkdir(filepath.Join(dev, "shm"), 0o777|os.ModeSticky)
	p.mount("shm", filepath.Join(dev, "shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777")
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		p.do("link /dev/"+name, func() error { return os.Symlink(target, filepath.Join(dev, name)) })
	}
}

// proc mounts the node's own /proc. Its boot id is the node's, new with every
// start: the kernel's would stay the same over a restart of the node.
func (p *plan) proc(root string, hostRoot bool) {
	proc := filepath.Join(root, "proc")
	p.mkdir(proc, 0o555)
	p.mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	boot := filepath.Join(root, bootIDPath)
	p.do("write boot id", func() error { return os.WriteFile(boot, []byte(newUUID()+"\n"), 0o444) })
	if hostRoot {
		// Without a user namespace these would change this machine.
		p.bind(filepath.Join(proc, "sys"), filepath.Join(proc, "sys"))
		p.readOnly(filepath.Join(proc, "sys"))
		if sysrq := filepath.Join(proc, "sysrq-trigger"); p.err == nil {
			if _, err := os.Stat(sysrq); err == nil {
				p.bind("/dev/null", sysrq)
			}
		}
	}
	p.bind(boot, filepath.Join(proc, "sys", "kernel", "random", "boot_id"))
}

// pivot makes root the root of this mount namespace and lets go of the old one.
func pivot(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	// With both arguments "." the old root is stacked under the new one
	// (pivot_root(2), "pivot_root(".", ".")").
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmounting the old root: %w", err)
	}
	return os.Chdir("/")
}

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}
