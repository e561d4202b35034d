package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/client"
)

// check is the outcome of one check.
type check struct {
	ID      string `json:"id"`    // stable: "server.clock"
	State   string `json:"state"` // ok, attention, failed, skipped
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"` // one command
}

// States of a check.
const (
	checkOK        = "ok"
	checkAttention = "attention"
	checkFailed    = "failed"
	checkSkipped   = "skipped"
)

// doctor collects checks. A failed one makes those that need it skipped.
type doctor struct {
	t      *tool
	checks []check
}

func (d *doctor) add(id, state, fix, format string, args ...any) bool {
	d.checks = append(d.checks, check{ID: id, State: state, Message: sentence(fmt.Sprintf(format, args...)), Fix: fix})
	return state == checkOK || state == checkAttention
}

// fail adds a failed check from an error.
func (d *doctor) fail(id string, err error) bool {
	r := reportOf(err)
	return d.add(id, checkFailed, r.Fix, "%s: %s", r.Code, strings.TrimSuffix(r.Message, "."))
}

func (t *tool) doctorCommand() *cobra.Command {
	c := t.verb("doctor", "Check this client, the server, and every node", "keyfleet doctor\nkeyfleet doctor -o json --query \"[?state!='ok']\"", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		d := &doctor{t: t}
		if d.client(ctx) && d.server(ctx) {
			d.renewals(ctx)
			d.pools(ctx)
		} else {
			d.add("server.rest", checkSkipped, "", "nothing more can be checked until the above is mended")
		}
		if err := many(t, d.checks, view[check]{
			name: func(c check) string { return c.ID },
			columns: []column[check]{
				{head: "Check", cell: func(c check) string { return c.ID }},
				{head: "State", cell: func(c check) string { return c.State }},
				{head: "Message", cell: func(c check) string { return c.Message }},
				{head: "Fix", cell: func(c check) string { return c.Fix }},
			},
		}); err != nil {
			return err
		}
		for _, c := range d.checks {
			if c.State != checkOK && c.State != checkSkipped {
				return exitStatus(exitAttention)
			}
		}
		return nil
	})
	c.Long = `Check this client, the server, and every node. Each check has an id, a reason and,
where something is wrong, one command that mends it. The exit code is 0 when all
is well and 11 when something needs attention.`
	return c
}

// client checks what is on this machine. It reports whether the server can be asked.
func (d *doctor) client(ctx context.Context) bool {
	tg, err := d.t.pick(ctx)
	if err != nil {
		return d.fail("client.context", err)
	}
	d.add("client.context", checkOK, "", "context %q for %s", tg.name, tg.Endpoints.ResourceManager)
	d.namespaces(tg)
	if tg.CA == "" {
		d.add("client.ca", checkOK, "", "the server is checked against the system's roots")
		return true
	}
	block, _ := pem.Decode([]byte(tg.CA))
	if block == nil {
		return d.add("client.ca", checkFailed, "keyfleet login --from DIR", "the context's CA is no certificate")
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return d.add("client.ca", checkFailed, "keyfleet login --from DIR", "the context's CA cannot be read: %v", err)
	}
	left := ca.NotAfter.Sub(d.t.now())
	switch {
	case left <= 0:
		return d.add("client.ca", checkFailed, "keyfleet login --from DIR", "the server's CA expired %s", d.t.when(ca.NotAfter))
	case left < 60*24*time.Hour:
		return d.add("client.ca", checkAttention, "keyfleet login --from DIR", "the server's CA expires in %s", age(left))
	}
	return d.add("client.ca", checkOK, "", "the server's CA is good for %s", age(left))
}

