package pool

import (
	"context"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/internal/store"
)

// FollowGoals calls fn, one call at a time, with the newest goal revision of a
// node (or a registered host): once for every node there is, then whenever its
// goal state changed, until ctx ends. Calls may be merged; the last one counts.
// A node that is gone is told once more, so that its agent asks and learns it.
// fn must not block.
//
// The index behind it follows marks and secrets, not pools and nodes: the
// reports of a thousand agents never wake it.
func (f *Fleet) FollowGoals(ctx context.Context, fn func(nodeID string, revision int64)) error {
	x := &goalIndex{
		changes: f.cfg.Changes, tell: fn,
		nodes: map[string]*goalNode{}, pools: map[string]*goalPool{},
		bySecret: map[secretRef]map[string]bool{}, hostOf: map[string]string{},
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return marks.Follow(ctx, f.cfg.Store, "", x.mark) })
	if f.cfg.Changes != nil {
		g.Go(func() error { return f.cfg.Changes.Follow(ctx, x.secret) })
	}
	return g.Wait()
}

// goalIndex knows which nodes a change concerns. Its mutex makes it the one
// owner of its maps and of the order of calls.
type goalIndex struct {
	mu       sync.Mutex
	changes  SecretChanges
	tell     func(string, int64)
	synced   bool // all marks were listed
	nodes    map[string]*goalNode
	pools    map[string]*goalPool
	bySecret map[secretRef]map[string]bool // secret -> pools that observe it
	hostOf   map[string]string             // node -> the host that is it
}

type goalNode struct {
	rev  int64  // of its own mark
	told int64  // the last revision given out
	pool string // of a node
	node string // of a host: the node that it is
}

type goalPool struct {
	rev     int64 // of its mark
	secrets int64 // newest revision of the secrets
	refs    []secretRef
	members map[string]bool
}

// mark takes one change of the marks.
func (x *goalIndex) mark(c store.Change[Mark, struct{}]) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if c.ID == "" {
		x.synced = true
		for id := range x.nodes {
			x.notify(id)
		}
		return nil
	}
	kind, id := c.ID[:4], c.ID[5:] // "pool/" and "node/"
	switch {
	case kind == "pool" && c.Object == nil:
		x.setPool(id, 0, nil)
	case kind == "pool":
		x.setPool(id, c.Revision, unpinned(x.changes, c.Object.Spec.URLs))
	case c.Object == nil:
		x.dropNode(id, c.Revision)
	default:
		x.setNode(id, c.Revision, c.Object.Spec)
	}
	return nil
}

// secret takes one change of a secret.
func (x *goalIndex) secret(vault, secret string, rev int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for id := range x.bySecret[secretRef{strings.ToLower(vault), strings.ToLower(secret)}] {
		p := x.pools[id]
		p.secrets = max(p.secrets, rev)
		for n := range p.members {
			x.notify(n)
		}
	}
}

func (x *goalIndex) pool(id string) *goalPool {
	p := x.pools[id]
	if p == nil {
		p = &goalPool{members: map[string]bool{}}
		x.pools[id] = p
	}
	return p
}

func (x *goalIndex) setPool(id string, rev int64, refs []secretRef) {
	p := x.pool(id)
	for _, r := range p.refs {
		delete(x.bySecret[r], id)
		if len(x.bySecret[r]) == 0 {
			delete(x.bySecret, r)
		}
	}
	p.rev, p.refs = rev, refs
	for _, r := range refs {
		if x.bySecret[r] == nil {
			x.bySecret[r] = map[string]bool{}
		}
		x.bySecret[r][id] = true
	}
	// After the secret is in the index, so that no change falls between the two.
	p.secrets = max(p.secrets, secretsRevision(x.changes, refs))
	for n := range p.members {
		x.notify(n)
	}
	if rev == 0 && len(p.members) == 0 {
		delete(x.pools, id)
	}
}

func (x *goalIndex) setNode(id string, rev int64, m Mark) {
	n := x.nodes[id]
	if n == nil {
		n = &goalNode{}
		x.nodes[id] = n
	}
	if n.node != m.Node {
		if x.hostOf[n.node] == id {
			delete(x.hostOf, n.node)
		}
		if m.Node != "" {
			x.hostOf[m.Node] = id
		}
	}
	n.rev, n.pool, n.node = rev, m.Pool, m.Node
	if m.Pool != "" {
		x.pool(m.Pool).members[id] = true
	}
	x.notify(id)
}

func (x *goalIndex) dropNode(id string, rev int64) {
	n := x.nodes[id]
	if n == nil {
		return
	}
	delete(x.nodes, id)
	if p := x.pools[n.pool]; p != nil {
		delete(p.members, id)
		if p.rev == 0 && len(p.members) == 0 {
			delete(x.pools, n.pool)
		}
	}
	if n.node != "" && x.hostOf[n.node] == id {
		delete(x.hostOf, n.node)
	}
	if x.synced {
		x.tell(id, rev)
	}
}

// revision is what Goal would answer as the node's revision.
func (x *goalIndex) revision(n *goalNode) int64 {
	rev := n.rev
	if m := x.nodes[n.node]; n.node != "" && m != nil {
		rev = max(rev, x.revision(m))
	}
	if p := x.pools[n.pool]; p != nil {
		rev = max(rev, p.rev, p.secrets)
	}
	return rev
}

// notify tells the node, and the host that is it, if the revision grew.
func (x *goalIndex) notify(id string) {
	n := x.nodes[id]
	if n == nil || !x.synced {
		return
	}
	if rev := x.revision(n); rev > n.told {
		n.told = rev
		x.tell(id, rev)
	}
	if h := x.hostOf[id]; h != "" {
		x.notify(h)
	}
}
