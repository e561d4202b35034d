//go:build bench

// Package bench measures the figures of the README on a real server. It is
// built with the tag "bench" only; `make bench` runs it and prints the table.
//
// Every figure is a median of several rounds, and what depends on the machine's
// speed is a ratio against a raw cost measured in the same run.
package bench

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

const vaultName = "benchvault"

// bench is a server with a vault, a certificate and a pool.
type bench struct {
	*stack.Stack
	ctx      context.Context
	tmp      string
	root     string // resource group id
	pool     string // resource id
	identity string
	clientID string
}

// table is what is printed.
type table struct{ rows [][3]string }

func (t *table) add(what, value, goal string) {
	t.rows = append(t.rows, [3]string{what, value, goal})
	fmt.Printf("%-72s %s\n", what, value)
}

func TestFigures(t *testing.T) {
	var out table
	for _, part := range []struct {
		name    string
		measure func(*testing.T, *table)
	}{{"startUp", startUp}, {"localNodes", localNodes}, {"simulatedAgents", simulatedAgents}, {"operations", operations}} {
		t.Run(part.name, func(t *testing.T) { part.measure(t, &out) })
	}
	fmt.Printf("\n%s\n\n| figure | measured | goal |\n|---|---|---|\n", machine())
	for _, r := range out.rows {
		fmt.Printf("| %s | %s | %s |\n", r[0], r[1], r[2])
	}
}

func machine() string {
	cpu := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if m := regexp.MustCompile(`model name\s*: (.+)`).FindSubmatch(b); m != nil {
			cpu = string(m[1])
		}
	}
	var u syscall.Utsname
	kernel := ""
	if syscall.Uname(&u) == nil {
		for _, c := range u.Release {
			if c == 0 {
				break
			}
			kernel += string(rune(c))
		}
	}
	return fmt.Sprintf("Machine: %d processors (%s), shared virtual machine, Linux %s, %s. Server, nodes and load on the same machine.", runtime.NumCPU(), cpu, kernel, runtime.Version())
}

func begin(t *testing.T) *bench {
	t.Helper()
	b := &bench{Stack: stack.Start(t, stack.Config{}), tmp: t.TempDir()}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	t.Cleanup(cancel)
	b.ctx = ctx
	b.root = "/subscriptions/" + b.Client.Subscription() + "/resourceGroups/rg"
	b.put(b.root, "2021-04-01", map[string]any{"location": "westus2"}, nil)
	var id struct {
		ID         string
		Properties struct{ ClientID, PrincipalID, TenantID string }
	}
	b.put(b.root+"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/nodes", "2023-01-31", map[string]any{"location": "westus2"}, &id)
	b.identity, b.clientID = id.ID, id.Properties.ClientID
	var me struct{ ObjectID string }
	b.call(http.MethodGet, b.Client.ARM("/keyfleet/v1/whoami"), "", nil, &me)
	policy := func(oid string, verbs ...string) any {
		return map[string]any{"tenantId": id.Properties.TenantID, "objectId": oid, "permissions": map[string]any{"secrets": verbs, "certificates": verbs}}
	}
	b.put(b.root+"/providers/Microsoft.KeyVault/vaults/"+vaultName, "2023-07-01", map[string]any{"location": "westus2", "properties": map[string]any{
		"tenantId": id.Properties.TenantID, "sku": map[string]any{"family": "A", "name": "standard"},
		"accessPolicies": []any{policy(me.ObjectID, "all"), policy(id.Properties.PrincipalID, "get")},
	}}, nil)
	if err := b.issue("web"); err != nil {
		t.Fatal(err)
	}
	acct := b.root + "/providers/Microsoft.Batch/batchAccounts/benchbatch"
	resp, err := b.Client.Do(b.ctx, client.Request{Method: http.MethodPut, URL: b.Client.ARM(acct), Version: "2021-01-01", Body: map[string]any{"location": "westus2"}})
	if err == nil {
		_, err = b.Client.Wait(b.ctx, resp, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.pool = acct + "/pools/p1"
	return b
}

func (b *bench) call(method, url, version string, in, out any) {
	b.T.Helper()
	if err := b.Client.Call(b.ctx, client.Request{Method: method, URL: url, Version: version, Body: in}, out); err != nil {
		b.T.Fatalf("%s %s: %v", method, url, err)
	}
}

func (b *bench) put(path, version string, in, out any) {
	b.T.Helper()
	b.call(http.MethodPut, b.Client.ARM(path), version, in, out)
}

func post(url string, body any) client.Request {
	return client.Request{Method: http.MethodPost, URL: url, Body: body}
}

// request asks for a certificate.
func (b *bench) request(name string) error {
	return b.Client.Call(b.ctx, client.Request{Method: http.MethodPost, URL: b.Client.Vault(vaultName, "/certificates/"+name+"/create"), Version: "7.4", Body: map[string]any{"policy": map[string]any{
		"issuer": map[string]any{"name": "Keyfleet"}, "key_props": map[string]any{"kty": "EC", "crv": "P-256", "exportable": true},
		"secret_props": map[string]any{"contentType": "application/x-pem-file"}, "x509_props": map[string]any{"subject": "CN=" + name, "validity_months": 12},
	}}}, nil)
}

// issued reports whether the certificate is there.
func (b *bench) issued(ctx context.Context, name string) (bool, error) {
	var op struct{ Status string }
	err := b.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: b.Client.Vault(vaultName, "/certificates/"+name+"/pending"), Version: "7.4"}, &op)
	return op.Status == "completed", err
}

