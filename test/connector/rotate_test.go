//go:build linux

package connector

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/test/bed"
	"keyfleet.dev/keyfleet/test/stack"
)

// registered is what the tests look at of the cluster's resource.
type registered struct {
	Properties struct {
		ProvisioningState string
		SSH               struct{ Host, User, PrivateKey string }
		Rotation          struct {
			State, Run, Step, Kubeconfig string
			StepsDone                    int
			Error                        *struct{ Code, Message string }
		}
	}
}

func (w *world) registered(t *testing.T) (c registered) {
	t.Helper()
	if err := json.Unmarshal([]byte(w.keyfleet(t, "cluster", "show", "prod", "-o", "json")), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// begin starts the command line; its end comes by the channel, nil for success.
func (w *world) begin(args ...string) <-chan error {
	cmd := exec.CommandContext(w.ctx, filepath.Join(w.Bin, "keyfleet"), args...)
	cmd.Env = append(os.Environ(), "HOME="+w.home, "KEYFLEET_FROM="+w.Dir, "KEYFLEET_GROUP=rg")
	ended := make(chan error, 1)
	go func() { // ends with the command, which ends with the test
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("keyfleet %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		ended <- err
	}()
	return ended
}

// refused runs the command line, which must fail with all of the words.
func (w *world) refused(t *testing.T, args []string, words ...string) {
	t.Helper()
	err := <-w.begin(args...)
	if err == nil {
		t.Fatalf("keyfleet %s was not refused", strings.Join(args, " "))
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the refusal does not say %q: %v", word, err)
		}
	}
}

// kubectl runs kubectl with the kubeconfig that the server has.
func (w *world) kubectl(t *testing.T, file string, args ...string) (string, error) {
	t.Helper()
	cache, err := bed.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(w.ctx, cache.Kubectl(), append([]string{"--kubeconfig=" + file}, args...)...).CombinedOutput()
	return string(out), err
}

// TestRotateCluster: the certificates of a registered cluster are replaced, all of
// them. While that runs the cluster is Updating, connections wait or are told why
// not, and a server that is killed goes on with the same run. Afterwards the
// kubeconfig that the server has works, as the same somebody, and the former one does not.
func TestRotateCluster(t *testing.T) {
	if os.Getenv("KEYFLEET_TEST_DEEP") == "" {
		t.Skip("takes eight minutes: in make test-deep; here a child that misbehaves stands in for it (internal/server)")
	}
	w := newWorld(t)
	succeeded := func(context.Context) error {
		if c := w.registered(t); c.Properties.ProvisioningState != "Succeeded" {
			return fmt.Errorf("it is %s", c.Properties.ProvisioningState)
		}
		return nil
	}
	stack.Eventually(t, 2*time.Minute, "the cluster was seen", succeeded)
	w.refused(t, []string{"cluster", "rotate-certs", "prod"}, "SSHAccessNotConfigured", "--ssh-host HOST --ssh-user USER")
	w.keyfleet(t, "cluster", "register", "prod", "--ssh-host", net.JoinHostPort(w.bed.SSHHost, strconv.Itoa(w.bed.SSHPort)), "--ssh-user", w.bed.SSHUser,
		"--ssh-key-file", w.bed.SSHKey, "--ssh-known-hosts-file", w.bed.KnownHosts)
	if c := w.registered(t); c.Properties.SSH.User != w.bed.SSHUser || c.Properties.SSH.PrivateKey != "" {
		t.Fatalf("the SSH access is shown as %+v", c.Properties.SSH)
	}
	old := filepath.Join(w.home, "old")
	w.keyfleet(t, "cluster", "kubeconfig", "prod", "--to-file", old)

	began := time.Now()
	w.keyfleet(t, "cluster", "rotate-certs", "prod", "--restart-pods", "--no-wait")
	stack.Eventually(t, time.Minute, "the run has begun", func(context.Context) error {
		c := w.registered(t)
		if c.Properties.ProvisioningState != "Updating" {
			t.Fatalf("the cluster is %s while its certificates are rotated: %+v", c.Properties.ProvisioningState, c.Properties.Rotation)
		}
		if c.Properties.Rotation.StepsDone < 3 {
			return fmt.Errorf("%d steps are done", c.Properties.Rotation.StepsDone)
		}
		return nil
	})
	create := []string{"connection", "create", "postgres-flexible", "--connection", "db", "--cluster", "prod", "--server", "main", "--database", "shop", "--client-type", "none"}
	w.refused(t, append(create, "--if-busy=fail"), "Conflict", "a rotation of its certificates is running")
	w.refused(t, []string{"cluster", "delete", "prod", "--yes"}, "Conflict", "a rotation of its certificates is running")

	run := w.registered(t).Properties.Rotation.Run
	w.Kill()
	if err := w.Run(); err != nil {
		t.Fatal(err)
	}
	waits := w.begin(append(create, "--timeout", "14m")...)
	var last string
	stack.Eventually(t, 10*time.Minute, "the rotation has ended", func(context.Context) error {
		r := w.registered(t).Properties.Rotation
		if r.State == "Failed" {
			t.Fatalf("the rotation has failed: %+v", r.Error)
		}
		if r.Step != last {
			last = r.Step
			t.Logf("%4.0fs %s", time.Since(began).Seconds(), last)
		}
		if r.State != "Succeeded" {
			return fmt.Errorf("%s: %s", r.State, r.Step)
		}
		return nil
	})
	t.Logf("the rotation took %s", time.Since(began).Round(time.Second))
	if r := w.registered(t).Properties.Rotation; r.Run != run || r.Kubeconfig != "accepted" {
		t.Errorf("the run was %s and is %s; the kubeconfig is %q", run, r.Run, r.Kubeconfig)
	}

	renewed := filepath.Join(w.home, "renewed")
	w.keyfleet(t, "cluster", "kubeconfig", "prod", "--to-file", renewed)
	if out, err := w.kubectl(t, renewed, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"); err != nil || out != "kubernetes-admin" {
		t.Errorf("the renewed kubeconfig is %q, %v", out, err)
	}
	if out, err := w.kubectl(t, old, "get", "nodes"); err == nil {
		t.Errorf("the former kubeconfig still works:\n%s", out)
	}
	stack.Eventually(t, 2*time.Minute, "the manager has seen the cluster with the renewed kubeconfig", succeeded)
	if err := <-waits; err != nil {
		t.Errorf("the connection that waited: %v", err)
	}
	if out, err := w.kubectl(t, renewed, "get", "secret", "sc-db-secret", "-o", "name"); err != nil {
		t.Errorf("the Secret of the connection: %v\n%s", err, out)
	}
	if left, _ := filepath.Glob("/dev/shm/keyfleet-*/*"); len(left) > 0 {
		t.Errorf("left in memory: %v", left)
	}
}
