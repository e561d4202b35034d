package rotation

import (
	"context"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// A recovery brings back a cluster whose certificates have ended. Nothing overlaps, as the old
// does not work any more, and until there is an API server again nothing asks for one.

// RecoveryScope is what a recovery replaces: every certificate, and the CAs that
// have ended or whose certificates have and cannot be renewed without them.
func RecoveryScope(o Observation) (Scope, error) {
	s := Scope{Leaves: true, Apart: true}
	if len(o.masters()) == 0 {
		return s, nil // MakePlan says so
	}
	first := o.masters()[0]
	for _, a := range o.authorities() {
		files := []string{o.Layout.rootFile(a)}
		if o.Layout.rootKey(a) == "" {
			files = append(files, o.Layout.leafOf(a).Path)
		}
		for _, p := range files {
			cert, err := o.Layout.certificate(first.Files[p])
			if err != nil {
				return s, err
			}
			if o.At.After(cert.NotAfter) {
				s.renew(a)
			}
		}
	}
	return s, nil
}

// renew adds an authority.
func (s *Scope) renew(a Authority) {
	switch a {
	case ClusterCA:
		s.Cluster = true
	case EtcdCA:
		s.Etcd = true
	case FrontProxyCA:
		s.FrontProxy = true
	}
}

// recover plans how a cluster comes back whose old certificates do not work any
// more, so that nothing can overlap: everything is placed everywhere, then what reads it
// restarts, from etcd upwards. It needs no API until there is one again.
func (b *planner) recover() {
	kinds := []Holds{Roots, RootKey, TokenPublic, TokenKey, LeafTokenKey, LeafKey, LeafCert, SelfCert, Kubeconfig, KubeletPair, Renewed}
	before := len(b.plan.Steps)
	for _, m := range b.o.Machines {
		var paths []string
		l := b.l.on(m.Node)
		for _, p := range l.paths(m.Master, kinds...) {
			if len(l.stages(b.s, l.file(p))) > 0 && !m.Files[p].Absent {
				paths = append(paths, p)
			}
		}
		b.add(Step{Phase: Switch, Verb: Place, Node: m.Name, Stage: Retired, Whole: true, Paths: paths})
	}
	b.plan.Steps[before].NoReturn = true
	restart := func(m Machine, names ...string) {
		b.add(Step{Phase: Switch, Verb: Restart, Node: m.Name, Stage: Retired, Whole: true, Components: names})
	}
	for _, m := range b.o.masters() {
		restart(m, "kubelet", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
	}
	b.add(Step{Phase: Switch, Verb: EtcdUp})
	b.add(Step{Phase: Switch, Verb: APIUp})
	for _, m := range b.o.Machines {
		if !m.Master {
			restart(m, b.l.on(m.Node).workerPrograms()...)
		}
	}
	b.add(Step{Phase: Switch, Verb: AllReady})
	b.copies(Switch, Retired)
	b.saveProfile()
	b.add(Step{Phase: Switch, Verb: Publish})
	if b.s.Tokens {
		b.add(Step{Phase: Retire, Verb: Tokens})
	}
	if b.s.Cluster || b.s.FrontProxy {
		b.add(Step{Phase: Retire, Verb: Objects, Stage: Retired})
	}
	if b.s.Cluster {
		b.add(Step{Phase: Retire, Verb: Published, Stage: Retired})
	}
	b.add(Step{Phase: Retire, Verb: Refused})
	b.add(Step{Phase: Retire, Verb: Clean})
}

// etcdUp waits until all members of etcd answer.
func (e *Engine) etcdUp(ctx context.Context) error {
	return until(ctx, 5*time.Minute, func(ctx context.Context) error {
		etcd, err := e.openEtcd(ctx)
		if err != nil {
			return err
		}
		defer etcd.Close()
		members, err := etcd.Members(ctx)
		if err != nil {
			return err
		}
		for _, m := range members {
			if m.Err != nil {
				return fault.New(fault.Unavailable, "EtcdMemberDown", "Member %s of etcd does not answer.", m.Name).Because(m.Err).
					WithFix("look at its log on that machine, then run the same command again")
			}
		}
		return nil
	})
}

// apiUp waits until every API server answers.
func (e *Engine) apiUp(ctx context.Context) error {
	for _, m := range e.Observed.masters() {
		err := until(ctx, 5*time.Minute, func(ctx context.Context) error {
			api, err := e.api(m.Name)
			if err != nil {
				return err
			}
			return api.Ready(ctx)
		})
		if err != nil {
			return fault.New(fault.Unavailable, "NoAPIServer", "The API server of %s does not answer.", m.Name).Because(err).
				WithFix("look at its log on that machine (crictl logs, /var/log/pods), then run the same command again")
		}
	}
	return nil
}
