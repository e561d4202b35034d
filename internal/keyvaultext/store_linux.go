package keyvaultext

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// certificateStore is the directory of one observed certificate: files
// VAULT.NAME.VERSION.NOTBEFORE.NOTAFTER.PEM, and a link to the newest.
//
// All work goes through an open directory handle, so a directory that is
// swapped underneath cannot lead a write elsewhere.
type certificateStore struct {
	certificate extension.ObservedCertificate
	keep        int    // files kept, the link's target among them
	acl         []byte // access ACL for new files; nil: mode 0600 only
	directory   []byte // what the ACL's readers need on the directory; nil: nothing
	root        *os.Root
}

// stored says what put has done.
type stored struct {
	link     string    // absolute path that consumers read
	file     string    // name of the file it points to
	switched bool      // the link was moved to another file
	removed  []string  // old files that were removed
	since    time.Time // when the link was switched
}

// openStore creates the directory (0700) if it is not there, refuses one that
// others could write to, and removes what a killed process left.
func openStore(c extension.ObservedCertificate, s extension.KeyVaultSettings) (*certificateStore, error) {
	path := c.Directory()
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		err := effect.Do("create certificate directory", func() error {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
			if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			return nil
		})
		if err != nil {
			return nil, storeFault(path, err, "create it by hand (mode 0700), or correct certificateStoreLocation")
		}
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, storeFault(path, err, "make it a directory, or correct certificateStoreLocation")
	}
	store := &certificateStore{certificate: c, keep: s.KeepVersions, root: root}
	if err := store.prepare(s.ACLEnabled); err != nil {
		root.Close()
		return nil, err
	}
	return store, nil
}

func (s *certificateStore) prepare(aclEnabled bool) error {
	path := s.certificate.Directory()
	info, err := s.root.Stat(".")
	if err != nil {
		return storeFault(path, err, "check the directory")
	}
	if !trusted(info) || info.Mode().Perm()&0o022 != 0 && !hasACL(s.root) {
		return unsafeDirectory(path, info)
	}
	if err := checkParents(path); err != nil {
		return err
	}
	if aclEnabled && len(s.certificate.ACLs) > 0 {
		if s.acl, s.directory, err = readersACL(s.certificate); err != nil {
			return err
		}
		if err := effect.Do("set access to certificate directory", func() error { return addDirectoryReaders(s.root, s.directory) }); err != nil {
			return storeFault(path, err, "use a file system with POSIX ACLs, or switch aclEnabled off")
		}
	}
	if err := removeLeftovers(s.root); err != nil {
		return storeFault(path, err, "check the directory")
	}
	return s.restoreAccess()
}

// trusted reports whether root or we ourselves own the file. In a user
// namespace the machine's root has no number and shows as the overflow user.
func trusted(info fs.FileInfo) bool {
	const overflow = 65534
	owner := info.Sys().(*syscall.Stat_t).Uid
	if owner == 0 || owner == uint32(os.Geteuid()) {
		return true
	}
	numbers, err := os.ReadFile("/proc/self/uid_map")
	return owner == overflow && err == nil && !slices.Equal(strings.Fields(string(numbers)), []string{"0", "0", "4294967295"})
}

func unsafeDirectory(path string, info fs.FileInfo) error {
	return fault.New(fault.Invalid, "UnsafeDirectory", "The directory %s belongs to user %d with mode %04o, so others than root could replace keys in it or lead them elsewhere.",
		path, info.Sys().(*syscall.Stat_t).Uid, info.Mode().Perm()).
		WithFix("chown root %s && chmod go-w %s, or choose another certificateStoreLocation", path, path)
}

// checkParents refuses a path of which someone else could swap a part, as it
// is written and as it is behind its symbolic links.
func checkParents(path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return storeFault(path, err, "check the directory")
	}
	for _, p := range []string{path, real} {
		for at := filepath.Dir(p); ; at = filepath.Dir(at) {
			info, err := os.Lstat(at)
			if err != nil {
				return storeFault(at, err, "check the directory")
			}
			writable := info.Mode()&fs.ModeSymlink == 0 && info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0
			if !trusted(info) || writable {
				return unsafeDirectory(at, info)
			}
			if at == "/" {
				break
			}
		}
	}
	return nil
}

// restoreAccess makes the present file's access what the settings say now.
func (s *certificateStore) restoreAccess() error {
	name, _, ok := s.current()
	if !ok {
		return nil
	}
	f, err := s.root.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil // put writes it anew
	}
	defer f.Close()
	if accessIs(f, s.acl) {
		return nil
	}
	if err := effect.Do("set access to certificate file", func() error { return setAccess(f, s.acl) }); err != nil {
		return storeFault(filepath.Join(s.certificate.Directory(), name), err, "use a file system with POSIX ACLs, or switch aclEnabled off")
	}
	return nil
}

func (s *certificateStore) close() { s.root.Close() }

func (s *certificateStore) link() string {
	return filepath.Join(s.certificate.Directory(), s.certificate.LinkName())
}

