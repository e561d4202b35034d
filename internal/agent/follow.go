package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// watchSilence is how long a watch may be silent: pings come every 30 s, so two of them were lost.
const watchSilence = 75 * time.Second

// watchLine is the longest line that a watch may bring, in bytes.
const watchLine = 512

// event is a line of a watch, understood.
type event struct {
	Kind    string // "rev", "session", "logs", "retry", "ping"; "" for a line that is none of these
	Rev     int64
	Session string // id
	What    string // kind of the session
	Seconds int
}

// parseEvent reads a line of a watch. Lines of later servers are no error: their Kind is empty.
func parseEvent(line string) event {
	f := strings.Fields(line)
	switch {
	case len(f) == 2 && f[0] == "rev":
		if n, err := strconv.ParseInt(f[1], 10, 64); err == nil {
			return event{Kind: "rev", Rev: n}
		}
	case len(f) == 3 && f[0] == "session" && idForm.MatchString(f[1]) && idForm.MatchString(f[2]):
		return event{Kind: "session", Session: f[1], What: f[2]}
	case len(f) == 2 && f[0] == "retry":
		if n, err := strconv.Atoi(f[1]); err == nil && n >= 0 {
			return event{Kind: "retry", Seconds: min(n, 600)}
		}
	case len(f) == 1 && (f[0] == "ping" || f[0] == "logs"):
		return event{Kind: f[0]}
	}
	return event{}
}

// idForm is the form of a session's id and kind: they go into URL paths.
var idForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)

// watchLoop holds the watch, and connects again when it ends, until ctx ends.
// The server says over how long to spread a reconnect; failures in a row double it.
func (a *Agent) watchLoop(ctx context.Context) {
	over, failures := time.Second, 0
	for ctx.Err() == nil {
		began := time.Now()
		told, err := a.watch(ctx)
		if told > 0 {
			over = told
		}
		if ctx.Err() != nil {
			return
		}
		if told > 0 && time.Since(began) > time.Second {
			failures = 0
		}
		wait := retryAfter(failures, over, max(time.Minute, over), spread())
		var ans *answerError
		if errors.As(err, &ans) && ans.RetryAfter > 0 {
			wait = ans.RetryAfter + time.Duration(float64(ans.RetryAfter)*spread()/5)
		}
		failures++
		a.cfg.Log.Debug("the watch ended", "error", err, "again", wait)
		if !sleep(ctx, wait) {
			return
		}
	}
}

// watch holds one watch until it ends. told is what the server said about
// spreading the next connect; it is positive if the watch was admitted.
func (a *Agent) watch(ctx context.Context) (told time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	resp, err := a.srv.stream(ctx, "/v1/watch", nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	silence := time.AfterFunc(watchSilence, cancel)
	defer silence.Stop()
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(make([]byte, 0, watchLine), watchLine)
	told = time.Second
	signal(a.fetch) // what changed before the watch was there
	signal(a.news)  // what could not be reported
	a.retryDownloads()
	for sc.Scan() {
		silence.Reset(watchSilence)
		switch e := parseEvent(sc.Text()); e.Kind {
		case "rev":
			if e.Rev != a.revision() {
				signal(a.fetch)
			}
		case "retry":
			told = max(time.Duration(e.Seconds)*time.Second, 100*time.Millisecond)
		case "logs":
			a.askLogs()
		case "session":
			if a.cfg.Session != nil {
				a.wg.Go(func() { a.cfg.Session(a.ctx, a, e.Session, e.What) })
			}
		}
	}
	return told, sc.Err()
}

// retryDownloads makes failed downloads due: the server is there again.
func (a *Agent) retryDownloads() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, in := range a.instances {
		if in.finding != nil && in.finding.code == codeDownload && !in.next.IsZero() {
			in.next = time.Now()
			signal(a.work)
		}
	}
}

// signal wakes the loop that waits on a channel of capacity 1.
func signal(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default: // awake already
	}
}

// revision is the revision of the goal state that the agent has; 0: none.
func (a *Agent) revision() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.goal == nil {
		return 0
	}
	return a.goal.Revision
}

// defaultPoll is how often the goal state is fetched when nothing is heard and it does not say.
const defaultPoll = 5 * time.Minute

