package build_test

import (
	"archive/zip"
	"bytes"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/packages/build"
)

const manifest = `[{"name":"Acme.Tool.Runner","version":1.0,"handlerManifest":{
  "installCommand":"bin/run install","uninstallCommand":"bin/run uninstall","updateCommand":"bin/run update",
  "enableCommand":"bin/run enable","disableCommand":"bin/run disable","rebootAfterInstall":false,"reportHeartbeat":false}}]`

func files() []build.File {
	return []build.File{
		{Name: "HandlerManifest.json", Content: []byte(manifest)},
		{Name: "bin/run", Content: []byte("#!/bin/sh\n"), Executable: true},
		{Name: "manifest.xml", Content: []byte("<x/>")},
	}
}

// TestReproducible: the order in which files are given changes no byte.
func TestReproducible(t *testing.T) {
	var a, b bytes.Buffer
	if err := build.Write(&a, files()); err != nil {
		t.Fatal(err)
	}
	reversed := files()
	slices.Reverse(reversed)
	if err := build.Write(&b, reversed); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("the same files made two packages")
	}
	z, err := zip.NewReader(bytes.NewReader(a.Bytes()), int64(a.Len()))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range z.File {
		if executable := f.Mode()&0o111 != 0; executable != (f.Name == "bin/run") {
			t.Errorf("%s has mode %s", f.Name, f.Mode())
		}
		if f.Modified.Year() != 1980 || f.Modified.Month() != 1 {
			t.Errorf("%s has the time %s", f.Name, f.Modified)
		}
	}
}

// TestRefused: what an agent could not use is not written.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		reason string
		change func([]build.File) []build.File
		says   string
	}{
		{"no manifest", func(f []build.File) []build.File { return f[1:] }, "no HandlerManifest.json"},
		{"a manifest that is none", func(f []build.File) []build.File { f[0].Content = []byte("{}"); return f }, "manifest"},
		{"a command whose program is missing", func(f []build.File) []build.File { f[1].Name = "run"; return f }, "not there"},
		{"a program that cannot be run", func(f []build.File) []build.File { f[1].Executable = false; return f }, "not executable"},
		{"a name that leaves the package", func(f []build.File) []build.File { f[2].Name = "../x"; return f }, "no path"},
		{"an absolute name", func(f []build.File) []build.File { f[2].Name = "/etc/passwd"; return f }, "no path"},
		{"a name of another system", func(f []build.File) []build.File { f[2].Name = `..\x`; return f }, "no path"},
		{"a file twice", func(f []build.File) []build.File { return append(f, f[2]) }, "twice"},
	} {
		var out bytes.Buffer
		err := build.Write(&out, c.change(files()))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.reason, err)
		}
		if out.Len() > 0 {
			t.Errorf("%s: %d bytes were written", c.reason, out.Len())
		}
	}
}
