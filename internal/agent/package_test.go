package agent

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// entry is an entry of a hostile zip.
type entry struct {
	name string
	mode fs.FileMode
	body string
}

func zipEntries(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for _, e := range append([]entry{{"HandlerManifest.json", 0o644, "[]"}}, entries...) {
		h := &zip.FileHeader{Name: e.name, Method: zip.Deflate}
		h.SetMode(e.mode)
		w, err := z.CreateHeader(h)
		if err == nil && !strings.HasSuffix(e.name, "/") {
			_, err = io.WriteString(w, e.body)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpackBytes unpacks into a folder with a neighbour, and returns both paths.
func unpackBytes(t testing.TB, data []byte) (dir string, err error) {
	t.Helper()
	base := t.TempDir()
	dir = filepath.Join(base, "package")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	z := filepath.Join(base, "p.zip")
	if err := os.WriteFile(z, data, 0o600); err != nil {
		t.Fatal(err)
	}
	err = unpackInto(z, dir)
	entries, rerr := os.ReadDir(base)
	if rerr != nil || len(entries) != 2 {
		t.Errorf("unpacking wrote outside of the folder: %v %v", entries, rerr)
	}
	return dir, err
}

// TestHostilePackages: every one is refused before a byte is outside its folder.
func TestHostilePackages(t *testing.T) {
	long := strings.Repeat("a", 1100)
	cases := []struct {
		name    string
		entries []entry
	}{
		{"parent folder", []entry{{"../evil", 0o644, "x"}}},
		{"parent folder in the middle", []entry{{"a/../../evil", 0o644, "x"}}},
		{"absolute", []entry{{"/tmp/evil", 0o644, "x"}}},
		{"Windows parent", []entry{{`..\evil`, 0o644, "x"}}},
		{"Windows drive", []entry{{`C:evil`, 0o644, "x"}}},
		{"empty part", []entry{{"a//b", 0o644, "x"}}},
		{"dot", []entry{{"./a", 0o644, "x"}}},
		{"zero byte", []entry{{"a\x00b", 0o644, "x"}}},
		{"symbolic link", []entry{{"link", fs.ModeSymlink | 0o777, "/etc/passwd"}}},
		{"link, then a file through it", []entry{{"d", fs.ModeSymlink | 0o777, "/tmp"}, {"d/evil", 0o644, "x"}}},
		{"device", []entry{{"dev", fs.ModeDevice | 0o666, ""}}},
		{"named pipe", []entry{{"pipe", fs.ModeNamedPipe | 0o666, ""}}},
		{"setuid", []entry{{"su", fs.ModeSetuid | 0o755, "x"}}},
		{"setgid folder", []entry{{"d/", fs.ModeSetgid | fs.ModeDir | 0o755, ""}}},
		{"file twice", []entry{{"a", 0o644, "x"}, {"a", 0o644, "y"}}},
		{"file twice in other casing", []entry{{"a", 0o644, "x"}, {"A", 0o644, "y"}}},
		{"file that is a folder too", []entry{{"a", 0o644, "x"}, {"a/b", 0o644, "y"}}},
		{"endless name", []entry{{long, 0o644, "x"}}},
		{"bomb", []entry{{"zeros", 0o644, strings.Repeat("\x00", 8<<20)}}},
		{"our own unfinished files", []entry{{"x" + tmpSuffix, 0o644, "x"}}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, err := unpackBytes(t, zipEntries(t, c.entries...)); err == nil {
				t.Error("it was accepted")
			}
		})
	}
	t.Run("more files than anybody needs", func(t *testing.T) {
		many := make([]entry, maxFiles)
		for i := range many {
			many[i] = entry{fmt.Sprintf("f%d", i), 0o644, ""}
		}
		if _, err := unpackBytes(t, zipEntries(t, many...)); err == nil {
			t.Error("it was accepted")
		}
	})
	t.Run("not a zip", func(t *testing.T) {
		if _, err := unpackBytes(t, []byte("PK\x03\x04 nothing")); err == nil {
			t.Error("it was accepted")
		}
	})
}

// TestUnpack: every file gets u+x, folders are private, and the manifest
// nearest to the root is copied there.
func TestUnpack(t *testing.T) {
	data := zipOf(t, map[string]string{
		"deep/er/HandlerManifest.json": "wrong", "deep/HandlerManifest.json": "right", "bin/run": "#!/bin/sh", "manifest.xml": "<x/>",
	})
	dir, err := unpackBytes(t, data)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "HandlerManifest.json")); err != nil || string(b) != "right" {
		t.Errorf("manifest in the root: %q, %v", b, err)
	}
	for path, want := range map[string]fs.FileMode{"bin": 0o700 | fs.ModeDir, "bin/run": 0o700} {
		fi, err := os.Stat(filepath.Join(dir, path))
		if err != nil || fi.Mode()&0o700 != 0o700 || fi.Mode()&fs.ModeDir != want&fs.ModeDir {
			t.Errorf("%s: %v, %v", path, fi.Mode(), err)
		}
	}
}

