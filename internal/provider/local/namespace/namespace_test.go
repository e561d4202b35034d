package namespace

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/internal/fault"
)

// TestExplain: each way a machine forbids namespaces is named, with what to change.
func TestExplain(t *testing.T) {
	for _, c := range []struct {
		reason string
		step   stepError
		facts  facts
		code   string
		says   string // in the message
		fix    string // in the fix
	}{
		{
			"the kernel allows no user namespace at all",
			stepError{"create namespaces", unix.ENOSPC},
			facts{MaxUserNS: "0"},
			"LocalNodesForbidden", "max_user_namespaces is 0", "sysctl -w user.max_user_namespaces",
		},
		{
			"a limit is reached, which is not the same",
			stepError{"create namespaces", unix.ENOSPC},
			facts{MaxUserNS: "100", Root: true, SysAdmin: true},
			"LocalNodesForbidden", "a limit", "Raise",
		},
		{
			"Debian's switch is off",
			stepError{"create namespaces", unix.EPERM},
			facts{MaxUserNS: "100", Unprivileged: "0"},
			"LocalNodesForbidden", "unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1",
		},
		{
			"Ubuntu's AppArmor gives a namespace without rights: the first mount fails",
			stepError{"make mounts private", unix.EACCES},
			facts{MaxUserNS: "100", AppArmor: "1"},
			"LocalNodesForbidden", "AppArmor", "apparmor_restrict_unprivileged_userns=0",
		},
		{
			"root in a container has no CAP_SYS_ADMIN",
			stepError{"create namespaces", unix.EPERM},
			facts{Root: true, Container: true, SeccompFilter: true},
			"LocalNodesForbidden", "CAP_SYS_ADMIN", "--privileged",
		},
		{
			"a container's filter refuses the call",
			stepError{"create namespaces", unix.EPERM},
			facts{MaxUserNS: "100", SeccompFilter: true},
			"LocalNodesForbidden", "seccomp", "--privileged",
		},
		{
			"a container hides parts of /proc",
			stepError{"mount proc", unix.EPERM},
			facts{MaxUserNS: "100", Container: true},
			"LocalNodesForbidden", "/proc", "--privileged",
		},
		{
			"the root is an initial RAM disk",
			stepError{"change the root", unix.EINVAL},
			facts{Root: true, SysAdmin: true},
			"LocalNodesForbidden", "RAM disk", "disk",
		},
		{
			"nothing known explains it",
			stepError{"create namespaces", unix.EPERM},
			facts{Root: true, SysAdmin: true},
			"LocalNodesForbidden", "chroot", "outside a chroot",
		},
		{
			"a failure that no rule of the machine made is not called one",
			stepError{"make /etc", unix.EIO},
			facts{Root: true, SysAdmin: true},
			"LocalNodeFailed", "make /etc", "doctor",
		},
	} {
		e := fault.From(explain(&c.step, c.facts))
		if e.Code != c.code || !strings.Contains(e.Message, c.says) || !strings.Contains(e.Fix, c.fix) {
			t.Errorf("%s:\ngot  %s: %s Fix: %s\nwant %s: ...%s... Fix: ...%s...", c.reason, e.Code, e.Message, e.Fix, c.code, c.says, c.fix)
		}
	}
	if err := Explain(nil); err != nil {
		t.Errorf("no error is explained as %v", err)
	}
	if other := errors.New("x"); Explain(other) != other {
		t.Error("an error of another kind did not come back as it was")
	}
}

// TestReport: what the first process says arrives with its meaning.
func TestReport(t *testing.T) {
	for _, c := range []struct {
		reason, text string
		step         string // of the error; empty: none
		errno        error
	}{
		{"all is well", `{}`, "", nil},
		{"a system call failed", `{"step":"mount proc","error":"operation not permitted","errno":1}`, "mount proc", unix.EPERM},
		{"something else failed", `{"step":"make /etc","error":"no such thing"}`, "make /etc", nil},
	} {
		err := readReport(strings.NewReader(c.text))
		var step *stepError
		switch {
		case c.step == "" && err != nil:
			t.Errorf("%s: %v", c.reason, err)
		case c.step != "" && (!errors.As(err, &step) || step.Step != c.step):
			t.Errorf("%s: %v is no failure of the step %q", c.reason, err, c.step)
		case c.errno != nil && !errors.Is(err, c.errno):
			t.Errorf("%s: %v is not %v", c.reason, err, c.errno)
		}
	}
	if err := readReport(strings.NewReader("")); err == nil {
		t.Error("a process that died without a word is taken for a node")
	}
}

