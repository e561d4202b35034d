package audit

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/effect"
)

var errClosed = errors.New("audit log is closed")

// maxBatch bounds how many requests share one fsync.
const maxBatch = 512

// request asks the writer for lines. Without items it asks for the head only.
type request struct {
	items   []item
	export  bool // the items come from the store and are still in it
	confirm bool // what was exported so far is no longer in the store
	head    Head // set by the writer
	done    chan error
}

type item struct {
	key    string
	record access.Record
}

// writer owns the file. Only the goroutine of Log.run touches it after Open.
type writer struct {
	path    string
	maxSize int64
	log     *slog.Logger

	file   *os.File // nil after a failure: opened again at the next write
	size   int64    // bytes of the file that are known to be on disk
	head   Head     // of the last line on disk
	open   int64    // Entry.Open of the next line
	failed bool     // the last write failed; so that the log says it once
}

func (l *Log) run(w *writer) {
	defer close(l.stopped)
	defer w.close()
	for {
		select {
		case q := <-l.requests:
			w.serve(l.gather(q))
		case <-l.stop:
			for { // what was accepted before the end
				select {
				case q := <-l.requests:
					w.serve(l.gather(q))
				default:
					return
				}
			}
		}
	}
}

// gather takes what else is waiting.
func (l *Log) gather(q *request) []*request {
	batch := append(make([]*request, 0, 16), q)
	for len(batch) < maxBatch {
		select {
		case q := <-l.requests:
			batch = append(batch, q)
		default:
			return batch
		}
	}
	return batch
}

// serve writes a batch and answers its requests.
func (w *writer) serve(batch []*request) {
	err := w.write(batch)
	if err != nil && !w.failed {
		w.log.Error("the audit file cannot be written: nothing that must be on record is served", "file", w.path, "error", err)
	} else if err == nil && w.failed {
		w.log.Info("the audit file can be written again", "file", w.path)
	}
	w.failed = err != nil
	for _, q := range batch {
		q.head = w.head
		q.done <- err
	}
	if err == nil && w.size >= w.maxSize && w.open == 0 {
		// Not while an export is open: its keys are looked for in the live file only.
		if err := w.rotate(); err != nil {
			w.log.Error("rotating the audit file", "file", w.path, "error", err)
		}
	}
}

func (w *writer) write(batch []*request) error {
	var (
		buf  []byte
		head = w.head
		open = w.open
		err  error
	)
	for _, q := range batch {
		if q.confirm {
			open = 0
		}
		if q.export && open == 0 {
			open = head.Seq + 1
		}
		for _, it := range q.items {
			if buf, head, err = appendLine(buf, head, open, it.key, it.record); err != nil {
				return err
			}
		}
	}
	if len(buf) > 0 {
		if err := w.commit(buf); err != nil {
			return err
		}
	}
	w.size, w.head, w.open = w.size+int64(len(buf)), head, open
	return nil
}

// commit puts bytes behind the known end. After a failure nothing is known about
// what lies behind that end, so the file is closed, and cut when opened again.
func (w *writer) commit(buf []byte) error {
	if w.file == nil {
		if err := w.reopen(); err != nil {
			return err
		}
	}
	err := effect.Do("append audit lines", func() error { _, err := w.file.Write(buf); return err })
	if err == nil {
		err = effect.Do("sync audit file", w.file.Sync)
	}
	if err != nil {
		w.close()
		return fmt.Errorf("writing audit file: %w", err)
	}
	return nil
}

// reopen opens the file at its known end.
func (w *writer) reopen() error {
	f, err := os.OpenFile(w.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("opening audit file: %w", err)
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case st.Size() < w.size:
		err = fmt.Errorf("audit file %s is shorter than what was written to it (%d of %d bytes): it was cut by somebody else", w.path, st.Size(), w.size)
	case st.Size() > w.size:
		err = effect.Do("cut unconfirmed audit lines", func() error { return f.Truncate(w.size) })
	}
	if err == nil {
		err = syncDir(filepath.Dir(w.path))
	}
	if err != nil {
		f.Close()
		return err
	}
	w.file = f
	return nil
}

// rotate gives the live file its final name and starts an empty one. Dying in
// between leaves no live file, which is how an empty one is read.
func (w *writer) rotate() error {
	w.close()
	name := rotatedName(w.path, w.head.Seq)
	if err := effect.Do("rename full audit file", func() error { return os.Rename(w.path, name) }); err != nil {
		return err
	}
	w.size = 0
	return w.reopen()
}

func (w *writer) close() {
	if w.file != nil {
		w.file.Close()
		w.file = nil
	}
}

// rotatedName is the name of a full file: with the number of its last line.
func rotatedName(path string, last int64) string {
	ext := filepath.Ext(path)
	return fmt.Sprintf("%s-%012d%s", strings.TrimSuffix(path, ext), last, ext)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("opening audit folder: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing audit folder: %w", err)
	}
	return nil
}
