package system

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// window is how many bytes of a canary a form is made of. Longer canaries are
// cut into windows, so that a part of one, as in a shortened log line, is found too.
const window = 32

// canary is a value that may be nowhere, but in files whose path allowed accepts.
type canary struct {
	name    string
	value   []byte
	allowed func(path string) bool // nil: nowhere
}

// pattern is one form of one window of a canary.
type pattern struct {
	canary *canary
	form   string
	bytes  []byte
}

// forms are the ways in which a value may be written.
func forms(v []byte) map[string][]byte {
	out := map[string][]byte{
		"raw": v, "hex": []byte(hex.EncodeToString(v)), "HEX": []byte(strings.ToUpper(hex.EncodeToString(v))),
		"URL query": []byte(url.QueryEscape(string(v))), "URL path": []byte(url.PathEscape(string(v))),
		"numbers": []byte(strings.Trim(fmt.Sprint(v), "[]")), // %v of a []byte
		"%q":      unquoted(strconv.Quote(string(v))),
	}
	for name, enc := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
		for before := range 3 {
			out[fmt.Sprintf("%s+%d", name, before)] = inner(enc, v, before)
		}
	}
	if utf8.Valid(v) {
		quoted, _ := json.Marshal(string(v)) // a string always encodes
		out["JSON"] = unquoted(string(quoted))
		var plain bytes.Buffer
		e := json.NewEncoder(&plain)
		e.SetEscapeHTML(false)
		_ = e.Encode(string(v))
		out["JSON, plain"] = unquoted(strings.TrimSpace(plain.String()))
	}
	return out
}

func unquoted(s string) []byte { return []byte(s[1 : len(s)-1]) }

// inner is what base64 makes of v when `before` bytes (modulo 3) come before it
// and anything after it: the characters that depend on v alone.
func inner(enc *base64.Encoding, v []byte, before int) []byte {
	whole := enc.EncodeToString(append(make([]byte, before), v...))
	first := []int{0, 2, 3}[before]
	last := (before + len(v)) / 3 * 4
	return []byte(whole[first:min(last, len(whole))])
}

// windows cuts a long value.
func windows(v []byte) [][]byte {
	if len(v) <= window {
		return [][]byte{v}
	}
	var out [][]byte
	for ; len(v) >= window; v = v[window:] {
		out = append(out, v[:window])
	}
	return out
}

// scanner finds patterns in data in one pass over it.
type scanner struct {
	filter  []bool // by hash of four bytes
	byFirst map[uint32][]pattern
	forms   map[string]bool // names of forms
	n       int             // patterns
	bytes   int64           // searched so far
}

func hash(first uint32) uint32 { return first * 2654435761 >> 12 } // 20 bits

func newScanner(t *testing.T, all []*canary) *scanner {
	t.Helper()
	s := &scanner{filter: make([]bool, 1<<20), byFirst: map[uint32][]pattern{}, forms: map[string]bool{}}
	for _, c := range all {
		if len(c.value) < 16 {
			t.Fatalf("canary %s has %d bytes: too short to be unique", c.name, len(c.value))
		}
		for _, w := range windows(c.value) {
			seen, all := map[string]bool{}, forms(w)
			// Backwards, "raw" comes first: a form that changes nothing goes by that name.
			for _, form := range slices.Backward(slices.Sorted(maps.Keys(all))) {
				b := all[form]
				s.forms[form] = true
				if seen[string(b)] {
					continue
				}
				seen[string(b)] = true
				first := binary.LittleEndian.Uint32(b)
				s.filter[hash(first)] = true
				s.byFirst[first] = append(s.byFirst[first], pattern{c, form, b})
				s.n++
			}
		}
	}
	return s
}

// search calls found for each occurrence.
func (s *scanner) search(data []byte, found func(pattern, int)) {
	s.bytes += int64(len(data))
	for i := 0; i+4 <= len(data); i++ {
		first := binary.LittleEndian.Uint32(data[i:])
		if !s.filter[hash(first)] {
			continue
		}
		for _, p := range s.byFirst[first] {
			if bytes.HasPrefix(data[i:], p.bytes) {
				found(p, i)
			}
		}
	}
}

