package remote

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"

	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
)

// parseKey reads the private key that we log in with.
func parseKey(pem []byte, passphrase func() ([]byte, error)) (ssh.Signer, error) {
	signer, err := ssh.ParsePrivateKey(pem)
	var encrypted *ssh.PassphraseMissingError
	switch {
	case err == nil:
		return signer, nil
	case bytes.Contains(pem, []byte("BEGIN ENCRYPTED PRIVATE KEY")), bytes.HasPrefix(pem, []byte("PuTTY-User-Key-File")):
		return nil, fault.New(fault.Invalid, "", "The SSH key is in a form that is not read here.").At("Key").
			WithFix("convert a copy of it with ssh-keygen -p -f FILE (or, from PuTTY, puttygen FILE -O private-openssh)")
	case !errors.As(err, &encrypted):
		return nil, fault.New(fault.Invalid, "", "The SSH key cannot be read.").At("Key").
			WithFix("give the private key, not the .pub file, in the form that ssh-keygen writes").Because(err)
	case passphrase == nil:
		return nil, fault.New(fault.Invalid, "", "The SSH key is encrypted, and nobody is there to be asked for its passphrase.").At("Key").
			WithFix("run the command on a terminal, or use a key without a passphrase")
	}
	secret, err := passphrase()
	if err != nil {
		return nil, fmt.Errorf("asking for the passphrase of the SSH key: %w", err)
	}
	signer, err = ssh.ParsePrivateKeyWithPassphrase(pem, secret)
	if errors.Is(err, x509.IncorrectPasswordError) {
		return nil, fault.New(fault.Denied, "", "The passphrase does not fit the SSH key.").At("Key")
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "", "The SSH key cannot be read.").At("Key").Because(err)
	}
	return signer, nil
}

// handshake makes an SSH connection of a network connection, which it closes if it
// fails.
func (j *Jump) handshake(ctx context.Context, conn net.Conn, m machine) (*ssh.Client, ssh.PublicKey, error) {
	var hostKey ssh.PublicKey
	var refused error // what our check said, which the library wraps in words of its own
	cfg := &ssh.ClientConfig{
		User:              m.user,
		Auth:              j.auth(m),
		HostKeyAlgorithms: j.keys.algorithms(m),
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			hostKey, refused = key, j.keys.check(m, key)
			return refused
		},
	}
	unhook := context.AfterFunc(ctx, func() { _ = conn.Close() })
	c, chans, reqs, err := ssh.NewClientConn(conn, m.address, cfg)
	if !unhook() && err == nil {
		err = ctx.Err()
	}
	if err == nil {
		return ssh.NewClient(c, chans, reqs), hostKey, nil
	}
	_ = conn.Close()
	switch {
	case refused != nil:
		return nil, nil, refused
	case strings.Contains(err.Error(), "unable to authenticate") && m.windows:
		return nil, nil, j.refusedLogin(m, err)
	case strings.Contains(err.Error(), "unable to authenticate"):
		return nil, nil, fault.New(fault.Unauthenticated, "", "%s (%s) does not let %s in with this key.", m.name, m.address, m.user).
			WithFix("add the line %q to ~%s/.ssh/authorized_keys there, or give the key and the user that belong together",
				strings.TrimSpace(string(ssh.MarshalAuthorizedKey(j.signer.PublicKey()))), m.user).Because(err)
	}
	return nil, nil, unreachable(m, err)
}
