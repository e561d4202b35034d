package cli

import (
	"context"
	"fmt"
	"net/http"
	"sort"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/client"
)

func (t *tool) poolWait() *cobra.Command {
	var until string
	c := t.verb("wait NAME", "Wait until a pool's nodes are idle", "keyfleet pool wait sim --timeout 5m\nkeyfleet pool wait sim --for steady", cobra.ExactArgs(1), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if until != "idle" && until != "steady" {
			return usagef("--for %s is not known", until).withFix("use idle or steady")
		}
		id, err := t.poolID(cmd.Context(), *account, args[0])
		if err != nil {
			return err
		}
		return t.awaitPool(cmd.Context(), id, until)
	}
	c.Flags().StringVar(&until, "for", "idle", "idle: the resize is over and all nodes are idle or have failed; steady: the resize is over")
	c.ValidArgsFunction = t.completePools
	return c
}

// settled are node states in which nothing more happens by itself.
var settled = map[string]bool{"idle": true, "running": true, "unusable": true, "starttaskfailed": true, "offline": true}

// awaitPool follows a pool until it is as wanted, and tells partial success as partial.
func (t *tool) awaitPool(ctx context.Context, id, until string) error {
	rid, err := arm.ParseID(id)
	if err != nil {
		return usagef("%v", err)
	}
	name := rid.Name()
	var o object
	var nodes []object
	err = t.waiting(ctx, defaultWait, "keyfleet pool wait "+name, func(ctx context.Context, p *progress) error {
		return t.client.Poll(ctx, pollPool, func(ctx context.Context) (bool, error) {
			var err error
			if o, err = t.call(ctx, request(http.MethodGet, t.client.ARM(id), client.VersionBatch, nil)); err != nil {
				return false, err
			}
			steady := o.str("properties.allocationState") == "Steady"
			if until == "steady" {
				p.show("Pool %s: %s", name, o.str("properties.allocationState"))
				return steady, nil
			}
			if nodes, err = t.poolNodes(ctx, rid); err != nil {
				return false, err
			}
			p.show("Pool %s: %s, %s", name, o.str("properties.allocationState"), stateCounts(nodes))
			return steady && allSettled(nodes), nil
		})
	})
	if err != nil {
		return err
	}
	return t.poolOutcome(name, o, nodes, until)
}

func allSettled(nodes []object) bool {
	for _, n := range nodes {
		if !settled[n.str("state")] {
			return false
		}
	}
	return true
}

// stateCounts prints "2 idle, 1 starting".
func stateCounts(nodes []object) string {
	counts := map[string]int{}
	for _, n := range nodes {
		counts[n.str("state")]++
	}
	states := make([]string, 0, len(counts))
	for s := range counts {
		states = append(states, s)
	}
	sort.Strings(states)
	for i, s := range states {
		states[i] = fmt.Sprintf("%d %s", counts[s], s)
	}
	if len(states) == 0 {
		return "no nodes"
	}
	return strings.Join(states, ", ")
}

// poolOutcome says how a pool ended up, and with which exit code.
func (t *tool) poolOutcome(name string, o object, nodes []object, until string) error {
	want := int(o.num("properties.scaleSettings.fixedScale.targetDedicatedNodes"))
	good, bad := 0, ""
	for _, n := range nodes {
		switch n.str("state") {
		case "idle", "running":
			good++
		default:
			if bad == "" {
				bad = n.str("id")
			}
		}
	}
	problem := poolProblem(o)
	if problem == "" && (until == "steady" || (bad == "" && good >= want)) {
		return changed(t, o, t.poolView(), "Pool %s is steady: %s.", name, orElse(stateCounts(nodes), "no nodes"))
	}
	e := &cliError{code: "PoolNotReady", exit: client.ExitFailed, message: fmt.Sprintf("Pool %s has %d of %s ready.", name, good, plural(want, "node"))}
	if good > 0 {
		e.exit = exitPartly
	}
	if problem != "" {
		e.why = append(e.why, problem)
	}
	for _, n := range nodes {
		for _, ne := range n.objects("errors") {
			if len(e.why) < 5 {
				e.why = append(e.why, n.str("id")+": "+ne.str("code")+": "+ne.str("message"))
			}
		}
	}
	e.fix = "keyfleet pool show " + name
	if bad != "" {
		e.fix = fmt.Sprintf("keyfleet node explain %s %s", name, bad)
	}
	return e
}
