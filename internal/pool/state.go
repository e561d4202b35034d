package pool

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// States of a node, as the Batch data plane spells them.
const (
	StateCreating    = "creating"    // its provider does not have it yet
	StateStarting    = "starting"    // it is there; agent and extensions are on their way
	StateIdle        = "idle"        // every extension is where it should be
	StateUnusable    = "unusable"    // it will not get there by itself; the errors say why
	StateRebooting   = "rebooting"   // a reboot was asked for and the agent has not come back
	StateReimaging   = "reimaging"   // likewise
	StateLeavingPool = "leavingpool" // it is being removed
	StateUnknown     = "unknown"     // the agent is silent
	StateOffline     = "offline"     // idle, but scheduling is disabled
)

// enrolWithin is how long a node may take from its start to its enrolment
// before it counts as unusable (its provider goes on trying).
const enrolWithin = 5 * time.Minute

// NodeError is an entry of a node's errors.
type NodeError struct {
	Code    string
	Message string
	Details []fault.Detail // Code is the detail's name, Message its value
}

// Requirement is an extension that a node must run.
type Requirement struct {
	Name      string
	Publisher string
	Type      string
	Blocking  bool // while it fails the node is unusable
}

// Requirements says what a pool's nodes must run. The failure of an extension
// makes a node unusable, unless its settings say that the node may be used
// without it: requireInitialSync false, in the Key Vault extension's words.
func (f *Fleet) Requirements(s *Spec) []Requirement {
	var out []Requirement
	for _, e := range s.Properties.Deployment.VM.Extensions {
		set, _ := f.cfg.Settings(e.Publisher, e.Type, e.TypeHandlerVersion, e.Settings)
		out = append(out, Requirement{
			Name: e.Name, Publisher: e.Publisher, Type: e.Type,
			Blocking: !isKeyVault(e.Publisher, e.Type) || set.RequireInitialSync,
		})
	}
	return out
}

// NodeState computes a node's state and errors from what was asked of it and
// what was seen. heard is the agent's last word. It reads nothing else.
func NodeState(n *Node, reqs []Requirement, heard, now time.Time) (string, []NodeError) {
	seen := n.Status
	switch {
	case !n.Deleting.IsZero():
		return StateLeavingPool, nil
	case seen.Allocated.IsZero() && seen.StartFinal:
		return StateUnusable, startErrors(n)
	case seen.Allocated.IsZero():
		return StateCreating, startErrors(n)
	}
	if s := orderState(n); s != "" {
		return s, nil
	}
	if seen.Enrolled.IsZero() {
		if now.Sub(seen.Allocated) > enrolWithin {
			return StateUnusable, []NodeError{{
				Code:    "AgentNotEnrolled",
				Message: fmt.Sprintf("The node was started at %s and its agent has not enrolled.", seen.Allocated.Format(time.RFC3339)),
			}}
		}
		return StateStarting, nil
	}
	if now.Sub(heard) > offlineAfter {
		return StateUnknown, []NodeError{{
			Code:    "AgentSilent",
			Message: fmt.Sprintf("The agent was last heard at %s.", heard.UTC().Format(time.RFC3339)),
		}}
	}
	return extensionsState(n, reqs)
}

// extensionsState is the part of NodeState that follows the last report.
func extensionsState(n *Node, reqs []Requirement) (string, []NodeError) {
	r := n.Status.Report
	if r == nil {
		return StateStarting, nil
	}
	var failed []NodeError
	unusable, waiting := false, false
	for _, q := range reqs {
		x := statusOf(r, q.Name)
		switch {
		case x == nil || (x.Status != "success" && x.Status != "warning" && x.Status != "error"):
			waiting = waiting || q.Blocking || x == nil
		case x.Status == "error":
			failed = append(failed, extensionError(q, x))
			unusable = unusable || q.Blocking
		}
	}
	switch {
	case unusable:
		return StateUnusable, failed
	case waiting:
		return StateStarting, failed
	case n.Spec.Disabled:
		return StateOffline, failed
	}
	return StateIdle, failed
}

// orderState is the state of a node with a reboot or reimage under way: from
// the order until the agent reports from another start than the one that was
// ordered to end. Clocks are not asked: a host's may be wrong.
func orderState(n *Node) string {
	o := n.Spec.Order
	if o == nil {
		return ""
	}
	back := n.Status.Done == o.ID && n.Status.Report != nil && n.Status.Report.BootID != n.Status.OrderedBoot
	if back {
		return ""
	}
	if o.Kind == "reimage" {
		return StateReimaging
	}
	return StateRebooting
}

func startErrors(n *Node) []NodeError {
	e := n.Status.StartError
	if e == nil {
		return nil
	}
	return []NodeError{{Code: e.Code, Message: e.Message, Details: []fault.Detail{{Code: "Attempts", Message: strconv.Itoa(n.Status.Attempts)}}}}
}

