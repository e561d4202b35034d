package pool

import (
	"context"
	"strings"
	"time"
)

// Delivery is a version of a secret that a node's agent reported as delivered.
type Delivery struct {
	Pool      string    // resource id
	Node      string    // node id
	Extension string    // name in the pool
	Secret    string    // URL, as the settings wrote it
	Version   string    // on the node now
	Path      string    // link that consumers read
	Since     time.Time // when the link was switched to the version, by the node's clock
	Problem   string    // why the last fetch failed; then Version is what is there still, or empty
}

// Deliveries lists where a secret is: every node whose agent reported a version
// of it, as it last reported. It decides nothing about access; the caller has
// asked the vault.
func (f *Fleet) Deliveries(ctx context.Context, vault, secret string) ([]Delivery, error) {
	if f.cfg.Changes == nil {
		return nil, nil
	}
	nodes, err := Nodes.List(f.cfg.Store.View(ctx), "")
	if err != nil {
		return nil, err
	}
	var out []Delivery
	for _, n := range nodes {
		if n.Status.Report == nil {
			continue
		}
		for _, e := range n.Status.Report.Extensions {
			for _, c := range e.Certificates {
				v, s, _, ok := f.cfg.Changes.Resolve(c.Secret)
				if ok && strings.EqualFold(v, vault) && strings.EqualFold(s, secret) {
					out = append(out, Delivery{Pool: n.Spec.PoolID, Node: n.ID, Extension: e.Name, Secret: c.Secret, Version: c.Version, Path: c.Path, Since: c.Since, Problem: c.Problem})
				}
			}
		}
	}
	return out, nil
}
