package pool

import (
	"context"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/node"
)

// Link is one link of the chain from a pool to an idle node.
type Link struct {
	Name    string   `json:"name"`  // "secrets", "provider", "agent", "goal state", "extension secretext"
	State   string   `json:"state"` // "ok", "broken", "waiting" (not known to be broken, not there yet), "unknown" (after a broken link)
	Message string   `json:"message"`
	Fix     string   `json:"fix,omitempty"`
	Log     []string `json:"log,omitempty"` // raw lines, as the node sent them
}

// Explanation says why a node is not idle, or that it is.
type Explanation struct {
	Node  string `json:"node"`
	Pool  string `json:"pool"`
	State string `json:"state"`
	Cause *Link  `json:"cause,omitempty"` // the first broken link, else the first one that is waited for; nil: the node is idle
	Chain []Link `json:"chain"`           // all links, from the pool to the last extension
}

// Evidence is all that Explain looks at.
type Evidence struct {
	Pool     *Pool
	Node     NodeView
	Goal     *node.GoalState // nil: not computable
	Provider string          // who would run the node; empty: nobody
	Heard    time.Time       // the agent's last word
	Now      time.Time
}

// Explain says why a node is not idle. It needs the right to read the pool.
func (f *Fleet) Explain(ctx context.Context, pool arm.ID, id string) (Explanation, error) {
	v, err := f.GetNode(ctx, pool, id)
	if err != nil {
		return Explanation{}, err
	}
	p, err := f.get(f.cfg.Store.View(ctx), pool.StoreKey())
	if err != nil {
		return Explanation{}, err
	}
	e := Evidence{Pool: p, Node: v, Heard: f.seen.newest(v.ID, v.Status.LastSeen), Now: f.cfg.Now()}
	prov, err := f.providerOf(ctx, p, v.Node)
	if err != nil {
		return Explanation{}, err
	}
	if prov != nil {
		e.Provider = prov.Name()
	}
	if g, err := f.Goal(ctx, v.ID); err == nil {
		e.Goal = &g
	}
	return Explain(e, f.Requirements(&p.Spec)), nil
}

// Explain builds the chain of causes from evidence alone.
func Explain(e Evidence, reqs []Requirement) Explanation {
	out := Explanation{Node: e.Node.ID, Pool: e.Pool.Spec.ID, State: e.Node.State}
	out.Chain = append(out.Chain, secretsLink(e), providerLink(e), enrolLink(e), aliveLink(e), goalLink(e))
	for _, q := range inOrder(e.Pool.Spec.Properties.Deployment.VM.Extensions) {
		out.Chain = append(out.Chain, extensionLink(e, q))
	}
	blocked := false
	for i := range out.Chain {
		l := &out.Chain[i]
		switch {
		case blocked && l.State == "waiting":
			l.State = "unknown"
		case l.State == "broken" && out.Cause == nil:
			out.Cause = l
		}
		// A secret that cannot be read breaks the extension that needs it and nothing in between.
		blocked = blocked || (l.State == "broken" && l.Name != "secrets")
	}
	for i := range out.Chain {
		if out.Cause == nil && out.Chain[i].State == "waiting" {
			out.Cause = &out.Chain[i]
		}
	}
	if e.Node.State == StateIdle && !blocking(out.Cause, reqs) {
		out.Cause = nil
	}
	return out
}

// blocking reports whether the cause stands in the way of an idle node.
func blocking(l *Link, reqs []Requirement) bool {
	if l == nil {
		return false
	}
	for _, q := range reqs {
		if l.Name == "extension "+q.Name {
			return q.Blocking
		}
	}
	return false
}

func secretsLink(e Evidence) Link {
	l := Link{Name: "secrets", State: "ok", Message: "Every observed secret can be read by an identity of the pool."}
	for _, x := range e.Pool.Status.Findings {
		if x.Code != "PinnedVersion" {
			return Link{Name: l.Name, State: "broken", Message: x.Reason, Fix: x.Fix}
		}
		l.Message = x.Reason
		l.Fix = x.Fix
	}
	return l
}

