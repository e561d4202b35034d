package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/fault"
)

// fileEnd is what the end of the files says.
type fileEnd struct {
	size int64           // of the live file, without a torn line
	cut  int64           // bytes of a torn line that were cut off
	head Head            // of the last line of all files
	open int64           // first line of an export whose removal from the store is unknown
	keys map[string]bool // keys of that export
}

// tailCheck is how much of a file's end is checked when it is opened, in bytes.
const tailCheck = 64 << 10

// recoverFile reads the end of the live file, or of the last rotated one if the
// live one is absent or empty, and cuts a torn last line.
func recoverFile(path string) (fileEnd, error) {
	end := fileEnd{keys: map[string]bool{}}
	size, cut, err := cutTorn(path)
	if err != nil {
		return end, err
	}
	end.size, end.cut = size, cut
	from := path
	if size == 0 {
		rotated, err := rotatedFiles(path)
		if err != nil {
			return end, err
		}
		if len(rotated) == 0 {
			return end, nil
		}
		from = rotated[len(rotated)-1]
	}
	entries, err := tail(from)
	if err != nil || len(entries) == 0 {
		return end, err
	}
	last := entries[len(entries)-1]
	end.head, end.open = Head{last.Seq, last.Hash}, last.Open
	for _, e := range entries {
		if last.Open > 0 && e.Seq >= last.Open && e.Key != "" {
			end.keys[e.Key] = true
		}
	}
	return end, nil
}

// cutTorn removes what follows the last newline. It was never confirmed to
// anybody, for a line is confirmed only after an fsync of the whole of it.
func cutTorn(path string) (size, cut int64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("opening audit file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, 0, fmt.Errorf("opening audit file: %w", err)
	}
	for n := int64(maxLine); ; n *= 2 {
		window, err := lastBytes(f, st.Size(), n)
		if err != nil {
			return 0, 0, err
		}
		newline := bytes.LastIndexByte(window, '\n')
		cut = int64(len(window) - 1 - newline)
		if newline >= 0 || n >= st.Size() {
			break
		}
	}
	if cut == 0 {
		return st.Size(), 0, nil
	}
	size = st.Size() - cut
	err = effect.Do("cut torn audit line", func() error {
		if err := f.Truncate(size); err != nil {
			return err
		}
		return f.Sync()
	})
	if err != nil {
		return 0, 0, fmt.Errorf("cutting torn audit line: %w", err)
	}
	return size, cut, nil
}

// tail returns the last entries of a file: at least tailCheck bytes of them and
// all since the last entry's Open, checked as a chain.
func tail(path string) ([]Entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening audit file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("opening audit file: %w", err)
	}
	for n := int64(tailCheck); ; n *= 2 {
		window, err := lastBytes(f, st.Size(), n)
		if err != nil {
			return nil, err
		}
		if n < st.Size() { // the first line of the window is most likely not whole
			_, window, _ = bytes.Cut(window, []byte("\n"))
		}
		entries, err := chain(window)
		if err != nil {
			return nil, damaged(path, err)
		}
		if n >= st.Size() || len(entries) > 0 && (entries[len(entries)-1].Open == 0 || entries[0].Seq <= entries[len(entries)-1].Open) {
			return entries, nil
		}
	}
}

func damaged(path string, err error) error {
	return fault.New(fault.Unavailable, "AuditFileDamaged", "The audit file %s was altered: %s.", filepath.Base(path), err).
		WithFix("keep the file as evidence: move %s away and start again; the next start records the gap", path)
}

func chain(lines []byte) ([]Entry, error) {
	var (
		out  []Entry
		head Head
	)
	err := scan(bytes.NewReader(lines), func(e Entry) error {
		if len(out) > 0 {
			if err := head.follows(e); err != nil {
				return err
			}
		}
		head = Head{e.Seq, e.Hash}
		out = append(out, e)
		return nil
	})
	return out, err
}

func lastBytes(f *os.File, size, n int64) ([]byte, error) {
	b := make([]byte, min(n, size))
	if _, err := f.ReadAt(b, size-int64(len(b))); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading audit file: %w", err)
	}
	return b, nil
}

// rotatedFiles lists the full files, oldest first.
func rotatedFiles(path string) ([]string, error) {
	ext := filepath.Ext(path)
	base := strings.TrimSuffix(filepath.Base(path), ext)
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listing audit files: %w", err)
	}
	var out []string
	for _, e := range entries {
		num, ok := strings.CutPrefix(strings.TrimSuffix(e.Name(), ext), base+"-")
		if ok && len(num) == 12 && strings.HasSuffix(e.Name(), ext) && strings.Trim(num, "0123456789") == "" {
			out = append(out, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	slices.Sort(out)
	return out, nil
}

// VerifyFiles checks the live file at path and all rotated ones beside it as
// one chain, and returns its ends.
func VerifyFiles(path string) (first, last Head, err error) {
	files, err := rotatedFiles(path)
	if err != nil {
		return first, last, err
	}
	for _, name := range append(files, path) {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) && name == path {
			continue // died between the two steps of a rotation
		}
		if err != nil {
			return first, last, fmt.Errorf("opening audit file: %w", err)
		}
		err = scan(f, func(e Entry) error {
			if first.Seq == 0 {
				first = Head{e.Seq, e.Hash}
			} else if err := last.follows(e); err != nil {
				return err
			}
			last = Head{e.Seq, e.Hash}
			return nil
		})
		f.Close()
		if err != nil {
			return first, last, fmt.Errorf("%s: %w", filepath.Base(name), err)
		}
	}
	return first, last, nil
}
