package keyvaultext

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/fault"
)

// POSIX access ACLs in the kernel's extended attribute form (version 2, little
// endian): entries of tag, permission and id, sorted by tag and id.
const (
	aclAttribute = "system.posix_acl_access"
	aclVersion   = 2

	aclUserObject  = 0x01
	aclUser        = 0x02
	aclGroupObject = 0x04
	aclGroup       = 0x08
	aclMask        = 0x10
	aclOther       = 0x20

	aclNoID = 0xffffffff
	read    = 4
	write   = 2
	execute = 1
)

type aclEntry struct {
	tag, permission uint16
	id              uint32
}

// readersACL looks the settings' users and groups up and returns the ACL of
// files, and the named entries that their directory needs.
func readersACL(c extension.ObservedCertificate) (file, directory []byte, err error) {
	var readers []aclEntry
	for i, a := range c.ACLs {
		at := fmt.Sprintf("%s.acls[%d]", c.Path, i)
		u, err := user.Lookup(a.User)
		if err != nil {
			return nil, nil, noAccount(at+".user", "user", a.User)
		}
		id, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return nil, nil, noAccount(at+".user", "user", a.User)
		}
		readers = append(readers, aclEntry{aclUser, read, uint32(id)})
		if a.Group == "" {
			continue
		}
		g, err := user.LookupGroup(a.Group)
		if err != nil {
			return nil, nil, noAccount(at+".group", "group", a.Group)
		}
		if id, err = strconv.ParseUint(g.Gid, 10, 32); err != nil {
			return nil, nil, noAccount(at+".group", "group", a.Group)
		}
		readers = append(readers, aclEntry{aclGroup, read, uint32(id)})
	}
	entries := append([]aclEntry{
		{aclUserObject, read | write, aclNoID}, {aclGroupObject, 0, aclNoID}, {aclMask, read, aclNoID}, {aclOther, 0, aclNoID},
	}, readers...)
	passers := slices.Clone(readers)
	for i := range passers {
		passers[i].permission = execute
	}
	return encodeACL(entries), encodeACL(passers), nil
}

func noAccount(path, kind, name string) error {
	return fault.New(fault.Invalid, "NoSuchAccount", "There is no %s %q on this node.", kind, name).At(path).
		WithFix("create it, or correct %s", path)
}

func encodeACL(entries []aclEntry) []byte {
	slices.SortFunc(entries, func(a, b aclEntry) int {
		if a.tag != b.tag {
			return int(a.tag) - int(b.tag)
		}
		return int(int64(a.id) - int64(b.id))
	})
	entries = slices.Compact(entries)
	out := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range entries {
		out = binary.LittleEndian.AppendUint16(out, e.tag)
		out = binary.LittleEndian.AppendUint16(out, e.permission)
		out = binary.LittleEndian.AppendUint32(out, e.id)
	}
	return out
}

func decodeACL(raw []byte) []aclEntry {
	var out []aclEntry
	for raw = raw[min(4, len(raw)):]; len(raw) >= 8; raw = raw[8:] {
		out = append(out, aclEntry{binary.LittleEndian.Uint16(raw), binary.LittleEndian.Uint16(raw[2:]), binary.LittleEndian.Uint32(raw[4:])})
	}
	return out
}

// setAccess makes a file readable for root and for the ACL's readers only.
func setAccess(f *os.File, acl []byte) error {
	if acl == nil {
		if err := unix.Fremovexattr(int(f.Fd()), aclAttribute); err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("removing the ACL: %w", err)
		}
		return f.Chmod(0o600)
	}
	if err := unix.Fsetxattr(int(f.Fd()), aclAttribute, acl, 0); err != nil {
		return fmt.Errorf("setting the ACL: %w", err)
	}
	return nil
}

// accessIs reports whether setAccess would change nothing.
func accessIs(f *os.File, acl []byte) bool {
	if acl == nil {
		info, err := f.Stat()
		return err == nil && info.Mode().Perm() == 0o600
	}
	return bytes.Equal(getACL(f), acl)
}

func getACL(f *os.File) []byte {
	buffer := make([]byte, 64<<10)
	n, err := unix.Fgetxattr(int(f.Fd()), aclAttribute, buffer)
	if err != nil {
		return nil
	}
	return buffer[:n]
}

// hasACL reports whether the directory has an ACL; its group bits are then the
// ACL's mask and say nothing about the group.
func hasACL(dir *os.Root) bool {
	d, err := dir.Open(".")
	if err != nil {
		return false
	}
	defer d.Close()
	info, err := d.Stat()
	return err == nil && info.Mode().Perm()&0o002 == 0 && !slices.ContainsFunc(decodeACL(getACL(d)), func(e aclEntry) bool {
		return e.tag != aclUserObject && e.tag != aclMask && e.permission&write != 0
	}) && getACL(d) != nil
}

// addDirectoryReaders lets the named users and groups pass through the
// directory; entries for others stay.
func addDirectoryReaders(dir *os.Root, readers []byte) error {
	d, err := dir.Open(".")
	if err != nil {
		return fmt.Errorf("opening the directory: %w", err)
	}
	defer d.Close()
	info, err := d.Stat()
	if err != nil {
		return fmt.Errorf("reading the directory's mode: %w", err)
	}
	before := decodeACL(getACL(d))
	if len(before) == 0 {
		mode := uint16(info.Mode().Perm())
		before = []aclEntry{{aclUserObject, mode >> 6 & 7, aclNoID}, {aclGroupObject, mode >> 3 & 7, aclNoID}, {aclOther, mode & 7, aclNoID}}
	}
	after := map[[2]uint32]aclEntry{}
	mask := uint16(0)
	for _, e := range append(before, decodeACL(readers)...) {
		at := [2]uint32{uint32(e.tag), e.id}
		e.permission |= after[at].permission
		after[at] = e
		if e.tag == aclUser || e.tag == aclGroup || e.tag == aclGroupObject {
			mask |= e.permission
		}
	}
	after[[2]uint32{aclMask, aclNoID}] = aclEntry{aclMask, mask, aclNoID}
	entries := make([]aclEntry, 0, len(after))
	for _, e := range after {
		entries = append(entries, e)
	}
	acl := encodeACL(entries)
	if bytes.Equal(acl, getACL(d)) {
		return nil
	}
	if err := unix.Fsetxattr(int(d.Fd()), aclAttribute, acl, 0); err != nil {
		return fmt.Errorf("setting the directory's ACL: %w", err)
	}
	return nil
}

// blockedParent returns the first directory above path that lets only its
// owner and group through, so that ACL readers do not arrive; empty if none.
func blockedParent(path string) string {
	at := ""
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if info, err := os.Stat("/" + at); err == nil && info.Mode().Perm()&0o001 == 0 {
			return "/" + at
		}
		at = strings.TrimPrefix(at+"/"+part, "/")
	}
	return ""
}
