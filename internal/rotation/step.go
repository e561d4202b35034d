package rotation

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/journal"
)

// step gives a planned step its functions.
func (e *Engine) step(s Step) journal.Step {
	out := journal.Step{Name: s.Name(), NoReturn: s.NoReturn}
	switch s.Verb {
	case Lock:
		out.Do = func(ctx context.Context) error { return e.lock(ctx, s.Node) }
		out.Undo = func(ctx context.Context) error { return e.clean(ctx, s.Node) }
	case BackUp:
		out.Do = func(ctx context.Context) error { return e.backUp(ctx, s.Node) }
	case Snapshot:
		out.Do = func(ctx context.Context) error { return e.snapshot(ctx, s.Node) }
	case Make:
		out.Do = e.make
		out.Undo = e.untrust
	case StageIt:
		out.Do = func(ctx context.Context) error { return e.stage(ctx, s.Node) }
	case Publish:
		out.Do = e.publish
	case Place:
		args := e.placements(s.Node, s.Paths, s.Stage)
		out.Check = func(ctx context.Context) (bool, error) { return e.placed(ctx, s.Node, args) }
		out.Do = func(ctx context.Context) error { return e.place(ctx, s, args) }
		out.Undo = func(ctx context.Context) error { return e.place(ctx, s, e.placements(s.Node, s.Paths, s.before())) }
	case Restart:
		out.Check = func(ctx context.Context) (bool, error) { return e.restarted(ctx, s, s.Stage) }
		out.Do = func(ctx context.Context) error { return e.restart(ctx, s, s.Stage) }
		out.Undo = func(ctx context.Context) error { return e.restart(ctx, s, s.before()) }
	default:
		e.apiStep(s, &out)
	}
	return out
}

// apiStep is step for what is done at the API.
func (e *Engine) apiStep(s Step, out *journal.Step) {
	switch s.Verb {
	case CopyToEtcd:
		out.Do = func(ctx context.Context) error { return e.copyToEtcd(ctx, s.Stage) }
		out.Undo = func(ctx context.Context) error { return e.copyToEtcd(ctx, s.before()) }
	case SaveProfile:
		out.Do = func(ctx context.Context) error { return e.SaveProfile(ctx, e.newProfile()) }
		out.Undo = func(ctx context.Context) error { return e.SaveProfile(ctx, e.material.Profile) }
	case Objects:
		out.Do = func(ctx context.Context) error { return e.objects(ctx, s.Stage) }
		out.Undo = func(ctx context.Context) error { return e.objects(ctx, s.before()) }
	case EtcdUp:
		out.Do = e.etcdUp
	case APIUp:
		out.Do = e.apiUp
	case Canary:
		out.Do = e.gate(e.canary)
	case Served:
		out.Do = e.served
	case AllReady:
		out.Do = e.gate(e.allReady)
		out.Undo = e.gate(e.allReady)
	case Tokens:
		// On the way back, tokens are renewed when the old key signs again and before
		// the new one is refused: that is where this step stands in the phase trust.
		if out.Do, out.Undo = e.tokenSecrets, nil; s.Phase == Trust {
			out.Do, out.Undo = func(context.Context) error { return nil }, e.tokensBack
		}
	case Published:
		out.Do = e.gate(func(ctx context.Context) error { return e.published(ctx, s.Stage) })
	case Unused:
		out.Do = e.unused
	case Refused:
		out.Do = e.refused
	case Clean:
		out.Do = e.cleanAll
	default:
		out.Do = func(context.Context) error { return fmt.Errorf("no rule for the step %q", s.Verb) }
	}
}

func (e *Engine) backUp(ctx context.Context, node string) error {
	paths := e.layoutOn(node).kept(e.Observed.machine(node))
	_, err := e.change(ctx, node, Script{Name: "back up", Text: e.on(node).backUp, Args: paths})
	return err
}