// namespaces checks whether a server on this machine can start local nodes.
func (d *doctor) namespaces(tg *target) {
	host, _, err := net.SplitHostPort(tg.Endpoints.Listen)
	if err != nil || runtime.GOOS != "linux" || !net.ParseIP(host).IsLoopback() || os.Geteuid() == 0 {
		return // nodes are elsewhere, or root starts them
	}
	for _, f := range []struct{ path, bad, fix string }{
		{"/proc/sys/user/max_user_namespaces", "0", "sudo sysctl -w user.max_user_namespaces=15000"},
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"},
	} {
		if b, err := os.ReadFile(f.path); err == nil && strings.TrimSpace(string(b)) == f.bad {
			d.add("client.namespaces", checkAttention, f.fix, "local nodes need user namespaces, and %s is %s", f.path, f.bad)
			return
		}
	}
	d.add("client.namespaces", checkOK, "", "local nodes may use user namespaces")
}

// server checks the server itself. It reports whether it answers to us.
func (d *doctor) server(ctx context.Context) bool {
	c, err := d.t.connect(ctx)
	if err != nil {
		return d.fail("server.reach", err)
	}
	resp, err := c.Do(ctx, client.Request{Method: http.MethodGet, URL: c.ARM("/metadata/endpoints"), Version: "2022-09-01", Open: true})
	if err != nil {
		return d.fail("server.reach", err)
	}
	d.add("server.reach", checkOK, "", "%s answers", d.t.target.Endpoints.ResourceManager)
	d.clock(resp)
	d.certificate(ctx, c)
	if _, err := c.Token(ctx, d.t.target.Endpoints.ResourceManager); err != nil {
		return d.fail("server.login", err)
	}
	subs, err := c.Subscriptions(ctx)
	if err != nil {
		return d.fail("server.login", err)
	}
	d.add("server.login", checkOK, "", "logged in as %s", d.t.target.ClientID)
	for _, s := range subs {
		if strings.EqualFold(s.SubscriptionID, d.t.target.Subscription) {
			return d.add("server.subscription", checkOK, "", "subscription %s is visible", s.SubscriptionID)
		}
	}
	return d.add("server.subscription", checkFailed, "keyfleet subscription list", "subscription %q is not visible to you", d.t.target.Subscription)
}

// maxSkew is how far clocks may differ: tokens and certificates are given that much.
const maxSkew = 2 * time.Minute

func (d *doctor) clock(resp *client.Response) {
	at, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		d.add("server.clock", checkSkipped, "", "the server does not say what time it is")
		return
	}
	if skew := at.Sub(d.t.now()).Round(time.Second); skew.Abs() > maxSkew {
		d.add("server.clock", checkAttention, "timedatectl set-ntp true", "the server's clock differs by %s", age(skew))
		return
	}
	d.add("server.clock", checkOK, "", "the clocks agree")
}

// certificate checks how long the server's own certificate is good for.
func (d *doctor) certificate(ctx context.Context, c *client.Client) {
	u, err := url.Parse(d.t.target.Endpoints.ResourceManager)
	if err != nil {
		return
	}
	raw, err := c.DialContext(ctx, "tcp", hostPort(u))
	if err != nil {
		d.fail("server.certificate", err)
		return
	}
	defer func() { _ = raw.Close() }()
	conf := c.TLSConfig()
	conf.ServerName = u.Hostname()
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		d.fail("server.certificate", err)
		return
	}
	leaf := conn.ConnectionState().PeerCertificates[0]
	life, left := leaf.NotAfter.Sub(leaf.NotBefore), leaf.NotAfter.Sub(d.t.now())
	if left < life/6 { // renewed long before, if renewing works
		d.add("server.certificate", checkAttention, "systemctl restart keyfleet-server", "the server's own certificate ends in %s", age(left))
		return
	}
	d.add("server.certificate", checkOK, "", "the server's own certificate is good for %s", age(left))
}

func hostPort(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	return net.JoinHostPort(u.Hostname(), "443")
}

