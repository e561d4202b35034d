package rotation

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// withWindows is a cluster of a layout with a Windows worker.
func withWindows(l Layout) Observation {
	o := clusterOf(l)
	n := Node{Name: "win-0", Address: "10.0.0.30", OS: windowsOS}
	m := Machine{Node: n, Files: map[string]FileState{}, Facts: Facts{Now: o.At, FreeKiB: 1 << 20, Tools: []string{"icacls", "administrator", "powershell-5.1"}}}
	for _, f := range l.on(n).of(false) {
		m.Files[f.Path] = FileState{Path: f.Path}
	}
	o.Machines = append(o.Machines, m)
	return o
}

func aksPlan(t *testing.T, s Scope) Plan {
	t.Helper()
	p, err := MakePlan(withWindows(AKSEngine(3, "azureuser")), s, "run1")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func inOrder(t *testing.T, p Plan, names ...string) {
	t.Helper()
	last := -1
	for _, name := range names {
		i := index(t, p, name)
		if i <= last {
			t.Errorf("%q comes too early", name)
		}
		last = i
	}
}

func TestPlanWithAWindowsWorker(t *testing.T) {
	p := aksPlan(t, Everything())
	inOrder(t, p,
		"prepare: lock on win-0",
		"prepare: back up on win-0",
		"prepare: stage on win-0",
		"trust: place ca.crt on win-0",
		"trust: prove that the new is accepted",
		"switch: restart kubelet on worker-0",
		"switch: place config, kubelet-client-current.pem, kubelet.key, kubelet.crt on win-0",
		"switch: restart kubelet and kube-proxy on win-0",
		"switch: wait until all nodes are ready",
		"soak: wait until the old is unused",
		"retire: place ca.crt on win-0",
		"retire: place config on win-0",
		"retire: restart kubelet and kube-proxy on win-0",
		"retire: wait until all nodes are ready",
	)
	var text bytes.Buffer
	p.Describe(&text)
	for _, want := range []string{"Warning: Windows nodes: the steps there are untested.", "win-0, one after the other", "restart kubelet and kube-proxy on win-0"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the plan does not say %q:\n%s", want, text.String())
		}
	}
	for _, s := range p.Steps {
		if s.Node == "win-0" && slices.ContainsFunc(s.Paths, func(p string) bool { return strings.HasPrefix(p, "/") }) {
			t.Errorf("%q names files of Linux", s.Name())
		}
	}
	without, err := MakePlan(clusterOf(AKSEngine(3, "azureuser")), Everything(), "run1")
	if err != nil || strings.Contains(strings.Join(without.Warnings, ""), "Windows") {
		t.Errorf("a cluster without Windows: %q, %v", without.Warnings, err)
	}
}

func TestScopesOnAWindowsWorker(t *testing.T) {
	for _, tc := range []struct {
		only  []string
		steps []string // on win-0, after prepare
	}{
		{[]string{"leaves"}, []string{"switch: place config, kubelet-client-current.pem, kubelet.key, kubelet.crt on win-0", "switch: restart kubelet and kube-proxy on win-0"}},
		{[]string{"service-account-keys"}, nil},
		{[]string{"front-proxy-ca"}, nil},
	} {
		s, _ := ParseScope(tc.only)
		var got []string
		for _, step := range aksPlan(t, s).Steps {
			if step.Node == "win-0" && step.Phase != Prepare {
				got = append(got, step.Name())
			}
		}
		if !slices.Equal(got, tc.steps) {
			t.Errorf("%v: %q, want %q", tc.only, got, tc.steps)
		}
	}
}

func TestRecoveryTakesWindowsWorkersWithTheOthers(t *testing.T) {
	p := aksPlan(t, Scope{Cluster: true, Leaves: true, Apart: true})
	inOrder(t, p,
		"switch: place ca.crt, config, kubelet-client-current.pem and 2 more on win-0",
		"switch: wait until the API servers answer",
		"switch: restart kubelet on worker-0",
		"switch: restart kubelet and kube-proxy on win-0",
		"switch: wait until all nodes are ready",
	)
}

func TestWindowsWorkersThatAreRefused(t *testing.T) {
	nodes := []Node{{Name: "win-0", OS: windowsOS}}
	if _, err := Observe(t.Context(), Kubeadm(), nodes, map[string]Host{"win-0": bare("win-0")}, time.Now()); fault.From(err).Code != "WindowsNode" || fault.From(err).Fix == "" {
		t.Errorf("in a cluster of kubeadm: %v", err)
	}
	for _, lacks := range []string{"icacls", "administrator", "powershell-5.1"} {
		o := withWindows(AKSEngine(3, "azureuser"))
		m := &o.Machines[4]
		m.Facts.Tools = slices.DeleteFunc(slices.Clone(m.Facts.Tools), func(tool string) bool { return tool == lacks })
		if _, err := MakePlan(o, Everything(), "run1"); fault.From(err).Code != "MissingProgram" || fault.From(err).Fix == "" {
			t.Errorf("without %s: %v", lacks, err)
		}
	}
	o := withWindows(AKSEngine(3, "azureuser"))
	o.Machines[4].Files[`c:\k\config`] = FileState{Absent: true}
	if _, err := MakePlan(o, Everything(), "run1"); fault.From(err).Code != "MissingFile" {
		t.Errorf("without c:\\k\\config: %v", err)
	}
}

