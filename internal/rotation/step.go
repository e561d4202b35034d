package rotation

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
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
		out.Undo = func(ctx context.Context) error { return e.restartBack(ctx, s) }
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
	case Reach:
		out.Do = e.gate(e.reachKubelets)
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
		if s.Stage == Old { // the controller manager publishes some time after it was started again
			out.Undo = out.Do
		}
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
		pair := dated(p, e.Plan.Run)
		if f.Holds == KubeletPair && from == Switched.String() { // what the link leads to comes first
			out = append(out, from+":"+pair)
		}
		out = append(out, from+":"+p)
		if f.Holds == KubeletPair && from == Old.String() { // and goes last
			out = append(out, "absent:"+pair)
		}
	}
	return out
}

func (e *Engine) placed(ctx context.Context, node string, args []string) (bool, error) {
	out, err := e.Hosts[node].Run(ctx, Script{Name: "check files", Text: e.on(node).placed, Args: append([]string{e.dirOn(node)}, args...), Quiet: true})
	return strings.TrimSpace(string(out)) == "yes", err
}

func (e *Engine) place(ctx context.Context, s Step, args []string) error {
	_, err := e.change(ctx, s.Node, Script{Name: s.what(), Text: e.on(s.Node).place, Args: args})
	return err
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
