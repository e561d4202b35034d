package remote

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Fingerprint is a host key that nobody has vouched for yet.
type Fingerprint struct {
	Name    string // of the machine
	Address string // as known_hosts has it: host, or [host]:port
	Type    string // "ssh-ed25519"
	SHA256  string // "SHA256:..."
	Line    string // what is added to known_hosts
}

func (f Fingerprint) same(g Fingerprint) bool { return f.Line == g.Line }

// unknownKey is the error of a host whose key is not known.
type unknownKey struct{ print Fingerprint }

func (e *unknownKey) Error() string {
	return "the host key of " + e.print.Name + " is unknown: " + e.print.SHA256
}

// refusal names all keys that somebody would have to vouch for.
func refusal(unknown []Fingerprint, file string) error {
	var list strings.Builder
	for _, f := range unknown {
		fmt.Fprintf(&list, "\n  %s %s %s %s", f.Name, f.Address, f.Type, f.SHA256)
	}
	e := fault.New(fault.Denied, "", "The host keys of these machines are not known:%s\n", list.String()).
		WithFix("compare them with ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub there; then run this on a terminal and say yes, or append their lines to %s", file)
	for _, f := range unknown {
		e = e.WithDetail(f.Name, "%s", f.Line)
	}
	return e
}

// keyring is the known_hosts files. They are read at each connection, so what
// somebody else adds or takes away counts at once.
type keyring struct {
	files []string
	mu    sync.Mutex // held while adding
}

// knownAs is the name of an address in known_hosts. knownhosts.Normalize writes
// IPv6 addresses on port 22 in a form that neither it nor OpenSSH finds again.
func knownAs(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port == "22" {
		return host
	}
	return "[" + host + "]:" + port
}

// check returns nil for a key that is known for the machine, an *unknownKey if
// nothing is known about the machine, and a fault if something else is.
func (k *keyring) check(m machine, key ssh.PublicKey) error {
	err := k.lookup(m.address, key)
	var mismatch *knownhosts.KeyError
	var revoked *knownhosts.RevokedError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &revoked):
		return fault.New(fault.Denied, "", "The host key of %s (%s) is revoked: %s:%d has %s.",
			m.name, m.address, revoked.Revoked.Filename, revoked.Revoked.Line, ssh.FingerprintSHA256(key)).
			WithFix("give the machine a new host key; this one must not be trusted")
	case !errors.As(err, &mismatch):
		return fault.New(fault.Denied, "", "The host key of %s (%s) was not accepted.", m.name, m.address).Because(err)
	case len(mismatch.Want) == 0:
		name := knownAs(m.address)
		return &unknownKey{Fingerprint{
			Name: m.name, Address: name, Type: key.Type(), SHA256: ssh.FingerprintSHA256(key),
			Line: name + " " + strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))),
		}}
	}
	// Show the line of the same type: that is the one that has changed.
	want := mismatch.Want[0]
	for _, w := range mismatch.Want {
		if w.Key.Type() == key.Type() {
			want = w
		}
	}
	return fault.New(fault.Conflict, "", "The host key of %s (%s) has changed: %s:%d has %s %s, but the machine shows %s %s. Somebody may be in between.",
		m.name, m.address, want.Filename, want.Line, want.Key.Type(), ssh.FingerprintSHA256(want.Key), key.Type(), ssh.FingerprintSHA256(key)).
		WithFix("find out why; if the machine was rebuilt, take line %d out of %s and connect again", want.Line, want.Filename)
}

func (k *keyring) lookup(address string, key ssh.PublicKey) error {
	var there []string
	for _, f := range k.files {
		switch _, err := os.Stat(f); {
		case err == nil:
			there = append(there, f)
		case !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("reading known_hosts: %w", err)
		}
	}
	callback, err := knownhosts.New(there...)
	if err != nil {
		return fmt.Errorf("reading known_hosts: %w", err)
	}
	return callback(address, &net.TCPAddr{IP: net.IPv4zero}, key)
}

// nobody is a key that is no machine's: asking for it lists what is known.
type nobody struct{}

func (nobody) Type() string                        { return "" }
func (nobody) Marshal() []byte                     { return nil }
func (nobody) Verify([]byte, *ssh.Signature) error { return errors.New("not a key") }

// algorithms puts those first of which a key is known for the machine; otherwise
// the machine would show a key of another type, and it would look changed. Host
// certificates are asked for only if an authority is known.
func (k *keyring) algorithms(m machine) []string {
	var known []string
	authority := false
	var all *knownhosts.KeyError
	if errors.As(k.lookup(m.address, nobody{}), &all) {
		for _, w := range all.Want {
			if isAuthority(w) {
				authority = true
				continue
			}
			switch t := w.Key.Type(); t {
			case ssh.KeyAlgoRSA:
				known = append(known, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256)
			default:
				known = append(known, t)
			}
		}
	}
	var first, rest []string
	for _, a := range ssh.SupportedAlgorithms().HostKeys {
		switch cert := strings.Contains(a, "-cert-"); {
		case cert && authority, slices.Contains(known, a):
			first = append(first, a)
		case !cert:
			rest = append(rest, a)
		}
	}
	return append(first, rest...)
}

// isAuthority looks at the line itself, because knownhosts does not tell.
func isAuthority(k knownhosts.KnownKey) bool {
	data, err := os.ReadFile(k.Filename)
	if err != nil {
		return false
	}
	lines := bytes.Split(data, []byte("\n"))
	return k.Line <= len(lines) && bytes.HasPrefix(bytes.TrimSpace(lines[k.Line-1]), []byte("@cert-authority"))
}

// add appends keys to the first file; what is there stays as it is.
func (k *keyring) add(keys []Fingerprint) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	path := k.files[0]
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("making the folder of known_hosts: %w", err)
	}
	var text strings.Builder
	if old, err := os.ReadFile(path); err == nil && len(old) > 0 && old[len(old)-1] != '\n' {
		text.WriteByte('\n')
	}
	for _, f := range keys {
		text.WriteString(f.Line + "\n")
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("adding to known_hosts: %w", err)
	}
	_, err = f.WriteString(text.String())
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("adding to known_hosts: %w", err)
	}
	return nil
}
