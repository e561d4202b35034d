package cluster

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// TestProgress: the lines of docs/rotate-certs.md, and some that only look like them.
func TestProgress(t *testing.T) {
	var p Progress
	for _, c := range []struct {
		line string
		want Progress // what it is afterwards
	}{
		{"Restarts of each API server: 3", Progress{}},
		{"Rotation 20261129-055651-634d, journal /x/20261129-055651-634d/journal", Progress{Run: "20261129-055651-634d"}},
		{"   0.2s   1/92  done   prepare: lock on master-0 (0.0s)", Progress{Run: "20261129-055651-634d", Done: 1, Steps: 92, Step: "prepare: lock on master-0"}},
		{"   0.2s   2/92  failed prepare: lock on master-1 (0.0s)", Progress{Run: "20261129-055651-634d", Done: 1, Steps: 92, Step: "prepare: lock on master-0"}},
		{"   0.3s  93/92  done   prepare: lock on master-1 (0.0s)", Progress{Run: "20261129-055651-634d", Done: 1, Steps: 92, Step: "prepare: lock on master-0"}},
		{
			"        in use by default/probe-1, kubernetes-admin (a client certificate); waiting for up to 58m55s",
			Progress{Run: "20261129-055651-634d", Done: 1, Steps: 92, Step: "prepare: lock on master-0", Waiting: "in use by default/probe-1, kubernetes-admin (a client certificate); waiting for up to 58m55s"},
		},
		{"        ---- point of no return ----", Progress{
			Run: "20261129-055651-634d", Done: 1, Steps: 92, Step: "prepare: lock on master-0", NoReturn: true,
			Waiting: "in use by default/probe-1, kubernetes-admin (a client certificate); waiting for up to 58m55s",
		}},
		{" 390.2s  63/92  done   retire: place ca.crt, ca.key and 4 more on master-0 (0.2s)", Progress{
			Run: "20261129-055651-634d", Done: 63, Steps: 92, Step: "retire: place ca.crt, ca.key and 4 more on master-0", NoReturn: true,
		}},
	} {
		before := p
		if told := p.take(c.line); p != c.want || told != (before != c.want) {
			t.Fatalf("after %q it is %+v, want %+v", c.line, p, c.want)
		}
	}
	if p.Phase() != "retire" || p.Node() != "master-0" || p.Percent() != 68 {
		t.Errorf("%s, %s, %d", p.Phase(), p.Node(), p.Percent())
	}
}

// FuzzWords: whatever a program prints, the progress stays within bounds, and what is
// kept of it is short and valid text.
func FuzzWords(f *testing.F) {
	f.Add("   0.2s   1/92  done   prepare: lock on master-0 (0.0s)")
	f.Add("Error NoAPIServer: No API server is ready.\n  Why   x\n  Fix   y\n")
	f.Add("Stopped before retiring: the old certificates are still in use by a/b.\n  Next  wait\n")
	f.Fuzz(func(t *testing.T, text string) {
		text = strings.ToValidUTF8(text, "")
		var p Progress
		for _, line := range strings.Split(text, "\n") {
			p.take(line)
		}
		if p.Done < 0 || p.Done > p.Steps || p.Percent() > 100 || len(p.Run) > 64 {
			t.Errorf("%+v", p)
		}
		if q := parseProblem(text); len(q.Message) > maxWords || len(q.Fix) > maxWords || !utf8.ValidString(q.Message+q.Fix) {
			t.Errorf("%+v", q)
		}
	})
}
