package nodeapi

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// servePackage answers with an extension package, or a range of it, so that a
// download goes on where it stopped. A node gets the packages of its own goal
// state; all others do not exist for it.
func (e *Edge) servePackage(w http.ResponseWriter, r *http.Request, id string) error {
	sum := r.PathValue("sha256")
	unknown := fault.New(fault.NotFound, "PackageNotFound", "The goal state of this node names no package %q.", sum)
	if !isSHA256(sum) || e.cfg.Packages == nil {
		return unknown
	}
	g, err := e.cfg.Nodes.Goal(r.Context(), id)
	if err != nil {
		return err
	}
	named := false
	for _, x := range g.Extensions {
		named = named || x.Package != nil && x.Package.SHA256 == sum
	}
	if !named {
		return unknown
	}
	f, err := e.cfg.Packages.Open(r.Context(), sum)
	if err != nil {
		return err
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/zip")
	w.Header().Set("ETag", `"`+sum+`"`)
	http.ServeContent(w, r, "", time.Time{}, f)
	return nil
}

// isSHA256 reports whether s is the lower-case hex of 32 bytes.
func isSHA256(s string) bool {
	if len(s) != 64 {
		return false
	}
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// PackageDir is a directory of packages: files named SHA256.zip.
type PackageDir string

// Open opens the package with this SHA-256.
func (d PackageDir) Open(_ context.Context, sha256 string) (io.ReadSeekCloser, error) {
	if !isSHA256(sha256) {
		return nil, fault.New(fault.NotFound, "PackageNotFound", "There is no package %q.", sha256)
	}
	f, err := os.OpenInRoot(string(d), sha256+".zip")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "PackageNotFound", "There is no package %q.", sha256)
	}
	return f, err
}
