//go:build linux

package bed

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// programsDir is where a machine sees the programs of the cache, read-only.
const programsDir = "/opt/kubernetes"

// bootScript mounts the machine's root, in a mount namespace that ends with the
// machine, and becomes the container. $1 is the machine's folder, $2 the root
// file system below; the rest is the command. What systemd-nspawn would leave in
// /run when it is killed goes with the mount namespace too.
const bootScript = `mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
shift 2
exec "$@"`

// bootAll boots the machines and waits until all of them can be used.
func (b *builder) bootAll(ctx context.Context) error {
	return each(ctx, b.Nodes, func(ctx context.Context, n Node) error {
		if err := b.furnish(n); err != nil {
			return fmt.Errorf("preparing the disk of %s: %w", n.Name, err)
		}
		if err := b.boot(n); err != nil {
			return fmt.Errorf("booting %s: %w", n.Name, err)
		}
		return b.awaitMachine(ctx, n)
	})
}

// furnish makes the machine's disk: the layer above the shared root, with what
// is this machine's own, and the folders that need a real file system.
func (b *builder) furnish(n Node) error {
	dir := b.path("machine", n.Name)
	for _, name := range []string{"upper", "work", "root", "kubelet", "containerd"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return err
		}
	}
	upper := filepath.Join(dir, "upper")
	for file, name := range map[string]string{"etc/hosts": "hosts", "etc/cni/net.d/10-bed.conflist": "cni.json"} {
		if err := renderTo(filepath.Join(upper, file), name, b.scene(n)); err != nil {
			return err
		}
	}
	if err := writeFile(filepath.Join(upper, "etc/hostname"), n.Name+"\n", 0o644); err != nil {
		return err
	}
	for from, to := range map[string]string{b.hostKey(n): "ssh_host_ed25519_key", b.hostKey(n) + ".pub": "ssh_host_ed25519_key.pub"} {
		if err := linkInto(from, filepath.Join(upper, "etc/ssh", to)); err != nil {
			return err
		}
	}
	if err := b.letIn(upper); err != nil {
		return err
	}
	if b.Services {
		if err := b.furnishServices(upper, n); err != nil {
			return err
		}
	}
	return cloneStore(b.cache.path(containers), filepath.Join(dir, "containerd"))
}

// linkInto links the file to its place on the machine's disk.
func linkInto(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.Link(from, to)
}

// letIn puts the bed's key where sshd looks for the user's.
func (b *builder) letIn(upper string) error {
	public, err := os.ReadFile(b.SSHKey + ".pub")
	if err != nil {
		return err
	}
	home := filepath.Join(upper, "home/azureuser")
	if err := writeFile(filepath.Join(home, ".ssh/authorized_keys"), string(public), 0o600); err != nil {
		return err
	}
	const first = 1000 // id of the first ordinary user that Debian makes
	for _, name := range []string{home, filepath.Join(home, ".ssh"), filepath.Join(home, ".ssh/authorized_keys")} {
		if err := os.Chown(name, first, first); err != nil {
			return err
		}
	}
	return os.Chmod(filepath.Join(home, ".ssh"), 0o700)
}

// boot starts the container. It is a machine of its own to systemd-nspawn alone:
// it is not registered, and its control group is the one it is started in.
func (b *builder) boot(n Node) error {
	dir := b.path("machine", n.Name)
	root := filepath.Join(dir, "root")
	argv := []string{
		"unshare", "--mount", "--propagation", "slave", "sh", "-ec", bootScript, "sh", dir, b.cache.path(rootFS),
		"systemd-nspawn", "--quiet", "--boot", "--directory=" + root, "--machine=" + namespace(b.Name, n.Name), "--hostname=" + n.Name,
		"--network-namespace-path=" + namespacePath(b.Name, n.Name), "--register=no", "--keep-unit",
		"--capability=all", "--system-call-filter=@keyring bpf @mount", // what kubelet, containerd and runc need
		"--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe",
		"--bind-ro=" + b.cache.path(programs) + ":" + programsDir,
		"--bind=" + filepath.Join(dir, "containerd") + ":/var/lib/containerd", // neither works on an overlay
		"--bind=" + filepath.Join(dir, "kubelet") + ":/var/lib/kubelet",
	}
	if _, err := os.Stat("/dev/kmsg"); err == nil { // kubelet reads of killed processes there
		argv = append(argv, "--bind=/dev/kmsg")
	}
	env := []string{"SYSTEMD_NSPAWN_API_VFS_WRITABLE=yes"}
	h, err := findHierarchies()
	if err != nil {
		return err
	}
	if h.unified {
		env = append(env, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	}
	return b.start(n.Name, n.Name, argv, env)
}

// awaitMachine waits until sshd and containerd answer.
func (b *builder) awaitMachine(ctx context.Context, n Node) error {
	const within = 3 * time.Minute
	// One by one: is-active is content with one of those it is asked for.
	ready := "systemctl is-active --quiet ssh && systemctl is-active --quiet containerd && ctr version >/dev/null"
	if err := b.until(ctx, within, n.Name, "boot", ready); err != nil {
		log, _ := os.ReadFile(b.logFile(n.Name)) // what systemd printed
		return &StepError{Machine: n.Name, Step: "boot", Log: tail(string(log), 25), Err: err}
	}
	conn, err := b.Dial(ctx, "tcp", n.IP+":22")
	if err == nil {
		defer conn.Close()
		err = readGreeting(conn)
	}
	if err != nil {
		return &StepError{Machine: n.Name, Step: "sshd", Err: err}
	}
	return nil
}