// snapshot keeps a snapshot of etcd on a master, for the worst case: sealed to the
// operator like the new material.
func (e *Engine) snapshot(ctx context.Context, node string) error {
	etcd, err := e.openEtcd(ctx)
	if err != nil {
		return err
	}
	defer etcd.Close()
	kept, err := e.Spool(func(w io.Writer) error { return etcd.Snapshot(ctx, w) })
	if err != nil {
		return err
	}
	defer kept.Close()
	return e.Hosts[node].Put(ctx, e.dir()+"/etcd-snapshot.db.age", kept, 0o600)
}

// make makes the new material, once.
func (e *Engine) make(ctx context.Context) error {
	if e.material != nil {
		return nil
	}
	was, err := e.present(ctx)
	if err != nil {
		return err
	}
	m, err := makeMaterial(e.Layout, e.Plan.Scope, was, e.Now())
	if err != nil {
		return fault.New(fault.Invalid, "BadCA", "The present CAs cannot be succeeded: %s.", err)
	}
	m.Profile = e.Profile
	if m.Copies, err = e.copies(ctx); err != nil {
		return err
	}
	plain, err := json.Marshal(m)
	if err != nil {
		return err
	}
	sealed, err := e.Seal(plain)
	if err != nil {
		return fmt.Errorf("sealing the new material: %w", err)
	}
	if err := e.Journal.Set(materialValue, sealed); err != nil {
		return err
	}
	e.material = m
	return nil
}

// present reads on the first master what the new material follows from.
func (e *Engine) present(ctx context.Context) (present, error) {
	l, first := e.Layout, e.Observed.masters()[0]
	was := present{
		roots: map[Authority][]byte{}, keys: map[Authority][]byte{}, holders: map[Authority]Pair{},
		shared: map[string]*x509.Certificate{}, sharedKeys: map[string][]byte{}, given: e.Given, apart: e.Plan.Scope.Apart,
	}
	var err error
	read := func(path string) (text []byte) {
		if err == nil {
			text, err = e.read(ctx, first.Name, path)
		}
		return text
	}
	for _, a := range e.Observed.authorities() {
		was.roots[a] = first.Files[l.rootFile(a)].Content
		if key := l.rootKey(a); key != "" {
			was.keys[a] = read(key)
		} else if f := l.leafOf(a); f.Path != "" {
			was.holders[a] = Pair{first.Files[f.Path].Content, read(l.keyOf(f.Path).Path)}
		}
	}
	was.tokenPublic = first.Files[l.find(TokenPublic, "")].Content
	was.tokenKey = read(l.tokenKeyFile())
	if err != nil {
		return was, err
	}
	wants, err := l.keysOf(e.Plan.Scope, first, true)
	for _, w := range wants {
		was.shared[w.file.Path] = w.like
		if w.file.Holds == LeafTokenKey && !e.Plan.Scope.Tokens {
			was.sharedKeys[w.file.Path] = was.tokenKey
		}
	}
	return was, err
}

// read returns a file with a secret, for our memory alone.
func (e *Engine) read(ctx context.Context, node, path string) ([]byte, error) {
	return readFile(ctx, e.Hosts[node], path)
}

// stage makes keys on a machine, issues certificates for them, and sends the trees.
func (e *Engine) stage(ctx context.Context, node string) error {
	m := e.Observed.machine(node)
	wants, err := e.layoutOn(node).keysOf(e.Plan.Scope, m, false)
	if err != nil {
		return err
	}
	public := map[string]crypto.PublicKey{}
	if len(wants) > 0 {
		var args []string
		for _, w := range wants {
			args = append(args, string(w.kind)+":"+w.name)
		}
		out, err := e.change(ctx, node, Script{Name: "make keys", Text: keysScript, Args: args, Timeout: 5 * time.Minute, Quiet: true})
		if err != nil {
			return err
		}
		if public, err = parseKeys(string(out)); err != nil {
			return fmt.Errorf("reading the keys of %s: %w", node, err)
		}
	}
	t, err := compose(e.Layout, e.Plan.Scope, m, e.material, public, e.Plan.Run, e.Now())
	if err != nil {
		return err
	}
	input, err := e.packed(node, t)
	if err != nil {
		return err
	}
	_, err = e.change(ctx, node, Script{Name: "stage files", Text: e.on(node).stage, Args: t.verbs, Input: input})
	return err
}

