package system

import (
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/test/stack"
)

// sameName is how many effects of one name a program is killed at. The job's
// own waiting reads the vault again and again, and each read is on record; the
// first occurrences are those of the job's steps.
const sameName = 40

// programs are those that die, and how their environment reaches them.
var programs = []struct {
	name   string
	inNode bool
}{
	{"keyfleet-server", false},
	{"keyfleet-agent", true},
	{"keyfleet-keyvault-extension", true},
}

func newJob(t *testing.T, bin string, serverEnv, nodeEnv []string) *job {
	t.Helper()
	if len(nodeEnv) > 0 {
		serverEnv = append(serverEnv, "KEYFLEET_NODE_ENV="+strings.Join(nodeEnv, ";"))
	}
	j := &job{system: &system{}}
	j.system = start(t, stack.Config{Bin: bin, Env: serverEnv, Dies: true})
	j.supervise()
	t.Cleanup(j.finish)
	return j
}

// TestKilledEverywhere walks through every effect of the main job.
func TestKilledEverywhere(t *testing.T) {
	if testing.Short() {
		t.Skip("SHORT: the job killed at every effect takes minutes")
	}
	bin := stack.Build(t, "killpoints")
	effects := map[string][]string{}
	t.Run("enumerate", func(t *testing.T) {
		for _, p := range programs {
			effects[p.name] = enumerate(t, bin, p.name, p.inNode)
			if len(effects[p.name]) == 0 {
				t.Fatalf("%s has no effects: is it built with killpoints?", p.name)
			}
		}
	})
	points, thinned := 0, 0
	t.Run("kill", func(t *testing.T) {
		for _, p := range programs {
			seen := map[string]int{}
			for n, name := range effects[p.name] {
				if seen[name]++; seen[name] > sameName {
					thinned++
					continue
				}
				for _, when := range []string{"before", "after"} {
					points++
					t.Run(fmt.Sprintf("%s/%s/%d %s", p.name, when, n+1, name), func(t *testing.T) {
						t.Parallel()
						killAt(t, bin, p.name, p.inNode, fmt.Sprintf("%s:%d", when, n+1))
					})
				}
			}
		}
	})
	for _, p := range programs {
		names := slices.Clone(effects[p.name])
		slices.Sort(names)
		t.Logf("%s: %d effects of %d kinds: %s", p.name, len(names), len(slices.Compact(slices.Clone(names))), strings.Join(slices.Compact(names), ", "))
	}
	fmt.Printf("the main job was killed at %d points (%d effects, before and after each; %d further repetitions of the same effects left out)\n", points, points/2, thinned)
}

// enumerate runs the job and returns the names of the program's effects, in order.
func enumerate(t *testing.T, bin, program string, inNode bool) []string {
	t.Helper()
	log := filepath.Join(t.TempDir(), program)
	env := []string{"KEYFLEET_KILL_PROGRAM=" + program, "KEYFLEET_EFFECT_LOG=" + log}
	var node []string
	if inNode { // the node's root is its own; waagent is kept until the node goes, so read it before
		env, node = nil, []string{"KEYFLEET_KILL_PROGRAM=" + program, "KEYFLEET_EFFECT_LOG=/var/lib/waagent/effects"}
	}
	j := newJob(t, bin, env, node)
	if !inNode {
		j.run()
		return readEffects(t, log)
	}
	j.create()
	id := j.waitIdle()
	j.renew()
	j.delivered()
	return readEffects(t, filepath.Join(j.Dir, "nodes", id, "waagent", "effects"))
}

// readEffects reads the names of a log. Processes of one program count for
// themselves; the longest-lived one is the one that is killed.
func readEffects(t *testing.T, path string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var longest, current []string
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		n, name, _ := strings.Cut(line, " ")
		if n == "1" {
			current = nil
		}
		if current = append(current, name); len(current) > len(longest) {
			longest = slices.Clone(current)
		}
	}
	return longest
}

func killAt(t *testing.T, bin, program string, inNode bool, at string) {
	t.Helper()
	once := filepath.Join(t.TempDir(), "killed")
	env := []string{"KEYFLEET_KILL_PROGRAM=" + program, "KEYFLEET_KILL_AT=" + at, "KEYFLEET_KILL_ONCE=" + once}
	if inNode {
		newJob(t, bin, nil, []string{"KEYFLEET_KILL_PROGRAM=" + program, "KEYFLEET_KILL_AT=" + at, "KEYFLEET_KILL_ONCE=/var/lib/waagent/killed"}).run()
		return
	}
	newJob(t, bin, env, nil).run()
}

func keyPair(pem []byte) bool {
	_, err := tls.X509KeyPair(pem, pem)
	return err == nil
}

// processesOf returns the processes whose arguments name the node.
func processesOf(nodeID string) []string {
	var out []string
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), nodeID) {
			out = append(out, strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return out
}
