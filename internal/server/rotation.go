package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/journal"
)

// rotateCerts runs "keyfleet rotate-certs" for registered clusters: it is
// cluster.Program. What it needs of SSH and Kubernetes stays out of the server.
//
//	DIR/CLUSTER/RUN/journal     of each run; the keys in it are sealed to the SSH key
//	PRIVATE                     SSH key, known hosts, kubeconfig: while a child runs
//
// A child that outlives a server that was killed ends when it prints its next line;
// its journal is locked until then.
type rotateCerts struct {
	program string // path of keyfleet
	dir     string // of the journals, by cluster
	// private are places for secrets, the best first: in memory, else on the disk. The
	// cluster's name is to be appended.
	private []string
	grace   time.Duration // for a child that was told to end
}

const (
	childOutput = 16 << 10 // what is kept of its standard error, in bytes
	childLine   = 64 << 10 // longest line that is read, in bytes
)

func newRotateCerts(program, dataDir string) rotateCerts {
	sum := sha256.Sum256([]byte(dataDir))
	return rotateCerts{
		program: program, dir: filepath.Join(dataDir, "rotations"), grace: 20 * time.Second,
		private: []string{"/dev/shm/keyfleet-" + hex.EncodeToString(sum[:8]) + "-", filepath.Join(dataDir, "run", "rotation-")},
	}
}

// ready fails unless the program is there.
func (r rotateCerts) ready() error {
	info, err := os.Stat(r.program)
	if err == nil && (info.IsDir() || info.Mode()&0o111 == 0) {
		err = errors.New("it is no program")
	}
	if err == nil {
		return nil
	}
	return fault.New(fault.Conflict, "RotateCertsNotInstalled", "Certificates of clusters are rotated by the program keyfleet, which is not beside this server.").
		WithFix("put keyfleet beside keyfleet-server, at %s", r.program).Because(err)
}

// Host implements cluster.Program.
func (r rotateCerts) Host() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

// folder is the name of a cluster's folders.
func folder(j cluster.Job) string {
	sum := sha256.Sum256([]byte(j.Cluster))
	return hex.EncodeToString(sum[:16])
}

// Finished implements cluster.Program.
func (r rotateCerts) Finished(j cluster.Job, run string) (bool, error) {
	path := filepath.Join(r.dir, folder(j), filepath.Base(run), "journal")
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return false, fault.New(fault.NotFound, "", "There is no journal of the run %s here.", run)
	}
	f, err := journal.Open(path)
	if err != nil {
		return false, err
	}
	return f.State().Finished, f.Close()
}

// Rotate implements cluster.Program.
func (r rotateCerts) Rotate(ctx context.Context, j cluster.Job, args []string, line func(string)) (cluster.Exit, error) {
	dir, err := r.open(j)
	if err != nil {
		return cluster.Exit{}, err
	}
	defer os.RemoveAll(dir)
	return r.child(ctx, j, dir, args, line)
}

// Renew implements cluster.Program.
func (r rotateCerts) Renew(ctx context.Context, j cluster.Job, kubeconfig []byte) ([]byte, cluster.Exit, error) {
	dir, err := r.open(j)
	if err != nil {
		return nil, cluster.Exit{}, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(path, kubeconfig, 0o600); err != nil {
		return nil, cluster.Exit{}, fmt.Errorf("giving the kubeconfig to rotate-certs: %w", err)
	}
	exit, err := r.child(ctx, j, dir, []string{"kubeconfig", "--kubeconfig=" + path}, func(string) {})
	if err != nil || exit.Status != 0 {
		return nil, exit, err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, exit, fmt.Errorf("reading the renewed kubeconfig: %w", err)
	}
	return text, exit, nil
}

// open makes the private folder of a child, with what it reaches the cluster with.
func (r rotateCerts) open(j cluster.Job) (dir string, err error) {
	if err := os.MkdirAll(filepath.Join(r.dir, folder(j)), 0o700); err != nil {
		return "", fmt.Errorf("making the folder of journals: %w", err)
	}
	for _, place := range r.private {
		dir = place + folder(j)
		if err = os.RemoveAll(dir); err == nil { // of a server that was killed
			err = os.Mkdir(dir, 0o700)
		}
		if err == nil {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("making a private folder: %w", err)
	}
	for name, text := range map[string][]byte{"key": j.SSH.Key, "known_hosts": j.SSH.KnownHosts} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return "", errors.Join(fmt.Errorf("giving the SSH access to rotate-certs: %w", err), os.RemoveAll(dir))
		}
	}
	return dir, nil
}

// child runs the program once. Nothing of this process' environment is passed on but
// where programs are.
func (r rotateCerts) child(ctx context.Context, j cluster.Job, dir string, args []string, line func(string)) (cluster.Exit, error) {
	args = append([]string{"rotate-certs"}, args...)
	args = append(args, "--layout=kubeadm", "--ssh-host="+j.SSH.Host, "--ssh-user="+j.SSH.User, "--linux-ssh-private-key="+filepath.Join(dir, "key"),
		"--known-hosts="+filepath.Join(dir, "known_hosts"), "--run-dir="+filepath.Join(r.dir, folder(j)))
	cmd := exec.CommandContext(ctx, r.program, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
	cmd.Dir = dir
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = r.grace
	var stderr tail
	cmd.Stderr = &stderr
	out, in, err := os.Pipe()
	if err != nil {
		return cluster.Exit{}, fmt.Errorf("starting rotate-certs: %w", err)
	}
	defer out.Close()
	cmd.Stdout = in
	err = cmd.Start()
	_ = in.Close() // the child has its own
	if err != nil {
		return cluster.Exit{}, fmt.Errorf("starting rotate-certs: %w", err)
	}
	read := make(chan struct{})
	go func() { // ends when nobody has the other end of the pipe any more, or with the deadline
		defer close(read)
		eachLine(out, line)
	}()
	err = cmd.Wait()
	_ = out.SetReadDeadline(time.Now().Add(time.Second)) // a grandchild may hold the pipe
	<-read
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return cluster.Exit{Status: exit.ExitCode(), Stderr: string(stderr.text)}, nil
	case err != nil && ctx.Err() == nil && !errors.Is(err, exec.ErrWaitDelay):
		return cluster.Exit{}, fmt.Errorf("running rotate-certs: %w", err)
	}
	return cluster.Exit{Status: cmd.ProcessState.ExitCode(), Stderr: string(stderr.text)}, nil
}

// eachLine calls line for each line of at most childLine bytes; the rest of a longer
// one, and what comes after it, is read and forgotten.
func eachLine(r io.Reader, line func(string)) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, childLine)
	for lines.Scan() {
		line(string(bytes.ToValidUTF8(lines.Bytes(), nil)))
	}
	_, _ = io.Copy(io.Discard, r) // a child that nobody reads would stop
}

// tail keeps the last part of what is written.
type tail struct{ text []byte }

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.text = append(t.text, p...)
	if over := len(t.text) - childOutput; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(p), nil
}
