package rotatecerts

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

var update = flag.Bool("update", false, "write the golden files anew")

// behaviour is what a server of the tests does with a connection.
type behaviour string

const (
	well      behaviour = ""
	refuses   behaviour = "refuses"
	hangs     behaviour = "hangs"      // nobody answers the dialler
	mute      behaviour = "mute"       // takes the connection and says nothing
	muteLater behaviour = "mute later" // after the handshake
	ends      behaviour = "ends"       // closes the connection at once
	gibberish behaviour = "gibberish"
	unready   behaviour = "unready"   // HTTP 500
	demanding behaviour = "demanding" // TLS 1.2 and wants a certificate, as an etcd may
	noHTTP    behaviour = "no HTTP"
)

// network is a dialer whose servers misbehave on purpose.
type network struct {
	cert  tls.Certificate
	began time.Time
	// how tells what the server at an address does after that much time.
	how func(address string, after time.Duration) behaviour
}

func newNetwork(t *testing.T, how func(string, time.Duration) behaviour) *network {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// It has expired: the probe does not mind.
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &network{cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, began: time.Now(), how: how}
}

func (n *network) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	how := n.how(address, time.Since(n.began))
	switch how {
	case refuses:
		return nil, errors.New("connection refused")
	case hangs:
		<-ctx.Done()
		return nil, ctx.Err()
	}
	near, far := net.Pipe()
	go n.serve(far, how)
	return near, nil
}

func (n *network) serve(raw net.Conn, how behaviour) {
	defer raw.Close()
	switch how {
	case ends:
		return
	case mute:
		_, _ = io.Copy(io.Discard, raw)
		return
	case gibberish:
		go func() { _, _ = io.Copy(io.Discard, raw) }()
		_, _ = io.WriteString(raw, "SSH-2.0-OpenSSH\r\n")
		return
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{n.cert}}
	if how == demanding {
		cfg.MaxVersion, cfg.ClientAuth = tls.VersionTLS12, tls.RequireAnyClientCert
	}
	conn := tls.Server(raw, cfg)
	if conn.Handshake() != nil {
		return
	}
	if how == muteLater {
		_, _ = io.Copy(io.Discard, conn)
		return
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "GET /readyz HTTP/1.1") {
		return
	}
	answer := "HTTP/1.1 200 OK\r\n\r\nok"
	switch how {
	case unready:
		answer = "HTTP/1.1 500 Internal Server Error\r\n\r\n"
	case noHTTP:
		answer = "220 mail.example.org\r\n"
	}
	_, _ = io.WriteString(conn, answer)
}

var threeMasters = []rotation.Node{
	{Name: "master-0", Address: "10.0.0.1", Endpoint: "10.0.0.1:6443", Master: true},
	{Name: "master-1", Address: "10.0.0.2", Endpoint: "10.0.0.2:6443", Master: true},
	{Name: "master-2", Address: "10.0.0.3", Endpoint: "10.0.0.3:6443", Master: true},
	{Name: "worker-0", Address: "10.0.0.4"},
}

// measure runs a probe for a time.
func measure(t *testing.T, d rotation.Dialer, targets []target, during time.Duration) Measured {
	t.Helper()
	p := newProbe(d, targets)
	p.Start(t.Context())
	time.Sleep(during)
	p.Stop()
	time.Sleep(time.Hour) // what is measured ends with the run
	return p.Snapshot()
}

