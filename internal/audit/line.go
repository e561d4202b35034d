package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"keyfleet.dev/keyfleet/internal/access"
)

// Entry is one line of an audit file.
type Entry struct {
	Seq    int64         `json:"seq"`            // from 1, without gaps, across files
	Prev   string        `json:"prev"`           // hash of the line before; 64 zeros for the first
	Open   int64         `json:"open,omitempty"` // seq of the first exported line whose removal from the store is not yet known to have happened
	Key    string        `json:"key,omitempty"`  // for a record that was committed with a change: its id in the store
	Record access.Record `json:"record"`
	Hash   string        `json:"-"` // of this line, from its end
}

// Head names a place in the chain. The zero Head is the place before the first line.
type Head struct {
	Seq  int64
	Hash string
}

// A line ends with its hash. The hash covers the bytes before it, so checking
// needs no canonical form of JSON.
const (
	hashMark = `,"hash":"`
	hashTail = len(hashMark) + 2*sha256.Size + len(`"}`)
	maxLine  = 256 << 10 // ten clipped fields, each byte escaped in the worst case
)

var noHash = strings.Repeat("0", 2*sha256.Size)

func (h Head) hash() string {
	if h.Hash == "" {
		return noHash
	}
	return h.Hash
}

// appendLine appends the line that follows head and returns the new head.
func appendLine(buf []byte, head Head, open int64, key string, r access.Record) ([]byte, Head, error) {
	e := Entry{Seq: head.Seq + 1, Prev: head.hash(), Open: open, Key: key, Record: clip(r)}
	b, err := json.Marshal(e)
	if err != nil {
		return buf, head, fmt.Errorf("encoding audit record: %w", err)
	}
	b = b[:len(b)-1]
	sum := sha256.Sum256(b)
	next := Head{Seq: e.Seq, Hash: hex.EncodeToString(sum[:])}
	buf = append(append(append(append(buf, b...), hashMark...), next.Hash...), '"', '}', '\n')
	return buf, next, nil
}

// clip bounds what callers can put into a record (a path may be long), so that
// a line always fits maxLine.
func clip(r access.Record) access.Record {
	const most = 2048
	for _, s := range []*string{
		&r.Reason, &r.ObjectID, &r.ClientID, &r.Name, &r.Action, &r.Resource,
		&r.Detail, &r.RequestID, &r.CorrelationID, &r.RemoteAddr,
	} {
		if len(*s) > most {
			*s = strings.ToValidUTF8((*s)[:most], "") + "..."
		}
	}
	return r
}

// parseLine parses one line without its newline and checks its own hash.
func parseLine(line []byte) (Entry, error) {
	var e Entry
	n := len(line) - hashTail
	if n <= 0 || !bytes.HasPrefix(line[n:], []byte(hashMark)) || !bytes.HasSuffix(line, []byte(`"}`)) {
		return e, errors.New("the line does not end with its hash")
	}
	e.Hash = string(line[n+len(hashMark) : len(line)-2])
	sum := sha256.Sum256(line[:n])
	if e.Hash != hex.EncodeToString(sum[:]) {
		return e, errors.New("the line's hash does not fit its content")
	}
	d := json.NewDecoder(io.MultiReader(bytes.NewReader(line[:n]), strings.NewReader("}")))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return e, fmt.Errorf("the line is not an audit entry: %w", err)
	}
	if d.More() || e.Seq < 1 || len(e.Prev) != 2*sha256.Size {
		return e, errors.New("the line is not an audit entry")
	}
	return e, nil
}

// follows checks that e is the line after head.
func (h Head) follows(e Entry) error {
	switch {
	case e.Seq != h.Seq+1:
		return fmt.Errorf("line %d follows line %d: lines are missing, doubled or out of order", e.Seq, h.Seq)
	case e.Prev != h.hash():
		return fmt.Errorf("line %d does not continue the chain of line %d", e.Seq, h.Seq)
	}
	return nil
}

// Verify checks a whole audit file: every line's hash, and that the lines form
// one chain. It returns the places of the first and of the last line; the
// first is compared with nothing, so pass several files to [VerifyFiles].
// A cut end cannot be seen in the file alone: compare last with the anchor that
// the store keeps (package comment).
func Verify(r io.Reader) (first, last Head, err error) {
	err = scan(r, func(e Entry) error {
		if first.Seq == 0 {
			first = Head{e.Seq, e.Hash}
			if e.Seq == 1 && e.Prev != noHash {
				return errors.New("line 1 claims a line before it")
			}
		} else if err := last.follows(e); err != nil {
			return err
		}
		last = Head{e.Seq, e.Hash}
		return nil
	})
	return first, last, err
}

// scan calls fn for every line of r.
func scan(r io.Reader, fn func(Entry) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), maxLine)
	s.Split(fullLines)
	for n := 1; s.Scan(); n++ {
		e, err := parseLine(s.Bytes())
		if err == nil {
			err = fn(e)
		}
		if err != nil {
			return fmt.Errorf("audit file, line %d of the file: %w", n, err)
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("reading audit file: %w", err)
	}
	return nil
}

var errTorn = errors.New("the last line is torn")

// fullLines is bufio.ScanLines without mercy for a last line that has no newline.
func fullLines(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return 0, nil, errTorn
	}
	return 0, nil, nil
}