// searchDeep searches data, and what is compressed in it.
func (s *scanner) searchDeep(data []byte, found func(pattern, int)) {
	s.search(data, found)
	for _, inside := range unpacked(data, 3) {
		s.search(inside, found)
	}
}

// unpacked returns what gzip has made smaller in data, to a depth: gzip as it is, in
// base64, and in base64 of that, as Helm keeps its releases.
func unpacked(data []byte, depth int) (all [][]byte) {
	const most = 64 << 20
	if depth == 0 {
		return nil
	}
	for _, first := range []string{"\x1f\x8b\x08", "H4sI", "SDRzS"} { // of gzip, once and twice
		for rest := data; ; {
			i := bytes.Index(rest, []byte(first))
			if i < 0 {
				break
			}
			if first[0] == 0x1f {
				if z, err := gzip.NewReader(bytes.NewReader(rest[i:])); err == nil { // else bytes that only look like it
					inside, _ := io.ReadAll(io.LimitReader(z, most)) // what follows the end is no gzip, which is an error
					all = append(append(all, inside), unpacked(inside, depth-1)...)
				}
			} else {
				text := alphabet.Find(rest[i:])
				inside := make([]byte, base64.RawStdEncoding.DecodedLen(len(text)))
				n, _ := base64.RawStdEncoding.Decode(inside, text) // cut short: what there is
				all = append(all, unpacked(inside[:n], depth-1)...)
			}
			rest = rest[i+len(first):]
		}
	}
	return all
}

// alphabet is text in base64.
var alphabet = regexp.MustCompile(`^[A-Za-z0-9+/]+`)

// control plants every window of every canary in every encoding, made by the
// encoders themselves around a longer text, and fails if the search misses one.
func (s *scanner) control(t *testing.T, all []*canary) (planted int) {
	t.Helper()
	noise := func(n int) []byte { b := make([]byte, n); _, _ = rand.Read(b); return b }
	try := func(c *canary, how string, data []byte) {
		t.Helper()
		planted++
		hit := false
		s.searchDeep(append(append(noise(37), data...), noise(41)...), func(p pattern, _ int) { hit = hit || p.canary == c })
		if !hit {
			t.Errorf("control: %s planted as %s is not found", c.name, how)
		}
	}
	for _, c := range all {
		for _, w := range windows(c.value) {
			try(c, "raw", w)
			for n := 6; n < 9; n++ {
				text := append(append(noise(n), w...), noise(11-n%2)...)
				try(c, "base64", []byte(base64.StdEncoding.EncodeToString(text)))
				try(c, "base64url", []byte(base64.URLEncoding.EncodeToString(text)))
				try(c, "hex", []byte(hex.EncodeToString(text)))
				try(c, "HEX", fmt.Appendf(nil, "%X", text))
			}
			try(c, "%v", fmt.Appendf(nil, "%v", w))
			try(c, "form", []byte(url.Values{"a": {"b c"}, "v": {string(w)}}.Encode()))
			try(c, "path", []byte("/a/"+url.PathEscape(string(w))+"/b"))
			if utf8.Valid(w) {
				doc, err := json.Marshal(map[string]string{"a": "x" + string(w) + "y"})
				if err != nil {
					t.Fatal(err)
				}
				try(c, "JSON", doc)
			}
			try(c, "%q", fmt.Appendf(nil, "%q", w))
			release := compressed(t, append(noise(1000), w...))
			try(c, "gzip", release)
			once := base64.StdEncoding.EncodeToString(release)
			try(c, "a release of Helm", []byte(` "release": "`+base64.StdEncoding.EncodeToString([]byte(once))+`"`))
		}
	}
	return planted
}