// createPool sends the documented body with our names, and metadata that chooses the provider.
func (b *bench) createPool(nodes int, provider string) {
	b.T.Helper()
	raw, err := os.ReadFile(filepath.Join(stack.Root(b.T), "testdata", "requests", "000-put-pool-linux.json"))
	if err != nil {
		b.T.Fatal(err)
	}
	text := strings.NewReplacer(`"test2"`, `"p1"`,
		"https://testkvchinanorth2s.vault.azure.cn/secrets/authcertforumatesting/8f5f3f491afd48cb99286ba2aacd39af", b.Client.Vault(vaultName, "/secrets/web"),
		"b9f6dd56-d2d6-4967-99d7-8062d56fd84c", b.clientID,
		"/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools", b.identity,
		`"targetDedicatedNodes": 1`, fmt.Sprintf(`"targetDedicatedNodes": %d`, nodes),
		`"vmSize"`, `"metadata": [{"name": "keyfleet-provider", "value": "`+provider+`"}], "vmSize"`,
	).Replace(string(raw))
	b.put(b.pool, "2021-01-01", []byte(text), nil)
}

func (b *bench) idle(n int) {
	b.T.Helper()
	url := b.Client.Batch("benchbatch.westus2."+b.Client.Endpoints().BatchSuffix, "/pools/p1/nodes")
	stack.Eventually(b.T, time.Minute, "idle nodes", func(ctx context.Context) error {
		var list struct{ Value []struct{ State string } }
		if err := b.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: url, Version: "2021-06-01.14.0"}, &list); err != nil {
			return err
		}
		idle := 0
		for _, x := range list.Value {
			if x.State == "idle" {
				idle++
			}
		}
		if idle != n {
			return fmt.Errorf("%d idle", idle)
		}
		return nil
	})
}

// renewNow issues the next version and returns it with the moment it was stored.
func (b *bench) renewNow() keyfleet.Deliveries {
	b.T.Helper()
	before := b.deliveries()
	b.call(http.MethodPost, b.Client.ARM("/keyfleet/v1/vaults/"+vaultName+"/certificates/web/renew"), "", nil, nil)
	var now keyfleet.Deliveries
	stack.Eventually(b.T, 30*time.Second, "a new version", func(context.Context) error {
		if now = b.deliveries(); now.Version == before.Version {
			return errors.New("not yet")
		}
		return nil
	})
	return now
}

func (b *bench) deliveries() (d keyfleet.Deliveries) {
	b.T.Helper()
	b.call(http.MethodGet, b.Client.ARM("/keyfleet/v1/vaults/"+vaultName+"/certificates/web/deliveries"), "", nil, &d)
	return d
}

// startUp: from exec to the ready line, on a new and on a used directory; idle memory.
func startUp(t *testing.T, out *table) {
	var fresh, again []time.Duration
	var rss []float64
	for range 5 {
		began := time.Now()
		s := stack.Start(t, stack.Config{})
		fresh = append(fresh, time.Since(began))
		time.Sleep(3 * time.Second) // let it settle; this is what is measured
		rss = append(rss, memory(t, s.PID()))
		s.Kill()
		began = time.Now()
		if err := s.Run(); err != nil {
			t.Fatal(err)
		}
		again = append(again, time.Since(began))
		s.Stop()
	}
	out.add("server ready, new data directory (median of 5)", ms(median(fresh)), "< 1 s")
	out.add("server ready after SIGKILL (median of 5)", ms(median(again)), "< 1 s")
	out.add("idle server, resident memory (median of 5)", fmt.Sprintf("%.0f MB", medianF(rss)), "< 60 MB")
}

