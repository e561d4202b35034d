package keyvaultext

import (
	"archive/zip"
	_ "embed"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

//go:embed package/HandlerManifest.json
var handlerManifest []byte

//go:embed package/manifest.xml
var imageManifest []byte

// PackageName is what agents in the field call the zip.
const PackageName = HandlerName + "__" + HandlerVersion + ".zip"

// WritePackage writes the extension package around a binary of this handler.
// The same binary gives the same bytes, so a package's hash says what is in it.
func WritePackage(to io.Writer, binary io.Reader) error {
	z := zip.NewWriter(to)
	add := func(name string, mode fs.FileMode, write func(io.Writer) error) error {
		header := &zip.FileHeader{Name: name, Method: zip.Deflate, Modified: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
		header.SetMode(mode)
		w, err := z.CreateHeader(header)
		if err == nil {
			err = write(w)
		}
		if err != nil {
			return fmt.Errorf("packing %s: %w", name, err)
		}
		return nil
	}
	text := func(data []byte) func(io.Writer) error {
		return func(w io.Writer) error { _, err := w.Write(data); return err }
	}
	if err := add("HandlerManifest.json", 0o644, text(handlerManifest)); err != nil {
		return err
	}
	if err := add("manifest.xml", 0o644, text(imageManifest)); err != nil {
		return err
	}
	if err := add("bin/keyfleet-keyvault-extension", 0o755, func(w io.Writer) error { _, err := io.Copy(w, binary); return err }); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("closing package: %w", err)
	}
	return nil
}

// WritePackageFile packs this program into path, by way of a temporary file
// beside it. A path that is a folder gets [PackageName].
func WritePackageFile(executable, path string) (string, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, PackageName)
	}
	binary, err := os.Open(executable)
	if err != nil {
		return "", fmt.Errorf("reading this program: %w", err)
	}
	defer binary.Close()
	temp, err := os.CreateTemp(filepath.Dir(path), ".package-")
	if err != nil {
		return "", fmt.Errorf("creating package: %w", err)
	}
	defer os.Remove(temp.Name())
	err = WritePackage(temp, binary)
	if closed := temp.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Chmod(temp.Name(), 0o644)
	}
	if err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		return "", fmt.Errorf("writing package: %w", err)
	}
	return path, nil
}