func compressed(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// searchAll searches every place. What is found where it belongs is counted,
// anything else fails the test.
func (h *hunt) searchAll(s *scanner, procs *processes) (files, belong int) {
	h.T.Helper()
	found := map[string]int{} // canary -> finds where it belongs
	told := map[string]bool{} // one line for each canary, form and place
	search := func(place, path string, data []byte) {
		s.searchDeep(data, func(p pattern, at int) {
			if path != "" && p.canary.allowed != nil && p.canary.allowed(path) {
				found[p.canary.name]++
				belong++
				return
			}
			if what := place + ": " + p.canary.name + ", as " + p.form; !told[what] {
				told[what] = true
				h.T.Errorf("%s, first at byte %d", what, at)
			}
		})
	}
	files = h.searchFiles(search)
	for _, name := range []string{"administrator's secret", "kek", "key of the certificate, PEM line 2", "key of the renewed certificate, PEM line 2", "key in the PFX, PEM line 2"} {
		if found[name] == 0 {
			h.T.Errorf("control: %s was not found where it belongs", name)
		}
	}
	h.revealed(s)
	if !procs.saw(h.PID()) {
		h.T.Error("control: the server's command line was not read")
	}
	search("command lines and environments", "", procs.stop())
	h.Stop()
	log := h.Log()
	if !strings.Contains(log, `"level":"DEBUG"`) || !strings.Contains(log, "/secrets/plain") {
		h.T.Error("control: the server's log has no requests")
	}
	h.places["server's log"] = []byte(log)
	for place, data := range h.places {
		if len(data) == 0 && place != "output of backup" {
			h.T.Errorf("control: %s is empty", place)
		}
		search(place, "", data)
	}
	return files, belong
}

// searchFiles searches the data directory, as it lies on the disk.
func (h *hunt) searchFiles(search func(place, path string, data []byte)) (files int) {
	h.T.Helper()
	parts := map[string]bool{"audit/": false, "etcd/": false, "node-logs/": false, "nodes/": false, "backup": false, "keyset.json": false}
	err := filepath.WalkDir(h.Dir, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) || (err == nil && !d.Type().IsRegular()) {
			return nil // nodes and etcd remove files as they go
		}
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			return nil
		}
		rel, _ := filepath.Rel(h.Dir, path) // path is below
		files++
		for part := range parts {
			parts[part] = parts[part] || strings.HasPrefix(rel, part)
		}
		search("file "+rel, rel, data)
		return err
	})
	if err != nil {
		h.T.Fatal(err)
	}
	for part, read := range parts {
		if !read {
			h.T.Errorf("control: nothing of %s was read", part)
		}
	}
	return files
}

// revealed checks that the search finds the store's secrets where they are shown on purpose.
func (h *hunt) revealed(s *scanner) {
	h.T.Helper()
	names := map[string]bool{}
	s.search(h.program("keyfleet-server", "store", "dump", "--reveal", "--data-dir", h.Dir), func(p pattern, _ int) { names[p.canary.name] = true })
	for _, name := range []string{"secret", "second version of the secret", "secret of one word", "deleted secret", "protected setting", "PFX"} {
		if !names[name] {
			h.T.Errorf("control: %s is not in the dump with --reveal", name)
		}
	}
}

// processes remembers the command line and the environment of every process
// that it saw, until stop.
type processes struct {
	quit, done chan struct{}
	once       sync.Once

	mu     sync.Mutex
	pids   map[string]bool // guarded by mu
	unique map[string]bool // guarded by mu; command lines and environments
}

// watchProcesses looks again and again, for many processes are short.
func watchProcesses() *processes {
	p := &processes{quit: make(chan struct{}), done: make(chan struct{}), pids: map[string]bool{}, unique: map[string]bool{}}
	go func() { // ends with stop
		defer close(p.done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			p.look()
			select {
			case <-tick.C:
			case <-p.quit:
				p.look()
				return
			}
		}
	}()
	return p
}

func (p *processes) look() {
	for _, file := range []string{"cmdline", "environ"} {
		paths, _ := filepath.Glob("/proc/[0-9]*/" + file) // the pattern is well formed
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil || len(text) == 0 {
				continue // it has ended, or has none
			}
			p.mu.Lock()
			p.unique[string(text)] = true
			p.pids[filepath.Base(filepath.Dir(path))] = true
			p.mu.Unlock()
		}
	}
}

// stop ends the watch and returns all that was seen.
func (p *processes) stop() []byte {
	p.once.Do(func() { close(p.quit) })
	<-p.done
	return []byte(strings.Join(slices.Sorted(maps.Keys(p.unique)), "\n"))
}

// seen is the number of processes, texts that of different command lines and environments.
func (p *processes) seen() int  { return len(p.pids) }
func (p *processes) texts() int { return len(p.unique) }

func (p *processes) saw(pid int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pids[strconv.Itoa(pid)]
}