// localNodes: from the commit of a version to the last link flip on three local nodes; memory on a node.
func localNodes(t *testing.T, out *table) {
	b := begin(t)
	b.createPool(3, "local")
	b.idle(3)
	var took []time.Duration
	for range 60 {
		now := b.renewNow()
		stack.Eventually(t, 2*time.Minute, "delivery", func(context.Context) error {
			d := b.deliveries()
			slowest := 0.0
			for _, n := range d.Nodes {
				if n.Version != now.Version {
					return errors.New("not yet")
				}
				slowest = max(slowest, n.Seconds)
			}
			took = append(took, time.Duration(slowest*float64(time.Second)))
			return nil
		})
	}
	out.add("commit of a version to the last of 3 local nodes' link flip, p50 / p99 (60 renewals)", ms(quantile(took, .5))+" / "+ms(quantile(took, .99)), "< 250 ms / < 1 s")
	var agents, extensions []float64
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		pid, _ := strconv.Atoi(strings.Split(f, "/")[2])
		args := strings.Split(string(text), "\x00")
		switch {
		case len(args) > 1 && strings.HasSuffix(args[0], "keyfleet-agent") && args[1] == "run":
			agents = append(agents, memory(t, pid))
		case len(args) > 1 && strings.HasSuffix(args[0], "keyfleet-keyvault-extension") && args[1] == "run":
			extensions = append(extensions, memory(t, pid))
		}
	}
	if len(agents) == 0 || len(extensions) == 0 {
		t.Fatal("no agent or extension process was found")
	}
	out.add("node agent, resident memory", fmt.Sprintf("%.0f MB", medianF(agents)), "< 20 MB")
	out.add("Key Vault extension, resident memory", fmt.Sprintf("%.0f MB", medianF(extensions)), "< 15 MB")
	b.Stop()
}

// simulatedAgents: memory of 1,000 watches; delivery to 200 agents.
func simulatedAgents(t *testing.T, out *table) {
	const watches, nodes = 1000, 200
	b := begin(t)
	b.createPool(0, "host")
	agents := make([]*agent, watches)
	g, _ := errgroup.WithContext(b.ctx)
	g.SetLimit(8)
	for i := range agents {
		g.Go(func() (err error) { agents[i], err = b.newAgent(i); return err })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	flip := newFlips()
	for _, a := range agents {
		a.client.CloseIdleConnections()
		a.flipped = flip.note
	}
	settle := func() (float64, float64) { time.Sleep(5 * time.Second); return memory(t, b.PID()), b.goroutines() }
	rss0, gor0 := settle()
	ready := make(chan struct{}, watches)
	for _, a := range agents {
		go func() { // ends when the agent's watch is closed
			if err := a.hold(func() { ready <- struct{}{} }); err != nil && b.ctx.Err() == nil {
				t.Errorf("agent %s: %v", a.id, err)
			}
		}()
	}
	for range watches {
		<-ready
	}
	rss1, gor1 := settle()
	out.add("server memory per watching agent, 1,000 agents", fmt.Sprintf("%.1f KiB", (rss1-rss0)*1e6/1024/watches), "< 24 KiB")
	out.add("server goroutines per watching agent", fmt.Sprintf("%.2f", (gor1-gor0)/watches), "1")

	b.call(http.MethodPatch, b.Client.ARM(b.pool), "2021-01-01", map[string]any{"properties": map[string]any{"scaleSettings": map[string]any{"fixedScale": map[string]any{"targetDedicatedNodes": nodes}}}}, nil)
	first := b.deliveries().Version
	ctx, cancel := context.WithTimeout(b.ctx, 3*time.Minute)
	defer cancel()
	if _, err := flip.wait(ctx, first, nodes); err != nil {
		t.Fatal(err)
	}
	var took []time.Duration
	for range 30 {
		now := b.renewNow()
		last, err := flip.wait(ctx, now.Version, nodes)
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, last.Sub(now.Issued))
	}
	out.add("commit of a version to the last of 200 simulated agents' link flip, p50 / p99 (30 renewals)", ms(quantile(took, .5))+" / "+ms(quantile(took, .99)), "< 250 ms / < 1 s")
	for _, a := range agents {
		a.watch.Close()
	}
	b.Stop()
}

