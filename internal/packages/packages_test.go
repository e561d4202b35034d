package packages_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/packages"
	"keyfleet.dev/keyfleet/internal/packages/build"
)

const manifest = `[{"version":1.0,"handlerManifest":{"installCommand":"run","uninstallCommand":"run","updateCommand":"run","enableCommand":"run","disableCommand":"run"}}]`

// put writes a package whose bytes depend on its name and note.
func put(t *testing.T, dir, name, note string) string {
	t.Helper()
	var zip bytes.Buffer
	err := build.Write(&zip, []build.File{
		{Name: "HandlerManifest.json", Content: []byte(manifest)},
		{Name: "run", Content: []byte("#!/bin/sh\n# " + name + note), Executable: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), zip.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(zip.Bytes())
	return hex.EncodeToString(sum[:])
}

// TestFind: what a pool asks for, and which package that is.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	for _, v := range []string{"1.0.1363.13", "3.0.0", "3.0.2", "3.1.0", "3.10.0", "4.0.1"} {
		put(t, dir, "Microsoft.Azure.KeyVault.KeyVaultForLinux-"+v+".zip", "")
	}
	s := packages.Open(dir)
	for _, c := range []struct {
		reason, publisher, typ, want string
		upgrade                      bool
		version                      string // empty: not found
	}{
		{"the body of the Linux pool: newest of the major version", "Microsoft.Azure.KeyVault", "KeyVaultForLinux", "3.0", true, "3.10.0"},
		{"without upgrade: newest of the minor version", "Microsoft.Azure.KeyVault", "KeyVaultForLinux", "3.0", false, "3.0.2"},
		{"a minor version of its own", "Microsoft.Azure.KeyVault", "KeyVaultForLinux", "3.1", false, "3.1.0"},
		{"3.1 is not 3.10", "Microsoft.Azure.KeyVault", "KeyVaultForLinux", "3.10", false, "3.10.0"},
		{"casing does not matter", "microsoft.azure.keyvault", "keyvaultforlinux", "4.0", true, "4.0.1"},
		{"four numbers", "Microsoft.Azure.KeyVault", "KeyVaultForLinux", "1.0.1363.13", false, "1.0.1363.13"},
		{"never another major version", "Microsoft.Azure.KeyVault", "KeyVaultForLinux", "2.0", true, ""},
		{"never older than asked for", "Microsoft.Azure.KeyVault", "KeyVaultForLinux", "4.1", true, ""},
		{"another publisher", "Acme", "KeyVaultForLinux", "3.0", true, ""},
	} {
		version, pkg, err := s.Find(c.publisher, c.typ, c.want, c.upgrade)
		if c.version == "" {
			if e := fault.From(err); !errors.Is(err, fault.NotFound) || e.Fix == "" {
				t.Errorf("%s: %q, %v", c.reason, version, err)
			}
			continue
		}
		if err != nil || version != c.version || len(pkg.SHA256) != 64 || pkg.Size == 0 {
			t.Errorf("%s: got %q %+v, %v; want %q", c.reason, version, pkg, err, c.version)
		}
	}
	if _, _, err := s.Find("Microsoft.Azure.KeyVault", "KeyVaultForLinux", "three", true); !errors.Is(err, fault.Invalid) {
		t.Errorf("a version that is none: %v", err)
	}
	_, _, err := s.Find("Microsoft.Azure.KeyVault", "KeyVaultForLinux", "9.0", false)
	if !strings.Contains(fault.From(err).Message, "3.0.2") {
		t.Errorf("the message does not say which versions there are: %v", err)
	}
}

// TestFolderIsTheTruth: adding, replacing and removing a file is all it takes.
func TestFolderIsTheTruth(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "packages")
	s := packages.Open(dir)
	if pkgs, err := s.List(); err != nil || len(pkgs) != 0 {
		t.Fatalf("a folder that does not exist has %v, %v", pkgs, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	name := "Acme.Runner-1.0.0.zip"
	first := put(t, dir, name, "")
	got := read(t, s, first)
	if sum := sha256.Sum256(got); hex.EncodeToString(sum[:]) != first {
		t.Error("the package's bytes are not those of its name")
	}
	second := put(t, dir, name, "changed")
	if err := os.Chtimes(filepath.Join(dir, name), time.Now(), time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), first); !errors.Is(err, fault.NotFound) {
		t.Errorf("the replaced package: %v", err)
	}
	read(t, s, second)
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), second); !errors.Is(err, fault.NotFound) {
		t.Errorf("the removed package: %v", err)
	}
}

func read(t *testing.T, s *packages.Store, sum string) []byte {
	t.Helper()
	f, err := s.Open(t.Context(), sum)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestProblems: a file that is no package is never offered, and says why.
func TestProblems(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "Acme.Runner-1.0.0.zip", "")
	for name, content := range map[string]string{
		"Acme.Runner-1.0.1.zip": "half a zi", // still being copied
		"Runner-1.0.0.zip":      "no publisher",
		"Acme.Runner-one.zip":   "no version",
		"README.txt":            "not looked at",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := packages.Open(dir)
	pkgs, err := s.List()
	if err != nil || len(pkgs) != 1 || pkgs[0].Publisher != "Acme" || pkgs[0].Type != "Runner" {
		t.Errorf("listed %+v, %v", pkgs, err)
	}
	problems, err := s.Problems()
	if err != nil || len(problems) != 3 {
		t.Errorf("problems: %+v, %v", problems, err)
	}
}

// TestChoose: whatever there is, the choice serves what was asked for and nothing that serves is newer.
func TestChoose(t *testing.T) {
	version := rapid.Custom(func(t *rapid.T) packages.Version {
		return packages.Version(rapid.SliceOfN(rapid.IntRange(0, 3), 2, 4).Draw(t, "numbers"))
	})
	rapid.Check(t, func(t *rapid.T) {
		have := rapid.SliceOf(version).Draw(t, "have")
		want := version.Draw(t, "want")
		upgrade := rapid.Bool().Draw(t, "upgrade")
		got, ok := packages.Choose(have, want, upgrade)
		for _, v := range have {
			_, serves := packages.Choose([]packages.Version{v}, want, upgrade)
			if serves && (!ok || v.Compare(got) > 0) {
				t.Fatalf("of %v for %v: %v was chosen before %v", have, want, got, v)
			}
		}
		if ok && got[0] != want[0] {
			t.Fatalf("for %v another major version was chosen: %v", want, got)
		}
	})
}

// FuzzParseName: a name is taken apart and put together again, or refused.
func FuzzParseName(f *testing.F) {
	for _, s := range []string{"Microsoft.Azure.KeyVault.KeyVaultForLinux-3.0.1.zip", "Microsoft.Azure.KeyVault.KeyVaultForWindows-3.5.3041.185.ZIP", "a.b-1.zip", "-.zip", ".-1.zip"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		p, err := packages.ParseName(name)
		if err != nil {
			return
		}
		again := p.Publisher + "." + p.Type + "-" + p.Version.String()
		if !strings.HasPrefix(name, again) || len(name) != len(again)+4 {
			t.Errorf("%q was read as %q", name, again)
		}
	})
}
