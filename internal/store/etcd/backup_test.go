package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// anyValue is a Check for stores that are not sealed.
func anyValue(Header) (func(string, []byte) error, error) {
	return func(string, []byte) error { return nil }, nil
}

// filled is a backend with some keys, among them such as a backup leaves out.
func filled(t testing.TB) *Backend {
	b := open(t, Config{Dir: filepath.Join(t.TempDir(), "state")})
	if _, err := store.New(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	commit(t, b, put("/vaults/prod1", "sealed 1"), put("/vaults/prod2", "sealed \x00\xff2"),
		store.Write{Key: "/operations/4711", Value: []byte("sealed 3"), TTL: time.Hour}, put("/leader/x/1", "me"))
	return b
}

func backup(t testing.TB, b *Backend) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := Backup(context.Background(), b, &out, map[string][]byte{"keyset.json": []byte("wrapped")}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// contents lists key=value.
func contents(t testing.TB, b *Backend) []string {
	t.Helper()
	es, _, err := b.List(context.Background(), "")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Key+"="+string(e.Value))
	}
	return out
}

func TestRestoreGivesBackWhatWasBackedUp(t *testing.T) {
	b := filled(t)
	text := backup(t, b)
	commit(t, b, put("/vaults/prod1", "changed later"))

	var tried []string
	check := func(h Header) (func(string, []byte) error, error) {
		if string(h.Files["keyset.json"]) != "wrapped" {
			t.Errorf("files of the header: %q", h.Files)
		}
		return func(key string, value []byte) error { tried = append(tried, key); return nil }, nil
	}
	dir := filepath.Join(t.TempDir(), "restored")
	if err := os.Mkdir(dir, 0o755); err != nil { // an empty directory is as good as none
		t.Fatal(err)
	}
	h, n, err := Restore(t.Context(), bytes.NewReader(text), dir, check, slog.New(slog.DiscardHandler))
	if err != nil || n != 3 || h.Format != backupFormat {
		t.Fatalf("restore: %d entries, header %+v, %v", n, h, err)
	}
	if len(tried) != 3 {
		t.Errorf("tried %v; every value must be opened", tried)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "keyset.json")); err != nil || string(got) != "wrapped" {
		t.Errorf("restored keyset: %q, %v", got, err)
	}
	r := open(t, Config{Dir: dir})
	want := []string{"/operations/4711=sealed 3", "/vaults/prod1=sealed 1", "/vaults/prod2=sealed \x00\xff2"}
	if d := cmp.Diff(want, contents(t, r)); d != "" {
		t.Errorf("restored (-want +got):\n%s", d)
	}
	head, err := r.client.Get(t.Context(), "/operations/4711")
	if err != nil || head.Kvs[0].Lease == 0 {
		t.Errorf("the time to live was lost: %+v, %v", head, err)
	}
	old, err := store.New(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.New(t.Context(), r)
	if err != nil || s.Incarnation() == old.Incarnation() {
		t.Errorf("incarnation after the restore: %v, %v", s, err)
	}
}

func TestBackupIsConsistentWhileTheServerWrites(t *testing.T) {
	b := open(t, Config{Dir: t.TempDir()})
	var writes []store.Write
	for i := range 3 * pageSize {
		writes = append(writes, put(fmt.Sprintf("/t/%05d", i), "0"))
	}
	commit(t, b, writes...)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { // every commit changes all of the first, the middle and the last page alike
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			v := fmt.Sprint(i)
			_, _ = b.Commit(context.Background(), nil, []store.Write{put("/t/00000", v), put("/t/00700", v), put("/t/01499", v)})
		}
	}()
	for range 10 {
		values := map[string]bool{}
		rd, err := ReadBackup(bytes.NewReader(backup(t, b)))
		if err != nil {
			t.Fatal(err)
		}
		for {
			rec, err := rd.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			switch rec.Key {
			case "/t/00000", "/t/00700", "/t/01499":
				values[string(rec.Value)] = true
			}
		}
		if len(values) != 1 {
			t.Errorf("one backup holds states of different revisions: %v", values)
		}
	}
	cancel()
	<-done
}

