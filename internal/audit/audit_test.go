package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

func open(t testing.TB, cfg Config) *Log {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func rec(n int) access.Record {
	return access.Record{
		Time: time.Date(2026, 11, 21, 1, 0, n%60, n, time.UTC), Outcome: "allowed", Kind: access.Application, ObjectID: "o1",
		Action: "secrets/get", Resource: fmt.Sprintf("prod1/secrets/s%d", n), RequestID: "r1",
	}
}

func appendN(t testing.TB, l *Log, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := l.Append(context.Background(), rec(i)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestChainContinuesOverRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	for i := range 4 {
		l := open(t, Config{Path: path})
		appendN(t, l, i*10, i*10+10)
		l.Close()
	}
	first, last, err := VerifyFiles(path)
	if err != nil || first.Seq != 1 || last.Seq != 40 {
		t.Fatalf("first %d, last %d, %v", first.Seq, last.Seq, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestRotationCarriesTheChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path, MaxSize: 2000})
	appendN(t, l, 0, 30)
	l.Close()
	l = open(t, Config{Path: path, MaxSize: 2000})
	appendN(t, l, 30, 58)
	files, err := rotatedFiles(path)
	if err != nil || len(files) < 5 {
		t.Fatalf("rotated files %v, %v", files, err)
	}
	if _, last, err := VerifyFiles(path); err != nil || last.Seq != 58 {
		t.Fatalf("last %d, %v", last.Seq, err)
	}
	found, err := l.search(t.Context(), Query{Resource: "prod1/secrets", Limit: 25})
	if err != nil || len(found) != 25 || found[0].Seq != 34 || found[24].Seq != 58 {
		t.Errorf("search over files: %d entries, %v", len(found), err)
	}
	// Dying between the two steps of a rotation leaves no live file.
	l.Close()
	if err := os.Rename(path, rotatedName(path, 58)); err != nil {
		t.Fatal(err)
	}
	l = open(t, Config{Path: path, MaxSize: 2000})
	appendN(t, l, 58, 59)
	if _, last, err := VerifyFiles(path); err != nil || last.Seq != 59 {
		t.Errorf("after half a rotation: last %d, %v", last.Seq, err)
	}
}

// TestTornLine cuts the last line at every byte: what was confirmed stays, and
// the cut goes on record.
func TestTornLine(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.jsonl")
	l := open(t, Config{Path: path})
	appendN(t, l, 0, 3)
	l.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	start := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for cut := start + 1; cut < len(whole); cut++ {
		if err := os.WriteFile(path, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l := open(t, Config{Path: path})
		l.Close()
		first, last, err := VerifyFiles(path)
		if err != nil || first.Seq != 1 || last.Seq != 3 {
			t.Fatalf("cut at %d: first %d, last %d, %v", cut, first.Seq, last.Seq, err)
		}
		if e, ok, err := findLine(path, 3); err != nil || !ok || e.Record.Action != "Keyfleet/audit/repair" {
			t.Fatalf("cut at %d: the repair is not on record: %+v %v", cut, e, err)
		}
	}
}

// TestTampering changes a file in a thousand ways; each must be found, by the
// chain or, for a cut end, by the end itself.
func TestTampering(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path})
	appendN(t, l, 0, 40)
	head, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(whole, []byte("\n"))
	lines = lines[:len(lines)-1]
	rnd := rand.New(rand.NewPCG(1, 2))
	found := 0
	for i := range 1000 {
		c := make([][]byte, len(lines))
		for j := range lines {
			c[j] = bytes.Clone(lines[j])
		}
		n := rnd.IntN(len(c))
		switch i % 5 {
		case 0: // alter a byte
			b := c[n]
			b[rnd.IntN(len(b)-1)] ^= byte(1 + rnd.IntN(255))
		case 1: // cut a line out
			c = append(c[:n], c[n+1:]...)
		case 2: // swap two
			m := (n + 1 + rnd.IntN(len(c)-1)) % len(c)
			c[n], c[m] = c[m], c[n]
		case 3: // write one twice
			c = append(c[:n+1], c[n:]...)
		case 4: // replace a record and mend the line's own hash
			e, err := parseLine(bytes.TrimSuffix(c[n], []byte("\n")))
			if err != nil {
				t.Fatal(err)
			}
			e.Record.ObjectID = "somebody else"
			if c[n], _, err = appendLine(nil, Head{e.Seq - 1, e.Prev}, 0, "", e.Record); err != nil {
				t.Fatal(err)
			}
		}
		first, last, err := Verify(bytes.NewReader(bytes.Join(c, nil)))
		if err == nil && first.Seq == 1 && last == head {
			t.Errorf("tampering %d (kind %d at line %d) was not found", i, i%5, n)
			continue
		}
		found++
	}
	t.Logf("%d of 1000 tamperings found", found)
}

func TestAlteredEndIsNotRepaired(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path})
	appendN(t, l, 0, 3)
	l.Close()
	whole, _ := os.ReadFile(path)
	if err := os.WriteFile(path, bytes.Replace(whole, []byte("secrets/s1"), []byte("secrets/s9"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(Config{Path: path})
	if e := fault.From(err); e == nil || e.Code != "AuditFileDamaged" || !strings.Contains(e.Fix, path) {
		t.Errorf("got %v, want AuditFileDamaged with a fix", err)
	}
}

// TestFailsClosed uses /dev/full, which refuses every write as a full disk does.
func TestFailsClosed(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("this system has no /dev/full:", err)
	}
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	l := open(t, Config{Path: path})
	err := l.Append(t.Context(), rec(1))
	e := fault.From(err)
	if !errors.Is(err, fault.Unavailable) || e.Fix == "" || !strings.Contains(e.Fix, "audit.jsonl") {
		t.Fatalf("got %v, want Unavailable with a fix that names the file", err)
	}
	if err := os.Remove(path); err != nil { // the operator frees space
		t.Fatal(err)
	}
	appendN(t, l, 2, 5)
	first, last, err := VerifyFiles(path)
	if err != nil || first.Seq != 1 || last.Seq != 3 {
		t.Errorf("after recovery: first %d, last %d, %v", first.Seq, last.Seq, err)
	}
	l.Close()
	if err := l.Append(t.Context(), rec(9)); !errors.Is(err, fault.Unavailable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestManyWritersShareAnFsync(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path})
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() { appendN(t, l, i*20, i*20+20) })
	}
	wg.Wait()
	if _, last, err := VerifyFiles(path); err != nil || last.Seq != 64*20 {
		t.Errorf("last %d, %v", last.Seq, err)
	}
}

