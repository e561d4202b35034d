package rotation

import (
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// threeMasters is what a look at a kubeadm cluster of three masters and a worker
// finds, as far as the planner asks.
func threeMasters(t *testing.T) Observation {
	t.Helper()
	return clusterOf(Kubeadm())
}

// clusterOf is that of a layout.
func clusterOf(l Layout) Observation {
	o := Observation{At: time.Now(), Layout: l}
	for _, n := range []Node{
		{Name: "master-0", Address: "10.0.0.10", Master: true, OS: "linux"},
		{Name: "master-1", Address: "10.0.0.11", Master: true, OS: "linux"},
		{Name: "master-2", Address: "10.0.0.12", Master: true, OS: "linux"},
		{Name: "worker-0", Address: "10.0.0.20", OS: "linux"},
	} {
		m := Machine{Node: n, Files: map[string]FileState{}, Facts: Facts{Now: o.At, Forward: true, FreeKiB: 1 << 20, Tools: []string{"openssl", "sha256sum", "base64", "tar", "iptables", "curl"}}}
		for _, f := range l.of(n.Master) {
			m.Files[f.Path] = FileState{Path: f.Path, Absent: f.Added}
		}
		o.Machines = append(o.Machines, m)
	}
	return o
}

func plan(t *testing.T, only ...string) Plan {
	t.Helper()
	s, unknown := ParseScope(only)
	if len(unknown) > 0 {
		t.Fatal(unknown)
	}
	p, err := MakePlan(threeMasters(t), s, "run1")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// index finds the one step of a name.
func index(t *testing.T, p Plan, name string) int {
	t.Helper()
	i := slices.IndexFunc(p.Steps, func(s Step) bool { return s.Name() == name })
	if i < 0 {
		var all []string
		for _, s := range p.Steps {
			all = append(all, s.Name())
		}
		t.Fatalf("no step %q in\n%s", name, strings.Join(all, "\n"))
	}
	return i
}

func TestOrderOfAFullRotation(t *testing.T) {
	p := plan(t)
	last := -1
	for _, name := range []string{
		"prepare: back up on worker-0",
		"prepare: make new CAs and keys",
		"prepare: stage on master-2",
		"trust: restart kube-controller-manager on master-0", // signs with its own file before ca.crt becomes a bundle
		"trust: place ca.crt, ca.crt, front-proxy-ca.crt, sa.pub on master-0",
		"trust: restart kube-apiserver on master-2",
		"trust: prove that the new is accepted",
		"switch: prove that the new is served",
		"switch: restart kube-apiserver, kube-controller-manager and kube-scheduler on master-0", // signs with the new key when all verify it
		"switch: restart kubelet on worker-0",
		"switch: wait until the CA is published to all namespaces",
		"soak: wait until the old is unused",
		"retire: restart etcd, kube-apiserver, kube-controller-manager and kube-scheduler on master-0",
		"retire: restart etcd, kube-apiserver, kube-controller-manager and kube-scheduler on master-2",
		"retire: place apiserver.crt, apiserver-kubelet-client.crt, apiserver-etcd-client.crt and 4 more on master-0", // without the cross certificate, which master-2's etcd needed until now
		"retire: update objects",
		"retire: prove that the old is refused",
		"retire: clean up",
	} {
		i := index(t, p, name)
		if i <= last {
			t.Errorf("%q comes too early", name)
		}
		last = i
	}
	if at := index(t, p, p.NoReturn()); p.Steps[at].Phase != Retire || p.Steps[at-1].Phase != Soak {
		t.Errorf("the point of no return is %q", p.NoReturn())
	}
}

func TestRestartsAreFew(t *testing.T) {
	for _, tc := range []struct {
		only     []string
		api      int // restarts of API servers
		etcd     int
		noReturn bool // something is retired
	}{
		{nil, 9, 3, true}, // trust: verify new tokens; switch: sign; retire: with etcd
		{[]string{"leaves"}, 0, 0, false},
		{[]string{"service-account-keys"}, 9, 0, true},
		{[]string{"cluster-ca"}, 0, 0, true}, // all that the API server reads of it, it reads again by itself
		{[]string{"front-proxy-ca"}, 0, 0, true},
		{[]string{"etcd-ca"}, 3, 3, true},
	} {
		p := plan(t, tc.only...)
		api, etcd := 0, 0
		for _, s := range p.Steps {
			if s.Verb == Restart && slices.Contains(s.Components, "kube-apiserver") {
				api++
			}
			if s.Verb == Restart && slices.Contains(s.Components, "etcd") {
				etcd++
			}
		}
		if api != tc.api || etcd != tc.etcd {
			t.Errorf("%v: %d restarts of API servers and %d of etcd, want %d and %d", tc.only, api, etcd, tc.api, tc.etcd)
		}
		if _, has := strings.CutPrefix(p.NoReturn(), "retire: place"); has != tc.noReturn {
			t.Errorf("%v: the point of no return is %q", tc.only, p.NoReturn())
		}
	}
}

func TestOrderOfAFullRotationOfAKSEngine(t *testing.T) {
	p, err := MakePlan(clusterOf(AKSEngine(3, "azureuser")), Everything(), "run1")
	if err != nil {
		t.Fatal(err)
	}
	if p.Scope.Etcd {
		t.Error("a CA of etcd is rotated, which there is none")
	}
	last := -1
	for _, name := range []string{
		"prepare: stage on worker-0",
		"trust: restart kube-controller-manager on master-0",
		"trust: place ca.crt, proxy-ca.crt, apiserver.key on master-0",
		"trust: place ca.crt on worker-0",
		"trust: write the front proxy's certificates to etcd",
		"trust: restart kube-apiserver on master-2",
		"trust: prove that the new is accepted",
		"switch: place kubeletserver.key, kubeletserver.crt, client.key, client.crt on worker-0",
		"switch: write the front proxy's certificates to etcd",
		"switch: restart kube-apiserver, kube-controller-manager and kube-scheduler on master-0",
		"switch: place kubelet-client-current.pem on worker-0",
		"switch: restart kubelet on worker-0",
		"switch: write the API model",
		"soak: wait until the old is unused",
		"retire: restart etcd, kube-apiserver, kube-controller-manager and kube-scheduler on master-2",
		"retire: restart kubelet on worker-0",
		"retire: write the front proxy's certificates to etcd",
		"retire: place client.crt on worker-0",
		"retire: clean up",
	} {
		i := index(t, p, name)
		if i <= last {
			t.Errorf("%q comes too early", name)
		}
		last = i
	}
	if _, err := MakePlan(clusterOf(AKSEngine(3, "azureuser")), Scope{Etcd: true}, "run1"); fault.From(err).Code != "NoEtcdCA" {
		t.Errorf("only the CA of etcd, which is the cluster's: %v", err)
	}
}

// TestRecoveryNeedsNoAPIUntilThereIsOne: the first step that asks an API server
// comes after all of them have restarted.
func TestRecoveryNeedsNoAPIUntilThereIsOne(t *testing.T) {
	for _, l := range []Layout{Kubeadm(), AKSEngine(3, "azureuser")} {
		p, err := MakePlan(clusterOf(l), Scope{Leaves: true, Apart: true}, "run1")
		if err != nil {
			t.Fatal(err)
		}
		last := -1
		for _, name := range []string{
			"prepare: stage on worker-0",
			p.NoReturn(),
			"switch: restart kubelet, etcd, kube-apiserver, kube-controller-manager and kube-scheduler on master-0",
			"switch: restart kubelet, etcd, kube-apiserver, kube-controller-manager and kube-scheduler on master-2", // two of three are a quorum
			"switch: wait until etcd answers",
			"switch: wait until the API servers answer",
			"switch: restart kubelet on worker-0",
			"switch: wait until all nodes are ready",
			"retire: prove that the old is refused",
		} {
			i := index(t, p, name)
			if i <= last {
				t.Errorf("%s: %q comes too early", l.Name, name)
			}
			last = i
		}
		for i, s := range p.Steps[:index(t, p, "switch: wait until all nodes are ready")] {
			if s.Verb == Snapshot || s.Verb == Canary || s.Verb == Objects || s.Verb == Published {
				t.Errorf("%s: step %d, %q, asks for an API", l.Name, i, s.Name())
			}
		}
	}
}

func TestOneMasterAtATimeWithoutNeighbour(t *testing.T) {
	o := threeMasters(t)
	o.Machines[1].Facts.Tools = []string{"openssl", "sha256sum", "base64", "tar", "curl"}
	p, err := MakePlan(o, Everything(), "run1")
	if err != nil || p.Drain || len(p.Warnings) != 2 || !strings.Contains(p.Impact, "up to 60 s") {
		t.Errorf("without iptables on master-1: drain %t, impact %q, warnings %q, %v", p.Drain, p.Impact, p.Warnings, err)
	}
}

func TestPlanRefuses(t *testing.T) {
	for _, tc := range []struct {
		reason string
		spoil  func(*Observation)
		code   string
	}{
		{"a clock that is off", func(o *Observation) { o.Machines[3].Facts.Now = o.At.Add(10 * time.Minute) }, "ClockSkew"},
		{"a full disk", func(o *Observation) { o.Machines[0].Facts.FreeKiB = 1000 }, "DiskFull"},
		{"no openssl", func(o *Observation) { o.Machines[2].Facts.Tools = []string{"tar"} }, "MissingProgram"},
		{"an external CA", func(o *Observation) {
			o.Machines[0].Files["/etc/kubernetes/pki/ca.key"] = FileState{Absent: true}
		}, "MissingFile"},
		{"a rotation under way", func(o *Observation) {
			o.Machines[0].Files["/etc/kubernetes/pki/ca-issuing.crt"] = FileState{}
		}, "UnfinishedRotation"},
		{"kubelets that are verified, of which one has a certificate of its own making", func(o *Observation) {
			o.Machines[3].Files["/var/lib/kubelet/pki/kubelet-server-current.pem"] = FileState{Absent: true}
			o.Machines[0].Files["/etc/kubernetes/manifests/kube-apiserver.yaml"] = FileState{Content: []byte("    - --kubelet-certificate-authority=/etc/kubernetes/pki/ca.crt\n")}
		}, "KubeletsVerified"},
		{"no masters", func(o *Observation) { o.Machines = o.Machines[3:] }, "NoMasters"},
	} {
		o := threeMasters(t)
		tc.spoil(&o)
		_, err := MakePlan(o, Everything(), "run1")
		if e := fault.From(err); err == nil || e.Code != tc.code || tc.code != "NoMasters" && e.Fix == "" {
			t.Errorf("%s: %v, want %s with a way out", tc.reason, err, tc.code)
		}
	}
	if _, err := MakePlan(threeMasters(t), Scope{}, "run1"); err == nil {
		t.Error("a rotation of nothing is planned")
	}
}

// TestEveryFileEndsAsItMust: whatever the scope, a file that is placed at a stage
// comes from a tree that holds it, and what was added is gone at both ends.
func TestEveryFileEndsAsItMust(t *testing.T) {
	for _, l := range []Layout{Kubeadm(), AKSEngine(3, "azureuser")} {
		everyFileEnds(t, l)
	}
}

func everyFileEnds(t *testing.T, l Layout) {
	t.Helper()
	for _, only := range [][]string{nil, {"leaves"}, {"cluster-ca"}, {"etcd-ca"}, {"front-proxy-ca"}, {"service-account-keys"}, {"leaves", "etcd-ca"}} {
		s, _ := ParseScope(only)
		for _, f := range l.Files {
			for _, at := range []Stage{Old, Trusted, Switched, Retired} {
				from := l.from(s, f, at)
				ends := at == Old || at == Retired
				if f.Added && ends && from != "absent" {
					t.Errorf("%v: %s at %s comes from %s", only, f.Path, at, from)
				}
				if !f.Added && from == "absent" {
					t.Errorf("%v: %s is removed at %s", only, f.Path, at)
				}
			}
		}
	}
}
