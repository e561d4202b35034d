package etcd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
	"keyfleet.dev/keyfleet/internal/store"
)

// A backup is text, one JSON document a line, so that it can be looked at with
// what every machine has. Values stay as the backend holds them: sealed.
//
//	{"format":"keyfleet-backup-1","revision":812,"created":"2026-11-21T02:00:00Z","files":{"keyset.json":"eyJ..."}}
//	{"key":"/secrets/prod1/web","value":"AWx3..."}
//	{"key":"/operations/4711","value":"AWx3...","ttl":1740}
//	{"entries":2,"sha256":"9f86d0..."}            of all lines above
//
// What is not in it: elections, which belong to processes; the incarnation, so
// that the restored store gets a new one; and the KEK, unless the caller puts it
// among the files. The digest finds damage; that a value was not exchanged is
// found by opening it, since its key is part of its seal.

// backupFormat names the format and its version.
const backupFormat = "keyfleet-backup-1"

// maxLine is the longest line of a backup: a value of full size in base64, its
// key, and room for the files of the header.
const maxLine = 4 << 20

// leftOut are the prefixes of keys that do not outlive a restore.
func leftOut(key string) bool {
	return strings.HasPrefix(key, "/leader/") || key == store.IncarnationKey
}

// Header is the first line of a backup.
type Header struct {
	Format   string            `json:"format"`
	Revision int64             `json:"revision"` // all entries are as they were at this revision
	Created  time.Time         `json:"created"`
	Files    map[string][]byte `json:"files,omitempty"` // files of the data directory that belong to it, by name
}

// Record is one key of a backup.
type Record struct {
	Key   string `json:"key"`
	Value []byte `json:"value"`
	TTL   int64  `json:"ttl,omitempty"` // seconds left at the time of the backup; 0: stays
}

// trailer is the last line.
type trailer struct {
	Entries int    `json:"entries"`
	SHA256  string `json:"sha256"`
}

// line is any line after the header: a Record or the trailer.
type line struct {
	Record
	trailer
}

// Backup writes everything in b as of one revision to w. It may run while the
// server works. files are put into the header, by name: the wrapped keyset
// belongs there, and must not change meanwhile.
func Backup(ctx context.Context, b *Backend, w io.Writer, files map[string][]byte) (Header, error) {
	out := &backupWriter{w: bufio.NewWriter(w), sum: sha256.New()}
	head, err := b.client.Get(ctx, "/meta/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return Header{}, b.explain(ctx, "reading the revision", err)
	}
	h := Header{Format: backupFormat, Revision: head.Header.Revision, Created: time.Now().UTC().Truncate(time.Second), Files: files}
	if err := out.line(h); err != nil {
		return h, err
	}
	ttls := map[int64]int64{} // seconds left by lease
	n := 0
	_, err = b.scan(ctx, "", h.Revision, func(kv *mvccpb.KeyValue) error {
		if leftOut(string(kv.Key)) {
			return nil
		}
		ttl, err := b.timeLeft(ctx, kv.Lease, ttls)
		if err != nil || ttl < 0 {
			return err // gone by itself since the revision
		}
		n++
		return out.line(Record{Key: string(kv.Key), Value: kv.Value, TTL: ttl})
	})
	if err != nil {
		return h, err
	}
	return h, out.end(n)
}

// timeLeft returns the seconds a lease has left, 0 for none, -1 if it is over.
func (b *Backend) timeLeft(ctx context.Context, lease int64, known map[int64]int64) (int64, error) {
	if lease == 0 {
		return 0, nil
	}
	if ttl, ok := known[lease]; ok {
		return ttl, nil
	}
	resp, err := b.client.TimeToLive(ctx, clientv3.LeaseID(lease))
	if err != nil {
		return 0, b.explain(ctx, "reading a lease", err)
	}
	known[lease] = max(resp.TTL, -1)
	if resp.TTL == 0 {
		known[lease] = -1
	}
	return known[lease], nil
}

// backupWriter writes lines and sums them up.
type backupWriter struct {
	w   *bufio.Writer
	sum hash.Hash
}

func (b *backupWriter) line(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding a backup: %w", err)
	}
	text = append(text, '\n')
	if len(text) > maxLine {
		return fault.New(fault.TooLarge, "", "A line of the backup would have %d bytes, and the limit is %d.", len(text), maxLine)
	}
	b.sum.Write(text)
	if _, err := b.w.Write(text); err != nil {
		return fmt.Errorf("writing a backup: %w", err)
	}
	return nil
}