// renewals checks that certificates renew.
func (d *doctor) renewals(ctx context.Context) {
	all, err := d.t.listResources(ctx, keyVault, vaults, client.VersionVaults)
	if err != nil {
		d.fail("vault.renewal", err)
		return
	}
	good := 0
	for _, v := range all {
		certs, err := d.t.list(ctx, d.t.client.Vault(v.name(), "/certificates"), client.VersionVaultData)
		var e *client.Error
		if errors.As(err, &e) && e.Status == http.StatusForbidden {
			d.add("vault.renewal", checkSkipped, "keyfleet vault set-policy "+v.name()+" --self --certificate-permissions get,list", "you may not look into vault %s", v.name())
			continue
		}
		if err != nil {
			d.fail("vault.renewal", err)
			continue
		}
		for _, c := range certs {
			good += d.renewal(ctx, v.name(), nameOf(c, "id"))
		}
	}
	d.add("vault.renewal", checkOK, "", "%s in %s renew as they should or have time", plural(good, "certificate"), plural(len(all), "vault"))
}

// soon is when the end of a certificate that nothing renews needs attention.
const soon = 30 * 24 * time.Hour

// renewal checks one certificate; it returns 1 for one that is as it should be.
func (d *doctor) renewal(ctx context.Context, vault, name string) int {
	r, err := d.t.renewal(ctx, vault, name)
	if err != nil {
		d.fail("vault.renewal", err)
		return 0
	}
	end := r.time("notAfter")
	switch {
	case r.str("failing") == "true" || r.str("stalled") == "true":
		d.add("vault.renewal", checkFailed, "keyfleet certificate show "+vault+" "+name, "certificate %s/%s does not renew: %s: %s", vault, name, r.str("reason"), r.str("message"))
	case r.at("nextRenewal") == nil && !end.IsZero() && end.Sub(d.t.now()) < soon:
		d.add("vault.renewal", checkAttention, "keyfleet certificate renew "+vault+" "+name, "certificate %s/%s ends %s and does not renew by itself", vault, name, d.t.when(end))
	default:
		return 1
	}
	return 0
}

// pools checks pools and nodes.
func (d *doctor) pools(ctx context.Context) {
	accounts, err := d.t.listResources(ctx, batch, batchAccounts, client.VersionBatch)
	if err != nil {
		d.fail("pool.resize", err)
		return
	}
	pools, nodes := 0, 0
	for _, a := range accounts {
		all, err := d.t.list(ctx, d.t.client.ARM(a.str("id")+"/pools"), client.VersionBatch)
		if err != nil {
			d.fail("pool.resize", err)
			continue
		}
		for _, p := range all {
			pools++
			nodes += d.pool(ctx, a.name(), p)
		}
	}
	d.add("pool.nodes", checkOK, "", "%s in %s looked at", plural(nodes, "node"), plural(pools, "pool"))
}

// pool checks one pool and returns how many nodes it has.
func (d *doctor) pool(ctx context.Context, account string, p object) int {
	name := p.name()
	if problem := poolProblem(p); problem != "" {
		d.add("pool.resize", checkFailed, "keyfleet pool show "+name+" --account "+account, "pool %s: %s", name, problem)
	}
	id, err := arm.ParseID(p.str("id"))
	if err != nil {
		return 0
	}
	nodes, err := d.t.poolNodes(ctx, id)
	if err != nil {
		var e *client.Error
		if !errors.As(err, &e) || e.Status != http.StatusNotFound { // deleted meanwhile
			d.fail("pool.nodes", err)
		}
		return 0
	}
	for _, n := range nodes {
		fix := fmt.Sprintf("keyfleet node explain %s %s --account %s", name, n.str("id"), account)
		switch state := n.str("state"); state {
		case "unusable", "starttaskfailed":
			d.add("node.state", checkFailed, fix, "node %s of pool %s is %s", n.str("id"), name, state)
		case "unknown":
			d.add("node.state", checkAttention, fix, "node %s of pool %s is silent", n.str("id"), name)
		default:
			if errs := n.objects("errors"); len(errs) > 0 {
				d.add("node.state", checkAttention, fix, "node %s of pool %s is %s: %s: %s", n.str("id"), name, state, errs[0].str("code"), strings.TrimSuffix(errs[0].str("message"), "."))
			}
		}
	}
	return len(nodes)
}
