package seal

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"

	"keyfleet.dev/keyfleet/internal/fault"
)

// KeysetFile is the name of the wrapped keyset in the data directory.
const KeysetFile = "keyset.json"

// Keyset seals and opens values. It is safe for concurrent use. Make it with
// [OpenKeyset] or [ParseKeyset].
type Keyset struct {
	path string // "" when parsed from a backup: it cannot rotate
	kek  KEK

	using   sync.RWMutex // read-held from sealing a value until it is committed; held to change the keys
	current atomic.Pointer[keys]
}

// keys is the content of a keyset at one time. It does not change.
type keys struct {
	handle  *keyset.Handle
	aead    tink.AEAD
	primary uint32
}

func (k *Keyset) state() *keys { return k.current.Load() }

func (s *keys) has(id uint32) bool {
	for _, other := range s.ids() {
		if other == id {
			return true
		}
	}
	return false
}

// ids returns the ids of all keys.
func (s *keys) ids() []uint32 {
	out := make([]uint32, 0, s.handle.Len())
	for i := range s.handle.Len() {
		if e, err := s.handle.Entry(i); err == nil {
			out = append(out, e.KeyID())
		}
	}
	return out
}

func newKeys(h *keyset.Handle) (*keys, error) {
	a, err := aead.New(h)
	if err != nil {
		return nil, fmt.Errorf("using the keyset: %w", err)
	}
	primary, err := h.Primary()
	if err != nil {
		return nil, fmt.Errorf("using the keyset: %w", err)
	}
	return &keys{handle: h, aead: a, primary: primary.KeyID()}, nil
}

// OpenKeyset reads the keyset of a data directory, or makes one on first start.
// With a nil kek it uses, or makes, the file DIR/kek. The caller must be the only
// one that uses the directory: etcd.Open sees to that, so call it first.
func OpenKeyset(dir string, kek KEK) (*Keyset, error) {
	path := filepath.Join(dir, KeysetFile)
	wrapped, err := os.ReadFile(path)
	first := errors.Is(err, fs.ErrNotExist)
	if err != nil && !first {
		return nil, fmt.Errorf("reading the keyset: %w", err)
	}
	if kek == nil {
		// A KEK is made on first start only: later, a missing one is lost, and a
		// new one would not open anything.
		if kek, err = FileKEK(filepath.Join(dir, "kek"), first); err != nil {
			return nil, err
		}
	}
	if first {
		return createKeyset(path, kek)
	}
	k, err := ParseKeyset(wrapped, kek)
	if err != nil {
		return nil, err
	}
	k.path = path
	return k, nil
}

// ParseKeyset opens the content of a keyset file, for instance out of a backup.
func ParseKeyset(wrapped []byte, kek KEK) (*Keyset, error) {
	h, err := keyset.Read(keyset.NewJSONReader(bytes.NewReader(wrapped)), wrapper{kek})
	if err != nil {
		return nil, fault.New(fault.Internal, "", "The keyset cannot be opened: it is damaged, or the KEK is not the one it was wrapped with.").
			WithFix("use the KEK that belongs to this store").Because(err)
	}
	st, err := newKeys(h)
	if err != nil {
		return nil, err
	}
	k := &Keyset{kek: kek}
	k.current.Store(st)
	return k, nil
}

func createKeyset(path string, kek KEK) (*Keyset, error) {
	h, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		return nil, fmt.Errorf("making a keyset: %w", err)
	}
	k := &Keyset{path: path, kek: kek}
	return k, k.replace(h)
}

// replace makes h the content of the keyset: first on disk, then in use.
func (k *Keyset) replace(h *keyset.Handle) error {
	st, err := newKeys(h)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := h.Write(keyset.NewJSONWriter(&b), wrapper{k.kek}); err != nil {
		return fmt.Errorf("wrapping the keyset: %w", err)
	}
	if err := writeFile(k.path, "keyset", b.Bytes()); err != nil {
		return err
	}
	k.current.Store(st)
	return nil
}

// Steady calls fn with the wrapped keyset and lets no key be added or thrown away
// until fn returns: what is read from the store meanwhile fits the keyset.
func (k *Keyset) Steady(fn func(wrapped []byte) error) error {
	k.using.RLock()
	defer k.using.RUnlock()
	wrapped, err := os.ReadFile(k.path)
	if err != nil {
		return fmt.Errorf("reading the keyset: %w", err)
	}
	return fn(wrapped)
}

// String tells of a keyset what may be told.
func (k *Keyset) String() string {
	st := k.state()
	return fmt.Sprintf("keyset of %d keys, primary %d", st.handle.Len(), st.primary)
}

// LogValue implements slog.LogValuer.
func (k *Keyset) LogValue() slog.Value { return slog.StringValue(k.String()) }

// wrapper makes a KEK what Tink wraps keysets with.
type wrapper struct{ kek KEK }

func (w wrapper) Encrypt(plaintext, _ []byte) ([]byte, error)  { return w.kek.Wrap(plaintext) }
func (w wrapper) Decrypt(ciphertext, _ []byte) ([]byte, error) { return w.kek.Unwrap(ciphertext) }
