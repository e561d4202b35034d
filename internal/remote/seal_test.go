package remote

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"testing"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
)

// sshKey is a private key as ssh-keygen writes it.
func sshKey(t *testing.T, key any, passphrase string) []byte {
	t.Helper()
	var b *pem.Block
	var err error
	if passphrase == "" {
		b, err = ssh.MarshalPrivateKey(key, "test")
	} else {
		b, err = ssh.MarshalPrivateKeyWithPassphrase(key, "test", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(b)
}

func sealKeys(t *testing.T) (ed ed25519.PrivateKey, r *rsa.PrivateKey, ec *ecdsa.PrivateKey) {
	t.Helper()
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if r, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	if ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	return ed, r, ec
}

func TestSealOpensWithTheSameKeyOnly(t *testing.T) {
	ed, r, _ := sealKeys(t)
	secret := []byte("the new CA's key")
	other, err := NewSealer(sshKey(t, ed, ""), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	words := func() ([]byte, error) { return []byte("open sesame"), nil }
	for name, key := range map[string][]byte{"RSA": sshKey(t, r, ""), "encrypted RSA": sshKey(t, r, "open sesame")} {
		s, err := NewSealer(key, words, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		sealed, err := s.Seal(secret)
		if err != nil || bytes.Contains(sealed, secret) {
			t.Errorf("%s: sealed as %q, %v", name, sealed, err)
		}
		if plain, err := s.Open(sealed); err != nil || !bytes.Equal(plain, secret) {
			t.Errorf("%s: opened as %q, %v", name, plain, err)
		}
		if _, err := other.Open(sealed); !errors.Is(err, fault.Denied) || fault.From(err).Fix == "" {
			t.Errorf("%s: another key: %v", name, err)
		}
		sealed[len(sealed)-1] ^= 1
		if _, err := s.Open(sealed); err == nil {
			t.Errorf("%s: a changed text opens", name)
		}
	}
}

func TestSealOpensWithAFurtherRecipient(t *testing.T) {
	ed, _, _ := sealKeys(t)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSealer(sshKey(t, ed, ""), nil, []string{id.Recipient().String()})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := s.Seal([]byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := age.Decrypt(bytes.NewReader(sealed), id); err != nil {
		t.Errorf("the recipient: %v", err)
	}
}

func TestSealRefuses(t *testing.T) {
	ed, _, ec := sealKeys(t)
	wrong := func() ([]byte, error) { return []byte("wrong"), nil }
	for _, tc := range []struct {
		reason     string
		key        []byte
		passphrase func() ([]byte, error)
		more       []string
	}{
		{"an ECDSA key, to which age cannot encrypt", sshKey(t, ec, ""), nil, nil},
		{"no key", []byte("hello"), nil, nil},
		{"an encrypted key without its passphrase", sshKey(t, ed, "secret"), nil, nil},
		{"a wrong passphrase", sshKey(t, ed, "secret"), wrong, nil},
		{"a recipient that is none", sshKey(t, ed, ""), nil, []string{"bob"}},
	} {
		if _, err := NewSealer(tc.key, tc.passphrase, tc.more); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", tc.reason, err)
		}
	}
}