func TestRestoreRefuses(t *testing.T) {
	text := backup(t, filled(t))
	lines := bytes.SplitAfter(text, []byte("\n"))
	join := func(ls ...[]byte) []byte { return bytes.Join(ls, nil) }
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "something"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "new")
	for _, tc := range []struct {
		reason string
		text   []byte
		dir    string
		check  Check
		want   string // part of the error
	}{
		{"a directory with something in it", text, full, anyValue, "is not empty"},
		{"nothing", nil, dir, anyValue, "line 1: the file ends too early"},
		{"another file", []byte("hello\n"), dir, anyValue, "line 1: the first line is not the header"},
		{"another format", bytes.Replace(text, []byte("backup-1"), []byte("backup-9"), 1), dir, anyValue, "the first line is not the header"},
		{"a file without its end", join(lines[:4]...), dir, anyValue, "line 5: the file ends too early"},
		{"a file cut inside a line", text[:len(text)/2], dir, anyValue, "ends too early"},
		{"a record left out", join(lines[0], lines[1], lines[3], lines[4]), dir, anyValue, "the digest does not fit"},
		{"two records exchanged", join(lines[0], lines[2], lines[1], lines[3], lines[4]), dir, anyValue, "out of order"},
		{"a changed value", bytes.Replace(text, []byte(`"value":"c2`), []byte(`"value":"d2`), 1), dir, anyValue, "the digest does not fit"},
		{"something after the end", append(bytes.Clone(text), 'x'), dir, anyValue, "something follows"},
		{"an unknown member", bytes.Replace(text, []byte(`"value"`), []byte(`"Value"`), 1), dir, anyValue, "it is not a record"},
		{"a keyset that cannot be used", text, dir, func(Header) (func(string, []byte) error, error) { return nil, errors.New("wrong KEK") }, "wrong KEK"},
		{"a value that cannot be opened", text, dir, func(Header) (func(string, []byte) error, error) {
			return func(key string, _ []byte) error { return fmt.Errorf("cannot open %s", key) }, nil
		}, "cannot open /operations/4711"},
	} {
		_, _, err := Restore(t.Context(), bytes.NewReader(tc.text), tc.dir, tc.check, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, expected %q", tc.reason, err, tc.want)
		}
		if _, _, err := Verify(bytes.NewReader(tc.text), tc.check); tc.dir != full && err == nil {
			t.Errorf("%s: Verify found nothing", tc.reason)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: left a directory that a server could start from: %v", tc.reason, err)
		}
	}
	if _, n, err := Verify(bytes.NewReader(text), anyValue); err != nil || n != 3 {
		t.Errorf("the untouched backup: %d entries, %v", n, err)
	}
}

func TestRestoreRefusesFileNamesThatLeadElsewhere(t *testing.T) {
	b := filled(t)
	for _, name := range []string{"../x", "/etc/x", "etcd", "lock", "", ".x", `a\b`} {
		var out bytes.Buffer
		if _, err := Backup(t.Context(), b, &out, map[string][]byte{name: []byte("x")}); err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(t.TempDir(), "new")
		if _, _, err := Restore(t.Context(), &out, dir, anyValue, slog.New(slog.DiscardHandler)); !errors.Is(err, fault.Invalid) {
			t.Errorf("a file named %q: %v", name, err)
		}
	}
}

func TestRestoreStartsAnewAfterOneThatWasKilled(t *testing.T) {
	text := backup(t, filled(t))
	dir := filepath.Join(t.TempDir(), "new")
	left := open(t, Config{Dir: dir + ".restoring"}) // what a killed restore leaves
	commit(t, left, put("/vaults/half", "x"))
	if err := left.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Restore(t.Context(), bytes.NewReader(text), dir, anyValue, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, open(t, Config{Dir: dir})); len(got) != 3 {
		t.Errorf("restored %v", got)
	}
	if _, err := os.Stat(dir + ".restoring"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the working directory is left: %v", err)
	}
}

func FuzzReadBackup(f *testing.F) {
	f.Add(backup(f, filled(f)))
	f.Add([]byte(`{"format":"keyfleet-backup-1","revision":1,"created":"2026-11-21T02:00:00Z"}` + "\n" + `{"entries":0,"sha256":"x"}` + "\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		keys := map[string]bool{}
		_, n, err := Verify(bytes.NewReader(text), func(Header) (func(string, []byte) error, error) {
			return func(key string, value []byte) error {
				if keys[key] || !strings.HasPrefix(key, "/") || len(value) == 0 {
					t.Errorf("record %q of %d bytes", key, len(value))
				}
				keys[key] = true
				return nil
			}, nil
		})
		if err == nil && n != len(keys) {
			t.Errorf("%d entries, %d keys", n, len(keys))
		}
		if err != nil && !errors.Is(err, fault.Invalid) {
			t.Errorf("an error that is not about the file: %v", err)
		}
	})
}
