package rotatecerts

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// watcher shows a run and measures it.
type watcher struct {
	probe  *probe
	screen *screen // nil: there is no terminal
	undo   func()  // gives the command its streams back
	cancel context.CancelFunc
	loop   sync.WaitGroup

	mu    sync.Mutex // guards board
	board board
}

// watch begins to measure and, if size tells how large the terminal of Out is, to
// draw. Until stop, what is written to the streams of the command stands above
// the board.
func (c *command) watch(ctx context.Context, p rotation.Plan, done journal.State, d rotation.Dialer, etcdPort string, size func() (width, height int)) *watcher {
	w := &watcher{probe: newProbe(d, targetsOf(p.Nodes, etcdPort)), board: newBoard(p, done, time.Now()), undo: func() {}}
	ctx, w.cancel = context.WithCancel(ctx)
	w.probe.Start(ctx)
	if size == nil {
		return w
	}
	w.screen = &screen{size: size, out: c.Out, draw: func(width int) string {
		w.mu.Lock()
		defer w.mu.Unlock()
		return render(w.board, w.probe.Snapshot(), width, time.Now())
	}}
	out, errs := c.Out, c.Err
	w.undo = func() { c.Out, c.Err = out, errs }
	c.Out, c.Err = above{w.screen, out}, above{w.screen, errs}
	w.loop.Go(func() {
		for sleep(ctx, 500*time.Millisecond) {
			w.screen.refresh()
		}
	})
	return w
}

// progress passes on what happens, and shows it.
func (w *watcher) progress(next func(journal.Progress)) func(journal.Progress) {
	return func(ev journal.Progress) {
		w.mu.Lock()
		w.board.on(ev, time.Now())
		w.mu.Unlock()
		next(ev)
	}
}

// stop takes the board away and returns what was measured. It may be called again.
func (w *watcher) stop() Measured {
	w.cancel()
	w.loop.Wait()
	w.probe.Stop()
	if w.screen != nil {
		w.screen.close()
	}
	w.undo()
	return w.probe.Snapshot()
}

// sizeOf asks the terminal for its size at each call; nil if w is none, or one
// that cannot move its cursor.
func sizeOf(w io.Writer, env func(string) string) func() (width, height int) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) || env("TERM") == "dumb" || env("TERM") == "" {
		return nil
	}
	return func() (int, int) {
		width, height, err := term.GetSize(int(f.Fd()))
		if err != nil || width < 20 { // serial lines do not know
			return 80, 24
		}
		return width, height
	}
}

// screen keeps a board below what is written.
type screen struct {
	size func() (width, height int)
	draw func(width int) string
	out  io.Writer

	mu     sync.Mutex
	shown  int  // lines of the board that stand there
	inLine bool // what was written last has not ended its line
	closed bool
}

// above writes to the same terminal, above the board.
type above struct {
	*screen
	w io.Writer
}

func (a above) Write(text []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, err := io.WriteString(a.out, a.erase()); err != nil {
		return 0, err
	}
	n, err := a.w.Write(text)
	if n > 0 {
		a.inLine = text[n-1] != '\n'
	}
	if err == nil {
		err = a.paint()
	}
	return n, err
}

// refresh draws the board anew.
func (s *screen) refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.paint() // of a terminal that is gone the lines tell
}

func (s *screen) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = io.WriteString(s.out, s.erase())
	s.closed = true
}

// erase is what takes the board away.
func (s *screen) erase() string {
	if s.shown == 0 {
		return ""
	}
	n := s.shown
	s.shown = 0
	return fmt.Sprintf("\x1b[%dA\r\x1b[J", n)
}

// paint draws the board in one write, so that it does not flicker, and no higher
// than the terminal, for the cursor does not go back beyond its top.
func (s *screen) paint() error {
	if s.closed || s.inLine {
		return nil
	}
	width, height := s.size()
	lines := strings.SplitAfter(s.draw(width), "\n")
	lines = lines[:max(0, min(len(lines)-1, height-1))] // after the last newline comes nothing
	text := s.erase() + strings.Join(lines, "")
	s.shown = len(lines)
	_, err := io.WriteString(s.out, text)
	return err
}

// board is how far a run is.
type board struct {
	plan    rotation.Plan
	began   time.Time
	touched map[string]bool // steps that were begun at any time
	done    map[string]bool
	running map[string]time.Time // since when
	back    bool
}

func newBoard(p rotation.Plan, s journal.State, now time.Time) board {
	b := board{plan: p, began: now, touched: map[string]bool{}, done: map[string]bool{}, running: map[string]time.Time{}, back: s.Back}
	for name, status := range s.Steps {
		b.touched[name], b.done[name] = true, status == journal.Done || status == journal.Undoing
	}
	return b
}

