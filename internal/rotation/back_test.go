package rotation

import (
	"context"
	"io"
	"io/fs"
	"slices"
	"testing"
)

// recorder is a host that only notes what it was told.
type recorder struct {
	name    string
	scripts *[]Script
}

func (r recorder) Name() string { return r.name }

func (r recorder) Run(_ context.Context, s Script) ([]byte, error) {
	*r.scripts = append(*r.scripts, s)
	return nil, nil
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
		hosts[m.Name] = recorder{m.Name, &scripts}
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
		if len(scripts) != 2 || scripts[0].Text != placeScript || scripts[1].Text != restartScript && scripts[1].Text != unitScript {
			t.Errorf("%s is undone by %d scripts, want files placed and then a restart", s.Name(), len(scripts))
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