// followLoop fetches the goal state when told to, and at the poll interval
// (+-20 %) as the upper bound, until ctx ends.
func (a *Agent) followLoop(ctx context.Context) {
	failures := 0
	for {
		err := a.fetchGoal(ctx)
		if ctx.Err() != nil {
			return
		}
		wait := time.Duration(float64(a.pollEvery()) * (0.8 + 0.4*spread()))
		if err != nil {
			wait = min(wait, retryAfter(failures, 500*time.Millisecond, time.Minute, 0.5+spread()/2))
			var ans *answerError
			if errors.As(err, &ans) && ans.RetryAfter > 0 {
				wait = ans.RetryAfter
			}
			failures++
			a.logFetchFailure(err, failures)
		} else {
			failures = 0
		}
		t := time.NewTimer(wait)
		select {
		case <-a.fetch:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// logFetchFailure says why the goal state cannot be fetched: the first time, and then ever more seldom.
func (a *Agent) logFetchFailure(err error, failures int) {
	if failures&(failures-1) != 0 { // not a power of two
		return
	}
	if isAnswer(err, http.StatusNotFound, "NodeNotFound") {
		a.cfg.Log.Warn("the server knows no such node; everything is kept as it is", "failures", failures)
		return
	}
	a.cfg.Log.Warn("the goal state cannot be fetched; keeping the last one", "error", err, "failures", failures)
}

func (a *Agent) pollEvery() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.goal == nil || a.goal.Poll <= 0 {
		return defaultPoll
	}
	return max(time.Duration(a.goal.Poll)*time.Second, time.Second)
}

// fetchGoal fetches the goal state if it changed and takes it.
func (a *Agent) fetchGoal(ctx context.Context) error {
	h := http.Header{}
	if rev := a.revision(); rev != 0 {
		h.Set("If-None-Match", `"`+strconv.FormatInt(rev, 10)+`"`)
	}
	var g node.GoalState
	resp, err := a.srv.do(ctx, http.MethodGet, "/v1/goal", h, nil, &g)
	if err != nil {
		return err
	}
	a.heard.Do(func() { close(a.contact) })
	if resp.StatusCode == http.StatusNotModified {
		return nil
	}
	if !samePool(a.cfg.Pool, g.Pool) {
		return fmt.Errorf("the server made this machine a node of %s, but it was told to join %s", g.Pool, a.cfg.Pool)
	}
	data, err := json.Marshal(g)
	if err != nil {
		return err
	}
	if err := writeFile("goal state", a.statePath(goalFile), data, 0o600); err != nil {
		return err
	}
	a.takeGoal(&g)
	return nil
}

// samePool reports whether a goal state's pool is the one that was wished, by
// resource id or name. A host that no pool uses yet has none.
func samePool(wished, is string) bool {
	return wished == "" || is == "" || strings.EqualFold(wished, is) || strings.EqualFold(wished, is[strings.LastIndexByte(is, '/')+1:])
}

// loadGoal takes the last goal state from disk; with none there it does nothing.
func (a *Agent) loadGoal() error {
	data, err := readIfThere(a.statePath(goalFile))
	if err != nil || data == nil {
		return err
	}
	g, err := parseGoal(data)
	if err != nil {
		a.cfg.Log.Warn("the kept goal state is not usable; waiting for the server", "error", err)
		return nil
	}
	a.takeGoal(&g)
	return nil
}

// parseGoal reads a goal state.
func parseGoal(data []byte) (node.GoalState, error) {
	var g node.GoalState
	if err := json.Unmarshal(data, &g); err != nil {
		return g, fmt.Errorf("reading goal state: %w", err)
	}
	return g, nil
}

// takeGoal makes g what the agent works towards. Hints go out here, not after
// the extensions were dealt with: a long enable must not delay a renewal.
func (a *Agent) takeGoal(g *node.GoalState) {
	a.mu.Lock()
	old := a.goal
	a.goal = g
	a.mu.Unlock()
	if old == nil || !sameIdentities(old.Identities, g.Identities) {
		a.tokens.forget()
	}
	for _, x := range g.Extensions {
		a.hints.set(x.Name, x.Hint)
	}
	if a.cfg.ManageHosts {
		if err := a.writeHosts(g.Hosts); err != nil {
			a.cfg.Log.Error("the hosts file could not be written", "error", err)
		}
	}
	a.cfg.Log.Debug("goal state", "revision", g.Revision, "extensions", len(g.Extensions))
	signal(a.work)
	signal(a.news)
}

func sameIdentities(a, b []node.Identity) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
