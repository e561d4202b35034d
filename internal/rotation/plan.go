package rotation

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Phase is a part of a rotation.
type Phase string

// The phases, in order.
const (
	Prepare Phase = "prepare" // new material, nothing touched
	Trust   Phase = "trust"   // everybody accepts old and new
	Switch  Phase = "switch"  // everybody presents the new
	Soak    Phase = "soak"    // until nobody uses the old
	Retire  Phase = "retire"  // nobody accepts the old
)

// Verb is what a step does.
type Verb string

// The verbs of steps.
const (
	Lock        Verb = "lock"
	BackUp      Verb = "back up"
	Snapshot    Verb = "snapshot etcd"
	Make        Verb = "make new CAs and keys"
	StageIt     Verb = "stage" // keys made there, certificates issued, trees of all stages
	Publish     Verb = "copy the journal to the masters"
	Place       Verb = "place"
	Restart     Verb = "restart"
	Objects     Verb = "update objects" // of the API that name the CA
	Tokens      Verb = "renew token Secrets"
	CopyToEtcd  Verb = "write the front proxy's certificates to etcd"
	SaveProfile Verb = "write the API model"
	Canary      Verb = "prove that the new is accepted"
	Reach       Verb = "open the API servers' connections to kubelets anew"
	Served      Verb = "prove that the new is served"
	AllReady    Verb = "wait until all nodes are ready"
	Published   Verb = "wait until the CA is published to all namespaces"
	Unused      Verb = "wait until the old is unused"
	Refused     Verb = "prove that the old is refused"
	EtcdUp      Verb = "wait until etcd answers"
	APIUp       Verb = "wait until the API servers answer"
	Clean       Verb = "clean up"
)

// Step is one step of a plan. It is data: what it does is in step.go.
type Step struct {
	Phase Phase  `json:"phase"`
	Verb  Verb   `json:"verb"`
	Node  string `json:"node,omitempty"`
	Stage Stage  `json:"stage,omitempty"`
	// Whole says that the step leads from the first stage to its own at once.
	Whole      bool     `json:"whole,omitempty"`
	Paths      []string `json:"paths,omitempty"`      // of Place
	Components []string `json:"components,omitempty"` // of Restart
	NoReturn   bool     `json:"noReturn,omitempty"`
}

// Name is the step's name in the journal and in all that people see.
func (s Step) Name() string {
	parts := []string{string(s.Phase) + ":", string(s.Verb)}
	switch {
	case len(s.Components) > 0:
		parts = append(parts, words(s.Components))
	case s.Verb == Place:
		parts = append(parts, summary(s.Paths))
	}
	if s.Node != "" {
		parts = append(parts, "on", s.Node)
	}
	return strings.Join(parts, " ")
}

// what is its name without the machine.
func (s Step) what() string { return strings.TrimSuffix(s.Name(), " on "+s.Node) }

// before is the stage from which the step leads to its own.
func (s Step) before() Stage {
	if s.Whole {
		return Old
	}
	return s.Stage - 1
}

// words joins words as in a sentence.
func words(all []string) string {
	if len(all) < 2 {
		return strings.Join(all, "")
	}
	return strings.Join(all[:len(all)-1], ", ") + " and " + all[len(all)-1]
}

