//go:build linux

package connector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	core "k8s.io/api/core/v1"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/internal/target/targettest"
	"keyfleet.dev/keyfleet/test/bed"
	"keyfleet.dev/keyfleet/test/stack"
)

// image is what the extension runs; the bed's registry has it under this name.
const image = "registry.bed.internal/keyfleet-connector:0.1.0"

// world is a real cluster of one master, a server on this machine with the manager
// that it runs, and servers that the cluster's pods and the server reach.
type world struct {
	*stack.Stack
	ctx      context.Context
	bed      *bed.Cluster
	targets  map[target.Kind]*targettest.Server
	postgres *targettest.Server // one of them
	home     string
}

func TestMain(m *testing.M) {
	code := m.Run()
	stack.Clean()
	os.Exit(code)
}

// newWorld makes a world with PostgreSQL and the other servers.
func newWorld(t *testing.T, others ...target.Kind) *world {
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
	started := w.startTargets(t, append(others, target.Postgres))
	if w.bed, err = bed.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.bed.Down(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	up := time.Now()
	if err := started(); errors.Is(err, targettest.ErrNoPrograms) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Logf("the servers take logins, %s after the cluster was up", time.Since(up).Round(100*time.Millisecond))
	w.postgres = w.targets[target.Postgres]
	w.Stack = stack.Start(t, stack.Config{Child: true, Args: []string{"--connector-image", image}})
	w.push(t)
	w.register(t)
	return w
}

// insideIP is where pods find what this machine exposes.
const insideIP = "10.77.0.1"

// startTargets begins to start the servers, whose certificates are for the address that
// pods use, and returns a function that waits until they take logins. They end with the
// test, however far they have come.
func (w *world) startTargets(t *testing.T, kinds []target.Kind) (started func() error) {
	t.Helper()
	w.targets = map[target.Kind]*targettest.Server{}
	ctx, cancel := context.WithCancel(w.ctx)
	var starting errgroup.Group
	var mu sync.Mutex
	for _, kind := range kinds {
		dir, err := os.MkdirTemp("", "keyfleet-target-") // the server runs as nobody, who cannot enter t.TempDir
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Error(err)
			}
		})
		starting.Go(func() error {
			s, err := targettest.Start(ctx, targettest.Options{Kind: kind, Dir: dir, Names: []string{insideIP}})
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			w.targets[kind] = s
			return nil
		})
	}
	t.Cleanup(func() {
		cancel()
		_ = starting.Wait() // reported before, unless the test ends for another reason
		for _, s := range w.targets {
			s.Stop()
		}
	})
	return starting.Wait
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

// expose makes what listens at an address of this machine reachable for pods, at insideIP with the same port.
func (w *world) expose(t *testing.T, address string) (port string) {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.bed.Expose(n); err != nil {
		t.Fatal(err)
	}
	return port
}

// register registers cluster and servers.
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
	for kind, s := range w.targets {
		args := []string{
			"server", "register", string(kind), "main", "--host", insideIP, "--port", w.expose(t, s.Address()), "--reach", s.Address(), "--admin", s.AdminUser,
			"--password-file", w.file(t, "password", s.AdminPassword), "--ca-file", w.file(t, "ca.pem", s.CA),
		}
		if s.Management != "" {
			args = append(args, "--management", s.Management)
		}
		w.keyfleet(t, args...)
	}
	admin := w.login(t, w.postgres.AdminUser, w.postgres.AdminPassword, "postgres")
	defer admin.Close(w.ctx)
	if _, err := admin.Exec(w.ctx, "CREATE DATABASE shop"); err != nil {
		t.Fatal(err)
	}
}

// file writes a file for the command line to read.
func (w *world) file(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(w.home, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// dial logs in to the database server.
func (w *world) dial(user, password, database string) (*pgx.Conn, error) {
	return pgx.Connect(w.ctx, fmt.Sprintf("host=%s port=%d dbname=%s user=%s password=%s sslmode=require", w.postgres.Host, w.postgres.Port, database, user, password))
}

// login is dial, which must succeed.
func (w *world) login(t *testing.T, user, password, database string) *pgx.Conn {
	t.Helper()
	conn, err := w.dial(user, password, database)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// try runs the command line.
func (w *world) try(args ...string) (string, error) {
	cmd := exec.CommandContext(w.ctx, filepath.Join(w.Bin, "keyfleet"), args...)
	cmd.Env = append(os.Environ(), "HOME="+w.home, "KEYFLEET_FROM="+w.Dir, "KEYFLEET_GROUP=rg")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// keyfleet runs the command line, which must succeed.
func (w *world) keyfleet(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.try(args...)
	if err != nil {
		t.Fatalf("keyfleet %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// kube runs kubectl of the bed as its administrator, which must succeed.
func (w *world) kube(t *testing.T, args ...string) string {
	t.Helper()
	return w.tool(t, "kubectl", "", args...)
}

// apply makes objects be there.
func (w *world) apply(t *testing.T, manifest string) {
	t.Helper()
	w.tool(t, "kubectl", manifest, "apply", "-f", "-")
}

// tool runs kubectl or helm of the bed, which must succeed.
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

// says checks what a command prints, and shows it.
func (w *world) says(t *testing.T, command, out string, want ...string) {
	t.Helper()
	t.Logf("$ %s\n%s", command, out)
	for _, s := range want {
		if !strings.Contains(out, s) {
			t.Errorf("%s does not say %q", command, s)
		}
	}
}

// environment is what a Secret of the namespace default holds.
func (w *world) environment(t *testing.T, secret string) map[string]string {
	t.Helper()
	var s core.Secret
	if err := json.Unmarshal([]byte(w.kube(t, "get", "secret", secret, "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for name, value := range s.Data {
		out[name] = string(value)
	}
	return out
}