// operations: processor time of the server per operation, beside raw costs of the same run.
func operations(t *testing.T, out *table) {
	b := begin(t)
	const rounds = 3
	value := strings.Repeat("x", 2048)
	secret := b.Client.Vault(vaultName, "/secrets/blob")
	b.call(http.MethodPut, secret, "7.4", map[string]any{"value": value}, nil)

	request := func(method, url string, body any) func(int) error {
		return func(int) error {
			return b.Client.Call(b.ctx, client.Request{Method: method, URL: url, Version: "7.4", Body: body}, nil)
		}
	}
	var health, get, set, cert, sign []time.Duration
	for round := range rounds {
		health = append(health, b.perOperation(8000, request(http.MethodGet, b.Client.ARM("/healthz"), nil)))
		get = append(get, b.perOperation(8000, request(http.MethodGet, secret, nil)))
		set = append(set, b.perOperation(1000, func(i int) error {
			return request(http.MethodPut, fmt.Sprintf("%s%d", secret, i), map[string]any{"value": value})(i)
		}))
		cert = append(cert, b.perCertificate(500, round))
		sign = append(sign, signature(t))
	}
	h, g, s, c, sg := median(health), median(get), median(set), median(cert), median(sign)
	out.add("server CPU: TLS request that only reads through the store (raw limit)", us(h), "")
	out.add("server CPU: secret GET of 2 KiB, decided and recorded", fmt.Sprintf("%s (request alone: %s)", us(g), us(h)), "< 100 µs")
	out.add("server CPU: sealed secret SET of 2 KiB", us(s), "")
	out.add("one P-256 signature, same machine, same run", us(sg), "")
	out.add("server CPU: P-256 certificate from a policy, with its two requests", fmt.Sprintf("%s = %.1f x (signature + request + sealed write)", us(c), float64(c)/float64(sg+h+s)), "1.5 x")
	b.Stop()
}

// callers is how many requests are under way at once in operations: a server
// that is idle between two requests mostly pays for waking up.
const callers = 16

// perOperation is the server's processor time per call of op.
func (b *bench) perOperation(n int, op func(i int) error) time.Duration {
	b.T.Helper()
	if err := op(1 << 20); err != nil {
		b.T.Fatal(err)
	}
	var g errgroup.Group
	g.SetLimit(callers)
	before := processorTime(b.T, b.PID())
	for i := range n {
		g.Go(func() error { return op(i) })
	}
	if err := g.Wait(); err != nil {
		b.T.Fatal(err)
	}
	return (processorTime(b.T, b.PID()) - before) / time.Duration(n)
}

// perCertificate is the server's processor time per certificate: the request,
// all that follows from it, and the one look of a client that comes when it is done.
func (b *bench) perCertificate(n, round int) time.Duration {
	b.T.Helper()
	name := func(i int) string { return fmt.Sprintf("c%d-%d", round, i) }
	asked := b.perOperation(n, func(i int) error { return b.request(name(i)) })
	before := processorTime(b.T, b.PID())
	time.Sleep(2 * time.Second) // the last ones are made
	for i := range n {
		done, err := b.issued(b.ctx, name(i))
		if err != nil || !done {
			b.T.Fatalf("certificate %s is not there: %v", name(i), err)
		}
	}
	return asked + (processorTime(b.T, b.PID())-before)/time.Duration(n)
}

// issue creates a certificate and waits until it is there.
func (b *bench) issue(name string) error {
	if err := b.request(name); err != nil {
		return err
	}
	for end := time.Now().Add(time.Minute); ; {
		done, err := b.issued(b.ctx, name)
		if err != nil || done {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("certificate %s is not there after a minute", name)
		}
		time.Sleep(20 * time.Millisecond) // as a client that polls
	}
}

func signature(t *testing.T) time.Duration {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("x"))
	const n = 5000
	before := processorTime(t, os.Getpid())
	for range n {
		if _, err := ecdsa.SignASN1(rand.Reader, key, sum[:]); err != nil {
			t.Fatal(err)
		}
	}
	return (processorTime(t, os.Getpid()) - before) / n
}

// processorTime is the user and system time of a process so far (proc(5); ticks of 10 ms).
func processorTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+2:]))
	user, err1 := strconv.Atoi(f[11])
	sys, err2 := strconv.Atoi(f[12])
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+sys) * 10 * time.Millisecond
}

// memory is the resident memory of a process in MB.
func memory(t testing.TB, pid int) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("process %d has no VmRSS", pid)
	}
	kb, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb * 1024 / 1e6
}

func (b *bench) goroutines() float64 {
	b.T.Helper()
	resp, err := b.Client.Do(b.ctx, client.Request{Method: http.MethodGet, URL: b.Client.ARM("/metrics"), Open: true})
	if err != nil {
		b.T.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^go_goroutines (\d+)`).FindSubmatch(resp.Body)
	if m == nil {
		b.T.Fatal("no go_goroutines in the metrics")
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		b.T.Fatal(err)
	}
	return n
}

func median(d []time.Duration) time.Duration { return quantile(d, .5) }

func medianF(f []float64) float64 {
	f = slices.Sorted(slices.Values(f))
	return f[len(f)/2]
}

func quantile(d []time.Duration, q float64) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[min(len(d)-1, int(q*float64(len(d))))]
}

func ms(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
func us(d time.Duration) string { return fmt.Sprintf("%d µs", d.Microseconds()) }