// parseKeys reads what keysScript printed.
func parseKeys(out string) (map[string]crypto.PublicKey, error) {
	keys := map[string]crypto.PublicKey{}
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		name, text, ok := strings.Cut(line, "|")
		if !ok {
			return nil, fmt.Errorf("%q is not a line of the script", line)
		}
		pemText, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, err
		}
		if keys[name], err = parsePublic(pemText); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// publish puts a copy of the journal on every master: a lost laptop strands nobody.
func (e *Engine) publish(ctx context.Context) error {
	text, err := e.Copy()
	if err != nil {
		return fmt.Errorf("reading the journal: %w", err)
	}
	for _, m := range e.Observed.masters() {
		if err := e.Hosts[m.Name].Put(ctx, e.dir()+"/journal", bytes.NewReader(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// placements are the arguments of placeScript for files as they must be at a stage.
func (e *Engine) placements(node string, paths []string, at Stage) []string {
	var out []string
	l := e.layoutOn(node)
	for _, p := range paths {
		f := l.file(p)
		from := l.from(e.Plan.Scope, f, at)
		if f.Holds == KubeletPair && from == Switched.String() { // what the link leads to comes first
			out = append(out, from+":"+p[:strings.LastIndex(p, "/")]+"/kubelet-client-"+e.Plan.Run+".pem")
		}
		out = append(out, from+":"+p)
	}
	return out
}

func (e *Engine) placed(ctx context.Context, node string, args []string) (bool, error) {
	out, err := e.Hosts[node].Run(ctx, Script{Name: "check files", Text: e.on(node).placed, Args: append([]string{e.dirOn(node)}, args...), Quiet: true})
	return strings.TrimSpace(string(out)) == "yes", err
}

func (e *Engine) place(ctx context.Context, s Step, args []string) error {
	_, err := e.change(ctx, s.Node, Script{Name: s.Name(), Text: e.on(s.Node).place, Args: args})
	return err
}

// restarted reports whether the components run as they must at a stage: their
// manifest is in place, and they began after the last change of what they read once.
func (e *Engine) restarted(ctx context.Context, s Step, at Stage) (bool, error) {
	l := e.layoutOn(s.Node)
	for _, name := range s.Components {
		c := l.component(name)
		files := l.readOnce(c)
		if c.Pod != "" {
			ok, err := e.placed(ctx, s.Node, e.placements(s.Node, []string{c.Pod}, at))
			if err != nil || !ok {
				return false, err
			}
			files = append(files, c.Pod)
		}
		out, err := e.Hosts[s.Node].Run(ctx, Script{Name: "look at " + name, Text: e.on(s.Node).started, Args: append([]string{name}, files...), Quiet: true})
		if err != nil || strings.TrimSpace(string(out)) != "yes" {
			return false, err
		}
	}
	if slices.Contains(s.Components, "kube-apiserver") && !s.Whole {
		api, err := e.api(s.Node)
		if err != nil {
			return false, err
		}
		return api.Ready(ctx) == nil, nil
	}
	return true, nil
}

// restart restarts components of a machine so that they run as at the stage.
func (e *Engine) restart(ctx context.Context, s Step, at Stage) error {
	m := e.Observed.machine(s.Node)
	if m.OS == windowsOS {
		return e.changes(ctx, s.Node, e.restartServices(s, at)...)
	}
	if len(s.Components) == 1 && s.Components[0] == "kubelet" {
		c := e.Layout.component("kubelet")
		_, err := e.change(ctx, s.Node, Script{Name: s.Name(), Text: unitScript, Args: []string{c.Unit}, Input: []byte("-"), Timeout: 2 * time.Minute, Finishes: true, Unit: e.unit(s)})
		return err
	}
	neighbour := "-"
	if e.Plan.Drain && slices.Contains(s.Components, "kube-apiserver") {
		n, err := e.neighbour(ctx, m)
		if err != nil {
			return err
		}
		neighbour = n
	}
	if slices.Contains(s.Components, "etcd") && !e.Plan.Scope.Apart {
		if err := until(ctx, 2*time.Minute, func(ctx context.Context) error { return e.leadAway(ctx, m) }); err != nil {
			return err
		}
	}
	_, port, err := net.SplitHostPort(m.Endpoint)
	if err != nil {
		return fmt.Errorf("the address of the API server of %s: %w", m.Name, err)
	}
	args := []string{m.Address, port, e.Layout.Login, e.Layout.keyOf(e.Layout.Login).Path}
	for _, name := range s.Components {
		c := e.Layout.component(name)
		what := "unit:" + c.Unit
		if c.Pod != "" {
			what = e.Layout.from(e.Plan.Scope, e.Layout.file(c.Pod), at) + ":" + c.Pod
		}
		args = append(args, name+":"+what)
	}
	text := restartScript
	if s.Whole {
		text = afreshScript
	}
	_, err = e.change(ctx, s.Node, Script{Name: s.Name(), Text: text, Args: args, Input: []byte(neighbour), Timeout: 6 * time.Minute, Finishes: true, Unit: e.unit(s)})
	return err
}

// unit names the unit of systemd that a step runs as.
func (e *Engine) unit(s Step) string {
	return strings.ToLower("keyfleet-" + e.Plan.Run + "-" + string(s.Phase) + "-" + strings.Join(s.Components, "-"))
}

// neighbour is another master whose API server is ready.
func (e *Engine) neighbour(ctx context.Context, m Machine) (string, error) {
	var why error
	for _, other := range e.Observed.masters() {
		if other.Name == m.Name {
			continue
		}
		api, err := e.api(other.Name)
		if err == nil {
			if err = api.Ready(ctx); err == nil {
				return other.Address, nil
			}
		}
		why = errors.Join(why, fmt.Errorf("%s: %w", other.Name, err))
	}
	return "", fault.New(fault.Unavailable, "NoNeighbour", "No other API server is ready, so that of %s is not restarted.", m.Name).Because(why)
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

// leadAway makes sure that etcd goes on without the machine: all members answer,
// and another one leads.
func (e *Engine) leadAway(ctx context.Context, m Machine) error {
	etcd, err := e.openEtcd(ctx)
	if err != nil {
		return err
	}
	defer etcd.Close()
	members, err := etcd.Members(ctx)
	if err != nil {
		return err
	}
	if len(members) == 1 {
		return nil
	}
	var other uint64
	lead := false
	for _, member := range members {
		ours := strings.Contains(member.ClientURL, "//"+m.Address+":")
		if member.Err != nil && !ours {
			return fault.New(fault.Unavailable, "EtcdMemberDown", "Member %s of etcd does not answer, so that of %s is not restarted.", member.Name, m.Name).Because(member.Err).
				WithFix("bring it back, then run the same command again")
		}
		if ours {
			lead = member.Leader
		} else {
			other = member.ID
		}
	}
	if !lead {
		return nil
	}
	return etcd.MoveLeader(ctx, other)
}

func (e *Engine) clean(ctx context.Context, node string) error {
	_, err := e.change(ctx, node, Script{Name: "clean up", Text: e.on(node).clean})
	return err
}

func (e *Engine) cleanAll(ctx context.Context) error {
	for _, n := range e.Plan.Nodes {
		if err := e.clean(ctx, n.Name); err != nil {
			return err
		}
	}
	return nil
}
