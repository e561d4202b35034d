package rotatecerts

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// What people see while a run goes on. A probe asks each API server and each
// etcd about every second whether it is there, as a new client would, and keeps
// what it finds; on a terminal a board of nodes and servers stays below the lines
// that are printed. Elsewhere the lines are all there is.

const (
	askEvery  = time.Second
	askWithin = 3 * time.Second // an answer that comes later is none
)

// probe measures from here how long servers are away. It looks at availability,
// not at trust, so it accepts every certificate and any answer. Each ask has a
// connection of its own, as a kept one would outlive what new clients suffer,
// and is never repeated. An address that a neighbour answers for, while its own
// server restarts, is not away.
type probe struct {
	dial    rotation.Dialer
	targets []target
	began   time.Time
	cancel  context.CancelFunc
	asking  sync.WaitGroup

	mu      sync.Mutex
	ended   time.Time // zero: it goes on
	records []record  // of the targets
}

// target is a server that is asked.
type target struct {
	node, address string
	api           bool // asked for /readyz; else etcd, of which a TLS handshake is asked
}

// record is what a target did.
type record struct {
	asked, failed, notReady int
	absences                []span // those that are over
	since                   time.Time
}

// span is a time in which something was away.
type span struct{ from, to time.Time }

// targetsOf are the servers of the masters.
func targetsOf(nodes []rotation.Node, etcdPort string) []target {
	var apis, etcds []target
	for _, n := range nodes {
		if n.Master {
			apis = append(apis, target{node: n.Name, address: n.Endpoint, api: true})
			etcds = append(etcds, target{node: n.Name, address: net.JoinHostPort(n.Address, etcdPort)})
		}
	}
	return append(apis, etcds...)
}

func newProbe(d rotation.Dialer, targets []target) *probe {
	return &probe{dial: d, targets: targets, records: make([]record, len(targets))}
}

// Start begins to ask, until ctx ends or Stop.
func (p *probe) Start(ctx context.Context) {
	ctx, p.cancel = context.WithCancel(ctx)
	p.began = time.Now()
	for i, t := range p.targets {
		p.asking.Go(func() {
			for wait := time.Duration(0); sleep(ctx, wait); {
				began := time.Now()
				status, err := p.ask(ctx, t)
				if ctx.Err() != nil {
					return // the end of the run says nothing about the server
				}
				p.note(i, began, time.Now(), status, err)
				wait = askEvery - time.Since(began)
			}
		})
	}
}

// Stop ends the asking.
func (p *probe) Stop() {
	p.cancel()
	p.asking.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended.IsZero() {
		p.ended = time.Now()
	}
}

// sleep waits, and reports whether ctx still goes on.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// ask asks once. An API server's status is that of its answer.
func (p *probe) ask(ctx context.Context, t target) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	raw, err := p.dial.DialContext(ctx, "tcp", t.address)
	if err != nil {
		return 0, err
	}
	defer raw.Close() // not TLS's way: it would wait for a server that does not read
	defer context.AfterFunc(ctx, func() { _ = raw.Close() })()
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}) // to be there is all that is asked
	err = conn.HandshakeContext(ctx)
	if !t.api {
		var alert *net.OpError
		if errors.As(err, &alert) && alert.Op == "remote error" {
			return 0, nil // it wants to see a certificate: it is there
		}
		return 0, err
	}
	if err == nil {
		_, err = fmt.Fprintf(conn, "GET /readyz HTTP/1.1\r\nHost: %s\r\nUser-Agent: keyfleet-rotate-certs\r\nConnection: close\r\n\r\n", t.address)
	}
	if err != nil {
		return 0, err
	}
	line, err := bufio.NewReader(io.LimitReader(conn, 4<<10)).ReadString('\n')
	if err != nil {
		return 0, err
	}
	if _, err := fmt.Sscanf(line, "HTTP/1.1 %d", &status); err != nil {
		return 0, fmt.Errorf("it does not speak HTTP: %w", err)
	}
	return status, nil
}

// note keeps the outcome of an ask. An absence lasts from the beginning of the
// first ask that fails to the answer of the first that does not.
func (p *probe) note(i int, began, ended time.Time, status int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := &p.records[i]
	r.asked++
	switch {
	case err != nil:
		r.failed++
		if r.since.IsZero() {
			r.since = began
		}
		return
	case p.targets[i].api && status != 200:
		r.notReady++
	}
	if !r.since.IsZero() {
		r.absences = append(r.absences, span{r.since, ended})
		r.since = time.Time{}
	}
}

