//go:build linux

package bed

import (
	"context"
	"embed"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// base is laid over the root file system of every machine.
//
//go:embed all:base
var base embed.FS

// suite is the Debian release of the machines.
const suite = "bookworm"

// rootFSRecipe counts changes to the code below that change its outcome.
const rootFSRecipe = "1"

// machinePackages are what a master has: what a container needs to boot and to
// be logged in to, what kubelet and containerd use, and the tools that a
// rotation of certificates runs on hosts.
func machinePackages() []string {
	return []string{
		"systemd", "systemd-sysv", "dbus", "openssh-server", "sudo", "iproute2", "procps", "kmod", "ca-certificates",
		"containerd", "runc", "containernetworking-plugins", "iptables", "conntrack", "ethtool", "socat",
		"openssl", "curl", "rsync", "tar", "gzip", "iputils-ping",
	}
}

// maskedUnits do nothing useful in a container, or something to the machine below.
func maskedUnits() []string {
	return []string{
		"systemd-resolved.service", "systemd-networkd.service", "systemd-networkd-wait-online.service", "networking.service",
		"systemd-timesyncd.service", "systemd-logind.service", "getty.target", "console-getty.service",
		"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer",
	}
}

func rootFSKey() (string, error) {
	inputs := []string{rootFSRecipe, suite, strings.Join(machinePackages(), ","), strings.Join(maskedUnits(), ",")}
	err := fs.WalkDir(base, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := base.ReadFile(name)
		inputs = append(inputs, name, string(b))
		return err
	})
	return suite + "-" + key(inputs...), err
}

func (c *Cache) buildRootFS(ctx context.Context, dir string, _ io.Writer) error {
	if err := bootstrap(ctx, dir); err != nil {
		return err
	}
	for _, step := range []func(string) error{layBase, addUser, maskUnits, linkPrograms, forgetIdentity} {
		if err := step(dir); err != nil {
			return err
		}
	}
	return nil
}

// bootstrap installs Debian into dir.
func bootstrap(ctx context.Context, dir string) error {
	err := runContained(ctx, "mmdebstrap", "--mode=root", "--variant=minbase", "--include="+strings.Join(machinePackages(), ","), suite, dir)
	if err != nil {
		return fmt.Errorf("installing Debian %s: %w", suite, err)
	}
	return nil
}

// runContained runs a command as the first process of mount and process
// namespaces of its own. Its mounts, and what it has started, end with it, and it
// ends with this process: an interrupted build leaves nothing but files.
func runContained(ctx context.Context, argv ...string) error {
	runtime.LockOSThread() // Pdeathsig means the thread
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS, // tells the Go runtime to make the mounts private
		Pdeathsig:    syscall.SIGKILL,
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(string(out), 20))
	}
	return nil
}

func layBase(dir string) error {
	return fs.WalkDir(base, "base", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := base.ReadFile(name)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, strings.TrimPrefix(name, "base"))
		if err := writeFile(to, string(b), 0o644); err != nil {
			return err
		}
		if strings.Contains(name, "sudoers.d") {
			return os.Chmod(to, 0o440) // sudo insists
		}
		return nil
	})
}

// addUser makes the user that the outside logs in as. Its key is a bed's own.
func addUser(dir string) error { return inRoot(dir, "useradd", "-m", "-s", "/bin/bash", "azureuser") }

func maskUnits(dir string) error {
	units := filepath.Join(dir, "etc/systemd/system")
	for _, u := range maskedUnits() {
		if err := link("/dev/null", filepath.Join(units, u)); err != nil {
			return err
		}
	}
	if err := link("/lib/systemd/system/multi-user.target", filepath.Join(units, "default.target")); err != nil {
		return err
	}
	return inRoot(dir, "systemctl", "enable", "bed-cgroups.service", "kubelet.service", "containerd.service")
}

// linkPrograms puts the programs, which a machine mounts at [programsDir], into the path.
func linkPrograms(dir string) error {
	for _, name := range []string{"kubeadm", "kubelet", "kubectl", "etcdctl"} {
		if err := link(filepath.Join(programsDir, name), filepath.Join(dir, "usr/bin", name)); err != nil {
			return err
		}
	}
	return nil
}

// forgetIdentity removes what must differ between machines.
func forgetIdentity(dir string) error {
	keys, err := filepath.Glob(filepath.Join(dir, "etc/ssh/ssh_host_*"))
	if err != nil {
		return err
	}
	for _, name := range append(keys, filepath.Join(dir, "etc/hostname")) {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	for _, name := range []string{"etc/machine-id", "etc/resolv.conf"} { // empty, not absent: systemd fills in the one and leaves the other
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, name), "", 0o644); err != nil {
			return err
		}
	}
	return nil
}

func link(to, at string) error {
	if err := os.RemoveAll(at); err != nil {
		return err
	}
	return os.Symlink(to, at)
}

func inRoot(dir string, argv ...string) error {
	out, err := exec.Command("chroot", append([]string{dir}, argv...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s in the new root: %w\n%s", argv[0], err, tail(string(out), 10))
	}
	return nil
}
