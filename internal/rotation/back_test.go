package rotation

import (
	"context"
	"io"
	"io/fs"
	"slices"
	"testing"
)

// recorder is a host that only notes what it was told, and always says the same.
type recorder struct {
	name    string
	scripts *[]Script
	says    string
}

func (r recorder) Name() string { return r.name }

func (r recorder) Run(_ context.Context, s Script) ([]byte, error) {
	*r.scripts = append(*r.scripts, s)
	return []byte(r.says), nil
}

func (r recorder) Put(context.Context, string, io.Reader, fs.FileMode) error { return nil }

// TestBackRestartsOnWhatWas: on the way back a program restarts when the files that
// it reads only at its start are as they were, in whatever order steps are undone.
func TestBackRestartsOnWhatWas(t *testing.T) {
	o := threeMasters(t)
	o.Machines = slices.Delete(o.Machines, 1, 3) // without neighbours, who would have to be asked
	o.Machines[0].Endpoint = "10.0.0.10:6443"
	p, err := MakePlan(o, Everything(), "run1")
	if err != nil {
		t.Fatal(err)
	}
	var scripts []Script
	hosts := map[string]Host{}
	for _, m := range o.Machines {
		hosts[m.Name] = recorder{name: m.Name, scripts: &scripts}
	}
	e := &Engine{Layout: o.Layout, Plan: p, Observed: o, Hosts: hosts}
	restarts := 0
	for i, s := range p.Steps {
		if s.Verb != Restart || s.Phase != Trust && s.Phase != Switch {
			continue
		}
		restarts++
		scripts = nil
		if err := e.step(s).Undo(t.Context()); err != nil {
			t.Fatal(err)
		}
		if last := scripts[len(scripts)-1].Text; scripts[0].Text != placeScript || last != restartScript && last != unitScript {
			t.Errorf("%s is undone by %d scripts, want files placed first and a restart last", s.Name(), len(scripts))
			continue
		}
		for _, name := range s.Components {
			c := e.Layout.component(name)
			for _, path := range append(slices.Clone(c.Once), c.Signs) {
				f := e.Layout.file(path)
				before := slices.ContainsFunc(p.Steps[:i], func(q Step) bool {
					return q.Verb == Place && q.Phase == s.Phase && q.Node == s.Node && slices.Contains(q.Paths, path)
				})
				if !before { // one that is placed after this restart has gone back already
					continue
				}
				if want := e.Layout.from(p.Scope, f, s.before()) + ":" + path; !slices.Contains(scripts[0].Args, want) {
					t.Errorf("%s is undone without %s", s.Name(), want)
				}
			}
		}
	}
	if restarts < 5 {
		t.Errorf("%d restarts: this tests nothing", restarts)
	}
	pair := "absent:/var/lib/kubelet/pki/kubelet-client-run1.pem"
	if args := e.placements("worker-0", []string{"/var/lib/kubelet/pki/kubelet-client-current.pem"}, Trusted); !slices.Contains(args, pair) {
		t.Errorf("the kubelet's new pair stays: %v", args)
	}
}

// TestBackRestartsOnce: a runner that died when a restart on the way back was over,
// but not on record, leaves nothing to do. A kubelet that is given the same manifest
// again does nothing, and whoever waits for another process waits in vain.
func TestBackRestartsOnce(t *testing.T) {
	o := threeMasters(t)
	p, err := MakePlan(o, Everything(), "run1")
	if err != nil {
		t.Fatal(err)
	}
	var scripts []Script
	hosts := map[string]Host{}
	for _, m := range o.Machines {
		hosts[m.Name] = recorder{m.Name, &scripts, "yes"}
	}
	e := &Engine{Layout: o.Layout, Plan: p, Observed: o, Hosts: hosts}
	restarts := 0
	for _, s := range p.Steps {
		if s.Verb != Restart || s.NoReturn || slices.Contains(s.Components, "kube-apiserver") { // which would be asked, too
			continue
		}
		restarts++
		scripts = nil
		if err := e.step(s).Undo(t.Context()); err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(scripts, func(x Script) bool { return x.Text == restartScript || x.Text == unitScript }) {
			t.Errorf("%s restarts what runs already as it did before", s.Name())
		}
	}
	if restarts < 5 {
		t.Errorf("%d restarts: this tests nothing", restarts)
	}
}