// summary names files shortly: those of one folder by their last parts.
func summary(paths []string) string {
	var out []string
	for _, p := range paths {
		out = append(out, p[strings.LastIndexAny(p, `/\`)+1:])
	}
	if len(out) > 4 {
		return fmt.Sprintf("%s and %d more", strings.Join(out[:3], ", "), len(out)-3)
	}
	return strings.Join(out, ", ")
}

// Plan is all that a rotation will do, in order. It holds no secret.
type Plan struct {
	Run    string    `json:"run"`
	Made   time.Time `json:"made"`
	Layout string    `json:"layout"`
	Scope  Scope     `json:"scope"`
	Nodes  []Node    `json:"nodes"`
	Steps  []Step    `json:"steps"`
	// Drain says that clients of an API server are led to another while it restarts.
	Drain bool `json:"drain"`
	// Impact is how long the API is expected to be away, in words.
	Impact string `json:"impact"`
	// Warnings are what the operator should know first.
	Warnings []string `json:"warnings,omitempty"`
}

// NoReturn is the step after which there is no way back; "" if there is none.
func (p Plan) NoReturn() string {
	for _, s := range p.Steps {
		if s.NoReturn {
			return s.Name()
		}
	}
	return ""
}

// MakePlan plans a rotation. It refuses a cluster on which one could do harm.
func MakePlan(o Observation, s Scope, run string) (Plan, error) {
	if s.Etcd && o.Layout.EtcdBy != EtcdCA { // it is part of another
		if s.Etcd = false; !s.Cluster {
			return Plan{}, fault.New(fault.Invalid, "NoEtcdCA", "etcd has no CA of its own in the layout %s: its certificates are of the cluster CA.", o.Layout.Name).
				At("--only").WithFix("name cluster-ca")
		}
	}
	p := Plan{Run: run, Made: o.At, Layout: o.Layout.Name, Scope: s}
	if err := fit(o, s); err != nil {
		return p, err
	}
	for _, m := range o.Machines {
		p.Nodes = append(p.Nodes, m.Node)
	}
	b := &planner{o: o, l: o.Layout, s: s, plan: &p}
	b.windows()
	b.prepare()
	if s.Apart {
		b.recover()
	} else {
		b.drain()
		if s.Cluster && !o.audited() {
			b.warn("The API servers keep no audit log: clients with certificates of the old CA are not seen, only pods with old tokens.")
		}
		b.trust()
		b.change()
		b.retire()
	}
	p.Impact = b.impact()
	names := map[string]bool{}
	for _, st := range p.Steps {
		if names[st.Name()] {
			return p, fmt.Errorf("planning: two steps are called %q", st.Name())
		}
		names[st.Name()] = true
	}
	return p, nil
}

// planner appends steps.
type planner struct {
	o    Observation
	l    Layout
	s    Scope
	plan *Plan
}

func (b *planner) add(s Step) { b.plan.Steps = append(b.plan.Steps, s) }

// place adds a step that places those of the files that change at the stage.
func (b *planner) place(ph Phase, at Stage, m Machine, kinds ...Holds) {
	var paths []string
	l := b.l.on(m.Node)
	for _, p := range l.paths(m.Master, kinds...) {
		if l.changes(b.s, l.file(p), at) && (!m.Files[p].Absent || l.file(p).Added) {
			paths = append(paths, p)
		}
	}
	if len(paths) > 0 {
		b.add(Step{Phase: ph, Verb: Place, Node: m.Name, Stage: at, Paths: paths})
	}
}

// restart adds a step that restarts those of the named components that must
// restart at this stage.
func (b *planner) restart(ph Phase, at Stage, m Machine, names ...string) {
	var restarts []string
	for _, c := range b.l.on(m.Node).restarts(b.s, at, m.Master) {
		if slices.Contains(names, c.Name) {
			restarts = append(restarts, c.Name)
		}
	}
	if len(restarts) > 0 {
		b.add(Step{Phase: ph, Verb: Restart, Node: m.Name, Stage: at, Components: restarts})
	}
}

// drain decides whether clients are led to another API server while theirs restarts.
func (b *planner) drain() {
	masters := b.o.masters()
	b.plan.Drain = len(masters) > 1
	for _, m := range masters {
		if !m.Facts.Forward || !m.Facts.has("iptables") {
			b.plan.Drain = false
			b.warn("%s does not forward packets, or has no iptables: clients of its API server are not led to another while it restarts.", m.Name)
		}
	}
	if b.s.Leaves && !b.s.FrontProxy && b.l.rootKey(FrontProxyCA) == "" {
		b.warn("The CA of the front proxy has no key any more: its certificate is renewed only with it (--only front-proxy-ca).")
	}
}

func (b *planner) warn(format string, args ...any) {
	b.plan.Warnings = append(b.plan.Warnings, fmt.Sprintf(format, args...))
}

func (b *planner) prepare() {
	for _, m := range b.o.Machines {
		b.add(Step{Phase: Prepare, Verb: Lock, Node: m.Name})
	}
	for _, m := range b.o.Machines {
		b.add(Step{Phase: Prepare, Verb: BackUp, Node: m.Name})
	}
	if !b.s.Apart {
		b.add(Step{Phase: Prepare, Verb: EtcdUp}) // every member: one is away at a time later
		b.add(Step{Phase: Prepare, Verb: Snapshot, Node: b.o.masters()[0].Name})
	}
	b.add(Step{Phase: Prepare, Verb: Make})
	for _, m := range b.o.Machines {
		b.add(Step{Phase: Prepare, Verb: StageIt, Node: m.Name})
	}
	b.add(Step{Phase: Prepare, Verb: Publish})
}

func (b *planner) trust() {
	if b.s.Cluster { // on the way back this is the last that clients notice
		b.add(Step{Phase: Trust, Verb: Published, Stage: Old})
	}
	before := len(b.plan.Steps)
	for _, m := range b.o.masters() { // the controller manager signs with exactly one certificate: first its own file, then the bundle
		b.place(Trust, Trusted, m, IssuerCert, IssuerKey)
		b.restart(Trust, Trusted, m, "kube-controller-manager")
	}
	for _, m := range b.o.Machines {
		b.place(Trust, Trusted, m, Roots, TokenPublic, LeafTokenKey)
	}
	b.copies(Trust, Trusted)
	for _, m := range b.o.masters() {
		b.restart(Trust, Trusted, m, "kube-apiserver")
	}
	if len(b.plan.Steps) == before {
		return
	}
	if b.s.Cluster {
		b.add(Step{Phase: Trust, Verb: Objects, Stage: Trusted})
	}
	b.add(Step{Phase: Trust, Verb: Canary})
	if b.s.Tokens {
		b.add(Step{Phase: Trust, Verb: Tokens})
	}
	b.add(Step{Phase: Trust, Verb: Publish})
}

func (b *planner) change() {
	for _, m := range b.o.Machines { // no restart is needed for these
		b.place(Switch, Switched, m, LeafKey, LeafTokenKey, LeafCert, SelfCert)
	}
	b.copies(Switch, Switched)
	b.add(Step{Phase: Switch, Verb: Served})
	b.add(Step{Phase: Switch, Verb: Reach})
	for _, m := range b.o.masters() {
		b.place(Switch, Switched, m, IssuerKey, IssuerCert, TokenKey)
		b.kubeconfigs(Switch, Switched, m)
		b.restart(Switch, Switched, m, "kube-apiserver", "kube-controller-manager", "kube-scheduler")
	}
	for _, m := range b.o.Machines {
		b.kubelet(Switch, Switched, m)
	}
	b.add(Step{Phase: Switch, Verb: AllReady})
	if b.s.Tokens {
		b.add(Step{Phase: Switch, Verb: Tokens})
	}
	if b.s.Cluster {
		b.add(Step{Phase: Switch, Verb: Published, Stage: Switched})
	}
	b.saveProfile()
	b.add(Step{Phase: Switch, Verb: Publish})
	b.add(Step{Phase: Soak, Verb: Unused})
}

// kubeconfigs places all but that of the kubelet.
func (b *planner) kubeconfigs(ph Phase, at Stage, m Machine) {
	var paths []string
	once := b.l.component("kubelet").Once
	for _, p := range b.l.paths(m.Master, Kubeconfig) {
		if b.l.changes(b.s, b.l.file(p), at) && !m.Files[p].Absent && !slices.Contains(once, p) {
			paths = append(paths, p)
		}
	}
	if len(paths) > 0 {
		b.add(Step{Phase: ph, Verb: Place, Node: m.Name, Stage: at, Paths: paths})
	}
}

// kubelet places what only the kubelet reads, and restarts it; the containers of
// the node go on.
func (b *planner) kubelet(ph Phase, at Stage, m Machine) {
	var paths []string
	l := b.l.on(m.Node)
	for _, p := range l.component("kubelet").Once {
		f := l.file(p)
		if (f.Holds == Kubeconfig || f.Holds == KubeletPair || f.Holds == Renewed) && l.changes(b.s, f, at) && !m.Files[p].Absent {
			paths = append(paths, p)
		}
	}
	if len(paths) > 0 {
		b.add(Step{Phase: ph, Verb: Place, Node: m.Name, Stage: at, Paths: paths})
	}
	b.restart(ph, at, m, l.workerPrograms()...)
}

// copies adds a step that makes the copies in etcd follow their files.
func (b *planner) copies(ph Phase, at Stage) {
	for _, c := range b.l.Copies {
		if b.l.changes(b.s, b.l.file(c.Path), at) && !b.o.masters()[0].Files[c.Path].Absent {
			b.add(Step{Phase: ph, Verb: CopyToEtcd, Stage: at, Whole: b.s.Apart})
			return
		}
	}
}

// saveProfile adds the step that writes the API model: when the new is in use, so
// that a machine which is added from now on gets it.
func (b *planner) saveProfile() {
	if b.l.hasProfile() {
		b.add(Step{Phase: Switch, Verb: SaveProfile})
	}
}

func (b *planner) retire() {
	before := len(b.plan.Steps)
	for _, m := range b.o.masters() {
		b.place(Retire, Retired, m, Roots, RootKey, TokenPublic, LeafTokenKey)
		b.kubeconfigs(Retire, Retired, m)
		b.restart(Retire, Retired, m, "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
		b.place(Retire, Retired, m, IssuerCert, IssuerKey)
	}
	for _, m := range b.o.Machines {
		if !m.Master {
			b.place(Retire, Retired, m, Roots)
		}
		b.kubelet(Retire, Retired, m)
	}
	b.copies(Retire, Retired)
	for _, m := range b.o.Machines { // the cross certificate goes when no etcd knows only the old CA any more
		b.place(Retire, Retired, m, LeafCert)
	}
	if len(b.plan.Steps) == before {
		b.add(Step{Phase: Retire, Verb: Clean, NoReturn: true})
		return
	}
	b.plan.Steps[before].NoReturn = true
	b.add(Step{Phase: Retire, Verb: Reach})
	b.add(Step{Phase: Retire, Verb: AllReady})
	if b.s.Cluster || b.s.FrontProxy {
		b.add(Step{Phase: Retire, Verb: Objects, Stage: Retired})
	}
	if b.s.Cluster {
		b.add(Step{Phase: Retire, Verb: Published, Stage: Retired})
	}
	b.add(Step{Phase: Retire, Verb: Refused})
	b.add(Step{Phase: Retire, Verb: Clean})
}

// impact says what clients of the API will notice.
func (b *planner) impact() string {
	if b.s.Apart {
		return "it is away already; it comes back, server by server, about a minute after the files are in place"
	}
	restarts := 0
	for _, s := range b.plan.Steps {
		if s.Verb == Restart && slices.Contains(s.Components, "kube-apiserver") {
			restarts++
		}
	}
	switch {
	case restarts == 0:
		return "none: no API server restarts"
	case b.plan.Drain:
		return fmt.Sprintf("none through a load balancer: %d restarts of API servers, one at a time, their clients led to another; each server by itself is away for up to 60 s at a time", restarts)
	}
	return fmt.Sprintf("up to 60 s, %d times, one API server at a time", restarts)
}
