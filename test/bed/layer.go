//go:build linux

package bed

import (
	"archive/tar"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// layer is the archive of an image's file system while it is written. The same
// contents give the same bytes: it has no times and no owners.
type layer struct {
	w    *tar.Writer
	made map[string]bool // folders, by name in the archive
}

// writeLayer writes a file system with an empty /tmp, the files, each copied from
// a file or folder of this machine, and the symbolic links. The keys are paths in
// the image.
func writeLayer(out io.Writer, files, links map[string]string) error {
	l := &layer{w: tar.NewWriter(out), made: map[string]bool{}}
	if err := l.folder("tmp", 0o1777); err != nil {
		return err
	}
	for _, at := range slices.Sorted(maps.Keys(files)) {
		if err := l.copy(inArchive(at), files[at]); err != nil {
			return err
		}
	}
	for _, at := range slices.Sorted(maps.Keys(links)) {
		if err := l.link(inArchive(at), links[at]); err != nil {
			return err
		}
	}
	return l.w.Close()
}

// inArchive is the name in an archive of a path in an image.
func inArchive(at string) string { return strings.TrimPrefix(path.Clean("/"+at), "/") }

// folder makes the folder and those above it, unless they are there.
func (l *layer) folder(name string, mode int64) error {
	if name == "." || name == "" || l.made[name] {
		return nil
	}
	if err := l.folder(path.Dir(name), 0o755); err != nil {
		return err
	}
	l.made[name] = true
	return l.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode})
}

func (l *layer) link(name, to string) error {
	if err := l.folder(path.Dir(name), 0o755); err != nil {
		return err
	}
	return l.w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777})
}

// copy adds a file, a link, or a folder with all that is in it.
func (l *layer) copy(name, from string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	return filepath.WalkDir(from, func(source string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, source)
		if err != nil {
			return err
		}
		at := path.Join(name, filepath.ToSlash(rel))
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			return l.folder(at, 0o755)
		case info.Mode().Type() == fs.ModeSymlink:
			to, err := os.Readlink(source)
			if err != nil {
				return err
			}
			return l.link(at, to)
		}
		if err := l.folder(path.Dir(at), 0o755); err != nil {
			return err
		}
		return addFile(l.w, at, source, int64(info.Mode().Perm()|0o444)) // a program runs as whom the pod says
	})
}

func addFile(w *tar.Writer, name, from string, mode int64) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: st.Size()}); err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}
