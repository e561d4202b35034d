//go:build linux

package rotation

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// processes looks at the command lines of all processes of a bed's machines and of
// this test, again and again: the machines are containers, so they are all here.
type processes struct {
	bed  string
	stop chan struct{}
	done sync.WaitGroup

	mu      sync.Mutex // guards what follows
	looks   int
	seen    map[string]bool
	secrets map[string]string // command line, without its secret, by what is wrong
}

// secret is a private key or a token, whole or in its first part: text that only
// speaks of such things is none.
var secret = regexp.MustCompile(strings.Join([]string{
	`-----BEGIN [A-Z ]*PRIVATE KEY-----\s*[A-Za-z0-9+/]{20}`,
	`LS0tLS1CRUdJTi[A-Za-z0-9+/]{0,12}(` + strings.Join(alignments("PRIVATE KEY"), "|") + `)[A-Za-z0-9+/]{20}`,
	`eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{20,}`,
	`AGE-SECRET-KEY-1[A-Z0-9]{20}`,
}, "|"))

// alignments are the three forms that a text takes inside of base64, without what
// depends on its neighbours.
func alignments(text string) []string {
	var out []string
	for before := range 3 {
		code := base64.StdEncoding.EncodeToString(append(make([]byte, before), text...))
		code = strings.TrimRight(code, "=")
		out = append(out, regexp.QuoteMeta(code[(before*8+5)/6:len(code)-1]))
	}
	return out
}

// watchProcesses begins to look, until the test is over.
func (c *cluster) watchProcesses(t *testing.T) *processes {
	t.Helper()
	p := &processes{bed: c.Name, stop: make(chan struct{}), seen: map[string]bool{}, secrets: map[string]string{}}
	p.done.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			p.look()
			select {
			case <-p.stop:
				return
			case <-tick.C:
			}
		}
	})
	t.Cleanup(sync.OnceFunc(func() { close(p.stop); p.done.Wait() }))
	return p
}

func (p *processes) look() {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return
	}
	ours := p.ours(dirs)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looks++
	for _, dir := range ours {
		line, err := os.ReadFile(dir + "/cmdline")
		if err != nil || len(line) == 0 {
			continue
		}
		text := string(bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
		p.seen[text] = true
		if found := secret.FindString(text); found != "" {
			p.secrets[found] = strings.ReplaceAll(text, found, found[:12]+"[...]")
		}
	}
}

// ours are those processes that belong to the bed or descend from this one.
func (p *processes) ours(dirs []string) []string {
	parents := map[int]int{}
	for _, dir := range dirs {
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat[max(0, bytes.LastIndexByte(stat, ')')):]), ") ")
		if f := strings.Fields(rest); len(f) > 1 {
			parents[number(dir)], _ = strconv.Atoi(f[1])
		}
	}
	var out []string
	for _, dir := range dirs {
		pid := number(dir)
		for depth := 0; pid > 1 && pid != os.Getpid() && depth < 50; depth++ {
			pid = parents[pid]
		}
		groups, _ := os.ReadFile(dir + "/cgroup")
		if pid == os.Getpid() || bytes.Contains(groups, []byte(p.bed)) {
			out = append(out, dir)
		}
	}
	return out
}

func number(dir string) int {
	n, _ := strconv.Atoi(filepath.Base(dir))
	return n
}

// wrong are the command lines that held a secret, without it.
func (p *processes) wrong() map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.secrets
	p.secrets = map[string]string{}
	return out
}

// findsSecrets shows that the canary would sing: processes with a token or a key
// among their arguments, here and on a machine, are found.
func (p *processes) findsSecrets(t *testing.T, c *cluster) {
	t.Helper()
	key := "-----BEGIN PRIVATE KEY-----\n" + strings.Repeat("A", 64) + "\n-----END PRIVATE KEY-----"
	token := "eyJhbGciOiJSUzI1NiJ9." + "eyJzdWIiOiJhIGNhbmFyeSBvZiB0aGlzIHRlc3QifQ." + strings.Repeat("s", 43)
	here := exec.Command("sh", "-c", "read -r end", "canary", base64.StdEncoding.EncodeToString([]byte(key)))
	hold, err := here.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := here.Start(); err != nil {
		t.Fatal(err)
	}
	there := make(chan struct{})
	go func() {
		defer close(there)
		c.in(t).sh("worker-0", "timeout 90 sh -c 'mkfifo /tmp/canary; read -r end </tmp/canary' canary '"+token+"' || true; rm -f /tmp/canary")
	}()
	found := map[string]string{}
	for end := time.Now().Add(time.Minute); len(found) < 2 && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for what, line := range p.wrong() {
			if strings.Contains(line, "canary") {
				found[what[:4]] = line
			}
		}
	}
	if len(found) < 2 {
		t.Errorf("of two secrets in command lines, these were found: %v", found)
	}
	_ = hold.Close()
	_ = here.Wait()
	c.in(t).sh("worker-0", "timeout 5 sh -c 'echo end >/tmp/canary' || true")
	<-there
	p.wrong() // those were ours
}

// showNone checks that no command line held a secret.
func (p *processes) showNone(t *testing.T) {
	t.Helper()
	for _, line := range p.wrong() {
		t.Errorf("a secret in a command line: %s", line)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.looks < 100 || len(p.seen) < 100 {
		t.Errorf("%d looks, %d command lines: too few to say anything", p.looks, len(p.seen))
	}
	fmt.Printf("%d command lines of runner and machines were seen in %d looks during rotations: 2 canaries found, no secret\n", len(p.seen), p.looks)
}