func TestProbeMeasuresWhatMisbehaviourCosts(t *testing.T) {
	const api, etcd = "10.0.0.1:6443", "10.0.0.1:2379"
	for _, tc := range []struct {
		how              behaviour
		api              bool
		failed, notReady int
		seconds          float64
	}{
		{how: well, api: true},
		{how: well},
		{how: demanding},
		{how: muteLater}, // of etcd no more than the handshake is asked
		{how: noHTTP},    //
		{how: unready, notReady: 5, api: true},
		{how: refuses, failed: 5, seconds: 5, api: true},
		{how: refuses, failed: 5, seconds: 5},
		{how: ends, failed: 5, seconds: 5},
		{how: gibberish, failed: 5, seconds: 5},
		{how: noHTTP, failed: 5, seconds: 5, api: true},
		{how: hangs, failed: 2, seconds: 6, api: true}, // each ask takes its three seconds
		{how: mute, failed: 2, seconds: 6, api: true},
		{how: mute, failed: 2, seconds: 6},
		{how: muteLater, failed: 2, seconds: 6, api: true},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork(t, func(_ string, after time.Duration) behaviour {
				if after >= 10*time.Second && after < 15*time.Second {
					return tc.how
				}
				return well
			})
			to := target{node: "master-0", address: etcd}
			if tc.api {
				to = target{node: "master-0", address: api, api: true}
			}
			m := measure(t, n, []target{to}, 30*time.Second+time.Millisecond)
			got := append(m.APIServers, m.Etcd...)[0]
			times := 0
			if tc.seconds > 0 {
				times = 1
			}
			if got.Failed != tc.failed || got.NotReady != tc.notReady || got.Times != times || got.Seconds != tc.seconds || got.Longest != tc.seconds || !got.Since.IsZero() {
				t.Errorf("%s (API server: %v): %+v\nwant %d failed, %d not ready, away for %vs", tc.how, tc.api, got, tc.failed, tc.notReady, tc.seconds)
			}
			if want := 31 - (int(tc.seconds) - tc.failed); got.Asked != want {
				t.Errorf("%s: asked %d times, want %d: once a second and never again", tc.how, got.Asked, want)
			}
		})
	}
}

// TestTheClusterIsAwayWhileAllAPIServersAre, and not if they are away in turn.
func TestTheClusterIsAwayWhileAllAPIServersAre(t *testing.T) {
	between := func(after time.Duration, from, to int) bool {
		return after >= time.Duration(from)*time.Second && after < time.Duration(to)*time.Second
	}
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, func(address string, after time.Duration) behaviour {
			switch {
			case address == "10.0.0.1:6443" && (between(after, 5, 8) || between(after, 20, 24)),
				address == "10.0.0.2:6443" && (between(after, 8, 11) || between(after, 21, 30)),
				address == "10.0.0.3:6443" && (between(after, 11, 14) || between(after, 22, 23)),
				strings.HasSuffix(address, "2379") && between(after, 40, 42), strings.HasSuffix(address, "6443") && between(after, 40, 42),
				address == "10.0.0.2:2379" && between(after, 50, 100):
				return refuses
			}
			return well
		})
		m := measure(t, n, targetsOf(threeMasters, "2379"), 60*time.Second+time.Millisecond)
		var out bytes.Buffer
		m.Describe(&out)
		golden(t, "measured.txt", out.String())
		if m.AnyAPI.Seconds != 3 || m.AnyAPI.Times != 2 || m.Nothing.Seconds != 2 {
			t.Errorf("the cluster %+v, nothing at all %+v", m.AnyAPI, m.Nothing)
		}
		if m.Etcd[1].Since.IsZero() || m.Etcd[1].Longest != 10.001 {
			t.Errorf("an absence that goes on: %+v", m.Etcd[1])
		}
		text, err := json.MarshalIndent(m, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "measured.json", string(text)+"\n")
	})
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is otherwise (-update writes it anew):\n%s", name, got)
	}
}

// aPlan has a few steps of each sort.
func aPlan(nodes []rotation.Node) rotation.Plan {
	p := rotation.Plan{Run: "run1", Nodes: nodes}
	for _, n := range nodes {
		p.Steps = append(p.Steps, rotation.Step{Phase: rotation.Prepare, Verb: rotation.StageIt, Node: n.Name})
	}
	p.Steps = append(p.Steps, rotation.Step{Phase: rotation.Trust, Verb: rotation.Canary})
	for _, n := range nodes {
		p.Steps = append(p.Steps, rotation.Step{Phase: rotation.Switch, Verb: rotation.Restart, Components: []string{"kube-apiserver", "kube-scheduler"}, Node: n.Name})
	}
	for i, n := range nodes {
		p.Steps = append(p.Steps, rotation.Step{Phase: rotation.Retire, Verb: rotation.Clean, Node: n.Name, NoReturn: i == 0})
	}
	return p
}

