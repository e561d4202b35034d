//go:build bench && linux

package system

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/client"
)

// TestConnectionFigures measures connections: a real API server, manager and operator
// as processes, real PostgreSQL, all on this machine. What a figure depends on is
// measured raw in the same run: a Secret made straight at the API server.
func TestConnectionFigures(t *testing.T) {
	f := &figures{connected: newConnected(t), seen: map[string]time.Time{}}
	f.follow(t)
	f.raw(t)
	f.oneByOne(t)
	f.many(t, 100)
	f.drift(t)
	f.rotation(t)
	f.memory(t)
	fmt.Printf("\nService connections to PostgreSQL, %d processors, Linux %s, %s. Server, cluster, database and load on the same machine.\n\n", runtime.NumCPU(), release(), runtime.Version())
	fmt.Print("| figure | measured | goal |\n|---|---|---|\n")
	for _, r := range f.rows {
		fmt.Printf("| %s | %s | %s |\n", r[0], r[1], r[2])
	}
}

// figures knows when Secrets of the namespace "shop" were last seen to change.
type figures struct {
	*connected
	rows [][3]string

	lock sync.Mutex
	seen map[string]time.Time // by name and value of the connection string
}

func (f *figures) add(what, value, goal string) {
	f.rows = append(f.rows, [3]string{what, value, goal})
}

func release() string {
	var u syscall.Utsname
	if syscall.Uname(&u) != nil {
		return "?"
	}
	var b strings.Builder
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return b.String()
}

// follow notes when Secrets come and change, until the test ends.
func (f *figures) follow(t *testing.T) {
	t.Helper()
	w, err := f.api.CoreV1().Secrets("shop").Watch(f.ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Stop)
	go func() { // ends with the watch
		for e := range w.ResultChan() {
			s, ok := e.Object.(*core.Secret)
			if !ok {
				continue
			}
			now := time.Now()
			f.lock.Lock()
			if k := s.Name + " " + string(s.Data["AZURE_POSTGRESQL_CONNECTIONSTRING"]) + " " + s.ResourceVersion; f.seen[k].IsZero() {
				f.seen[k] = now
			}
			if f.seen[s.Name].IsZero() {
				f.seen[s.Name] = now
			}
			f.lock.Unlock()
		}
	}()
}

