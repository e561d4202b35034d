// Package audit keeps the record of who did what.
//
// Idea: there is one audit file, a chain of JSON lines in which each line
// carries the hash of the one before. Reads are recorded in it directly: many
// concurrent reads share one write and one fsync (group commit), and each
// returns only when its line is on disk. Changes are recorded in the store, in
// the transaction that makes the change; the [Exporter] moves these records
// into the file in the order of their commits and removes them from the store.
//
//	read    ──Append──────────────────────────┐ one write, one fsync for many
//	                                          ├──> {"seq":8,"prev":"..","record":{..},"hash":".."}
//	change  ──InTx──> store ──Exporter────────┘    audit.jsonl, then audit-000000000001.jsonl ...
//
// Invariant: a read whose line is not on disk is refused; a committed change
// has exactly one record. A line that was once followed by another cannot be
// cut, altered or moved without [Verify] seeing it. The end of the file is
// anchored in the store (sequence number and hash, with every export and at
// least once a minute), so a cut end is seen too: at the next start the loss
// itself goes on record, as action "Keyfleet/audit/gap".
//
// What it does not do: somebody who can rewrite both the file and the store
// can forge. Each server has its own file; the records of changes are in the
// file of the server that led when they were exported. After a restore from a
// backup a change that was just being exported may stand twice, with the same key.
//
// Consequence for the operator: when the file cannot be written, nothing that
// must be on record is served, and the refusal says so. Rotated files are not
// read again by the server except for searches; archive them as you like.
package audit

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Config is what a Log needs.
type Config struct {
	Path    string           // the live file; its folder must exist. Required
	MaxSize int64            // in bytes; a larger file is rotated. Zero: 64 MiB
	Name    string           // the anchor is kept under it, so it differs between servers that share a store. Empty: made of host and folder
	Now     func() time.Time // for the Log's own records; nil: time.Now
	Log     *slog.Logger     // nil: slog.Default()
}

// Log is an open audit file. It implements access.Recorder. One goroutine, from
// [Open] to [Log.Close], owns the file.
type Log struct {
	cfg      Config
	requests chan *request
	stop     chan struct{} // closed by Close
	stopped  chan struct{} // closed when the writer has ended

	// exported holds the keys of records that the file's end holds and the store
	// may still hold too: the exporter died between the two. Written by Open,
	// used by the Exporter.
	exported map[string]bool
}

// Records is the collection of records of committed changes that are not yet
// in the file; ids are ordered by time.
var Records = store.NewCollection[access.Record, struct{}]("audit")

// Anchor is the last known end of a server's audit file.
type Anchor struct {
	Seq  int64  `json:"seq"`
	Hash string `json:"hash"`
}

// Anchors is the collection of anchors, by server name.
var Anchors = store.NewCollection[Anchor, struct{}]("auditanchors")

// Open opens or creates the audit file, repairs a torn last line, checks the
// chain of the file's end and starts the writer. A complete line that does not
// fit its hash is not repaired: the error names the file and what to do.
func Open(cfg Config) (*Log, error) {
	if cfg.MaxSize == 0 {
		cfg.MaxSize = 64 << 20
	}
	if cfg.Name == "" {
		name, err := defaultName(cfg.Path)
		if err != nil {
			return nil, err
		}
		cfg.Name = name
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	end, err := recoverFile(cfg.Path)
	if err != nil {
		return nil, err
	}
	l := &Log{
		cfg: cfg, requests: make(chan *request, 256), stop: make(chan struct{}), stopped: make(chan struct{}), exported: end.keys,
	}
	w := &writer{path: cfg.Path, maxSize: cfg.MaxSize, log: cfg.Log, size: end.size, head: end.head, open: end.open}
	if err := w.reopen(); err != nil {
		return nil, err
	}
	go l.run(w)
	if end.cut > 0 {
		err := l.Append(context.Background(), l.own("Keyfleet/audit/repair", fmt.Sprintf("%d bytes of a line that was never confirmed were cut off", end.cut)))
		if err != nil {
			l.Close()
			return nil, err
		}
	}
	return l, nil
}

// defaultName tells this server's file from those of other servers.
func defaultName(path string) (string, error) {
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return "", fmt.Errorf("finding the audit folder: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("finding the host's name: %w", err)
	}
	sum := sha256.Sum256([]byte(dir))
	return host + "-" + hex.EncodeToString(sum[:4]), nil
}

// Close writes what was accepted, and closes the file. Later calls of Append fail.
func (l *Log) Close() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	<-l.stopped
}

// Append implements access.Recorder: it returns nil only when the record is on disk.
func (l *Log) Append(ctx context.Context, r access.Record) error {
	return l.do(ctx, &request{items: []item{{record: r}}})
}

// InTx implements access.Recorder: the record is committed with tx, and moved
// to the file by the [Exporter].
func (l *Log) InTx(tx *store.Tx, r access.Record) error {
	var b [6]byte
	rand.Read(b[:])
	id := fmt.Sprintf("%016x-%s", r.Time.UnixNano(), hex.EncodeToString(b[:]))
	return Records.Insert(tx, &store.Object[access.Record, struct{}]{Meta: store.Meta{ID: id}, Spec: clip(r)})
}

// Head returns the end of the chain as it is on disk.
func (l *Log) Head(ctx context.Context) (Head, error) {
	q := &request{}
	if err := l.do(ctx, q); err != nil {
		return Head{}, err // the writer may still be at q
	}
	return q.head, nil
}

func (l *Log) do(ctx context.Context, q *request) error {
	q.done = make(chan error, 1)
	select {
	case l.requests <- q:
	case <-l.stop:
		return l.unavailable(errClosed)
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-q.done:
		if err != nil {
			return l.unavailable(err)
		}
		return nil
	case <-l.stopped:
		select {
		case err := <-q.done: // answered just before the end
			if err == nil {
				return nil
			}
			return l.unavailable(err)
		default:
			return l.unavailable(errClosed)
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *Log) unavailable(err error) error {
	return fault.New(fault.Unavailable, "AuditUnavailable", "The request was not served because it could not be put on record.").
		WithFix("on the server: free space for the audit file %s or correct its permissions", filepath.Base(l.cfg.Path)).
		After(5 * time.Second).Because(err)
}

// own makes a record of the Log about itself.
func (l *Log) own(action, detail string) access.Record {
	p := access.SystemPrincipal("audit")
	return access.Record{
		Time: l.cfg.Now().UTC(), Outcome: "allowed", Kind: p.Kind, ObjectID: p.ObjectID, Name: p.Name,
		Action: action, Resource: "/", Detail: detail,
	}
}
