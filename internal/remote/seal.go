package remote

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
	"io"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Sealer encrypts to the holder of an SSH key, with age: whoever may log in to
// the machines can open what a rotation keeps, and nobody else.
type Sealer struct {
	identity   age.Identity
	recipients []age.Recipient
}

// NewSealer makes a Sealer of a private key (Ed25519 or RSA) in PEM. more are
// further recipients: age keys ("age1…") or public SSH keys.
func NewSealer(key []byte, passphrase func() ([]byte, error), more []string) (*Sealer, error) {
	raw, err := rawKey(key, passphrase)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromKey(raw)
	if err != nil {
		return nil, fmt.Errorf("reading the SSH key: %w", err)
	}
	s := &Sealer{}
	switch k := raw.(type) {
	case *ed25519.PrivateKey:
		s.identity, err = agessh.NewEd25519Identity(*k)
	case ed25519.PrivateKey:
		s.identity, err = agessh.NewEd25519Identity(k)
	case *rsa.PrivateKey:
		s.identity, err = agessh.NewRSAIdentity(k)
	default:
		return nil, fault.New(fault.Invalid, "UnsupportedKey", "Nothing can be encrypted to an SSH key of type %s.", signer.PublicKey().Type()).
			WithFix("use an Ed25519 or RSA key")
	}
	if err != nil {
		return nil, fmt.Errorf("reading the SSH key: %w", err)
	}
	own, err := agessh.ParseRecipient(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	if err != nil {
		return nil, fmt.Errorf("reading the SSH key: %w", err)
	}
	s.recipients = []age.Recipient{own}
	for _, text := range more {
		r, err := parseRecipient(text)
		if err != nil {
			return nil, fault.New(fault.Invalid, "BadRecipient", "%q is neither an age key nor a public SSH key.", text).Because(err)
		}
		s.recipients = append(s.recipients, r)
	}
	return s, nil
}

func parseRecipient(text string) (age.Recipient, error) {
	if r, err := age.ParseX25519Recipient(text); err == nil {
		return r, nil
	}
	return agessh.ParseRecipient(text)
}

// rawKey is the private key itself.
func rawKey(key []byte, passphrase func() ([]byte, error)) (any, error) {
	raw, err := ssh.ParseRawPrivateKey(key)
	if _, encrypted := err.(*ssh.PassphraseMissingError); encrypted && passphrase != nil {
		words, err := passphrase()
		if err != nil {
			return nil, err
		}
		if raw, err = ssh.ParseRawPrivateKeyWithPassphrase(key, words); err != nil {
			return nil, fault.New(fault.Invalid, "BadPassphrase", "The passphrase does not open the SSH key.")
		}
		return raw, nil
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "BadKey", "The SSH key cannot be read: %s.", err).
			WithFix("give the file of a private key, Ed25519 or RSA, in the form of OpenSSH or PEM")
	}
	return raw, nil
}

// Writer encrypts what is written to it onto w; Close ends it.
func (s *Sealer) Writer(w io.Writer) (io.WriteCloser, error) {
	out, err := age.Encrypt(w, s.recipients...)
	if err != nil {
		return nil, fmt.Errorf("encrypting: %w", err)
	}
	return out, nil
}

// Seal encrypts.
func (s *Sealer) Seal(plain []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := s.Writer(&out)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(plain); err != nil {
		return nil, fmt.Errorf("encrypting: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("encrypting: %w", err)
	}
	return out.Bytes(), nil
}

// Open decrypts.
func (s *Sealer) Open(sealed []byte) ([]byte, error) {
	r, err := age.Decrypt(bytes.NewReader(sealed), s.identity)
	if err != nil {
		return nil, fault.New(fault.Denied, "WrongKey", "The SSH key does not open what this rotation keeps.").Because(err).
			WithFix("use the key that began it, or one of its --journal-recipient")
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("decrypting: %w", err)
	}
	return plain, nil
}
