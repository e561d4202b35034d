package cluster

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
)

const (
	sub    = "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33"
	prodID = sub + "/resourceGroups/rg1/providers/Microsoft.ContainerService/managedClusters/prod"
)

type world struct {
	*Service
	store *store.Store
	now   time.Time
	file  string // audit file
}

func newWorld(t testing.TB) *world {
	t.Helper()
	backend := store.NewMemory()
	t.Cleanup(func() { backend.Close() })
	s, err := store.New(t.Context(), backend)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{store: s, now: time.Now(), file: filepath.Join(t.TempDir(), "audit.jsonl")}
	log, err := audit.Open(audit.Config{Path: w.file, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Close)
	w.Service = New(Config{Store: s, Gate: access.NewGate(access.Config{Store: s, Recorder: log}), Now: func() time.Time { return w.now }})
	return w
}

func system(t testing.TB) context.Context { return access.AsSystem(t.Context(), "test") }

// parts make a kubeconfig; what a test changes is changed in them.
type parts struct {
	cluster, user, context map[string]any
	current                string
}

func newParts(t testing.TB) parts {
	t.Helper()
	ca := kubetest.NewCA(t, "kubernetes")
	cert, key := kubetest.Issue(t, ca, pki.Template{Subject: "CN=admin", EKUs: []string{pki.ClientAuth}})
	return parts{
		cluster: map[string]any{"server": "https://10.0.0.1:6443", "certificate-authority-data": ca.PEM()},
		user:    map[string]any{"client-certificate-data": cert, "client-key-data": key}, context: map[string]any{"cluster": "c", "user": "u"}, current: "x",
	}
}

func (p parts) text(t testing.TB) []byte {
	t.Helper()
	text, err := yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": p.current, "preferences": map[string]any{},
		"clusters": []any{map[string]any{"name": "c", "cluster": p.cluster}, map[string]any{"name": "other", "cluster": map[string]any{"server": "http://x", "certificate-authority": "/f"}}},
		"users":    []any{map[string]any{"name": "u", "user": p.user}, map[string]any{"name": "other", "user": map[string]any{"exec": map[string]any{"command": "rm"}}}},
		"contexts": []any{map[string]any{"name": "x", "context": p.context}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestParseKubeconfig(t *testing.T) {
	other := newParts(t)
	cases := []struct {
		reason string
		change func(*parts)
		target string // empty: it is taken
	}{
		{"a certificate", func(*parts) {}, ""},
		{"a token", func(p *parts) { p.user = map[string]any{"token": "t"} }, ""},
		{"the trust roots of whoever connects", func(p *parts) { delete(p.cluster, "certificate-authority-data") }, ""},
		{"a namespace and extensions", func(p *parts) {
			p.context["namespace"], p.context["extensions"] = "shop", []any{map[string]any{"name": "minikube"}}
		}, ""},
		{"a program that logs in", func(p *parts) { p.user["exec"] = map[string]any{"command": "aws"} }, "users[u].exec"},
		{"another service that logs in", func(p *parts) { p.user["auth-provider"] = map[string]any{"name": "azure"} }, "users[u].auth-provider"},
		{"a file with the certificate", func(p *parts) { p.user["client-certificate"] = "/etc/passwd" }, "users[u].client-certificate"},
		{"a file with the key", func(p *parts) { p.user["client-key"] = "/etc/shadow" }, "users[u].client-key"},
		{"a file with the token", func(p *parts) { p.user["tokenFile"] = "/run/token" }, "users[u].tokenFile"},
		{"a file with the CA", func(p *parts) { p.cluster["certificate-authority"] = "/etc/ca" }, "clusters[c].certificate-authority"},
		{"any server is trusted", func(p *parts) { p.cluster["insecure-skip-tls-verify"] = true }, "clusters[c].insecure-skip-tls-verify"},
		{"a proxy", func(p *parts) { p.cluster["proxy-url"] = "http://proxy" }, "clusters[c].proxy-url"},
		{"a password", func(p *parts) { p.user["password"] = "p" }, "users[u].username"},
		{"somebody else's name", func(p *parts) { p.user["as"] = "root" }, "users[u].as"},
		{"somebody else's groups", func(p *parts) { p.user["as-groups"] = []string{"system:masters"} }, "users[u].as"},
		{"no credential", func(p *parts) { p.user = map[string]any{} }, "users"},
		{"plain HTTP", func(p *parts) { p.cluster["server"] = "http://10.0.0.1:6443" }, "server"},
		{"no server", func(p *parts) { delete(p.cluster, "server") }, "server"},
		{"a CA that is none", func(p *parts) { p.cluster["certificate-authority-data"] = []byte("x") }, "certificate-authority-data"},
		{"a key of another certificate", func(p *parts) { p.user["client-key-data"] = other.user["client-key-data"] }, "client-certificate-data"},
		{"a certificate without a key", func(p *parts) { delete(p.user, "client-key-data") }, "client-certificate-data"},
		{"a context that is not there", func(p *parts) { p.current = "y" }, "contexts[y]"},
		{"a cluster that is not there", func(p *parts) { p.context["cluster"] = "d" }, "clusters"},
		{"a user who is not there", func(p *parts) { p.context["user"] = "v" }, "users"},
		{"a member that nobody knows", func(p *parts) { p.user["clientkey"] = "x" }, "-"},
	}
	for _, tc := range cases {
		p := newParts(t)
		tc.change(&p)
		k, err := ParseKubeconfig(p.text(t), time.Now())
		if tc.target == "" {
			if err != nil {
				t.Errorf("%s: %v", tc.reason, err)
				continue
			}
			text, err := k.Document("prod")
			if err != nil {
				t.Fatal(err)
			}
			if again, err := ParseKubeconfig(text, time.Now()); err != nil || fmt.Sprint(again) != fmt.Sprint(k) {
				t.Errorf("%s: it does not come back as it was: %v", tc.reason, err)
			}
			continue
		}
		want := strings.TrimSuffix("properties.kubeconfig."+tc.target, ".-")
		if e := fault.From(err); e == nil || e.Code != "InvalidKubeconfig" || e.Target != want {
			t.Errorf("%s: %v, want InvalidKubeconfig at %s", tc.reason, err, want)
		}
	}
	p := newParts(t)
	if _, err := ParseKubeconfig(p.text(t), time.Now().Add(2*time.Hour)); fault.From(err) == nil || !strings.Contains(err.Error(), "ended at") {
		t.Errorf("a certificate that has ended: %v", err)
	}
}

func TestRegister(t *testing.T) {
	w := newWorld(t)
	p := newParts(t)
	if _, _, err := w.Register(system(t), Registration{ID: prodID, Location: "westus2"}); fault.From(err) == nil || fault.From(err).Code != "MissingKubeconfig" {
		t.Errorf("without a kubeconfig: %v", err)
	}
	o, created, err := w.Register(system(t), Registration{ID: prodID, Location: "westus2", Kubeconfig: p.text(t)})
	if err != nil || !created || o.Spec.Server != "https://10.0.0.1:6443" {
		t.Fatalf("%+v, %t, %v", o, created, err)
	}
	if state, reason := o.Status.State(w.now); state != "Creating" || reason == "" {
		t.Errorf("nobody has looked, and it is %s (%s)", state, reason)
	}
	if err := w.Report(system(t), prodID, seen(), ""); err != nil {
		t.Fatal(err)
	}
	// Tags change, the kubeconfig stays; then one of another server.
	if o, created, err = w.Register(system(t), Registration{ID: strings.ToUpper(prodID), Location: "westus2", Tags: map[string]string{"a": "b"}}); err != nil || created || o.Spec.ID != prodID || o.Status.Version == "" {
		t.Errorf("%+v, %t, %v", o, created, err)
	}
	if _, _, err = w.Register(system(t), Registration{ID: prodID, Location: "eastus"}); fault.KindOf(err) != fault.Conflict {
		t.Errorf("another location: %v", err)
	}
	p.cluster["server"] = "https://10.0.0.2:6443"
	if o, _, err = w.Register(system(t), Registration{ID: prodID, Location: "westus2", Kubeconfig: p.text(t)}); err != nil || !o.Status.Time.IsZero() {
		t.Errorf("what was seen of another server is still there: %+v, %v", o, err)
	}
	text, err := w.UserCredential(system(t), prodID)
	if err != nil || !bytes.Contains(text, []byte("https://10.0.0.2:6443")) || !bytes.Contains(text, []byte("current-context: prod")) {
		t.Errorf("%s, %v", text, err)
	}
	if _, err := w.UserCredential(access.With(t.Context(), access.Call{}), prodID); fault.KindOf(err) != fault.Unauthenticated && fault.KindOf(err) != fault.Denied {
		t.Errorf("a stranger gets the kubeconfig: %v", err)
	}
	record, err := os.ReadFile(w.file)
	if err != nil {
		t.Fatal(err)
	}
	key := base64.StdEncoding.EncodeToString(p.user["client-key-data"].([]byte))
	if !bytes.Contains(record, []byte("listClusterUserCredential")) || bytes.Contains(record, []byte(key[:40])) {
		t.Error("the audit file lacks the record of the kubeconfig, or has its key")
	}
	if existed, err := w.Delete(system(t), prodID); err != nil || !existed {
		t.Errorf("%t, %v", existed, err)
	}
	if left, err := logins.List(w.store.View(t.Context()), ""); err != nil || len(left) != 0 {
		t.Errorf("%d kubeconfigs are left, %v", len(left), err)
	}
	if existed, err := w.Delete(system(t), prodID); err != nil || existed {
		t.Errorf("%t, %v", existed, err)
	}
}

// seen is a view of a healthy cluster.
func seen() View {
	return View{Version: "v1.36.3", Nodes: 4, Ready: 4, Issuer: "https://kubernetes.default.svc", KeySet: json.RawMessage(`{"keys":[]}`)}
}

func TestObservations(t *testing.T) {
	w := newWorld(t)
	if _, _, err := w.Register(system(t), Registration{ID: prodID, Location: "westus2", Kubeconfig: newParts(t).text(t)}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.Issuer(system(t), prodID); fault.From(err) == nil || fault.From(err).Code != "IssuerNotSeen" {
		t.Errorf("the issuer of a cluster that nobody has seen: %v", err)
	}
	state := func() string {
		t.Helper()
		o, err := w.Get(system(t), prodID)
		if err != nil {
			t.Fatal(err)
		}
		s, reason := o.Status.State(w.now)
		if (s == "Succeeded") != (reason == "") {
			t.Errorf("%s, %q", s, reason)
		}
		return s
	}
	report := func(v View, problem string) {
		t.Helper()
		if err := w.Report(system(t), prodID, v, problem); err != nil {
			t.Fatal(err)
		}
	}
	report(seen(), "")
	if got := state(); got != "Succeeded" {
		t.Errorf("it was seen, and is %s", got)
	}
	w.now = w.now.Add(5 * time.Second)
	report(seen(), "")
	if o, err := w.Get(system(t), prodID); err != nil || !o.Status.Time.Equal(w.now.Add(-5*time.Second).UTC()) {
		t.Error("the same again was written")
	}
	report(View{}, "connection refused")
	if got := state(); got != "Failed" {
		t.Errorf("it could not be looked at, and is %s", got)
	}
	if keys, err := w.KeySet(t.Context(), seen().Issuer, prodID); err != nil || string(keys) != `{"keys":[]}` {
		t.Errorf("what was seen before a problem is gone: %s, %v", keys, err)
	}
	report(seen(), "")
	w.now = w.now.Add(2 * time.Minute)
	if got := state(); got != "Failed" {
		t.Errorf("nobody looks any more, and it is %s", got)
	}
	w.now = w.now.Add(time.Hour)
	if _, err := w.KeySet(t.Context(), seen().Issuer, prodID); err == nil {
		t.Error("keys that were seen an hour ago count")
	}
	if _, err := w.KeySet(t.Context(), "https://other", prodID); err == nil {
		t.Error("the keys count for another issuer")
	}
	for reason, v := range map[string]View{
		"nothing":               {},
		"more ready than there": {Version: "v1", Nodes: 1, Ready: 2},
		"an issuer alone":       {Version: "v1", Issuer: "https://i"},
		"keys that are no JSON": {Version: "v1", Issuer: "https://i", KeySet: json.RawMessage("{")},
		"too much":              {Version: "v1", Issuer: "https://i", KeySet: bytes.Repeat([]byte(" "), maxKeySet+1)},
	} {
		if err := w.Report(system(t), prodID, v, ""); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", reason, err)
		}
	}
}

// TestWork: a manager is told of every cluster, and that a kubeconfig has changed.
func TestWork(t *testing.T) {
	w := newWorld(t)
	p := newParts(t)
	put := func() {
		t.Helper()
		if _, _, err := w.Register(system(t), Registration{ID: prodID, Location: "westus2", Kubeconfig: p.text(t)}); err != nil {
			t.Fatal(err)
		}
	}
	work := func() Assignment {
		t.Helper()
		all, err := w.Work(system(t))
		if err != nil || len(all) != 1 || all[0].ID != prodID {
			t.Fatalf("%v, %v", all, err)
		}
		return all[0]
	}
	put()
	first := work()
	put()
	if work() != first {
		t.Error("the same kubeconfig looks like another one")
	}
	p.user = map[string]any{"token": "t2"}
	put()
	if work().Login == first.Login {
		t.Error("another kubeconfig looks like the same")
	}
	if text, err := w.ManagerCredential(system(t), prodID); err != nil || !bytes.Contains(text, []byte("t2")) {
		t.Errorf("%s, %v", text, err)
	}
	if _, err := w.Work(access.With(t.Context(), access.Call{})); err == nil {
		t.Error("a stranger is told of all clusters")
	}
}

func FuzzParseKubeconfig(f *testing.F) {
	f.Add(newParts(f).text(f))
	f.Add([]byte("current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]"))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		k, err := ParseKubeconfig(text, time.Now())
		if err != nil {
			return
		}
		if !strings.HasPrefix(k.Server, "https://") || k.Token == "" && len(k.Key) == 0 {
			t.Errorf("%q was accepted", text)
		}
		if _, err := k.Document("c"); err != nil {
			t.Error(err)
		}
	})
}