func (b *backupWriter) end(entries int) error {
	if err := b.line(trailer{Entries: entries, SHA256: hex.EncodeToString(b.sum.Sum(nil))}); err != nil {
		return err
	}
	if err := b.w.Flush(); err != nil {
		return fmt.Errorf("writing a backup: %w", err)
	}
	return nil
}

// BackupReader reads a backup. Its content counts only once Next has returned io.EOF.
type BackupReader struct {
	Header Header

	in      *bufio.Reader
	sum     hash.Hash
	line    int
	entries int
	last    string // key of the record before
	done    bool
}

// ReadBackup reads the header of a backup.
func ReadBackup(r io.Reader) (*BackupReader, error) {
	b := &BackupReader{in: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	text, err := b.text()
	if err != nil {
		return nil, err
	}
	if err := jsonstrict.Decode(text, &b.Header); err != nil || b.Header.Format != backupFormat {
		return nil, b.broken("the first line is not the header of a backup of format %q", backupFormat)
	}
	b.sum.Write(text)
	return b, nil
}

// Next returns the next record, or io.EOF after the last, when the digest and
// the number of entries are right and nothing follows them.
func (b *BackupReader) Next() (Record, error) {
	if b.done {
		return Record{}, io.EOF
	}
	text, err := b.text()
	if err != nil {
		return Record{}, err
	}
	var l line
	if err := jsonstrict.Decode(text, &l); err != nil {
		return Record{}, b.broken("it is not a record: %s", err)
	}
	if l.SHA256 != "" {
		return Record{}, b.finish(l)
	}
	switch {
	case !strings.HasPrefix(l.Key, "/") || leftOut(l.Key) || l.Entries != 0 || l.TTL < 0:
		return Record{}, b.broken("it is not a record")
	case l.Key <= b.last:
		return Record{}, b.broken("key %q is out of order", l.Key)
	case len(l.Value) == 0:
		return Record{}, b.broken("key %q has no value", l.Key)
	}
	b.sum.Write(text)
	b.entries++
	b.last = l.Key
	return l.Record, nil
}

func (b *BackupReader) finish(l line) error {
	if l.Key != "" || l.Value != nil || l.TTL != 0 {
		return b.broken("it is a record and an end at once")
	}
	if l.Entries != b.entries || l.SHA256 != hex.EncodeToString(b.sum.Sum(nil)) {
		return b.broken("the digest does not fit: the file was changed or is not whole")
	}
	if _, err := b.in.ReadByte(); !errors.Is(err, io.EOF) {
		return b.broken("something follows the end")
	}
	b.done = true
	return io.EOF
}

// text returns the next line with its newline.
func (b *BackupReader) text() ([]byte, error) {
	b.line++
	var out []byte
	for {
		part, err := b.in.ReadSlice('\n')
		out = append(out, part...)
		switch {
		case len(out) > maxLine:
			return nil, b.broken("it is longer than %d bytes", maxLine)
		case err == nil:
			return out, nil
		case errors.Is(err, io.EOF):
			return nil, b.broken("the file ends too early")
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("reading the backup: %w", err)
		}
	}
}

func (b *BackupReader) broken(format string, args ...any) error {
	return fault.New(fault.Invalid, "", "The backup cannot be used: line %d: %s.", b.line, fmt.Sprintf(format, args...)).
		WithFix("use another backup")
}

// Check looks whether a backup is whole and usable: open gets the header, with
// the wrapped keyset, and returns the function that tries each value.
type Check func(Header) (open func(key string, value []byte) error, err error)

// Verify reads a whole backup and tries every value. It returns the header and
// the number of entries.
func Verify(r io.Reader, check Check) (Header, int, error) {
	b, err := ReadBackup(r)
	if err != nil {
		return Header{}, 0, err
	}
	open, err := check(b.Header)
	if err != nil {
		return b.Header, 0, err
	}
	for {
		rec, err := b.Next()
		if errors.Is(err, io.EOF) {
			return b.Header, b.entries, nil
		}
		if err != nil {
			return b.Header, 0, err
		}
		if err := open(rec.Key, rec.Value); err != nil {
			return b.Header, 0, err
		}
	}
}

// sumRecord adds an entry to a digest that is the same before and after a restore.
func sumRecord(h hash.Hash, key string, value []byte) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%d %s %d ", len(key), key, len(value))
	h.Write(b.Bytes())
	h.Write(value)
}
