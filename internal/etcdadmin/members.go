package etcdadmin

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// answer is what one endpoint says of itself.
type answer struct {
	endpoint string // host:port
	status   *clientv3.StatusResponse
	err      error
}

// member is one of the cluster's members and what it says.
type member struct {
	*pb.Member
	answer
}

// Members implements rotation.Etcd. Err is also set of a member that answers and
// is not well: it has raised an alarm, or is a learner, which has no vote yet.
func (a *admin) Members(ctx context.Context) ([]rotation.EtcdMember, error) {
	members, err := a.survey(ctx)
	if err != nil {
		return nil, err
	}
	lead := leader(members)
	var out []rotation.EtcdMember
	for _, m := range members {
		out = append(out, rotation.EtcdMember{
			ID: m.ID, Name: m.Name, ClientURL: first(m.ClientURLs), PeerURL: first(m.PeerURLs),
			Leader: lead == m.ID, Err: m.health(),
		})
	}
	return out, nil
}

// health is why a member is not as it should be.
func (m member) health() error {
	switch {
	case m.err != nil:
		return m.err
	case m.IsLearner:
		return fault.New(fault.Conflict, "", "etcd member %s is a learner: it has no vote yet.", m.Name)
	case len(m.status.Errors) > 0:
		return fault.New(fault.Unavailable, "", "etcd member %s reports: %s.", m.Name, strings.Join(m.status.Errors, ", "))
	}
	return nil
}

// survey lists the members and asks each how it is, at the endpoint that was
// given for it, else where it says that its clients find it.
func (a *admin) survey(ctx context.Context) ([]member, error) {
	listed, err := a.list(ctx)
	if err != nil {
		return nil, err
	}
	given := map[string]answer{} // by endpoint
	byID := map[uint64]answer{}  // of those that answer
	for _, w := range a.ask(ctx, a.endpoints) {
		given[w.endpoint] = w
		if w.err == nil {
			byID[w.status.Header.MemberId] = w
		}
	}
	out := make([]member, len(listed))
	var all sync.WaitGroup
	for i, m := range listed {
		out[i].Member = m
		if w, ok := byID[m.ID]; ok {
			out[i].answer = w
			continue
		}
		all.Go(func() { out[i].answer = a.find(ctx, m, given) })
	}
	all.Wait()
	return out, ctx.Err()
}

// list lists the members as the quorum knows them; without a quorum, as one of them does.
func (a *admin) list(ctx context.Context) ([]*pb.Member, error) {
	read := func(o ...clientv3.OpOption) (*clientv3.MemberListResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, statusTime)
		defer cancel()
		r, err := a.client.MemberList(ctx, o...)
		if err != nil {
			err = a.explain(ctx, "listing members", err, a.endpoints...)
		}
		return r, err
	}
	r, err := read()
	if errors.Is(err, fault.Unavailable) && ctx.Err() == nil {
		r, err = read(clientv3.WithSerializable())
	}
	if err != nil {
		return nil, err
	}
	return r.Members, nil
}

// find asks a member that none of the given endpoints has turned out to be.
func (a *admin) find(ctx context.Context, m *pb.Member, given map[string]answer) answer {
	if len(m.ClientURLs) == 0 {
		return answer{err: fault.New(fault.Unavailable, "", "etcd member %x at %s has not been started yet.", m.ID, first(m.PeerURLs))}
	}
	var endpoints []string
	for _, text := range m.ClientURLs {
		u, err := url.Parse(text)
		if err != nil {
			return answer{err: fmt.Errorf("reading the client URL of etcd member %s: %w", m.Name, err)}
		}
		if w, ok := given[u.Host]; ok && w.err != nil {
			return w
		}
		endpoints = append(endpoints, u.Host)
	}
	w := a.ask(ctx, endpoints[:1])[0]
	if w.err == nil && w.status.Header.MemberId != m.ID {
		w.err = fault.New(fault.Conflict, "", "At %s, the client URL of etcd member %s, another member answers.", w.endpoint, m.Name)
	}
	return w
}

// ask asks endpoints how they are, all at once, over new connections.
func (a *admin) ask(ctx context.Context, endpoints []string) []answer {
	answers := make([]answer, len(endpoints))
	var all sync.WaitGroup
	for i, e := range endpoints {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, statusTime)
			defer cancel()
			s, err := a.client.Status(ctx, address(e))
			if err != nil {
				err = a.explain(ctx, "asking for its status", err, e)
			}
			answers[i] = answer{endpoint: e, status: s, err: err}
		})
	}
	all.Wait()
	return answers
}

// leader is the ID of the leader of the latest term that a member knows of; zero: there is none.
func leader(members []member) (id uint64) {
	var term uint64
	for _, m := range members {
		if m.err == nil && m.status.RaftTerm >= term && m.status.Leader != 0 {
			id, term = m.status.Leader, m.status.RaftTerm
		}
	}
	return id
}

// MoveLeader implements rotation.Etcd. It returns when the other member leads.
func (a *admin) MoveLeader(ctx context.Context, to uint64) error {
	members, err := a.survey(ctx)
	if err != nil {
		return err
	}
	lead := leader(members)
	if lead == to {
		return nil
	}
	find := func(id uint64) *member {
		i := slices.IndexFunc(members, func(m member) bool { return m.ID == id })
		if i < 0 {
			return nil
		}
		return &members[i]
	}
	target, from := find(to), find(lead)
	switch {
	case target == nil:
		return fault.New(fault.NotFound, "", "etcd has no member %x.", to)
	case target.health() != nil: // etcd would wait for it in vain
		return fmt.Errorf("moving the leader to %s: %w", target.Name, target.health())
	case from == nil || from.err != nil:
		return fault.New(fault.Unavailable, "", "etcd has no leader that answers.").WithFix("check that more than half of the members run and reach each other")
	}
	client, err := a.wire.client(from.endpoint)
	if err != nil {
		return fmt.Errorf("connecting to the leader of etcd: %w", err)
	}
	defer func() { _ = client.Close() }()
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if _, err := client.MoveLeader(ctx, to); err != nil {
		return a.explain(ctx, "moving the leader", err, from.endpoint)
	}
	return nil
}

// first is the first of several URLs, of which a member has one nearly always.
func first(urls []string) string {
	if len(urls) == 0 {
		return ""
	}
	return urls[0]
}
