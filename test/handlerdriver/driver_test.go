package handlerdriver_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
	"keyfleet.dev/keyfleet/test/handlerdriver"
)

const (
	handlerName = "Microsoft.Azure.KeyVault.KeyVaultForLinux"
	vaultHost   = "testkvwestus2.vault.azure.net"
	secretName  = "authsecreat"
)

// packed builds the real package, as the Makefile does.
func packed(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "keyfleet-keyvault-extension")
	build := exec.Command("go", "build", "-o", program, "keyfleet.dev/keyfleet/cmd/keyfleet-keyvault-extension")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the extension: %v\n%s", err, out)
	}
	file := filepath.Join(dir, handlerName+"-3.0.1.zip")
	pack := exec.Command("go", "run", "keyfleet.dev/keyfleet/build/package-extension", "-binary", program,
		"-folder", "../../internal/keyvaultext/package", "-version", "3.0.1", "-out", file)
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("packing: %v\n%s", err, out)
	}
	return file
}

type machine struct {
	t     *testing.T
	vault *keyvaulttest.Server
	d     *handlerdriver.Driver
	store string
	zip   string
}

func newMachine(t *testing.T) *machine {
	dir := t.TempDir()
	m := &machine{t: t, vault: keyvaulttest.Start(t), store: filepath.Join(dir, "certificates"), zip: packed(t)}
	// No PATH: the package needs /bin/sh and itself. The waits are shortened,
	// so that minutes of polling become seconds; there is no hint socket.
	m.d = &handlerdriver.Driver{Lib: filepath.Join(dir, "waagent"), Log: filepath.Join(dir, "log"), Env: append(m.vault.Environment(), "PATH=/nonexistent", "KEYFLEET_KEYVAULT_TIME_SCALE=0.05")}
	if err := os.MkdirAll(m.d.Log, 0o700); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *machine) unpack(version string) *handlerdriver.Handler {
	m.t.Helper()
	h, err := m.d.Unpack(m.zip, handlerName, version)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		if _, err := os.Stat(h.Base); err == nil {
			m.run(h, "disable")
		}
	})
	return h
}

func (m *machine) settings(h *handlerdriver.Handler) {
	m.t.Helper()
	err := h.Settings(fmt.Sprintf(`{"secretsManagementSettings": {"pollingIntervalInS": "10", "certificateStoreLocation": %q, "requireInitialSync": true,
		"observedCertificates": ["https://%s/secrets/%s"]}, "authenticationSettings": {"msiEndpoint": %q, "msiClientId": %q}}`,
		m.store, vaultHost, secretName, m.vault.Identity(), keyvaulttest.ClientID))
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) run(h *handlerdriver.Handler, command string) {
	m.t.Helper()
	r, err := h.Run(context.WithoutCancel(m.t.Context()), command) // cleanups run commands too
	if err != nil || r.Exit != 0 {
		m.t.Fatalf("%s: %v, exit code %d: %s", command, err, r.Exit, r.Output)
	}
}

func (m *machine) eventually(what string, condition func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("waited in vain: %s", what)
		}
	}
}

// shows reports whether the link leads to this version, complete with its key.
func (m *machine) shows(v keyvaulttest.Version) bool {
	link := filepath.Join(m.store, "testkvwestus2."+secretName)
	target, err := os.Readlink(link)
	if err != nil || !strings.Contains(target, v.ID) {
		return false
	}
	data, err := os.ReadFile(link)
	if err != nil {
		m.t.Errorf("reading the link: %v", err)
		return false
	}
	if _, err := tls.X509KeyPair(data, data); err != nil {
		m.t.Errorf("the file is not usable: %v", err)
	}
	return true
}

func (m *machine) succeeds(h *handlerdriver.Handler) {
	m.t.Helper()
	m.eventually("success", func() bool {
		s, err := h.Status()
		if err != nil {
			m.t.Fatal(err)
		}
		return s.Status == "success"
	})
}

func TestDeliveryAndRenewalUnderAnotherAgent(t *testing.T) {
	m := newMachine(t)
	h := m.unpack("3.0.1")
	m.run(h, "install")
	m.settings(h)
	m.run(h, "enable")
	if s, err := h.Status(); err != nil || s.Status != "transitioning" || !strings.Contains(s.Message, "https://"+vaultHost+"/secrets/"+secretName) {
		t.Fatalf("without the certificate, status after enable is %+v, %v", s, err)
	}
	v := m.vault.Renew(vaultHost, secretName, keyvaulttest.PKCS12)
	m.eventually("delivery", func() bool { return m.shows(v) })
	m.succeeds(h)
	s, err := h.Status()
	if err != nil || s.Code != 0 || s.Operation != "Service start." || !regexp.MustCompile(`^Successfully started Key Vault extension service\. \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$`).MatchString(s.Message) || s.Substatus != nil {
		t.Errorf("status %+v, %v", s, err)
	}
	for range 2 {
		v = m.vault.Renew(vaultHost, secretName, keyvaulttest.PEM)
		m.eventually("renewal by polling", func() bool { return m.shows(v) })
	}
	m.run(h, "enable") // the agent was restarted
	m.settings(h)
	m.run(h, "enable") // a new goal state
	m.succeeds(h)
	m.run(h, "disable")
	m.run(h, "uninstall")
	if !m.shows(v) {
		t.Error("uninstall must leave the certificates")
	}
}

func TestUpdateUnderAnotherAgent(t *testing.T) {
	m := newMachine(t)
	v := m.vault.Renew(vaultHost, secretName, keyvaulttest.PEM)
	old := m.unpack("3.0.1")
	m.run(old, "install")
	m.settings(old)
	m.run(old, "enable")
	m.succeeds(old)

	next := m.unpack("3.0.2")
	m.settings(next)
	if err := next.Update(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	m.succeeds(next)
	if !m.shows(v) {
		t.Error("the update lost the certificate")
	}
	v = m.vault.Renew(vaultHost, secretName, keyvaulttest.PEM)
	m.eventually("renewal after the update", func() bool { return m.shows(v) })
}
