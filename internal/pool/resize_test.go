package pool

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
)

func TestPoolComesUpAndNodesTurnIdleByReportOnly(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		out := w.put(w.spec(3))
		if got := AllocationState(out.Pool); got != Resizing {
			t.Fatalf("the PUT answers allocationState %s", got)
		}
		w.wait(time.Second)
		if got := w.states(); got != "starting starting starting" {
			t.Fatalf("after the start: %s", got)
		}
		p := w.pool()
		if AllocationState(p) != Steady || p.Status.Current != 3 || len(p.Status.Resize.Errors) != 0 {
			t.Fatalf("pool is %s with %d nodes, %v", AllocationState(p), p.Status.Current, p.Status.Resize.Errors)
		}
		for _, n := range w.nodes() {
			if !strings.HasPrefix(n.ID, p.UID) || len(n.ID) != 38 {
				t.Errorf("node id %s is not the pool's 32 hex digits and six more", n.ID)
			}
			w.enrol(n.ID)
			w.report(n.ID, "success", "done")
		}
		if got := w.states(); got != "idle idle idle" {
			t.Fatalf("after the reports: %s", got)
		}
		w.wait(80 * time.Second)
		if got := w.states(); got != "idle idle idle" {
			t.Fatalf("within the time that silence is allowed: %s", got)
		}
		w.wait(20 * time.Second)
		if got := w.states(); got != "unknown unknown unknown" {
			t.Fatalf("after 100 s of silence: %s", got)
		}
	})
}

func TestScaleDownTakesTheLeastUsefulNodesAndTheNewest(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		w.put(w.spec(4))
		w.wait(time.Second)
		nodes := w.nodes()
		for i, n := range nodes {
			w.enrol(n.ID)
			if i == 1 {
				w.report(n.ID, "error", "no such secret")
			} else {
				w.report(n.ID, "success", "done")
			}
		}
		w.put(w.spec(2))
		w.wait(time.Second)
		left := w.nodes()
		if len(left) != 2 || left[0].ID != nodes[0].ID || left[1].ID != nodes[2].ID {
			t.Fatalf("left are %s", w.states())
		}
		if _, err := w.fleet.Goal(w.ctx, nodes[1].ID); fault.KindOf(err) != fault.NotFound {
			t.Errorf("the goal state of a node that is gone: %v", err)
		}
		w.put(w.spec(3))
		w.wait(time.Second)
		if all := w.nodes(); len(all) != 3 || all[2].ID != nodeID(w.pool().UID, 4) {
			t.Errorf("a node number was used again: %v", all[len(all)-1].ID)
		}
	})
}

func TestResizeErrors(t *testing.T) {
	tests := []struct {
		name, why string
		fail      func(verb, id string) error
		windows   bool
		wait      time.Duration
		code      string
		message   string
		current   int
	}{
		{
			name: "no provider for the system", why: "no timeout helps against an operating system that nobody offers",
			windows: true, wait: time.Second, code: "AllocationFailed", message: "No provider of this server offers Windows nodes",
		},
		{
			name: "a refusal that stays", why: "what is Invalid does not get better by waiting",
			fail: func(verb, _ string) error {
				if verb == "start" {
					return fault.New(fault.Invalid, "NamespacesForbidden", "This machine forbids user namespaces.")
				}
				return nil
			},
			wait: 5 * time.Second, code: "AllocationFailed", message: "This machine forbids user namespaces",
		},
		{
			name: "an unknown failure", why: "is tried three times, and its text is not shown",
			fail: func(verb, _ string) error {
				if verb == "start" {
					return errors.New("raw cause")
				}
				return nil
			},
			wait: 5 * time.Minute, code: "AllocationFailed", message: "the server's log says why",
		},
		{
			name: "not now", why: "is tried until the resize times out, and what is there stays",
			fail: func(verb, id string) error {
				if verb == "start" && strings.HasSuffix(id, "1") {
					return fault.New(fault.Unavailable, "NoFreeHost", "No host is free.")
				}
				return nil
			},
			wait: 16 * time.Minute, code: "AllocationTimedout", message: "1 of 2 nodes", current: 1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(w *world) {
				w.provider.fail = tt.fail
				w.control()
				s := w.spec(2)
				if tt.windows {
					s.Properties.Deployment.VM.Image = Image{Publisher: "microsoftwindowsserver", Offer: "windowsserver", SKU: "2022-datacenter"}
					s.Properties.Deployment.VM.NodeAgentSKU = "batch.node.windows amd64"
					s.Properties.Deployment.VM.Extensions[0].Type = "KeyVaultForWindows"
				}
				w.put(s)
				w.wait(tt.wait)
				p := w.pool()
				if AllocationState(p) != Steady || p.Status.Current != tt.current {
					t.Errorf("pool is %s with %d nodes", AllocationState(p), p.Status.Current)
				}
				if p.Status.Resize == nil || len(p.Status.Resize.Errors) != 1 {
					t.Fatalf("resize errors: %+v", p.Status.Resize)
				}
				if e := p.Status.Resize.Errors[0]; e.Code != tt.code || !strings.Contains(e.Message, tt.message) {
					t.Errorf("%s; got %s: %s", tt.why, e.Code, e.Message)
				}
				if got := len(w.nodes()); got != tt.current {
					t.Errorf("%d nodes are left: %s", got, w.states())
				}
			})
		})
	}
}

