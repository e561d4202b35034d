package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// KEK is the key-encryption key: it wraps the keyset and nothing else.
type KEK interface {
	// Wrap encrypts and authenticates a keyset.
	Wrap(plaintext []byte) ([]byte, error)
	// Unwrap undoes Wrap, or fails if this is not the key or the text was changed.
	Unwrap(wrapped []byte) ([]byte, error)
}

// kekFormat opens the line of a KEK file; the rest is the key in base64.
const kekFormat = "keyfleet-kek-1 "

// fileKEK is a KEK that lies in a file: AES-256-GCM with a random nonce.
type fileKEK struct{ gcm cipher.AEAD }

// FileKEK reads the KEK in a file, which must be readable by its owner only. With
// create it makes one if there is none.
func FileKEK(path string, create bool) (KEK, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		if !create {
			return nil, fault.New(fault.Internal, "", "The key-encryption key %s is missing; without it the store cannot be opened.", path).
				WithFix("put the copy of it back there, mode 0600")
		}
		text := kekFormat + base64.StdEncoding.EncodeToString(randomBytes(32)) + "\n"
		if err := writeFile(path, "KEK", []byte(text)); err != nil {
			return nil, err
		}
		info, err = os.Stat(path)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the KEK: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fault.New(fault.Internal, "", "The key-encryption key %s can be read by others (mode %04o).", path, info.Mode().Perm()).
			WithFix("chmod 600 %s", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the KEK: %w", err)
	}
	return parseKEK(string(text))
}

func parseKEK(text string) (KEK, error) {
	encoded, ok := strings.CutPrefix(strings.TrimSpace(text), kekFormat)
	key, err := base64.StdEncoding.DecodeString(encoded)
	if !ok || err != nil || len(key) != 32 {
		return nil, fault.New(fault.Internal, "", "The key-encryption key is not in the format %q followed by 32 bytes in base64.", kekFormat).
			WithFix("put the copy of it back")
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	return &fileKEK{gcm}, err
}

// kekPurpose is the associated data of a wrapped keyset.
const kekPurpose = "keyfleet keyset"

// Wrap implements KEK.
func (k *fileKEK) Wrap(plaintext []byte) ([]byte, error) {
	return k.gcm.Seal(nil, nil, plaintext, []byte(kekPurpose)), nil
}

// Unwrap implements KEK.
func (k *fileKEK) Unwrap(wrapped []byte) ([]byte, error) {
	return k.gcm.Open(nil, nil, wrapped, []byte(kekPurpose))
}

// String hides the key.
func (k *fileKEK) String() string { return "[redacted]" }

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// writeFile puts content into path so that after a crash at any point there is
// either the old file or the new one, whole: it writes a new file beside, and
// renames it when it is on disk. what names the file in errors and effects.
func writeFile(path, what string, content []byte) error {
	next := path + ".new"
	if err := effect.Do("write "+what+" file", func() error { return writeSynced(next, content) }); err != nil {
		return fmt.Errorf("writing the %s: %w", what, err)
	}
	if err := effect.Do("rename "+what+" file", func() error { return os.Rename(next, path) }); err != nil {
		return fmt.Errorf("writing the %s: %w", what, err)
	}
	if err := effect.Do("sync directory of "+what+" file", func() error { return syncDir(filepath.Dir(path)) }); err != nil {
		return fmt.Errorf("writing the %s: %w", what, err)
	}
	return nil
}

func writeSynced(path string, content []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // what a crash left may have another mode
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