// winHost is a Windows worker that says yes to everything, or what it is told to.
type winHost struct {
	ran []Script
	err error
	say string
}

func (r *winHost) Name() string { return "win-0" }
func (r *winHost) Run(_ context.Context, s Script) ([]byte, error) {
	r.ran = append(r.ran, s)
	return []byte(r.say), r.err
}

func (r *winHost) Put(context.Context, string, io.Reader, fs.FileMode) error {
	return errors.New("nothing is put there")
}

// windowsEngine is an engine with real material for a plan with a Windows worker.
func windowsEngine(t *testing.T) (*Engine, *winHost) {
	t.Helper()
	l, s, p := AKSEngine(3, "azureuser"), withoutEtcd(Everything()), newPKI(t)
	first := master(t, l, p)
	mat, err := makeMaterial(l, s, p.present(t, l, s, first), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	o := withWindows(l)
	win := &o.Machines[4]
	win.Files[`c:\k\ca.crt`] = FileState{Path: `c:\k\ca.crt`, Content: p.roots[ClusterCA]}
	win.Files[`c:\k\config`] = FileState{Path: `c:\k\config`, Content: kubeconfigText(t, p, `c:\k\config`)}
	plan, err := MakePlan(o, s, "run1")
	if err != nil {
		t.Fatal(err)
	}
	r := &winHost{}
	return &Engine{Layout: l, Plan: plan, Observed: o, Hosts: map[string]Host{"win-0": r}, Now: time.Now, token: "token1", material: mat, Who: "ann@a"}, r
}

// TestTreesOfAWindowsWorker: the files of each stage, as they travel.
func TestTreesOfAWindowsWorker(t *testing.T) {
	e, r := windowsEngine(t)
	if err := e.stage(t.Context(), "win-0"); err != nil {
		t.Fatal(err)
	}
	if len(r.ran) != 1 || r.ran[0].Text != psStage {
		t.Fatalf("%d scripts ran", len(r.ran))
	}
	files := map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(string(r.ran[0].Input)), "\n") {
		part := strings.Split(line, "|")
		content, err := base64.StdEncoding.DecodeString(part[2])
		if err != nil || len(part) != 3 {
			t.Fatalf("%q: %v", line, err)
		}
		files[part[0]+" "+part[1]] = string(content)
	}
	if len(files) != 4 {
		t.Errorf("%d files, want ca.crt twice and config twice", len(files))
	}
	for name, roots := range map[string]int{`trusted c:\k\ca.crt`: 2, `retired c:\k\ca.crt`: 1} {
		if n := strings.Count(files[name], "BEGIN CERTIFICATE"); n != roots {
			t.Errorf("%s has %d roots, want %d", name, n, roots)
		}
	}
	client := e.material.Shared["/etc/kubernetes/certs/client.key"]
	for stage, roots := range map[string]int{"switched": 2, "retired": 1} {
		k, err := parseKubeconfig([]byte(files[stage+` c:\k\config`]))
		if err != nil {
			t.Fatal(err)
		}
		user, err := k.part("users", "user")
		if err != nil {
			t.Fatal(err)
		}
		key, err := base64.StdEncoding.DecodeString(text64(user["client-key-data"]))
		if err != nil || strings.Count(string(k.ca), "BEGIN") != roots || !bytes.Equal(k.clientCert, client.Cert) || !bytes.Equal(key, client.Key) {
			t.Errorf("config of the stage %s trusts %d roots, or has another client: %v", stage, strings.Count(string(k.ca), "BEGIN"), err)
		}
		if _, err := tls.X509KeyPair(k.clientCert, key); err != nil {
			t.Errorf("config of the stage %s: %v", stage, err)
		}
	}
}