func providerLink(e Evidence) Link {
	s := e.Node.Status
	l := Link{Name: "provider", State: "ok"}
	switch {
	case !e.Node.Deleting.IsZero():
		l.State, l.Message = "waiting", "The node is leaving the pool."
	case e.Provider == "":
		l.State = "broken"
		l.Message = noProviderMessage(e.Node.Spec.OS)
		l.Fix = "use an image of an operating system that a provider offers, or let machines join"
	case s.StartError != nil:
		l.State = "broken"
		l.Message = fmt.Sprintf("Provider %s could not start the node (%d attempts): %s: %s", e.Provider, s.Attempts, s.StartError.Code, s.StartError.Message)
	case s.Allocated.IsZero():
		l.State, l.Message = "waiting", fmt.Sprintf("Provider %s is starting the node since %s.", e.Provider, stamp(e.Node.Created))
	default:
		l.Message = fmt.Sprintf("Provider %s has the node since %s.", e.Provider, stamp(s.Allocated))
	}
	return l
}

func enrolLink(e Evidence) Link {
	s := e.Node.Status
	l := Link{Name: "enrolment", State: "ok", Message: "The agent enrolled at " + stamp(s.Enrolled) + "."}
	if !s.Enrolled.IsZero() {
		return l
	}
	l.State, l.Message = "waiting", "The agent has not enrolled yet."
	if !s.Allocated.IsZero() && e.Now.Sub(s.Allocated) > enrolWithin {
		l.State = "broken"
		l.Message = fmt.Sprintf("The node runs since %s and its agent has not enrolled.", stamp(s.Allocated))
		l.Fix = "look at the agent's output: keyfleet node logs POOL " + e.Node.ID
	}
	return l
}

func aliveLink(e Evidence) Link {
	l := Link{Name: "agent", State: "ok", Message: "The agent was last heard at " + stamp(e.Heard) + "."}
	switch {
	case e.Node.Status.Report == nil:
		l.State, l.Message = "waiting", "The agent has not reported yet."
	case e.Now.Sub(e.Heard) > offlineAfter:
		l.State = "broken"
		l.Message = fmt.Sprintf("The agent is silent since %s.", stamp(e.Heard))
		l.Fix = "see whether the machine runs and reaches the server; keyfleet node reboot POOL " + e.Node.ID
	}
	return l
}

func goalLink(e Evidence) Link {
	l := Link{Name: "goal state", State: "ok"}
	r := e.Node.Status.Report
	switch {
	case e.Goal == nil:
		l.State, l.Message = "waiting", "There is no goal state for the node."
	case r == nil:
		l.State, l.Message = "waiting", fmt.Sprintf("Revision %d waits for the agent.", e.Goal.Revision)
	case r.Revision < e.Goal.Revision:
		l.State, l.Message = "waiting", fmt.Sprintf("The agent works on revision %d; the newest is %d.", r.Revision, e.Goal.Revision)
	default:
		l.Message = fmt.Sprintf("The agent has revision %d.", r.Revision)
	}
	return l
}

func extensionLink(e Evidence, x Extension) Link {
	l := Link{Name: "extension " + x.Name, State: "waiting", Message: "The node has not reported it yet."}
	if e.Goal != nil {
		for _, g := range e.Goal.Extensions {
			if g.Name == x.Name && g.Problem != "" {
				l.State, l.Message = "broken", g.Problem
			}
		}
	}
	s := statusOf(e.Node.Status.Report, x.Name)
	if s == nil {
		return l
	}
	l.Log = s.Log
	switch s.Status {
	case "success", "warning":
		return Link{Name: l.Name, State: "ok", Message: s.Message}
	case "error":
		l.State = "broken"
		l.Message = fmt.Sprintf("Code %d: %s", s.Code, s.Message)
		if s.Skipped != "" {
			l.State, l.Message = "unknown", fmt.Sprintf("Not started, because extension %q, which comes first, failed.", s.Skipped)
		}
	default:
		if l.State != "broken" {
			l.Message = s.Message
		}
	}
	return l
}

// inOrder lists extensions so that each comes after those it waits for.
func inOrder(all []Extension) []Extension {
	var out []Extension
	done := map[string]bool{}
	var visit func(e Extension)
	visit = func(e Extension) {
		if done[strings.ToLower(e.Name)] {
			return
		}
		done[strings.ToLower(e.Name)] = true
		for _, name := range e.After {
			for _, o := range all {
				if strings.EqualFold(o.Name, name) {
					visit(o)
				}
			}
		}
		out = append(out, e)
	}
	for _, e := range all {
		visit(e)
	}
	return out
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