func TestRender(t *testing.T) {
	began := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	now := began.Add(4*time.Minute + 12*time.Second)
	var many []rotation.Node
	many = append(many, threeMasters[:3]...)
	for i := range 40 {
		many = append(many, rotation.Node{Name: fmt.Sprintf("worker-with-a-name-that-is-long-%02d", i)})
	}
	m := Measured{
		APIServers: []Availability{
			{Node: "master-0", Asked: 9, Absence: Absence{Times: 1, Seconds: 4.1, Longest: 4.1}},
			{Node: "master-1", Asked: 9, Absence: Absence{Times: 1, Seconds: 3, Longest: 3, Since: now.Add(-3 * time.Second)}},
			{Node: "master-2"},
		},
		Etcd: []Availability{{Node: "master-0", Asked: 9}, {Node: "master-1", Asked: 9}, {Node: "master-2", Asked: 9}},
	}
	fresh := func(nodes []rotation.Node, s journal.State) board { return newBoard(aPlan(nodes), s, began) }
	under := func(b board, event string, steps ...string) board {
		for _, s := range steps {
			b.on(journal.Progress{Event: event, Step: s}, now.Add(-43*time.Second))
		}
		return b
	}
	const restart = "switch: restart kube-apiserver and kube-scheduler on "
	prepared := []string{"prepare: stage on master-0", "prepare: stage on master-1", "prepare: stage on master-2", "prepare: stage on worker-0"}
	switched := append(prepared, "trust: prove that the new is accepted", restart+"master-0", restart+"master-1", restart+"master-2", restart+"worker-0")
	away := m
	away.AnyAPI = Absence{Times: 1, Seconds: 61, Longest: 61}
	for _, tc := range []struct {
		name  string
		b     board
		m     Measured
		width int
	}{
		{"nothing has happened yet", fresh(threeMasters, journal.State{}), Measured{APIServers: []Availability{{Node: "master-0"}}}, 80},
		{"a step of the cluster", under(under(fresh(threeMasters, journal.State{}), "done", prepared...), "started", "trust: prove that the new is accepted"), m, 80},
		{"two steps at once", under(under(fresh(threeMasters, journal.State{}), "done", switched[:6]...), "started", restart+"master-1", restart+"worker-0"), m, 120},
		{"a narrow terminal", under(under(fresh(threeMasters, journal.State{}), "done", switched[:6]...), "started", restart+"master-1"), m, 40},
		{"past the point of no return", under(under(fresh(threeMasters, journal.State{}), "done", switched...), "started", "retire: clean up on master-0"), away, 80},
		{"gone on with, and rolled back", under(fresh(threeMasters, journal.State{Steps: map[string]journal.Status{prepared[0]: journal.Done, prepared[1]: journal.Undoing, prepared[2]: journal.Undone}}), "undoing", prepared[1]), m, 80},
		{"a failure", under(under(fresh(threeMasters, journal.State{}), "started", prepared[0]), "failed", prepared[0]), m, 80},
		{"many nodes", under(fresh(many, journal.State{}), "started", "prepare: stage on worker-with-a-name-that-is-long-07"), m, 100},
		{"no width at all", fresh(threeMasters, journal.State{}), m, 0},
	} {
		got := render(tc.b, tc.m, tc.width, now)
		golden(t, "board-"+strings.ReplaceAll(strings.ReplaceAll(tc.name, ",", ""), " ", "-")+".txt", got)
		for line := range strings.Lines(got) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > max(tc.width, 1) {
				t.Errorf("%s: a line of %d columns of %d: %s", tc.name, n, tc.width, line)
			}
		}
	}
}

// terminal understands what a screen writes.
type terminal struct {
	t     *testing.T
	lines []string // the last is where the cursor is
}

