package cluster

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// SSH is how the machines of a cluster are reached, for a rotation of its
// certificates. It is stored apart, and part of no answer. It prints as [redacted].
type SSH struct {
	Host       string `json:"host"` // of a control plane node, "host" or "host:port"; all others are reached through it
	User       string `json:"user"` // who may become root without a password
	Key        []byte `json:"key"`  // private key, PEM, without a passphrase
	KnownHosts []byte `json:"knownHosts"`
}

// Format implements fmt.Formatter.
func (SSH) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[redacted]") }

var sshAccess = store.NewCollection[SSH, struct{}]("cluster-ssh")

// Door names the access without what is secret: "user@host:port".
func (s SSH) Door() string { return s.User + "@" + s.Host }

const (
	atSSH  = "properties.ssh"
	maxSSH = 256 << 10 // of a key, and of known hosts, in bytes
)

// registerSSH is the command that configures SSH access.
const registerSSH = "keyfleet cluster register %s --group %s --ssh-host HOST --ssh-user USER --ssh-key-file FILE --ssh-known-hosts-file FILE"

var (
	sshUser = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_.-]{0,63}$`)
	sshName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,252}[a-zA-Z0-9])?$`)
)

// check refuses what rotate-certs could not use without a person at a terminal.
func (s SSH) check() error {
	if !s.hostOK() {
		return badSSH("host", "'%.200s' is neither a host nor HOST:PORT", s.Host)
	}
	if !sshUser.MatchString(s.User) {
		return badSSH("user", "'%.100s' is not the name of a user", s.User)
	}
	if len(s.Key) > maxSSH || len(s.KnownHosts) > maxSSH {
		return badSSH("", "its files are larger than %d bytes", maxSSH)
	}
	switch block, _ := pem.Decode(s.Key); {
	case block == nil || !strings.HasSuffix(block.Type, "PRIVATE KEY"):
		return badSSH("privateKey", "it is no private key in PEM")
	case encrypted(block):
		return badSSH("privateKey", "it has a passphrase, and nobody is there to type it").WithFix("give a copy without: ssh-keygen -p -N '' -f COPY")
	}
	for _, line := range bytes.Split(s.KnownHosts, []byte("\n")) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return nil
		}
	}
	return badSSH("knownHosts", "there is no host key in it").WithFix("ssh-keyscan the SSH host and every node, compare the fingerprints, and give that file")
}

func (s SSH) hostOK() bool {
	host, port, err := net.SplitHostPort(s.Host)
	if err != nil {
		host, port = s.Host, "22"
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0 && (sshName.MatchString(host) || net.ParseIP(host) != nil)
}

// encrypted reports whether a private key has a passphrase (RFC 1421, PKCS #8, and the format of OpenSSH).
func encrypted(b *pem.Block) bool {
	if b.Type == "ENCRYPTED PRIVATE KEY" || strings.Contains(b.Headers["Proc-Type"], "ENCRYPTED") {
		return true
	}
	rest, ours := bytes.CutPrefix(b.Bytes, []byte("openssh-key-v1\x00"))
	return ours && !bytes.HasPrefix(rest, []byte("\x00\x00\x00\x04none"))
}

func badSSH(at, why string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "InvalidSSHAccess", "The SSH access cannot be used: "+why+".", args...).At(strings.TrimSuffix(atSSH+"."+at, "."))
}

// keepSSH stores the access of a cluster; nil: as it is. What a client sends back of
// what it got has no key, and changes nothing.
func keepSSH(tx *store.Tx, o *Object, want *SSH) error {
	if want == nil || len(want.Key) == 0 && want.Door() == o.Spec.SSH {
		return nil
	}
	if err := want.check(); err != nil {
		return err
	}
	o.Spec.SSH = want.Door()
	old, err := sshAccess.Lookup(tx, o.ID)
	if err != nil {
		return err
	}
	if old == nil {
		return sshAccess.Insert(tx, &store.Object[SSH, struct{}]{Meta: store.Meta{ID: o.ID}, Spec: *want})
	}
	old.Spec = *want
	return sshAccess.Put(tx, old)
}