func TestStopResizeKeepsWhatIsThere(t *testing.T) {
	inBubble(t, func(w *world) {
		w.provider.fail = func(verb, id string) error {
			if verb == "start" && !strings.HasSuffix(id, "0") {
				return fault.New(fault.Unavailable, "NoFreeHost", "No host is free.")
			}
			return nil
		}
		w.control()
		w.put(w.spec(3))
		w.wait(time.Minute)
		if _, err := w.fleet.Resize(w.ctx, ResizeRequest{ID: testPool}); fault.From(err).Code != "PoolBeingResized" {
			t.Errorf("a resize during a resize: %v", err)
		}
		if _, err := w.fleet.StopResize(w.ctx, testPool, ""); err != nil {
			t.Fatal(err)
		}
		w.wait(time.Second)
		p := w.pool()
		if AllocationState(p) != Steady || len(w.nodes()) != 1 || p.Status.Resize.Errors[0].Code != "ResizeStopped" {
			t.Errorf("pool is %s, nodes %s, %+v", AllocationState(p), w.states(), p.Status.Resize.Errors)
		}
		if _, err := w.fleet.StopResize(w.ctx, testPool, ""); fault.KindOf(err) != fault.Conflict {
			t.Errorf("stopping a pool at rest: %v", err)
		}
	})
}

func TestDeletedPoolStopsItsNodesAndEndsTheirTokens(t *testing.T) {
	inBubble(t, func(w *world) {
		stuck := true
		w.provider.fail = func(verb, _ string) error {
			if verb == "stop" && stuck {
				return errors.New("the machine does not answer")
			}
			return nil
		}
		w.control()
		w.put(w.spec(2))
		w.wait(time.Second)
		nodes := w.nodes()
		w.enrol(nodes[0].ID)
		uid, err := w.fleet.DeletePool(w.ctx, testPool, "")
		if err != nil || uid == "" {
			t.Fatal(uid, err)
		}
		w.wait(30 * time.Second)
		if gone, err := w.fleet.PoolGone(w.ctx, testPool, uid); gone || err != nil {
			t.Fatalf("the pool is gone (%v) while its nodes run: %v", gone, err)
		}
		if _, err := w.fleet.Put(w.ctx, write(w.spec(2))); fault.From(err).Code != "PoolBeingDeleted" {
			t.Errorf("a PUT meanwhile: %v", err)
		}
		w.provider.mu.Lock()
		stuck = false
		w.provider.mu.Unlock()
		w.wait(10 * time.Minute)
		if gone, err := w.fleet.PoolGone(w.ctx, testPool, uid); !gone || err != nil {
			t.Fatalf("gone: %v, %v", gone, err)
		}
		if len(w.provider.nodes) != 0 {
			t.Errorf("nodes still run: %v", w.provider.nodes)
		}
		if err := w.fleet.Renew(w.ctx, nodes[0].ID, ""); fault.KindOf(err) != fault.NotFound {
			t.Errorf("an agent of a node that is gone gets a certificate: %v", err)
		}
		left, err := marks.List(w.store.View(w.ctx), "")
		if err != nil || len(left) != 0 {
			t.Errorf("%d marks are left, %v", len(left), err)
		}
	})
}

func TestNodeThatDiedIsStartedAgainAndAnUnknownOneIsStopped(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		w.put(w.spec(1))
		w.wait(time.Second)
		id := w.nodes()[0].ID
		w.enrol(id)
		w.report(id, "success", "done")
		w.provider.mu.Lock()
		w.provider.nodes[id] = false
		w.provider.nodes[strings.Repeat("f", 32)+"000000"] = true
		w.provider.mu.Unlock()
		w.wait(5 * time.Second)
		w.provider.mu.Lock()
		defer w.provider.mu.Unlock()
		if len(w.provider.nodes) != 1 || !w.provider.nodes[id] {
			t.Errorf("the provider has %v", w.provider.nodes)
		}
	})
}