func (s *terminal) Write(b []byte) (int, error) {
	text := string(b)
	for text != "" {
		if strings.HasPrefix(text, "\x1b[") {
			var up int
			if _, err := fmt.Sscanf(text, "\x1b[%dA", &up); err != nil {
				s.t.Errorf("not understood: %q", text)
				return 0, err
			}
			rest, ok := strings.CutPrefix(text, fmt.Sprintf("\x1b[%dA\r\x1b[J", up))
			if !ok || up >= len(s.lines) || s.lines[len(s.lines)-1] != "" {
				s.t.Errorf("it goes up %d lines of %d from %q", up, len(s.lines), s.lines[len(s.lines)-1])
				return 0, errors.New("not understood")
			}
			s.lines = append(s.lines[:len(s.lines)-1-up], "")
			text = rest
			continue
		}
		line, rest, whole := strings.Cut(text, "\n")
		s.lines[len(s.lines)-1] += line
		if whole {
			s.lines = append(s.lines, "")
		}
		text = rest
	}
	return len(b), nil
}

func TestTheBoardStaysBelowTheLines(t *testing.T) {
	term := &terminal{t: t, lines: []string{""}}
	n, height := 0, 24
	s := &screen{out: term, size: func() (int, int) { return 80, height }, draw: func(int) string {
		n++
		return strings.Repeat(fmt.Sprintf("board %d\n", n), 1+n%3)
	}}
	w := above{s, term}
	expect := func(reason string, want ...string) {
		t.Helper()
		got := strings.Join(term.lines, "|")
		if want := strings.Join(append(want, ""), "|"); got != want {
			t.Errorf("%s: %s, want %s", reason, got, want)
		}
	}
	s.refresh()
	expect("drawn", "board 1", "board 1")
	fmt.Fprintln(w, "one")
	expect("a line above", "one", "board 2", "board 2", "board 2")
	s.refresh()
	expect("drawn anew, with fewer lines", "one", "board 3")
	fmt.Fprint(w, "tw")
	s.refresh()
	if got := strings.Join(term.lines, "|"); got != "one|tw" {
		t.Errorf("in the middle of a line: %s", got)
	}
	fmt.Fprint(w, "o\nthree\n")
	expect("the line is whole", "one", "two", "three", "board 4", "board 4")
	height = 2
	s.refresh()
	expect("a low terminal shows the first line only", "one", "two", "three", "board 5")
	s.close()
	s.refresh()
	fmt.Fprintln(w, "four")
	expect("closed", "one", "two", "three", "four")
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, func(string, time.Duration) behaviour { return well })
		for _, drawn := range []bool{false, true} {
			term := &terminal{t: t, lines: []string{""}}
			c := &command{Streams: Streams{Out: term, Err: term}}
			var size func() (int, int)
			if drawn {
				size = func() (int, int) { return 80, 24 }
			}
			w := c.watch(t.Context(), aPlan(threeMasters), journal.State{}, n, "2379", size)
			progress := w.progress(func(ev journal.Progress) { fmt.Fprintln(c.Out, ev.Event, ev.Step) })
			progress(journal.Progress{Event: "started", Step: "prepare: stage on master-0"})
			time.Sleep(5 * time.Second)
			c.warn("a warning")
			shown := strings.Join(term.lines, "\n")
			if strings.Contains(shown, "1.0s") || strings.Contains(shown, "master-0 up, master-1 up, master-2 up") != drawn || !strings.Contains(shown, "started prepare: stage on master-0\na warning\n") {
				t.Errorf("drawn %v:\n%s", drawn, shown)
			}
			m := w.stop()
			if again := w.stop(); m.Seconds != 5 || again.Seconds != 5 || m.APIServers[0].Asked < 5 || m.AnyAPI.Times != 0 {
				t.Errorf("drawn %v: measured %+v, then %+v", drawn, m, again)
			}
			fmt.Fprintln(c.Out, "the end")
			if got := strings.Join(term.lines, "|"); got != "started prepare: stage on master-0|a warning|the end|" || c.Out != io.Writer(term) || c.Err != io.Writer(term) {
				t.Errorf("drawn %v: what is left is %s", drawn, got)
			}
		}
	})
}

func TestAFileIsNoTerminal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, w := range []io.Writer{f, &bytes.Buffer{}} {
		if sizeOf(w, func(string) string { return "xterm" }) != nil {
			t.Errorf("%T is taken for a terminal", w)
		}
	}
}
