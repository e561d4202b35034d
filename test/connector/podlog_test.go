//go:build linux

package connector

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"

	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/test/stack"
)

// podLog is what the containers of a pod print. It is read while they print it: when a
// pod is deleted its logs go with it.
type podLog struct {
	name  string
	file  string
	ended chan struct{} // closed when all containers have
	err   error         // of reading; after ended
}

// follow begins to read the log of the clients' pod, the one that was not told to end.
func (c *podClients) follow(t *testing.T) *podLog {
	t.Helper()
	var pods core.PodList
	if err := json.Unmarshal([]byte(c.kube(t, "get", "pods", "-l", "app=clients", "-o", "json")), &pods); err != nil {
		t.Fatal(err)
	}
	pods.Items = slices.DeleteFunc(pods.Items, func(p core.Pod) bool { return p.DeletionTimestamp != nil })
	if len(pods.Items) != 1 {
		t.Fatalf("the clients have %d pods", len(pods.Items))
	}
	name := pods.Items[0].Name
	l := &podLog{name: name, file: filepath.Join(c.home, name), ended: make(chan struct{})}
	out, err := os.Create(l.file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	ctx, cancel := context.WithCancel(c.ctx)
	cmd := exec.CommandContext(ctx, filepath.Join(c.bed.Dir, "kubectl"), "logs", name, "--all-containers", "--follow")
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		l.err = cmd.Wait()
		close(l.ended)
	}()
	c.T.Cleanup(func() { // after the whole test: the step that begins is not the one that ends
		cancel()
		<-l.ended
	})
	return l
}

// tally is how the logins of a container have ended.
type tally struct {
	user                string
	ok, refused, failed int
	stopped             bool // it says no more
}

// tallies are the last ones in a log, by container, and the lines that are none.
func tallies(log string) (last map[target.Kind]tally, others []string) {
	last = map[target.Kind]tally{}
	for line := range strings.Lines(log) {
		var kind target.Kind
		var now tally
		n, _ := fmt.Sscanf(line, "%s %s ok=%d refused=%d failed=%d", &kind, &now.user, &now.ok, &now.refused, &now.failed)
		switch {
		case !strings.HasSuffix(line, "\n"): // the rest is to come
		case n == 5:
			now.stopped = strings.HasSuffix(line, " stopped\n")
			last[kind] = now
		default:
			others = append(others, strings.TrimSpace(line))
		}
	}
	return last, others
}

// read returns what the containers have said so far. No login may have failed.
func (l *podLog) read(t *testing.T) map[target.Kind]tally {
	t.Helper()
	log, err := os.ReadFile(l.file)
	if err != nil {
		t.Fatal(err)
	}
	last, others := tallies(string(log))
	for kind, now := range last {
		if now.refused+now.failed > 0 {
			t.Fatalf("%s, %s: %+v; the pod says %s", l.name, kind, now, strings.Join(others, "\n"))
		}
	}
	return last
}

// logIn waits until every container of the pod has logged in several times from now on.
func (c *podClients) logIn(t *testing.T, l *podLog) {
	t.Helper()
	before := l.read(t)
	stack.Eventually(t, 2*time.Minute, "logins of "+l.name, func(context.Context) error {
		now := l.read(t)
		for _, u := range c.uses() {
			if now[u.kind].ok < before[u.kind].ok+enough {
				return fmt.Errorf("%s: %d, before %d", u.kind, now[u.kind].ok, before[u.kind].ok)
			}
		}
		return nil
	})
}

// end waits for the end of the pod, and returns how its logins have ended, all of them.
func (c *podClients) end(t *testing.T, l *podLog) map[target.Kind]tally {
	t.Helper()
	select {
	case <-l.ended:
	case <-time.After(2 * time.Minute):
		t.Fatalf("the pod %s does not end", l.name)
	}
	last := l.read(t)
	for _, u := range c.uses() {
		if now := last[u.kind]; !now.stopped {
			t.Errorf("%s, %s: the last that is known of it is %+v (%v)", l.name, u.kind, now, l.err)
		}
		c.logins[u.kind] += last[u.kind].ok
		t.Logf("%s, %s: %d logins as %s, none failed", l.name, u.kind, last[u.kind].ok, last[u.kind].user)
	}
	return last
}