// TestNoSecretInAScriptForWindows: whatever a step runs, keys come by its input alone,
// and the input is never repeated where a machine would show it.
func TestNoSecretInAScriptForWindows(t *testing.T) {
	e, r := windowsEngine(t)
	for _, s := range e.Plan.Steps {
		if s.Node != "win-0" {
			continue
		}
		step := e.step(s)
		for _, f := range []func(context.Context) error{step.Do, step.Undo} {
			if f == nil {
				continue
			}
			if err := f(t.Context()); err != nil {
				t.Fatalf("%s: %v", s.Name(), err)
			}
		}
	}
	if len(r.ran) < 15 {
		t.Errorf("%d scripts ran", len(r.ran))
	}
	known := windowsScripts()
	for _, s := range r.ran {
		shown := s.Name + strings.Join(s.Args, "\n")
		if strings.Contains(shown, "PRIVATE") || strings.Contains(shown, "LS0tLS1CRUdJ") || strings.Contains(s.Text, "PRIVATE") {
			t.Errorf("%s shows a secret", s.Name)
		}
		if (len(s.Input) > 0) != (s.Text == psStage) {
			t.Errorf("%s has %d bytes of input", s.Name, len(s.Input))
		}
		ours := false
		for _, text := range known {
			ours = ours || text == s.Text
		}
		if !ours || !strings.HasPrefix(s.Args[0], `c:\k\rotate-certs\run1`) || s.Args[1] != "token1" {
			t.Errorf("%s is no script for Windows, or not in the folder of the run: %q", s.Name, s.Args)
		}
		if s.Finishes {
			t.Errorf("%s must finish, which is not to be had there", s.Name)
		}
	}
}

// TestTheWayBackOnWindows: what the services read is as it was before they restart, and
// what the kubelet made before is brought back.
func TestTheWayBackOnWindows(t *testing.T) {
	e, r := windowsEngine(t)
	const pki = `c:\var\lib\kubelet\pki\`
	s := e.Plan.Steps[index(t, e.Plan, "switch: restart kubelet and kube-proxy on win-0")]
	if err := e.step(s).Undo(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{`old:c:\k\config`, "back:" + pki + "kubelet-client-current.pem", "back:" + pki + "kubelet.key", "back:" + pki + "kubelet.crt"}
	if len(r.ran) != 2 || r.ran[0].Text != psPlace || !slices.Equal(r.ran[0].Args[2:], want) || r.ran[1].Text != psRestart || !slices.Equal(r.ran[1].Args[2:], []string{"kubelet:kubelet", "kube-proxy:kubeproxy"}) {
		t.Errorf("the way back: %+v", r.ran)
	}
	r.ran = nil
	s = e.Plan.Steps[index(t, e.Plan, "switch: place config, kubelet-client-current.pem, kubelet.key, kubelet.crt on win-0")]
	if err := e.step(s).Do(t.Context()); err != nil {
		t.Fatal(err)
	}
	want = []string{`switched:c:\k\config`, "renewed:" + pki + "kubelet-client-current.pem", "renewed:" + pki + "kubelet.key", "renewed:" + pki + "kubelet.crt"}
	if len(r.ran) != 1 || !slices.Equal(r.ran[0].Args[2:], want) {
		t.Errorf("the way forward: %+v", r.ran)
	}
}

func TestAnotherRunnerOnWindows(t *testing.T) {
	e, r := windowsEngine(t)
	r.err = &ScriptError{Host: "win-0", Status: fencedStatus}
	s := e.Plan.Steps[index(t, e.Plan, "trust: place ca.crt on win-0")]
	if err := e.step(s).Do(t.Context()); fault.From(err).Code != "TakenOver" {
		t.Errorf("behind the fence: %v", err)
	}
	r.err, r.say = nil, "held bob@b\n"
	if err := e.lock(t.Context(), "win-0"); fault.From(err).Code != "Locked" {
		t.Errorf("the lock of another: %v", err)
	}
	if got := r.ran[len(r.ran)-1]; got.Text != psLock || !slices.Equal(got.Args, []string{`c:\k\rotate-certs\run1`, "token1", "no", "ann@a"}) {
		t.Errorf("the lock was asked for with %q", got.Args)
	}
}

// TestRestartedOnWindows: what the kubelet makes at its start is newer than the
// kubelet, and no reason to restart it again.
func TestRestartedOnWindows(t *testing.T) {
	e, r := windowsEngine(t)
	r.say = "yes\r\n"
	done, err := e.step(e.Plan.Steps[index(t, e.Plan, "switch: restart kubelet and kube-proxy on win-0")]).Check(t.Context())
	if err != nil || !done || len(r.ran) != 2 {
		t.Fatalf("%t, %v, %d scripts", done, err, len(r.ran))
	}
	for i, process := range []string{"kubelet", "kube-proxy"} {
		if s := r.ran[i]; s.Text != psStarted || !slices.Equal(s.Args, []string{process, `c:\k\config`}) {
			t.Errorf("%s is looked at with %q", process, s.Args)
		}
	}
}

// TestAKubeconfigThatNamesFilesIsRefused: nobody would write them.
func TestAKubeconfigThatNamesFilesIsRefused(t *testing.T) {
	e, _ := windowsEngine(t)
	config := e.Observed.Machines[4].Files[`c:\k\config`]
	config.Content = bytes.ReplaceAll(config.Content, []byte("client-certificate-data"), []byte("client-certificate"))
	e.Observed.Machines[4].Files[`c:\k\config`] = config
	if err := e.stage(t.Context(), "win-0"); err == nil || !strings.Contains(err.Error(), "embed") {
		t.Errorf("a kubeconfig that names a file: %v", err)
	}
}
