package pool

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/smallstep/pkcs7"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

func TestNodeState(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	up := NodeSeen{Allocated: ago(time.Hour), Enrolled: ago(time.Hour)}
	with := func(status string, more ...node.ExtensionStatus) NodeSeen {
		s := up
		s.Report = &node.StatusReport{BootID: "b", Extensions: append([]node.ExtensionStatus{{Name: "kv", Status: status, Code: 7, Message: "said", Log: []string{"raw line"}}}, more...)}
		return s
	}
	needed := []Requirement{{Name: "KV", Blocking: true}}
	optional := []Requirement{{Name: "KV"}}
	order := &node.Action{ID: "o", Kind: "reboot"}
	tests := []struct {
		why    string
		wanted NodeWanted
		seen   NodeSeen
		reqs   []Requirement
		heard  time.Time
		gone   bool
		state  string
		errors string // codes
	}{
		{"nothing seen yet", NodeWanted{}, NodeSeen{}, nil, now, false, StateCreating, ""},
		{"a start that failed is tried again", NodeWanted{}, NodeSeen{StartError: &fault.Detail{Code: "X", Message: "why"}}, nil, now, false, StateCreating, "X"},
		{"a start that cannot succeed", NodeWanted{}, NodeSeen{StartError: &fault.Detail{Code: "X", Message: "why"}, StartFinal: true}, nil, now, false, StateUnusable, "X"},
		{"started, agent on its way", NodeWanted{}, NodeSeen{Allocated: ago(time.Minute)}, nil, now, false, StateStarting, ""},
		{"started long ago, no agent", NodeWanted{}, NodeSeen{Allocated: ago(6 * time.Minute)}, nil, now, false, StateUnusable, "AgentNotEnrolled"},
		{"enrolled, no report", NodeWanted{}, up, nil, now, false, StateStarting, ""},
		{"no extensions, a report", NodeWanted{}, with("success"), nil, now, false, StateIdle, ""},
		{"the extension has not been reported", NodeWanted{}, NodeSeen{Allocated: up.Allocated, Enrolled: up.Enrolled, Report: &node.StatusReport{}}, needed, now, false, StateStarting, ""},
		{"an extension of which nothing depends has not been reported", NodeWanted{}, NodeSeen{Allocated: up.Allocated, Enrolled: up.Enrolled, Report: &node.StatusReport{}}, optional, now, false, StateStarting, ""},
		{"the extension is at work", NodeWanted{}, with("transitioning"), needed, now, false, StateStarting, ""},
		{"the extension is at work, and the node may be used without it", NodeWanted{}, with("transitioning"), optional, now, false, StateIdle, ""},
		{"success, whatever the casing of the name", NodeWanted{}, with("success"), needed, now, false, StateIdle, ""},
		{"a warning is no failure", NodeWanted{}, with("warning"), needed, now, false, StateIdle, ""},
		{"failure with requireInitialSync", NodeWanted{}, with("error"), needed, now, false, StateUnusable, "VMExtensionFailed"},
		{"failure without requireInitialSync", NodeWanted{}, with("error"), optional, now, false, StateIdle, "VMExtensionFailed"},
		{"one of two failed", NodeWanted{}, with("success", node.ExtensionStatus{Name: "b", Status: "error", Skipped: "KV"}), append(slices.Clone(needed), Requirement{Name: "b", Blocking: true}), now, false, StateUnusable, "VMExtensionFailed"},
		{"scheduling is off", NodeWanted{Disabled: true}, with("success"), needed, now, false, StateOffline, ""},
		{"silence within its limit", NodeWanted{}, with("success"), needed, ago(90 * time.Second), false, StateIdle, ""},
		{"silence", NodeWanted{}, with("success"), needed, ago(91 * time.Second), false, StateUnknown, "AgentSilent"},
		{"a reboot that nobody carried out yet", NodeWanted{Order: order}, with("success"), needed, now, false, StateRebooting, ""},
		{"a reboot from which the agent is not back", NodeWanted{Order: order}, func() NodeSeen { s := with("success"); s.Done, s.OrderedBoot = "o", "b"; return s }(), needed, now, false, StateRebooting, ""},
		{"a reboot from which the agent is back", NodeWanted{Order: order}, func() NodeSeen { s := with("success"); s.Done, s.OrderedBoot = "o", "a"; return s }(), needed, now, false, StateIdle, ""},
		{"leaving, whatever else", NodeWanted{Order: order}, with("error"), needed, ago(time.Hour), true, StateLeavingPool, ""},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			n := &Node{Spec: tt.wanted, Status: tt.seen}
			if tt.gone {
				n.Deleting = now
			}
			state, errs := NodeState(n, tt.reqs, tt.heard, now)
			var codes []string
			for _, e := range errs {
				codes = append(codes, e.Code)
				if e.Message == "" {
					t.Error("an error without message")
				}
			}
			if state != tt.state || strings.Join(codes, " ") != tt.errors {
				t.Errorf("got %s with %q", state, codes)
			}
		})
	}
}

