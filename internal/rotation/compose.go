package rotation

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto"
	"crypto/x509"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/pki"
)

// mark is the annotation of a static pod whose change makes the kubelet start it again.
const mark = "keyfleet.dev/rotated"

// stagesOf returns at which stages a file changes, manifests included.
func (l Layout) stagesOf(s Scope, f File) []Stage {
	if f.Holds != Manifest {
		return l.stages(s, f)
	}
	if s.Apart {
		return []Stage{Retired}
	}
	var out []Stage
	for _, at := range []Stage{Trusted, Switched, Retired} {
		for _, c := range l.restarts(s, at, true) {
			if c.Pod == f.Path {
				out = append(out, at)
			}
		}
	}
	return out
}

// from says from which tree a file is taken to be as it must be at a stage:
// that of the last change; "absent" where it must not be; "renewed" and "back" for
// what is moved away and brought back.
func (l Layout) from(s Scope, f File, at Stage) string {
	last := Old
	for _, st := range l.stagesOf(s, f) {
		if st <= at {
			last = st
		}
	}
	if f.Added && (last == Old || last == Retired) {
		return "absent"
	}
	if f.Holds == Renewed {
		return map[bool]string{true: "back", false: "renewed"}[last == Old]
	}
	return last.String()
}

// keyWant is a private key that a machine must make.
type keyWant struct {
	file File
	name string // below RUN/keys
	kind pki.Kind
	like *x509.Certificate // the certificate that the new one replaces
}

// keysOf lists the keys that a machine makes, or, if shared is set, that the
// runner makes for all: for every certificate that is issued anew, beside its file
// or inside a kubeconfig.
func (l Layout) keysOf(s Scope, m Machine, shared bool) ([]keyWant, error) {
	var out []keyWant
	for _, f := range l.of(m.Master) {
		if f.Shared != shared || m.Files[f.Path].Absent {
			continue
		}
		carrier := f.Path
		switch f.Holds {
		case LeafKey, LeafTokenKey:
			carrier = f.Pair
		case Kubeconfig, KubeletPair:
		default:
			continue
		}
		if !l.changes(s, l.file(carrier), Switched) {
			continue
		}
		cert, err := l.certificate(m.Files[carrier])
		if err != nil {
			return nil, err
		}
		if cert == nil { // a kubeconfig that names a file
			continue
		}
		kind, err := pki.KindOf(cert.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", carrier, err)
		}
		out = append(out, keyWant{f, keyName(f.Path), kind, cert})
	}
	return out, nil
}

// trees are the files of all stages of one machine: a tar, and what the machine
// does with its own keys afterwards (see stageScript).
type trees struct {
	tar   bytes.Buffer
	w     *tar.Writer
	verbs []string
	dirs  map[string]bool
}

func newTrees() *trees {
	t := &trees{dirs: map[string]bool{}}
	t.w = tar.NewWriter(&t.tar)
	return t
}

func (t *trees) add(at Stage, p string, content []byte, link string) error {
	name := at.String() + p
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		t.dirs[dir] = true
	}
	h := &tar.Header{Name: name, Mode: 0o600, Size: int64(len(content)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}
	if link != "" {
		h.Typeflag, h.Linkname, h.Size, content = tar.TypeSymlink, link, 0, nil
	}
	if err := t.w.WriteHeader(h); err != nil {
		return fmt.Errorf("packing %s: %w", name, err)
	}
	_, err := t.w.Write(content)
	return err
}

func (t *trees) verb(verb string, at Stage, p, key string) {
	t.verbs = append(t.verbs, strings.Join([]string{verb, at.String(), p, key}, ":"))
}

// compose makes the trees of a machine. public are its new keys by name.
func compose(l Layout, s Scope, m Machine, mat *Material, public map[string]crypto.PublicKey, run string, now time.Time) (*trees, error) {
	l = l.on(m.Node)
	t := newTrees()
	wants, err := l.keysOf(s, m, false)
	if err != nil {
		return nil, err
	}
	certs := map[string][]byte{} // by the file that carries the key
	for path, pair := range mat.Shared {
		certs[path] = pair.Cert
	}
	for _, w := range wants {
		pub := public[w.name]
		if pub == nil {
			return nil, fmt.Errorf("%s did not make a key for %s", m.Name, w.file.Path)
		}
		if w.file.Authority == "" { // the machine signs it itself
			continue
		}
		if certs[w.file.Path], err = mat.Authorities[w.file.Authority].reissue(w.like, pub, now); err != nil {
			return nil, fmt.Errorf("issuing the certificate of %s: %w", w.file.Path, err)
		}
	}
	for _, f := range l.of(m.Master) {
		if m.Files[f.Path].Absent && !f.Added {
			continue
		}
		for _, at := range l.stagesOf(s, f) {
			if err := composeFile(t, l, s, m, f, at, mat, certs, run); err != nil {
				return nil, fmt.Errorf("composing %s for %s: %w", f.Path, m.Name, err)
			}
		}
	}
	return t, t.w.Close()
}

// keyName is the name of the key that a machine makes for a file, below RUN/keys.
func keyName(p string) string { return strings.Trim(strings.ReplaceAll(p, "/", "-"), "-") }

// dated is what the link of a KubeletPair leads to after a rotation.
func dated(link, run string) string { return strings.TrimSuffix(link, "current.pem") + run + ".pem" }

