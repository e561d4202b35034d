package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// Record is one line of a journal.
type Record struct {
	At    time.Time       `json:"at"`
	Event string          `json:"event"`
	Step  string          `json:"step,omitempty"`
	Text  string          `json:"text,omitempty"`  // of "failed": the error
	Name  string          `json:"name,omitempty"`  // of "set"
	Value json.RawMessage `json:"value,omitempty"` // of "set"
}

// Journal is an open journal. It is for one goroutine, and one process: a file is
// locked. Make it with [Open] or [Replay].
type Journal struct {
	path   string
	file   *os.File                // nil: keep has the lines
	keep   func(line string) error // makes a line durable
	last   string                  // hash of the last line
	broken error                   // why nothing can be appended any more; nil: it can
	state  State
	values map[string]json.RawMessage
}

// maxJournal is the largest journal that is read, in bytes.
const maxJournal = 64 << 20

// Open opens a journal, or makes an empty one with mode 0600. A journal that is
// open elsewhere is a fault.Conflict; a broken one a fault.Invalid.
func Open(path string) (*Journal, error) {
	_, err := os.Stat(path)
	isNew := errors.Is(err, fs.ErrNotExist)
	var f *os.File
	err = effect.Do("open journal", func() (err error) {
		f, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
		if err == nil && isNew {
			err = syncDir(filepath.Dir(path))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("opening the journal: %w", err)
	}
	j := &Journal{path: path, file: f, state: State{Steps: map[string]Status{}}, values: map[string]json.RawMessage{}}
	j.keep = j.write
	if err := j.read(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return j, nil
}

// Replay opens a journal whose lines are kept elsewhere, without their line ends,
// under a name for errors. keep is given each new line; when it returns nil the
// line is durable, and whoever reads the lines next gets it. A broken journal is a fault.Invalid.
func Replay(name string, lines []string, keep func(line string) error) (*Journal, error) {
	var content bytes.Buffer
	for _, l := range lines {
		content.WriteString(l + "\n")
	}
	records, last, _, err := parse(content.Bytes())
	if err != nil {
		return nil, fault.New(fault.Invalid, "", "The journal %s cannot be used: %s.", name, err)
	}
	j := &Journal{path: name, keep: keep, last: last, state: State{Steps: map[string]Status{}}, values: map[string]json.RawMessage{}}
	for _, r := range records {
		j.apply(r)
	}
	return j, nil
}

// write appends a line to the file.
func (j *Journal) write(line string) error {
	return effect.Do("append journal record", func() error {
		if _, err := j.file.WriteString(line + "\n"); err != nil {
			return err
		}
		return j.file.Sync()
	})
}

// read locks the file, replays it, and drops an unfinished last line.
func (j *Journal) read() error {
	if err := lock(j.file); err != nil {
		return fault.New(fault.Conflict, "", "The journal %s is in use by another process.", j.path).
			WithFix("wait for it, or end it").Because(err)
	}
	content, err := io.ReadAll(io.LimitReader(j.file, maxJournal+1))
	if err != nil {
		return fmt.Errorf("reading the journal: %w", err)
	}
	if len(content) > maxJournal {
		return fault.New(fault.TooLarge, "", "The journal %s is larger than %d bytes.", j.path, maxJournal)
	}
	records, last, whole, err := parse(content)
	if err != nil {
		return fault.New(fault.Invalid, "", "The journal %s cannot be used: %s.", j.path, err).
			WithFix("put back an unchanged copy of it")
	}
	for _, r := range records {
		j.apply(r)
	}
	j.last = last
	if whole == len(content) {
		return nil
	}
	err = effect.Do("drop unfinished journal line", func() error {
		return errors.Join(j.file.Truncate(int64(whole)), j.file.Sync())
	})
	if err != nil {
		return fmt.Errorf("dropping an unfinished line of the journal: %w", err)
	}
	return nil
}

// parse returns the records of a journal, the hash of the last, and how many
// bytes of content they take: what follows is an unfinished line.
func parse(content []byte) (records []Record, last string, whole int, err error) {
	for n := 1; whole < len(content); n++ {
		rest := content[whole:]
		end := bytes.IndexByte(rest, '\n')
		if end < 0 {
			return records, last, whole, nil
		}
		hash, text, ok := bytes.Cut(rest[:end], []byte(" "))
		final := whole+end+1 == len(content)
		if final && bytes.IndexByte(rest, 0) >= 0 { // blocks that did not reach the disk read as zeros
			return records, last, whole, nil
		}
		if !ok || string(hash) != chain(last, text) {
			return nil, "", 0, fmt.Errorf("line %d was changed, or does not follow the line before it", n)
		}
		var r Record
		if err := jsonstrict.Decode(text, &r); err != nil {
			return nil, "", 0, fmt.Errorf("line %d: %w", n, err)
		}
		records, last, whole = append(records, r), string(hash), whole+end+1
	}
	return records, last, whole, nil
}

// chain returns the hash of a line after the one with the hash last.
func chain(last string, text []byte) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n", last)
	h.Write(text)
	return hex.EncodeToString(h.Sum(nil))
}

// append writes a record and returns when it is durable.
func (j *Journal) append(r Record) error {
	if j.broken != nil {
		return j.broken
	}
	r.At = time.Now().UTC().Truncate(time.Millisecond)
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding a journal record: %w", err)
	}
	hash := chain(j.last, text)
	if err := j.keep(hash + " " + string(text)); err != nil {
		// Part of the line may be there; opening the journal again drops it.
		j.broken = fmt.Errorf("writing the journal: %w", err)
		return j.broken
	}
	j.last = hash
	j.apply(r)
	return nil
}

func (j *Journal) apply(r Record) {
	if r.Event == "set" {
		j.values[r.Name] = r.Value
	}
	j.state.apply(r)
}

// State returns how far the change is. The caller must not change it.
func (j *Journal) State() State { return j.state }

// Hash is the hash of the last record: of the whole journal, since each line's
// covers the one before.
func (j *Journal) Hash() string { return j.last }

// Set keeps a value under a name, on disk when it returns: what later steps need
// and cannot look up. The journal does not encrypt; secrets must be encrypted before.
func (j *Journal) Set(name string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding %s for the journal: %w", name, err)
	}
	return j.append(Record{Event: "set", Name: name, Value: text})
}

// Get decodes the value under the name into v; ok is false if there is none.
func (j *Journal) Get(name string, v any) (ok bool, err error) {
	text, ok := j.values[name]
	if !ok {
		return false, nil
	}
	if err := json.Unmarshal(text, v); err != nil {
		return false, fmt.Errorf("decoding %s of the journal: %w", name, err)
	}
	return true, nil
}

// Close gives the file back, if there is one.
func (j *Journal) Close() error {
	if j.file == nil {
		return nil
	}
	return j.file.Close()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
