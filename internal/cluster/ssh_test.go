package cluster

import (
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// goodSSH is an access that is taken.
func goodSSH(t testing.TB) SSH {
	t.Helper()
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		t.Fatal(err)
	}
	text, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return SSH{Host: "cp1.example.org", User: "ops", Key: text, KnownHosts: []byte("# keys\ncp1.example.org ssh-ed25519 AAAA\n")}
}

func openSSH(cipher string) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: []byte("openssh-key-v1\x00\x00\x00\x00" + string(rune(len(cipher))) + cipher)})
}

// TestSSHAccess: what rotate-certs could not use without a person, or what would be
// another flag of it, is refused where it is given.
func TestSSHAccess(t *testing.T) {
	cases := []struct {
		reason string
		change func(*SSH)
		target string // empty: it is taken
	}{
		{"a host", func(*SSH) {}, ""},
		{"a host and a port", func(s *SSH) { s.Host = "10.0.0.1:2222" }, ""},
		{"an IPv6 address and a port", func(s *SSH) { s.Host = "[fd00::1]:22" }, ""},
		{"a key of OpenSSH", func(s *SSH) { s.Key = openSSH("none") }, ""},
		{"no host", func(s *SSH) { s.Host = "" }, "host"},
		{"a flag for a host", func(s *SSH) { s.Host = "-oProxyCommand=x" }, "host"},
		{"a port that is none", func(s *SSH) { s.Host = "cp1:99999" }, "host"},
		{"a URL", func(s *SSH) { s.Host = "ssh://cp1" }, "host"},
		{"a flag for a user", func(s *SSH) { s.User = "--force" }, "user"},
		{"two words for a user", func(s *SSH) { s.User = "a b" }, "user"},
		{"no key", func(s *SSH) { s.Key = nil }, "privateKey"},
		{"a certificate for a key", func(s *SSH) { s.Key = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}) }, "privateKey"},
		{"a key of OpenSSH with a passphrase", func(s *SSH) { s.Key = openSSH("aes256-ctr") }, "privateKey"},
		{"a key of PKCS #8 with a passphrase", func(s *SSH) { s.Key = pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY"}) }, "privateKey"},
		{"no host keys", func(s *SSH) { s.KnownHosts = []byte("# none\n\n") }, "knownHosts"},
	}
	for _, c := range cases {
		t.Run(c.reason, func(t *testing.T) {
			s := goodSSH(t)
			c.change(&s)
			err := s.check()
			switch {
			case c.target == "" && err != nil:
				t.Error(err)
			case c.target != "" && (!errors.Is(err, fault.Invalid) || fault.From(err).Target != "properties.ssh."+c.target):
				t.Errorf("%v at %q, want a refusal of %s", err, fault.From(err).Target, c.target)
			}
		})
	}
}

// TestSSHAccessStays: what a client sends back of what it got changes nothing; the
// audit log, errors and what is printed hold no key; a cluster that goes takes it along.
func TestSSHAccessStays(t *testing.T) {
	w := newWorld(t)
	ssh := goodSSH(t)
	register := func(s *SSH) error {
		_, _, err := w.Register(system(t), Registration{ID: prodID, Location: "westus2", Kubeconfig: newParts(t).text(t), SSH: s})
		return err
	}
	if err := register(&ssh); err != nil {
		t.Fatal(err)
	}
	for _, again := range []*SSH{nil, {Host: ssh.Host, User: ssh.User}} {
		if err := register(again); err != nil {
			t.Fatal(err)
		}
		o, err := w.Get(system(t), prodID)
		if err != nil || o.Spec.SSH != "ops@cp1.example.org" {
			t.Fatalf("%+v, %v", o, err)
		}
		kept, err := sshAccess.Get(w.store.View(t.Context()), o.ID)
		if err != nil || string(kept.Spec.Key) != string(ssh.Key) {
			t.Fatalf("what is kept: %v, %v", kept, err)
		}
	}
	if err := register(&SSH{Host: "other", User: ssh.User}); !errors.Is(err, fault.Invalid) {
		t.Errorf("another host without a key: %v, want a refusal", err)
	}
	if text := fmt.Sprintf("%v %+v %s", ssh, ssh, ssh); strings.Contains(text, "PRIVATE") {
		t.Errorf("it prints as %s", text)
	}
	if text, err := os.ReadFile(w.file); err != nil || strings.Contains(string(text), "PRIVATE") {
		t.Errorf("the audit log: %v\n%s", err, text)
	}
	if _, err := w.Delete(system(t), prodID); err != nil {
		t.Fatal(err)
	}
	if left, err := sshAccess.List(w.store.View(t.Context()), ""); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
