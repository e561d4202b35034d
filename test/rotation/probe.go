//go:build linux

// Package rotation tests "keyfleet rotate-certs" on a real cluster (package bed),
// under probes that run from before to after.
//
// Idea: what counts is what a client sees. The probes ask through the load
// balancer and each API server directly, every time over a fresh connection and
// never twice, and keep one watch open on an object that another of them changes.
//
// Invariant: a probe never tries again; a failure is counted with its reason.
package rotation

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sigs.k8s.io/yaml"
)

// login is what a kubeconfig gives: whom to trust and who we are.
type login struct {
	roots *x509.CertPool
	cert  tls.Certificate
}

// readLogin reads a kubeconfig with embedded certificates.
func readLogin(text []byte) (*login, error) {
	var k struct {
		Clusters []struct {
			Cluster struct {
				CA string `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
		Users []struct {
			User struct {
				Cert string `json:"client-certificate-data"`
				Key  string `json:"client-key-data"`
			} `json:"user"`
		} `json:"users"`
	}
	if err := yaml.Unmarshal(text, &k); err != nil || len(k.Clusters) != 1 || len(k.Users) != 1 {
		return nil, fmt.Errorf("reading a kubeconfig: %w", err)
	}
	var parts [3][]byte
	for i, s := range []string{k.Clusters[0].Cluster.CA, k.Users[0].User.Cert, k.Users[0].User.Key} {
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			return nil, fmt.Errorf("reading a kubeconfig: %w", err)
		}
		parts[i] = b
	}
	l := &login{roots: x509.NewCertPool()}
	if !l.roots.AppendCertsFromPEM(parts[0]) {
		return nil, fmt.Errorf("reading a kubeconfig: no CA")
	}
	var err error
	l.cert, err = tls.X509KeyPair(parts[1], parts[2])
	return l, err
}

// target is one address that is asked.
type target struct {
	name    string
	address string
	verify  bool // also that its certificate is for this address
}

// outcome is what became of the requests to a target.
type outcome struct {
	total, failed int
	reasons       map[string]int
	failures      []string      // the first, with their times
	longest       time.Duration // between two answers
	last          time.Time
}

// probes ask until they are stopped.
type probes struct {
	dial  func(ctx context.Context, network, address string) (net.Conn, error)
	login atomic.Pointer[login]

	mu       sync.Mutex // guards what follows
	outcomes map[string]*outcome
	since    time.Time     // what began before does not count
	failed   time.Time     // when something failed last
	late     time.Duration // by which this machine let the probes wait at most
	written  int           // values that were tried
	wrote    []int         // those that an API server confirmed
	seen     []int
	rewatch  int

	stop, stopWatch context.CancelFunc
	done, watching  sync.WaitGroup
	ended           sync.Once
}

// begin starts probes at about twenty requests a second and target.
func begin(dial func(ctx context.Context, network, address string) (net.Conn, error), l *login, balancer string, servers map[string]string) *probes {
	p := &probes{dial: dial, outcomes: map[string]*outcome{}}
	p.login.Store(l)
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	targets := []target{{"load balancer", balancer, true}}
	for name, address := range servers {
		targets = append(targets, target{name, address, false})
	}
	for _, t := range targets {
		p.outcomes[t.name] = &outcome{reasons: map[string]int{}, last: time.Now()}
		for _, ask := range []func(context.Context, *http.Client, target) error{p.ready, p.read} {
			p.done.Go(func() { p.every(ctx, 100*time.Millisecond, t, ask) })
		}
	}
	p.done.Go(func() { p.every(ctx, 200*time.Millisecond, targets[0], p.write) })
	p.done.Go(func() { p.lag(ctx) })
	watching, stopWatch := context.WithCancel(context.Background())
	p.stopWatch = stopWatch
	p.watching.Go(func() { p.watch(watching, targets[0]) })
	return p
}

// settle waits until nothing has failed for ten seconds: a cluster that has just come
// up is not yet one whose failures a rotation has to answer for. It counts from then on.
func (p *probes) settle(ctx context.Context) error {
	const calm = 10 * time.Second
	p.mu.Lock()
	p.failed = time.Now()
	p.mu.Unlock()
	for {
		p.mu.Lock()
		left := calm - time.Since(p.failed)
		if left <= 0 {
			p.since = time.Now()
			for _, o := range p.outcomes {
				*o = outcome{reasons: map[string]int{}, last: p.since}
			}
			p.late, p.wrote = 0, nil
		}
		p.mu.Unlock()
		if left <= 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("before the rotation requests fail: %w", ctx.Err())
		case <-time.After(left):
		}
	}
}

// lag measures how late this machine is with what is due: what fails while it
// stands still tells nothing about the cluster.
func (p *probes) lag(ctx context.Context) {
	const nap = 50 * time.Millisecond
	for ctx.Err() == nil {
		due := time.Now().Add(nap)
		time.Sleep(nap)
		p.mu.Lock()
		p.late = max(p.late, time.Since(due))
		p.mu.Unlock()
	}
}

// end stops the probes and waits for them. A target that has not answered until
// then has a gap up to then. The watch goes on until it has shown what was written
// last, or half a minute has passed.
func (p *probes) end() {
	p.stop()
	p.done.Wait()
	p.ended.Do(func() {
		p.mu.Lock()
		for _, o := range p.outcomes {
			o.longest = max(o.longest, time.Since(o.last))
		}
		p.mu.Unlock()
		for late := time.Now().Add(30 * time.Second); p.missed() > 0 && time.Now().Before(late); {
			time.Sleep(50 * time.Millisecond)
		}
		p.stopWatch()
		p.watching.Wait()
	})
}

// client makes a client of one connection.
func (p *probes) client(t target) *http.Client {
	l := p.login.Load()
	host, _, _ := net.SplitHostPort(t.address)
	cfg := &tls.Config{RootCAs: l.roots, Certificates: []tls.Certificate{l.cert}, ServerName: host}
	if !t.verify { // while it restarts, another one answers for it
		cfg.InsecureSkipVerify = true
		cfg.VerifyConnection = func(s tls.ConnectionState) error {
			pool := x509.NewCertPool()
			for _, c := range s.PeerCertificates[1:] {
				pool.AddCert(c)
			}
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: l.roots, Intermediates: pool})
			return err
		}
	}
	return &http.Client{Transport: &http.Transport{DialContext: p.dial, TLSClientConfig: cfg, DisableKeepAlives: true, ForceAttemptHTTP2: false}}
}

// every asks at an interval; a request that hangs does not hold up the next.
func (p *probes) every(ctx context.Context, interval time.Duration, t target, ask func(context.Context, *http.Client, target) error) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var under sync.WaitGroup
	defer under.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		under.Go(func() {
			began := time.Now()
			limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			err := ask(limited, p.client(t), t)
			p.mu.Lock()
			defer p.mu.Unlock()
			if err != nil {
				p.failed = time.Now()
			}
			if !began.Before(p.since) {
				p.outcomes[t.name].note(began, err)
			}
		})
	}
}

func (o *outcome) note(began time.Time, err error) {
	o.total++
	now := time.Now()
	if err != nil {
		o.failed++
		o.reasons[short(err)]++
		if len(o.failures) < 20 {
			o.failures = append(o.failures, fmt.Sprintf("%s (after %.1f s) %s", began.Format("15:04:05.0"), now.Sub(began).Seconds(), short(err)))
		}
		return
	}
	o.longest = max(o.longest, now.Sub(o.last))
	o.last = now
}

// short keeps what tells failures apart.
func short(err error) string {
	text := err.Error()
	if i := strings.LastIndex(text, "\": "); i >= 0 {
		text = text[i+3:]
	}
	return text
}

func (p *probes) call(ctx context.Context, c *http.Client, t target, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+t.address+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s", method, path, resp.Status)
	}
	return out, err
}

func (p *probes) ready(ctx context.Context, c *http.Client, t target) error {
	_, err := p.call(ctx, c, t, http.MethodGet, "/readyz", nil)
	return err
}

const probed = "/api/v1/namespaces/default/configmaps"

// read needs a name: an anonymous caller may not.
func (p *probes) read(ctx context.Context, c *http.Client, t target) error {
	_, err := p.call(ctx, c, t, http.MethodGet, probed+"/kube-root-ca.crt", nil)
	return err
}

// write counts up in an object.
func (p *probes) write(ctx context.Context, c *http.Client, t target) error {
	p.mu.Lock()
	p.written++
	n := p.written
	p.mu.Unlock()
	body := fmt.Sprintf(`{"data":{"n-%d":"x","n-%d":null}}`, n, n-20)
	_, err := p.call(ctx, c, t, http.MethodPatch, probed+"/probe", []byte(body))
	if err == nil {
		p.mu.Lock()
		p.wrote = append(p.wrote, n)
		p.mu.Unlock()
	}
	return err
}

// watch follows that object, going on after the last event wherever it breaks.
func (p *probes) watch(ctx context.Context, t target) {
	version := ""
	for ctx.Err() == nil {
		version = p.watchOnce(ctx, t, version)
		p.mu.Lock()
		p.rewatch++
		p.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (p *probes) watchOnce(ctx context.Context, t target, version string) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+t.address+probed+"?watch=1&fieldSelector=metadata.name%3Dprobe&resourceVersion="+version, nil)
	if err != nil {
		return version
	}
	resp, err := p.client(t).Do(req)
	if err != nil {
		return version
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(resp.Body); ; {
		var ev struct {
			Type   string
			Object struct {
				Metadata struct{ ResourceVersion string }
				Data     map[string]string
			}
		}
		if err := dec.Decode(&ev); err != nil || ev.Type == "ERROR" {
			return version
		}
		version = ev.Object.Metadata.ResourceVersion
		p.mu.Lock()
		for name := range ev.Object.Data {
			var n int
			if _, err := fmt.Sscanf(name, "n-%d", &n); err == nil {
				p.seen = append(p.seen, n)
			}
		}
		p.mu.Unlock()
	}
}

// missed returns how many confirmed values the watch never showed.
func (p *probes) missed() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[int]bool{}
	for _, n := range p.seen {
		seen[n] = true
	}
	missed := 0
	for _, n := range p.wrote {
		if !seen[n] {
			missed++
		}
	}
	return missed
}

// String describes what the probes saw.
func (p *probes) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(p.outcomes)) {
		o := p.outcomes[name]
		fmt.Fprintf(&b, "%-14s %6d requests, %d failed, longest gap %.2f s %v\n", name, o.total, o.failed, o.longest.Seconds(), o.reasons)
		for _, f := range o.failures {
			fmt.Fprintf(&b, "               %s\n", f)
		}
	}
	fmt.Fprintf(&b, "watch          %d writes, opened again %d times\n", p.written, p.rewatch)
	fmt.Fprintf(&b, "this machine   was late by up to %.2f s\n", p.late.Seconds())
	return b.String()
}