// arrived waits for a Secret of that name and returns when it was first seen.
func (f *figures) arrived(ctx context.Context, name string) (time.Time, error) {
	for {
		f.lock.Lock()
		at := f.seen[name]
		f.lock.Unlock()
		if !at.IsZero() {
			return at, nil
		}
		select {
		case <-ctx.Done():
			return at, fmt.Errorf("%s did not come: %w", name, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

func (f *figures) raw(t *testing.T) {
	t.Helper()
	var took []time.Duration
	for i := range 30 {
		name := fmt.Sprintf("raw-%d", i)
		began := time.Now()
		if _, err := f.api.CoreV1().Secrets("shop").Create(f.ctx, &core.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		at, err := f.arrived(f.ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, at.Sub(began))
	}
	f.add("a Secret made straight at the API server, seen by a watch, p50 / p99", quantiles(took), "")
}

// connectOne makes a connection and returns how long its Secret, and the end of the operation, took.
func (f *figures) connectOne(name string) (secret, done time.Duration, err error) {
	began := time.Now()
	resp, err := f.Client.Do(f.ctx, client.Request{Method: http.MethodPut, URL: f.Client.ARM(f.linker(name)), Version: linkerVersion, Body: map[string]any{"properties": f.postgresBody()}})
	if err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithTimeout(f.ctx, 3*time.Minute)
	defer cancel()
	at, err := f.arrived(ctx, "sc-"+name+"-secret")
	if err != nil {
		return 0, 0, err
	}
	_, err = f.Client.Wait(f.ctx, resp, nil)
	return at.Sub(began), time.Since(began), err
}

func (f *figures) oneByOne(t *testing.T) {
	t.Helper()
	var secrets []time.Duration
	for i := range 30 {
		s, _, err := f.connectOne(fmt.Sprintf("one%d", i))
		if err != nil {
			t.Fatal(err)
		}
		secrets = append(secrets, s)
	}
	f.add("create to Secret present, one connection at a time, p50 / p99 (30)", quantiles(secrets), "")
}

func (f *figures) many(t *testing.T, n int) {
	t.Helper()
	secrets := make([]time.Duration, n)
	began := time.Now()
	var all errgroup.Group
	for i := range n {
		all.Go(func() (err error) {
			secrets[i], _, err = f.connectOne(fmt.Sprintf("many%d", i))
			return err
		})
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	f.add(fmt.Sprintf("create to Secret present, %d connections at once, p50 / p99", n), quantiles(secrets), "")
	f.add(fmt.Sprintf("connections a second, each with its own login, proven (%d at once)", n), fmt.Sprintf("%.1f", float64(n)/took.Seconds()), "")
}

// drift changes a Secret by hand, again and again, and waits until it is put back.
func (f *figures) drift(t *testing.T) {
	t.Helper()
	var took []time.Duration
	for range 20 {
		right, err := f.environment(f.ctx, "sc-one0-secret")
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		patch := []byte(`{"stringData":{"AZURE_POSTGRESQL_CONNECTIONSTRING":"host=elsewhere"}}`)
		if _, err := f.api.CoreV1().Secrets("shop").Patch(f.ctx, "sc-one0-secret", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		for {
			env, err := f.environment(f.ctx, "sc-one0-secret")
			if err == nil && env["AZURE_POSTGRESQL_CONNECTIONSTRING"] == right["AZURE_POSTGRESQL_CONNECTIONSTRING"] {
				break
			}
			if err != nil || time.Since(began) > time.Minute {
				t.Fatalf("it was not put back: %v", err)
			}
			time.Sleep(time.Millisecond)
		}
		took = append(took, time.Since(began))
	}
	f.add("a Secret changed by hand is put back, median / longest (20)", fmt.Sprintf("%s / %s", millis(median(took)), millis(slices.Max(took))), "< 2 s")
}

// rotation rotates five times while four clients log in with what the cluster has.
func (f *figures) rotation(t *testing.T) {
	t.Helper()
	ctx, stop := context.WithCancel(f.ctx)
	var logins, failed atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for ctx.Err() == nil {
				if err := f.login("sc-one1-secret"); err != nil {
					failed.Add(1)
					t.Error(err)
				}
				logins.Add(1)
			}
		})
	}
	var took []time.Duration
	for range 5 {
		began := time.Now()
		resp := f.do(client.Request{Method: http.MethodPost, URL: f.Client.ARM(f.linker("one1") + "/rotate"), Version: linkerVersion})
		if _, err := f.Client.Wait(f.ctx, resp, nil); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	stop()
	all.Wait()
	f.add("failed logins during 5 rotations of a credential under load", fmt.Sprintf("%d of %d", failed.Load(), logins.Load()), "0")
	f.add("a rotation under load, from the request until the old login is refused (median of 5)", millis(median(took)), "")
}

// login logs in with what the cluster has, as an application does that starts now.
func (f *figures) login(secret string) error {
	env, err := f.environment(f.ctx, secret)
	if err != nil {
		return err
	}
	conn, err := pgx.Connect(f.ctx, env["AZURE_POSTGRESQL_CONNECTIONSTRING"])
	if err != nil {
		return err
	}
	defer conn.Close(f.ctx)
	_, err = conn.Exec(f.ctx, "SELECT 1")
	return err
}

// memory reads the resident memory of the manager and the operator, which look after all that was made.
func (f *figures) memory(t *testing.T) {
	t.Helper()
	for _, part := range []string{"manager", "operator"} {
		rss, err := residentOf(part)
		if err != nil {
			t.Fatal(err)
		}
		f.add(part+", resident memory with 130 connections", fmt.Sprintf("%d MB", rss>>20), "")
	}
}

// residentOf is the resident memory of the keyfleet-connector that this process has started as that part.
func residentOf(part string) (int64, error) {
	stats, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range stats {
		args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		words := strings.Split(string(args), "\x00")
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil || len(words) < 2 || filepath.Base(words[0]) != "keyfleet-connector" || words[1] != part {
			continue
		}
		field := func(name string) string {
			for line := range strings.Lines(string(status)) {
				if v, ok := strings.CutPrefix(line, name+":"); ok {
					return strings.TrimSuffix(strings.TrimSpace(v), " kB")
				}
			}
			return ""
		}
		if field("PPid") != strconv.Itoa(os.Getpid()) {
			continue
		}
		kb, err := strconv.ParseInt(field("VmRSS"), 10, 64)
		return kb << 10, err
	}
	return 0, errors.New("there is no " + part)
}

func median(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}

func quantiles(d []time.Duration) string {
	d = slices.Clone(d)
	slices.Sort(d)
	return millis(d[len(d)/2]) + " / " + millis(d[min(len(d)-1, len(d)*99/100)])
}

func millis(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