// on takes in what happened.
func (b *board) on(ev journal.Progress, now time.Time) {
	switch ev.Event {
	case "started", "undoing":
		b.running[ev.Step], b.touched[ev.Step] = now, true
		b.back = b.back || ev.Event == "undoing"
	case "done", "failed", "undone":
		delete(b.running, ev.Step)
		if ev.Event != "failed" {
			b.done[ev.Step] = ev.Event == "done"
		}
	}
}

// maxRows is how many nodes are shown; of more, those at work.
const maxRows = 12

// render draws the board: how far all is, which servers answer, and each node.
func render(b board, m Measured, width int, now time.Time) string {
	var out strings.Builder
	line := func(format string, args ...any) {
		out.WriteString(cut(strings.TrimRight(fmt.Sprintf(format, args...), " "), width-1) + "\n")
	}
	done, at := 0, ""
	for _, s := range b.plan.Steps {
		switch {
		case b.done[s.Name()]:
			done++
		case at == "":
			at = string(s.Phase)
		}
	}
	line("%s", strings.Repeat("-", max(width-1, 0)))
	line("%-6s %-8s %d of %d steps [%s]  %s", short(now.Sub(b.began).Round(time.Second).Seconds()), at, done, len(b.plan.Steps), bar(done, len(b.plan.Steps)), b.way())
	line("API    %s; %s", gap(m.AnyAPI, m.APIServers), servers(m.APIServers, now))
	line("etcd   %s", servers(m.Etcd, now))
	name := len("cluster")
	for _, n := range b.plan.Nodes {
		name = min(max(name, len(n.Name)), 30)
	}
	for _, s := range b.plan.Steps {
		if since, ok := b.running[s.Name()]; ok && s.Node == "" {
			line("%-*s  %-8s        %s", name, "cluster", s.Phase, runningFor(s, since, now))
		}
	}
	rows, hidden := b.rows(now)
	for _, r := range rows {
		line("%-*s  %-8s %3d/%-3d %s", name, cut(r.node, name), r.phase, r.done, r.steps, r.doing)
	}
	if hidden > 0 {
		line("and %d more nodes", hidden)
	}
	return out.String()
}

// way says whether there is a way back.
func (b board) way() string {
	switch {
	case b.back:
		return "rolling back"
	case b.touched[b.plan.NoReturn()]:
		return "no way back"
	}
	return "can be rolled back"
}

// row is one node.
type row struct {
	node        string
	phase       string
	done, steps int
	doing       string // what runs there; empty: nothing does
}

// rows are the nodes to show: all, or the masters and those at work.
func (b board) rows(now time.Time) (rows []row, hidden int) {
	for _, n := range b.plan.Nodes {
		r := row{node: n.Name}
		for _, s := range b.plan.Steps {
			if s.Node != n.Name {
				continue
			}
			r.steps++
			if b.done[s.Name()] {
				r.done++
			} else if r.phase == "" {
				r.phase = string(s.Phase)
			}
			if since, ok := b.running[s.Name()]; ok {
				r.doing, r.phase = runningFor(s, since, now), string(s.Phase)
			}
		}
		if r.phase == "" {
			r.phase = "done"
		}
		if len(b.plan.Nodes) > maxRows && !n.Master && r.doing == "" {
			hidden++
			continue
		}
		rows = append(rows, r)
	}
	return rows, hidden
}

// runningFor is what a step does, without what its row says already, and since when.
func runningFor(s rotation.Step, since, now time.Time) string {
	what := strings.TrimSuffix(strings.TrimPrefix(s.Name(), string(s.Phase)+": "), " on "+s.Node)
	return what + " " + short(now.Sub(since).Round(time.Second).Seconds())
}

// servers says of each whether it answers.
func servers(all []Availability, now time.Time) string {
	var parts []string
	for _, a := range all {
		state := "up"
		switch {
		case !a.Since.IsZero():
			state = "away " + short(now.Sub(a.Since).Seconds())
		case a.Asked == 0:
			state = "?"
		}
		parts = append(parts, a.Node+" "+state)
	}
	return strings.Join(parts, ", ")
}

// gap is what the API was away up to now: as a whole, and the one longest.
func gap(whole Absence, all []Availability) string {
	longest := 0.0
	for _, a := range all {
		longest = max(longest, a.Longest)
	}
	if whole.Times > 0 {
		return fmt.Sprintf("longest gap %s, all at once away for %s", short(longest), short(whole.Seconds))
	}
	return "longest gap " + short(longest)
}

// bar shows a part of a whole.
func bar(part, whole int) string {
	const width = 20
	n := width
	if whole > 0 {
		n = part * width / whole
	}
	return strings.Repeat("#", n) + strings.Repeat(".", width-n)
}

// cut shortens a line, as one that wraps would move the others.
func cut(s string, width int) string {
	r := []rune(s)
	if len(r) <= width {
		return s
	}
	return string(r[:max(width-1, 0)]) + "…"
}
