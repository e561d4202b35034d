package pool

import (
	"context"
	"encoding/json"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// firstSequence is the sequence number of an extension's settings on a node.
// Extensions of a pool do not change, so it is also the last one.
const firstSequence = 1

// pollSeconds is how long an agent that hears nothing waits before it fetches
// its goal state anyway.
const pollSeconds = 300

// Goal computes what the node should be, from the store and the secrets'
// revisions alone. id is a node's or a registered host's. It answers
// fault.NotFound for a node that is gone.
//
// Marks are read before what they speak of: a change in between gives newer
// content under an older revision, and the next notification puts that right;
// the other way round a change would be lost.
func (f *Fleet) Goal(ctx context.Context, id string) (node.GoalState, error) {
	tx := f.cfg.Store.View(ctx)
	own, err := marks.Lookup(tx, nodeMark(id))
	if err != nil {
		return node.GoalState{}, err
	}
	if own == nil {
		return node.GoalState{}, fault.New(fault.NotFound, "NodeNotFound", "The node %q does not exist.", id)
	}
	host, err := Hosts.Lookup(tx, id)
	if err != nil {
		return node.GoalState{}, err
	}
	if host == nil {
		return f.nodeGoal(tx, id, own, own.Revision)
	}
	g := node.GoalState{Revision: own.Revision, Node: id, Hosts: f.hosts(nil), Extensions: []node.Extension{}, Poll: pollSeconds, Action: host.Spec.Order}
	// A host that gives everything back is told of no extension: it would put
	// them on again between the release and the next goal state.
	if own.Spec.Node == "" || (host.Spec.Order != nil && host.Spec.Order.Kind == "release") {
		return g, nil
	}
	assigned, err := marks.Lookup(tx, nodeMark(own.Spec.Node))
	if err != nil {
		return node.GoalState{}, err
	}
	if assigned == nil { // its node is gone; the release is on its way
		return g, nil
	}
	g, err = f.nodeGoal(tx, own.Spec.Node, assigned, max(own.Revision, assigned.Revision))
	g.Action = host.Spec.Order
	return g, err
}

// nodeGoal is the goal state of a node of a pool.
func (f *Fleet) nodeGoal(tx *store.Tx, id string, own *store.Object[Mark, struct{}], rev int64) (node.GoalState, error) {
	of, err := marks.Get(tx, poolMark(own.Spec.Pool))
	if err != nil {
		return node.GoalState{}, err
	}
	refs := unpinned(f.cfg.Changes, of.Spec.URLs)
	rev = max(rev, of.Revision, secretsRevision(f.cfg.Changes, refs))
	p, err := f.get(tx, own.Spec.Pool)
	if err != nil {
		return node.GoalState{}, err
	}
	g := node.GoalState{
		Revision: rev, Node: id, Pool: p.Spec.ID, Hosts: f.hosts(&p.Spec),
		Identities: p.Spec.Identity.wire(), Extensions: []node.Extension{}, Poll: pollSeconds,
	}
	for _, e := range p.Spec.Properties.Deployment.VM.Extensions {
		g.Extensions = append(g.Extensions, f.extensionGoal(e, own.Spec.Protected[e.Name]))
	}
	return g, nil
}

// extensionGoal is one extension of a goal state.
func (f *Fleet) extensionGoal(e Extension, protected string) node.Extension {
	out := node.Extension{
		Name: e.Name, Publisher: e.Publisher, Type: e.Type, TypeHandlerVersion: e.TypeHandlerVersion,
		Settings: e.Settings, ProtectedSettings: protected, Sequence: firstSequence, DependsOn: e.After,
	}
	version, pkg, err := f.cfg.Packages.Find(e.Publisher, e.Type, e.TypeHandlerVersion, e.AutoUpgradeMinor != nil && *e.AutoUpgradeMinor)
	if err != nil {
		out.Problem = fault.From(err).Message
		if out.Problem == "" {
			out.Problem = "The server has no package for it."
		}
	} else {
		out.Version, out.Package = version, &pkg
	}
	if !e.Protected.Empty() && protected == "" {
		out.Problem = "It has protected settings, but the node enrolled without a transport certificate to encrypt them to."
	}
	set, _ := f.cfg.Settings(e.Publisher, e.Type, e.TypeHandlerVersion, e.Settings)
	urls := make([]string, 0, len(set.Observed))
	for _, o := range set.Observed {
		urls = append(urls, o.URL)
	}
	if rev := secretsRevision(f.cfg.Changes, unpinned(f.cfg.Changes, urls)); rev != 0 {
		out.Hint = strconv.FormatInt(rev, 10)
	}
	return out
}

// hosts are the names that must lead to the server on the pool's nodes.
func (f *Fleet) hosts(s *Spec) []string {
	if f.cfg.Names == nil {
		return []string{}
	}
	var urls []string
	if s != nil {
		for _, e := range s.Properties.Deployment.VM.Extensions {
			urls = append(urls, urlsIn(e.Settings)...)
		}
	}
	names := slices.Clone(f.cfg.Names.Hosts(urls))
	slices.Sort(names)
	return slices.Compact(names)
}

// urlsIn finds every https URL among the strings of a JSON document.
func urlsIn(doc json.RawMessage) []string {
	var v any
	if len(doc) == 0 || json.Unmarshal(doc, &v) != nil {
		return nil
	}
	var urls []string
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case string:
			if strings.HasPrefix(strings.ToLower(v), "https://") {
				if u, err := url.Parse(v); err == nil && u.Hostname() != "" {
					urls = append(urls, v)
				}
			}
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(v)
	slices.Sort(urls)
	return urls
}

// wire lists the identities by resource id.
func (i Identified) wire() []node.Identity {
	var out []node.Identity
	for _, v := range i.IDs {
		out = append(out, node.Identity{ResourceID: v.ResourceID, ClientID: v.ClientID, ObjectID: v.ObjectID})
	}
	slices.SortFunc(out, func(a, b node.Identity) int { return strings.Compare(a.ResourceID, b.ResourceID) })
	return out
}
