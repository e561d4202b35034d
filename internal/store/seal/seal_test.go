package seal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/etcd"
	"keyfleet.dev/keyfleet/internal/store/seal"
	"keyfleet.dev/keyfleet/internal/store/storetest"
)

// newKeyset makes a keyset in a directory of the test.
func newKeyset(t *testing.T) (*seal.Keyset, string) {
	t.Helper()
	dir := t.TempDir()
	return openKeyset(t, dir), dir
}

func openKeyset(t *testing.T, dir string) *seal.Keyset {
	t.Helper()
	k, err := seal.OpenKeyset(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newMemory(t *testing.T) *store.Memory {
	m := store.NewMemory()
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func TestSealedMemoryConforms(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Backend {
		k, _ := newKeyset(t)
		return seal.Wrap(newMemory(t), k)
	})
}

func TestSealedEtcdConforms(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Backend {
		k, _ := newKeyset(t)
		b, err := etcd.Open(t.Context(), etcd.Config{Dir: t.TempDir(), NoSync: true, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = b.Close() })
		return compacting{seal.Wrap(b, k), b}
	})
}

// compacting is a sealed backend whose history can be forgotten.
type compacting struct {
	store.Backend
	raw *etcd.Backend
}

func (c compacting) Compact(ctx context.Context) error { return c.raw.Compact(ctx) }

func put(key, value string) store.Write { return store.Write{Key: key, Value: []byte(value)} }

func commit(t *testing.T, b store.Backend, writes ...store.Write) {
	t.Helper()
	if _, err := b.Commit(context.Background(), nil, writes); err != nil {
		t.Fatal(err)
	}
}

// value reads one key.
func value(b store.Backend, key string) (string, error) {
	es, _, err := b.Get(context.Background(), key)
	if err != nil {
		return "", err
	}
	return string(es[0].Value), nil
}

func TestOnlyElectionsAreClear(t *testing.T) {
	k, _ := newKeyset(t)
	raw := newMemory(t)
	b := seal.Wrap(raw, k)
	keys := []string{"/vaults/prod1", "/meta/incarnation", "/leader/controllers/1", "/leaders/x", "/t/empty"}
	for _, key := range keys {
		text := "canary-canary-canary"
		if strings.HasSuffix(key, "empty") {
			text = ""
		}
		commit(t, b, put(key, text))
		got, err := value(b, key)
		if err != nil || got != text {
			t.Errorf("%s reads %q, %v", key, got, err)
		}
		stored, err := value(raw, key)
		if err != nil {
			t.Fatal(err)
		}
		if clear := stored == text; clear != (key == "/leader/controllers/1") {
			t.Errorf("%s is stored as %q", key, stored)
		}
	}
}

func TestValueOpensOnlyUnchangedUnderItsKey(t *testing.T) {
	k, _ := newKeyset(t)
	other, _ := newKeyset(t)
	raw := newMemory(t)
	b := seal.Wrap(raw, k)
	commit(t, b, put("/secrets/a", "canary"), put("/secrets/b", "other"))
	sealed, err := value(raw, "/secrets/a")
	if err != nil {
		t.Fatal(err)
	}
	foreign := newMemory(t)
	commit(t, seal.Wrap(foreign, other), put("/secrets/b", "canary"))
	strange, err := value(foreign, "/secrets/b")
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]string{
		"a value copied from another key":    sealed,
		"a value in clear":                   `{"id":"b"}`,
		"nothing":                            "",
		"a value cut short":                  sealed[:len(sealed)-1],
		"a value with something behind":      sealed + "x",
		"a value sealed by another keyset":   strange,
		"only the version byte and a key id": sealed[:5],
	}
	for i := range sealed {
		mine, _ := value(raw, "/secrets/b")
		if i < len(mine) {
			cases[fmt.Sprintf("a value with byte %d changed", i)] = mine[:i] + string(mine[i]^1) + mine[i+1:]
		}
	}
	for reason, v := range cases {
		commit(t, raw, put("/secrets/b", v))
		got, err := value(b, "/secrets/b")
		if !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), "/secrets/b") || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %q, %v; expected ErrCorrupt that names the key", reason, got, err)
		}
		if _, _, err := b.List(context.Background(), "/secrets/"); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("%s: List: %v", reason, err)
		}
	}
}

type word struct {
	Text string `json:"text"`
}