// Absence is how often and how long something did not answer.
type Absence struct {
	Times   int     `json:"absences"`
	Seconds float64 `json:"awaySeconds"`
	Longest float64 `json:"longestSeconds"`
	// Since is when the present absence began; zero: it answers.
	Since time.Time `json:"-"`
}

// Availability is how a server answered.
type Availability struct {
	Node     string `json:"node"`
	Asked    int    `json:"asked"`
	Failed   int    `json:"failed"`
	NotReady int    `json:"notReady,omitempty"` // answered, with another status than 200
	Absence
}

// Measured is what the probe found, to about a second.
type Measured struct {
	Seconds    float64        `json:"seconds"`
	AnyAPI     Absence        `json:"anyAPIServer"` // the cluster: away while all API servers were
	APIServers []Availability `json:"apiServers"`
	Etcd       []Availability `json:"etcd"`
	// Nothing is away while all API servers and all of etcd were: then the way
	// from here may have been broken, and not they.
	Nothing Absence `json:"nothing"`
}

// Snapshot is what was found up to now.
func (p *probe) Snapshot() Measured {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.ended
	if now.IsZero() {
		now = time.Now()
	}
	m := Measured{Seconds: seconds(now.Sub(p.began))}
	var apis, all [][]span
	for i, t := range p.targets {
		r := p.records[i]
		away := slices.Clone(r.absences)
		if !r.since.IsZero() {
			away = append(away, span{r.since, now})
		}
		a := Availability{Node: t.node, Asked: r.asked, Failed: r.failed, NotReady: r.notReady, Absence: absence(away, now)}
		a.Since = r.since
		all = append(all, away)
		if t.api {
			apis = append(apis, away)
			m.APIServers = append(m.APIServers, a)
		} else {
			m.Etcd = append(m.Etcd, a)
		}
	}
	m.AnyAPI, m.Nothing = absence(common(apis), now), absence(common(all), now)
	return m
}

// absence adds up. One that reaches up to now goes on.
func absence(all []span, now time.Time) Absence {
	a := Absence{Times: len(all)}
	var sum, longest time.Duration
	for _, s := range all {
		d := s.to.Sub(s.from)
		sum, longest = sum+d, max(longest, d)
		if s.to.Equal(now) {
			a.Since = s.from
		}
	}
	a.Seconds, a.Longest = seconds(sum), seconds(longest)
	return a
}

// common is when all were away.
func common(lists [][]span) []span {
	if len(lists) == 0 {
		return nil
	}
	both := lists[0]
	for _, list := range lists[1:] {
		var next []span
		for _, a := range both {
			for _, b := range list {
				s := span{from: a.from, to: a.to}
				if b.from.After(s.from) {
					s.from = b.from
				}
				if b.to.Before(s.to) {
					s.to = b.to
				}
				if s.from.Before(s.to) {
					next = append(next, s)
				}
			}
		}
		both = next
	}
	return both
}

func seconds(d time.Duration) float64 { return math.Round(d.Seconds()*1000) / 1000 }

// Describe writes what was found, for people.
func (m Measured) Describe(w io.Writer) {
	fmt.Fprintf(w, "Asked from here, about every second for %s:\n", short(m.Seconds))
	fmt.Fprintf(w, "  %-24s %s\n", "any API server", m.AnyAPI)
	for i, a := range append(slices.Clone(m.APIServers), m.Etcd...) {
		name := "API of " + a.Node
		if i >= len(m.APIServers) {
			name = "etcd of " + a.Node
		}
		detail := ""
		if a.Failed+a.NotReady > 0 {
			detail = fmt.Sprintf(" (asked %d times, failed %d, not ready %d)", a.Asked, a.Failed, a.NotReady)
		}
		fmt.Fprintf(w, "  %-24s %s%s\n", name, a.Absence, detail)
	}
	if m.Nothing.Times > 0 {
		fmt.Fprintf(w, "  For %s nothing answered at all: the way to the SSH host may have been broken then.\n", short(m.Nothing.Seconds))
	}
}

// String says it in words.
func (a Absence) String() string {
	switch a.Times {
	case 0:
		return "always answered"
	case 1:
		return "away once, for " + short(a.Seconds)
	}
	return fmt.Sprintf("away %d times, %s in all, %s at most", a.Times, short(a.Seconds), short(a.Longest))
}

// short is a time as people write it: 0.4s, 43s, 4m12s.
func short(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	if d < 10*time.Second {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}
