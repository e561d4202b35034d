//go:build linux

package connector

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
	"keyfleet.dev/keyfleet/test/bed"
	"keyfleet.dev/keyfleet/test/stack"
)

// image is what the extension runs; the bed's registry has it under this name.
const image = "registry.bed.internal/keyfleet-connector:0.1.0"

// world is a real cluster of one master, a server and a manager on this machine,
// and a PostgreSQL server that both the cluster's pods and the server reach.
type world struct {
	*stack.Stack
	ctx      context.Context
	bed      *bed.Cluster
	postgres *targettest.Server
	home     string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("brings up a cluster, which takes a minute")
	}
	if os.Getuid() != 0 {
		t.Skip("a bed needs root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	t.Cleanup(cancel)
	cfg := bed.Config{Name: fmt.Sprintf("con-%d", os.Getpid()), Masters: 1, Services: true, Dir: filepath.Join(t.TempDir(), "bed"), Log: os.Stderr}
	cache, err := bed.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	if err := cache.ReadyFor(cfg); err != nil {
		t.Skip(err)
	}
	w := &world{ctx: ctx, home: t.TempDir()}
	w.startPostgres(t)
	if w.bed, err = bed.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.bed.Down(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	w.Stack = stack.Start(t, stack.Config{})
	w.push(t)
	w.register(t)
	return w
}

// insideIP is where pods find what this machine exposes.
const insideIP = "10.77.0.1"

// startPostgres starts a server whose certificate is for the address that pods use.
func (w *world) startPostgres(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "keyfleet-target-") // the server runs as nobody, who cannot enter t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	w.postgres, err = targettest.Start(w.ctx, targettest.Options{Kind: target.Postgres, Dir: dir, Names: []string{insideIP}})
	if errors.Is(err, targettest.ErrNoPrograms) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.postgres.Stop)
}

// push gives the bed's registry the image of the program that was just built.
func (w *world) push(t *testing.T) {
	t.Helper()
	err := w.bed.PushImage(w.ctx, bed.Image{
		Ref: image, Files: map[string]string{"/usr/local/bin/keyfleet-connector": filepath.Join(w.Bin, "keyfleet-connector")}, Entrypoint: []string{"/usr/local/bin/keyfleet-connector"},
	})
	if err != nil {
		t.Fatal(err)
	}
}

// register registers cluster and database, and starts a manager.
func (w *world) register(t *testing.T) {
	t.Helper()
	path := "/subscriptions/" + w.Client.Subscription() + "/resourceGroups/rg"
	if err := w.Client.Call(w.ctx, client.Request{Method: http.MethodPut, URL: w.Client.ARM(path), Version: "2021-04-01", Body: map[string]string{"location": "westus2"}}, nil); err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := w.bed.HostKubeconfig()
	if err != nil {
		t.Fatal(err)
	}
	w.keyfleet(t, "cluster", "register", "prod", "--kubeconfig", kubeconfig)
	dir := filepath.Join(w.home, "manager")
	w.keyfleet(t, "cluster", "manager", "create", "manager", "--to-dir", dir)
	w.background(t, "manager", "manager", "--from", dir, "--image", image)

	outside, err := w.bed.Expose(w.postgres.Port)
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(outside, ":")
	file := func(name, content string) string {
		path := filepath.Join(w.home, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	w.keyfleet(t, "server", "register", "postgres", "main", "--host", host, "--port", port, "--reach", w.postgres.Address(), "--admin", w.postgres.AdminUser,
		"--password-file", file("password", w.postgres.AdminPassword), "--ca-file", file("ca.pem", w.postgres.CA))
	admin, err := pgx.Connect(w.ctx, fmt.Sprintf("host=%s port=%d dbname=postgres user=%s password=%s sslmode=require", w.postgres.Host, w.postgres.Port, w.postgres.AdminUser, w.postgres.AdminPassword))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(w.ctx)
	if _, err := admin.Exec(w.ctx, "CREATE DATABASE shop"); err != nil {
		t.Fatal(err)
	}
}

// background runs keyfleet-connector until the test ends.
func (w *world) background(t *testing.T, name string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(w.home, name+".log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(w.Bin, "keyfleet-connector"), args...)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		text, _ := os.ReadFile(log.Name())
		_ = log.Close()
		if t.Failed() {
			t.Logf("%s:\n%s", log.Name(), text)
		}
	})
}

// keyfleet runs the command line, which must succeed.
func (w *world) keyfleet(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(w.ctx, filepath.Join(w.Bin, "keyfleet"), args...)
	cmd.Env = append(os.Environ(), "HOME="+w.home, "KEYFLEET_FROM="+w.Dir, "KEYFLEET_GROUP=rg")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("keyfleet %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// kubectl and helm run the bed's own.
func (w *world) tool(t *testing.T, name, stdin string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(w.ctx, filepath.Join(w.bed.Dir, name), args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sampleJob is the one of the documentation, with the name replaced.
const sampleJob = `
apiVersion: batch/v1
kind: Job
metadata:
  namespace: default
  name: sc-sample-job
spec:
  template:
    spec:
      containers:
      - name: raw-linux
        image: alpine
        command: ['printenv']
        envFrom:
        - secretRef:
            name: sc-db-secret
      restartPolicy: OnFailure
`

// TestDocumentedFlow: the first connection installs the extension, whose job makes
// the objects; the sample Job prints the environment; what people are told to look
// at shows what the documentation says.
func TestDocumentedFlow(t *testing.T) {
	w := newWorld(t)
	stack.Eventually(t, time.Minute, "the cluster was seen", func(context.Context) error {
		if out := w.keyfleet(t, "cluster", "show", "prod"); !strings.Contains(out, "Succeeded") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	began := time.Now()
	t.Log(w.keyfleet(t, "connection", "create", "postgres-flexible", "--connection", "db", "--cluster", "prod", "--server", "main", "--database", "shop", "--client-type", "none"))
	t.Logf("the first connection of a cluster, extension included: %s", time.Since(began).Round(time.Second))

	if out := w.tool(t, "kubectl", "", "get", "ns"); !strings.Contains(out, "sc-system") {
		t.Errorf("kubectl get ns:\n%s", out)
	}
	stack.Eventually(t, 5*time.Minute, "the release is deployed", func(context.Context) error {
		if out := w.tool(t, "helm", "", "list", "-n", "sc-system"); !strings.Contains(out, "sc-extension") || !strings.Contains(out, "deployed") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	t.Log(w.tool(t, "helm", "", "list", "-n", "sc-system"))
	if out := w.tool(t, "kubectl", "", "get", "job", "-n", "sc-system"); !strings.Contains(out, "No resources found") {
		t.Errorf("sc-job is still there:\n%s", out)
	}
	w.tool(t, "kubectl", sampleJob, "apply", "-f", "-")
	w.tool(t, "kubectl", "", "wait", "--for=condition=Complete", "--timeout=90s", "job/sc-sample-job")
	log := w.tool(t, "kubectl", "", "logs", "job/sc-sample-job")
	for _, want := range []string{"AZURE_POSTGRESQL_HOST=", "AZURE_POSTGRESQL_USERNAME=kf_db_", "AZURE_POSTGRESQL_PASSWORD=", "AZURE_POSTGRESQL_PORT=" + strconv.Itoa(w.postgres.Port)} {
		if !strings.Contains(log, want) {
			t.Errorf("the Job does not print %s", want)
		}
	}
	t.Log(w.keyfleet(t, "connection", "delete", "db", "--cluster", "prod", "--yes"))
}
