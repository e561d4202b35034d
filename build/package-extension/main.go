// Command package-extension packs the Key Vault extension: the program and the
// files of its package folder.
//
//	go run ./build/package-extension -binary bin/keyfleet-keyvault-extension -version 3.0.0 -out FILE.zip
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"keyfleet.dev/keyfleet/internal/packages"
	"keyfleet.dev/keyfleet/internal/packages/build"
)

// versionElement is the version in manifest.xml, which is the package's.
var versionElement = regexp.MustCompile(`<Version>[^<]*</Version>`)

func main() {
	binary := flag.String("binary", "", "`FILE` of the extension's program")
	folder := flag.String("folder", "internal/keyvaultext/package", "`DIR` with the manifest and the scripts")
	version := flag.String("version", "", "`VERSION` of the package, as in the name of the output")
	out := flag.String("out", "", "`FILE` to write, PUBLISHER.TYPE-VERSION.zip")
	flag.Parse()
	if err := pack(*binary, *folder, *version, *out); err != nil {
		fmt.Fprintln(os.Stderr, "package-extension:", err)
		os.Exit(1)
	}
}

func pack(binary, folder, version, out string) error {
	name, err := packages.ParseName(filepath.Base(out))
	if err != nil {
		return err
	}
	if name.Version.String() != version {
		return fmt.Errorf("the name %s does not say version %s", filepath.Base(out), version)
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	files := []build.File{{Name: "bin/" + filepath.Base(binary), Content: program, Executable: true}}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() || strings.HasSuffix(e.Name(), ".go") {
			continue
		}
		content, err := os.ReadFile(filepath.Join(folder, e.Name()))
		if err != nil {
			return err
		}
		if e.Name() == "manifest.xml" {
			content = versionElement.ReplaceAll(content, []byte("<Version>"+version+"</Version>"))
		}
		files = append(files, build.File{Name: e.Name(), Content: content, Executable: bytes.HasPrefix(content, []byte("#!"))})
	}
	var zip bytes.Buffer
	if err := build.Write(&zip, files); err != nil {
		return err
	}
	tmp := out + ".tmp"
	if err := os.WriteFile(tmp, zip.Bytes(), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, out)
}
