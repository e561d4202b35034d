package agent

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/api/node"
)

func named(name string, deps ...string) node.Extension {
	return node.Extension{Name: name, DependsOn: deps}
}

func TestOrder(t *testing.T) {
	cases := []struct {
		name     string
		in       []node.Extension
		want     string
		problems []string
	}{
		{"by name without dependencies", []node.Extension{named("b"), named("a")}, "a b", nil},
		{"dependency first", []node.Extension{named("a", "b"), named("b")}, "b a", nil},
		{"a whole level before the next", []node.Extension{named("a", "z"), named("m"), named("z")}, "m z a", nil},
		{"diamond", []node.Extension{named("a", "b", "c"), named("b", "d"), named("c", "d"), named("d")}, "d b c a", nil},
		{"circle", []node.Extension{named("a", "b"), named("b", "a"), named("c")}, "c a b", []string{"a", "b"}},
		{"on itself", []node.Extension{named("a", "a")}, "a", []string{"a"}},
		{"on nothing", []node.Extension{named("a", "x"), named("b", "a")}, "a b", []string{"a", "b"}},
	}
	for _, c := range cases {
		sorted, problems := order(c.in)
		var got, bad []string
		for _, x := range sorted {
			got = append(got, x.Name)
			if problems[x.Name] != "" {
				bad = append(bad, x.Name)
			}
		}
		if strings.Join(got, " ") != c.want || !slices.Equal(bad, c.problems) {
			t.Errorf("%s: %v, problems %v; want %s, %v", c.name, got, problems, c.want, c.problems)
		}
	}
}

// TestOrderProperty: whatever the dependencies, every extension comes out once,
// and those without a problem come after all they depend on.
func TestOrderProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(0, 8).Draw(rt, "n")
		var in []node.Extension
		for i := range n {
			deps := rapid.SliceOfN(rapid.SampledFrom(strings.Split("abcdefghx", "")), 0, 3).Draw(rt, "deps")
			in = append(in, named(string(rune('a'+i)), deps...))
		}
		sorted, problems := order(in)
		if len(sorted) != n {
			rt.Fatalf("%d of %d extensions", len(sorted), n)
		}
		seen := map[string]bool{}
		for _, x := range sorted {
			for _, d := range x.DependsOn {
				if problems[x.Name] == "" && !seen[d] {
					rt.Fatalf("%s before %s", x.Name, d)
				}
			}
			seen[x.Name] = true
		}
	})
}

func TestDependenciesGate(t *testing.T) {
	known := map[string]node.ExtensionStatus{
		"ok": {Status: "success"}, "warn": {Status: "warning"}, "bad": {Status: "error"},
		"busy": {Status: "transitioning"}, "skipped": {Status: "error", Skipped: "root"},
	}
	cases := []struct {
		deps []string
		want gate
	}{
		{nil, gate{open: true}},
		{[]string{"ok", "warn"}, gate{open: true}},
		{[]string{"ok", "busy"}, gate{waiting: "busy"}},
		{[]string{"busy", "bad"}, gate{failed: "bad"}},                // an error decides, whatever is still busy
		{[]string{"skipped"}, gate{failed: "root"}},                   // the first failure is named
		{[]string{"never heard of"}, gate{waiting: "never heard of"}}, // not reported yet
	}
	for _, c := range cases {
		if got := dependencies(named("x", c.deps...), known); got != c.want {
			t.Errorf("%v: %+v, want %+v", c.deps, got, c.want)
		}
	}
}

func TestParseEvent(t *testing.T) {
	cases := []struct {
		line string
		want event
	}{
		{"rev 812", event{Kind: "rev", Rev: 812}},
		{"rev x", event{}},
		{"session ABC shell", event{Kind: "session", Session: "ABC", What: "shell"}},
		{"session ../../x shell", event{}}, // it goes into a URL
		{"retry 5", event{Kind: "retry", Seconds: 5}},
		{"retry 100000", event{Kind: "retry", Seconds: 600}}, // no server may send an agent away for ever
		{"retry -1", event{}},
		{"logs", event{Kind: "logs"}},
		{"ping", event{Kind: "ping"}},
		{"of a later server 1 2", event{}},
		{"", event{}},
	}
	for _, c := range cases {
		if got := parseEvent(c.line); got != c.want {
			t.Errorf("%q: %+v, want %+v", c.line, got, c.want)
		}
	}
}