func TestExtensionErrorNamesTheExtensionAndKeepsRawLines(t *testing.T) {
	x := &node.ExtensionStatus{Name: "kv", Status: "error", Code: 1009, Message: "enable failed", Log: []string{"a", "b"}}
	e := extensionError(Requirement{Name: "kv", Publisher: "P", Type: "T"}, x)
	got := map[string]string{}
	for _, d := range e.Details {
		got[d.Code] = d.Message
	}
	want := map[string]string{"Extension": "kv", "Publisher": "P", "Type": "T", "Code": "1009", "Message": "enable failed", "Log": "a\nb"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestInstanceViewCodes(t *testing.T) {
	e := Extension{Name: "kv"}
	tests := []struct {
		why     string
		x       *node.ExtensionStatus
		state   string
		code    string
		level   int
		display string
	}{
		{"no word yet", nil, "Creating", "ProvisioningState/creating", 0, "Creating"},
		{"success, as documented", &node.ExtensionStatus{Status: "success"}, "Succeeded", "ProvisioningState/succeeded", 0, "Provisioning succeeded"},
		{"a warning", &node.ExtensionStatus{Status: "warning"}, "Succeeded", "ProvisioningState/succeeded", 1, "Provisioning succeeded"},
		{"a download that failed", &node.ExtensionStatus{Status: "error", Code: 1001}, "Failed", "ProvisioningState/failed/1001", 2, "Provisioning failed"},
		{"at work", &node.ExtensionStatus{Status: "transitioning"}, "Creating", "ProvisioningState/transitioning", 0, "Transitioning"},
		{"a word that we do not know", &node.ExtensionStatus{Status: "?"}, "Creating", "ProvisioningState/transitioning", 0, "Transitioning"},
	}
	for _, tt := range tests {
		v := instanceView(e, tt.x)
		if s := v.Statuses[0]; v.Provisioning != tt.state || s.Code != tt.code || s.Level != tt.level || s.Display != tt.display {
			t.Errorf("%s: %+v", tt.why, v)
		}
	}
}

// transport makes an RSA key and the PEM of its self-signed certificate.
func transport(t *testing.T) (*rsa.PrivateKey, *x509.Certificate, string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "transport"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestProtectedSettingsReachOnlyTheirNode(t *testing.T) {
	key, cert, text := transport(t)
	inBubble(t, func(w *world) {
		w.control()
		s := w.spec(1)
		s.Properties.Deployment.VM.Extensions[0].Protected = Protected(`{"password":"canary-1"}`)
		w.put(s)
		w.wait(time.Second)
		id := w.nodes()[0].ID
		g, err := w.fleet.Goal(w.ctx, id)
		if err != nil || g.Extensions[0].ProtectedSettings != "" || g.Extensions[0].Problem == "" {
			t.Fatalf("before the node has a certificate: %+v, %v", g.Extensions[0], err)
		}
		if _, err := w.fleet.Enrol(t.Context(), node.EnrolRequest{Token: w.provider.token(id), OS: "linux", Transport: text}, "k"); err != nil {
			t.Fatal(err)
		}
		first, err := w.fleet.Goal(w.ctx, id)
		if err != nil || first.Revision <= g.Revision {
			t.Fatalf("the enrolment did not change the goal state: %d, %d, %v", g.Revision, first.Revision, err)
		}
		again, err := w.fleet.Goal(w.ctx, id)
		if diff := cmp.Diff(first, again); diff != "" || err != nil {
			t.Errorf("the goal state is not the same twice: %s %v", diff, err)
		}
		der, err := base64.StdEncoding.DecodeString(first.Extensions[0].ProtectedSettings)
		if err != nil {
			t.Fatal(err)
		}
		p7, err := pkcs7.Parse(der)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := p7.Decrypt(cert, key)
		if err != nil || string(plain) != `{"password":"canary-1"}` {
			t.Fatalf("decrypted %q, %v", plain, err)
		}
		b, err := json.Marshal(first)
		if err != nil || strings.Contains(string(b), "canary-1") {
			t.Errorf("the goal state holds the secret in clear, %v", err)
		}
		for _, v := range []string{fmt.Sprintf("%v %+v %#v", s, s, s), fmt.Sprint(w.audit.all)} {
			if strings.Contains(v, "canary-1") {
				t.Errorf("printed: %s", v)
			}
		}
	})
}

func TestGoalStateHasWhatTheNodeNeeds(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		w.put(w.spec(1))
		w.wait(time.Second)
		n := w.nodes()[0]
		w.secrets.change("prod1", "web", 5000)
		g, err := w.fleet.Goal(w.ctx, n.ID)
		if err != nil {
			t.Fatal(err)
		}
		e := g.Extensions[0]
		want := node.GoalState{
			Revision: 5000, Node: n.ID, Pool: testPool.String(), Poll: pollSeconds,
			Hosts:      []string{"login.example", "node.example", "prod1.vault.example"},
			Identities: []node.Identity{{ResourceID: testIdentity, ClientID: testClient, ObjectID: "o1"}},
			Extensions: []node.Extension{{
				Name: "KVExtensions", Publisher: "Microsoft.Azure.KeyVault", Type: "KeyVaultForLinux", Version: "3.0.1", TypeHandlerVersion: "3.0",
				Package: &node.Package{SHA256: strings.Repeat("ab", 32), Size: 10}, Settings: e.Settings, Sequence: 1, Hint: "5000",
			}},
		}
		if diff := cmp.Diff(want, g); diff != "" {
			t.Error(diff)
		}
		if string(e.Settings) != string(w.pool().Spec.Properties.Deployment.VM.Extensions[0].Settings) {
			t.Errorf("settings are not as sent: %s", e.Settings)
		}
	})
}

func TestFollowGoalsTellsWhatConcernsANodeAndNothingElse(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		told := map[string]int64{}
		calls := 0
		w.background(func(ctx context.Context) error {
			return w.fleet.FollowGoals(ctx, func(id string, rev int64) { told[id] = rev; calls++ })
		})
		w.put(w.spec(2))
		w.wait(time.Second)
		nodes := w.nodes()
		for _, n := range nodes {
			g, err := w.fleet.Goal(w.ctx, n.ID)
			if err != nil || told[n.ID] != g.Revision {
				t.Fatalf("told %d, the goal state is %d, %v", told[n.ID], g.Revision, err)
			}
		}
		before := calls
		w.enrol(nodes[0].ID)
		w.wait(time.Second)
		if calls != before+1 {
			t.Errorf("an enrolment was told %d times", calls-before)
		}
		before = calls
		w.report(nodes[0].ID, "success", "done")
		w.secrets.change("prod1", "other", 900_000)
		w.wait(time.Minute)
		if calls != before {
			t.Errorf("reports and other secrets were told %d times", calls-before)
		}
		w.secrets.change("PROD1", "web", 1_000_000)
		w.secrets.change("prod1", "web", 1_000_000)
		w.wait(time.Second)
		if calls != before+2 || told[nodes[0].ID] != 1_000_000 || told[nodes[1].ID] != 1_000_000 {
			t.Errorf("a new version was told %d times: %v", calls-before, told)
		}
		w.put(w.spec(1))
		w.wait(time.Second)
		gone := nodes[1].ID
		if told[gone] <= 0 || calls != before+3 {
			t.Errorf("a node that is gone was told %d times", calls-before-2)
		}
	})
}

