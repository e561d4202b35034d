package keyvaultext_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/keyvaultext"
	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
)

const (
	host   = "testkvchinanorth2s.vault.azure.cn"
	secret = "authcertforumatesting"
	urlOf  = "https://" + host + "/secrets/" + secret
)

var builds struct {
	sync.Mutex
	dir   string
	paths map[string]string
}

func TestMain(m *testing.M) {
	code := m.Run()
	if builds.dir != "" {
		os.RemoveAll(builds.dir)
	}
	os.Exit(code)
}

// binary builds the real extension once, with or without kill points.
func binary(t testing.TB, tags string) string {
	t.Helper()
	builds.Lock()
	defer builds.Unlock()
	if p, ok := builds.paths[tags]; ok {
		return p
	}
	if builds.paths == nil {
		dir, err := os.MkdirTemp("", "keyvaultext-")
		if err != nil {
			t.Fatal(err)
		}
		builds.dir, builds.paths = dir, map[string]string{}
	}
	out := filepath.Join(builds.dir, "keyfleet-keyvault-extension"+tags)
	cmd := exec.Command("go", "build", "-tags", tags, "-o", out, "keyfleet.dev/keyfleet/cmd/keyfleet-keyvault-extension")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the extension: %v\n%s", err, text)
	}
	builds.paths[tags] = out
	return out
}

// node is a machine with the extension's package unpacked, as an agent leaves it.
type node struct {
	t       testing.TB
	dir     string
	base    string
	store   string
	program string
	env     []string
	vault   *keyvaulttest.Server
	seq     int
}

func newNode(t testing.TB, vault *keyvaulttest.Server, program string) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{
		t: t, dir: dir, base: filepath.Join(dir, "lib", keyvaultext.HandlerName+"-3.0.1"),
		store: filepath.Join(dir, "store"), vault: vault,
		env: append(vault.Environment(), "PATH=/usr/bin:/bin", keyvaultext.TimeScaleVariable+"=0.02", "TMPDIR="+dir),
	}
	for _, d := range []string{"bin", "config", "status"} {
		must(t, os.MkdirAll(filepath.Join(n.base, d), 0o700))
	}
	n.program = filepath.Join(n.base, "bin", "keyfleet-keyvault-extension")
	must(t, os.Link(program, n.program))
	env := extension.HandlerEnvironment{Folders: extension.Folders{
		LogFolder: filepath.Join(dir, "log"), ConfigFolder: filepath.Join(n.base, "config"),
		StatusFolder: filepath.Join(n.base, "status"), HeartbeatFile: filepath.Join(n.base, "heartbeat.log"),
	}}
	must(t, os.WriteFile(filepath.Join(n.base, "HandlerEnvironment.json"), env.Encode(), 0o600))
	t.Cleanup(func() { n.command("disable") })
	return n
}

// settings writes the next settings file; observed are the elements of observedCertificates.
func (n *node) settings(initialSync bool, more string, observed ...string) {
	n.t.Helper()
	n.raw(fmt.Sprintf(`{"secretsManagementSettings":{"pollingIntervalInS":"5","certificateStoreLocation":%q,"requireInitialSync":%v%s,"observedCertificates":[%s]},
		"authenticationSettings":{"msiEndpoint":%q,"msiClientId":%q}}`,
		n.store, initialSync, more, strings.Join(observed, ","), n.vault.Identity(), keyvaulttest.ClientID))
}

func (n *node) raw(public string) {
	n.t.Helper()
	n.seq++
	s := extension.HandlerSettings{PublicSettings: json.RawMessage(public)}
	must(n.t, os.WriteFile(filepath.Join(n.base, "config", strconv.Itoa(n.seq)+".settings"), s.Encode(), 0o600))
}

// command runs one of the handler's commands as an agent does.
func (n *node) command(name string, env ...string) (int, string) {
	n.t.Helper()
	out, err := os.CreateTemp(n.dir, "command-")
	must(n.t, err)
	defer out.Close()
	cmd := exec.Command("/bin/sh", "-c", n.program+" "+name)
	cmd.Dir = n.base
	cmd.Env = append(append(append([]string{}, n.env...), "ConfigSequenceNumber="+strconv.Itoa(n.seq)), env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Run()
	text, _ := os.ReadFile(out.Name())
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(text)
}

func (n *node) enable() {
	n.t.Helper()
	if code, out := n.command("enable"); code != 0 {
		n.t.Fatalf("enable: exit code %d: %s", code, out)
	}
}

func (n *node) status() extension.StatusFile {
	data, err := os.ReadFile(filepath.Join(n.base, "status", strconv.Itoa(n.seq)+".status"))
	if err != nil {
		return extension.StatusFile{}
	}
	s, err := extension.ParseStatusFile(data)
	if err != nil {
		n.t.Errorf("status file: %v: %s", err, data)
	}
	return s
}

func (n *node) logs() string {
	var all strings.Builder
	files, _ := filepath.Glob(filepath.Join(n.dir, "log", "*"))
	for _, f := range files {
		data, _ := os.ReadFile(f)
		all.Write(data)
	}
	return all.String()
}

// eventually waits for a condition.
func (n *node) eventually(what string, condition func() bool) {
	n.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !condition() {
		if time.Now().After(deadline) {
			n.t.Fatalf("waited in vain: %s\nstatus: %+v\nlog:\n%s", what, n.status(), n.logs())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// delivers waits until the link shows a version.
func (n *node) delivers(link string, v keyvaulttest.Version) {
	n.t.Helper()
	n.eventually("version "+v.ID, func() bool { return strings.Contains(n.target(link), v.ID) })
}

func (n *node) target(link string) string {
	target, _ := os.Readlink(filepath.Join(n.store, link))
	return target
}

// reader opens the link in a loop and checks that what it reads is one key
// with its certificate, and never less.
func (n *node) reader(link string) (stop func() int64) {
	ctx, cancel := context.WithCancel(context.Background())
	var reads atomic.Int64
	var wait sync.WaitGroup
	wait.Go(func() {
		seen := false
		for ctx.Err() == nil {
			data, err := os.ReadFile(filepath.Join(n.store, link))
			if errors.Is(err, fs.ErrNotExist) && !seen {
				time.Sleep(time.Millisecond)
				continue
			}
			if err != nil {
				n.t.Errorf("reader: %v", err)
				return
			}
			seen = true
			if _, err := tls.X509KeyPair(data, data); err != nil {
				n.t.Errorf("reader: a mixed or partial file: %v", err)
				return
			}
			reads.Add(1)
			time.Sleep(200 * time.Microsecond)
		}
	})
	stop = func() int64 {
		cancel()
		wait.Wait()
		return reads.Load()
	}
	n.t.Cleanup(func() { stop() })
	return stop
}

// servicePID is the process of the running service; 0 if there is none.
func (n *node) servicePID() int {
	data, err := os.ReadFile(filepath.Join(n.dir, "lib", keyvaultext.HandlerName+".state", "service.pid"))
	if err != nil {
		return 0
	}
	var id struct{ PID int }
	if json.Unmarshal(data, &id) != nil {
		return 0
	}
	exe, err := os.Readlink("/proc/" + strconv.Itoa(id.PID) + "/exe")
	if err != nil || !strings.HasPrefix(filepath.Base(exe), "keyfleet-keyvault-extension") {
		return 0
	}
	return id.PID
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