func TestHostsBlock(t *testing.T) {
	names := []string{"b.x", "a.x", "a.x", "bad name", "evil\n1.2.3.4 y"}
	block := hostsBegin + "\n127.0.0.1 a.x\n127.0.0.1 b.x\n" + hostsEnd + "\n"
	cases := []struct{ name, old, want string }{
		{"empty file", "", block},
		{"after what is there", "1.1.1.1 q\n", "1.1.1.1 q\n" + block},
		{"no line end at the end", "1.1.1.1 q", "1.1.1.1 q\n" + block},
		{"in place of the old block", "1.1.1.1 q\n" + hostsBegin + "\n9.9.9.9 old\n" + hostsEnd + "\n2.2.2.2 r\n", "1.1.1.1 q\n" + block + "2.2.2.2 r\n"},
		{"a block that was cut off", "1.1.1.1 q\n" + hostsBegin + "\n9.9.9.9 old\n", "1.1.1.1 q\n" + block},
	}
	for _, c := range cases {
		got := hostsBlock(c.old, "127.0.0.1", names)
		if got != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
		if again := hostsBlock(got, "127.0.0.1", names); again != got {
			t.Errorf("%s: written again it changes", c.name)
		}
	}
	if got := hostsBlock("1.1.1.1 q\n"+block, "127.0.0.1", nil); got != "1.1.1.1 q\n" {
		t.Errorf("without names: %q", got)
	}
}

func TestCertificateStem(t *testing.T) {
	const v = "8f5f3f491afd48cb99286ba2aacd39af"
	for file, want := range map[string]string{
		"vault.cert." + v + ".1614815543.1617407543.PEM": "vault.cert", "vault.cert." + v: "vault.cert", "a.b." + v + "." + v: "a.b." + v,
		"vault.cert": "", "notes.txt": "", v: "", "x." + v[:31]: "",
	} {
		if got := certificateStem(file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
}

func TestSequenceOf(t *testing.T) {
	for _, c := range []struct {
		file, instance string
		want           int
		ok             bool
	}{
		{"3.settings", "", 3, true},
		{"one.3.settings", "one", 3, true},
		{"one.3.settings", "", 0, false},
		{"3.settings", "one", 0, false},
		{"x.settings", "", 0, false},
		{"3.status", "", 0, false},
		{".settings", "", 0, false},
	} {
		if got, ok := sequenceOf(c.file, c.instance); got != c.want || ok != c.ok {
			t.Errorf("%s of %q: %d %v", c.file, c.instance, got, ok)
		}
	}
}

func TestCompareVersions(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"1.10.0", "1.9.9", 1}, {"3.0", "3.0.0", 0}, {"1.0.1363.13", "1.0.1363.14", -1}} {
		if got := compareVersions(c.a, c.b); got < 0 != (c.want < 0) || got > 0 != (c.want > 0) {
			t.Errorf("%s to %s: %d", c.a, c.b, got)
		}
	}
}