// TestRestartDelay: an agent that dies at once is started less and less often, one that lived is started at once.
func TestRestartDelay(t *testing.T) {
	var delay time.Duration
	for range 20 {
		next := restartDelay(time.Millisecond, delay)
		if next < delay {
			t.Fatalf("after %s the agent waits only %s", delay, next)
		}
		delay = next
	}
	if delay != 10*time.Second {
		t.Errorf("the longest wait is %s", delay)
	}
	if got := restartDelay(time.Minute, delay); got != 50*time.Millisecond {
		t.Errorf("an agent that lived a minute waits %s", got)
	}
}

// TestHostsFile: the server's names lead to the forwarder, the node's to itself.
func TestHostsFile(t *testing.T) {
	got := hostsFile(Node{ID: "n0", Hosts: []string{"node.keyfleet.internal", "login.keyfleet.internal"}})
	want := "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 n0\n127.0.0.1 node.keyfleet.internal\n127.0.0.1 login.keyfleet.internal\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// TestCopyTree: a node's /etc has what every user of this machine may read, and no more.
func TestCopyTree(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "etc")
	for _, f := range []struct {
		name string
		mode os.FileMode
		size int
	}{
		{"passwd", 0o644, 10},
		{"shadow", 0o640, 10},
		{"hosts", 0o644, 10},
		{"ssl/openssl.cnf", 0o644, 10},
		{"ssl/private/key", 0o644, 10},
		{"udev/hwdb.bin", 0o644, maxEtcFile + 1},
	} {
		path := filepath.Join(from, f.name)
		for _, err := range []error{os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, make([]byte, f.size), f.mode), os.Chmod(path, f.mode)} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Chmod(filepath.Join(from, "ssl/private"), 0o710); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("passwd", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	if err := copyTree(from, to); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"passwd", "ssl/openssl.cnf", "ssl/private", "link", "udev"} {
		if _, err := os.Lstat(filepath.Join(to, name)); err != nil {
			t.Errorf("%s is missing: %v", name, err)
		}
	}
	for name, reason := range map[string]string{
		"shadow": "not every user may read it", "hosts": "a node has its own",
		"ssl/private/key": "its folder is closed to others", "udev/hwdb.bin": "it is too large",
	} {
		if _, err := os.Lstat(filepath.Join(to, name)); err == nil {
			t.Errorf("%s was copied, although %s", name, reason)
		}
	}
}

// TestPID: a number that another process has by now is not the node's.
func TestPID(t *testing.T) {
	f := Folder(t.TempDir())
	if _, err := f.PID(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("without a file: %v", err)
	}
	start, err := startTime("self")
	if err != nil {
		t.Fatal(err)
	}
	me := strconv.Itoa(os.Getpid())
	for _, c := range []struct {
		reason, content string
		pid             int
		done            bool
	}{
		{"this very process", me + " " + start + "\n", os.Getpid(), false},
		{"the same number, started at another time", me + " 1\n", 0, true},
		{"nobody has the number", "4194305 1\n", 0, true},
		{"PID 1 is never ours to kill", "1 1\n", 0, false},
		{"no number at all", "x\n", 0, false},
	} {
		if err := os.WriteFile(f.path("pid"), []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		pid, err := f.PID()
		if pid != c.pid || errors.Is(err, os.ErrProcessDone) != c.done || (pid == 0) != (err != nil) {
			t.Errorf("%s: %d, %v", c.reason, pid, err)
		}
	}
}

// TestLockIsReleased: a lock that was released is free although a process that
// is just being started still has a copy of the file; one that was handed over is not.
func TestLockIsReleased(t *testing.T) {
	f := Folder(t.TempDir())
	for _, c := range []struct {
		reason string
		let    func(*Lock)
		free   bool
	}{
		{"released", (*Lock).Release, true},
		{"handed over", (*Lock).handOver, false},
	} {
		lock, err := f.tryLock()
		if err != nil || lock == nil {
			t.Fatalf("%s: %v, %v", c.reason, lock, err)
		}
		held, err := unix.Dup(int(lock.file.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		c.let(lock)
		running, err := f.Running()
		if err != nil || running == c.free {
			t.Errorf("%s: running %t, %v", c.reason, running, err)
		}
		_ = unix.Close(held)
	}
}

// TestWipeIsFinished: a folder whose emptying was cut off is emptied before anything starts from it.
func TestWipeIsFinished(t *testing.T) {
	f := Folder(t.TempDir())
	if err := f.Prepare(Node{ID: "n0"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{filepath.Join(f.WAAgent(), "old"), f.path(wipeMark)} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := finishWipe(f); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{f.WAAgent(), f.path(wipeMark), f.path("node.json")} {
		if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there (%v)", name, err)
		}
	}
}