// TestDownloadGoesOn: half of a package is there; only the other half is fetched.
func TestDownloadGoesOn(t *testing.T) {
	a, s := imdsAgent(t, nil)
	p := s.addPackage(map[string]string{"HandlerManifest.json": "[]", "big": strings.Repeat("0123456789", 10000)})
	x := ext("one", "Thing", "1.0", p)
	s.goal.Extensions = append(s.goal.Extensions, x)
	h := a.handler(handlerName(x), x.Version)
	whole := s.packages[p.SHA256]
	if err := os.MkdirAll(a.statePath("downloads"), 0o700); err != nil {
		t.Fatal(err)
	}
	part := filepath.Join(a.statePath("downloads"), p.SHA256+".part")
	cases := []struct {
		name string
		have []byte
		ok   bool
	}{
		{"nothing", nil, true},
		{"the first half", whole[:len(whole)/2], true},
		{"all of it, not yet renamed", whole, true},
		{"more than it", append(bytes.Clone(whole), "xx"...), true},
		{"a wrong first half", bytes.Repeat([]byte("x"), len(whole)/2), false}, // found by the hash, removed, right the next time
		{"nothing again", nil, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_ = os.Remove(a.packagePath(h))
			if c.have != nil {
				if err := os.WriteFile(part, c.have, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			err := a.download(t.Context(), h, *p)
			if (err == nil) != c.ok {
				t.Fatalf("download = %v", err)
			}
			if exists(part) {
				t.Error("the part is left")
			}
			if b, err := os.ReadFile(a.packagePath(h)); c.ok && (err != nil || !bytes.Equal(b, whole)) {
				t.Errorf("the package is not whole: %v", err)
			}
		})
	}
	other := sha256.Sum256([]byte("of another node"))
	s.packages[hex.EncodeToString(other[:])] = []byte("of another node")
	if _, err := a.srv.stream(t.Context(), "/v1/packages/"+hex.EncodeToString(other[:]), http.Header{}); !isAnswer(err, 404, "PackageNotFound") {
		t.Errorf("a package that the goal state does not name: %v", err)
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(zipOf(f, map[string]string{"HandlerManifest.json": "[]", "bin/h.sh": "#!/bin/sh\n"}))
	f.Add(zipEntries(f, entry{"../evil", 0o644, "x"}))
	f.Add(zipEntries(f, entry{"d", fs.ModeSymlink | 0o777, "/tmp"}, entry{"d/x", 0o644, "x"}))
	f.Add([]byte("PK\x05\x06" + strings.Repeat("\x00", 18)))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir, err := unpackBytes(t, data) // fails the test if something is outside
		if err != nil {
			return
		}
		if !exists(filepath.Join(dir, "HandlerManifest.json")) {
			t.Error("unpacked without a manifest")
		}
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.Type().IsRegular() && !d.IsDir() {
				t.Errorf("%s is a %v", path, d.Type())
			}
			return nil
		})
	})
}