// TestStatusFile: what becomes of status files that handlers in the field write.
func TestStatusFile(t *testing.T) {
	const seed = `[{"status":{"code":0,"formattedMessage":{"lang":"en","message":"Successfully started Key Vault extension service. 2021-03-03T23:12:23Z"},"operation":"Service start.","status":"success"},"timestampUTC":"2021-03-03T23:12:23Z","version":"1.0"}]`
	now := time.Now()
	path := filepath.Join(t.TempDir(), "1.status")
	see := func(seen seenStatus, at time.Time) (seenStatus, node.ExtensionStatus) {
		next := lookAt(seen, path, at, time.Second)
		var s node.ExtensionStatus
		fromFile(&s, next)
		return next, s
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	seen, s := see(seenStatus{}, now)
	if s.Status != "transitioning" {
		t.Errorf("no file: %+v", s)
	}
	write(seed)
	seen, s = see(seen, now)
	if s.Status != "success" || s.Operation != "Service start." || !strings.HasPrefix(s.Message, "Successfully started Key Vault") || s.Time.Year() != 2021 {
		t.Errorf("the page's file: %+v", s)
	}
	write(`[{"status":{"sta`)
	seen, s = see(seen, now)
	if s.Status != "success" {
		t.Errorf("a half-written file: %+v, want what it said before", s)
	}
	seen, s = see(seen, now.Add(2*time.Second))
	if s.Status != "error" || !strings.Contains(s.Message, "cannot be used") {
		t.Errorf("a file that stays broken: %+v", s)
	}
	write(`[{"version":1.0,"status":{"status":"Strange","code":"3","substatus":[{"name":"n","status":"success","code":1,"formattedMessage":{"message":"m"}}]}}]`)
	seen, s = see(seen, now.Add(3*time.Second))
	want := []node.Substatus{{Name: "n", Status: "success", Code: 1, Message: "m"}}
	if s.Status != "error" || s.Code != 3 || cmp.Diff(want, s.Substatus) != "" {
		t.Errorf("an unknown status is an error: %+v", s)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/hostname", path); err != nil {
		t.Fatal(err)
	}
	seen, _ = see(seen, now.Add(4*time.Second))
	if _, s = see(seen, now.Add(9*time.Second)); s.Status != "error" || !strings.Contains(s.Message, "no regular file") {
		t.Errorf("a link: %+v", s)
	}
}

// TestHeartbeat: only of handlers that report it; silence of ten minutes is an error.
func TestHeartbeat(t *testing.T) {
	now := time.Now()
	h := &handler{commands: extension.HandlerCommands{ReportHeartbeat: true}}
	cases := []struct {
		name string
		beat heartbeatSeen
		want string
	}{
		{"fresh", heartbeatSeen{status: "ready", at: now.Add(-time.Minute)}, "success"},
		{"not ready", heartbeatSeen{status: "notready", message: "m", at: now.Add(-time.Minute)}, "transitioning"},
		{"silent", heartbeatSeen{status: "ready", at: now.Add(-11 * time.Minute)}, "error"},
		{"never any", heartbeatSeen{}, "error"},
	}
	for _, c := range cases {
		in := &instance{handler: h, file: seenStatus{beat: c.beat, watched: now.Add(-time.Hour)}}
		s := node.ExtensionStatus{Status: "success"}
		unresponsive(&s, in, now)
		if s.Status != c.want {
			t.Errorf("%s: %+v, want %s", c.name, s, c.want)
		}
	}
	just := &instance{handler: h, file: seenStatus{watched: now.Add(-time.Minute)}}
	s := node.ExtensionStatus{Status: "success"}
	if unresponsive(&s, just, now); s.Status != "success" {
		t.Errorf("enabled a minute ago: %+v", s)
	}
}

func TestTailLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	text := "old\n" + strings.Repeat("line\n", 100) + "last"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := tailLines(path, 4, 3); !slices.Equal(got, []string{"line", "line", "last"}) {
		t.Errorf("%q", got)
	}
	if got := tailLines(path, int64(len(text))+10, 1); !slices.Equal(got, []string{"last"}) {
		t.Errorf("after the log was begun anew: %q", got)
	}
	big := strings.Repeat("x", tailBytes) + "\nshort\n"
	if err := os.WriteFile(path, []byte(big), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := tail(path, 0); err != nil || string(got) != "short\n" {
		t.Errorf("a cut tail begins with a whole line: %.20q, %v", got, err)
	}
}

func TestSamePool(t *testing.T) {
	const id = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Batch/batchAccounts/a/pools/Test2"
	for wished, want := range map[string]bool{"": true, "test2": true, strings.ToUpper(id): true, "test": false, "2": false} {
		if samePool(wished, id) != want {
			t.Errorf("%q: not %v", wished, want)
		}
	}
	if !samePool("test2", "") {
		t.Error("a host that no pool uses yet is fine")
	}
}

func TestConfig(t *testing.T) {
	for server, ok := range map[string]bool{
		"https://node.keyfleet.internal:8443": true, "https://node.keyfleet.internal": true, "http://node.keyfleet.internal": false,
		"https://10.0.0.1:8443": false, "node.keyfleet.internal": false, "": false, "https://node.x/path": false,
	} {
		c := Config{Server: server}
		if err := c.complete(); (err == nil) != ok {
			t.Errorf("server %q: %v", server, err)
		}
	}
	c := Config{Server: "https://node.x:8443", Address: "10.0.0.1"}
	if err := c.complete(); err != nil || c.Address != "10.0.0.1:8443" || c.StateDir != "/var/lib/waagent/keyfleet" {
		t.Errorf("%+v, %v", c, err)
	}
	path := filepath.Join(t.TempDir(), "agent.json")
	if err := os.WriteFile(path, []byte(`{"server":"https://node.x","tokenfile_":"x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadConfig(path); err == nil {
		t.Error("a misspelt member was accepted")
	}
}

// FuzzGoalState: whatever the server sends, names that reach the disk stay in
// their folder.
func FuzzGoalState(f *testing.F) {
	g := node.GoalState{Revision: 3, Node: "n", Extensions: []node.Extension{ext("KVExtensions", "KeyVaultForLinux", "3.0.1", &node.Package{SHA256: strings.Repeat("a", 64), Size: 1})}}
	seed, err := json.Marshal(g)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"extensions":[{"name":"../x","publisher":"a/b","type":"..","version":"1-2"}],"poll":-1}`))
	f.Add([]byte(`{"extensions":[{"name":"a","dependsOn":["a"]},{"name":"a"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		g, err := parseGoal(data)
		if err != nil {
			return
		}
		order(g.Extensions)
		a := &Agent{cfg: Config{LibDir: "/lib", LogDir: "/log"}}
		for _, x := range g.Extensions {
			if checkNames(x) != nil {
				continue
			}
			h := a.handler(handlerName(x), x.Version)
			h.commands.SupportsMultipleExtensions = true
			for _, p := range []string{h.dir, a.packagePath(h), h.logDir} {
				if d := filepath.Dir(p); d != "/lib" && d != "/log" {
					t.Errorf("%+v leads to %s", x, p)
				}
			}
			if filepath.Dir(h.statusPath(x.Name, x.Sequence)) != h.dir+"/status" {
				t.Errorf("%+v leads to %s", x, h.statusPath(x.Name, x.Sequence))
			}
		}
		hostsBlock("", "127.0.0.1", g.Hosts)
	})
}

// FuzzStatusFile: no status file makes the agent panic or report an unknown word.
func FuzzStatusFile(f *testing.F) {
	f.Add([]byte(`[{"status":{"code":0,"formattedMessage":{"lang":"en","message":"m"},"operation":"o","status":"success","substatus":null},"timestampUTC":"2021-03-03T23:12:23Z","version":"1.0"}]`))
	f.Add([]byte(`[]`))
	f.Add([]byte("\xef\xbb\xbf[{}]"))
	path := filepath.Join(f.TempDir(), "1.status")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		seen := lookAt(seenStatus{}, path, time.Unix(0, 0), 0)
		var s node.ExtensionStatus
		fromFile(&s, seen)
		if !slices.Contains([]string{"transitioning", "warning", "error", "success"}, s.Status) {
			t.Errorf("status %q", s.Status)
		}
	})
}

// FuzzWatchLine: lines of a watch.
func FuzzWatchLine(f *testing.F) {
	for _, l := range []string{"rev 812", "session ABC shell", "retry 5", "ping", "logs", "rev 99999999999999999999"} {
		f.Add(l)
	}
	f.Fuzz(func(t *testing.T, line string) {
		e := parseEvent(line)
		if e.Kind == "session" && strings.ContainsAny(e.Session+e.What, "/.\\?# ") || e.Seconds < 0 || e.Seconds > 600 {
			t.Errorf("%q is %+v", line, e)
		}
	})
}