func TestRebootEndsWhenTheAgentSaysSo(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		w.put(w.spec(1))
		w.wait(time.Second)
		id := w.nodes()[0].ID
		w.enrol(id)
		w.report(id, "success", "done")
		for _, kind := range []string{"reboot", "reimage"} {
			w.wait(time.Second)
			if err := w.fleet.OrderNode(w.ctx, testPool, id, kind); err != nil {
				t.Fatal(err)
			}
			w.wait(time.Second)
			if got := w.states(); got != map[string]string{"reboot": StateRebooting, "reimage": StateReimaging}[kind] {
				t.Fatalf("after the provider did the %s: %s", kind, got)
			}
			if err := w.fleet.OrderNode(w.ctx, testPool, id, kind); err != nil {
				t.Errorf("the same order again: %v", err)
			}
			w.report(id, "success", "still from before")
			if got := w.states(); got == StateIdle {
				t.Fatalf("a report from before the %s ends it", kind)
			}
			w.boot = kind
			w.report(id, "success", "back")
			if got := w.states(); got != StateIdle {
				t.Fatalf("after the report: %s", got)
			}
		}
		if err := w.fleet.OrderNode(w.ctx, testPool, "none", "reboot"); fault.From(err).Code != "NodeNotFound" {
			t.Errorf("an unknown node: %v", err)
		}
	})
}

func TestRemoveNodesShrinksThePool(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		w.put(w.spec(3))
		w.wait(time.Second)
		nodes := w.nodes()
		if _, err := w.fleet.RemoveNodes(w.ctx, testPool, []string{nodes[0].ID, strings.ToUpper(nodes[0].ID)}, "", ""); err != nil {
			t.Fatal(err)
		}
		w.wait(time.Second)
		p := w.pool()
		if got := len(w.nodes()); got != 2 || p.Spec.Properties.Scale.Fixed.Dedicated != 2 || AllocationState(p) != Steady {
			t.Errorf("%d nodes, target %d, %s", got, p.Spec.Properties.Scale.Fixed.Dedicated, AllocationState(p))
		}
	})
}

