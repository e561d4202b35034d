package main

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
)

// advance is more than 12 months less the 30 days of the policy.
const advance = 336 * 24 * time.Hour

// renewByTime moves policy time past the renewal point and waits until every
// node has the successor, as the nodes' agents report it.
func (d *demo) renewByTime(ctx context.Context, ids []string) error {
	before, err := d.deliveries(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "# keyfleet dev advance %dh\n", int(advance.Hours()))
	if _, err := d.keyfleet(ctx, "dev", "advance", advance.String()); err != nil {
		return err
	}
	d.say("policy time    %d days ahead: the renewal of %s is due", int(advance.Hours()/24), certificate)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var now keyfleet.Deliveries
	err = d.client.Poll(ctx, 50*time.Millisecond, func(ctx context.Context) (bool, error) {
		now, err = d.deliveries(ctx)
		return err == nil && now.Version != before.Version && delivered(now) == len(ids), err
	})
	if err != nil {
		return fmt.Errorf("waiting for the new version on the nodes (%d of %d have it): %w", delivered(now), len(ids), err)
	}
	d.say("renewed        version %s -> %s", before.Version[:8], now.Version[:8])
	slowest := 0.0
	for _, n := range now.Nodes {
		d.say("delivered      node %s…%s  %s  %4.0f ms after the renewal", n.Node[:8], n.Node[len(n.Node)-6:], n.Path, n.Seconds*1000)
		slowest = max(slowest, n.Seconds)
	}
	for _, id := range ids { // the node's own files, not only its agent's word
		out, err := d.shell(ctx, id, "readlink -f /var/lib/waagent/Microsoft.Azure.KeyVault/*."+certificate)
		if err != nil {
			return err
		}
		if !strings.Contains(out, now.Version) {
			return fmt.Errorf("node %s: the link leads to %q, not to version %s", id, strings.TrimSpace(out), now.Version)
		}
	}
	d.say("checked        on all %d nodes the link leads to the new version; from renewal to files: %.0f ms", len(ids), slowest*1000)
	return nil
}

// delivered counts the nodes that have the newest version.
func delivered(d keyfleet.Deliveries) int {
	n := 0
	for _, x := range d.Nodes {
		if x.Version == d.Version {
			n++
		}
	}
	return n
}

func (d *demo) deliveries(ctx context.Context) (out keyfleet.Deliveries, err error) {
	err = d.client.Call(ctx, client.Request{
		Method: http.MethodGet, URL: d.client.ARM("/keyfleet/v1/vaults/" + vaultName + "/certificates/" + certificate + "/deliveries"),
	}, &out)
	return out, err
}

// whereToLook ends the demo with what a person can do next.
func (d *demo) whereToLook(node string) {
	e := d.client.Endpoints()
	data := filepath.Join(d.dir, "data")
	keyfleet := filepath.Join(d.bin, "keyfleet")
	if rel, err := filepath.Rel(workingDir(), keyfleet); err == nil && !strings.HasPrefix(rel, "..") {
		keyfleet = rel
	}
	fmt.Fprintf(d.out, `
Resource Manager   %s
login              %s
vault              %s
health             https://%s/healthz   (curl --cacert %s/ca.crt)

Look around:
  %s login --from %s
  %s certificate show %s %s
  %s node list %s
  %s node shell %s %s
  %s extension show %s %s
  %s dev advance 720h
`, e.ResourceManager, e.Login, d.client.Vault(vaultName, ""), e.Listen, data,
		keyfleet, data, keyfleet, vaultName, certificate,
		keyfleet, poolName,
		keyfleet, poolName, node,
		keyfleet, poolName, node,
		keyfleet)
}
