package remote

import (
	"crypto/rand"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote/remotetest"
)

func asUnknown(err error, u **unknownKey) bool { return errors.As(err, u) }

func TestUnknownKeysAreAskedOnceAndRemembered(t *testing.T) {
	b := newBed(t)
	second := remotetest.Start(t, remotetest.Options{IP: "127.0.0.3", HostKey: "ecdsa", Authorized: authorized(t, b)})
	file := filepath.Join(t.TempDir(), "not", "yet", "known_hosts")
	b.cfg.KnownHosts = []string{file}
	var asked [][]Fingerprint
	b.cfg.Confirm = func(unknown []Fingerprint) (bool, error) {
		asked = append(asked, unknown)
		return true, nil
	}
	targets := []Target{{Name: "master-1", Address: b.toTarget.Address}, {Name: "master-2", Address: second.Address}, {Name: "again", Address: second.Address}}
	for range 2 {
		if _, err := b.dial().Hosts(t.Context(), targets); err != nil {
			t.Fatal(err)
		}
	}
	if len(asked) != 2 || len(asked[0]) != 1 || len(asked[1]) != 2 {
		t.Fatalf("it was asked %d times: %+v", len(asked), asked)
	}
	_, port, _ := net.SplitHostPort(second.Address)
	wantPrint := Fingerprint{
		Name: "master-2", Address: "[127.0.0.3]:" + port, Type: "ecdsa-sha2-nistp256", SHA256: ssh.FingerprintSHA256(second.HostKey),
		Line: strings.TrimSpace(second.KnownHostsLine(second.Address)),
	}
	if asked[1][1] != wantPrint {
		t.Errorf("it was asked about %+v, want %+v", asked[1][1], wantPrint)
	}
	if got := readFile(t, file); got != b.jump.KnownHostsLine(b.toJump.Address)+b.target.KnownHostsLine(b.toTarget.Address)+second.KnownHostsLine(second.Address) {
		t.Errorf("known_hosts is\n%s", got)
	}
	for path, mode := range map[string]os.FileMode{file: 0o600, filepath.Dir(file): 0o700 | os.ModeDir} {
		if st, err := os.Stat(path); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
}

func authorized(t *testing.T, b *bed) []ssh.PublicKey {
	t.Helper()
	signer, err := ssh.ParsePrivateKey(b.cfg.Key)
	if err != nil {
		t.Fatal(err)
	}
	return []ssh.PublicKey{signer.PublicKey()}
}

func TestUnknownKeysAreRefusedWhereNobodyCanBeAsked(t *testing.T) {
	b := newBed(t)
	second := remotetest.Start(t, remotetest.Options{IP: "127.0.0.3"})
	targets := []Target{{Name: "master-1", Address: b.toTarget.Address}, {Name: "master-2", Address: second.Address}}
	file := b.cfg.KnownHosts[0]
	writeFile(t, file, strings.TrimSpace(b.jump.KnownHostsLine(b.toJump.Address))) // the end of the last line is missing
	_, err := b.dial().Hosts(t.Context(), targets)
	want(t, err, fault.Denied, "master-1", ssh.FingerprintSHA256(b.target.HostKey), "master-2", ssh.FingerprintSHA256(second.HostKey), file)
	if details := fault.From(err).Details; len(details) != 2 || details[1].Message+"\n" != second.KnownHostsLine(second.Address) {
		t.Errorf("the lines to add are %+v", details)
	}
	b.cfg.Confirm = func([]Fingerprint) (bool, error) { return false, nil }
	_, err = b.dial().Hosts(t.Context(), targets)
	want(t, err, fault.Denied, "not accepted")
	if strings.Contains(readFile(t, file), "127.0.0.3") {
		t.Error("a key was remembered that was not accepted")
	}
	b.cfg.Confirm = func([]Fingerprint) (bool, error) { return true, nil }
	if _, err = b.dial().Hosts(t.Context(), targets[:1]); err != nil {
		t.Error(err)
	}
	writeFile(t, file, "")
	b.cfg.Confirm = nil
	_, err = Dial(t.Context(), b.cfg)
	want(t, err, fault.Denied, ssh.FingerprintSHA256(b.jump.HostKey))
}

func TestAChangedKeyIsRefusedAndStays(t *testing.T) {
	b := newBed(t)
	j := b.dial()
	// The machine has an Ed25519 key; also one of another type that is known counts as changed.
	for _, kind := range []string{"ed25519", "rsa"} {
		other := remotetest.NewKey(t, kind).Public
		text := "# comment\n" + b.jump.KnownHostsLine(b.toJump.Address) +
			knownAs(b.toTarget.Address) + " " + string(ssh.MarshalAuthorizedKey(other))
		writeFile(t, b.cfg.KnownHosts[0], text)
		b.cfg.Confirm = func([]Fingerprint) (bool, error) { t.Error("it was asked"); return true, nil }
		_, err := j.Hosts(t.Context(), []Target{{Name: "master-1", Address: b.toTarget.Address}})
		want(t, err, fault.Conflict, "master-1 ("+b.toTarget.Address+")", b.cfg.KnownHosts[0]+":3",
			ssh.FingerprintSHA256(other), ssh.FingerprintSHA256(b.target.HostKey), "Fix:")
		if readFile(t, b.cfg.KnownHosts[0]) != text {
			t.Error("known_hosts was changed")
		}
	}
	writeFile(t, b.cfg.KnownHosts[0], b.jump.KnownHostsLine(b.toJump.Address)+"@revoked * "+string(ssh.MarshalAuthorizedKey(b.target.HostKey)))
	_, err := j.Hosts(t.Context(), []Target{{Name: "master-1", Address: b.toTarget.Address}})
	want(t, err, fault.Denied, "revoked", b.cfg.KnownHosts[0]+":2")
}

// A machine with several host keys shows the one that is known, whichever it likes
// best; and one with a certificate of an authority that is known need not be asked about.
func TestTheKnownKeyIsAskedFor(t *testing.T) {
	b := newBed(t)
	more := t.TempDir()
	for _, kind := range []string{"ecdsa", "rsa"} {
		writeFile(t, filepath.Join(more, kind), string(remotetest.NewKey(t, kind).PEM))
	}
	ca := remotetest.NewKey(t, "ed25519")
	certify(t, ca, filepath.Join(more, "ecdsa"), "127.0.0.4")
	s := remotetest.Start(t, remotetest.Options{IP: "127.0.0.4", Authorized: authorized(t, b), Config: []string{
		"HostKey " + more + "/ecdsa", "HostKey " + more + "/rsa", "HostCertificate " + more + "/ecdsa-cert.pub",
	}})
	for _, line := range []string{
		s.KnownHostsLine(s.Address), // the Ed25519 key
		"@cert-authority " + knownAs(s.Address) + " " + string(ssh.MarshalAuthorizedKey(ca.Public)),
	} {
		writeFile(t, b.cfg.KnownHosts[0], b.jump.KnownHostsLine(b.toJump.Address)+line)
		if _, err := b.dial().Hosts(t.Context(), []Target{{Name: "master-1", Address: s.Address}}); err != nil {
			t.Errorf("with %q: %v", line, err)
		}
	}
}

// certify writes the certificate of a host key beside it.
func certify(t *testing.T, ca remotetest.Key, path, host string) {
	t.Helper()
	authority, err := ssh.ParsePrivateKey(ca.PEM)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePrivateKey([]byte(readFile(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	cert := &ssh.Certificate{
		Key: key.PublicKey(), CertType: ssh.HostCert, ValidPrincipals: []string{host},
		ValidBefore: uint64(time.Now().Add(time.Hour).Unix()),
	}
	if err := cert.SignCert(rand.Reader, authority); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path+"-cert.pub", string(ssh.MarshalAuthorizedKey(cert)))
}
