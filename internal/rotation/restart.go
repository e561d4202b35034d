package rotation

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// restarted reports whether the components run as they must at a stage: their
// manifest is in place, and they began after the last change of what they read once.
func (e *Engine) restarted(ctx context.Context, s Step, at Stage) (bool, error) {
	l := e.layoutOn(s.Node)
	for _, name := range s.Components {
		c := l.component(name)
		files := l.readOnce(c)
		if c.Signs != "" {
			files = append(files, c.Signs)
		}
		if c.Pod != "" {
			ok, err := e.placed(ctx, s.Node, e.placements(s.Node, []string{c.Pod}, at))
			if err != nil || !ok {
				return false, err
			}
			files = append(files, c.Pod)
		}
		if s.Whole && name != "kubelet" { // which starts the others when it can
			continue
		}
		out, err := e.Hosts[s.Node].Run(ctx, Script{Name: "look at " + name, Text: e.on(s.Node).started, Args: append([]string{name}, files...), Quiet: true})
		if err != nil || strings.TrimSpace(string(out)) != "yes" {
			return false, err
		}
	}
	if slices.Contains(s.Components, "kube-apiserver") && !s.Whole {
		api, err := e.api(s.Node)
		if err != nil {
			return false, err
		}
		return api.Ready(ctx) == nil, nil
	}
	return true, nil
}

// restart restarts components of a machine so that they run as at the stage. Where the
// runner that we replaced waited too and knows how it ended, we look.
func (e *Engine) restart(ctx context.Context, s Step, at Stage) error {
	err := e.restartNow(ctx, s, at)
	if !errors.Is(err, ErrResultTaken) {
		return err
	}
	if ok, failed := e.restarted(ctx, s, at); failed != nil || ok {
		return failed
	}
	return err
}

func (e *Engine) restartNow(ctx context.Context, s Step, at Stage) error {
	m := e.Observed.machine(s.Node)
	if m.OS == windowsOS {
		return e.restartServices(ctx, s)
	}
	if len(s.Components) == 1 && s.Components[0] == "kubelet" {
		c := e.Layout.component("kubelet")
		_, err := e.change(ctx, s.Node, Script{Name: s.what(), Text: unitScript, Args: []string{c.Unit}, Input: []byte("-"), Timeout: 2 * time.Minute, Finishes: true, Unit: e.unit(s)})
		return err
	}
	neighbour := "-"
	if e.Plan.Drain && slices.Contains(s.Components, "kube-apiserver") {
		n, err := e.neighbour(ctx, m)
		if err != nil {
			return err
		}
		neighbour = n
	}
	if slices.Contains(s.Components, "etcd") && !e.Plan.Scope.Apart {
		if err := until(ctx, 2*time.Minute, func(ctx context.Context) error { return e.leadAway(ctx, m) }); err != nil {
			return err
		}
	}
	_, port, err := net.SplitHostPort(m.Endpoint)
	if err != nil {
		return fmt.Errorf("the address of the API server of %s: %w", m.Name, err)
	}
	args := []string{m.Address, port, e.Layout.Login, e.Layout.keyOf(e.Layout.Login).Path}
	for _, name := range s.Components {
		c := e.Layout.component(name)
		what := "unit:" + c.Unit
		if c.Pod != "" {
			what = e.Layout.from(e.Plan.Scope, e.Layout.file(c.Pod), at) + ":" + c.Pod
		}
		args = append(args, name+":"+what)
	}
	text := restartScript
	if s.Whole {
		text = afreshScript
	}
	_, err = e.change(ctx, s.Node, Script{Name: s.what(), Text: text, Args: args, Input: []byte(neighbour), Timeout: 6 * time.Minute, Finishes: true, Unit: e.unit(s)})
	return err
}

// restartBack restarts components so that they run as before the step. The files
// that were placed for it go back first, since they are read when it starts: the
// steps that placed them are undone after this one.
func (e *Engine) restartBack(ctx context.Context, s Step) error {
	read := map[string]bool{}
	l := e.layoutOn(s.Node)
	for _, name := range s.Components {
		c := l.component(name)
		for _, p := range append(slices.Clone(c.Once), c.Signs) {
			if p != "" {
				read[p], read[l.keyOf(p).Path] = true, true
			}
		}
	}
	var paths []string
	for _, q := range e.Plan.Steps {
		if q.Name() == s.Name() {
			break
		}
		switch {
		case q.Node != s.Node || q.Phase != s.Phase:
		case q.Verb == Restart: // what was placed for that one, too, stays if we do not read it
			paths = slices.DeleteFunc(paths, func(p string) bool { return !read[p] })
		case q.Verb == Place:
			paths = append(paths, q.Paths...)
		}
	}
	if len(paths) > 0 {
		if err := e.place(ctx, s, e.placements(s.Node, paths, s.before())); err != nil {
			return err
		}
	}
	if e.Observed.machine(s.Node).OS != windowsOS { // where services can be restarted as often as one likes
		// A runner that died when all was done, but for the record, has restarted them.
		if ok, err := e.restarted(ctx, s, s.before()); err != nil || ok {
			return err
		}
	}
	return e.restart(ctx, s, s.before())
}

// unit names the unit of systemd that a step runs as.
func (e *Engine) unit(s Step) string {
	return strings.ToLower("keyfleet-" + e.Plan.Run + "-" + string(s.Phase) + "-" + strings.Join(s.Components, "-"))
}

// neighbour is another master whose API server is ready.
func (e *Engine) neighbour(ctx context.Context, m Machine) (string, error) {
	var why error
	for _, other := range e.Observed.masters() {
		if other.Name == m.Name {
			continue
		}
		api, err := e.api(other.Name)
		if err == nil {
			if err = api.Ready(ctx); err == nil {
				return other.Address, nil
			}
		}
		why = errors.Join(why, fmt.Errorf("%s: %w", other.Name, err))
	}
	return "", fault.New(fault.Unavailable, "NoNeighbour", "No other API server is ready, so that of %s is not restarted.", m.Name).Because(why)
}

// leadAway makes sure that etcd goes on without the machine: all members answer,
// and another one leads.
func (e *Engine) leadAway(ctx context.Context, m Machine) error {
	etcd, err := e.openEtcd(ctx)
	if err != nil {
		return err
	}
	defer etcd.Close()
	members, err := etcd.Members(ctx)
	if err != nil {
		return err
	}
	if len(members) == 1 {
		return nil
	}
	var other uint64
	lead := false
	for _, member := range members {
		ours := strings.Contains(member.ClientURL, "//"+m.Address+":")
		if member.Err != nil && !ours {
			return fault.New(fault.Unavailable, "EtcdMemberDown", "Member %s of etcd does not answer, so that of %s is not restarted.", member.Name, m.Name).Because(member.Err).
				WithFix("bring it back, then run the same command again")
		}
		if ours {
			lead = member.Leader
		} else {
			other = member.ID
		}
	}
	if !lead {
		return nil
	}
	return etcd.MoveLeader(ctx, other)
}