func TestSearch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path})
	for i := range 6 {
		r := rec(i)
		if i == 3 {
			r.Outcome, r.ClientID, r.CorrelationID, r.Action = "denied", "c9", "corr", "certificates/create"
		}
		if err := l.Append(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	cases := []struct {
		reason string
		q      Query
		want   string
	}{
		{"all", Query{}, "1 2 3 4 5 6"},
		{"newest, in order", Query{Limit: 2}, "5 6"},
		{"since", Query{Since: rec(4).Time}, "5 6"},
		{"until is exclusive", Query{Until: rec(1).Time}, "1"},
		{"outcome", Query{Outcome: "denied"}, "4"},
		{"client id", Query{Principal: "C9"}, "4"},
		{"correlation id", Query{RequestID: "corr"}, "4"},
		{"action with a wildcard", Query{Action: "certificates/*"}, "4"},
		{"resource and below", Query{Resource: "prod1/secrets/s2"}, "3"},
		{"a longer name is not below", Query{Resource: "prod1/secrets/s"}, ""},
	}
	for _, c := range cases {
		found, err := l.search(t.Context(), c.q)
		var seqs []string
		for _, e := range found {
			seqs = append(seqs, fmt.Sprint(e.Seq))
		}
		if got := strings.Join(seqs, " "); err != nil || got != c.want {
			t.Errorf("%s: got %q, %v, want %q", c.reason, got, err, c.want)
		}
	}
}

func TestLongFieldsAreClipped(t *testing.T) {
	l := open(t, Config{Path: filepath.Join(t.TempDir(), "audit.jsonl")})
	r := rec(1)
	r.Resource, r.Detail, r.Reason = strings.Repeat("\x01", 1<<20), strings.Repeat("é", 1<<20), strings.Repeat("<", 1<<20)
	if err := l.Append(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if _, last, err := VerifyFiles(l.cfg.Path); err != nil || last.Seq != 1 {
		t.Errorf("last %d, %v", last.Seq, err)
	}
}

func FuzzVerify(f *testing.F) {
	two, head, err := appendLine(nil, Head{}, 0, "", rec(1))
	if err != nil {
		f.Fatal(err)
	}
	if two, _, err = appendLine(two, head, 2, "0001-ab", rec(2)); err != nil {
		f.Fatal(err)
	}
	f.Add(two)
	f.Add(two[:len(two)-1])
	f.Add([]byte(`{"seq":1,"hash":""}` + "\n"))
	f.Add([]byte("\n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		first, last, err := Verify(bytes.NewReader(data))
		if err != nil {
			return
		}
		// What passes says how many lines it has, and a changed byte does not pass.
		if n := bytes.Count(data, []byte("\n")); int64(n) != last.Seq-first.Seq+1 && n != 0 {
			t.Errorf("%d lines pass as %d to %d", n, first.Seq, last.Seq)
		}
		if len(data) > 2 {
			altered := bytes.Clone(data)
			altered[len(altered)/2] ^= 1
			if _, _, err := Verify(bytes.NewReader(altered)); err == nil {
				t.Error("an altered byte passes")
			}
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			l := open(b, Config{Path: filepath.Join(b.TempDir(), "audit.jsonl")})
			b.SetParallelism(writers)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := l.Append(context.Background(), rec(1)); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}
