package keyvaultext

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Logs: a file a day, a new one after maxLogFile bytes, the newest maxLogFiles kept.
const (
	logPrefix   = "akvvm_service_"
	maxLogFile  = 5 << 20
	maxLogFiles = 8
)

// rotatingLog writes akvvm_service_DATE.log in a folder.
type rotatingLog struct {
	folder string
	limit  int64
	now    func() time.Time

	mu   sync.Mutex
	file *os.File
	date string
	size int64
}

// newLogger logs text lines, times in UTC, into folder.
func newLogger(folder string) (*slog.Logger, *rotatingLog) {
	w := &rotatingLog{folder: folder, limit: maxLogFile, now: time.Now}
	h := slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			a.Value = slog.StringValue(a.Value.Time().UTC().Format("2006-01-02T15:04:05.000Z"))
		}
		return a
	}})
	return slog.New(h), w
}

// Write appends one line, and begins a new file first when the day is over or
// the file is full.
func (w *rotatingLog) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	date := w.now().UTC().Format("2006-01-02")
	if w.file != nil && (date != w.date || w.size+int64(len(line)) > w.limit) {
		w.file.Close()
		w.file = nil
		if date == w.date {
			if err := w.setAside(); err != nil {
				return 0, err
			}
		}
	}
	if w.file == nil {
		if err := w.open(date); err != nil {
			return 0, err
		}
	}
	n, err := w.file.Write(line)
	w.size += int64(n)
	return n, err
}

func (w *rotatingLog) open(date string) error {
	if err := os.MkdirAll(w.folder, 0o755); err != nil {
		return fmt.Errorf("creating log folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(w.folder, logPrefix+date+".log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("opening log: %w", err)
	}
	w.file, w.date, w.size = f, date, info.Size()
	return w.prune()
}

// setAside names the full file of today by the time.
func (w *rotatingLog) setAside() error {
	from := filepath.Join(w.folder, logPrefix+w.date+".log")
	to := filepath.Join(w.folder, logPrefix+w.date+"."+w.now().UTC().Format("150405.000000000")+".log")
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("setting full log aside: %w", err)
	}
	return nil
}

func (w *rotatingLog) prune() error {
	entries, err := os.ReadDir(w.folder)
	if err != nil {
		return fmt.Errorf("listing logs: %w", err)
	}
	var names []string
	current := logPrefix + w.date + ".log"
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, logPrefix) && strings.HasSuffix(name, ".log") && name != current {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names[:max(0, len(names)-maxLogFiles+1)] {
		_ = os.Remove(filepath.Join(w.folder, name)) // tried again with the next file
	}
	return nil
}

// Close closes the file; the next Write opens it again.
func (w *rotatingLog) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}