func TestHostsAreTakenReleasedAndFreeAgain(t *testing.T) {
	inBubble(t, func(w *world) {
		hosts := &providerDouble{name: hostProvider, offers: "linux", nodes: map[string]bool{}, tokens: map[string]Token{}}
		w.fleet.cfg.Providers = append(w.fleet.cfg.Providers, joined{hosts, w.fleet})
		w.control()
		w.put(w.spec(0))
		w.wait(time.Second)
		token, _, err := w.fleet.CreateJoinToken(w.ctx, testPool, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		id, err := w.fleet.Enrol(t.Context(), enrolHost(token), "hostkey")
		if err != nil {
			t.Fatal(err)
		}
		again, err := w.fleet.Enrol(t.Context(), enrolHost(token), "hostkey")
		if err != nil || again != id {
			t.Fatalf("a lost answer asked for again: %s, %v", again, err)
		}
		if _, err := w.fleet.Enrol(t.Context(), enrolHost(token), "other"); fault.KindOf(err) != fault.Denied {
			t.Fatalf("a second machine with the same token: %v", err)
		}
		w.put(w.spec(1))
		w.wait(time.Second)
		n := w.nodes()[0]
		g, err := w.fleet.Goal(w.ctx, id)
		if err != nil || g.Node != n.ID || len(g.Extensions) != 1 {
			t.Fatalf("the host's goal state: %+v, %v", g, err)
		}
		w.report(id, "success", "done")
		if got := w.states(); got != StateIdle {
			t.Fatalf("node is %s", got)
		}
		w.put(w.spec(0))
		w.wait(time.Second)
		if got := w.states(); got != StateLeavingPool {
			t.Fatalf("before the host said that it is released: %q", got)
		}
		g, err = w.fleet.Goal(w.ctx, id)
		if err != nil || g.Action == nil || g.Action.Kind != "release" {
			t.Fatalf("the order is not in the goal state: %+v, %v", g.Action, err)
		}
		if err := w.fleet.Report(w.ctx, id, done(g)); err != nil {
			t.Fatal(err)
		}
		w.wait(10 * time.Second)
		if got := w.states(); got != "" {
			t.Fatalf("after the release: %s", got)
		}
		all, err := w.fleet.ListHosts(w.ctx)
		if err != nil || len(all) != 1 || HostState(all[0]) != "free" {
			t.Fatalf("hosts: %+v, %v", all, err)
		}
		g, err = w.fleet.Goal(w.ctx, id)
		if err != nil || len(g.Extensions) != 0 || g.Action != nil || g.Pool != "" {
			t.Fatalf("a free host's goal state: %+v, %v", g, err)
		}
	})
}

func TestFindingsBecomeAConditionAndGoAgain(t *testing.T) {
	inBubble(t, func(w *world) {
		w.secrets.set(testSecret, Verdict{Answer: "no", Code: "SecretNotFound", Message: "A secret with the name web was not found in this key vault.", Fix: "create it"})
		w.control()
		out := w.put(w.spec(1))
		if len(out.Warnings) != 1 || !strings.Contains(out.Warnings[0].Reason, testSecret) {
			t.Fatalf("warnings: %v", out.Warnings)
		}
		w.wait(time.Second)
		if c := w.pool().Condition("SecretsReadable"); c.Status || c.Reason != "SecretNotFound" {
			t.Errorf("condition: %+v", c)
		}
		if n := w.nodes()[0]; len(n.Errors) != 1 || n.Errors[0].Code != "SecretNotFound" {
			t.Errorf("node errors: %+v", n.Errors)
		}
		w.secrets.set(testSecret, Verdict{Answer: "yes"})
		w.secrets.change("prod1", "web", 1000)
		w.wait(time.Second)
		if c := w.pool().Condition("SecretsReadable"); !c.Status {
			t.Errorf("condition after the secret came to be: %+v", c)
		}
	})
}

func TestControllersSurviveACrashBetweenAnyTwoSteps(t *testing.T) {
	for _, verb := range []string{"start", "stop"} {
		inBubble(t, func(w *world) {
			// The provider does what it is told and then fails to say so: what a
			// killed server leaves behind.
			failed := map[string]bool{}
			w.provider.fail = func(v, id string) error {
				if v == verb && !failed[id] {
					failed[id] = true
					if v == "start" {
						w.provider.nodes[id] = true
					} else {
						delete(w.provider.nodes, id)
					}
					return errors.New("lost answer")
				}
				return nil
			}
			w.control()
			w.put(w.spec(2))
			w.wait(time.Minute)
			if got := len(w.nodes()); got != 2 || AllocationState(w.pool()) != Steady {
				t.Fatalf("%s: %d nodes, %s", verb, got, AllocationState(w.pool()))
			}
			w.put(w.spec(0))
			w.wait(10 * time.Minute)
			if got := len(w.nodes()); got != 0 || len(w.provider.nodes) != 0 {
				t.Fatalf("%s: %d nodes are left, the provider has %d", verb, got, len(w.provider.nodes))
			}
		})
	}
}

func TestNothingOfAPoolIsWrittenWhenItIsRefused(t *testing.T) {
	w := newWorld(t)
	s := w.spec(1)
	s.Properties.VMSize = ""
	if _, err := w.fleet.Put(w.ctx, write(s)); fault.KindOf(err) != fault.Invalid {
		t.Fatal(err)
	}
	w.secrets.set(testSecret, Verdict{Answer: "no", Code: "SecretNotFound", Message: "gone"})
	strict := write(w.spec(1))
	strict.Strict = true
	if _, err := w.fleet.Put(w.ctx, strict); fault.From(err).Code != "SecretNotFound" {
		t.Fatal(err)
	}
	if _, err := w.fleet.WhatIf(w.ctx, write(w.spec(1))); err != nil {
		t.Fatal(err)
	}
	tx := w.store.View(w.ctx)
	pools, err1 := Pools.List(tx, "")
	left, err2 := marks.List(tx, "")
	if len(pools)+len(left) != 0 || err1 != nil || err2 != nil {
		t.Errorf("%d pools and %d marks are stored", len(pools), len(left))
	}
}

// joined is a provider of hosts, as thin as the real one.
type joined struct {
	*providerDouble
	fleet *Fleet
}

func (j joined) Start(ctx context.Context, n NodeSpec) error {
	_, err := j.fleet.TakeHost(ctx, n.Pool, n.OS, n.ID)
	return err
}

func (j joined) Stop(ctx context.Context, id string) error {
	h, err := j.fleet.OrderHost(ctx, id, "release")
	if err != nil || h == nil {
		return err
	}
	return fault.New(fault.Unavailable, "HostNotReleased", "Not yet.")
}

func (j joined) List(ctx context.Context) ([]ProviderNode, error) {
	all, err := j.fleet.HostsInUse(ctx)
	var out []ProviderNode
	for id := range all {
		out = append(out, ProviderNode{ID: id, Running: true})
	}
	return out, err
}

func enrolHost(token Token) node.EnrolRequest {
	return node.EnrolRequest{Token: token.Reveal(), Hostname: "machine1", OS: "linux", Agent: "1"}
}

// done is the report of an agent that carried out the order.
func done(g node.GoalState) node.StatusReport {
	return node.StatusReport{Revision: g.Revision, Agent: "1", Done: g.Action.ID}
}