// current returns the file that the link names and when it was switched; ok is
// false if there is no link into this directory.
func (s *certificateStore) current() (name string, since time.Time, ok bool) {
	target, err := s.root.Readlink(s.certificate.LinkName())
	if err != nil || filepath.Dir(target) != s.certificate.Directory() && filepath.Dir(target) != "." {
		return "", time.Time{}, false
	}
	info, err := s.root.Lstat(s.certificate.LinkName())
	if err != nil {
		return "", time.Time{}, false
	}
	return filepath.Base(target), info.ModTime().UTC(), true
}

// fileName is VAULT.NAME.VERSION.NOTBEFORE.NOTAFTER.PEM, times in Unix seconds.
func fileName(c extension.ObservedCertificate, version string, b bundle) string {
	return c.Vault + "." + c.Secret + "." + version + "." +
		strconv.FormatInt(b.leaf.NotBefore.Unix(), 10) + "." + strconv.FormatInt(b.leaf.NotAfter.Unix(), 10) + ".PEM"
}

// put makes the link name a file with this version. beforeSwitch is called
// when everything is ready and the link is about to move. Doing it again with
// the same version changes nothing.
func (s *certificateStore) put(version string, b bundle, beforeSwitch func() error) (stored, error) {
	text, err := b.encode()
	if err != nil {
		return stored{}, err
	}
	data := []byte(text.reveal())
	out := stored{link: s.link(), file: fileName(s.certificate, version, b)}
	if !holds(s.root, out.file, data) {
		prepare := func(f *os.File) error { return setAccess(f, s.acl) }
		if err := replaceFile(s.root, out.file, "certificate file", data, prepare); err != nil {
			return stored{}, storeFault(out.link, err, "check the space and the health of the file system")
		}
	}
	if name, since, ok := s.current(); ok && name == out.file {
		out.since = since
	} else {
		if err := s.flip(out.file, beforeSwitch); err != nil {
			return stored{}, err
		}
		out.switched = true
		out.since = time.Now().UTC() // finer than the link's time, which ticks in jiffies
	}
	out.removed, err = s.retire()
	if err != nil {
		return out, storeFault(out.link, err, "remove old files by hand")
	}
	return out, nil
}

// flip moves the link to file by renaming a new link over it.
func (s *certificateStore) flip(file string, before func() error) error {
	name := s.certificate.LinkName()
	if info, err := s.root.Lstat(name); err == nil && info.Mode()&fs.ModeSymlink == 0 {
		return fault.New(fault.Conflict, "LinkIsFile", "%s is there already and is no symbolic link.", s.link()).
			WithFix("move it away, or choose another customSymbolicLinkName")
	}
	if err := before(); err != nil {
		return err
	}
	temp := tempPrefix + name
	if err := s.root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return storeFault(s.link(), err, "check the directory")
	}
	if err := effect.Do("create certificate link", func() error {
		return s.root.Symlink(filepath.Join(s.certificate.Directory(), file), temp)
	}); err != nil {
		return storeFault(s.link(), err, "check the space of the file system")
	}
	err := effect.Do("switch certificate link", func() error {
		if err := s.root.Rename(temp, name); err != nil {
			return err
		}
		return syncDirectory(s.root)
	})
	if err != nil {
		return storeFault(s.link(), err, "check the directory")
	}
	return nil
}

var storedName = regexp.MustCompile(`^(.+)\.[0-9a-f]{32}\.-?[0-9]+\.-?[0-9]+\.PEM$`)

// retire removes this certificate's oldest files beyond the limit, but never
// one that any link in the directory names.
func (s *certificateStore) retire() ([]string, error) {
	names, err := namesIn(s.root)
	if err != nil {
		return nil, err
	}
	type version struct {
		name string
		at   time.Time
	}
	var versions []version
	linked := map[string]bool{}
	for _, name := range names {
		info, err := s.root.Lstat(name)
		if err != nil {
			continue // removed meanwhile
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			if target, err := s.root.Readlink(name); err == nil {
				linked[filepath.Base(target)] = true
			}
			continue
		}
		if m := storedName.FindStringSubmatch(name); m != nil && info.Mode().IsRegular() && m[1] == s.certificate.Vault+"."+s.certificate.Secret {
			versions = append(versions, version{name, info.ModTime()})
		}
	}
	slices.SortFunc(versions, func(a, b version) int {
		if c := b.at.Compare(a.at); c != 0 {
			return c
		}
		return strings.Compare(a.name, b.name)
	})
	var removed []string
	kept := 0
	for _, v := range versions {
		if linked[v.name] {
			kept++
		}
	}
	for _, v := range versions {
		switch {
		case linked[v.name]:
		case kept < s.keep:
			kept++
		default:
			if err := effect.Do("remove old certificate file", func() error { return s.root.Remove(v.name) }); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return removed, err
			}
			removed = append(removed, v.name)
		}
	}
	return removed, nil
}

// storeFault is a failure of this machine, shown with its place and fix.
func storeFault(path string, err error, fix string) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return f
	}
	return fault.New(fault.Conflict, "CertificateStoreError", "The certificate store cannot be used: %s: %s.", path, oneLine(plainFileError(err))).WithFix("%s", fix).Because(err)
}

func plainFileError(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return fmt.Sprintf("%s (%s)", errno.Error(), firstWords(err))
	}
	return err.Error()
}

func firstWords(err error) string {
	words, _, _ := strings.Cut(err.Error(), ":")
	return words
}
