package etcdadmin

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Database is a copy of the database file of an etcd that need not run. It
// is kept in memory alone: it holds secrets. Close it after use.
type Database struct {
	file *os.File
}

// NewDatabase makes an empty copy to write to.
func NewDatabase() (*Database, error) {
	f, err := memoryFile()
	if err != nil {
		return nil, err
	}
	return &Database{f}, nil
}

// Write appends to the copy.
func (d *Database) Write(p []byte) (int, error) { return d.file.Write(p) }

// Close forgets the copy.
func (d *Database) Close() error { return d.file.Close() }

// Values returns the keys with a prefix and what they hold, at the last revision
// in the file. The layout is that of etcd's storage: in the bucket "key", a key is
// a revision, with "t" at the end where something was deleted, and the value a
// mvccpb.KeyValue.
func (d *Database) Values(prefix string) (values map[string][]byte, err error) {
	// bbolt maps the file into memory and takes it to be whole: where it is not, it
	// panics or reads past the end. A copy of a file that was written to may not be.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("it is damaged: %v", r)
		}
		if err != nil {
			err = fault.New(fault.Unavailable, "BadDatabase", "The database file of etcd cannot be read.").Because(err).
				WithFix("run the same command again; if it stays so, give another master as --ssh-host")
		}
	}()
	again, err := reopen(d.file) // bbolt closes what it is given
	if err != nil {
		return nil, err
	}
	db, err := bbolt.Open("etcd", 0o600, &bbolt.Options{
		ReadOnly: true, Timeout: time.Second,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return again, nil },
	})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	values = map[string][]byte{}
	return values, db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("key"))
		if b == nil {
			return errors.New("it has no bucket of keys")
		}
		return b.ForEach(func(revision, value []byte) error { return last(values, prefix, revision, value) })
	})
}

// last keeps what the latest revision says of a key; entries come in their order.
func last(values map[string][]byte, prefix string, revision, value []byte) error {
	var kv mvccpb.KeyValue
	if err := proto.Unmarshal(value, &kv); err != nil {
		return fmt.Errorf("an entry of it is damaged: %w", err)
	}
	switch {
	case !bytes.HasPrefix(kv.Key, []byte(prefix)):
	case len(revision) > revisionBytes:
		delete(values, string(kv.Key))
	default:
		values[string(kv.Key)] = kv.Value
	}
	return nil
}

// revisionBytes is the length of a revision: two numbers of eight bytes, and a "_".
const revisionBytes = 17
