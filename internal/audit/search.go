package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
)

// Query narrows a search. The zero value finds the newest records.
type Query struct {
	Since, Until time.Time // zero: no bound
	Principal    string    // object id, client id or name
	Action       string    // with * for any run of characters: "secrets/*"
	Resource     string    // the resource or what it lies under
	Outcome      string    // "allowed" or "denied"
	RequestID    string    // request or correlation id
	Limit        int       // newest that are returned; zero: 100, at most 1000
}

// Reader lets people read the audit file.
type Reader struct {
	Log  *Log
	Gate *access.Gate
}

// Search returns the newest entries that fit, oldest first. The caller needs
// Keyfleet/audit/read; the search goes on record itself.
func (r Reader) Search(ctx context.Context, q Query) ([]Entry, error) {
	if err := r.Gate.Read(ctx, access.Op{Action: "Keyfleet/audit/read", Resource: "/"}); err != nil {
		return nil, err
	}
	return r.Log.search(ctx, q)
}

func (l *Log) search(ctx context.Context, q Query) ([]Entry, error) {
	if q.Limit <= 0 {
		q.Limit = 100
	}
	q.Limit = min(q.Limit, 1000)
	files, err := rotatedFiles(l.cfg.Path)
	if err != nil {
		return nil, err
	}
	files = append(files, l.cfg.Path)
	var out []Entry
	for i := len(files) - 1; i >= 0 && len(out) < q.Limit; i-- { // newest file first
		found, older, err := q.in(ctx, files[i], q.Limit-len(out))
		if err != nil {
			return nil, err
		}
		out = append(found, out...)
		if older {
			break
		}
	}
	return out, nil
}

// in returns the newest entries of one file that fit. older is true when the
// file begins before Since, so that no older file can hold more.
func (q Query) in(ctx context.Context, path string, limit int) (out []Entry, older bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("opening audit file: %w", err)
	}
	defer f.Close()
	first := true
	err = scanWritten(f, func(e Entry) error {
		if first {
			first, older = false, e.Record.Time.Before(q.Since)
		}
		if e.Seq%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if !q.fits(e.Record) {
			return nil
		}
		out = append(out, e)
		if len(out) >= 2*limit { // forget the older half, so that memory stays bounded
			out = append(out[:0], out[len(out)-limit:]...)
		}
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	return out[max(0, len(out)-limit):], older, nil
}

// scanWritten is scan for a file that is being written: a torn end is its end.
func scanWritten(f *os.File, fn func(Entry) error) error {
	err := scan(f, fn)
	if errors.Is(err, errTorn) {
		return nil
	}
	return err
}

func (q Query) fits(r access.Record) bool {
	same := strings.EqualFold
	return (q.Since.IsZero() || !r.Time.Before(q.Since)) &&
		(q.Until.IsZero() || r.Time.Before(q.Until)) &&
		(q.Principal == "" || same(q.Principal, r.ObjectID) || same(q.Principal, r.ClientID) || same(q.Principal, r.Name)) &&
		(q.Action == "" || access.Role{Actions: []string{q.Action}}.Allows(r.Action)) &&
		(q.Resource == "" || under(q.Resource, r.Resource)) &&
		(q.Outcome == "" || same(q.Outcome, r.Outcome)) &&
		(q.RequestID == "" || q.RequestID == r.RequestID || q.RequestID == r.CorrelationID)
}

func under(scope, resource string) bool {
	scope, resource = strings.ToLower(strings.TrimRight(scope, "/")), strings.ToLower(resource)
	return resource == scope || strings.HasPrefix(resource, scope+"/")
}

// findLine finds the line with the number in the files.
func findLine(path string, seq int64) (Entry, bool, error) {
	files, err := rotatedFiles(path)
	if err != nil {
		return Entry{}, false, err
	}
	files = append(files, path)
	for i := len(files) - 1; i >= 0; i-- {
		e, found, past, err := findIn(files[i], seq)
		if err != nil || found || past {
			return e, found, err
		}
	}
	return Entry{}, false, nil
}

// findIn looks in one file. past is true when the file begins at or before the
// line, so that no older file can hold it.
func findIn(path string, seq int64) (out Entry, found, past bool, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return out, false, false, nil
	}
	if err != nil {
		return out, false, false, fmt.Errorf("opening audit file: %w", err)
	}
	defer f.Close()
	done := errors.New("done")
	err = scanWritten(f, func(e Entry) error {
		past = past || e.Seq <= seq
		if e.Seq == seq {
			out, found = e, true
		}
		if e.Seq >= seq {
			return done
		}
		return nil
	})
	if errors.Is(err, done) {
		err = nil
	}
	return out, found, past, err
}
