package remote

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// remains are files of attempts that did not come to their end.
func remains(path string) []string {
	left, _ := filepath.Glob(path + ".*")
	return left
}

func wantFile(t *testing.T, path string, content []byte, mode fs.FileMode) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%s has %d bytes, want %d: %v", path, len(got), len(content), err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode() != mode {
		t.Errorf("%s has mode %v, want %v: %v", path, st.Mode(), mode, err)
	}
	if left := remains(path); len(left) > 0 {
		t.Errorf("this was left behind: %v", left)
	}
}

func TestPutWritesAFile(t *testing.T) {
	b := newBed(t)
	h := b.host()
	content := make([]byte, 300_001)
	_, _ = rand.Read(content)
	path := filepath.Join(b.dir, "pki", "it's new", "ca.key")
	if err := h.Put(t.Context(), path, bytes.NewReader(content), 0o600); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, content, 0o600)
	if st, _ := os.Stat(filepath.Dir(path)); st.Mode() != 0o700|os.ModeDir {
		t.Errorf("the folder has mode %v", st.Mode())
	}
	// Over an existing one, from a reader that cannot be read twice; also nothing at all.
	for _, content := range []string{"short", ""} {
		if err := h.Put(t.Context(), path, io.MultiReader(strings.NewReader(content)), 0o644); err != nil {
			t.Fatal(err)
		}
		wantFile(t, path, []byte(content), 0o644)
	}
	// A reader that was read in part is sent from where it stands.
	part := strings.NewReader("headbody")
	_, _ = io.ReadFull(part, make([]byte, 4))
	if err := h.Put(t.Context(), path, part, 0o640); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, []byte("body"), 0o640)
}

func TestPutReplacesALinkAndNotWhatItPointsTo(t *testing.T) {
	b := newBed(t)
	h := b.host()
	folder := filepath.Join(b.dir, "folder")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(folder, "file")
	writeFile(t, file, "old")
	for _, to := range []string{file, folder, "/nowhere"} {
		link := filepath.Join(b.dir, "link")
		_ = os.Remove(link)
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
		if err := h.Put(t.Context(), link, strings.NewReader("new"), 0o600); err != nil {
			t.Fatal(err)
		}
		wantFile(t, link, []byte("new"), 0o600)
	}
	if readFile(t, file) != "old" {
		t.Error("the link was followed")
	}
	err := h.Put(t.Context(), folder, strings.NewReader("x"), 0o600)
	if failed := (*rotation.ScriptError)(nil); !errors.As(err, &failed) || !strings.Contains(err.Error(), "writing "+folder+" on master-1 failed: "+folder+" is a folder") {
		t.Errorf("over a folder: %v", err)
	}
}

func TestPutThatFailsLeavesTheOldFile(t *testing.T) {
	b := newBed(t)
	h := b.host()
	path := filepath.Join(b.dir, "f")
	writeFile(t, path, "old")
	writeFile(t, path+".keyfleet-new.OFADEADATTEMPT", "hal")
	// A reader that fails at the second reading is like content that changes meanwhile.
	changing := &changes{strings.NewReader("0123456789"), 0}
	if err := h.Put(t.Context(), path, changing, 0o600); err == nil || !strings.Contains(err.Error(), "5 of 10 bytes") {
		t.Errorf("the error is %v", err)
	}
	wantFile(t, path, []byte("old"), 0o600)
	if err := h.Put(t.Context(), path, iotest.ErrReader(errors.New("no disk")), 0o600); err == nil || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("the error is %v", err)
	}
	if err := h.Put(t.Context(), "/dev/full/x", strings.NewReader("x"), 0o600); err == nil {
		t.Error("below a file")
	}
	for _, bad := range []string{"relative", "/a/../b", "/a/", "", "/a\x00"} {
		want(t, h.Put(t.Context(), bad, strings.NewReader("x"), 0o600), fault.Invalid)
	}
	want(t, h.Put(t.Context(), path, strings.NewReader("x"), 0o600|fs.ModeSetuid), fault.Invalid)
}

// changes is a file that becomes shorter once it was measured.
type changes struct {
	*strings.Reader
	seeks int
}

func (c *changes) Seek(offset int64, whence int) (int64, error) {
	if c.seeks++; c.seeks == 2 {
		c.Reader = strings.NewReader("01234")
	}
	return c.Reader.Seek(offset, whence)
}
