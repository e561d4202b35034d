package etcd

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// A restore's transactions hold at most this much.
const (
	restoreOps   = 500
	restoreBytes = 4 << 20
)

// Restore makes the data directory dir, which must be absent or empty, from a
// backup: an embedded etcd, and the files of the header. It works in
// dir.restoring and renames that in the end, so a restore that was killed leaves
// nothing that a server starts from, and is run again. Before that it has tried every value with
// check, and compared what the new etcd holds with what was read.
//
// Revisions start anew and the store gets another incarnation.
func Restore(ctx context.Context, r io.Reader, dir string, check Check, log *slog.Logger) (Header, int, error) {
	dir = filepath.Clean(dir)
	if err := mustBeEmpty(dir); err != nil {
		return Header{}, 0, err
	}
	b, err := ReadBackup(r)
	if err != nil {
		return Header{}, 0, err
	}
	open, err := check(b.Header)
	if err != nil {
		return b.Header, 0, err
	}
	work := dir + ".restoring"
	if err := effect.Do("remove unfinished restore", func() error { return os.RemoveAll(work) }); err != nil {
		return b.Header, 0, fmt.Errorf("removing an unfinished restore: %w", err)
	}
	if err := fill(ctx, b, work, open, log); err != nil {
		_ = os.RemoveAll(work)
		return b.Header, 0, err
	}
	if err := writeFiles(work, b.Header.Files); err != nil {
		return b.Header, 0, err
	}
	return b.Header, b.entries, putInPlace(work, dir)
}

func mustBeEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking into %s: %w", dir, err)
	}
	if len(entries) > 0 {
		return fault.New(fault.Conflict, "", "%s is not empty; a restore does not touch what is there.", dir).
			WithFix("restore into a new directory, or move this one away")
	}
	return nil
}

// fill copies the records into a new etcd in dir and compares.
func fill(ctx context.Context, b *BackupReader, dir string, open func(string, []byte) error, log *slog.Logger) (err error) {
	target, err := Open(ctx, Config{Dir: dir, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	want := sha256.New()
	if err := load(ctx, b, target, open, want); err != nil {
		return err
	}
	got, n := sha256.New(), 0
	if _, err := target.scan(ctx, "", 0, func(kv *mvccpb.KeyValue) error {
		n++
		sumRecord(got, string(kv.Key), kv.Value)
		return nil
	}); err != nil {
		return err
	}
	if n != b.entries || string(got.Sum(nil)) != string(want.Sum(nil)) {
		return fmt.Errorf("comparing the restored store: %d entries of %d, or other values", n, b.entries)
	}
	return nil
}

// load reads all records, tries each value, and commits them in groups.
func load(ctx context.Context, b *BackupReader, target *Backend, open func(string, []byte) error, sum hash.Hash) error {
	var group []store.Write
	size := 0
	flush := func() error {
		if len(group) == 0 {
			return nil
		}
		err := effect.Do("commit restored entries", func() error {
			_, err := target.Commit(ctx, nil, group)
			return err
		})
		group, size = nil, 0
		return err
	}
	for {
		rec, err := b.Next()
		if errors.Is(err, io.EOF) {
			return flush()
		}
		if err != nil {
			return err
		}
		if err := open(rec.Key, rec.Value); err != nil {
			return err
		}
		sumRecord(sum, rec.Key, rec.Value)
		group = append(group, store.Write{Key: rec.Key, Value: rec.Value, TTL: time.Duration(rec.TTL) * time.Second})
		if size += len(rec.Value); len(group) == restoreOps || size > restoreBytes {
			if err := flush(); err != nil {
				return err
			}
		}
	}
}

// writeFiles puts the files of the header into dir, readable by the owner only.
func writeFiles(dir string, files map[string][]byte) error {
	for name, content := range files {
		if name == "" || name == "etcd" || name == "lock" || strings.HasPrefix(name, ".") || strings.ContainsAny(name, `/\`+"\x00") {
			return fault.New(fault.Invalid, "", "The backup has a file with the name %q, which is not a plain file name.", name)
		}
		err := effect.Do("write restored file", func() error {
			f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			_, err = f.Write(content)
			return errors.Join(err, f.Sync(), f.Close())
		})
		if err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
	}
	return syncDir(dir)
}

// putInPlace makes work the directory dir.
func putInPlace(work, dir string) error {
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("replacing %s: %w", dir, err) // not empty any more
	}
	if err := effect.Do("rename restored directory", func() error { return os.Rename(work, dir) }); err != nil {
		return fmt.Errorf("replacing %s: %w", dir, err)
	}
	return syncDir(filepath.Dir(dir))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("opening %s: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("syncing %s: %w", dir, err)
	}
	return nil
}