// composeFile adds one file at one stage.
func composeFile(t *trees, l Layout, s Scope, m Machine, f File, at Stage, mat *Material, certs map[string][]byte, run string) error {
	ca := mat.Authorities[f.Authority]
	switch f.Holds {
	case Roots:
		if at == Trusted {
			return t.add(at, f.Path, ca.both(), "")
		}
		return t.add(at, f.Path, ca.New, "")
	case RootKey:
		return t.add(at, f.Path, ca.NewKey, "")
	case IssuerCert, IssuerKey:
		if at == Retired {
			return nil // it goes
		}
		pair := map[bool][2][]byte{true: {ca.New, ca.NewKey}, false: {ca.Old, ca.OldKey}}[at == Switched]
		return t.add(at, f.Path, pair[f.Holds-IssuerCert], "")
	case LeafCert:
		cert := certs[l.keyOf(f.Path).Path]
		if at == Switched {
			cert = join(cert, ca.Cross)
		}
		return t.add(at, f.Path, cert, "")
	case LeafKey:
		if f.Shared {
			return t.add(at, f.Path, mat.Shared[f.Path].Key, "")
		}
		t.verb("key", at, f.Path, keyName(f.Path))
		return nil
	case SelfCert:
		cert, err := l.certificate(m.Files[f.Path])
		if err != nil {
			return err
		}
		days := int(cert.NotAfter.Sub(cert.NotBefore).Hours() / 24)
		t.verb(fmt.Sprintf("self-%d", max(days, 1)), at, f.Path, keyName(l.keyOf(f.Path).Path))
		return nil
	case LeafTokenKey:
		return t.add(at, f.Path, mat.Tokens.keys(at), "")
	case TokenKey:
		return t.add(at, f.Path, mat.Tokens.NewKey, "")
	case TokenPublic:
		if at == Trusted {
			return t.add(at, f.Path, join(mat.Tokens.OldPublic, mat.Tokens.NewPublic), "")
		}
		return t.add(at, f.Path, mat.Tokens.NewPublic, "")
	case Kubeconfig:
		return composeKubeconfig(t, m, f, at, mat, certs)
	case KubeletPair:
		pair, cert := dated(f.Path, run), certs[f.Path]
		if f.Served {
			cert = join(cert, ca.Cross)
		}
		if err := t.add(at, pair, cert, ""); err != nil {
			return err
		}
		t.verb("append", at, pair, keyName(f.Path))
		return t.add(at, f.Path, nil, pair)
	case Renewed:
		return nil // its owner makes it
	case Manifest:
		text, err := remark(m.Files[f.Path].Content, l, s, f.Path, at, run)
		if err != nil {
			return err
		}
		return t.add(at, f.Path, text, "")
	}
	return fmt.Errorf("no rule for a file of kind %d", f.Holds)
}

func composeKubeconfig(t *trees, m Machine, f File, at Stage, mat *Material, certs map[string][]byte) error {
	k, err := parseKubeconfig(m.Files[f.Path].Content)
	if err != nil {
		return err
	}
	ca := mat.Authorities[f.Authority]
	roots := ca.New
	if at == Switched {
		roots = ca.both()
	}
	carrier := cmp.Or(f.Same, f.Path)
	if f.Same != "" && (k.clientCert == nil || certs[carrier] == nil) {
		return fmt.Errorf("it does not embed the certificate that all machines share, or there is no new one")
	}
	text, err := k.with(roots, certs[carrier], mat.Shared[carrier].Key)
	if err != nil {
		return err
	}
	if k.clientCert != nil && !f.Shared {
		t.verb("config", at, f.Path, keyName(f.Path))
	}
	return t.add(at, f.Path, text, "")
}

// remark returns a static pod's manifest with our mark, and with the flags of the
// issuing CA led to its own files while old and new overlap.
func remark(text []byte, l Layout, s Scope, manifest string, at Stage, run string) ([]byte, error) {
	var doc map[string]any
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("reading a manifest: %w", err)
	}
	meta, _ := doc["metadata"].(map[string]any)
	if meta == nil {
		return nil, fmt.Errorf("reading a manifest: it has no metadata")
	}
	notes, _ := meta["annotations"].(map[string]any)
	if notes == nil {
		notes = map[string]any{}
		meta["annotations"] = notes
	}
	notes[mark] = run + "-" + at.String()
	i := slices.IndexFunc(l.Components, func(c Component) bool { return c.Pod == manifest })
	if i < 0 || len(l.Components[i].Issuer) == 0 || !s.Cluster || at == Retired {
		return yaml.Marshal(doc)
	}
	spec, _ := doc["spec"].(map[string]any)
	containers, _ := spec["containers"].([]any)
	for flag, to := range l.Components[i].Issuer {
		if !setFlag(containers, flag, to) {
			return nil, fmt.Errorf("reading a manifest: it has no flag %s", flag)
		}
	}
	return yaml.Marshal(doc)
}

// setFlag sets a flag in the command or arguments of a container.
func setFlag(containers []any, flag, value string) bool {
	for _, c := range containers {
		container, _ := c.(map[string]any)
		for _, list := range []string{"command", "args"} {
			words, _ := container[list].([]any)
			for i, w := range words {
				if word, _ := w.(string); strings.HasPrefix(word, flag+"=") {
					words[i] = flag + "=" + value
					return true
				}
			}
		}
	}
	return false
}