func TestAThousandNodesHearOfASecretAtOnce(t *testing.T) {
	x := &goalIndex{
		changes: &vaultDouble{verdicts: map[string]Verdict{}, revs: map[secretRef]int64{{"prod1", "web"}: 7}}, tell: func(string, int64) {},
		nodes: map[string]*goalNode{}, pools: map[string]*goalPool{}, bySecret: map[secretRef]map[string]bool{}, hostOf: map[string]string{},
	}
	feed := func(id string, rev int64, m Mark) {
		o := &store.Object[Mark, struct{}]{Spec: m}
		if err := x.mark(store.Change[Mark, struct{}]{ID: id, Object: o, Revision: rev}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 1000 { // nodes before their pool, as a listing has them
		feed(nodeMark(nodeID(strings.Repeat("a", 32), i)), 1, Mark{Pool: "p"})
	}
	feed(poolMark("p"), 2, Mark{URLs: []string{testSecret}})
	if err := x.mark(store.Change[Mark, struct{}]{Revision: 2}); err != nil {
		t.Fatal(err)
	}
	heard := map[string]int64{}
	x.tell = func(id string, rev int64) { heard[id] = rev }
	start := time.Now()
	x.secret("prod1", "web", 8)
	took := time.Since(start)
	if len(heard) != 1000 || heard[nodeID(strings.Repeat("a", 32), 999)] != 8 {
		t.Errorf("%d nodes heard of it", len(heard))
	}
	if took > 2*time.Second { // some 0.3 ms; the bound is for a machine under load
		t.Errorf("it took %s", took)
	}
}

func TestNodeIdentity(t *testing.T) {
	inBubble(t, func(w *world) {
		w.control()
		w.put(w.spec(1))
		w.wait(time.Second)
		id := w.nodes()[0].ID
		for why, r := range map[string]node.TokenRequest{
			"the only one": {}, "by client id": {ClientID: strings.ToUpper(testClient)}, "by object id": {ObjectID: "o1"}, "by resource id": {ResourceID: strings.ToLower(testIdentity)},
		} {
			if got, err := w.fleet.NodeIdentity(w.ctx, id, r); err != nil || got.ClientID != testClient {
				t.Errorf("%s: %+v, %v", why, got, err)
			}
		}
		if _, err := w.fleet.NodeIdentity(w.ctx, id, node.TokenRequest{ClientID: "other"}); fault.From(err).Code != "IdentityNotFound" {
			t.Errorf("another client id: %v", err)
		}
		if _, err := w.fleet.NodeIdentity(w.ctx, "gone", node.TokenRequest{}); fault.From(err).Code != "IdentityNotFound" {
			t.Errorf("a machine of no pool: %v", err)
		}
	})
}

func TestReportsAreCutAndMadePrintable(t *testing.T) {
	r := node.StatusReport{Agent: strings.Repeat("x", 100)}
	for range 100 {
		r.Extensions = append(r.Extensions, node.ExtensionStatus{Message: strings.Repeat("m", 10_000), Log: slices.Repeat([]string{"\x1b[2Jescape"}, 100)})
	}
	trimReport(&r)
	if len(r.Agent) != 64 || len(r.Extensions) != maxExtensions || len(r.Extensions[0].Message) != maxMessage || len(r.Extensions[0].Log) != maxLogLines {
		t.Errorf("not cut: %d %d", len(r.Agent), len(r.Extensions))
	}
	if strings.Contains(r.Extensions[0].Log[0], "\x1b") {
		t.Error("an escape sequence is left")
	}
}

func TestExplainPutsTheFirstBrokenLinkOnTop(t *testing.T) {
	inBubble(t, func(w *world) {
		w.secrets.set(testSecret, Verdict{Answer: "no", Code: "Forbidden", Message: "no permission", Fix: "set a policy"})
		w.control()
		w.put(w.spec(1))
		w.wait(time.Second)
		id := w.nodes()[0].ID
		explain := func() Explanation {
			e, err := w.fleet.Explain(w.ctx, testPool, id)
			if err != nil {
				t.Fatal(err)
			}
			return e
		}
		if e := explain(); e.Cause == nil || e.Cause.Name != "secrets" || e.Cause.Fix != "set a policy" {
			t.Errorf("a secret that cannot be read: %+v", e.Cause)
		}
		w.secrets.set(testSecret, Verdict{Answer: "yes"})
		w.wait(time.Minute)
		if e := explain(); e.Cause == nil || e.Cause.Name != "enrolment" || e.Cause.State != "waiting" {
			t.Errorf("an agent on its way: %+v", e.Cause)
		}
		w.enrol(id)
		w.report(id, "error", "disk full")
		e := explain()
		if e.Cause == nil || e.Cause.Name != "extension KVExtensions" || !strings.Contains(e.Cause.Message, "disk full") || !slices.Equal(e.Cause.Log, []string{"line 1"}) {
			t.Errorf("a failing extension: %+v", e.Cause)
		}
		w.report(id, "success", "done")
		if e := explain(); e.Cause != nil || e.State != StateIdle {
			t.Errorf("an idle node: %+v", e)
		}
		w.wait(2 * time.Minute)
		if e := explain(); e.Cause == nil || e.Cause.Name != "agent" || e.Cause.State != "broken" {
			t.Errorf("a silent agent: %+v", e.Cause)
		}
	})
}

func TestJoinTokensExpireAndAreStoredAsHashes(t *testing.T) {
	inBubble(t, func(w *world) {
		w.put(w.spec(0))
		token, _, err := w.fleet.CreateJoinToken(w.ctx, testPool, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if s := fmt.Sprintf("%v %s %+v %q", token, token, token, token); strings.Contains(s, token.Reveal()) {
			t.Errorf("a token prints as %s", s)
		}
		all, err := joinTokens.List(w.store.View(w.ctx), "")
		if err != nil || len(all) != 1 || strings.Contains(fmt.Sprint(all[0]), token.Reveal()) {
			t.Fatalf("stored: %+v, %v", all, err)
		}
		w.wait(time.Minute)
		if _, err := w.fleet.Enrol(w.ctx, enrolHost(token), "k"); fault.KindOf(err) != fault.Unauthenticated {
			t.Errorf("an expired token: %v", err)
		}
		if _, err := w.fleet.Enrol(w.ctx, enrolHost("nonsense"), "k"); fault.KindOf(err) != fault.Unauthenticated {
			t.Errorf("no token of ours: %v", err)
		}
		if _, _, err := w.fleet.CreateJoinToken(w.ctx, testPool, 25*time.Hour); fault.KindOf(err) != fault.Invalid {
			t.Errorf("a token for too long: %v", err)
		}
	})
}

func TestParseDuration(t *testing.T) {
	tests := map[string]time.Duration{
		"PT15M": 15 * time.Minute, "P7D": 168 * time.Hour, "P1DT12H": 36 * time.Hour, "P1W": 168 * time.Hour, "PT1.5S": 1500 * time.Millisecond, "PT0S": 0, "PT1H30M5S": 5405 * time.Second,
	}
	for s, want := range tests {
		if got, err := ParseDuration(s); err != nil || got != want {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "P", "PT", "15M", "PT15", "P1Y", "P1M", "-PT5M", "PT5M1H", "PT1M1M", "P1.5D", "PT 5M", "PT5m", "P99999999999W", "PT1.2.3S", "P1DT"} {
		if d, err := ParseDuration(s); err == nil {
			t.Errorf("%q is taken for %s", s, d)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"PT15M", "P7D", "P1DT12H", "PT1.5S", "P", "PT5M1H", "P9999999999999999999W"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDuration(s)
		if err == nil && (d < 0 || !strings.HasPrefix(s, "P")) {
			t.Errorf("%q is %s", s, d)
		}
	})
}

func FuzzPoolName(f *testing.F) {
	for _, s := range []string{"test2", "a_b-C", "", strings.Repeat("x", 65), "a/b", "ä"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if validPoolName(s) && (len(s) > 64 || strings.ContainsAny(s, "/. %?#") || !strings.EqualFold(s, strings.ToLower(s))) {
			t.Errorf("%q is taken for a pool name", s)
		}
	})
}