// statusOf finds an extension in a report, nil if it is not there.
func statusOf(r *node.StatusReport, name string) *node.ExtensionStatus {
	if r == nil {
		return nil
	}
	for i := range r.Extensions {
		if strings.EqualFold(r.Extensions[i].Name, name) {
			return &r.Extensions[i]
		}
	}
	return nil
}

// extensionError says which extension failed and why, with its last log lines.
func extensionError(q Requirement, x *node.ExtensionStatus) NodeError {
	e := NodeError{Code: "VMExtensionFailed", Message: fmt.Sprintf("The extension %q failed: %s", q.Name, x.Message)}
	if x.Skipped != "" {
		e.Message = fmt.Sprintf("The extension %q was not started, because %q, which comes first, failed.", q.Name, x.Skipped)
	}
	add := func(name, value string) {
		if value != "" {
			e.Details = append(e.Details, fault.Detail{Code: name, Message: value})
		}
	}
	add("Extension", q.Name)
	add("Publisher", q.Publisher)
	add("Type", q.Type)
	add("Version", x.Version)
	add("Code", strconv.Itoa(x.Code))
	add("Operation", x.Operation)
	add("Message", x.Message)
	add("Log", strings.Join(x.Log, "\n"))
	return e
}

// settle writes down the node's state as it is now.
func (f *Fleet) settle(tx *store.Tx, n *Node, now time.Time) {
	p, err := Pools.Lookup(tx.Store().View(tx.Context()), n.Spec.Pool) // a view: the pool's status must not make this write fail
	if err != nil || p == nil {
		return
	}
	f.settleWith(p, n, now)
}

func (f *Fleet) settleWith(p *Pool, n *Node, now time.Time) {
	state, _ := NodeState(n, f.Requirements(&p.Spec), f.seen.newest(n.ID, n.Status.LastSeen), now)
	if state != n.Status.State {
		n.Status.State, n.Status.StateSince = state, now.UTC()
	}
}

// sameReport reports whether the second report says nothing that the first did not.
func sameReport(a, b *node.StatusReport) bool {
	if a == nil || b == nil || a.Revision != b.Revision || a.Agent != b.Agent || a.BootID != b.BootID || !a.Booted.Equal(b.Booted) || a.Done != b.Done {
		return false
	}
	return slices.EqualFunc(a.Extensions, b.Extensions, func(x, y node.ExtensionStatus) bool {
		return x.Name == y.Name && x.Version == y.Version && x.Sequence == y.Sequence && x.HandlerState == y.HandlerState &&
			x.Status == y.Status && x.Code == y.Code && x.Message == y.Message && x.Operation == y.Operation &&
			x.Skipped == y.Skipped && slices.Equal(x.Log, y.Log) && slices.Equal(x.Substatus, y.Substatus) &&
			slices.EqualFunc(x.Certificates, y.Certificates, func(c, d node.Certificate) bool {
				return c.Secret == d.Secret && c.Version == d.Version && c.Path == d.Path && c.Problem == d.Problem && c.Since.Equal(d.Since)
			})
	})
}

// Limits of what is kept of a report: enough to see what went wrong, too
// little to fill the store.
const (
	maxExtensions = 64
	maxMessage    = 4 << 10
	maxLogLines   = 50
	maxLogLine    = 1 << 10
	maxSubstatus  = 32
	maxDelivered  = 1000
)

// trimReport cuts a report to its limits and drops what is not printable.
func trimReport(r *node.StatusReport) {
	r.Agent, r.BootID, r.Done = clip(r.Agent, 64), clip(r.BootID, 64), clip(r.Done, 64)
	r.Extensions = slices.Clone(r.Extensions[:min(len(r.Extensions), maxExtensions)])
	for i := range r.Extensions {
		x := &r.Extensions[i]
		x.Name, x.Version, x.HandlerState = clip(x.Name, 256), clip(x.Version, 64), clip(x.HandlerState, 32)
		x.Status, x.Operation, x.Message = clip(x.Status, 32), clip(x.Operation, 256), clip(x.Message, maxMessage)
		x.Log = slices.Clone(x.Log[max(0, len(x.Log)-maxLogLines):])
		for j := range x.Log {
			x.Log[j] = clip(x.Log[j], maxLogLine)
		}
		x.Substatus = slices.Clone(x.Substatus[:min(len(x.Substatus), maxSubstatus)])
		for j := range x.Substatus {
			s := &x.Substatus[j]
			s.Name, s.Status, s.Message = clip(s.Name, 256), clip(s.Status, 32), clip(s.Message, maxMessage)
		}
		x.Certificates = x.Certificates[:min(len(x.Certificates), maxDelivered)]
	}
}

// clip cuts s to n bytes at a character and makes it printable.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return printable(s)
}

// printable replaces control characters, so that what a node says cannot play
// with a terminal or a log. Line breaks and tabs stay.
func printable(s string) string {
	return strings.ToValidUTF8(strings.Map(func(c rune) rune {
		if (c < ' ' && c != '\n' && c != '\t') || c == 0x7f || (c >= 0x80 && c < 0xa0) {
			return '\uFFFD'
		}
		return c
	}, s), "")
}