func TestFollowEndsAtATamperedValueInsteadOfSpinning(t *testing.T) {
	k, _ := newKeyset(t)
	raw := newMemory(t)
	s, err := store.New(t.Context(), seal.Wrap(raw, k))
	if err != nil {
		t.Fatal(err)
	}
	words := store.NewCollection[word, word]("words")
	err = words.Follow(t.Context(), s, "", func(c store.Change[word, word]) error {
		if c.ID == "" { // the listing is complete: now somebody writes to the disk
			commit(t, raw, put("/words/a", "not sealed"))
		}
		return nil
	})
	if !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), "/words/a") {
		t.Errorf("Follow: %v; expected ErrCorrupt that names the key", err)
	}
}

func TestKeysetFile(t *testing.T) {
	k, dir := newKeyset(t)
	raw := newMemory(t)
	commit(t, seal.Wrap(raw, k), put("/t/a", "1"))
	for _, name := range []string{"kek", seal.KeysetFile} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; expected mode 0600", name, info, err)
		}
	}
	if got, err := value(seal.Wrap(raw, openKeyset(t, dir)), "/t/a"); err != nil || got != "1" {
		t.Errorf("after a restart: %q, %v", got, err)
	}
	kek, wrapped := read(t, dir, "kek"), read(t, dir, seal.KeysetFile)
	for _, tc := range []struct {
		reason string
		change func(dir string) error
		want   string
	}{
		{"the KEK is lost", func(d string) error { return os.Remove(filepath.Join(d, "kek")) }, "is missing"},
		{"the KEK is open to others", func(d string) error { return os.Chmod(filepath.Join(d, "kek"), 0o640) }, "chmod 600"},
		{"the KEK is not one", func(d string) error { return os.WriteFile(filepath.Join(d, "kek"), []byte("hello"), 0o600) }, "not in the format"},
		{"the KEK is another", func(d string) error {
			_, other := newKeyset(t)
			return os.WriteFile(filepath.Join(d, "kek"), read(t, other, "kek"), 0o600)
		}, "cannot be opened"},
		{"the keyset is damaged", func(d string) error {
			return os.WriteFile(filepath.Join(d, seal.KeysetFile), wrapped[:len(wrapped)/2], 0o600)
		}, "cannot be opened"},
	} {
		d := t.TempDir()
		for name, content := range map[string][]byte{"kek": kek, seal.KeysetFile: wrapped} {
			if err := os.WriteFile(filepath.Join(d, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := tc.change(d); err != nil {
			t.Fatal(err)
		}
		if _, err := seal.OpenKeyset(d, nil); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, expected %q", tc.reason, err, tc.want)
		}
	}
	if s := fmt.Sprintf("%v %+v %s", k, k, k); !strings.HasPrefix(s, "keyset of 1 keys") || strings.Contains(s, "AES") {
		t.Errorf("a keyset prints as %s", s)
	}
}

func read(t *testing.T, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRotateRewritesEverythingAndForgetsTheOldKey(t *testing.T) {
	k, dir := newKeyset(t)
	before := read(t, dir, seal.KeysetFile)
	raw := newMemory(t)
	b := seal.Wrap(raw, k)
	for i := range 20 {
		commit(t, b, put(fmt.Sprintf("/t/%02d", i), fmt.Sprint(i)))
	}
	commit(t, b, put("/leader/x", "me"), store.Write{Key: "/t/short", Value: []byte("1"), TTL: time.Second})
	n, err := seal.Rotate(t.Context(), raw, k)
	if err != nil || n != 21 {
		t.Fatalf("%d values rewritten, %v", n, err)
	}
	old, err := seal.ParseKeyset(before, mustKEK(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := value(seal.Wrap(raw, old), "/t/07"); !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), "does not have") {
		t.Errorf("the old key opens: %v", err)
	}
	reopened := seal.Wrap(raw, openKeyset(t, dir))
	for i := range 20 {
		if got, err := value(reopened, fmt.Sprintf("/t/%02d", i)); err != nil || got != fmt.Sprint(i) {
			t.Errorf("value %d: %q, %v", i, got, err)
		}
	}
	if got := k.String(); !strings.HasPrefix(got, "keyset of 1 keys") {
		t.Errorf("afterwards a %s", got)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		es, _, err := raw.Get(t.Context(), "/t/short")
		if err != nil {
			t.Fatal(err)
		}
		if es[0].ModRev == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a rewritten value lost its time to live")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func mustKEK(t *testing.T, dir string) seal.KEK {
	t.Helper()
	kek, err := seal.FileKEK(filepath.Join(dir, "kek"), false)
	if err != nil {
		t.Fatal(err)
	}
	return kek
}

// failing is a backend whose commits fail after some.
type failing struct {
	store.Backend
	left int
}

func (f *failing) Commit(ctx context.Context, g []store.Guard, w []store.Write) (int64, error) {
	if f.left--; f.left < 0 {
		return 0, errors.New("pulled the plug")
	}
	return f.Backend.Commit(ctx, g, w)
}

func TestInterruptedRotationGoesOnWhereItStopped(t *testing.T) {
	k, dir := newKeyset(t)
	raw := newMemory(t)
	for i := range 10 {
		commit(t, seal.Wrap(raw, k), put(fmt.Sprintf("/t/%d", i), fmt.Sprint(i)))
	}
	total := 0
	for _, left := range []int{0, 3, 4} {
		n, err := seal.Rotate(t.Context(), &failing{raw, left}, k)
		if total += n; err == nil || n != left {
			t.Errorf("interrupted after %d: %d rewritten, %v", left, n, err)
		}
		k = openKeyset(t, dir) // the next process
		for i := range 10 {
			if got, err := value(seal.Wrap(raw, k), fmt.Sprintf("/t/%d", i)); err != nil || got != fmt.Sprint(i) {
				t.Errorf("between: value %d: %q, %v", i, got, err)
			}
		}
	}
	n, err := seal.Rotate(t.Context(), raw, k)
	if total += n; err != nil || total != 10 {
		t.Errorf("%d rewritten in all, %v; none twice", total, err)
	}
	if got := openKeyset(t, dir).String(); !strings.HasPrefix(got, "keyset of 1 keys") {
		t.Errorf("afterwards a %s", got)
	}
}

func TestRotateWhileOthersWriteAndWatch(t *testing.T) {
	k, _ := newKeyset(t)
	raw := newMemory(t)
	s, err := store.New(t.Context(), seal.Wrap(raw, k))
	if err != nil {
		t.Fatal(err)
	}
	words := store.NewCollection[word, word]("words")
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			id := fmt.Sprint(w)
			for n := 0; ctx.Err() == nil; n++ {
				err := s.Update(context.Background(), func(tx *store.Tx) error {
					o, err := words.Lookup(tx, id)
					if err != nil {
						return err
					}
					if o == nil {
						o = &store.Object[word, word]{}
						o.ID = id
						return words.Insert(tx, o)
					}
					if want := strings.Repeat("x", len(o.Spec.Text)); o.Spec.Text != want {
						return fmt.Errorf("read %q", o.Spec.Text)
					}
					o.Spec.Text = strings.Repeat("x", n%100)
					return words.Put(tx, o)
				})
				if err != nil {
					t.Errorf("writing during a rotation: %v", err)
					return
				}
			}
		})
	}
	all.Go(func() {
		err := words.Follow(ctx, s, "", func(store.Change[word, word]) error { return nil })
		if !errors.Is(err, context.Canceled) {
			t.Errorf("following during a rotation: %v", err)
		}
	})
	for range 15 {
		if _, err := seal.Rotate(t.Context(), raw, k); err != nil {
			t.Errorf("rotating: %v", err)
		}
	}
	cancel()
	all.Wait()
}

func FuzzOpen(f *testing.F) {
	dir := f.TempDir()
	k, err := seal.OpenKeyset(dir, nil)
	if err != nil {
		f.Fatal(err)
	}
	raw := store.NewMemory()
	if _, err := seal.Wrap(raw, k).Commit(context.Background(), nil, []store.Write{put("/t/a", "value")}); err != nil {
		f.Fatal(err)
	}
	es, _, err := raw.Get(context.Background(), "/t/a")
	if err != nil {
		f.Fatal(err)
	}
	good := es[0].Value
	f.Add("/t/a", good)
	f.Add("/t/b", good)
	f.Add("/t/a", good[:4])
	f.Add("/t/a", []byte{})
	f.Fuzz(func(t *testing.T, key string, sealed []byte) {
		got, err := k.Open(key, sealed)
		if genuine := key == "/t/a" && bytes.Equal(sealed, good); genuine != (err == nil) {
			t.Errorf("key %q, value %x: %q, %v", key, sealed, got, err)
		}
		if err != nil && !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("an error that is not ErrCorrupt: %v", err)
		}
	})
}
